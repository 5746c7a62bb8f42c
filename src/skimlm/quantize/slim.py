"""One linear as SLiM has it: W ~ S + B^T A, S sparse and rounded, A and B low-rank.

`fit_paper` is SLiM as published (2410.09615): a mask, a grid, an adapter for what both
lose, then the kept weights rounded once more to what the adapter leaves. `fit` minimises the same
error, ||X (W - S - B^T A)^T||, over everything that is stored, in turns that each solve their part:
    adapter   for W - S, exact under the Gram matrix of the inputs, rounded to what is stored
    S         for W - B^T A: mask, codes and codebook or scales, by coordinate descent
and keeps the best turn. S has a k-means codebook per row, or a uniform grid with group scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from skimlm.format.layer import LayerSpec
from skimlm.format.pack import Adapter, QuantizedWeight, spread
from skimlm.format.row_codes import TABLE
from skimlm.quantize import grid, lowrank
from skimlm.quantize.fit import round_codebook
from skimlm.quantize.kmeans import kmeans_rows, nearest
from skimlm.quantize.mask import Sparsity, magnitude, sparsegpt, wanda
from skimlm.quantize.refine import PRUNED, codebook_step, damped, sparse_dense, sparse_descent


@dataclass(frozen=True)
class Options:
    """What S and the adapter are made of."""

    bits: int = 4
    sparsity: Sparsity | None = Sparsity(2, 4)
    rank: float = 0.1
    adapter_bits: int = 4
    group: int | None = None  # columns that share a scale; None: a codebook per row, 0: one scale
    rounds: int = 4
    sweeps: int = 4
    # what follows is for `fit_paper` only
    mask: str = "wanda"  # sparsegpt, magnitude
    quantizer: str = "slim"  # absmax, error; slim needs group 0
    adapter: str = "diag"  # naive, gram
    shift: bool = True  # add the least positive square of the inputs to all of them
    salient: bool = False  # SLiM-Quant^O

    def spec(self, r: int, c: int) -> LayerSpec:
        """How a linear [r, c] will be stored; SkimError if the sparsity does not fit."""
        rank = lowrank.rank_of(self.rank, r, c)
        return LayerSpec(
            r,
            c,
            sparsity=None if self.sparsity is None else "2:4" if _pairs(self) else "bitmap",
            kept=self.sparsity.kept(c) if self.sparsity else 0,
            group=None if self.group is None else min(self.group or c, c),
            rank=rank,
            adapter_bits=self.adapter_bits if rank else 0,
        )


@dataclass
class Sparse:
    """S while it is fitted; codes are [r, c], 255 where a weight is pruned."""

    codebook: Tensor  # float32 [r, k] ascending: values, or the levels of a grid
    sizes: Tensor  # int32 [r]
    scale: Tensor  # float32 [r, ceil(c / group)]: 1 with a codebook
    group: int
    codes: Tensor  # uint8 [r, c]

    def values(self) -> Tensor:
        """S, float32 [r, c]."""
        return sparse_dense(self.codes, self.codebook, self.scale, self.group)


def error(d: Tensor, h: Tensor) -> float:
    """Sum over rows of d H d^T."""
    return float(((d @ h) * d).sum(dtype=torch.float64))


def fit(
    w: Tensor,
    h: Tensor,
    options: Options,
    target: Tensor | None = None,
    *,
    widths: Tensor | None = None,
    adapter: Adapter | None = None,
    row_weight: Tensor | None = None,
) -> QuantizedWeight:
    """S and adapter of least error under `h` [c, c], the damped Gram matrix of the inputs.

    `target` [r, c] replaces W where the inputs at hand differ from the original's. `widths` uint8
    [r], up to 5, gives rows codebooks of their own sizes. `adapter` is one to begin with; a new one
    counts the errors of row i `row_weight[i]` times. Of all turns the best is kept.
    """
    goal = w if target is None else target
    r, c = w.shape
    k = lowrank.rank_of(options.rank, r, c)
    if widths is None:
        widths = torch.full((r,), options.bits, dtype=torch.uint8)
    root = torch.ones(r, 1) if row_weight is None else row_weight.clamp(min=1e-3).sqrt()[:, None]
    s, b = start(rest(goal, adapter), h, options, widths), None
    best: tuple[float, Sparse, Adapter | None] | None = None
    for _ in range(options.rounds if k else 1):
        s = settle(rest(goal, adapter), h, s, options)
        left = goal - s.values()
        if k:
            a, b = lowrank.low_rank(left * root, k, h, b)
            adapter = lowrank.quantized(left, a, b / root.T, options.adapter_bits, h)
            left = rest(left, adapter)
        now = error(left * root, h)
        if best is None or now < best[0]:
            best = now, s, adapter
    assert best is not None
    return stored(rest(goal, best[2]), h, best[1], best[2], options, widths)


def rest(goal: Tensor, adapter: Adapter | None) -> Tensor:
    """What is left for S: the goal less B^T A as stored."""
    if adapter is None:
        return goal
    a, b = adapter.values()
    return goal - b.T @ a


def start(w: Tensor, h: Tensor, options: Options, widths: Tensor) -> Sparse:
    """A first S: SparseGPT's mask and update, then k-means or a grid for the weights that stay."""
    kept, mask = sparsegpt(w, h, options.sparsity) if options.sparsity else (w, None)
    r, c = w.shape
    importance = h.diagonal().expand(r, c)
    importance = (importance if mask is None else importance * mask).contiguous()
    sizes = (1 << widths.int()).int()
    if options.group is None:
        tables = kmeans_rows(kept.contiguous(), importance, int(widths.max()))[0]
        table = torch.empty(r, tables[-1].shape[1])
        for b in widths.unique().tolist():
            rows = widths == b
            table[rows, : 1 << b] = tables[b - 1][rows]
            table[rows, 1 << b :] = tables[b - 1][rows, -1:]
        s = Sparse(table, sizes, torch.ones(r, 1), c, nearest(kept.contiguous(), table, sizes))
    else:
        group = min(options.group, c)
        steps = grid.least_error(kept, options.bits, group, importance)
        levels = torch.arange(1 << options.bits, dtype=torch.float32) - (1 << (options.bits - 1))
        codes = grid.encode(kept, steps, options.bits, group)
        s = Sparse(levels.repeat(r, 1), sizes, steps, group, codes)
    if mask is not None:
        s.codes = s.codes.masked_fill(~mask, PRUNED)
    return s


