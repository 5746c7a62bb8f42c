"""Exact k-means against every partition of small rows, and a dynamic programme in rationals."""

import functools
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from skimlm.quantize.kmeans import kmeans_reference, kmeans_rows, nearest


def interval_cost(x: list[Fraction], f: list[Fraction]) -> Fraction:
    """Weighted squared distance of points to their weighted mean."""
    mass = sum(f)
    if mass == 0:
        return Fraction(0)
    mean = sum(a * b for a, b in zip(x, f, strict=True)) / mass
    return sum(b * (a - mean) ** 2 for a, b in zip(x, f, strict=True))


@functools.cache
def every_partition(w: tuple, f: tuple) -> list[Fraction]:
    """Least cost for 0, 1, .. 4 clusters over all ways to label the points, sorted or not."""
    x, weight = [Fraction(v) for v in w], [Fraction(v) for v in f]
    points = range(len(x))
    subset = {
        inside: interval_cost([x[i] for i in inside], [weight[i] for i in inside])
        for n in range(len(x) + 1)
        for inside in itertools.combinations(points, n)
    }
    best = [Fraction(0)]
    for k in range(1, 5):
        parts = itertools.product(range(k), repeat=len(x))
        best.append(
            min(
                sum(subset[tuple(i for i in points if labels[i] == m)] for m in range(k))
                for labels in parts
            )
        )
    return best


@functools.cache
def exact_programme(w: tuple, f: tuple) -> list[Fraction]:
    """Least cost for 0, 1, .. 32 clusters over all cuts of the sorted row, in rationals."""
    points = sorted(zip(map(Fraction, w), map(Fraction, f), strict=True))
    c = len(points)
    s0, s1, s2 = [[Fraction(0)] for _ in range(3)]
    for x, weight in points:
        (
            s0.append(s0[-1] + weight),
            s1.append(s1[-1] + weight * x),
            s2.append(s2[-1] + weight * x * x),
        )
    cost = [[Fraction(0)] * (c + 1) for _ in range(c + 1)]
    for j, i in itertools.combinations(range(c + 1), 2):
        mass = s0[i] - s0[j]
        cost[j][i] = s2[i] - s2[j] - (s1[i] - s1[j]) ** 2 / mass if mass else Fraction(0)
    row, best = cost[0], [Fraction(0)]
    for k in range(1, 33):
        best.append(row[c])
        if k < c:
            row = [min(row[j] + cost[j][i] for j in range(i + 1)) for i in range(c + 1)]
    return best


