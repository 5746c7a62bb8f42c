"""One linear from weight to stored values: rounding, uniform grids by brute force, curves."""

import numpy as np
import pytest
import torch

from skimlm.format.pack import check_values, dequantize, pack, unpack
from skimlm.quantize import fit as F
from skimlm.quantize import refine, trellis_fit
from skimlm.quantize.kmeans import kmeans_reference
from skimlm.quantize.refine import damped


def problem(seed: int = 0, r: int = 24, c: int = 37, widths=None):
    """A weight with heavy tails, positive sensitivities, a damped Gram matrix and mixed widths."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(r, c, generator=g) * (1 + 3 * (torch.rand(r, c, generator=g) < 0.03))
    f = torch.rand(r, c, generator=g) ** 2 + 1e-3
    x = torch.randn(3 * c, c, generator=g) @ torch.randn(c, c, generator=g) / c**0.5
    width = torch.tensor(widths or range(1, 9))[torch.arange(r) % len(widths or range(1, 9))]
    return w, f, damped(x.T @ x), width.to(torch.uint8)


def started(w, f, widths) -> F.Fit:
    return F.start(w, f, widths, F.kmeans_rows(w, f, 5)[0])


def error(w, w_hat, h) -> np.ndarray:
    d = (w_hat - w).double()
    return ((d @ h.double()) * d).sum(1).numpy()


def grids(w, f, width: int):
    """Every (scale, zero, codes, error) that the three ranges give one row, number by number."""
    top = 2**width - 1
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    for shrink in (1.0, 0.96, 0.92):
        span = np.float32(high - low) * np.float32(shrink)
        want = float(np.float32(span / np.float32(top))) if span > 0 else 1.0
        scale = float(torch.tensor(want).bfloat16())
        if scale < want:  # the next bfloat16 up
            bits = torch.tensor(want).bfloat16().view(torch.int16) + 1
            scale = float(bits.view(torch.bfloat16))
        zero = round(float(-np.float32(low) * np.float32(shrink)) / scale)
        codes = [min(max(round(float(v) / scale) + zero, 0), top) for v in w]
        cost = sum(
            float(a) * ((code - zero) * scale - float(v)) ** 2
            for a, v, code in zip(f, w, codes, strict=True)
        )
        yield scale, zero, codes, cost


@pytest.mark.parametrize("width", [6, 7, 8])
def test_grids_are_the_best_of_the_ranges(width):
    w, f, _, _ = problem(width)
    w[3] = w[3].abs()  # one-sided rows
    w[4] = -w[4].abs()
    f[5, [w[5].argmax(), w[5].argmin()]] = 1e-12  # ends that do not count
    got = F.affine_rows(w, f, torch.full((len(w),), width, dtype=torch.uint8))
    values = F.affine_values(got)
    clipped = 0
    for i in range(len(w)):
        options = list(grids(w[i], f[i], width))
        best = min(range(3), key=lambda t: options[t][3])
        clipped += best > 0
        scale, zero, codes, cost = options[best]
        mine = float((f[i].double() * (values[i] - w[i]).double() ** 2).sum())
        assert mine == pytest.approx(cost, rel=1e-5)
        assert (float(got.row_scale[i]), int(got.row_zero[i])) == (scale, zero)
        assert (got.codes[i].int() - torch.tensor(codes)).abs().max() <= 1  # exact ties may differ
        assert (got.codes[i].tolist() == codes) or (values[i] - w[i]).abs().max() >= scale * 0.499
    assert clipped  # the narrower ranges do win somewhere
    assert 0 <= int(got.row_zero.min()) and int(got.row_zero.max()) < 2**width


@pytest.mark.parametrize("refined", [False, True])
def test_rounding_moves_a_value_by_at_most_half_a_level(refined):
    w, f, h, widths = problem(1)
    fit = started(w, f, widths)
    if refined:
        F.refine_fit(w, h, fit, 2, 2)
    dense = fit.dense()
    q = F.finish(w, None, fit)
    check_values(q)
    step = q.row_scale.float()
    largest = torch.stack(
        [fit.codebook[i, :n].abs().max() for i, n in enumerate(fit.sizes.tolist())]
    )
    for i in range(len(w)):
        moved = (dequantize(q)[i] - dense[i]).abs().max()
        if widths[i] > 5:
            assert moved == 0
            continue
        assert moved <= step[i] / 2 * (1 + 1e-5)
        assert largest[i] / 127 <= step[i] <= largest[i] / 127 * (1 + 2**-7)
        n = 2 ** int(widths[i])
        levels = q.codebook[i].int()
        assert (levels[:n].diff() >= 0).all() and levels[:n].abs().max() <= 127
        assert (levels[n:] == 0).all()
    assert torch.equal(q.widths, widths)


def test_all_widths_in_one_linear_come_out_close():
    w, f, h, widths = problem(2, r=40)
    fit = started(w, f, widths)
    F.refine_fit(w, h, fit, 2, 3)
    dense = fit.dense()
    relative = (dequantize(F.finish(w, None, fit)) - dense).norm(dim=1) / dense.norm(dim=1)
    assert (relative[widths > 5] == 0).all() and (relative < 0.03).all()
    q, rough = F.finish(w, h, fit), F.finish(w, None, started(w, f, widths))
    for b in range(1, 9):
        rows = widths == b
        assert int(q.codes[rows].max()) < 2**b
        least, most = (error(w, dequantize(x), h)[rows].sum() for x in (q, rough))
        assert least < most if b < 6 else least == most


def test_settled_codes_are_never_worse_than_unsettled_ones():
    w, f, h, widths = problem(3)
    one, two = started(w, f, widths), started(w, f, widths)
    for fit in (one, two):
        F.refine_fit(w, h, fit, 1, 1)
    loose = error(w, dequantize(F.finish(w, None, one)), h)
    settled = error(w, dequantize(F.finish(w, h, two, sweeps=3)), h)
    assert (settled <= loose * (1 + 1e-6)).all() and (settled < loose).any()


def test_start_is_the_kmeans_solution_of_each_row():
    w, f, _, widths = problem(4, r=16, c=20)
    fit = started(w, f, widths)
    for i, b in enumerate(widths.tolist()):
        if b > 5:
            assert fit.sizes[i] == 1
            continue
        centroids, cost = kmeans_reference(w[i].numpy(), f[i].numpy(), 2**b)
        np.testing.assert_allclose(fit.codebook[i, : 2**b].numpy(), centroids, rtol=1e-5, atol=1e-6)
        assert (fit.codebook[i, 2**b :] == fit.codebook[i, 2**b - 1]).all()
        mine = float((f[i].double() * (fit.dense()[i] - w[i]).double() ** 2).sum())
        assert mine == pytest.approx(cost, rel=1e-5, abs=1e-9)
    assert torch.equal(fit.affine.widths, widths[widths > 5])


@pytest.mark.parametrize(("span", "rows"), [(7, 4), (2048, 256)])
def test_curves_are_the_errors_of_the_solutions(span, rows, monkeypatch):
    monkeypatch.setattr(refine, "SPAN", span)  # tiles of H, the last one narrower
    monkeypatch.setattr(F, "ROWS", rows)  # ten rows in three parts, or in one
    w, f, h, _ = problem(5, r=10)
    assert h.shape[1] % 7
    for full in (None, h):
        curve = F.analyse(w, f, full, trellises=False)
        errors = curve.errors
        assert [t.shape[1] for t in curve.centroids] == [2, 4, 8, 16, 32]
        assert errors.shape == (10, 8) and errors.dtype == torch.float64
        assert curve.tables.shape == (0, 128)
        for b in range(1, 7):
            fit = started(w, f, torch.full((10,), b, dtype=torch.uint8))
            d = fit.dense() - w
            if b == 6:  # measured on the whole range, before a narrower one is looked for
                d = F.affine_values(F.affine_rows(w, f, fit.widths, shrinks=(1.0,))) - w
            want = error(w, w + d, h) if full is not None else (f * d * d).sum(1).numpy()
            rtol = 1e-5 if full is None else 3e-2  # products with h are in bfloat16
            np.testing.assert_allclose(errors[:, b - 1], want, rtol=rtol)
        assert torch.equal(errors[:, 6], errors[:, 5] / 4)
        assert torch.equal(errors[:, 7], errors[:, 5] / 16)


def test_rows_of_codebooks_grids_and_trellises_are_fitted_and_stored_together():
    """Each row is what it would be alone: the others' widths do not matter."""
    w, f, h, _ = problem(7, r=24)
    widths = torch.tensor(F.WIDTHS, dtype=torch.uint8).repeat(2)
    weight = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5
    curve = F.analyse(w, f, h)
    assert curve.errors.shape == (24, len(F.WIDTHS)) and (curve.errors > 0).all()
    fit = F.start(w, f, widths, curve.centroids)
    F.refine_fit(w, h, fit, 1, 2)
    F.fit_trellises(w, f, h, weight, curve.tables, curve.scales, fit)
    assert sorted(fit.trellis) == list(F.TRELLISES)
    q = unpack(pack(F.finish(w, h, fit)))
    got = dequantize(q)
    for width, table, scale in zip(F.TRELLISES, curve.tables, curve.scales.T, strict=True):
        own = widths == width
        alone = trellis_fit.fit(w[own], f[own], h, weight[own], table, scale[own], width - 16)
        torch.testing.assert_close(got[own], alone.values(), rtol=1e-6, atol=0)
        torch.testing.assert_close(fit.dense()[own], alone.values(), rtol=1e-6, atol=0)
    plain = widths < 16
    fit = F.start(w[plain], f[plain], widths[plain], [c[plain] for c in curve.centroids])
    F.refine_fit(w[plain], h, fit, 1, 2)
    assert torch.equal(got[plain], dequantize(F.finish(w[plain], h, fit)))


