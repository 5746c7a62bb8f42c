"""From what was asked (bits per weight, bytes on disk, one index width) to the width of every row.

Everything stored counts: indices, codebooks, scales, the width byte of a row
(format/layer.row_bits), and for a size in bytes also embeddings, norms, headers, config and
tokenizer. The answer never exceeds the target and lies within one edge of a row's hull below it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from skimlm.errors import SkimError, naming
from skimlm.format.layer import LayerSpec, histogram, row_bits, shared_bits
from skimlm.format.row_codes import code_bits
from skimlm.quantize import slim
from skimlm.quantize.allocate import allocate

EXACT = 12  # tries at a size that are corrected by what the last one was over
LESS = 1e-3  # bits per weight between two later tries, at least: the search ends
TABLE_SHARE = 1 / 16  # of what the rows of a width take, that what they share may take more
NEAR = 0.005  # a folder is at most this much smaller than asked
Widths = dict[str, Tensor]  # uint8 [r] per linear


@dataclass(frozen=True)
class Prices:
    """What widths cost: bits of a row of each width per linear, and what is stored regardless."""

    specs: Mapping[str, LayerSpec]  # of the linears, but for their widths
    widths: Sequence[int]  # that a row can have, as they are stored
    rows: Mapping[str, np.ndarray]  # float64 [widths] per linear

    @property
    def total(self) -> int:
        """Weights in all linears."""
        return sum(spec.rows * spec.cols for spec in self.specs.values())

    @property
    def ends(self) -> tuple[int, int]:
        """The widths of the fewest and of the most bits whose rows share nothing."""
        return self.alone[0], self.alone[-1]

    @cached_property
    def alone(self) -> tuple[int, ...]:
        """The widths whose rows share nothing."""
        spec = next(iter(self.specs.values()))
        return tuple(w for w in self.widths if not _table_bits(spec, w))

    @property
    def base(self) -> int:
        """Bits besides the rows, whatever their widths."""
        return sum(shared_bits(spec) for spec in self.specs.values())

    def shared(self, allowed: Mapping[str, Sequence[int]]) -> int:
        """Bits besides the rows, if each linear has rows of these widths."""
        pairs = ((self.specs[n], widths) for n, widths in allowed.items())
        return sum(shared_bits(replace(s, counts=dict.fromkeys(w, 1))) for s, w in pairs)

    def per_row(self, name: str) -> np.ndarray:
        """Bits of a row of each width, with its part of what all rows of the linear would share."""
        spec = self.specs[name]
        parts = np.array([_table_bits(spec, width) / spec.rows for width in self.widths])
        return self.rows[name] + parts

    def used(self, allowed: Sequence[int], widths: Tensor) -> tuple[int, ...]:
        """Of the widths that are allowed those that rows have, or that share nothing."""
        there = histogram(widths)
        return tuple(width for width in allowed if width in self.alone or width in there)

    def paying(self, name: str, widths: Tensor) -> tuple[int, ...]:
        """The widths a linear with rows of `widths` should have: what few share does not pay."""
        spec, counts = self.specs[name], histogram(widths)

        def pays(width: int) -> bool:
            stored = counts.get(width, 0) * row_bits(spec, width)
            return _table_bits(spec, width) <= TABLE_SHARE * stored

        return tuple(width for width in self.widths if width in self.alone or pays(width))

    def bits(self, widths: Mapping[str, Tensor]) -> float:
        """Stored bits of the linears at these widths."""
        column = np.zeros(256, int)
        column[list(self.widths)] = range(len(self.widths))
        rows = sum(self.rows[n][column[w.numpy()]].sum() for n, w in widths.items())
        return float(rows) + sum(
            shared_bits(self.specs[n].with_widths(w)) for n, w in widths.items()
        )


def _table_bits(spec: LayerSpec, width: int) -> int:
    """Bits that rows of a width share in a linear."""
    return shared_bits(replace(spec, counts={width: 1})) - shared_bits(replace(spec, counts={}))


def prices(specs: Mapping[str, LayerSpec], widths: Sequence[int]) -> Prices:
    """Prices of linears that will be stored so, in rows of these widths."""
    rows = {n: np.array([row_bits(spec, w) for w in widths], float) for n, spec in specs.items()}
    return Prices(specs, widths, rows)


def specs_of(
    linears: Mapping[str, nn.Linear], options: slim.Options | None, in_scale: bool
) -> dict[str, LayerSpec]:
    """How every linear will be stored, but for its widths; SkimError where that does not fit."""
    specs = {}
    for name, linear in linears.items():
        shape = linear.weight.shape
        with naming(name):
            spec = LayerSpec(*shape) if options is None else options.spec(*shape)
        specs[name] = replace(spec, in_scale=in_scale)
    return specs


def uniform(specs: Mapping[str, LayerSpec], width: int) -> Widths:
    """The same width for every row."""
    return {n: torch.full((s.rows,), width, dtype=torch.uint8) for n, s in specs.items()}


@dataclass(frozen=True)
class Target:
    """What was asked: stored bits per weight, bytes of the folder, or one width for every row."""

    bits: float = 3.2
    size: int | None = None
    index_bits: int | None = None


def check(
    target: Target,
    price: Prices,
    planned_bytes: Callable[[Widths], int],
) -> None:
    """Refuse a target that no widths meet, before any work is done."""
    if target.index_bits:
        return
    least, most = (uniform(price.specs, width) for width in price.ends)
    top = code_bits(price.ends[1])
    if target.size is not None and target.size < planned_bytes(least):
        raise SkimError(
            f"{target.size:,} bytes cannot be reached: the folder takes {planned_bytes(least):,} "
            f"bytes at 1 bit and {planned_bytes(most):,} at {top}; --embed-bits 4 makes it smaller"
        )
    if target.size is not None and target.size > planned_bytes(most) / (1 - NEAR):
        raise SkimError(
            f"{target.size:,} bytes is more than {top} bits per weight take, "
            f"{planned_bytes(most):,}: give at most that; --embed-bits 16 makes it larger"
        )
    if target.size is not None:
        return
    low, high = (price.bits(widths) / price.total for widths in (least, most))
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
    price: Prices,
    pooled: bool,
    planned_bytes: Callable[[Widths], int],
) -> Widths:
    """Widths of all rows for a target that passed `check`."""
    if target.index_bits:
        return uniform(price.specs, target.index_bits)
    if target.size is None:
        return for_bits(errors, price, target.bits, pooled)

    def spend(bits: float) -> Widths:
        return for_bits(errors, price, bits, pooled)

    return _for_size(target.size, price, spend, planned_bytes)


def _for_size(
    size: int,
    price: Prices,
    spend: Callable[[float], Widths],
    planned_bytes: Callable[[Widths], int],
) -> Widths:
    """Of what is bought for some bits per weight the largest that `size` bytes have room for."""
    ends = [uniform(price.specs, width) for width in price.ends]
    low, high = (price.bits(widths) / price.total for widths in ends)
    narrow, wide = (planned_bytes(widths) for widths in ends)
    # Headers and config grow with the histograms: begin a little high, then correct downwards.
    bits = low + (high - low) * (size - narrow) / max(wide - narrow, 1) + 0.05
    over = high
    for attempt in itertools.count():
        widths = spend(min(max(bits, low), high))
        excess = planned_bytes(widths) - size
        if excess <= 0:
            break
        if bits <= low:
            raise SkimError(
                f"{size:,} bytes cannot be reached: the folder takes {narrow:,} bytes at 1 bit "
                f"and {wide:,} at {code_bits(price.ends[1])}"
            )
        over = bits
        closer = (price.bits(widths) - 8 * excess) / price.total
        bits = closer if attempt < EXACT else min(closer, bits - LESS)
    fits = bits
    for _ in range(EXACT):  # what rows share is bought whole: where much is left, more may fit
        if -excess <= NEAR * size:
            break
        bits = (fits + over) / 2
        wider = spend(bits)
        more = planned_bytes(wider) - size
        if more > 0:
            over = bits
            continue
        fits = bits
        if more > excess:
            widths, excess = wider, more
    return widths


def for_bits(errors: Mapping[str, Tensor], price: Prices, bits: float, pooled: bool) -> Widths:
    """Widths with the least total error at no more than `bits` stored bits per weight.

    `errors`: [r, widths] per linear. `pooled`: one budget for the model, else one per linear (the
    paper). What rows of a width share is first charged as if all rows of the linear had it; where
    it turns out to pay it is then paid in full, and the linear does without it elsewhere.
    """
    every = {name: tuple(price.widths) for name in errors}
    shared = {name: price.per_row(name) for name in errors}
    first = _spend(errors, price, shared, every, price.base, bits * price.total, pooled)
    allowed = {name: price.paying(name, widths) for name, widths in first.items()}
    least = sum(price.rows[n][0] * spec.rows for n, spec in price.specs.items())
    if least + price.shared(allowed) > bits * price.total:
        allowed = {name: price.alone for name in errors}
    while True:
        fixed = price.shared(allowed)
        widths = _spend(errors, price, price.rows, allowed, fixed, bits * price.total, pooled)
        used = {n: price.used(allowed[n], w) for n, w in widths.items()}
        if used == allowed:
            return widths
        allowed = used  # what was kept for tables that no row took buys other rows


def _spend(
    errors: Mapping[str, Tensor],
    price: Prices,
    rows: Mapping[str, np.ndarray],
    allowed: Mapping[str, Sequence[int]],
    fixed: float,
    budget: float,
    pooled: bool,
) -> Widths:
    """Widths out of those that are `allowed`, for `budget` bits less those that are `fixed`.

    `rows` is what a row of each width costs.
    """
    tables, costs, widths = {}, {}, {}
    for name, error in errors.items():
        bits = rows[name]
        columns = sorted((price.widths.index(w) for w in allowed[name]), key=bits.__getitem__)
        # as many columns for every linear: the first is repeated, which costs and gains nothing
        columns = [columns[0]] * (len(bits) - len(columns)) + columns
        tables[name] = error.double().numpy()[:, columns]
        costs[name] = np.broadcast_to(bits[columns], tables[name].shape)
        widths[name] = np.array(price.widths, np.uint8)[columns]
    left = (budget - fixed) / price.total
    if not pooled:
        weights = {n: spec.rows * spec.cols for n, spec in price.specs.items()}
        shares = _shares({n: float(costs[n][:, 0].sum()) for n in tables}, weights, left)
        choices, spare = {}, 0.0  # what a linear leaves goes to the next
        for name, table in tables.items():
            room = shares[name] + spare
            choices[name] = choice = allocate(table, costs[name], room)
            spare = room - costs[name][range(len(choice)), choice].sum()
    else:
        pool, pool_costs = (np.concatenate(list(each.values())) for each in (tables, costs))
        every = torch.from_numpy(allocate(pool, pool_costs, left * price.total))
        parts = every.split([len(e) for e in tables.values()])
        choices = {n: part.numpy() for n, part in zip(tables, parts, strict=True)}
    return {n: torch.from_numpy(widths[n][choice]) for n, choice in choices.items()}


def _shares(
    least: Mapping[str, float], weights: Mapping[str, int], per_weight: float
) -> dict[str, float]:
    """One budget per linear, the same bits per weight but for those that need more at the least."""
    poor: set[str] = set()
    while True:
        rest = [n for n in least if n not in poor]
        left = per_weight * sum(weights.values()) - sum(least[n] for n in poor)
        rate = left / max(sum(weights[n] for n in rest), 1)
        more = {n for n in rest if rate * weights[n] < least[n]}
        if not more:
            return {n: least[n] if n in poor else rate * weights[n] for n in least}
        poor |= more
