"""The operations of a compressed linear: a readable torch version, and the native one beside it.

    dequantize_packed   the stored buffers (see `format/pack.py`) as a matrix
    linear_packed       x W^T + bias straight from the stored buffers: they are read once
    dequantize_parts, linear_parts   the same for weights with parts

Native code does it on the CPU for float32 and bfloat16: one token in integers, exactly; several in
bfloat16 pieces, weights being turned into bfloat16 in cache; many on torch's product, a tile of
de-quantized rows at a time, where the processor has no instructions for that or has AMX units,
which torch knows how to use. Elsewhere, and as its oracle, torch: for every width in use, cut the
rows' bytes into codes, look the codes up, scale the rows, and put them back in the model's order.
`torch.ops.skimlm.linear` is the same for `torch.compile`.

Sparse rows, grids and adapters (`Parts`) go through `linear_parts`: native for few tokens, torch's
product for more, a tile of de-quantized rows at a time. `torch.ops.skimlm.sparse_linear` is its
operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from skimlm import native
from skimlm.format.pack import (
    PLAIN,
    Parts,
    check_sizes,
    factor_values,
    spread,
    stored_groups,
    unpack_codes,
    unpack_nibbles,
    unpack_positions,
)

CHUNK = 2**22  # codes turned into float32 at a time: bounds the temporaries to about 60 MB
FEW_TOKENS = 32  # from here on torch's product, unless `native.many`
FEW_SPARSE = 256  # the same where weights have parts, with VBMI (4096x4096: torch takes 240 ms)
TILE = 2**21  # weights de-quantized at a time for many tokens
NATIVE = (torch.float32, torch.bfloat16)
# as they are stored: weight, widths, codebook, row_scale, row_zero, in_scale
Buffers: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


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
    buffers = (weight, widths, codebook, row_scale, row_zero, in_scale)
    _check_devices(*buffers)
    check_sizes(_present(*buffers), len(widths), cols)
    if weight.device.type != "cpu" or dtype not in NATIVE:
        return dequantize_reference(*buffers, cols, dtype)
    out = torch.empty(len(widths), cols, dtype=dtype)
    _unpack(out, buffers, 0, None)
    return out


def _unpack(out: Tensor, buffers: Buffers, begin: int, end: int | None) -> None:
    """De-quantize all rows to their places in `out`, or stored rows begin..end to its start."""
    rows, cols, bf16 = len(buffers[1]), out.shape[1], int(out.dtype == torch.bfloat16)
    last, stored = (rows, 0) if end is None else (end, 1)
    native.call("unpack", *buffers, out, bf16, rows, cols, begin, last, stored)


def linear_packed(
    x: Tensor,
    weight: Tensor,
    widths: Tensor,
    codebook: Tensor | None,
    row_scale: Tensor,
    row_zero: Tensor | None,
    in_scale: Tensor | None,
    bias: Tensor | None,
    exact: bool = True,
) -> Tensor:
    """`x` [..., c] times the stored weight [r, c] transposed, plus `bias`: [..., r], dtype of `x`.

    A single token is summed exactly, after rounding `x` to 2^-23 of its largest entry (not at all
    for nearly all of a bfloat16 `x`); several in float32. Not `exact`: `x` is rounded to int8 per
    token and 128 columns (native, few tokens). Raises FormatError if buffers do not fit each other.
    """
    cols, rows = x.shape[-1], len(widths)
    count = x.numel() // max(cols, 1)
    buffers = (weight, widths, codebook, row_scale, row_zero, in_scale)
    if x.device.type != "cpu" or x.dtype not in NATIVE or not count:
        _check_devices(x, *buffers, bias)
        return F.linear(x, dequantize_packed(*buffers, cols, x.dtype), bias)
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    if count >= FEW_TOKENS and not native.many(x.dtype):
        _check_devices(x, *buffers, bias)
        check_sizes(_present(*buffers), rows, cols)
        unpack = functools.partial(_unpack, buffers=buffers)
        _tiles(x.reshape(count, cols), widths, unpack, bias, out.view(count, rows))
        return out
    shift = None if bias is None else bias.float()  # added before the one rounding
    if not native.matmul(x.contiguous(), *buffers, shift, out, count, rows, cols, exact):
        check_sizes(_present(*buffers), rows, cols)
        raise ValueError(
            f"buffers of {rows} rows must be contiguous, on the CPU, and fit {cols} columns"
        )
    return out


def _tiles(
    x: Tensor,
    widths: Tensor,
    unpack: Callable[..., None],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """out = x W^T + bias in tiles of rows, which stay in cache: no dense weight is allocated.

    `unpack(tile, begin=, end=)` de-quantizes stored rows.
    """
    cols, rows = x.shape[1], out.shape[1]
    order = torch.argsort(widths, stable=True)
    size = max(64, TILE // cols)
    scratch = torch.empty(min(size, rows), cols, dtype=x.dtype)
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        tile = scratch[: end - begin]
        unpack(tile, begin=begin, end=end)
        place = order[begin:end]
        out[:, place] = F.linear(x, tile, None if bias is None else bias[place])


def linear_reference(
    x: Tensor,
    weight: Tensor,
    widths: Tensor,
    codebook: Tensor | None,
    row_scale: Tensor,
    row_zero: Tensor | None,
    in_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The same in torch: de-quantized to float32, multiplied in float32, rounded at the end."""
    stored = _present(weight, widths, codebook, row_scale, row_zero, in_scale)
    return parts_reference(x, stored, PLAIN, bias)


