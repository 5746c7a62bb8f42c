"""One table of operations: what can be done with a stored layer, and who does it on a device.

    matmul        x W^T + bias + (x A^T) B straight from the stored tensors
    matmul_beside the same for several layers of one x, side by side
    matmul_each   the same for a token and several layers, such as the experts it is sent to
    dequantize    W as a matrix
    rows          some rows of W, as an embedding looks them up
    table_matmul  the same product for an embedding's or a head's table

Each has a reference in torch that runs on any device, and may have an implementation per device:
`OPERATIONS[operation][device]`, to which `register` adds. An implementation returns NotImplemented
for what it does not do (a dtype, a row code); the reference then runs. `runtime/cpu.py` is native
code for the CPU.

`torch.compile` cannot look into native code: it sees `torch.ops.skimlm.<operation>`, whose
arguments follow from the declaration of a layer, and their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from skimlm.format.check import check_sizes
from skimlm.format.layer import NAMES, Layer, LayerSpec, stored_groups
from skimlm.format.pack import row_values, unpack_adapter, unpack_positions
from skimlm.format.row_codes import WIDTHS_END, code_bits
from skimlm.format.table import table_values

CHUNK = 2**22  # codes turned into float32 at a time: bounds the temporaries to about 60 MB

# ---- references in torch


def dequantize_reference(layer: Layer, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantize` in torch: for every width in use rows to codes to levels to values."""
    check_devices(layer.tensors.values())
    check_sizes(layer)
    spec = layer.spec
    out = torch.empty(spec.rows, spec.cols, dtype=dtype, device=layer.tensors["widths"].device)
    step = max(1, CHUNK // spec.cols)
    for width, index, views in stored_groups(layer):
        for at in (slice(i, i + step) for i in range(0, len(index), step)):
            some = {name: view[at] for name, view in views.items()}
            out[index[at]] = _values(layer, width, some).to(dtype)
    return out


def _values(layer: Layer, width: int, stored: Mapping[str, Tensor]) -> Tensor:
    """The values float32 [n, c] of rows of one width, whose stored tensors are given [n, k]."""
    spec = layer.spec
    codes, mask = spec.packing(width).unpack(stored["weight"], code_bits(width), spec.codes), None
    if spec.sparsity is not None:
        mask = unpack_positions(stored["positions"], spec.sparsity, spec.cols)
    in_scale = layer.tensors.get("in_scale")
    return row_values(spec, width, codes, stored, mask, stored["row_scale"], in_scale)


def rows_reference(layer: Layer, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`rows` in torch: for every width in use those of the rows asked for that have it."""
    check_devices([ids, *layer.tensors.values()])
    check_sizes(layer)
    places = stored_order(layer).places_of(ids)
    out = torch.empty(len(places), layer.spec.cols, dtype=dtype, device=places.device)
    first = 0
    for width, index, views in stored_groups(layer):
        here = ((places >= first) & (places < first + len(index))).nonzero().flatten()
        some = {name: view[places[here] - first] for name, view in views.items()}
        out[here] = _values(layer, width, some).to(dtype)
        first += len(index)
    return out.view(*ids.shape, layer.spec.cols)


def matmul_reference(x: Tensor, layer: Layer, bias: Tensor | None = None) -> Tensor:
    """`matmul` in torch, in the dtype of `x`: the whole weight is made, and forgotten."""
    check_devices([x, *layer.tensors.values(), bias])
    return add_adapter(F.linear(x, dequantize_reference(layer, x.dtype), bias), x, layer)


def matmul_beside_reference(x: Tensor, layers: Sequence[Layer], bias: Tensor | None) -> Tensor:
    """`matmul_beside` layer by layer."""
    parts = [None] * len(layers) if bias is None else bias.split([w.spec.rows for w in layers])
    return torch.cat([matmul(x, *each) for each in zip(layers, parts, strict=True)], -1)


def matmul_each_reference(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """`matmul_each` layer by layer."""
    rows = x.expand(len(layers), -1)
    return torch.stack([matmul(row, layer) for row, layer in zip(rows, layers, strict=True)])


def add_adapter(out: Tensor, x: Tensor, layer: Layer) -> Tensor:
    """out + (x A^T) B, in the dtype of `x`; `out` where the layer has no adapter."""
    adapter = unpack_adapter(layer)
    if adapter is None:
        return out
    return out + low_rank(x, *adapter.values())


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(x A^T) B of an adapter's factors [rank, c] and [rank, r], in the dtype of `x`."""
    return F.linear(x, a.to(x.dtype)) @ b.to(x.dtype)


def table_matmul_reference(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """`table_matmul` in torch."""
    return F.linear(x, table_values(codes, scale, x.shape[-1], x.dtype), bias)


def check_devices(tensors: Iterable[Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on one device."""
    there = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.device for tensor in there}) > 1:
        found = ", ".join(f"{list(t.shape)} on {t.device}" for t in there)
        raise ValueError(f"all tensors must be on one device, got {found}")


# ---- where a row is stored


@dataclass(frozen=True)
class StoredOrder:
    """What follows from the widths of a layer's rows."""

    order: Tensor  # int32 [r]: which row stands at a stored place
    places: Tensor  # int32 [r]: where a row stands
    counts: Tensor  # int64: how many rows have each width, from 0 on

    def places_of(self, ids: Tensor) -> Tensor:
        """Where the rows `ids` stand, int32 [n]; IndexError where there is none."""
        return self.places.index_select(0, ids.flatten())


# beside the tensors of widths, not on modules: nothing to be moved, copied or pickled
_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def stored_order(layer: Layer) -> StoredOrder:
    """The order in which the rows of a layer are stored, found once for its `widths`."""
    widths = layer.tensors.get("widths")
    if widths is not None:
        known = _orders.get(widths)
        if known is not None and known[0] == _state(widths):
            return known[1]
    check_devices(layer.tensors.values())
    check_sizes(layer)
    widths = layer.tensors["widths"]
    order = widths.argsort(stable=True).int()
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    found = StoredOrder(order, places, widths.long().bincount(minlength=WIDTHS_END))
    _orders[widths] = _state(widths), found
    return found


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor does; an inference tensor does not count its changes."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


# ---- operations

# operation -> device type -> implementation, with the arguments of the function of that name below
OPERATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "matmul": {},
    "matmul_alone": {},
    "matmul_beside": {},
    "matmul_each": {},
    "dequantize": {},
    "rows": {},
    "table_matmul": {},
    "table_matmul_alone": {},
}


def register(operation: str, device: str, implementation: Callable[..., Any]) -> None:
    """Let `implementation` do an operation on a type of device, such as "cuda"."""
    OPERATIONS[operation][device] = implementation


def matmul(x: Tensor, layer: Layer, bias: Tensor | None = None, exact: bool = True) -> Tensor:
    """`x` [..., c] times a layer: x W^T + bias + (x A^T) B, [..., r] in the dtype of `x`.

    On the CPU, for few tokens, a sum over the columns of one scale is exact after rounding `x` to
    2^-23 of its largest entry. Not `exact`: a layer without sparsity, grid and adapter may round
    `x` to int8 per token and 128 columns. Raises ValueError, a FormatError if the layer's tensors
    do not fit each other.
    """
    if x.shape[-1] != layer.spec.cols:
        raise ValueError(f"x must be [..., {layer.spec.cols}], got {list(x.shape)}")
    run = OPERATIONS["matmul"].get(x.device.type)
    out = NotImplemented if run is None else run(x, layer, bias, exact)
    return matmul_reference(x, layer, bias) if out is NotImplemented else out


def matmul_alone(x: Tensor, layer: Layer, bias: Tensor | None = None) -> Tensor:
    """`matmul`, each row of `x` [n, c] to the bit what it gives without the others: [n, r]."""
    run = OPERATIONS["matmul_alone"].get(x.device.type)
    out = NotImplemented if run is None else run(x, layer, bias)
    if out is not NotImplemented:
        return out
    return torch.cat([matmul(row, layer, bias) for row in x.split(1)])


def matmul_beside(x: Tensor, layers: Sequence[Layer], bias: Tensor | None = None) -> Tensor:
    """`x` [..., c] times several layers of c columns, side by side: [..., rows of all].

    `bias` is [rows of all]. Numbers and errors are those of `matmul`.
    """
    run = OPERATIONS["matmul_beside"].get(x.device.type)
    out = NotImplemented if run is None else run(x, layers, bias)
    return matmul_beside_reference(x, layers, bias) if out is NotImplemented else out


def matmul_each(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Row i of `x` [n, c], or its only row, times layer i of n: [n, r] in the dtype of `x`.

    All layers have c columns and the same number of rows. Numbers and errors are those of `matmul`.
    """
    if not layers:
        raise ValueError("layers: at least 1 is needed, got 0")
    run = OPERATIONS["matmul_each"].get(x.device.type)
    out = NotImplemented if run is None else run(x, layers)
    return matmul_each_reference(x, layers) if out is NotImplemented else out


def dequantize(layer: Layer, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [r, c] of a layer without its adapter, 0 where pruned.

    In float32, rounded once to `dtype`. The sizes of the tensors are checked at every call, their
    values when a model is loaded. Raises FormatError.
    """
    device = next((tensor.device.type for tensor in layer.tensors.values()), "cpu")
    run = OPERATIONS["dequantize"].get(device)
    out = NotImplemented if run is None else run(layer, dtype)
    return dequantize_reference(layer, dtype) if out is NotImplemented else out


def rows(layer: Layer, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` int64 [...] of the weight of a layer without its adapter, [..., c].

    The same numbers as in `dequantize(layer, dtype)`, for what these rows take. Raises FormatError,
    IndexError where there is no such row.
    """
    run = OPERATIONS["rows"].get(ids.device.type)
    out = NotImplemented if run is None else run(layer, ids, dtype)
    return rows_reference(layer, ids, dtype) if out is NotImplemented else out


def table_matmul(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """`x` [..., d] times a table of 8 or 4 bits (format/table.py) transposed, plus `bias`."""
    run = OPERATIONS["table_matmul"].get(x.device.type)
    out = NotImplemented if run is None else run(x, codes, scale, bits, bias)
    return table_matmul_reference(x, codes, scale, bits, bias) if out is NotImplemented else out


def table_matmul_alone(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """`table_matmul`, each row of `x` [n, d] to the bit what it gives without the others."""
    run = OPERATIONS["table_matmul_alone"].get(x.device.type)
    out = NotImplemented if run is None else run(x, codes, scale, bits, bias)
    if out is not NotImplemented:
        return out
    return torch.cat([table_matmul(row, codes, scale, bits, bias) for row in x.split(1)])


# ---- the same for torch.compile

_KINDS = {
    "int": "int",
    "bool": "bool",
    "str | None": "str?",
    "int | None": "int?",
    "Mapping[int, int]": "int[]",  # keys and values in turn
}
_NEEDED = ("weight", "widths", "row_scale")
# whether there is a tensor of that name needs no argument of its own
_FIELDS = tuple(field for field in fields(LayerSpec) if field.name not in NAMES)
_SPEC = tuple(field.name for field in _FIELDS)
_tensors = (f"Tensor{'' if name in _NEEDED else '?'} {name}" for name in NAMES)
_numbers = (f"{_KINDS[str(field.type)]} {field.name}" for field in _FIELDS)
_layer = ", ".join([*_tensors, *_numbers])
_library = torch.library.Library("skimlm", "DEF")
_library.define(f"matmul(Tensor x, Tensor? bias, bool exact, {_layer}) -> Tensor")
_library.define(f"dequantize(ScalarType dtype, {_layer}) -> Tensor")
_library.define(f"rows(Tensor ids, ScalarType dtype, {_layer}) -> Tensor")
_library.define(
    "table_matmul(Tensor x, Tensor codes, Tensor scale, int bits, Tensor? bias) -> Tensor"
)


def arguments(tensors: Mapping[str, Tensor | None], spec: LayerSpec) -> list[Any]:
    """A layer as the arguments of its operators."""
    values = [getattr(spec, name) for name in _SPEC]
    pairs = [[n for pair in v.items() for n in pair] if isinstance(v, dict) else v for v in values]
    return [*(tensors.get(name) for name in NAMES), *pairs]


def compiled_matmul(
    x: Tensor, tensors: Mapping[str, Tensor | None], spec: LayerSpec, bias: Tensor | None
) -> Tensor:
    """`matmul` as the operator that `torch.compile` sees."""
    return torch.ops.skimlm.matmul(x, bias, True, *arguments(tensors, spec))


def compiled_rows(
    tensors: Mapping[str, Tensor | None], spec: LayerSpec, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """`rows` as the operator that `torch.compile` sees."""
    return torch.ops.skimlm.rows(ids, dtype, *arguments(tensors, spec))


def _layer_of(args: Sequence[Any]) -> Layer:
    """Invert `arguments`."""
    tensors = {name: t for name, t in zip(NAMES, args, strict=False) if t is not None}
    values: dict[str, Any] = dict(zip(_SPEC, args[len(NAMES) :], strict=True))
    values |= {
        n: dict(zip(v[::2], v[1::2], strict=True)) for n, v in values.items() if type(v) is list
    }
    values |= {
        field.name: field.name in tensors for field in fields(LayerSpec) if field.name in NAMES
    }
    return Layer(LayerSpec(**values), tensors)


@torch.library.impl(_library, "matmul", "CompositeExplicitAutograd")
def _(x, bias, exact, *layer):
    return matmul(x, _layer_of(layer), bias, exact)


@torch.library.impl(_library, "dequantize", "CompositeExplicitAutograd")
def _(dtype, *layer):
    return dequantize(_layer_of(layer), dtype)


@torch.library.impl(_library, "rows", "CompositeExplicitAutograd")
def _(ids, dtype, *layer):
    return rows(_layer_of(layer), ids, dtype)


@torch.library.impl(_library, "table_matmul", "CompositeExplicitAutograd")
def _(x, codes, scale, bits, bias):
    return table_matmul(x, codes, scale, bits, bias)


@torch.library.impl(_library, "matmul", "Meta")
def _(x, bias, exact, *layer):
    return x.new_empty(*x.shape[:-1], _layer_of(layer).spec.rows)


@torch.library.impl(_library, "dequantize", "Meta")
def _(dtype, *args):
    layer = _layer_of(args)
    shape = layer.spec.rows, layer.spec.cols
    return layer.tensors["widths"].new_empty(shape, dtype=dtype)


@torch.library.impl(_library, "rows", "Meta")
def _(ids, dtype, *layer):
    return ids.new_empty(*ids.shape, _layer_of(layer).spec.cols, dtype=dtype)


@torch.library.impl(_library, "table_matmul", "Meta")
def _(x, codes, scale, bits, bias):
    return x.new_empty(*x.shape[:-1], scale.shape[0])
