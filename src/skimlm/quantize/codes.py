"""Packed rows as the numbers that training looks up and sums by."""

import torch
from torch import Tensor

from skimlm import native
from skimlm.format.codes import PLANES, STREAM, Packing
from skimlm.format.row_codes import windows as windows_reference


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The codes uint8 [n, cols] of rows packed one code after the other, `bits` each, 1..8."""
    if native.missing():
        return STREAM.unpack(packed, bits, cols).contiguous()
    return _unpack("unpack_codes", STREAM, packed, bits, cols)


def unpack_windows(packed: Tensor, bits: int, cols: int) -> Tensor:
    """What each code of trellis rows looks up, uint8 [n, cols]; `bits` 1..4."""
    if native.missing():
        return windows_reference(PLANES.unpack(packed, bits, cols), bits)
    return _unpack("unpack_windows", PLANES, packed, bits, cols)


def _unpack(function: str, packing: Packing, packed: Tensor, bits: int, cols: int) -> Tensor:
    want = (len(packed), packing.row_bytes(bits, cols))
    native.require("packed", packed, torch.uint8, want)
    out = torch.empty(len(packed), cols, dtype=torch.uint8)
    native.call(function, packed, out, len(packed), cols, bits)
    return out
