"""Which output channel gets how many bits: minimise sum_i E[i, b_i] under a budget of stored bits.

Each row's points (cost, E) are reduced to their lower convex hull, and hull edges of all rows are
bought in order of error saved per bit until the budget is spent. On a convex curve this greedy
walk is optimal up to the last edge; off it (E can rise with b when the codebooks were fitted under
another weight) the hull never takes a step that does not pay. SKIM (2412.04180) pools the rows of
one layer; errors in units of the end loss compare across layers, so the pool may be the whole
model.
"""

import numpy as np

from skimlm.errors import SkimError


def allocate(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Choice of column for every row, total cost at most `budget`.

    `errors`, `costs`: [n, m], columns in order of rising cost. Returns int64 [n]. Raises SkimError
    when even the cheapest column everywhere exceeds the budget.
    """
    n, m = errors.shape
    spent = costs[:, 0].sum()
    if spent > budget:
        raise SkimError(f"the budget of {budget:.0f} bits is below the least possible, {spent:.0f}")
    if m == 1:
        return np.zeros(n, dtype=np.int64)
    row, target, price, slope = _edges(errors, costs)
    # Within a row slopes never rise, so a stable sort keeps its edges in order.
    order = np.argsort(-slope, kind="stable")
    row, target, price = row[order], target[order], price[order]

    choice = np.zeros(n, dtype=np.int64)
    bought = int(np.searchsorted(np.cumsum(price) + spent, budget, side="right"))
    np.maximum.at(choice, row[:bought], target[:bought])
    left = budget - spent - price[:bought].sum()
    # The first edge that no longer fits ends its row; cheaper edges of other rows fill the rest.
    closed: set[int] = set()
    cheapest = price[bought:].min(initial=np.inf)
    for k in range(bought, len(row)):
        if left < cheapest:
            break
        if row[k] in closed:
            continue
        if price[k] <= left:
            choice[row[k]] = target[k]
            left -= price[k]
        else:
            closed.add(int(row[k]))
    return choice


def _edges(errors: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Hull edges of every row, in order: row, target column, price, error saved per bit."""
    n, m = errors.shape
    at = np.zeros(n, dtype=np.int64)
    rows = np.arange(n)
    last = np.full(n, np.inf)
    parts = []
    for _ in range(m - 1):
        gain = errors[rows, at][:, None] - errors[rows]
        price = costs[rows] - costs[rows, at][:, None]
        slope = np.where(np.arange(m) > at[:, None], gain / np.maximum(price, 1e-9), -np.inf)
        best = slope.argmax(1)
        # Points on a line have one slope but for rounding, which must not reorder the edges.
        value = np.minimum(slope[np.arange(len(rows)), best], last)
        keep = value > 0
        rows, best, last = rows[keep], best[keep], value[keep]
        parts.append((rows, best, price[keep, best], last))
        at = best
        if not len(rows):
            break
    row, target, cost, slope = (np.concatenate(p) for p in zip(*parts, strict=True))
    return row, target, cost, slope


def allocate_reference(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Exhaustive search: the least total error within the budget. For a handful of rows."""
    n, m = errors.shape
    best, choice = np.inf, np.zeros(n, dtype=np.int64)
    for code in np.ndindex(*([m] * n)):
        pick = np.array(code)
        if costs[range(n), pick].sum() <= budget and errors[range(n), pick].sum() < best:
            best, choice = errors[range(n), pick].sum(), pick
    return choice
