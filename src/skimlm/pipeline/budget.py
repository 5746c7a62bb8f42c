"""From what was asked (bits per weight, bytes on disk, one index width) to the width of every row.

Everything stored counts: indices, codebooks, scales, the width byte of a row
(format/layer.row_bits), and for a size in bytes also embeddings, norms, headers, config and
tokenizer. The answer never exceeds the target and lies within one edge of a row's hull below it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from skimlm.errors import SkimError, naming
from skimlm.format.layer import LayerSpec, row_bits, shared_bits
from skimlm.format.row_codes import MAX_TABLE_WIDTH
from skimlm.quantize import slim
from skimlm.quantize.allocate import allocate
from skimlm.quantize.fit import WIDTHS

EXACT = 12  # tries at a size that are corrected by what the last one was over
LESS = 1e-3  # bits per weight between two later tries, at least: the search ends
NEAR = 0.005  # a folder is at most this much smaller than asked
Widths = dict[str, Tensor]  # uint8 [r] per linear


@dataclass(frozen=True)
class Prices:
    """What widths cost: bits of a row of each width per linear, and what is stored regardless."""

    rows: dict[str, np.ndarray]  # float64 [8], or [5] if sparse or with adapters: no affine rows
    fixed: float  # bits, e.g. of scaling vectors
    weights: dict[str, int]

    @property
    def widest(self) -> int:
        """The largest width a row can have."""
        return min(len(prices) for prices in self.rows.values())

    @property
    def total(self) -> int:
        """Weights in all linears."""
        return sum(self.weights.values())

    def bits(self, widths: Mapping[str, Tensor]) -> float:
        """Stored bits of the linears at these widths."""
        chosen = (self.rows[n][w.numpy().astype(int) - 1].sum() for n, w in widths.items())
        return float(sum(chosen)) + self.fixed


def prices(specs: Mapping[str, LayerSpec]) -> Prices:
    """Prices of linears that will be stored so."""
    rows, fixed = {}, 0
    for name, spec in specs.items():
        possible = WIDTHS if spec.plain else WIDTHS[:MAX_TABLE_WIDTH]
        rows[name] = np.array([row_bits(spec, b) for b in possible], float)
        fixed += shared_bits(spec)
    return Prices(rows, fixed, {name: spec.rows * spec.cols for name, spec in specs.items()})


def specs_of(
    linears: Mapping[str, nn.Linear], options: slim.Options | None, in_scale: bool
) -> dict[str, LayerSpec]:
    """How every linear will be stored, but for its widths; SkimError where that does not fit."""
    specs = {}
    for name, linear in linears.items():
        shape = linear.weight.shape
        with naming(name):
            spec = LayerSpec(*shape) if options is None else options.spec(*shape)
        specs[name] = dataclasses.replace(spec, in_scale=in_scale)
    return specs


def uniform(linears: Mapping[str, nn.Linear], width: int) -> Widths:
    """The same width for every row."""
    return {n: torch.full((m.out_features,), width, dtype=torch.uint8) for n, m in linears.items()}


@dataclass(frozen=True)
class Target:
    """What was asked: stored bits per weight, bytes of the folder, or one width for every row."""

    bits: float = 3.2
    size: int | None = None
    index_bits: int | None = None


def check(
    target: Target,
    linears: Mapping[str, nn.Linear],
    price: Prices,
    planned_bytes: Callable[[Widths], int],
) -> None:
    """Refuse a target that no widths meet, before any work is done."""
    least, top = uniform(linears, 1), price.widest
    if target.index_bits:
        return
    if target.size is not None and target.size < planned_bytes(least):
        raise SkimError(
            f"{target.size:,} bytes cannot be reached: the folder takes {planned_bytes(least):,} "
            f"bytes at 1 bit and {planned_bytes(uniform(linears, top)):,} at {top}; --embed-bits 4 "
            "makes it smaller"
        )
    if target.size is not None and target.size > planned_bytes(uniform(linears, top)) / (1 - NEAR):
        raise SkimError(
            f"{target.size:,} bytes is more than {top} bits per weight take, "
            f"{planned_bytes(uniform(linears, top)):,}: give at most that; --embed-bits 16 makes "
            "it larger"
        )
    if target.size is not None:
        return
    low, high = (price.bits(uniform(linears, b)) / price.total for b in (1, top))
    if target.bits < low:
        raise SkimError(
            f"{target.bits:g} bits per weight is below what codebooks and bookkeeping allow here: "
            f"at least {low:.3f}"
        )
    if target.bits > high:  # rounded down, so that it can be asked for
        raise SkimError(
            f"{target.bits:g} bits per weight is more than rows of {top} bits, the widest here, "
            f"take: at most {int(high * 1000) / 1000:.3f}"
        )


def choose(
    target: Target,
    errors: Mapping[str, Tensor],
    linears: Mapping[str, nn.Linear],
    price: Prices,
    pooled: bool,
    planned_bytes: Callable[[Widths], int],
) -> Widths:
    """Widths of all rows for a target that passed `check`."""
    if target.index_bits:
        return uniform(linears, target.index_bits)
    if target.size is None:
        return for_bits(errors, price, target.bits, pooled)
    # Headers and config grow with the histograms: begin a little high, then correct downwards.
    low, high = (price.bits(uniform(linears, b)) / price.total for b in (1, price.widest))
    narrow, wide = (planned_bytes(uniform(linears, b)) for b in (1, price.widest))
    bits = low + (high - low) * (target.size - narrow) / max(wide - narrow, 1) + 0.05
    for attempt in itertools.count():
        widths = for_bits(errors, price, min(max(bits, low), high), pooled)
        excess = planned_bytes(widths) - target.size
        if excess <= 0:
            return widths
        if bits <= low:
            break
        closer = (price.bits(widths) - 8 * excess) / price.total
        bits = closer if attempt < EXACT else min(closer, bits - LESS)
    raise SkimError(
        f"{target.size:,} bytes cannot be reached: the folder takes {narrow:,} bytes at 1 bit "
        f"and {wide:,} at {price.widest}"
    )


def for_bits(errors: Mapping[str, Tensor], price: Prices, bits: float, pooled: bool) -> Widths:
    """Widths with the least total error at no more than `bits` stored bits per weight.

    `errors`: [r, 8] per linear. `pooled`: one budget for the model, else one per linear (the
    paper).
    """
    per_weight = bits - price.fixed / price.total
    costs = {n: np.broadcast_to(price.rows[n], e.shape) for n, e in errors.items()}
    tables = {n: e.double().numpy() for n, e in errors.items()}
    if not pooled:
        shares = _shares({n: float(costs[n][:, 0].sum()) for n in tables}, price, per_weight)
        return {n: _widths(allocate(e, costs[n], shares[n])) for n, e in tables.items()}
    choice = allocate(
        np.concatenate(list(tables.values())),
        np.concatenate(list(costs.values())),
        per_weight * price.total,
    )
    return dict(zip(errors, _widths(choice).split([len(e) for e in tables.values()]), strict=True))


def _shares(least: Mapping[str, float], price: Prices, per_weight: float) -> dict[str, float]:
    """One budget per linear, the same bits per weight but for those that need more at the least."""
    poor: set[str] = set()
    while True:
        rest = [n for n in least if n not in poor]
        left = per_weight * price.total - sum(least[n] for n in poor)
        rate = left / max(sum(price.weights[n] for n in rest), 1)
        more = {n for n in rest if rate * price.weights[n] < least[n]}
        if not more:
            return {n: least[n] if n in poor else rate * price.weights[n] for n in least}
        poor |= more


def _widths(choice: np.ndarray) -> Tensor:
    return torch.from_numpy(choice + 1).to(torch.uint8)
