"""A body as native code sees it: the structs of native/structs.py, filled."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from skimlm.format.abi import LayerStruct
from skimlm.format.row_codes import MAX_WIDTH
from skimlm.native.structs import BlockStruct, BodyStruct, layer_struct
from skimlm.runtime.linear import CompressedLinear


class _Filler:
    """Fills structures, and keeps what they point into."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.floats: list[Tensor] = []  # biases in float32 where they are not
        self.biases: list[Tensor] = []

    def at(self, tensor: Tensor | None) -> int | None:
        """Where a tensor lies, which from now on will not go away."""
        if tensor is None:
            return None
        self.kept.append(tensor.detach())
        return tensor.data_ptr()

    def bias(self, linear: CompressedLinear) -> Tensor | None:
        """The bias in float32; a copy is brought up to date before every call."""
        if linear.bias is None:
            return None
        own = linear.bias.detach()
        if own.dtype == torch.float32:
            return own
        self.biases.append(own)
        self.floats.append(own.float())
        return self.floats[-1]

    def linear(self, linear: CompressedLinear) -> Any:
        """A pointer to its struct; None if its tensors do not fit each other."""
        bias, widths = self.bias(linear), linear.widths
        for tensor in (*linear.layer.tensors.values(), bias):
            self.at(tensor)
        fields = layer_struct(linear.layer, bias)
        if fields is None:
            return None
        struct = LayerStruct.from_buffer_copy(fields)
        struct.order = self.at(torch.argsort(widths, stable=True).int())
        struct.counts = self.at(torch.bincount(widths.long(), minlength=MAX_WIDTH + 1))
        return ctypes.pointer(struct)


def body_struct(
    body: Any, blocks: list[Any], parts: list[tuple[list[Any], list[Any]]], dtype: torch.dtype
) -> tuple[BodyStruct, list[Any], tuple[list[Tensor], list[Tensor]]] | None:
    """The structure, what it points into, and (float32 copies, biases): None if it cannot be."""
    fill, structs = _Filler(), (BlockStruct * len(blocks))()
    for struct, (linears, norms) in zip(structs, parts, strict=True):
        filled = [fill.linear(linear) for linear in linears]
        if None in filled:
            return None
        into = 1 if len(linears) == 4 else 3
        *first, struct.down = filled
        struct.in_count, struct.mlp_count = into, len(first) - into - 1
        weights = [None if norm is None else fill.at(norm.weight) for norm in norms]
        struct.norm, struct.q_norm, struct.k_norm, struct.mlp_norm = weights
        struct.into[:into], struct.o = first[:into], first[into]
        struct.mlp[: struct.mlp_count] = first[into + 1 :]
    fill.kept.append(structs)
    attention, config = blocks[0].self_attn, body.config
    struct = BodyStruct(
        bf16=dtype == torch.bfloat16,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        count=len(blocks),
        eps=body.norm.variance_epsilon,
        scale=attention.scaling,
        norm=fill.at(body.norm.weight),
        blocks=structs,
    )
    return struct, fill.kept, (fill.floats, fill.biases)
