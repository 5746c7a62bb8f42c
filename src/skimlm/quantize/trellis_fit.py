"""Trellis rows from weight to what is stored: a table for all rows of one width, scales, symbols.

`curve` learns a table under the diagonal weights and gives the error of every row, as k-means does
for rows with codebooks; `fit` goes on from there under a full H and rounds to what is stored.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skimlm.format.row_codes import WINDOWS, windows
from skimlm.quantize.refine import quadratic
from skimlm.quantize.trellis import ROWS, descend, scale_step, table_step, values, viterbi

NORMAL, TAILS = 80, 0.1  # rounds of the table all begin with, and how far its tails are drawn out
ALIKE, WEIGHTED = 4, 2  # rounds in which a table is learnt: all weights alike, then under F
SCALES = (0.75, 1.0, 1.25, 1.5, 1.8, 2.2, 2.8)  # of the rms of a row, from which its own is found
ROUNDS = 4  # of symbols, scales and table under H
LEARN = 256  # rows, those that count most, from which a table learns under H
SETTLE = 3  # passes over the symbols once all else is rounded
LEVELS = 127  # the largest entry of a stored table


@dataclass(frozen=True)
class TrellisRows:
    """Rows of one width, rounded to what is stored."""

    codes: Tensor  # uint8 [r, c]
    table: Tensor  # int8 [128]
    scale: Tensor  # bfloat16 [r]
    bits: int

    def values(self) -> Tensor:
        """De-quantized rows float32 [r, c]."""
        return values(self.codes, self.bits, self.table, self.scale.float())


@functools.cache
def start_table(bits: int) -> Tensor:
    """Levels [128] for weights of variance 1, from which tables are learnt.

    They suit normal numbers whose tails are drawn out: a few outliers cost more than all else where
    no level reaches them. Quantiles are dealt so that the 2^b windows of a class span the range,
    neighbouring parts going to the other tap; from there symbols and levels are found by turns.
    """
    classes, plain = WINDOWS >> bits, 1 << (bits - 1)
    z = math.sqrt(2) * torch.erfinv((2 * torch.arange(WINDOWS) + 1) / WINDOWS - 1)
    part = torch.arange(plain) * 2 + torch.arange(2).unsqueeze(1)  # [taps, plain]
    table = z[part * classes + torch.arange(classes)[:, None, None]].flatten()
    w = torch.randn(ROWS, 512, generator=torch.Generator().manual_seed(0))
    w *= 1 + TAILS * w.abs()
    w /= w.square().mean().sqrt()
    alike, scale = torch.ones_like(w), torch.ones(ROWS)
    for _ in range(NORMAL):
        codes = viterbi(w, alike, table, scale, bits)
        table = _table_means(w, alike, table, scale, codes, bits)
    return table


def learn_table(w: Tensor, f: Tensor, bits: int) -> Tensor:
    """The table [128] that suits some rows of `w` under `f`: symbols, scales, levels by turns."""
    step = -(-len(w) // ROWS)
    w, f = w[::step].contiguous(), f[::step].contiguous()
    table, scale = start_table(bits), _rms(w)
    for weight in [torch.ones_like(f)] * ALIKE + [f] * WEIGHTED:
        codes = viterbi(w, weight, table, scale, bits)
        scale = _scales(w, weight, table[windows(codes, bits).int()], scale)
        table = _table_means(w, weight, table, scale, codes, bits)
    return table


def _table_means(
    w: Tensor, f: Tensor, table: Tensor, scale: Tensor, codes: Tensor, bits: int
) -> Tensor:
    """The table of least error under `f`, symbols fixed; entries that no weight has stay."""
    window, size = windows(codes, bits).flatten().long(), scale.unsqueeze(1)
    mass = torch.zeros(WINDOWS).index_add_(0, window, (f * size * size).flatten())
    total = torch.zeros(WINDOWS).index_add_(0, window, (f * size * w).flatten())
    return torch.where(mass > 0, total / mass, table)


def find_scales(w: Tensor, f: Tensor, table: Tensor, bits: int) -> Tensor:
    """Scales [r] of rows under `f`, the table given.

    Of a few scales each row takes the best one: where a sensitive weight lies far out, coarser
    levels for all others cost less than not reaching it.
    """
    least, best = torch.full((len(w),), torch.inf), _rms(w)
    for factor in SCALES:
        scale = _rms(w) * factor
        level = table[windows(viterbi(w, f, table, scale, bits), bits).int()]
        scale = _scales(w, f, level, scale)
        error = (f * (level * scale.unsqueeze(1) - w).square()).sum(1)
        least, best = torch.minimum(least, error), torch.where(error < least, scale, best)
    return best


def start(w: Tensor, f: Tensor, table: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symbols uint8 [r, c] of rows under `f`, and the scales [r] that are best with them."""
    codes = viterbi(w, f, table, scale.contiguous(), bits)
    return codes, _scales(w, f, table[windows(codes, bits).int()], scale)