def settle(w: Tensor, h: Tensor, s: Sparse, options: Options) -> Sparse:
    """Codes, mask and codebook of S for `w`: descent and codebook steps in turn."""
    codebook, codes = s.codebook, s.codes
    for turn in range(3):
        if turn and options.group is None:
            codebook, codes = codebook_step(w, h, codebook, s.sizes, codes)
        codes = sparse_descent(
            w, h, codebook, s.sizes, s.scale, s.group, codes, _pairs(options), options.sweeps
        )
    return Sparse(codebook, s.sizes, s.scale, s.group, codes)


def stored(
    w: Tensor, h: Tensor, s: Sparse, adapter: Adapter | None, options: Options, widths: Tensor
) -> QuantizedWeight:
    """S as the file holds it: codebooks rounded to int8 levels, codes settled for `w` on them."""
    levels, scale = torch.zeros(len(w), TABLE, dtype=torch.int8), s.scale.bfloat16()
    table = s.codebook
    if options.group is None:
        levels, scale = round_codebook(_padded(s.codebook), s.sizes)
        levels[torch.arange(TABLE) >= s.sizes[:, None]] = 0
        table = (levels[:, : table.shape[1]].float() * scale.float()[:, None]).contiguous()
    codes = sparse_descent(
        w, h, table, s.sizes, s.scale, s.group, s.codes, _pairs(options), options.sweeps
    )
    group = None if options.group is None else s.group
    return _assembled(codes, codes != PRUNED, widths, levels, scale, options, group, adapter)


