"""Allocation against exhaustive search, and against hulls and walks in rational numbers."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from skimlm.errors import SkimError
from skimlm.quantize.allocate import allocate, allocate_reference


def total(table, choice) -> float:
    return float(table[np.arange(len(choice)), choice].sum())


def exhaustive(errors, costs, budget) -> float:
    """Least total error of all choices within the budget."""
    picks = itertools.product(range(errors.shape[1]), repeat=len(errors))
    return min(
        total(errors, np.array(p)) for p in picks if total(costs, np.array(p)) <= budget + 1e-9
    )


def hull(errors, costs) -> list[int]:
    """Columns on the lower left convex hull of one row's points, strictly convex, in rationals."""
    points = [
        (Fraction(float(c)), Fraction(float(e)), j)
        for j, (e, c) in enumerate(zip(errors, costs, strict=True))
    ]
    kept: list = []
    for c, e, j in points:
        if kept and e >= kept[-1][1]:
            continue  # dearer and no better
        while len(kept) > 1:
            (c0, e0, _), (c1, e1, _) = kept[-2:]
            if (e0 - e1) * (c - c1) > (e1 - e) * (c1 - c0):
                break
            kept.pop()
        kept.append((c, e, j))
    return [j for _, _, j in kept]


def walk(errors, costs, steps: int) -> np.ndarray:
    """The first `steps` purchases of the greedy walk over hull edges, one at a time."""
    hulls = [hull(e, c) for e, c in zip(errors, costs, strict=True)]
    at = [0] * len(hulls)

    def slope(i):
        j, k = hulls[i][at[i]], hulls[i][at[i] + 1]
        gain = Fraction(float(errors[i, j])) - Fraction(float(errors[i, k]))
        return gain / (Fraction(float(costs[i, k])) - Fraction(float(costs[i, j])))

    for _ in range(steps):
        best = max((i for i in range(len(at)) if at[i] + 1 < len(hulls[i])), key=slope)
        at[best] += 1
    return np.array([h[a] for h, a in zip(hulls, at, strict=True)])


