"""Codes of rows as bytes: the two ways in which a row code may pack them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Packing:
    """How n codes of b bits become the bytes of a row."""

    row_bytes: Callable[[int, int], int]  # of n codes: (b, n)
    pack: Callable[[Tensor, int], Tensor]  # codes uint8 [rows, n], b -> uint8 [rows, row_bytes]
    unpack: Callable[[Tensor, int, int], Tensor]  # bytes, b, n -> codes; any bytes are valid
    padding: Callable[[Tensor, int, int], Tensor]  # bytes, b, n -> the bits that must be zero
    bytes_text: str  # `row_bytes` in FORMAT.md's letters


def row_bytes(bits: int, count: int) -> int:
    """Bytes of a row of codes that follow each other bit by bit."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [n, c] into uint8 [n, row_bytes]: code j at bit j*bits, LSB first."""
    n, cols = codes.shape
    ones = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8)) & 1  # [n, c, bits]
    return _to_bytes(F.pad(ones.view(n, cols * bits), (0, -cols * bits % 8)))


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """Invert `pack_codes`: uint8 [n, row_bytes] to codes uint8 [n, cols]."""
    if bits == 0:
        return packed.new_zeros(len(packed), cols)
    if bits in (1, 2, 4, 8):  # no code spans two bytes
        shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed.unsqueeze(-1) >> shift) & (2**bits - 1)).flatten(1)[:, :cols]
    start = torch.arange(cols, device=packed.device) * bits
    # a code spans two bytes at most; the byte behind the last one is never used, only indexed
    wide = F.pad(packed, (0, 1)).to(torch.int16)
    pair = wide[:, start // 8] | (wide[:, start // 8 + 1] << 8)
    return ((pair >> (start % 8).to(torch.int16)) & (2**bits - 1)).to(torch.uint8)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [n, c] by eights: bit m of code j is bit j % 8 of byte j // 8 * bits + m."""
    eights = F.pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    planes = [_to_bytes((eights >> m & 1).flatten(1)) for m in range(bits)]
    return torch.stack(planes, 2).flatten(1)


def unpack_planes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """Invert `pack_planes`: uint8 [n, ceil(cols / 8) * bits] to codes uint8 [n, cols]."""
    shift = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = packed.unflatten(1, (-1, bits, 1)) >> shift & 1  # [n, eights, bits, 8]
    place = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (planes * place.view(-1, 1)).sum(2, dtype=torch.uint8).flatten(1)[:, :cols]


def _to_bytes(ones: Tensor) -> Tensor:
    """Bits uint8 [n, 8 k] as bytes [n, k], the first bit lowest."""
    place = 1 << torch.arange(8, dtype=torch.uint8)
    return (ones.unflatten(1, (-1, 8)) * place).sum(-1, dtype=torch.uint8)


def _behind(last: Tensor, used: int) -> Tensor:
    """What stands in the last bytes of rows above `used` bits, eight of them to a byte."""
    return last >> used % 8 if used % 8 else last[:, :0]


STREAM = Packing(
    row_bytes,
    pack_codes,
    unpack_codes,
    lambda packed, bits, cols: _behind(packed[:, -1:], bits * cols),
    "ceil(n*b/8)",
)
PLANES = Packing(
    lambda bits, count: bits * -(-count // 8),
    pack_planes,
    unpack_planes,
    lambda packed, bits, cols: _behind(packed[:, -bits:], cols),
    "b*ceil(n/8)",
)
