"""One linear from weight to `QuantizedWeight`: curve -> widths -> codebooks -> codes.

`analyse` gives the rate-distortion curve of every row, `start` the k-means solution at chosen
widths, `finish` rounds the codebooks to what is stored (8-bit levels, one bfloat16 scale per row).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skimlm.format.pack import QuantizedWeight
from skimlm.format.row_codes import MAX_TABLE_WIDTH, MAX_WIDTH, TABLE
from skimlm.quantize import refine
from skimlm.quantize.kmeans import kmeans_rows, nearest

WIDTHS = range(1, MAX_WIDTH + 1)
SPAN = 2048  # columns of a tile of H
# rows at a time: a copy of 256 x 11008 floats is memory the allocator keeps and gives again, of all
# rows at once every copy is fresh pages (4096 x 11008: 16.9 s against 13.8)
ROWS = 256


@dataclass
class Fit:
    """A linear being fitted: float codebooks up to 5 bits, final grids above."""

    widths: Tensor  # uint8 [r]
    # float32 [r, 32], ascending in the first sizes[i] entries, padded with the last
    codebook: Tensor
    codes: Tensor  # uint8 [r, c]
    # the rows of 6..8 bits, in row order; their codebook entry is unused
    affine: QuantizedWeight | None
    # float32 [c]; codebooks and codes live in the scaled domain w / s
    in_scale: Tensor | None = None

    @property
    def table_rows(self) -> Tensor:
        """Boolean [r]: rows that have a codebook."""
        return self.widths <= MAX_TABLE_WIDTH

    @property
    def sizes(self) -> Tensor:
        """Codebook entries of every row, int32 [r] (1 where the row is affine)."""
        return torch.where(self.table_rows, 1 << self.widths.int(), 1).int()

    def dense(self) -> Tensor:
        """De-quantized weight [r, c] float32, codebooks not yet rounded, scale included."""
        out = refine.dense(self.codes.clamp(max=TABLE - 1), self.codebook)
        if self.affine is not None:
            out[~self.table_rows] = affine_values(self.affine)
        return out if self.in_scale is None else out * self.in_scale


def analyse(w: Tensor, f: Tensor, h: Tensor | None, edges: int = 0) -> tuple[list[Tensor], Tensor]:
    """k-means centroids of widths 1..5 and the error of every row at widths 1..8, [r, 8] float64.

    Errors of 7 and 8 bits are extrapolated from 6. The codebooks minimise the diagonal weights
    `f` (for `edges` see `kmeans_rows`); the error is measured under the full `h` when given (it may
    then rise with the width), under `f` when not.
    """
    centroids, costs = kmeans_rows(w, f, MAX_TABLE_WIDTH, edges)
    return centroids, errors_under(w, f, centroids, h, costs)


def errors_under(
    w: Tensor, f: Tensor, centroids: list[Tensor], h: Tensor | None, costs: Tensor | None = None
) -> Tensor:
    """The error of every row at widths 1..8 under `h`, or under `f` where k-means gave `costs`."""
    errors = torch.empty(len(w), MAX_WIDTH, dtype=torch.float64)
    fast = None if h is None else h.bfloat16()  # 0.4 % per product, finer than the curves need
    for begin in range(0, len(w), ROWS):
        some = slice(begin, begin + ROWS)
        for b in range(1, MAX_TABLE_WIDTH + 2):
            if fast is None and costs is not None and b <= MAX_TABLE_WIDTH:
                errors[some, b - 1] = costs[some, b - 1]
                continue
            d = _rounded(w[some], f[some], b, centroids, some).sub_(w[some])
            if fast is None:
                errors[some, b - 1] = (f[some] * d * d).sum(1)
            else:
                errors[some, b - 1] = _quadratic(d, fast)
    for b in range(MAX_TABLE_WIDTH + 1, MAX_WIDTH):  # a bit more, a quarter of the error
        errors[:, b] = errors[:, b - 1] / 4
    return errors


def _rounded(w: Tensor, f: Tensor, b: int, centroids: list[Tensor], rows: slice) -> Tensor:
    """Rows of a weight at b bits: the nearest centroids, above 5 bits a uniform grid."""
    if b > MAX_TABLE_WIDTH:
        widths = torch.full((len(w),), b, dtype=torch.uint8)
        return affine_values(affine_rows(w, f, widths, shrinks=(1.0,)))
    table = centroids[b - 1][rows].contiguous()
    codes = nearest(w, table, torch.full((len(w),), 1 << b, dtype=torch.int32))
    return refine.dense(codes, table)


def _quadratic(d: Tensor, h: Tensor) -> Tensor:
    """d H d^T of every row [r]; of H [c, c] bfloat16, symmetric, one of each pair of tiles."""
    low, total = d.bfloat16(), torch.zeros(len(d))
    for begin in range(0, d.shape[1], SPAN):
        end = begin + SPAN
        product = low[:, begin:end] @ h[begin:end, begin:]
        total += (product[:, :SPAN] * d[:, begin:end]).sum(1)
        total += 2 * (product[:, SPAN:] * d[:, end:]).sum(1)
    return total


def start(w: Tensor, f: Tensor, widths: Tensor, centroids: list[Tensor]) -> Fit:
    """The k-means solution with row i at widths[i] bits."""
    codebook = torch.zeros(len(w), TABLE)
    for b in range(1, MAX_TABLE_WIDTH + 1):
        rows = widths == b
        codebook[rows, : 1 << b] = centroids[b - 1][rows]
        codebook[rows, 1 << b :] = centroids[b - 1][rows][:, -1:]
    wide = widths > MAX_TABLE_WIDTH
    affine = affine_rows(w[wide], f[wide], widths[wide]) if bool(wide.any()) else None
    fit = Fit(widths, codebook, torch.empty(0), affine)
    fit.codes = nearest(w, codebook, fit.sizes)
    return fit


def refine_fit(w: Tensor, h: Tensor, fit: Fit, rounds: int, sweeps: int) -> None:
    """Refine codebooks and codes of `fit` in place under `h`; rows with a grid are left alone."""
    h, w = (
        (h, w)
        if fit.in_scale is None
        else (h * fit.in_scale * fit.in_scale[:, None], w / fit.in_scale)
    )
    rows = fit.table_rows
    if not bool(rows.any()):
        return
    k = int(fit.sizes.max())
    codebook, codes = refine.refine(
        w[rows].contiguous(),
        h.contiguous(),
        fit.codebook[rows, :k].contiguous(),
        fit.sizes[rows].contiguous(),
        fit.codes[rows].contiguous(),
        rounds,
        sweeps,
    )
    fit.codebook[rows, :k] = codebook
    fit.codes[rows] = codes


def finish(w: Tensor, h: Tensor | None, fit: Fit, sweeps: int = 1) -> QuantizedWeight:
    """Round the codebooks to stored levels, then (given `h`) let the codes settle on them."""
    levels, scale = round_codebook(fit.codebook, fit.sizes)
    if h is not None:
        rounded = Fit(
            fit.widths, levels.float() * scale.float()[:, None], fit.codes, None, fit.in_scale
        )
        refine_fit(w, h, rounded, 0, sweeps)
        fit.codes = rounded.codes
    zero = torch.zeros(len(fit.widths), dtype=torch.int16)
    codes = fit.codes.clone()
    levels[torch.arange(TABLE) >= fit.sizes[:, None]] = 0
    if fit.affine is not None:
        wide = ~fit.table_rows
        codes[wide], scale[wide], zero[wide] = (
            fit.affine.codes,
            fit.affine.row_scale,
            fit.affine.row_zero,
        )
        levels[wide] = 0
    in_scale = None if fit.in_scale is None else fit.in_scale.half()
    return QuantizedWeight(codes, fit.widths, levels, scale, zero, in_scale)


def round_codebook(codebook: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks as int8 levels [r, 32] times a bfloat16 scale [r]."""
    unused = torch.arange(codebook.shape[1]) >= sizes[:, None]
    largest = codebook.abs().masked_fill(unused, 0).amax(1)
    scale = _up_to_bfloat16(torch.where(largest > 0, largest / 127, torch.ones_like(largest)))
    return (codebook / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def affine_rows(
    w: Tensor, f: Tensor, widths: Tensor, shrinks: Sequence[float] = (1.0, 0.96, 0.92)
) -> QuantizedWeight:
    """Uniform grids of 6..8 bits, per row the shrunk range with the least error under `f`."""
    top = (1 << widths.int()).float()[:, None] - 1
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    least = torch.full((len(w), 1), torch.inf)
    best = [torch.zeros_like(w), torch.ones_like(low), torch.zeros_like(low)]
    for shrink in shrinks:
        span = (high - low) * shrink
        scale = _up_to_bfloat16(torch.where(span > 0, span / top, torch.ones_like(span))).float()
        zero = (-low * shrink / scale).round()
        codes = ((w / scale).round() + zero).clamp_(min=0).minimum(top)
        error = (f * ((codes - zero) * scale - w).square()).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        for old, new in zip(best, (codes, scale, zero), strict=True):
            old.copy_(torch.where(better, new, old))
    codes, scale, zero = best
    table = torch.zeros(len(w), TABLE, dtype=torch.int8)
    return QuantizedWeight(
        codes.to(torch.uint8), widths, table, scale[:, 0].bfloat16(), zero[:, 0].to(torch.int16)
    )


def affine_values(q: QuantizedWeight) -> Tensor:
    """De-quantized affine rows [r, c] float32."""
    return (q.codes.float() - q.row_zero.float()[:, None]) * q.row_scale.float()[:, None]


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below `x` > 0, so that the largest level is never clipped."""
    down = x.bfloat16()
    return torch.where(down.float() < x, (down.view(torch.int16) + 1).view(torch.bfloat16), down)
