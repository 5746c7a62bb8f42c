"""Trellis rows: levels of a table at sliding windows over a row's symbols, and the best symbols.

    viterbi         the symbols of least error under diagonal weights, exactly
    descend         runs of symbols chosen anew under a full H; never raises the error of a row
    scale_step      the best scale of every row, symbols fixed
    table_step      the best table of all rows, symbols fixed

The window of a weight is its symbol and the taps, the highest bits, of the symbols behind it
(format/row_codes.py): w_hat[i, j] = table[window[i, j]] * scale[i]. Behind it in the stream, that
is, which takes every eighth column: `stream_order`. From the last weight to the first, windows are
a shift register, which Viterbi's algorithm runs through; QTIP (2406.11235) has it with more taps.
"""

import torch
from torch import Tensor

from skimlm import native
from skimlm.format.row_codes import WINDOW, WINDOWS, stream_order, stream_windows, windows

BITS = range(1, 5)  # of a symbol
# symbols chosen at once, and how far apart such runs begin; the native code's tiles allow strides
# that divide 48, and runs of at most 8 more
RUN, STRIDE = 16, 8
LEAST = 1e-6  # of x H x, that a change x must gain: rounding must not make two take turns
RIDGE = 1e-6
ROWS = 256  # rows at a time, where every one needs a few numbers for each weight
DOUBLE = torch.float64


def values(codes: Tensor, bits: int, table: Tensor, scale: Tensor) -> Tensor:
    """De-quantized rows float32 [r, c]: table[window] * scale."""
    return table.float()[windows(codes, bits).int()] * scale.unsqueeze(1)


