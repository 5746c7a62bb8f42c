"""A stored layer while it is trained: its codes stay packed, what they point at moves.

    tensors = moving(layer)               what can move: levels, scales, factors of an adapter,
                                          float32, by name
    product(x, layer, tensors)            x W^T, differentiable in x and in them
    stored(layer, tensors)                the layer with their values, rounded as a file has them

A weight is value[i, j] = book[i, code[i, j]], where the book of a row has all values that its
codes, or the windows of a trellis, can stand for. Only while one layer computes is its W there,
made from the packed codes and the books; the gradient of W is summed over the weights that share an
entry of a book.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skimlm import native
from skimlm.format.layer import Layer, stored_groups
from skimlm.format.pack import pack_adapter, unpack_adapter, unpack_positions
from skimlm.format.row_codes import RowCode, code_bits
from skimlm.quantize.codes import unpack_codes, unpack_windows
from skimlm.quantize.kmeans import lookup
from skimlm.runtime.ops import dequantize, low_rank
from skimlm.train.straight_through import factor_codes, rounded_factor, straight_through

Tensors = Mapping[str, Tensor]
ROW_SCALE = "row_scale"
FACTORS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Rows:
    """The rows of one width of a layer."""

    width: int
    code: RowCode
    index: Tensor  # which rows of the layer they are [n]
    stored: Mapping[str, Tensor]  # views [n, k] of their stored tensors

    def name(self, tensor: str) -> str:
        """The name under which a tensor of these rows moves."""
        return f"{tensor}.{self.width}"


def rows_of(layer: Layer) -> list[Rows]:
    """The rows of a layer by their widths."""
    found = []
    for width, index, views in stored_groups(layer):
        code = layer.spec.code_of(width)
        assert code is not None
        found.append(Rows(width, code, index, views))
    return found


def moving(layer: Layer) -> dict[str, Tensor]:
    """What can move of a layer: by width the scales [n] of its rows, and levels; its adapter.

    Levels are those of codebooks [n, 2^b], or of a trellis [128], factors [rank, c] and [rank, r].
    Where columns share scales in groups only the adapter moves.
    """
    adapter = unpack_adapter(layer)
    found = {} if adapter is None else dict(zip(FACTORS, adapter.values(), strict=True))
    for rows in [] if layer.spec.group else rows_of(layer):
        found[rows.name(ROW_SCALE)] = rows.stored["row_scale"][:, 0].float()
        if rows.code.name == "table":
            found[rows.name("codebook")] = rows.stored["codebook"].float()
        if rows.code.name == "trellis":
            found[rows.name("trellis")] = rows.stored["trellis"][0].float()
    return found


def stored(layer: Layer, tensors: Tensors) -> Layer:
    """The layer with these values: levels rounded to int8, scales to bfloat16."""
    new = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    for rows in rows_of(Layer(layer.spec, new)):
        for name, place in rows.stored.items():
            if rows.name(name) in tensors:
                value = tensors[rows.name(name)]
                if name == ROW_SCALE:
                    place.copy_(value[:, None])
                else:
                    (place[0] if value.dim() == 1 else place).copy_(_level(value))
    adapter = unpack_adapter(layer)
    if adapter is not None and FACTORS[0] in tensors:
        scales = adapter.a_scale, adapter.b_scale
        a, b = (factor_codes(tensors[n], s) for n, s in zip(FACTORS, scales, strict=True))
        new |= pack_adapter(replace(adapter, a=a, b=b))
    return Layer(layer.spec, new)


def product(x: Tensor, layer: Layer, tensors: Tensors) -> Tensor:
    """x [..., c] times the layer with these values: [..., r] in the dtype of x."""
    grid, scale = layer.spec.group is not None, layer.tensors.get("in_scale")
    scaled = x if grid or scale is None else x * scale.to(x.dtype)
    books = [] if grid else [_book(rows, tensors) for rows in rows_of(layer)]
    out = _Product.apply(scaled, layer, *books)
    adapter = unpack_adapter(layer)
    if adapter is None:
        return out
    a, b = adapter.values()
    if FACTORS[0] in tensors:
        scales = adapter.a_scale, adapter.b_scale
        a, b = (rounded_factor(tensors[n], s) for n, s in zip(FACTORS, scales, strict=True))
    return out + low_rank(x, a, b)


def _book(rows: Rows, tensors: Tensors) -> Tensor:
    """The values that codes, or windows, of these rows stand for, float32 [n, 2^b or 128].

    As a file will hold them: what moves is rounded here, and its gradient is passed on.
    """
    scale = rows.stored["row_scale"].float()
    if (own := tensors.get(rows.name(ROW_SCALE))) is not None:
        scale = straight_through(own, lambda x: x.bfloat16().float()).unsqueeze(1)
    if rows.code.name == "affine":
        every = torch.arange(2 ** code_bits(rows.width), dtype=torch.uint8)
        every = every.expand(len(rows.index), -1)
        return rows.code.levels(every, code_bits(rows.width), rows.stored) * scale
    name = "codebook" if rows.code.name == "table" else "trellis"
    levels = rows.stored[name][: 1 if name == "trellis" else None].float()
    if (own := tensors.get(rows.name(name))) is not None:
        levels = straight_through(own, _level)
    return levels * scale


def _level(x: Tensor) -> Tensor:
    """Levels as int8 holds them."""
    return x.round().clamp(-127, 127)


def _codes(layer: Layer, rows: Rows, entries: int) -> Tensor:
    """Which of the `entries` of its row each weight is, uint8 [n, c]; `entries` where pruned."""
    spec, bits = layer.spec, code_bits(rows.width)
    unpack = unpack_windows if rows.code.name == "trellis" else unpack_codes
    codes = unpack(rows.stored["weight"], bits, spec.codes)
    if spec.sparsity is None:
        return codes
    mask = unpack_positions(rows.stored["positions"], spec.sparsity, spec.cols)
    return torch.full_like(mask, entries, dtype=torch.uint8).masked_scatter_(mask, codes)


def _each(layer: Layer, books: tuple[Tensor, ...]) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """(rows, their codes, their book with a 0 for what is pruned), by width."""
    for rows, book in zip(rows_of(layer), books, strict=True):
        codes = _codes(layer, rows, book.shape[1])
        if layer.spec.sparsity is not None:
            book = torch.nn.functional.pad(book, (0, 1))
        yield rows, codes, book.contiguous()


def _weight(layer: Layer, books: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """W [r, c], each value rounded once to `dtype`; without `in_scale` unless it is on a grid."""
    if not books:
        return dequantize(layer.without_adapter(), dtype)
    w = torch.empty(layer.spec.rows, layer.spec.cols, dtype=dtype)
    for rows, codes, book in _each(layer, books):
        values = lookup(codes, book) if dtype == torch.bfloat16 else book.gather(1, codes.long())
        w[rows.index] = values.to(dtype)
    return w


def _summed(full: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Sums float32 [n, entries] of a gradient [n, c] over weights of a row that share a code."""
    out = torch.zeros(len(codes), entries)
    if full.dtype == torch.bfloat16 and not native.missing():
        native.call("reduce_bf16", codes, full.contiguous(), out, *codes.shape, entries)
        return out
    return out.scatter_add_(1, codes.long(), full.float())


class _Product(torch.autograd.Function):
    """x W^T by the books of the rows of each width, in order; W is made again for the gradient."""

    @staticmethod
    def forward(ctx, x, layer, *books):
        ctx.save_for_backward(x, *books)
        ctx.layer = layer
        return x @ _weight(layer, books, x.dtype).T

    @staticmethod
    def backward(ctx, gradient):
        x, *books = ctx.saved_tensors
        layer, wanted = ctx.layer, ctx.needs_input_grad[2:]
        w = _weight(layer, tuple(books), x.dtype)
        r, c = w.shape
        sums: list[Tensor | None] = [None] * len(books)
        if any(wanted):
            full = gradient.reshape(-1, r).T @ x.reshape(-1, c)
            for k, (rows, codes, book) in enumerate(_each(layer, tuple(books))):
                if wanted[k]:
                    part = _summed(full[rows.index], codes, book.shape[1])
                    sums[k] = part[:, : books[k].shape[1]]
        return gradient @ w, None, *sums
