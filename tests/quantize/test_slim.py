"""SLiM layers: what holds whatever the numbers, and the published pass by its formulas."""

import dataclasses

import pytest
import torch

from skimlm.format import dequantize, effective, pack, unpack
from skimlm.quantize import grid, lowrank
from skimlm.quantize.mask import Sparsity, sparsegpt, wanda
from skimlm.quantize.slim import Options, error, fit, fit_paper

TWO_FOUR, HALF = Sparsity(2, 4), Sparsity(ratio=0.5)


def weight(r, c, seed=0):
    return torch.randn(r, c, generator=torch.Generator().manual_seed(seed)) * 0.1


def gram(c, seed=1):
    x = weight(4 * c, c, seed) @ (weight(c, c, seed + 1) * 3 + torch.eye(c))
    return x.T @ x


def share(q, w, h):
    """Error of all that is stored, as a share of the error of storing nothing."""
    return error(effective(q) - w, h) / error(w, h)


@pytest.mark.parametrize("sparsity", [TWO_FOUR, HALF, Sparsity(4, 8), None], ids=str)
@pytest.mark.parametrize("group", [None, 16, 0], ids=["codebook", "groups", "one scale"])
@pytest.mark.parametrize("rank", [0, 0.4])
@pytest.mark.parametrize("adapter_bits", [4, 16])
def test_every_combination_is_stored_without_loss_and_keeps_its_pattern(
    sparsity, group, rank, adapter_bits
):
    w, h = weight(24, 48), gram(48)
    options = Options(3, sparsity, rank, adapter_bits, group, rounds=2)
    fits = [fit(w, h, dataclasses.replace(options, group=group or 48 if group == 0 else group))]
    if group is not None:
        fits.append(fit_paper(w, h, dataclasses.replace(options, quantizer="error")))
    for q in fits:
        assert q.shape == (24, 48) and (q.adapter is not None) == bool(rank)
        assert effective(q).isfinite().all()
        sparse = dequantize(q)
        if sparsity is None:
            assert q.mask is None
        elif sparsity.of:
            kept = q.mask.view(24, -1, sparsity.of).sum(-1)
            assert (kept == sparsity.keep).all() and not sparse[~q.mask].any()
        else:
            assert (q.mask.sum(1) == 24).all() and not sparse[~q.mask].any()
        back = unpack(pack(q))
        assert torch.equal(effective(back), effective(q))


@pytest.mark.parametrize("sparsity", [TWO_FOUR, HALF, None], ids=str)
def test_what_is_fitted_jointly_loses_less_than_the_published_pass(sparsity):
    w, h = weight(64, 96), gram(96)
    paper = share(fit_paper(w, h, Options(4, sparsity, 0.25, 4, 0)), w, h)
    joint = share(fit(w, h, Options(4, sparsity, 0.25, 4)), w, h)
    assert joint < 0.5 * paper


def test_published_orders_hold_for_two_of_four():
    w, size = weight(96, 96), torch.linspace(0.1, 4, 96).diag()  # inputs of unlike sizes
    h = size @ (gram(96) + 100 * torch.eye(96)) @ size
    base = Options(4, TWO_FOUR, 0.2, 16, 0)
    pruned, naive, slim, full = (
        share(fit_paper(w, h, dataclasses.replace(base, **change)), w, h)
        for change in ({"rank": 0}, {"adapter": "naive"}, {}, {"adapter": "gram"})
    )
    assert full < slim < naive < pruned


def test_the_published_pass_is_its_formulas():
    w, h = weight(40, 64), gram(64)
    q = fit_paper(w, h, Options(4, TWO_FOUR, 0.4, 16, 0))
    squares = h.diagonal() + h.diagonal().min()
    mask = wanda(w, squares.sqrt(), TWO_FOUR)

    def rounded(x):
        steps = grid.slim_quant(x, 4)
        return grid.decode(grid.encode(x, steps, 4, 64), steps, 4, 64)

    root = squares.sqrt()
    u, s, v = torch.linalg.svd((w - rounded(w) * mask) * root)
    k = lowrank.rank_of(0.4, 40, 64)
    low = (u[:, :k] * s[:k] @ v[:k]) / root
    final = rounded((w - low) * mask) * mask
    assert torch.equal(q.mask, mask)
    torch.testing.assert_close(dequantize(q), final, atol=1e-5, rtol=0)
    a, b = q.adapter.values()
    torch.testing.assert_close(b.T @ a, low, atol=2e-3, rtol=0)  # factors are bfloat16


def test_sparsegpt_with_rounding_is_one_loop():
    w, h = weight(12, 32), gram(32)
    options = Options(4, TWO_FOUR, 0, 4, 16, mask="sparsegpt", quantizer="absmax")
    steps = grid.absmax(w, 4, 16)

    def rounded(column, j):
        step = steps[:, j // 16]
        return (column / step).round().clamp(-8, 7) * step

    want, mask = sparsegpt(w, h, TWO_FOUR, rounded)
    q = fit_paper(w, h, options)
    assert torch.equal(q.mask, mask)
    torch.testing.assert_close(dequantize(q), want)


def test_salient_columns_keep_the_pattern_and_lose_less_there():
    w, h = weight(32, 200), gram(200)
    h[7] *= 50
    h[:, 7] *= 50
    options = Options(3, TWO_FOUR, 0.2, 16, 0, quantizer="slim")
    plain = fit_paper(w, h, options)
    salient = fit_paper(w, h, dataclasses.replace(options, salient=True))
    assert salient.in_scale is not None and salient.in_scale[7] == 0.5
    assert salient.in_scale.float().sum() == 199
    assert torch.equal(salient.mask, plain.mask)


def test_rows_may_differ_in_width():
    w, h = weight(20, 32), gram(32)
    widths = torch.tensor([2, 3, 4, 5] * 5, dtype=torch.uint8)
    q = fit(w, h, Options(4, None, 0), widths=widths)
    assert torch.equal(q.widths, widths)
    d = effective(q) - w
    rows = ((d @ h) * d).sum(1) / ((w @ h) * w).sum(1)
    by_width = rows.view(5, 4).mean(0)
    assert by_width[0] > by_width[1] > by_width[2]


@pytest.mark.parametrize(
    "options", [Options(4, TWO_FOUR, 0.4), Options(4, TWO_FOUR, 0.4, group=16)]
)
def test_zero_matrices_dead_inputs_and_constant_rows_are_finite(options):
    h = gram(32)
    h[:4], h[:, :4] = 0, 0
    odd = weight(16, 32)
    odd[3] = 0.25
    paper = dataclasses.replace(options, group=0)
    for w, matrix in ((torch.zeros(16, 32), h), (odd, h), (odd, torch.zeros(32, 32))):
        for q in (fit(w, matrix, options), fit_paper(w, matrix, paper)):
            assert effective(q).isfinite().all()
    assert not effective(fit(torch.zeros(16, 32), h, options)).any()


def test_a_target_replaces_the_weight():
    w, h = weight(16, 32), gram(32)
    goal = w + weight(16, 32, 9) * 0.3
    q = fit(w, h, Options(4, None, 0.4), goal)
    assert share(q, goal, h) < 0.02 < share(q, w, h)
