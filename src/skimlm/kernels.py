"""The operations of a compressed linear: a readable torch version, and the native one beside it.

`dequantize_packed` turns the buffers as they are stored (see `weights/pack.py`) into a matrix. On
the CPU, for float32 and bfloat16, native code does it; elsewhere, and as its oracle,
`dequantize_reference`: for every width in use, cut the rows' bytes into codes, look the codes up,
scale the rows, and put them back in the model's row order. Both give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skimlm import native
from skimlm.weights.pack import check_sizes, stored_groups, unpack_codes

CHUNK = 2**22  # codes turned into float32 at a time: bounds the temporaries to about 60 MB


def dequantize_packed(
    weight: Tensor,
    widths: Tensor,
    codebook: Tensor | None,
    row_scale: Tensor,
    row_zero: Tensor | None,
    in_scale: Tensor | None,
    cols: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turn stored buffers into the weight `[r, cols]`: in float32, rounded once to `dtype`.

    The sizes of the buffers are checked at every call, since native code would read past the end of
    one that is too short; their values are checked when a model is loaded. Raises FormatError.
    """
    if weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return dequantize_reference(
            weight, widths, codebook, row_scale, row_zero, in_scale, cols, dtype
        )
    stored = _present(weight, widths, codebook, row_scale, row_zero, in_scale)
    check_sizes(stored, len(row_scale), cols)
    out = torch.empty(len(widths), cols, dtype=dtype)
    native.call(
        "unpack",
        *(weight, widths, codebook, row_scale, row_zero, in_scale, out),
        int(dtype == torch.bfloat16),
        len(widths),
        cols,
    )
    return out


def dequantize_reference(
    weight: Tensor,
    widths: Tensor,
    codebook: Tensor | None,
    row_scale: Tensor,
    row_zero: Tensor | None,
    in_scale: Tensor | None,
    cols: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in torch, on any device."""
    stored = _present(weight, widths, codebook, row_scale, row_zero, in_scale)
    out = torch.empty(len(widths), cols, dtype=dtype, device=weight.device)
    step = max(1, CHUNK // cols)
    for width, index, part in stored_groups(stored, cols):
        for at in (slice(i, i + step) for i in range(0, len(index), step)):
            codes = unpack_codes(part["weight"][at], width, cols)
            if "codebook" in part:
                level = part["codebook"][at].float().gather(1, codes.long())
            else:
                level = codes.float() - part["row_zero"][at].float().unsqueeze(1)
            value = level * part["row_scale"][at].float().unsqueeze(1)
            out[index[at]] = (value if in_scale is None else value * in_scale.float()).to(dtype)
    return out


def _present(*buffers: Tensor | None) -> dict[str, Tensor]:
    """The stored tensors by name, those a linear does not have left out."""
    names = ("weight", "widths", "codebook", "row_scale", "row_zero", "in_scale")
    return {n: t for n, t in zip(names, buffers, strict=True) if t is not None}
