"""The structs that native code reads; their sizes are checked when a library is loaded."""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from skimlm.format.abi import SPARSITY, LayerStruct
from skimlm.format.layer import TENSORS, Layer, LayerSpec

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64
LAYER = ctypes.POINTER(LayerStruct)


class BlockStruct(ctypes.Structure):
    """`SkimlmBlock` of native/kernels.h."""

    _fields_ = [
        *[(n, SIZE) for n in ("in_count", "mlp_count", "experts", "chosen", "normalised")],
        *[(n, POINTER) for n in ("norm", "q_norm", "k_norm", "mlp_norm", "router")],
        ("into", LAYER * 3),
        ("o", LAYER),
        ("mlp", ctypes.POINTER(LAYER)),
        ("down", ctypes.POINTER(LAYER)),
    ]


class BodyStruct(ctypes.Structure):
    """`SkimlmBody` of native/kernels.h."""

    _fields_ = [
        *[(n, SIZE) for n in ("bf16", "width", "heads", "kv_heads", "head_dim", "count")],
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("norm", POINTER),
        ("blocks", ctypes.POINTER(BlockStruct)),
    ]


class PrefixStruct(ctypes.Structure):
    """`SkimlmPrefix` of native/kernels.h."""

    _fields_ = [*[(n, POINTER) for n in ("keys", "values", "bias")], ("length", SIZE)]


class SequenceStruct(ctypes.Structure):
    """`SkimlmSequence` of native/kernels.h."""

    _fields_ = [
        ("places", POINTER),
        *[(n, SIZE) for n in ("capacity", "length")],
        ("prefix", POINTER),
    ]


# as `skimlm_abi` counts them
STRUCTS = {
    "SkimlmLayer": LayerStruct,
    "SkimlmBlock": BlockStruct,
    "SkimlmBody": BodyStruct,
    "SkimlmPrefix": PrefixStruct,
    "SkimlmSequence": SequenceStruct,
}
# every member of a LayerStruct has eight bytes: to fill it field by field takes microseconds more
_MEMBERS = struct.Struct(f"={len(LayerStruct._fields_)}q")
_BIAS, _ORDER = LayerStruct.bias.offset, LayerStruct.order.offset
_NEEDED = ("weight", "widths", "row_scale")


@functools.cache
def _stored(adapter_bits: int, grid: bool) -> tuple[tuple[str, torch.dtype, int], ...]:
    """Name, dtype and number of dimensions of every tensor that such layers may have."""
    spec = LayerSpec(1, 1, {1: 1}, group=1 if grid else None, rank=1, adapter_bits=adapter_bits)
    return tuple((t.name, t.dtype_in(spec), len(t.shape(spec))) for t in TENSORS)


# beside the layers, not on them: pointers can be neither copied nor pickled
_known: WeakKeyDictionary[Layer, tuple[list[int], bytes]] = WeakKeyDictionary()


def layer_struct(layer: Layer, bias: Tensor | None) -> bytes | None:
    """A `LayerStruct` as its bytes, with pointers into the tensors; None if they cannot be that.

    Types and layout are checked here, sizes in native code, where it costs microseconds less.
    `bias` is float32 [rows]. All but the bias stays as it is while the tensors stay where they are.
    """
    places = [tensor.data_ptr() for tensor in layer.tensors.values()]
    known = _known.get(layer)
    fields = known[1] if known is not None and known[0] == places else _fields(layer)
    if fields is None:
        return None
    if known is None or known[1] is not fields:
        _known[layer] = places, fields
    if bias is None:
        return fields
    if bias.dtype != torch.float32 or not bias.is_cpu or bias.shape != (layer.spec.rows,):
        return None
    if not bias.is_contiguous():
        return None
    return fields[:_BIAS] + bias.data_ptr().to_bytes(8, sys.byteorder) + fields[_BIAS + 8 :]


def with_order(fields: bytes, order: Tensor, counts: Tensor) -> bytes:
    """A `LayerStruct` as bytes that also points to what follows from `widths`.

    `order` int32 [rows] says which row stands at a stored place, `counts` int64 how many rows have
    each width, 0 first.
    """
    pointers = (tensor.data_ptr().to_bytes(8, sys.byteorder) for tensor in (order, counts))
    return fields[:_ORDER] + b"".join(pointers)


def _fields(layer: Layer) -> bytes | None:
    """`layer_struct` without a bias, made anew."""
    spec, tensors = layer.spec, layer.tensors
    if spec.in_scale != ("in_scale" in tensors):  # what its size cannot tell
        return None
    at: list[int] = []
    sizes: list[int] = []
    for name, dtype, dims in _stored(spec.adapter_bits, spec.group is not None):
        tensor = tensors.get(name)
        if tensor is None:
            if name in _NEEDED:
                return None
            at.append(0)
            sizes.append(0)
            continue
        kind = tensor.dtype == dtype and tensor.dim() == dims
        if not kind or not tensor.is_cpu or not tensor.is_contiguous():
            return None
        size = tensor.numel()
        if not size:  # what a layer does not have is not stored
            return None
        at.append(tensor.data_ptr())
        sizes.append(size)
    how = SPARSITY.get(spec.sparsity, -1), spec.kept, spec.group or 0, spec.rank, spec.adapter_bits
    try:
        return _MEMBERS.pack(*at, *sizes, 0, spec.rows, spec.cols, *how, 0, 0)
    except struct.error:  # a number of more than 64 bits
        return None
