"""Exact k-means of skimlm against kmeans1d and flash1dkmeans, one thread, rows per second.

    pip install kmeans1d flash1dkmeans
    python bench/kmeans.py                 # 4096 rows x 4096 columns

Rows are drawn like weights (normal, a few of five times the spread), sensitivities like squared
gradients. skimlm solves 2, 4, 8 and 16 clusters in one pass, weighted. kmeans1d is exact and takes
no weights; flash1dkmeans takes weights and is k-means++ with Lloyd's steps, so not exact; both are
called once per row and cluster count. They get the first `--others` rows, as Python lists and NumPy
arrays made beforehand, after one call to warm up. Every repeat times all of them in turn.

A table goes to stdout. Fails if a cost of skimlm is above another's by more than 1e-9 of it.
"""

import argparse
import os
import statistics
import sys
import time

os.environ["NUMBA_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from provenance import provenance  # noqa: E402
from skimlm.quantize import kmeans_rows  # noqa: E402

COUNTS = (2, 4, 8, 16)


def rows_like_weights(rows, cols):
    """Weights and sensitivities, float32 [rows, cols]."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(rows, cols, generator=g) * 0.02
    w *= 1 + 4 * (torch.rand(rows, cols, generator=g) < 0.01)
    f = torch.randn(rows, cols, generator=g).square() * torch.rand(cols, generator=g)
    return w, f


def seconds(work):
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def cost(w, f, centroids):
    """What a row costs with every value at its nearest centroid, float64."""
    centroids = np.sort(np.asarray(centroids, np.float64))
    at = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, w)
    return float((f * (w - centroids[at]) ** 2).sum())


def contestants(w, f):
    """{name: (function of one row and a count that returns centroids, takes weights)}."""
    found = {}
    w, f = w.double().numpy(), f.double().numpy()
    try:
        from kmeans1d import cluster

        lists = w.tolist()
        found["kmeans1d"] = (lambda i, k: cluster(lists[i], k).centroids, False)
    except ImportError:
        print("kmeans1d is not installed and left out", file=sys.stderr)
    try:
        from flash1dkmeans import kmeans_1d

        found["flash1dkmeans"] = (
            lambda i, k: kmeans_1d(w[i], k, sample_weights=f[i], random_state=0)[0],
            True,
        )
    except ImportError:
        print("flash1dkmeans is not installed and left out", file=sys.stderr)
    return found


def check(name, w, f, costs, results):
    """Worst and mean relative excess of another's costs over ours; raises if it is below."""
    excess = []
    for (i, k), centroids in results.items():
        ours = float(costs[i, COUNTS.index(k)])
        excess.append(cost(w[i], f[i], centroids) / ours - 1)
    if min(excess) < -1e-9:
        raise SystemExit(f"{name} found a cost {-min(excess):.2e} below skimlm's")
    return max(excess), statistics.fmean(excess)


def one_pass(w, weights, count):
    """skimlm on the first `count` rows: the costs [count, counts]."""
    return lambda: kmeans_rows(w[:count], weights[:count], 4)[1]


def race(w, f, rivals, others, repeats):
    """{(name, column): rows per second of every repeat}, and {name: a note}."""

    def each(solve, counts):
        return lambda: {(i, k): solve(i, k) for i in range(others) for k in counts}

    rates: dict[tuple[str, str], list[float]] = {}
    notes = {"skimlm": "exact, weighted, one pass for all four"}
    for _ in range(repeats):
        took, weighted = seconds(one_pass(w, f, len(w)))
        for column in ("16", "all"):
            rates.setdefault(("skimlm", column), []).append(len(w) / took)
        for name, (solve, takes_weights) in rivals.items():
            results = {}
            for column, counts in (("16", (16,)), ("all", COUNTS)):
                took, part = seconds(each(solve, counts))
                rates.setdefault((name, column), []).append(others / took)
                results |= part
            if takes_weights:
                weight, costs = f[:others], weighted
            else:
                weight = torch.ones_like(f[:others])
                costs = one_pass(w, weight, others)()
            worst, mean = check(
                name, w[:others].double().numpy(), weight.double().numpy(), costs, results
            )
            above = f"cost {mean:.1e} above skimlm's in the mean, {worst:.1e} at most"
            notes[name] = (
                f"{'weighted' if takes_weights else 'no weights'}, on {others} rows; "
                f"{above if worst > 1e-9 else f'cost equal to {worst:.0e}'}"
            )
    return rates, notes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--others", type=int, default=24, help="rows that the others are timed on")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    others = min(args.others, args.rows)

    torch.set_num_threads(1)
    w, f = rows_like_weights(args.rows, args.cols)
    rivals = contestants(w[:others], f[:others])
    for solve, _ in rivals.values():
        solve(0, 2)  # compiles
    kmeans_rows(w[:8], f[:8], 1)

    rates, notes = race(w, f, rivals, others, args.repeats)

    def cell(name, column):
        values = rates[name, column]
        ratio = statistics.median(rates["skimlm", column]) / statistics.median(values)
        text = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        return text if name == "skimlm" else f"{text}, skimlm {ratio:.1f}x"

    print(f"`python {' '.join(['bench/kmeans.py', *sys.argv[1:]])}`, {provenance()}\n")
    print(
        f"Rows of {args.cols} per second on one thread, median (least to most) of "
        f"{args.repeats}; skimlm on {args.rows} rows.\n"
    )
    print("| | k = 16 | k = 2, 4, 8 and 16 | |\n|---|---|---|---|")
    for name in ("skimlm", *rivals):
        print(f"| {name} | {cell(name, '16')} | {cell(name, 'all')} | {notes[name]} |")


if __name__ == "__main__":
    main()
