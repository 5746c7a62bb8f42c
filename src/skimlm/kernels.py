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
from skimlm.weights.pack import MAX_WIDTH, histogram, layout, stored_groups, unpack_codes

WIDTHS = set(range(1, MAX_WIDTH + 1))
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

    Loading a model checks the buffers' values (`weights.pack.check_stored`); here their sizes are
    checked again, since native code reads past the end of what is too short. Raises ValueError.
    """
    if weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return dequantize_reference(
            weight, widths, codebook, row_scale, row_zero, in_scale, cols, dtype
        )
    stored = {"weight": weight, "codebook": codebook, "row_scale": row_scale, "row_zero": row_zero}
    counts = histogram(widths)
    if widths.dtype != torch.uint8 or len(widths) != len(row_scale) or not set(counts) <= WIDTHS:
        raise ValueError(f"widths must be uint8 [{len(row_scale)}] in 1..{MAX_WIDTH}")
    expected = layout(counts, cols, in_scale is not None)
    for name, tensor in (stored | {"in_scale": in_scale}).items():
        kind, shape = expected.get(name, (torch.uint8, (0,)))
        if (0 if tensor is None else tensor.numel()) != shape[0] or (
            tensor is not None and tensor.dtype != kind
        ):
            raise ValueError(f"{name} must be {kind} {list(shape)}, got {_spec(tensor)}")
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
    stored = dict(weight=weight, widths=widths, row_scale=row_scale)
    optional = dict(codebook=codebook, row_zero=row_zero)
    stored |= {name: tensor for name, tensor in optional.items() if tensor is not None}
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


def _spec(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