@pytest.mark.parametrize("value", [0.0, 0.3, -2.5, 1e-30, 3e15])
def test_constant_rows_stay_finite_and_close(value):
    widths = torch.arange(1, 9, dtype=torch.uint8)
    w, f = torch.full((8, 19), value), torch.ones(8, 19)
    f[:, 3] = 0
    for weight in (f, torch.zeros_like(f)):
        fit = started(w, weight, widths)
        q = F.finish(w, torch.eye(19), fit)
        check_values(q)
        assert torch.isfinite(dequantize(q)).all()
        torch.testing.assert_close(dequantize(q), w, rtol=2**-6, atol=0)
    errors = F.analyse(w, f, None).errors
    assert torch.isfinite(errors).all() and (errors >= 0).all()


def test_rows_of_any_magnitude_lose_the_same_share():
    w, f, h, widths = problem(6, r=8)
    want = dequantize(F.finish(w, h, started(w, f, widths)))
    for power in (-60, 30, 60):
        big = w * 2.0**power
        got = dequantize(F.finish(big, h, started(big, f, widths)))
        torch.testing.assert_close(got, want * 2.0**power, rtol=1e-6, atol=0)


def test_a_scaling_vector_is_stored_and_multiplied_back():
    w, f, h, widths = problem(7)
    s = (0.5 + torch.rand(w.shape[1], generator=torch.Generator().manual_seed(0))).half().float()
    fit = started((w / s).contiguous(), f * s * s, widths)
    fit.in_scale = s
    before = error(w, fit.dense(), h)
    F.refine_fit(w, h, fit, 2, 2)
    after = error(w, fit.dense(), h)
    assert (after <= before * (1 + 1e-5)).all() and (after < before).any()
    dense = fit.dense()
    q = F.finish(w, None, fit)
    assert q.in_scale.dtype == torch.float16 and torch.equal(q.in_scale.float(), s)
    bound = q.row_scale.float()[:, None] / 2 * s * (1 + 1e-5) + 1e-7
    assert (
        (dequantize(q) - dense).abs() <= torch.where(fit.table_rows[:, None], bound, 1e-6)
    ).all()


