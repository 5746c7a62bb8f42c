"""Exact weighted one-dimensional k-means, every width at once.

The objective is SqueezeLLM's (2306.07629), solved to its optimum. For one row w with weights
f >= 0 the cheapest partition into k intervals of the sorted row is found by dynamic programming
over prefix sums; the programme for k = 2^max_bits passes through every smaller k, so one run gives
the codebooks and the error of all widths: the row's rate-distortion curve. No seeds, no restarts,
no empty clusters. Equal values, zero weights, constant rows and rows with fewer distinct values
than clusters are ordinary inputs: spare centroids repeat the largest one.
"""

import numpy as np
import torch
from torch import Tensor

from skimlm import native


def kmeans_rows(w: Tensor, f: Tensor, max_bits: int, edges: int = 0) -> tuple[list[Tensor], Tensor]:
    """Optimal centroids and costs of every row for 1..max_bits bits.

    `w`, `f`: float32 [r, c]. Returns a list whose item b - 1 is float32 [r, 2^b], ascending, and
    the costs float64 [r, max_bits] (sum of f (w - centroid)^2). With `edges`, rows of more than
    twice as many values are solved over about that many places where clusters may begin.
    """
    r, c = w.shape
    native.require("w", w, torch.float32, (r, c))
    native.require("f", f, torch.float32, (r, c))
    if not 1 <= max_bits <= 5 or c < 1:
        raise ValueError(
            f"max_bits must be 1..5 and rows not empty, got {max_bits} and {c} columns"
        )
    if native.missing():
        return kmeans_rows_reference(w, f, max_bits)
    flat = torch.empty(r, (2 << max_bits) - 2, dtype=torch.float32)
    costs = torch.empty(r, max_bits, dtype=torch.float64)
    native.call("kmeans_rows", w.contiguous(), f.contiguous(), r, c, max_bits, edges, flat, costs)
    return list(flat.split([1 << b for b in range(1, max_bits + 1)], dim=1)), costs


def nearest(w: Tensor, codebook: Tensor, sizes: Tensor) -> Tensor:
    """Index of the nearest entry of each row's codebook; a tie goes to the lower entry.

    `w` float32 [r, c], `codebook` float32 [r, k] with the first `sizes[i]` (int32) entries
    ascending. Returns uint8 [r, c].
    """
    r, c = w.shape
    k = codebook.shape[1]
    native.require("w", w, torch.float32, (r, c))
    native.require("codebook", codebook, torch.float32, (r, k))
    native.require("sizes", sizes, torch.int32, (r,))
    if r and not 1 <= int(sizes.min()) <= int(sizes.max()) <= k:
        raise ValueError(f"codebooks here have 1..{k} entries, got sizes {sizes.tolist()}")
    if native.missing():
        return nearest_reference(w, codebook, sizes)
    codes = torch.empty(r, c, dtype=torch.uint8)
    native.call("nearest_codes", w.contiguous(), codebook.contiguous(), sizes, codes, r, c, k)
    return codes


def lookup(codes: Tensor, codebook: Tensor) -> Tensor:
    """codebook[i, codes[i, j]] in bfloat16: `codes` uint8 [r, c], `codebook` float32 [r, k]."""
    r, c = codes.shape
    k = codebook.shape[1]
    native.require("codes", codes, torch.uint8, (r, c))
    native.require("codebook", codebook, torch.float32, (r, k))
    if native.missing():
        return codebook.gather(1, codes.long()).bfloat16()
    out = torch.empty(r, c, dtype=torch.bfloat16)
    native.call("lookup_bf16", codes, codebook, out, r, c, k)
    return out


def kmeans_rows_reference(w: Tensor, f: Tensor, max_bits: int) -> tuple[list[Tensor], Tensor]:
    """`kmeans_rows` over all places (no `edges`) in torch, row by row: [c, c] doubles of memory."""
    tables = [torch.empty(len(w), 1 << b) for b in range(1, max_bits + 1)]
    costs = torch.empty(len(w), max_bits, dtype=torch.float64)
    for i, (row, weight) in enumerate(zip(w.double(), f.double(), strict=True)):
        for b, (table, cost) in enumerate(_kmeans_row(row, weight, max_bits)):
            tables[b][i], costs[i, b] = table.float(), cost
    return tables, costs


