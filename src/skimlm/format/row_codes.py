"""The ways of coding a row: how its codes become levels, and what is stored besides codes.

value[i, j] = level[i, j] * row_scale[i] * in_scale[j]. To add one, add an entry to `ROW_CODES` (and
to layer.py the tensors it adds, if they are new); a kernel for a device says in runtime/ that it
knows the code, until then torch multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from skimlm.format.layer import LayerSpec


@dataclass(frozen=True)
class RowCode:
    """A way to turn the codes of a row into levels: value = level * row_scale * in_scale."""

    name: str
    widths: range  # bits of a code
    used: Callable[[LayerSpec], bool]  # by layers that are so; the first of ROW_CODES that fits is
    adds: Mapping[str, Callable[[int], int]]  # tensor -> its elements per row, from the width
    # codes uint8 [n, k], their width, the tensors it adds [n, elements] -> levels float32 [n, k]
    levels: Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]
    formula: str  # of a level, for FORMAT.md
    used_text: str  # `used` for FORMAT.md


def _table_levels(codes: Tensor, width: int, stored: Mapping[str, Tensor]) -> Tensor:
    return stored["codebook"].float().gather(1, codes.long())


def _affine_levels(codes: Tensor, width: int, stored: Mapping[str, Tensor]) -> Tensor:
    return codes.float() - stored["row_zero"].float()


def _grid_levels(codes: Tensor, width: int, stored: Mapping[str, Tensor]) -> Tensor:
    return codes.float() - 2 ** (width - 1)


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
)
MAX_WIDTH = max(code.widths[-1] for code in ROW_CODES)
MAX_TABLE_WIDTH = next(code.widths[-1] for code in ROW_CODES if code.name == "table")
TABLE = 2**MAX_TABLE_WIDTH  # columns of a codebook that is not packed
