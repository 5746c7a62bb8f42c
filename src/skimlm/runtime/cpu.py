"""The operations of ops.py on the CPU, in native code, for float32 and bfloat16.

Float32 and a few tokens in bfloat16 are multiplied in integers, exactly; more in bfloat16, weights
being turned into it in cache; many on torch's product, a tile of de-quantized rows at a time, where
the processor has no instructions for that or has AMX units, which torch knows how to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from skimlm import native
from skimlm.format.check import check_sizes
from skimlm.format.layer import Layer, LayerSpec
from skimlm.runtime.ops import add_adapter, check_devices, register, stored_order

FEW_TOKENS = 32  # from here on torch's product, unless `native.many`
FEW_TABLE = 256  # the same of a table times float32, with VBMI
FEW_SPARSE = 256  # the same of layers that are not plain, with VBMI (4096x4096: torch takes 240 ms)
TILE = 2**21  # weights de-quantized at a time for many tokens
DTYPES = (torch.float32, torch.bfloat16)
KNOWN_ROW_CODES = {"table", "affine", "grid", "trellis"}


def matmul(x: Tensor, layer: Layer, bias: Tensor | None, exact: bool) -> Any:
    """`ops.matmul`."""
    spec = layer.spec
    count = x.numel() // spec.cols
    known = spec.row_codes <= KNOWN_ROW_CODES
    if x.dtype not in DTYPES or not count or not known or native.missing():
        return NotImplemented
    if not _is_native(spec, count, x.dtype):
        out = torch.empty(*x.shape[:-1], spec.rows, dtype=x.dtype)
        check_devices([x, *layer.tensors.values(), bias])
        check_sizes(layer)
        _tiles(x.reshape(count, spec.cols), layer, bias, out.view(count, spec.rows))
        return add_adapter(out, x, layer)
    found = _product(x, [layer], bias, exact)
    if found is None:
        _refuse(layer)
    return found


def _product(x: Tensor, layers: Sequence[Layer], bias: Tensor | None, exact: int) -> Tensor | None:
    """Of layers side by side, `exact` as native code has it; None if their tensors do not fit."""
    rows = [layer.spec.rows for layer in layers]
    out = torch.empty(*x.shape[:-1], sum(rows), dtype=x.dtype)
    # in float32, to be added before the one rounding
    shifts = [None] * len(rows) if bias is None else bias.float().split(rows)
    return out if native.layer_matmul(x.contiguous(), layers, shifts, out, exact) else None


def _is_native(spec: LayerSpec, count: int, dtype: torch.dtype) -> bool:
    """Whether a product of `count` tokens is native; else it is torch's, a tile at a time."""
    if count < FEW_TOKENS:
        return True
    if spec.plain:
        return native.many(dtype)
    return count < FEW_SPARSE and bool(native.library().skimlm_has_vbmi())


def matmul_beside(x: Tensor, layers: Sequence[Layer], bias: Tensor | None) -> Any:
    """`ops.matmul_beside`."""
    count, specs = x.numel() // max(1, x.shape[-1]), [layer.spec for layer in layers]
    if x.dtype not in DTYPES or not count or native.missing():
        return NotImplemented
    for spec in specs:
        known = spec.row_codes <= KNOWN_ROW_CODES and spec.cols == x.shape[-1]
        if not known or not _is_native(spec, count, x.dtype):
            return NotImplemented
    out = _product(x, layers, bias, 1)
    return NotImplemented if out is None else out  # one by one it shows which does not fit


def matmul_alone(x: Tensor, layer: Layer, bias: Tensor | None) -> Any:
    """`ops.matmul_alone`."""
    if x.dtype not in DTYPES or not layer.spec.row_codes <= KNOWN_ROW_CODES or native.missing():
        return NotImplemented
    out = _product(x, [layer], bias, 2)
    return NotImplemented if out is None else out  # one by one it shows what does not fit


