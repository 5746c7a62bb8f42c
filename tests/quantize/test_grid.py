"""Grids against loops over single weights and candidates."""

import math

import pytest
import torch

from skimlm.quantize import grid


def weight(r, c, seed=0):
    return torch.randn(r, c, generator=torch.Generator().manual_seed(seed))


def rounded(value, step, bits):
    level = min(max(round(value / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    return level * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [4, 5, 11])
def test_codes_are_the_nearest_levels_of_their_group(bits, group):
    w = weight(3, 11)
    steps = grid.absmax(w, bits, group)
    values = grid.decode(grid.encode(w, steps, bits, group), steps, bits, group)
    for i in range(3):
        for j in range(11):
            step = float(steps[i, j // group])
            assert float(values[i, j]) == pytest.approx(rounded(float(w[i, j]), step, bits))


def test_absmax_clips_nothing_and_rounding_again_changes_nothing():
    w = weight(4, 64)
    steps = grid.absmax(w, 4, 16)
    values = grid.decode(grid.encode(w, steps, 4, 16), steps, 4, 16)
    assert ((values - w).abs() <= steps.repeat_interleave(16, 1) * 0.51).all()
    again = grid.decode(grid.encode(values, steps, 4, 16), steps, 4, 16)
    assert torch.equal(again, values)


@pytest.mark.parametrize("bits", [2, 4])
def test_least_error_is_the_best_of_its_candidates(bits):
    w, cost = weight(3, 10), weight(3, 10, 1).square()
    steps = grid.least_error(w, bits, 5, cost, candidates=9, least=0.4)
    full = grid.absmax(w, bits, 5)
    for i in range(3):
        for g in range(2):
            trials = [float((full[i, g] * s).bfloat16()) for s in torch.linspace(1, 0.4, 9)]
            part = range(5 * g, 5 * g + 5)

            def error(step, i=i, part=part):
                return sum(
                    float(cost[i, j]) * (rounded(float(w[i, j]), step, bits) - float(w[i, j])) ** 2
                    for j in part
                )

            assert error(float(steps[i, g])) == pytest.approx(min(map(error, trials)), rel=1e-5)


def test_one_step_for_a_matrix_is_never_worse_than_absmax():
    w = weight(40, 50) ** 3  # heavy tails: clipping pays
    step = grid.least_error_matrix(w, 4)
    assert step.shape == (40, 1) and (step == step[0]).all()
    plain = torch.full((40, 1), float(w.abs().max()) / 7)

    def error(steps):
        return float((grid.decode(grid.encode(w, steps, 4, 50), steps, 4, 50) - w).square().sum())

    assert error(step) < 0.8 * error(plain)


def published_cap(w, bits):
    """SLiM-Quant's search by its formulas, a loop per bin."""
    values = w.abs().flatten()
    low, high = float(values.min()), float(values.max())
    bins = max(512, min(len(values) // 1000, 20000))
    width = (high - low) / bins
    share = torch.histc(values, bins, low, high).tolist()
    total = sum(share) * width
    centre = [low + (i + 0.5) * width for i in range(bins)]

    def error(i):
        cap = centre[i]
        step = cap / 2**bits
        sums = 0.0
        for j in range(bins):
            kept = step * math.floor(centre[j] / step) if j < i else cap
            sums += share[j] / total * (centre[j] - kept) ** 2
        return sums * width

    points = list(range(0, bins, bins // 10))[:11]
    t = min(range(len(points)), key=lambda t: error(points[t]))
    begin, end = points[max(t - 1, 0)], points[t + 1] if t + 1 < len(points) else bins
    return centre[min(range(begin, end), key=error)]


@pytest.mark.parametrize("bits", [2, 4])
def test_slim_quant_is_the_published_search(bits):
    w = weight(20, 30)
    want = published_cap(w, bits) / (2 ** (bits - 1) - 1)
    steps = grid.slim_quant(w, bits)
    assert steps.shape == (20, 1)
    assert steps.flatten().tolist() == [float(torch.tensor(want).bfloat16())] * 20


def test_slim_quant_survives_the_bracket_that_is_empty_as_published():
    # 520 bins, a multiple of ten; uniform weights at 8 bits want the last point
    w = torch.rand(520, 1000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    steps = grid.slim_quant(w, 8)
    values = grid.decode(grid.encode(w, steps, 8, 1000), steps, 8, 1000)
    assert float((values - w).square().mean() / w.square().mean()) < 1e-4


def test_salient_columns_get_half_the_step():
    w, squares = weight(8, 200), torch.ones(200)
    squares[[17, 150]] = 100.0
    scale = grid.salient_columns(w, squares)
    assert (scale == 0.5).nonzero().flatten().tolist() == [17, 150]


@pytest.mark.parametrize(
    "w",
    [torch.zeros(3, 8), torch.ones(3, 8), torch.eye(8)[:3] * 1e4],
    ids=["zeros", "all equal", "single outliers"],
)
def test_odd_matrices_stay_finite(w):
    for steps, group in (
        (grid.absmax(w, 4, 4), 4),
        (grid.least_error(w, 4, 4), 4),
        (grid.slim_quant(w, 4), 8),
        (grid.least_error_matrix(w, 4), 8),
    ):
        values = grid.decode(grid.encode(w, steps, 4, group), steps, 4, group)
        assert values.isfinite().all()
        assert float((values - w).abs().max()) <= 0.2 * float(w.abs().max())
