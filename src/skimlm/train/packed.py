"""A stored layer while it is trained: its codes stay packed, what they point at moves.

    tensors = moving(layer)               what can move, float32, by name
    product(x, layer, tensors)            x W^T, differentiable in x and in them
    stored(layer, tensors)                the layer with their values, rounded as a file has them

A weight is value[i, j] = book[i, code[i, j]], where the book of a row has all values that its
codes, or the windows of a trellis, can stand for. Only while one layer computes is its W there,
made from the packed codes and the books; the gradient of W is summed over the weights that share an
entry of a book.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skimlm import native
from skimlm.format.layer import Layer, stored_groups
from skimlm.format.pack import unpack_positions
from skimlm.format.row_codes import RowCode, code_bits
from skimlm.quantize.codes import unpack_codes, unpack_windows
from skimlm.quantize.fit import round_codebook
from skimlm.quantize.kmeans import lookup
from skimlm.quantize.trellis_fit import round_table
from skimlm.runtime.ops import add_adapter, dequantize

Tensors = Mapping[str, Tensor]


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
    """What can move of a layer, by width.

    The values [n, 2^b] of codebooks, scale included; the levels [128] of a trellis, and the scales
    [n] of its rows. Grids stand still: their rows are few, and as good as the original's. Nothing
    of a layer moves whose columns share scales in groups.
    """
    found = {}
    for rows in [] if layer.spec.group else rows_of(layer):
        scale = rows.stored["row_scale"].float()
        if rows.code.name == "table":
            found[rows.name("codebook")] = rows.stored["codebook"].float() * scale
        if rows.code.name == "trellis":
            found[rows.name("trellis")] = rows.stored["trellis"][0].float()
            found[rows.name("row_scale")] = scale[:, 0]
    return found


def stored(layer: Layer, tensors: Tensors) -> Layer:
    """The layer with these values: int8 levels times a bfloat16 scale per row."""
    new = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    for rows in rows_of(Layer(layer.spec, new)):
        if rows.name("codebook") in tensors:
            book = tensors[rows.name("codebook")]
            levels, scale = round_codebook(book, torch.full((len(book),), book.shape[1]))
            rows.stored["codebook"].copy_(levels)
            rows.stored["row_scale"].copy_(scale[:, None])
        if rows.name("trellis") in tensors:
            table, scale = tensors[rows.name("trellis")], tensors[rows.name("row_scale")]
            levels, scale = round_table(table, scale)
            rows.stored["trellis"][0].copy_(levels)
            rows.stored["row_scale"].copy_(scale[:, None])
    return Layer(layer.spec, new)


def product(x: Tensor, layer: Layer, tensors: Tensors) -> Tensor:
    """x [..., c] times the layer with these values: [..., r] in the dtype of x."""
    grid, scale = layer.spec.group is not None, layer.tensors.get("in_scale")
    scaled = x if grid or scale is None else x * scale.to(x.dtype)
    books = [] if grid else [_book(rows, tensors) for rows in rows_of(layer)]
    return add_adapter(_Product.apply(scaled, layer, *books), x, layer)


def _book(rows: Rows, tensors: Tensors) -> Tensor:
    """The values that codes, or windows, of these rows stand for, float32 [n, 2^b or 128]."""
    if rows.name("codebook") in tensors:
        return tensors[rows.name("codebook")]
    scale = rows.stored["row_scale"].float()
    if rows.code.name == "trellis":
        scale = tensors.get(rows.name("row_scale"), scale).view(-1, 1)
        return scale * tensors.get(rows.name("trellis"), rows.stored["trellis"][0].float())
    bits = code_bits(rows.width)
    every = torch.arange(2**bits, dtype=torch.uint8).expand(len(rows.index), -1)
    return rows.code.levels(every, bits, rows.stored) * scale


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