def convex(n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors that fall ever more slowly per bit, and prices with uneven steps."""
    g = np.random.default_rng(seed)
    price = g.integers(20, 60, size=(n, m)).astype(float)
    slope = -np.sort(-g.exponential(size=(n, m - 1)), axis=1)
    costs = np.cumsum(price, axis=1)
    gain = slope * np.diff(costs, axis=1)
    errors = gain.sum(1, keepdims=True) - np.concatenate([np.zeros((n, 1)), gain.cumsum(1)], axis=1)
    return errors + 0.25, costs


def ragged(n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors in any order, dearer columns often worse."""
    errors, costs = convex(n, m, seed)
    return errors * np.random.default_rng(seed).uniform(0.3, 2, size=errors.shape), costs


def check(errors, costs, budget, choice) -> None:
    """Within the budget, on the hull, and no row's next hull edge would still have fitted."""
    left = budget - total(costs, choice)
    assert left >= -1e-9
    for i, j in enumerate(choice):
        columns = hull(errors[i], costs[i])
        assert j in columns
        later = columns[columns.index(j) + 1 :]
        assert not later or costs[i, later[0]] - costs[i, j] > left


@pytest.mark.parametrize("seed", range(8))
def test_convex_curves_are_allocated_optimally_at_every_purchase(seed):
    errors, costs = convex(5, 4, seed)
    for steps in range(0, 16, 3):
        want = walk(errors, costs, steps)
        budget = total(costs, want)
        got = allocate(errors, costs, budget)
        assert got.tolist() == want.tolist()
        assert total(errors, got) == pytest.approx(exhaustive(errors, costs, budget), rel=1e-12)


@pytest.mark.parametrize("make", [convex, ragged])
@pytest.mark.parametrize("seed", range(6))
def test_any_budget_is_met_and_nothing_that_fits_is_left_out(make, seed):
    errors, costs = make(5, 4, seed)
    low, high = costs[:, 0].sum(), costs[:, -1].sum()
    edge = np.max(costs[:, -1] - costs[:, 0])
    for budget in np.linspace(low, high, 7):
        choice = allocate(errors, costs, budget)
        check(errors, costs, budget, choice)
        least = exhaustive(errors, costs, budget)
        assert total(errors, choice) >= least - 1e-12
        # optimal up to the last edge
        assert total(errors, choice) <= exhaustive(errors, costs, max(low, budget - edge)) + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_is_the_exhaustive_search(seed):
    errors, costs = ragged(4, 4, seed)
    for budget in np.linspace(costs[:, 0].sum(), costs[:, -1].sum(), 4):
        want = exhaustive(errors, costs, budget)
        assert total(errors, allocate_reference(errors, costs, budget)) == pytest.approx(want)


def test_columns_that_do_not_pay_are_never_bought():
    errors = np.array([[5.0, 6, 1, 2, 1], [3, 3, 3, 3, 3], [4, 3.9, 1, 0.9, 0.95]])
    costs = np.array([[1.0, 2, 3, 4, 5]] * 3)
    assert allocate(errors, costs, np.inf).tolist() == [2, 0, 3]
    assert allocate(errors, costs, 5).tolist() == [2, 0, 0]  # the steepest edge first
    assert allocate(errors, costs, 7).tolist() == [2, 0, 2]  # column 1 lies above the hull


def test_evenly_falling_errors_never_overspend():
    """Collinear points: the slopes of a row's edges differ by rounding only."""
    g = np.random.default_rng(0)
    costs = np.cumsum(np.full((12, 8), 72.0), axis=1)
    for _ in range(300):
        unit = g.choice([0.1, 0.3, 0.7, 1 / 3], size=(12, 1))
        errors = unit * (8 - np.arange(8)) + g.choice([0, 0.1, 1e-3], size=(12, 1))
        budget = float(g.integers(12 * 72, 12 * 72 * 8 + 1))
        choice = allocate(errors, costs, budget)
        assert total(costs, choice) <= budget
        assert budget - total(costs, choice) < 7 * 72 or (choice == 7).all()


@pytest.mark.parametrize("make", [convex, ragged])
def test_many_rows_keep_the_rules(make):
    errors, costs = make(800, 8, 1)
    for share in (0.1, 0.5, 0.97):
        budget = costs[:, 0].sum() + share * (costs[:, -1] - costs[:, 0]).sum()
        choice = allocate(errors, costs, budget)
        check(errors, costs, budget, choice)


def test_the_order_of_rows_does_not_matter():
    errors, costs = ragged(60, 6, 2)
    order = np.random.default_rng(0).permutation(60)
    for budget in np.linspace(costs[:, 0].sum(), costs[:, -1].sum(), 9):
        choice = allocate(errors, costs, budget)
        assert allocate(errors[order], costs[order], budget).tolist() == choice[order].tolist()


def test_more_budget_never_costs_error_where_curves_are_convex_and_prices_even():
    errors, _ = convex(40, 8, 3)
    costs = np.cumsum(np.ones((40, 8)), axis=1)
    errors = np.sort(errors, axis=1)[:, ::-1]
    spent = [allocate(errors, costs, b) for b in range(40, 321, 7)]
    found = [total(errors, c) for c in spent]
    assert (np.diff(found) <= 1e-12).all()


def test_the_least_budget_is_enough_and_less_is_an_error():
    errors, costs = convex(6, 4, 0)
    least = costs[:, 0].sum()
    assert allocate(errors, costs, least).tolist() == [0] * 6
    with pytest.raises(SkimError, match=f"budget of {least - 1:.0f} bits .* possible, {least:.0f}"):
        allocate(errors, costs, least - 1)


def test_one_column_leaves_no_choice():
    assert allocate(np.ones((3, 1)), np.ones((3, 1)), 10).tolist() == [0, 0, 0]
