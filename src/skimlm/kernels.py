"""The operations of a compressed linear in plain torch: readable, the oracle of every fast path.

`dequantize_packed` reads the buffers as they are stored (see `weights/pack.py`): for every width in
use, cut the rows' bytes into codes, look the codes up, scale the rows, and put them back in the
model's row order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skimlm.weights.pack import stored_groups, unpack_codes

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
    """Turn stored buffers into the weight `[r, cols]`: in float32, rounded once to `dtype`."""
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