def _kmeans_row(w: Tensor, f: Tensor, max_bits: int) -> list[tuple[Tensor, float]]:
    """The programme of `kmeans_reference` for every width, all ends of an interval at a time."""
    x, order = (w - w.mean()).sort()
    weight, c = f[order] if float(f.sum()) > 0 else torch.ones_like(f), len(w)
    zero = torch.zeros(1, dtype=torch.float64)
    mass, first, second = (torch.cat([zero, (weight * x**power).cumsum(0)]) for power in range(3))

    def between(sums: Tensor) -> Tensor:  # [begin, end]
        return sums - sums.unsqueeze(1)

    interval = between(second) - between(first).square() / between(mass)
    interval = interval.where(between(mass) > 0, 0.0).clamp_(min=0)
    backwards = torch.ones_like(interval, dtype=torch.bool).tril_(-1)
    interval.masked_fill_(backwards, torch.inf)
    best, splits, found = interval[0], [], []
    for k in range(1, (1 << max_bits) + 1):
        if k > 1:
            best, split = (best.unsqueeze(1) + interval).min(0)
            splits.append(split)
        if k > 1 and k & (k - 1) == 0:
            found.append((_centroids(x, weight, splits, c) + w.mean(), float(best[c])))
    return found


def _centroids(x: Tensor, weight: Tensor, splits: list[Tensor], end: int) -> Tensor:
    """Means of the intervals that end at `end`; spare ones repeat the largest."""
    k, means = len(splits) + 1, []
    for split in [*reversed(splits), None]:
        begin = 0 if split is None else int(split[end])
        if begin < end:
            part, share = x[begin:end], weight[begin:end]
            mass = float(share.sum())
            means.append(
                float((share * part).sum()) / mass if mass else float(part[0] + part[-1]) / 2
            )
        end = begin
    ascending = sorted(means)
    return torch.tensor(ascending + [ascending[-1]] * (k - len(ascending)), dtype=torch.float64)


def nearest_reference(w: Tensor, codebook: Tensor, sizes: Tensor) -> Tensor:
    """`nearest` in torch: how many middles between neighbouring entries lie below the value."""
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for m in range(codebook.shape[1] - 1):
        middle = 0.5 * (codebook[:, m] + codebook[:, m + 1])
        codes += (w > middle.unsqueeze(1)) & (m + 1 < sizes).unsqueeze(1)
    return codes


def kmeans_reference(w: np.ndarray, f: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """The textbook O(k c^2) programme for one row: centroids [k] ascending and the cost."""
    order = np.argsort(w, kind="stable")
    x, weight = w[order].astype(np.float64), f[order].astype(np.float64)
    if not weight.sum() > 0:
        weight = np.ones_like(weight)
    c = len(x)

    def interval(j: int, i: int) -> tuple[float, float]:
        mass = weight[j:i].sum()
        mean = (weight[j:i] * x[j:i]).sum() / mass if mass > 0 else 0.5 * (x[j] + x[i - 1])
        return mean, float((weight[j:i] * (x[j:i] - mean) ** 2).sum())

    used = min(k, c)
    best = np.full((used + 1, c + 1), np.inf)
    split = np.zeros((used + 1, c + 1), dtype=int)
    best[0, 0] = 0.0
    for m in range(1, used + 1):
        for i in range(m, c + 1):
            costs = [best[m - 1, j] + interval(j, i)[1] for j in range(m - 1, i)]
            split[m, i] = m - 1 + int(np.argmin(costs))
            best[m, i] = min(costs)
    centroids, end = [], c
    for m in range(used, 0, -1):
        begin = split[m, end]
        centroids.append(interval(begin, end)[0])
        end = begin
    ascending = sorted(centroids)
    return np.array(ascending + [ascending[-1]] * (k - used)), float(best[used, c])