def _assembled(
    codes: Tensor,
    mask: Tensor,
    widths: Tensor,
    levels: Tensor,
    scale: Tensor,
    options: Options,
    group: int | None,
    adapter: Adapter | None,
    in_scale: Tensor | None = None,
) -> QuantizedWeight:
    sparse = options.sparsity is not None
    return QuantizedWeight(
        codes[mask].view(len(codes), -1) if sparse else codes,
        widths,
        levels,
        scale,
        torch.zeros(len(codes), dtype=torch.int16),
        in_scale,
        mask if sparse else None,
        ("2:4" if _pairs(options) else "bitmap") if sparse else None,
        group,
        adapter,
    )


def fit_paper(w: Tensor, h: Tensor, options: Options) -> QuantizedWeight:
    """SLiM and its baselines as published: one pass of mask, grid, adapter, grid.

    The first rounding is of the dense W, the adapter takes what mask and rounding lose, then the
    kept weights less the adapter are rounded with new scales. SparseGPT prunes and rounds in one
    loop.
    """
    r, c = w.shape
    group = c if not options.group else min(options.group, c)
    squares = h.diagonal().clamp(min=0)
    if options.shift and bool((squares > 0).any()):
        squares = squares + squares[squares > 0].min()
    scale = grid.salient_columns(w, squares) if options.salient else torch.ones(c)
    sparsity, bits = options.sparsity, options.bits
    steps = paper_steps(w, options, group)  # as published, found before columns are scaled
    if options.mask == "sparsegpt" and (sparsity or not options.rank):
        every = spread(steps, group, c)

        def rounded(column: Tensor, j: int) -> Tensor:
            step = every[:, j : j + 1].contiguous()
            codes = grid.encode(column[:, None], step, bits, 1)
            return grid.decode(codes, step, bits, 1)[:, 0]

        final, mask = sparsegpt(w, h, sparsity, rounded)
    else:
        mask = torch.ones_like(w, dtype=torch.bool)
        if sparsity and options.mask == "magnitude":
            mask = magnitude(w, sparsity)
        elif sparsity:
            mask = wanda(w, squares.sqrt(), sparsity)
        final = w / scale * mask
    adapter, k = None, lowrank.rank_of(options.rank, r, c)
    if k:
        first = grid.decode(grid.encode(w / scale, steps, bits, group), steps, bits, group) * scale
        left = w - first * mask if options.mask != "sparsegpt" else w - final
        weighting = {"naive": None, "diag": squares, "gram": damped(h, shrink=0.0)}[options.adapter]
        a, b = lowrank.low_rank(left, k, weighting)
        final = (w - b.T @ a) / scale * mask
        steps = paper_steps(final, options, group)
        adapter = lowrank.quantized(left, a, b, options.adapter_bits, weighting)
    levels = torch.zeros(r, TABLE, dtype=torch.int8)
    return _assembled(
        grid.encode(final, steps, bits, group),
        mask,
        torch.full((r,), bits, dtype=torch.uint8),
        levels,
        steps.bfloat16(),
        options,
        group,
        adapter,
        scale.half() if options.salient else None,
    )


def paper_steps(w: Tensor, options: Options, group: int) -> Tensor:
    """Steps [r, ceil(c / group)] of the grid of `w` by the quantizer asked for."""
    if options.quantizer == "slim":
        return grid.slim_quant(w, options.bits)
    if options.quantizer == "absmax":
        return grid.absmax(w, options.bits, group)
    return (
        grid.least_error(w, options.bits, group)
        if options.group
        else grid.least_error_matrix(w, options.bits)
    )


def _pairs(options: Options) -> bool:
    return options.sparsity is not None and (options.sparsity.keep, options.sparsity.of) == (2, 4)


def _padded(codebook: Tensor) -> Tensor:
    more = TABLE - codebook.shape[1]
    return torch.cat([codebook, codebook[:, -1:].expand(-1, more)], 1) if more else codebook
