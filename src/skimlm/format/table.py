"""An embedding or a head as it is stored: a table [V, d] of small integers, one scale per row.

8 bit: weight int8  [V, d]           value = weight * scale
4 bit: weight uint8 [V, ceil(d/2)]   value = (nibble - 8) * scale, even columns low
"""

from __future__ import annotations

import torch
from torch import Tensor

from skimlm.format.pack import unpack_nibbles


def table_layout(rows: int, cols: int, bits: int) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of a table's stored codes."""
    return ((rows, cols), torch.int8) if bits == 8 else ((rows, -(-cols // 2)), torch.uint8)


def table_values(codes: Tensor, scale: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """De-quantize rows `[..., n]` with scales `[...]`: in float32, rounded once to `dtype`."""
    if codes.dtype == torch.uint8:
        codes = unpack_nibbles(codes, cols)
    return (codes.float() * scale.float().unsqueeze(-1)).to(dtype)
