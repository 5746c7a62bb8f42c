"""A body as native code sees it: the structs of native/structs.py, filled."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skimlm.format.abi import LayerStruct
from skimlm.native.structs import LAYER, BlockStruct, BodyStruct, layer_struct
from skimlm.runtime.linear import CompressedLinear
from skimlm.runtime.ops import stored_order


@dataclass
class Parts:
    """What the modules of a block are for."""

    into: list[CompressedLinear]  # q, k and v, or all in one
    o: CompressedLinear
    mlp: list[CompressedLinear]  # gate and up, or both in one; with a router of every expert
    down: list[CompressedLinear]
    norms: list[Any]  # before attention, of heads (q, k), before the mlp; None where there is none
    router: Any = None

    @property
    def linears(self) -> list[CompressedLinear]:
        """All of them."""
        return [*self.into, self.o, *self.mlp, *self.down]


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
        bias = self.bias(linear)
        for tensor in (*linear.layer.tensors.values(), bias):
            self.at(tensor)
        fields = layer_struct(linear.layer, bias)
        if fields is None:
            return None
        struct = LayerStruct.from_buffer_copy(fields)
        stored = stored_order(linear.layer)
        struct.order, struct.counts = self.at(stored.order), self.at(stored.counts)
        return ctypes.pointer(struct)

    def pointers(self, linears: list[Any]) -> Any:
        """An array of them."""
        array = (LAYER * len(linears))(*linears)
        self.kept.append(array)
        return array


def body_struct(
    body: Any, blocks: list[Any], parts: list[Parts], dtype: torch.dtype
) -> tuple[BodyStruct, list[Any], tuple[list[Tensor], list[Tensor]]] | None:
    """The structure, what it points into, and (float32 copies, biases): None if it cannot be."""
    fill, structs = _Filler(), (BlockStruct * len(blocks))()
    for struct, part in zip(structs, parts, strict=True):
        into, mlp, down = (
            [fill.linear(linear) for linear in linears]
            for linears in (part.into, part.mlp, part.down)
        )
        o = fill.linear(part.o)
        if None in (*into, o, *mlp, *down):
            return None
        weights = [None if norm is None else fill.at(norm.weight) for norm in part.norms]
        struct.norm, struct.q_norm, struct.k_norm, struct.mlp_norm = weights
        struct.in_count, struct.mlp_count = len(into), len(mlp) // len(down)
        struct.into[: len(into)], struct.o = into, o
        struct.mlp, struct.down = fill.pointers(mlp), fill.pointers(down)
        if part.router is not None:
            struct.experts, struct.chosen = len(down), part.router.top_k
            struct.normalised = getattr(part.router, "norm_topk_prob", True)
            struct.router = fill.at(part.router.weight)
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