def matmul_each(x: Tensor, layers: Sequence[Layer]) -> Any:
    """`ops.matmul_each`."""
    first = layers[0].spec
    known = all(layer.spec.row_codes <= KNOWN_ROW_CODES for layer in layers)
    alike = all((s.rows, s.cols) == (first.rows, first.cols) for s in (x.spec for x in layers))
    fits = x.ndim == 2 and x.shape[1] == first.cols and len(x) in (1, len(layers))
    if x.dtype not in DTYPES or not known or not alike or not fits or native.missing():
        return NotImplemented
    out = torch.empty(len(layers), first.rows, dtype=x.dtype)
    done = native.layers_matmul(x.contiguous(), layers, out)
    return out if done else NotImplemented  # one by one it shows which does not fit


def dequantize(layer: Layer, dtype: torch.dtype) -> Any:
    """`ops.dequantize`."""
    known = layer.spec.row_codes <= KNOWN_ROW_CODES
    if dtype not in DTYPES or not known or native.missing():
        return NotImplemented
    out = torch.empty(layer.spec.rows, layer.spec.cols, dtype=dtype)
    _unpack(out, layer, 0, None)
    return out


def rows(layer: Layer, ids: Tensor, dtype: torch.dtype) -> Any:
    """`ops.rows`."""
    known = layer.spec.row_codes <= KNOWN_ROW_CODES
    if dtype not in DTYPES or not known or native.missing():
        return NotImplemented
    stored = stored_order(layer)
    out = torch.empty(*ids.shape, layer.spec.cols, dtype=dtype)
    places = stored.places_of(ids)
    if not native.layer_rows(out, layer, places, stored.order, stored.counts):
        _refuse(layer)
    return out


def table_matmul(x: Tensor, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None) -> Any:
    """`ops.table_matmul`."""
    return _table_matmul(x, codes, scale, bits, bias, False)


def _table_matmul(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None, exact: bool
) -> Any:
    cols, rows = x.shape[-1], len(scale)
    count = x.numel() // max(cols, 1)
    if not count or x.dtype not in DTYPES or native.missing():
        return NotImplemented
    if count >= FEW_TOKENS and not exact:
        most = FEW_TABLE if x.dtype == torch.float32 else count
        if count > most or not native.many(x.dtype):
            return NotImplemented
    want = (rows, cols if bits == 8 else -(-cols // 2))
    native.require("codes", codes, torch.int8 if bits == 8 else torch.uint8, want)
    native.require("scale", scale, torch.bfloat16, (rows,))
    out, bf16 = torch.empty(*x.shape[:-1], rows, dtype=x.dtype), int(x.dtype == torch.bfloat16)
    how = codes, bits, scale, out, count, rows, cols, int(exact)
    native.call("table_matmul", x.contiguous(), bf16, *how)
    return out if bias is None else out + bias


def table_matmul_alone(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None
) -> Any:
    """`ops.table_matmul_alone`: sums are exact."""
    return _table_matmul(x, codes, scale, bits, bias, True)


for _implementation in (
    matmul,
    matmul_alone,
    matmul_beside,
    matmul_each,
    dequantize,
    rows,
    table_matmul,
    table_matmul_alone,
):
    register(_implementation.__name__, "cpu", _implementation)


def _tiles(x: Tensor, layer: Layer, bias: Tensor | None, out: Tensor) -> None:
    """out = x W^T + bias in tiles of rows, which stay in cache: no dense weight is allocated."""
    cols, rows = x.shape[1], out.shape[1]
    order = torch.argsort(layer.tensors["widths"], stable=True)
    size = max(64, TILE // cols)
    scratch = torch.empty(min(size, rows), cols, dtype=x.dtype)
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        tile = scratch[: end - begin]
        _unpack(tile, layer, begin, end)
        place = order[begin:end]
        out[:, place] = F.linear(x, tile, None if bias is None else bias[place])


def _unpack(out: Tensor, layer: Layer, begin: int, end: int | None) -> None:
    """De-quantize all rows to their places in `out`, or stored rows begin..end to its start."""
    if not native.layer_unpack(out, layer, begin, end):
        _refuse(layer)


def _refuse(layer: Layer) -> NoReturn:
    """Raise what is wrong with tensors that native code does not take."""
    check_devices(layer.tensors.values())
    check_sizes(layer)
    raise ValueError(
        f"the tensors of a layer of {layer.spec.rows} rows must be contiguous and on the CPU"
    )
