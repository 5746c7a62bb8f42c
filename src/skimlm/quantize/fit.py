"""One linear from weight to `QuantizedWeight`: curve -> widths -> codebooks -> codes.

`analyse` gives the rate-distortion curve of every row, `start` the k-means solution at chosen
widths, `finish` rounds the codebooks to what is stored (8-bit levels, one bfloat16 scale per row).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skimlm.format.pack import QuantizedWeight
from skimlm.format.row_codes import (
    MAX_TABLE_WIDTH,
    MAX_WIDTH,
    TABLE,
    TRELLIS,
    WINDOWS,
    code_bits,
)
from skimlm.quantize import refine, trellis, trellis_fit
from skimlm.quantize.kmeans import kmeans_rows, nearest
from skimlm.quantize.trellis import in_stream
from skimlm.quantize.trellis_fit import TrellisRows

GRIDS = range(1, MAX_WIDTH + 1)  # widths of codebooks, and of affine grids
TRELLISES = tuple(TRELLIS + bits for bits in trellis.BITS)
WIDTHS = (*GRIDS, *TRELLISES)
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
    # the trellis rows of each width, in row order; their codebook entry is unused
    trellis: dict[int, TrellisRows] = field(default_factory=dict)

    @property
    def table_rows(self) -> Tensor:
        """Boolean [r]: rows that have a codebook."""
        return self.widths <= MAX_TABLE_WIDTH

    @property
    def affine_rows(self) -> Tensor:
        """Boolean [r]: rows of 6..8 bits."""
        return ~self.table_rows & (self.widths < TRELLIS)

    @property
    def sizes(self) -> Tensor:
        """Codebook entries of every row, int32 [r] (1 where the row is affine)."""
        return torch.where(self.table_rows, 1 << self.widths.int(), 1).int()

    def dense(self) -> Tensor:
        """De-quantized weight [r, c] float32, codebooks not yet rounded, scale included."""
        out = refine.dense(self.codes.clamp(max=TABLE - 1), self.codebook)
        if self.affine is not None:
            out[self.affine_rows] = affine_values(self.affine)
        for width, rows in self.trellis.items():
            out[self.widths == width] = rows.values()
        return out if self.in_scale is None else out * self.in_scale


@dataclass(frozen=True)
class Curve:
    """What the rows of a linear lose at every width, and where fits begin."""

    centroids: list[Tensor]  # of k-means, float32 [r, 2^b] for b = 1..5
    tables: Tensor  # of trellises, float32 [widths, 128]
    scales: Tensor  # of trellis rows, float32 [r, widths]
    errors: Tensor  # float64 [r, widths]: of GRIDS, then of TRELLISES


def analyse(
    w: Tensor, f: Tensor, h: Tensor | None, edges: int = 0, trellises: bool = True
) -> Curve:
    """The curve of every row: k-means of 1..5 bits, grids of 6..8, trellises if they are asked for.

    Errors of 7 and 8 bits are extrapolated from 6. Codebooks and trellises minimise the diagonal
    weights `f` (for `edges` see `kmeans_rows`); the error is measured under the full `h` when given
    (it may then rise with the width), under `f` when not.
    """
    centroids, costs = kmeans_rows(w, f, MAX_TABLE_WIDTH, edges)
    errors = errors_under(w, f, centroids, h, costs)
    if not trellises:
        return Curve(centroids, torch.empty(0, WINDOWS), torch.empty(len(w), 0), errors)
    found = [trellis_fit.curve(w, f, h, code_bits(width)) for width in TRELLISES]
    tables, scales, lost = zip(*found, strict=True)
    errors = torch.cat([errors, torch.stack(lost, 1)], 1)
    return Curve(centroids, torch.stack(tables), torch.stack(scales, 1), errors)


def errors_under(
    w: Tensor, f: Tensor, centroids: list[Tensor], h: Tensor | None, costs: Tensor | None = None
) -> Tensor:
    """The error of every row at GRIDS under `h`, or under `f` where k-means gave `costs`."""
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
                errors[some, b - 1] = refine.quadratic(d, fast)
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


def start(w: Tensor, f: Tensor, widths: Tensor, centroids: list[Tensor]) -> Fit:
    """The k-means solution with row i at widths[i] bits; trellis rows are left out."""
    codebook = torch.zeros(len(w), TABLE)
    for b in range(1, MAX_TABLE_WIDTH + 1):
        rows = widths == b
        codebook[rows, : 1 << b] = centroids[b - 1][rows]
        codebook[rows, 1 << b :] = centroids[b - 1][rows][:, -1:]
    fit = Fit(widths, codebook, torch.empty(0), None)
    wide = fit.affine_rows
    fit.affine = affine_rows(w[wide], f[wide], widths[wide]) if bool(wide.any()) else None
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


def fit_trellises(
    w: Tensor,
    f: Tensor,
    h: Tensor,
    row_weight: Tensor,
    tables: Tensor,
    scales: Tensor,
    fit: Fit,
    fixed: bool = False,
    rounds: int = trellis_fit.ROUNDS,
) -> None:
    """Fit the trellis rows of `fit` under `h`, from tables and scales of their curves.

    `fixed`: the tables stay. Without `rounds` only `f` counts.
    """
    ordered = in_stream(h) if rounds and bool((fit.widths >= TRELLIS).any()) else None
    for width, own, table, scale in trellis_starts(fit.widths, tables, scales):
        rows = w[own], f[own], h, row_weight[own], table, scale
        fit.trellis[width] = trellis_fit.fit(*rows, code_bits(width), fixed, ordered, rounds)


def trellis_starts(
    widths: Tensor, tables: Tensor, scales: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of the trellis widths in use: (width, which rows have it [r], their table, their scales)."""
    for table, scale, width in zip(tables, scales.T, TRELLISES, strict=False):
        own = widths == width
        if bool(own.any()):
            yield width, own, table, scale[own]


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
    levels[~fit.table_rows] = 0
    if fit.affine is not None:
        wide, q = fit.affine_rows, fit.affine
        codes[wide], scale[wide], zero[wide] = q.codes, q.row_scale, q.row_zero
    for width, rows in fit.trellis.items():
        own = fit.widths == width
        codes[own], scale[own] = rows.codes, rows.scale
    tables = [fit.trellis[width].table for width in sorted(fit.trellis)]
    return QuantizedWeight(
        codes,
        fit.widths,
        levels,
        scale,
        zero,
        None if fit.in_scale is None else fit.in_scale.half(),
        trellis=torch.stack(tables) if tables else torch.empty(0, WINDOWS, dtype=torch.int8),
    )


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
