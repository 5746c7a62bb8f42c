"""Masks against loops, and SparseGPT against explicit inverses of what is left of H."""

import itertools

import pytest
import torch

from skimlm.errors import SkimError
from skimlm.quantize.mask import Sparsity, best, magnitude, sparsegpt, wanda

TWO_FOUR = Sparsity(2, 4)


def weight(r, c, seed=0):
    return torch.randn(r, c, generator=torch.Generator().manual_seed(seed))


def gram(c, seed=1, tokens=200):
    x = weight(tokens, c, seed) @ (weight(c, c, seed + 1) * 0.3 + torch.eye(c))
    return x.T @ x


@pytest.mark.parametrize(
    ("text", "want"),
    [("none", None), ("2:4", TWO_FOUR), ("4:8", Sparsity(4, 8)), ("0.5", Sparsity(ratio=0.5))],
)
def test_a_sparsity_is_read_from_its_usual_name(text, want):
    assert Sparsity.parse(text) == want
    assert want is None or str(want) == text


@pytest.mark.parametrize(
    "text", ["4:2", "0:4", "2:", "1.0", "0", "-0.5", "half", "", "2:4:8", "nan"]
)
def test_a_sparsity_that_makes_no_sense_is_one_line(text):
    with pytest.raises(SkimError, match="sparsity must be none, N:M"):
        Sparsity.parse(text)


def test_two_of_four_keeps_the_best_pair_of_every_four():
    score = weight(5, 12).abs()
    mask = best(score, TWO_FOUR)
    for i in range(5):
        for j in range(0, 12, 4):
            pairs = itertools.combinations(range(4), 2)
            want = max(pairs, key=lambda p: sum(float(score[i, j + q]) for q in p))
            assert mask[i, j : j + 4].nonzero().flatten().tolist() == list(want)


def test_a_share_is_dropped_from_every_row():
    score = weight(6, 11).abs()
    mask = best(score, Sparsity(ratio=0.3))
    assert mask.sum(1).tolist() == [11 - 3] * 6
    for row, keep in zip(score, mask, strict=True):
        assert row[keep].min() > row[~keep].max()


def test_of_equal_scores_the_later_stay():
    assert best(torch.ones(1, 4), TWO_FOUR).tolist() == [[False, False, True, True]]


def test_wanda_weighs_by_the_inputs_and_magnitude_does_not():
    w, rms = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([1.0, 1.0, 1.0, 9.0])
    assert magnitude(w, TWO_FOUR).tolist() == [[True, True, False, False]]
    assert wanda(w, rms, TWO_FOUR).tolist() == [[True, False, False, True]]


def test_a_width_that_four_does_not_divide_is_refused():
    with pytest.raises(SkimError, match="2:4 needs a multiple of 4 inputs, got 10"):
        magnitude(weight(2, 10), TWO_FOUR)


def obs_loop(w, h, sparsity, quantize, damp, block):
    """The same by definition: the inverse of what is left of H at every column."""
    w, c = w.double().clone(), w.shape[1]
    h = h.double() + damp * h.double().diagonal().mean() * torch.eye(c)
    inverse = [torch.linalg.inv(h[j:, j:]) for j in range(c)]
    mask = torch.ones(w.shape, dtype=torch.bool)
    for j in range(c):
        size = sparsity.of if sparsity.of else block
        if j % size == 0:
            part = range(j, min(j + size, c))
            score = torch.stack([w[:, k] ** 2 / inverse[k][0, 0] for k in part], 1)
            drop = sparsity.of - sparsity.keep if sparsity.of else round(len(part) * sparsity.ratio)
            for i in range(len(w)):
                for k in score[i].argsort(stable=True)[:drop]:
                    mask[i, j + int(k)] = False
        q = w[:, j] * mask[:, j]
        if quantize:
            q = quantize(w[:, j].float(), j).double() * mask[:, j]
        error = (w[:, j] - q) / inverse[j][0, 0]
        w[:, j:] -= error[:, None] * inverse[j][0]
        w[:, j] = q
    return w, mask


@pytest.mark.parametrize("sparsity", [TWO_FOUR, Sparsity(4, 8), Sparsity(ratio=0.5)], ids=str)
@pytest.mark.parametrize("rounded", [False, True], ids=["pruned", "pruned and rounded"])
def test_sparsegpt_is_the_loop_over_inverses(sparsity, rounded):
    w, h = weight(7, 32), gram(32)
    quantize = (lambda column, j: (column * 4).round() / 4) if rounded else None
    got, mask = sparsegpt(w, h, sparsity, quantize, block=16)
    want, want_mask = obs_loop(w, h, sparsity, quantize, 0.01, 16)
    assert torch.equal(mask, want_mask)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert not got[~mask].any()


def test_sparsegpt_leaves_less_error_than_its_mask_alone():
    w, h = weight(16, 64), gram(64)
    new, mask = sparsegpt(w, h, TWO_FOUR)
    loss = [float(torch.einsum("ij,jk,ik->", d, h, d)) for d in (new - w, w * mask - w)]
    assert loss[0] < 0.8 * loss[1]


def test_a_dead_input_costs_nothing_and_stays_finite():
    w, h = weight(4, 16), gram(16)
    h[3], h[:, 3] = 0, 0
    new, mask = sparsegpt(w, h, TWO_FOUR)
    assert new.isfinite().all() and not new[:, 3].any()
    assert mask.view(4, 4, 4).sum(-1).eq(2).all()


@pytest.mark.parametrize("c", [100, 128, 576, 129])
def test_the_blocks_of_a_share_add_up_to_what_a_row_keeps(c):
    sparsity = Sparsity(ratio=0.37)
    _, mask = sparsegpt(weight(3, c), gram(c), sparsity)
    assert mask.sum(1).tolist() == [sparsity.kept(c)] * 3
