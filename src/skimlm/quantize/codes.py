"""Packed rows as the numbers that training looks up and sums by."""

import torch
from torch import Tensor

from skimlm import native
from skimlm.format.layer import row_bytes
from skimlm.format.pack import unpack_codes as unpack_codes_reference
from skimlm.format.row_codes import windows as windows_reference


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The codes uint8 [n, cols] of rows packed as uint8 [n, row_bytes], `bits` each, 1..8."""
    if native.missing():
        return unpack_codes_reference(packed, bits, cols)
    return _unpack(packed, bits, cols, windows=False)


def unpack_windows(packed: Tensor, bits: int, cols: int) -> Tensor:
    """What each code of such rows looks up in a trellis, uint8 [n, cols]; `bits` 1..4."""
    if native.missing():
        return windows_reference(unpack_codes_reference(packed, bits, cols), bits)
    return _unpack(packed, bits, cols, windows=True)


def _unpack(packed: Tensor, bits: int, cols: int, windows: bool) -> Tensor:
    native.require("packed", packed, torch.uint8, (len(packed), row_bytes(bits, cols)))
    out = torch.empty(len(packed), cols, dtype=torch.uint8)
    native.call("unpack_codes", packed, out, len(packed), cols, bits, int(windows))
    return out
