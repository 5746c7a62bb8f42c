"""Rounding an embedding or a head to 8 or 4 bits with one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from skimlm.format.pack import pack_nibbles

ROWS = 4096  # table rows quantized at a time


def quantize_table(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round `[rows, cols]` to 8 or 4 bits: the stored codes and a bfloat16 scale per row.

    Of a few shrinkings of a row's range the one of least squared error is taken: at 4 bits it pays
    to clip the outliers, at 8 it hardly ever does.
    """
    chunks = [_quantize_rows(rows.float(), bits) for rows in table.detach().split(ROWS)]
    codes, scale = (torch.cat(part) for part in zip(*chunks, strict=True))
    return codes if bits == 8 else pack_nibbles(codes), scale


def _quantize_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes in -2**(bits-1) .. 2**(bits-1) - 1 and bfloat16 scales, by a search over scales."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = rows.aminmax(dim=1)
    # the side that reaches further gets the extra code: the scale carries the sign
    full = torch.where(most > -least, most / low, least / low)
    best = torch.full_like(full, float("inf"))
    codes = torch.zeros_like(rows, dtype=torch.int8)
    scale = torch.zeros_like(full, dtype=torch.bfloat16)
    for shrink in torch.linspace(0.5, 1.0, 16) if bits == 4 else torch.linspace(0.97, 1.0, 4):
        trial = (full * shrink).to(torch.bfloat16)  # what the file will hold
        step = torch.where(trial == 0, 1.0, trial.float()).unsqueeze(1)
        code = (rows / step).round_().clamp_(low, high)
        error = (code * trial.float().unsqueeze(1) - rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial, scale)
        codes[better] = code[better].to(torch.int8)
    return codes, scale
