"""The ways of coding a row: how its codes become levels, and what is stored besides codes.

value[i, j] = level[i, j] * row_scale[i] * in_scale[j]. To add one, add an entry to `ROW_CODES` (and
to layer.py the tensors it adds, if they are new); a kernel for a device says in runtime/ that it
knows the code, until then torch multiplies.

A row's width is one byte. Its low four bits, `code_bits`, are the bits of each of the row's codes;
what stands above them sets apart codes that a layer may have beside each other, such as table and
trellis rows of 3 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from skimlm.format.codes import PLANES, STREAM, Packing

if TYPE_CHECKING:
    from skimlm.format.layer import LayerSpec


@dataclass(frozen=True)
class RowCode:
    """A way to turn the codes of a row into levels: value = level * row_scale * in_scale."""

    name: str
    widths: range  # of its rows, as they are stored
    used: Callable[[LayerSpec], bool]  # by layers that are so; the first of ROW_CODES that fits is
    adds: Mapping[str, Callable[[int], int]]  # tensor -> its elements per row, from the code's bits
    # codes uint8 [n, k], their bits, what it adds and shares [n, elements] -> levels float32 [n, k]
    levels: Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]
    formula: str  # of a level, for FORMAT.md
    used_text: str  # `used` for FORMAT.md
    # tensor [widths in use, elements] -> elements that all rows of one width have in common
    shares: Mapping[str, int] = field(default_factory=dict)
    packing: Packing = STREAM  # of its codes
    since: int = 1  # the first version of the format that has such rows, keys of a layer aside


TRELLIS = 16  # a width of this and b: rows whose codes of b bits are a trellis
WINDOW = 7  # bits that look up a level of such a row
WINDOWS = 2**WINDOW  # levels of a trellis
Width = TypeVar("Width", int, Tensor)


def code_bits(width: Width) -> Width:
    """Bits of a code in a row of this width, or of these widths (uint8)."""
    return width % TRELLIS


def stream_order(count: int) -> Tensor:
    """The codes of a row in the order in which their taps follow each other, int64 [count].

    Every eighth: 0, 8, 16, ..., then 1, 9, 17, ... So eight codes that stand side by side have
    their next taps side by side, too, and kernels move bytes.
    """
    return torch.cat([torch.arange(count)[first::8] for first in range(8)])


def stream_windows(codes: Tensor, bits: int) -> Tensor:
    """`windows` of codes that stand in their stream's order."""
    taps, found = codes >> (bits - 1), codes.clone()
    for ahead in range(1, WINDOW - bits + 1):
        found[:, :-ahead] |= taps[:, ahead:] << (bits + ahead - 1)
    return found


def windows(codes: Tensor, bits: int) -> Tensor:
    """What each code looks up in a trellis, uint8 [n, k] of WINDOW bits.

    `codes` uint8 [n, k] of `bits` bits. A window is the code and above it the taps, the highest
    bits, of the codes behind it in the stream, the nearest lowest; at the stream's end there are
    zeros.
    """
    order = stream_order(codes.shape[1]).to(codes.device)
    found = torch.empty_like(codes)
    found[:, order] = stream_windows(codes[:, order], bits)
    return found


def _table_levels(codes: Tensor, bits: int, stored: Mapping[str, Tensor]) -> Tensor:
    return stored["codebook"].float().gather(1, codes.long())


def _affine_levels(codes: Tensor, bits: int, stored: Mapping[str, Tensor]) -> Tensor:
    return codes.float() - stored["row_zero"].float()


def _grid_levels(codes: Tensor, bits: int, stored: Mapping[str, Tensor]) -> Tensor:
    return codes.float() - 2 ** (bits - 1)


def _trellis_levels(codes: Tensor, bits: int, stored: Mapping[str, Tensor]) -> Tensor:
    return stored["trellis"].gather(1, windows(codes, bits).long()).float()


ROW_CODES = (
    RowCode(
        "table",
        range(1, 6),
        lambda s: s.group is None,
        {"codebook": lambda b: 2**b},
        _table_levels,
        "codebook[i][code[i, j]]",
        'without "group"',
    ),
    RowCode(  # a table of more entries costs more than it gains
        "affine",
        range(6, 9),
        lambda s: s.group is None,
        {"row_zero": lambda b: 1},
        _affine_levels,
        "code[i, j] - row_zero[i]",
        'without "group"',
    ),
    RowCode(
        "grid",
        range(1, 9),
        lambda s: s.group is not None,
        {},
        _grid_levels,
        "code[i, j] - 2^(b-1)",
        'with "group"',
    ),
    RowCode(
        "trellis",
        range(TRELLIS + 1, TRELLIS + 5),
        lambda s: s.group is None,
        {},
        _trellis_levels,
        "trellis[b][window[i, j]]",
        'without "group"',
        shares={"trellis": WINDOWS},
        packing=PLANES,
        since=3,
    ),
)
MAX_WIDTH = max(code_bits(b) for code in ROW_CODES for b in code.widths)  # bits of a code
WIDTHS_END = max(code.widths.stop for code in ROW_CODES)  # widths, as they are stored, lie below
MAX_TABLE_WIDTH = next(code.widths[-1] for code in ROW_CODES if code.name == "table")
TABLE = 2**MAX_TABLE_WIDTH  # columns of a codebook that is not packed
