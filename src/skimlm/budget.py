"""From what was asked (bits per weight, bytes on disk, one index width) to the width of every row.

Everything stored counts: indices, codebooks, scales, the width byte of a row
(weights/pack.row_bits), and for a size in bytes also embeddings, norms, headers, config and
tokenizer. The answer never exceeds the target and lies within one edge of a row's hull below it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from skimlm.errors import SkimError
from skimlm.weights.allocate import allocate
from skimlm.weights.fit import WIDTHS
from skimlm.weights.pack import row_bits

Widths = dict[str, Tensor]  # uint8 [r] per linear


@dataclass(frozen=True)
class Prices:
    """What widths cost: bits of a row of each width per linear, and what is stored regardless."""

    rows: dict[str, np.ndarray]  # float64 [8]
    fixed: float  # bits, e.g. of scaling vectors
    weights: dict[str, int]

    @property
    def total(self) -> int:
        """Weights in all linears."""
        return sum(self.weights.values())

    def bits(self, widths: Mapping[str, Tensor]) -> float:
        """Stored bits of the linears at these widths."""
        chosen = (self.rows[n][w.numpy().astype(int) - 1].sum() for n, w in widths.items())
        return float(sum(chosen)) + self.fixed


def prices(linears: Mapping[str, nn.Linear], scale: bool) -> Prices:
    """Prices of these linears; `scale`: each stores a float16 scaling vector."""
    rows = {
        n: np.array([row_bits(b, m.in_features) for b in WIDTHS], float) for n, m in linears.items()
    }
    fixed = sum(16 * m.in_features for m in linears.values()) if scale else 0
    return Prices(rows, fixed, {n: m.weight.numel() for n, m in linears.items()})


def uniform(linears: Mapping[str, nn.Linear], width: int) -> Widths:
    """The same width for every row."""
    return {n: torch.full((m.out_features,), width, dtype=torch.uint8) for n, m in linears.items()}


def for_bits(errors: Mapping[str, Tensor], price: Prices, bits: float, pooled: bool) -> Widths:
    """Widths with the least total error at no more than `bits` stored bits per weight.

    `errors`: [r, 8] per linear. `pooled`: one budget for the model, else one per linear (the
    paper).
    """
    per_weight = bits - price.fixed / price.total
    costs = {n: np.broadcast_to(price.rows[n], e.shape) for n, e in errors.items()}
    least = sum(float(cost[:, 0].sum()) for cost in costs.values()) / price.total
    if per_weight < least:
        raise SkimError(
            f"{bits:g} bits per weight is below what codebooks and bookkeeping allow here: "
            f"at least {least + price.fixed / price.total:.3f}"
        )
    tables = {n: e.double().numpy() for n, e in errors.items()}
    if not pooled:
        return {
            n: _widths(
                allocate(e, costs[n], max(per_weight * price.weights[n], costs[n][:, 0].sum()))
            )
            for n, e in tables.items()
        }
    choice = allocate(
        np.concatenate(list(tables.values())),
        np.concatenate(list(costs.values())),
        per_weight * price.total,
    )
    return dict(zip(errors, _widths(choice).split([len(e) for e in tables.values()]), strict=True))


def for_size(
    errors: Mapping[str, Tensor],
    price: Prices,
    size: int,
    pooled: bool,
    planned_bytes: Callable[[Widths], int],
) -> Widths:
    """Widths whose folder has at most `size` bytes; `planned_bytes` counts every file of it."""
    ends = [
        planned_bytes({n: torch.full((len(e),), b, dtype=torch.uint8) for n, e in errors.items()})
        for b in (1, 8)
    ]
    if size < ends[0]:
        raise SkimError(
            f"{size:,} bytes cannot be reached: the folder takes {ends[0]:,} bytes at 1 bit and "
            f"{ends[1]:,} at 8; --embed-bits 4 makes it smaller"
        )
    # Headers and config grow with the histograms: start from the straight line, correct downwards.
    bits = 1 + 7 * (size - ends[0]) / (ends[1] - ends[0]) + 0.2
    low = (
        sum(float(price.rows[n][0]) * len(e) for n, e in errors.items()) + price.fixed
    ) / price.total
    for _ in range(12):
        widths = for_bits(errors, price, max(bits, low), pooled)
        excess = planned_bytes(widths) - size
        if excess <= 0:
            return widths
        bits = price.bits(widths) / price.total - 8 * excess / price.total
    raise SkimError(f"{size:,} bytes cannot be met; the least is {ends[0]:,}")


def _widths(choice: np.ndarray) -> Tensor:
    return torch.from_numpy(choice + 1).to(torch.uint8)