def test_refining_is_scale_free_only_through_the_vector():
    """Refining w under s is refining w / s under s H s."""
    w, f, h, widths = problem(8, widths=[1, 2, 3, 4, 5])
    s = 2.0 ** torch.randint(-1, 2, (w.shape[1],), generator=torch.Generator().manual_seed(1))
    scaled = started(w / s, f, widths)
    plain = started(w / s, f, widths)
    scaled.in_scale = s
    F.refine_fit(w, h, scaled, 1, 2)
    F.refine_fit(w / s, h * s * s[:, None], plain, 1, 2)
    assert torch.equal(scaled.codes, plain.codes) and torch.equal(scaled.codebook, plain.codebook)


def test_refining_leaves_wide_rows_alone():
    w, f, h, widths = problem(9)
    fit = started(w, f, widths)
    before, values = fit.dense(), fit.affine.codes.clone()
    F.refine_fit(w, h, fit, 2, 2)
    wide = widths > 5
    assert torch.equal(fit.dense()[wide], before[wide]) and torch.equal(fit.affine.codes, values)
    least, most = error(w, fit.dense(), h), error(w, before, h)
    assert (least <= most * (1 + 1e-6)).all() and (least < most)[~wide.numpy()].all()
    only = started(w[wide], f[wide], widths[wide])
    codes = only.codes.clone()
    F.refine_fit(w[wide], h, only, 2, 2)  # nothing to do
    assert torch.equal(only.codes, codes)


def test_scales_round_up_to_the_next_bfloat16():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([10 ** (torch.rand(500, generator=g) * 60 - 30), torch.tensor([1.0, 2.0, 1e-40])])
    up = F._up_to_bfloat16(x).float()
    assert (up >= x).all() and (up[:500] <= x[:500] * (1 + 2**-7)).all()
    assert up[500] == 1 and up[501] == 2