def curve(w: Tensor, f: Tensor, h: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """A table [128] for rows of this width, their scales [r], and the error [r] of every row.

    Symbols minimise the diagonal weights `f`; the error is measured under the full `h` when given,
    under `f` when not: what `quantize.fit.analyse` does for rows with codebooks.
    """
    table, scales, errors = learn_table(w, f, bits), torch.empty(len(w)), torch.empty(len(w))
    fast = None if h is None else h.bfloat16()
    for begin in range(0, len(w), ROWS):
        some = slice(begin, begin + ROWS)
        scales[some] = find_scales(w[some], f[some], table, bits)
        d = rounded(w[some], f[some], table, scales[some], bits) - w[some]
        errors[some] = (f[some] * d * d).sum(1) if fast is None else quadratic(d, fast)
    return table, scales, errors


def rounded(w: Tensor, f: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Rows float32 [r, c] as they are before a full H is looked at, nothing rounded but symbols."""
    codes, scale = start(w, f, table, scale, bits)
    return values(codes, bits, table, scale)


def fit(
    w: Tensor,
    f: Tensor,
    h: Tensor,
    row_weight: Tensor,
    table: Tensor,
    scale: Tensor,
    bits: int,
    fixed: bool = False,
    ordered: Tensor | None = None,
    rounds: int = ROUNDS,
) -> TrellisRows:
    """Rows of one width under `h`, from a table float32 [128] and scales [r].

    `w`, `f` float32 [r, c], `h` [c, c] symmetric and positive definite, `row_weight` [r]. `fixed`:
    the table stays. For `ordered` see `descend`. Without `rounds` nothing is looked at but `f`.
    """
    codes, scale = start(w, f, table, scale, bits)
    if not rounds:
        return TrellisRows(codes, *round_table(table, scale), bits)
    coarse = h.bfloat16()  # enough for scales, and three times as fast
    scale = scale_step(w, coarse, table, scale, codes, bits)
    for _ in range(rounds):
        codes = descend(w, h, table, scale, codes, bits, 1, ordered)
        scale = scale_step(w, coarse, table, scale, codes, bits)
        if not fixed:
            some = (row_weight * scale * scale).topk(min(len(w), LEARN)).indices
            known = w[some], h, row_weight[some], table, scale[some], codes[some], bits
            table = table_step(*known)
    return finish(w, h, table, scale, codes, bits, ordered)


def finish(
    w: Tensor,
    h: Tensor,
    table: Tensor,
    scale: Tensor,
    codes: Tensor,
    bits: int,
    ordered: Tensor | None = None,
) -> TrellisRows:
    """Table and scales rounded to what is stored, on which symbols then settle under `h`."""
    levels, size = round_table(table, scale)
    size = scale_step(w, h.bfloat16(), levels.float(), size.float(), codes, bits).bfloat16()
    codes = descend(w, h, levels.float(), size.float(), codes, bits, SETTLE, ordered)
    return TrellisRows(codes, levels, size, bits)


def round_table(table: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A table [128] as int8 levels, times bfloat16 scales of rows [r]."""
    unit = table.abs().max().clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    return (table / unit).round().to(torch.int8), (scale * unit).bfloat16()


def _rms(w: Tensor) -> Tensor:
    return w.square().mean(1).sqrt()


def _scales(w: Tensor, f: Tensor, level: Tensor, scale: Tensor) -> Tensor:
    """The scale of least error under `f` of rows of levels; of rows without one it stays."""
    square = (f * level * level).sum(1)
    return torch.where(square > 0, (f * level * w).sum(1) / square, scale)
