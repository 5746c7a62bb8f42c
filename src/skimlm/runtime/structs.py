"""A body as native code sees it: the structures of native/decode.cpp, filled."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from skimlm import native
from skimlm.runtime.linear import CompressedLinear

SIZED = ("weight", "codebook", "row_zero")
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


class _Packed(ctypes.Structure):
    """`Packed` of native/product.h."""

    _fields_ = [
        *[(n, POINTER) for n in ("codes", "widths", "levels", "row_scale", "zeros", "in_scale")],
        ("bias", POINTER),
        *[(n, SIZE) for n in ("codes_size", "levels_size", "zeros_size", "r", "c")],
        ("order", POINTER),
        ("counts", POINTER),
    ]


class _Linear(ctypes.Structure):
    """`SkimlmLinear` of native/decode.cpp."""

    _fields_ = [
        ("packed", ctypes.POINTER(_Packed)),
        ("sparse", ctypes.POINTER(native.Sparse)),
    ]


class _Block(ctypes.Structure):
    """`SkimlmBlock` of native/decode.cpp."""

    _fields_ = [
        ("in_count", SIZE),
        ("mlp_count", SIZE),
        *[(n, POINTER) for n in ("norm", "q_norm", "k_norm", "mlp_norm")],
        ("into", _Linear * 3),
        ("o", _Linear),
        ("mlp", _Linear * 2),
        ("down", _Linear),
    ]


class Body(ctypes.Structure):
    """`SkimlmBody` of native/decode.cpp."""

    _fields_ = [
        *[(n, SIZE) for n in ("bf16", "width", "heads", "kv_heads", "head_dim", "count")],
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("norm", POINTER),
        ("blocks", ctypes.POINTER(_Block)),
    ]


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

    def linear(self, linear: CompressedLinear) -> _Linear | None:
        """None if its tensors do not fit each other."""
        stored, bias = linear._buffers, self.bias(linear)
        widths = linear.widths
        order = torch.argsort(widths, stable=True).int()
        rows = self.at(order), self.at(torch.bincount(widths.long(), minlength=9))
        spec = linear.spec
        if spec.version == 1:
            at = [self.at(stored[n]) for n in ("weight", "widths", "codebook", "row_scale")]
            at += [self.at(stored["row_zero"]), None, self.at(bias)]
            sizes = [0 if (t := stored[n]) is None else t.numel() for n in SIZED]
            return _Linear(packed=ctypes.pointer(_Packed(*at, *sizes, spec.rows, spec.cols, *rows)))
        for tensor in (*stored.values(), bias):
            self.at(tensor)
        how = spec.sparsity, spec.kept, spec.group, spec.rank, spec.adapter_bits
        sparse = native.sparse(stored, bias, spec.rows, spec.cols, *how)
        if sparse is None:
            return None
        sparse.order, sparse.counts = rows
        return _Linear(sparse=ctypes.pointer(sparse))


def body_struct(
    body: Any, blocks: list[Any], parts: list[tuple[list[Any], list[Any]]], dtype: torch.dtype
) -> tuple[Body, list[Any], tuple[list[Tensor], list[Tensor]]] | None:
    """The structure, what it points into, and (float32 copies, biases): None if it cannot be."""
    fill, structs = _Filler(), (_Block * len(blocks))()
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
    struct = Body(
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