def table_packed(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`x` [..., d] times a table of 8 or 4 bits transposed (runtime/linear.py), few tokens, CPU."""
    cols, rows = x.shape[-1], len(scale)
    want = (rows, cols if bits == 8 else -(-cols // 2))
    native.require("codes", codes, torch.int8 if bits == 8 else torch.uint8, want)
    native.require("scale", scale, torch.bfloat16, (rows,))
    if x.dtype not in NATIVE:
        raise ValueError(f"x must be float32 or bfloat16, got {x.dtype}")
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    bf16, count = int(x.dtype == torch.bfloat16), x.numel() // max(cols, 1)
    if not count:
        return out
    native.call("table_matmul", x.contiguous(), bf16, codes, bits, scale, out, count, rows, cols)
    return out


# torch.compile cannot look into native code: it sees one operator, and its shape from the fake
_library = torch.library.Library("skimlm", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor widths, Tensor? codebook, Tensor row_scale, "
    "Tensor? row_zero, Tensor? in_scale, Tensor? bias, bool exact) -> Tensor"
)
_SPARSE_NAMES = (
    *("weight", "widths", "codebook", "row_scale", "row_zero", "in_scale", "positions"),
    *("lora_a", "lora_b", "lora_a_scale", "lora_b_scale"),
)
_library.define(
    "sparse_linear(Tensor x, Tensor weight, Tensor widths, Tensor? codebook, Tensor row_scale, "
    "Tensor? row_zero, Tensor? in_scale, Tensor? positions, Tensor? lora_a, Tensor? lora_b, "
    "Tensor? lora_a_scale, Tensor? lora_b_scale, Tensor? bias, str? sparsity, int kept, "
    "int? group, int rank, int adapter_bits) -> Tensor"
)
_library.define("table(Tensor x, Tensor codes, Tensor scale, int bits) -> Tensor")
_library.impl("linear", linear_packed, "CompositeExplicitAutograd")
_library.impl("table", table_packed, "CompositeExplicitAutograd")


def sparse_linear(
    x: Tensor, stored: Mapping[str, Tensor], parts: Parts, bias: Tensor | None
) -> Any:
    """`linear_parts` as the operator that `torch.compile` sees."""
    tensors = (stored.get(name) for name in _SPARSE_NAMES)
    return torch.ops.skimlm.sparse_linear(x, *tensors, bias, *astuple(parts))


@torch.library.impl(_library, "sparse_linear", "CompositeExplicitAutograd")
def _(x, *args):
    *tensors, bias, sparsity, kept, group, rank, adapter_bits = args
    named = zip(_SPARSE_NAMES, tensors, strict=True)
    stored = {name: tensor for name, tensor in named if tensor is not None}
    return linear_parts(x, stored, Parts(sparsity, kept, group, rank, adapter_bits), bias)


@torch.library.register_fake("skimlm::sparse_linear", lib=_library)
def _(x, weight, widths, *rest):
    return x.new_empty(*x.shape[:-1], widths.shape[0])


@torch.library.register_fake("skimlm::linear", lib=_library)
def _(x, weight, widths, codebook, row_scale, row_zero, in_scale, bias, exact):
    return x.new_empty(*x.shape[:-1], widths.shape[0])


@torch.library.register_fake("skimlm::table", lib=_library)
def _(x, codes, scale, bits):
    return x.new_empty(*x.shape[:-1], scale.shape[0])


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
    return dequantize_stored(stored, cols, PLAIN, dtype)


def dequantize_parts(
    stored: Mapping[str, Tensor], cols: int, parts: Parts, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight [r, c] in stored tensors of any kind, without its adapter; 0 where pruned.

    In float32, rounded once to `dtype`. Raises FormatError if the tensors do not fit each other.
    """
    rows = len(stored["widths"])
    if stored["weight"].device.type != "cpu" or dtype not in NATIVE:
        check_sizes(stored, rows, cols, parts)
        return dequantize_stored(stored, cols, parts, dtype)
    out = torch.empty(rows, cols, dtype=dtype)
    _unpack_parts(out, stored, parts, 0, None)
    return out


def dequantize_stored(
    stored: Mapping[str, Tensor], cols: int, parts: Parts, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same in torch, on any device."""
    out = torch.empty(len(stored["widths"]), cols, dtype=dtype, device=stored["weight"].device)
    in_scale = stored.get("in_scale")
    step = max(1, CHUNK // cols)
    for width, index, part in stored_groups(stored, cols, parts):
        for at in (slice(i, i + step) for i in range(0, len(index), step)):
            codes = unpack_codes(part["weight"][at], width, parts.codes(cols))
            if "codebook" in part:
                level = part["codebook"][at].float().gather(1, codes.long())
            elif "row_zero" in part:
                level = codes.float() - part["row_zero"][at].float().unsqueeze(1)
            else:
                level = codes.float() - 2 ** (width - 1)
            if parts.sparsity is not None:
                mask = unpack_positions(part["positions"][at], parts.sparsity, cols)
                level = level.new_zeros(mask.shape).masked_scatter_(mask, level)
            if parts.group is None:
                scale = part["row_scale"][at].float().unsqueeze(1)
            else:
                scale = spread(part["row_scale"][at], parts.group, cols)
            value = level * scale
            out[index[at]] = (value if in_scale is None else value * in_scale.float()).to(dtype)
    return out


def adapter_stored(stored: Mapping[str, Tensor], rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """A [rank, c] and B [rank, r] of a stored adapter of 4 or 16 bits, float32."""
    a, b = stored["lora_a"], stored["lora_b"]
    if a.dtype == torch.uint8:
        a, b = unpack_nibbles(a, cols), unpack_nibbles(b, rows)
    return (
        factor_values(a, stored.get("lora_a_scale")),
        factor_values(b, stored.get("lora_b_scale")),
    )


def linear_parts(
    x: Tensor, stored: Mapping[str, Tensor], parts: Parts, bias: Tensor | None
) -> Tensor:
    """`x` [..., c] times the weight in stored tensors of any kind, its adapter included: [..., r].

    x W^T + (x A^T) B + bias in the dtype of `x`. Native, for few tokens, a sum over the columns of
    one scale is exact after rounding `x` to 2^-23 of its largest entry. Raises FormatError if the
    tensors do not fit each other.
    """
    cols, rows = x.shape[-1], len(stored["widths"])
    count = x.numel() // max(cols, 1)
    vbmi = count >= FEW_TOKENS and native.library().skimlm_has_vbmi()
    few = 0 < count < (FEW_SPARSE if vbmi else FEW_TOKENS)
    if x.device.type != "cpu" or x.dtype not in NATIVE or not few:
        out = _many_parts(x.reshape(count, cols), stored, parts, bias).view(*x.shape[:-1], rows)
        if not parts.rank:
            return out
        a, b = adapter_stored(stored, rows, cols)
        return out + F.linear(x, a.to(x.dtype)) @ b.to(x.dtype)
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    shift = None if bias is None else bias.float()
    how = astuple(parts)
    if not native.sparse_matmul(x.contiguous(), stored, shift, out, count, rows, cols, *how):
        _refuse(stored, rows, cols, parts)
    return out


def _many_parts(
    x: Tensor, stored: Mapping[str, Tensor], parts: Parts, bias: Tensor | None
) -> Tensor:
    """x W^T + bias without the adapter, on torch's product: [n, r]."""
    cols, rows = x.shape[1], len(stored["widths"])
    if x.device.type != "cpu" or x.dtype not in NATIVE:
        return F.linear(x, dequantize_stored(stored, cols, parts, x.dtype), bias)
    check_sizes(stored, rows, cols, parts)
    out = torch.empty(len(x), rows, dtype=x.dtype)
    unpack = functools.partial(_unpack_parts, stored=stored, parts=parts)
    _tiles(x, stored["widths"], unpack, bias, out)
    return out


def _unpack_parts(
    out: Tensor, stored: Mapping[str, Tensor], parts: Parts, begin: int, end: int | None
) -> None:
    """`_unpack` for a weight with parts; its adapter is left out."""
    rows, cols = len(stored["widths"]), out.shape[1]
    if not native.sparse_unpack(stored, out, rows, cols, begin, end, *astuple(parts)):
        _refuse(stored, rows, cols, parts)


def _refuse(stored: Mapping[str, Tensor], rows: int, cols: int, parts: Parts) -> NoReturn:
    """Raise what is wrong with tensors that native code does not take."""
    check_sizes(stored, rows, cols, parts)
    raise ValueError(
        f"tensors of {rows} rows must be contiguous, on the CPU, and fit {cols} columns"
    )


def parts_reference(
    x: Tensor, stored: Mapping[str, Tensor], parts: Parts, bias: Tensor | None
) -> Tensor:
    """x W^T + (x A^T) B + bias from stored tensors of any kind, in float32, rounded at the end."""
    cols, rows = x.shape[-1], len(stored["widths"])
    out = F.linear(x.float(), dequantize_stored(stored, cols, parts))
    if parts.rank:
        a, b = adapter_stored(stored, rows, cols)
        out = out + F.linear(x.float(), a) @ b
    out = out.to(x.dtype)
    return out if bias is None else out + bias


def _check_devices(*tensors: Tensor | None) -> None:
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        found = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors if t is not None)
        raise ValueError(f"all tensors must be on one device, got {found}")


def _present(*buffers: Tensor | None) -> dict[str, Tensor]:
    """The stored tensors by name, those a linear does not have left out."""
    names = ("weight", "widths", "codebook", "row_scale", "row_zero", "in_scale")
    return {n: t for n, t in zip(names, buffers, strict=True) if t is not None}