def viterbi(w: Tensor, f: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Symbols uint8 [r, c] with the least sum of f (scale * table[window] - w)^2 of every row.

    `w`, `f` float32 [r, c], `table` float32 [128], `scale` float32 [r].
    """
    r, c = w.shape
    native.require("f", f, torch.float32, (r, c))
    codes = torch.empty(r, c, dtype=torch.uint8)
    _check(w, table, scale, codes, bits)
    if native.missing():
        return viterbi_reference(w, f, table, scale, bits)
    native.call("trellis_viterbi", w, f, table, scale, codes, r, c, bits)
    return codes


def in_stream(h: Tensor) -> Tensor:
    """A matrix [c, c] with rows and columns in the order of the stream."""
    order, out = stream_order(len(h)), torch.empty_like(h)
    for rows in _some(len(h)):  # or a third copy would stand for a moment
        out[rows] = h[order[rows]][:, order]
    return out


def descend(
    w: Tensor,
    h: Tensor,
    table: Tensor,
    scale: Tensor,
    codes: Tensor,
    bits: int,
    sweeps: int,
    ordered: Tensor | None = None,
) -> Tensor:
    """Symbols after `sweeps` passes under `h` [c, c]; `codes` uint8 [r, c] is the start.

    `ordered` is `in_stream(h)`, which many rows can share.

    At every eighth place of the stream sixteen symbols are chosen anew by Viterbi's algorithm, all
    others fixed. The one path that is kept for a class of windows carries its own errors, so that
    its cost is exact; that no other path of its class could do better later on is a heuristic. A
    row takes a choice only if it is strictly better.
    """
    r, c = w.shape
    native.require("h", h, torch.float32, (c, c))
    _check(w, table, scale, codes, bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a symbol of {bits} bits is below {1 << bits}, got {int(codes.max())}")
    if native.missing():
        return descend_reference(w, h, table, scale, codes, bits, sweeps)
    order = stream_order(c)
    gradient = ((values(codes, bits, table, scale) - w) @ h)[:, order].contiguous()
    ordered, found = in_stream(h) if ordered is None else ordered, codes[:, order].contiguous()
    native.require("ordered", ordered, torch.float32, (c, c))
    native.call(
        "trellis_descend", ordered, gradient, table, scale, found, r, c, bits, RUN, STRIDE, sweeps
    )
    return torch.empty_like(codes).index_copy_(1, order, found)


def scale_step(
    w: Tensor, h: Tensor, table: Tensor, scale: Tensor, codes: Tensor, bits: int
) -> Tensor:
    """The scale [r] of least error under `h`, symbols fixed; rows of levels 0 keep theirs.

    Products have the precision of `h`, sums are of float32.
    """
    out = scale.clone()
    for rows in _some(len(w)):
        v = table[windows(codes[rows], bits).int()]
        vh = (v.to(h.dtype) @ h).float()
        square = (vh * v).sum(1)
        out[rows] = torch.where(square > 0, (vh * w[rows]).sum(1) / square, scale[rows])
    return out


def table_step(
    w: Tensor,
    h: Tensor,
    row_weight: Tensor,
    table: Tensor,
    scale: Tensor,
    codes: Tensor,
    bits: int,
) -> Tensor:
    """The table [128] of least error of all rows, weighted by `row_weight` [r], symbols fixed.

    Least squares, held towards the current table; entries that no weight has stay where they are.
    """
    slope = torch.zeros(WINDOWS, dtype=DOUBLE)
    for rows in _some(len(w)):
        window, size = windows(codes[rows], bits).int(), scale[rows].unsqueeze(1)
        gradient = ((table[window] * size - w[rows]) @ h) * size * row_weight[rows].unsqueeze(1)
        slope.index_add_(0, window.flatten(), gradient.flatten().double())
    a = _normal(h, codes, row_weight * scale * scale, bits)
    if not a.trace() > 0:
        return table
    pull = torch.where(a.diagonal() > 0, RIDGE, 1.0) * a.trace() / WINDOWS
    step = torch.linalg.solve((a + a.T) / 2 + pull.diag(), slope)
    return (table.double() - step).float()


def _some(rows: int) -> list[slice]:
    """All rows, not too many at a time."""
    return [slice(begin, begin + ROWS) for begin in range(0, rows, ROWS)]


def _normal(h: Tensor, codes: Tensor, weight: Tensor, bits: int) -> Tensor:
    """Sum of weight P^T H P over rows, float64 [128, 128], P [c, 128] one-hot windows of a row."""
    if native.missing():
        return normal_reference(h, codes, weight, bits)
    a = torch.empty(WINDOWS, WINDOWS, dtype=DOUBLE)
    r, c = codes.shape
    native.call("trellis_normal", h, windows(codes, bits), weight.contiguous(), a, r, c)
    return a


def _check(w: Tensor, table: Tensor, scale: Tensor, codes: Tensor, bits: int) -> None:
    r, c = w.shape
    native.require("w", w, torch.float32, (r, c))
    native.require("table", table, torch.float32, (WINDOWS,))
    native.require("scale", scale, torch.float32, (r,))
    native.require("codes", codes, torch.uint8, (r, c))
    if bits not in BITS:
        raise ValueError(f"trellis rows have {BITS[0]}..{BITS[-1]} bits, got {bits}")


def _leaving(bits: int) -> Tensor:
    """The 2^b windows that leave each class to the one before, [2^b, classes].

    A class is what a window shares with the one before: all its taps but the last.
    """
    plain, classes = bits - 1, WINDOWS >> bits
    which = torch.arange(1 << bits).unsqueeze(1)
    return which % (1 << plain) | (torch.arange(classes) + (which >> plain) * classes) << plain


def viterbi_reference(w: Tensor, f: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`viterbi` in float64, a column of all rows at a time."""
    leaving, order = _leaving(bits), stream_order(w.shape[1]).tolist()
    level = table.double() * scale.double().unsqueeze(1)
    cost = torch.full((len(w), WINDOWS), torch.inf, dtype=DOUBLE)
    cost[:, 0] = 0
    back = []
    for j in reversed(order):
        least, which = cost[:, leaving].min(1)
        error = f[:, j : j + 1].double() * (level - w[:, j : j + 1].double()).square()
        cost = least.repeat_interleave(1 << bits, dim=1) + error
        back.append(which)
    codes, rows = torch.empty(w.shape, dtype=torch.uint8), torch.arange(len(w))
    window = cost.argmin(1)
    for j, which in zip(order, reversed(back), strict=True):
        codes[:, j] = window % (1 << bits)
        k = window >> bits
        window = leaving[which[rows, k], k]
    return codes


def descend_reference(
    w: Tensor, h: Tensor, table: Tensor, scale: Tensor, codes: Tensor, bits: int, sweeps: int
) -> Tensor:
    """`descend` in float64, a run of all rows at a time."""
    level, order = table.double() * scale.double().unsqueeze(1), stream_order(w.shape[1])
    found, h = codes[:, order], h[order][:, order].double()
    for _ in range(sweeps):
        for begin in range(0, w.shape[1], STRIDE):
            found = _best_run(w[:, order].double(), h, level, found, bits, begin)
    return torch.empty_like(codes).index_copy_(1, order, found)


def _best_run(w: Tensor, h: Tensor, level: Tensor, codes: Tensor, bits: int, begin: int) -> Tensor:
    """Symbols with those from `begin` on chosen anew where that is better; `level` [r, 128].

    All columns stand in the stream's order.
    """
    end, first = min(begin + RUN, w.shape[1]), max(begin - (WINDOW - bits), 0)
    leaving, rows = _leaving(bits), torch.arange(len(w))
    came = leaving >> bits  # the class that a window comes from
    now = stream_windows(codes, bits).long()
    old = level.gather(1, now)
    gradient = ((old - w) @ h[:, first:end]).unsqueeze(2).repeat(1, 1, came.shape[1])
    cost = torch.full((len(w), came.shape[1]), torch.inf, dtype=DOUBLE)
    behind = now[:, end] if end < w.shape[1] else torch.zeros_like(rows)
    cost[rows, (behind >> bits - 1) % came.shape[1]] = 0
    back = []
    for j in reversed(range(first, end)):
        here, hj = gradient[:, j - first], h[first:end, j]
        step = level[:, leaving] - old[:, j, None, None]
        error = cost[:, came] + step * (here[:, came] + step * h[j, j] / 2)
        if j < begin:  # these symbols stay
            error.masked_fill_(leaving % (1 << bits) != codes[:, j, None, None], torch.inf)
        cost, which = error.min(1)
        step = step.gather(1, which.unsqueeze(1))
        source = came.gather(0, which).unsqueeze(1).expand_as(gradient)
        gradient = gradient.gather(2, source) + hj.unsqueeze(1) * step
        back.append(which)
    gain, k = cost.min(1)
    found = codes.clone()
    for j, which in enumerate(reversed(back), first):
        window = leaving[which[rows, k], k]
        found[:, j] = window % (1 << bits)
        k = window >> bits
    step = level.gather(1, stream_windows(found, bits).long()) - old
    better = gain < -LEAST * (step * step * h.diagonal()).sum(1) / 2
    return torch.where(better.unsqueeze(1), found, codes)


def normal_reference(h: Tensor, codes: Tensor, weight: Tensor, bits: int) -> Tensor:
    """The normal equations by one-hot matrices in float64."""
    a = torch.zeros(WINDOWS, WINDOWS, dtype=DOUBLE)
    for window, share in zip(windows(codes, bits), weight.double(), strict=True):
        p = (window.unsqueeze(1) == torch.arange(WINDOWS)).double()
        a += share * (p.T @ h.double() @ p)
    return a
