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
    codes = torch.empty(r, c, dtype=torch.uint8)
    native.call("nearest_codes", w.contiguous(), codebook.contiguous(), sizes, codes, r, c, k)
    return codes


def lookup(codes: Tensor, codebook: Tensor) -> Tensor:
    """codebook[i, codes[i, j]] in bfloat16: `codes` uint8 [r, c], `codebook` float32 [r, k]."""
    r, c = codes.shape
    k = codebook.shape[1]
    native.require("codes", codes, torch.uint8, (r, c))
    native.require("codebook", codebook, torch.float32, (r, k))
    out = torch.empty(r, c, dtype=torch.bfloat16)
    native.call("lookup_bf16", codes, codebook, out, r, c, k)
    return out


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