@functools.cache
def fast_programme(w: tuple, f: tuple, k: int) -> np.ndarray:
    """`exact_programme` for longer rows, in extended precision: least costs for 0 .. k clusters."""
    order = np.argsort(w, kind="stable")
    x, weight = np.array(w, np.longdouble)[order], np.array(f, np.longdouble)[order]
    x = x - (weight * x).sum() / weight.sum()
    s0, s1, s2 = (np.append(0, np.cumsum(weight * x**p)) for p in range(3))
    mass = s0 - s0[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        cost = np.where(mass > 0, s2 - s2[:, None] - (s1 - s1[:, None]) ** 2 / mass, 0)
    cost[np.tril_indices(len(s0), -1)] = np.inf
    row, best = cost[0], [0.0]
    for _ in range(k):
        best.append(float(row[-1]))
        row = (row[:, None] + cost).min(0)
    return np.maximum(best, 0)


def assigned_cost(w, f, centroids) -> float:
    """Cost of the row when every point goes to the nearest of the centroids."""
    distance = np.abs(np.float64(w)[:, None] - np.float64(centroids)[None, :]).min(1)
    return float((np.float64(f) * distance**2).sum())


def check_row(w, f, max_bits: int, oracle) -> None:
    """Costs and centroids of one row at every width against the oracle."""
    w, f = np.asarray(w, np.float32), np.asarray(f, np.float32)
    tables, costs = kmeans_rows(torch.tensor(w)[None], torch.tensor(f)[None], max_bits)
    assert costs.shape == (1, max_bits) and torch.isfinite(costs).all()
    weight = f if f.any() else np.ones_like(f)
    mass = float(np.float64(weight).sum())
    grain = 1e-14 * mass * (float(w.max()) - float(w.min())) ** 2  # what prefix sums resolve
    least = oracle(tuple(w.tolist()), tuple(weight.tolist()))
    for b in range(1, max_bits + 1):
        centroids = tables[b - 1][0].numpy()
        want = float(least[1 << b])
        assert len(centroids) == 1 << b and np.isfinite(centroids).all()
        assert (np.diff(centroids) >= 0).all()
        assert centroids.min() >= w.min() and centroids.max() <= w.max()
        assert float(costs[0, b - 1]) == pytest.approx(want, rel=1e-9, abs=grain)
        # float32 centroids: a point is off by at most half a unit in the last place of the largest
        ulp = float(np.spacing(np.abs(w).max()))
        loose = 2 * ulp * (want * mass) ** 0.5 + ulp**2 * mass
        assert assigned_cost(w, weight, centroids) <= want * (1 + 1e-9) + loose + grain


@pytest.mark.parametrize("seed", range(6))
def test_costs_are_those_of_the_best_of_all_partitions(isa_or_none, seed):
    g = np.random.default_rng(seed)
    c = 1 + seed % 6
    w, f = g.normal(size=c), g.exponential(size=c)
    if seed % 2:
        w, f = g.integers(-2, 3, size=c), g.integers(0, 3, size=c)  # ties and zero weights
        f[0] = 1
    check_row(w, f, 2, every_partition)


def _awkward():
    g = np.random.default_rng(7)
    normal, weight = g.normal(size=36), g.exponential(size=36)
    yield "ordinary", normal, weight
    yield "equal values", g.integers(-3, 4, size=36), weight
    yield "two values", np.repeat([1.5, -2.25], 18), weight
    yield "constant", np.full(36, 0.3), weight
    yield "constant zero", np.zeros(36), weight
    yield "half the weights zero", normal, weight * (np.arange(36) % 2)
    yield "one weight", normal, np.eye(36)[5]
    yield "no weight", normal, np.zeros(36)
    yield "no weight, constant", np.ones(36), np.zeros(36)
    yield "one point", normal[:1], weight[:1]
    yield "two points", normal[:2], weight[:2]
    yield "fewer points than clusters", normal[:5], weight[:5]
    yield "33 points", normal[:33], weight[:33]
    yield "huge", normal * 1e18, weight * 1e18
    yield "small", normal * 1e-18, weight * 1e-15
    yield "offset", normal * 1e-2 + 100, weight
    yield "far offset", normal + 1e4, weight
    yield "farther offset", normal * 3 + 1e6, weight
    yield "outlier", np.append(normal, 1e4), np.append(weight, 1)
    yield "weights over 12 decades", normal, 10.0 ** g.uniform(-12, 0, size=36)
    yield "weights over 30 decades", normal, 10.0 ** g.uniform(-30, 0, size=36)
    h = np.random.default_rng(1)  # a weight that rounds to nothing must not divide anything
    grid = h.integers(-9, 10, size=36) / 3
    yield "a grid, weights over 20 decades", grid, 10.0 ** h.uniform(-20, 0, size=36)
    yield "a heavy point", normal, np.where(np.arange(36) == 9, 1.0, 1e-20)
    yield "grid", np.arange(36) - 18, np.ones(36)


@pytest.mark.parametrize("name, w, f", [pytest.param(*case, id=case[0]) for case in _awkward()])
def test_awkward_rows_are_solved_exactly(isa_or_none, name, w, f):
    check_row(w, f, 5, exact_programme)


def test_ties_never_lose_the_optimum(isa_or_none):
    """Rows of few distinct values and weights: every choice of a split is a tie somewhere."""
    g = np.random.default_rng(3)
    for _ in range(60):
        c = int(g.integers(2, 64))
        w, f = g.integers(-9, 9, size=c) / 3, g.integers(0, 3, size=c)
        w, f = np.float32(w), np.float32(f) + np.eye(c, dtype=np.float32)[0]
        costs = kmeans_rows(torch.tensor(w)[None], torch.tensor(f)[None], 4)[1][0]
        want = fast_programme(tuple(w.tolist()), tuple(f.tolist()), 16)[2 ** np.arange(1, 5)]
        np.testing.assert_allclose(costs.numpy(), want, rtol=1e-9, atol=1e-11)


def test_the_reference_agrees_with_every_partition():
    g = np.random.default_rng(1)
    for c, k in itertools.product(range(1, 7), range(1, 5)):
        w, f = np.float32(g.normal(size=c)), np.float32(g.exponential(size=c))
        centroids, cost = kmeans_reference(w, f, k)
        assert len(centroids) == k and (np.diff(centroids) >= 0).all()
        want = float(every_partition(tuple(w.tolist()), tuple(f.tolist()))[k])
        assert cost == pytest.approx(want, rel=1e-9, abs=1e-14)
        assert assigned_cost(w, f, centroids) == pytest.approx(cost, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("c", [1, 2, 31, 32, 33, 160])
def test_one_pass_gives_what_one_run_per_width_gives(isa_or_none, c):
    g = np.random.default_rng(c)
    w, f = np.float32(g.standard_t(3, size=(2, c))), np.float32(g.exponential(size=(2, c)))
    tables, costs = kmeans_rows(torch.tensor(w), torch.tensor(f), 5)
    for b in range(1, 6):
        alone, cost = kmeans_rows(torch.tensor(w), torch.tensor(f), b)
        torch.testing.assert_close(alone[-1], tables[b - 1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cost[:, -1], costs[:, b - 1], rtol=1e-9, atol=1e-12)
    for i in range(2):
        want = fast_programme(tuple(w[i].tolist()), tuple(f[i].tolist()), 32)[2 ** np.arange(1, 6)]
        np.testing.assert_allclose(costs[i].numpy(), want, rtol=1e-9, atol=1e-12)


def test_costs_fall_with_the_width_and_scale_with_the_weights():
    g = torch.Generator().manual_seed(0)
    w, f = torch.randn(20, 90, generator=g), torch.rand(20, 90, generator=g)
    tables, costs = kmeans_rows(w, f, 5)
    assert (costs.diff(dim=1) < 0).all()
    again, scaled = kmeans_rows(w * 4, f * 8, 5)
    assert torch.equal(scaled, costs * 128)
    assert all(torch.equal(a, 4 * b) for a, b in zip(again, tables, strict=True))


def test_the_order_of_columns_and_of_rows_does_not_matter():
    g = torch.Generator().manual_seed(1)
    w, f = torch.randn(9, 70, generator=g), torch.rand(9, 70, generator=g)
    tables, costs = kmeans_rows(w, f, 4)
    columns, rows = torch.randperm(70, generator=g), torch.randperm(9, generator=g)
    again, same = kmeans_rows(w[rows][:, columns], f[rows][:, columns], 4)
    torch.testing.assert_close(same, costs[rows], rtol=1e-12, atol=0)
    for a, b in zip(again, tables, strict=True):
        torch.testing.assert_close(a, b[rows], rtol=1e-6, atol=1e-7)


def test_threads_do_not_change_a_bit(isa_or_none):
    g = torch.Generator().manual_seed(2)
    w, f = torch.randn(61, 50, generator=g), torch.rand(61, 50, generator=g)
    sizes = torch.randint(1, 33, (61,), generator=g).int()
    one = kmeans_rows(w, f, 5)
    codes = nearest(w, one[0][4].contiguous(), sizes)
    try:
        torch.set_num_threads(3)
        many = kmeans_rows(w, f, 5)
        assert torch.equal(nearest(w, one[0][4].contiguous(), sizes), codes)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[1], many[1])
    assert all(torch.equal(a, b) for a, b in zip(one[0], many[0], strict=True))


def test_strided_input_is_read_as_it_looks():
    g = torch.Generator().manual_seed(3)
    w, f = torch.randn(30, 6, generator=g).T, torch.rand(6, 60, generator=g)[:, ::2]
    tables, costs = kmeans_rows(w, f, 2)
    assert torch.equal(costs, kmeans_rows(w.contiguous(), f.contiguous(), 2)[1])
    sizes = torch.full((6,), 2, dtype=torch.int32)
    codes = nearest(w, tables[0], sizes)  # a view into the flat result
    assert torch.equal(codes, nearest(w.contiguous(), tables[0].contiguous(), sizes))


def test_nearest_is_the_first_of_the_nearest_entries(isa_or_none):
    """Small integers and their halves: all distances are exact, ties are many."""
    g = np.random.default_rng(0)
    codebook = np.sort([g.choice(41, 32, replace=False) - 20 for _ in range(40)], axis=1)
    sizes = g.integers(1, 33, size=40)
    w = g.integers(-50, 51, size=(40, 45)) / 2
    codes = nearest(
        torch.tensor(w).float(), torch.tensor(codebook).float(), torch.tensor(sizes).int()
    )
    for i in range(36):
        distance = np.abs(w[i][:, None] - codebook[i, : sizes[i]])
        assert codes[i].tolist() == distance.argmin(1).tolist()


def test_repeated_entries_are_as_good_as_one(isa_or_none):
    """k-means repeats its largest entry when there are fewer values than clusters."""
    codebook = torch.tensor([[-1.0, 0, 0, 2, 2, 2]])
    w = torch.tensor([[-9.0, -0.5, -0.4, 0, 0.9, 1.1, 2, 9]])
    codes = nearest(w, codebook, torch.tensor([6], dtype=torch.int32))
    assert codebook[0][codes[0].long()].tolist() == [-1, -1, 0, 0, 0, 2, 2, 2]


def test_nearest_on_random_values_is_nearest(isa_or_none):
    g = torch.Generator().manual_seed(5)
    w = torch.randn(8, 77, generator=g)
    codebook = torch.randn(8, 17, generator=g).sort(1).values
    sizes = torch.tensor([1, 2, 3, 5, 8, 13, 16, 17], dtype=torch.int32)
    codes = nearest(w, codebook, sizes)
    for i, n in enumerate(sizes.tolist()):
        distance = (w[i].double()[:, None] - codebook[i, :n].double()).abs()
        chosen = distance.gather(1, codes[i].long()[:, None])[:, 0]
        assert (chosen <= distance.amin(1) + 1e-6).all()


W, F = torch.zeros(3, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    "w, f, bits, match",
    [
        (W.double(), F, 2, "w must be torch.float32"),
        (W, F.half(), 2, "f must be torch.float32"),
        (W, torch.ones(3, 5), 2, r"f must be torch.float32 \(3, 4\), got .* \(3, 5\)"),
        (W, F, 0, "max_bits must be 1..5"),
        (W, F, 6, "max_bits must be 1..5"),
        (torch.zeros(3, 0), torch.zeros(3, 0), 2, "rows not empty"),
    ],
)
def test_kmeans_refuses_what_it_cannot_read(w, f, bits, match):
    with pytest.raises(ValueError, match=match):
        kmeans_rows(w, f, bits)


@pytest.mark.parametrize(
    "w, codebook, sizes, match",
    [
        (W.double(), torch.zeros(3, 2), torch.ones(3).int(), "w must be"),
        (W, torch.zeros(2, 2), torch.ones(3).int(), "codebook must be"),
        (W, torch.zeros(3, 2), torch.ones(3).long(), "sizes must be"),
        (W, torch.zeros(3, 2), torch.ones(2).int(), "sizes must be"),
        (W, torch.zeros(3, 2), torch.full((3,), 3).int(), "1..2 entries"),
        (W, torch.zeros(3, 2), torch.zeros(3).int(), "1..2 entries"),
    ],
)
def test_nearest_refuses_what_it_cannot_read(w, codebook, sizes, match):
    with pytest.raises(ValueError, match=match):
        nearest(w, codebook, sizes)


def test_no_rows_are_no_work():
    tables, costs = kmeans_rows(torch.empty(0, 4), torch.empty(0, 4), 3)
    assert [t.shape for t in tables] == [(0, 2), (0, 4), (0, 8)] and costs.shape == (0, 3)


# ---- long rows


def least_cost(w, f, places, k):
    """Cost of the best k clusters of a sorted row that begin at `places` only, by trying splits."""
    spread = np.full((len(places), len(places)), np.inf)
    for i, begin in enumerate(places):
        for j in range(i + 1, len(places)):
            x, mass = w[begin : places[j]], f[begin : places[j]]
            middle = (mass * x).sum() / mass.sum()
            spread[i, j] = (mass * (x - middle) ** 2).sum()
    best = spread[0]
    for _ in range(k - 1):
        best = np.min(best[:, None] + spread, axis=0)
    return best[-1]


@pytest.mark.parametrize("heavy", [False, True])
def test_long_rows_are_solved_over_their_edges(isa, heavy):
    g = np.random.default_rng(3)
    w, f = g.normal(size=300), np.exp(g.normal(size=300))
    if heavy:
        w *= np.exp(g.normal(size=300))
    w, f = w.astype(np.float32), f.astype(np.float32)
    row = torch.from_numpy(w)[None], torch.from_numpy(f)[None]
    tables, costs = kmeans_rows(*row, 4, 40)
    order = np.argsort(w)
    x, mass = w[order].astype(float), f[order].astype(float)
    steps = ((mass[1:] + mass[:-1]) / 2 * np.diff(x) ** 2) ** (1 / 3)
    level = np.floor(np.concatenate([[0], steps.cumsum()]) / (steps.sum() / 40) + 1e-9)
    places = [0, *(np.flatnonzero(np.diff(level) > 0) + 1), 300]
    assert 20 < len(places) < 43
    for b in range(1, 5):
        assert costs[0, b - 1] == pytest.approx(least_cost(x, mass, places, 2**b), rel=1e-5)
        assert (tables[b - 1][0].diff() > 0).all()
    exact = kmeans_rows(*row, 4)[1]
    assert (costs >= exact * (1 - 1e-9)).all() and (costs <= exact * 1.1).all()
    assert torch.equal(kmeans_rows(*row, 4, 150)[1], exact)  # at most twice the edges


def test_long_rows_of_few_values_and_without_weight():
    w = torch.tensor([0.0, 1, 5]).repeat(40)[None]
    for f in (torch.ones_like(w), torch.zeros_like(w)):
        tables, costs = kmeans_rows(w, f, 2, 8)
        assert tables[1][0, :3].tolist() == [0, 1, 5] and costs[0, 1] == 0
    same = torch.full((1, 100), 2.5)
    tables, costs = kmeans_rows(same, torch.ones_like(same), 3, 8)
    assert (tables[2] == 2.5).all() and (costs == 0).all()
