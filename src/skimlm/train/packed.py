"""A stored layer while it is trained: its codes stay packed, what they point at moves.

    tensors = moving(layer)               what can move, float32, by name
    product(x, layer, tensors)            x W^T, differentiable in x and in them
    stored(layer, tensors)                the layer with their values, rounded as a file has them

A weight is value[i, j] = book[i, code[i, j]], where the book of a row has all 2^b values that its
codes can stand for. Only while one layer computes is its W there, made from the packed codes and
the books; the gradient of W is summed over the weights that share an entry of a book.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skimlm import native
from skimlm.format.layer import Layer, stored_groups
from skimlm.format.pack import unpack_codes, unpack_positions
from skimlm.quantize.fit import round_codebook
from skimlm.quantize.kmeans import lookup
from skimlm.runtime.ops import add_adapter, dequantize

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """The rows of one width of a layer."""

    width: int
    index: Tensor  # which rows of the layer they are [n]
    stored: Mapping[str, Tensor]  # views [n, k] of their stored tensors

    @property
    def codebook(self) -> str:
        """The name under which their codebooks move."""
        return f"codebook.{self.width}"


def rows_of(layer: Layer) -> list[Rows]:
    """The rows of a layer by their widths."""
    return [Rows(*group) for group in stored_groups(layer)]


def moving(layer: Layer) -> dict[str, Tensor]:
    """What can move of a layer: the values [n, 2^b] of codebooks, scale included, by width.

    Grids stand still: their rows are few, and as good as the original's. Nothing of a layer moves
    whose columns share scales in groups.
    """
    if layer.spec.group is not None:
        return {}
    found = {}
    for rows in rows_of(layer):
        if _code(layer, rows.width) == "table":
            levels, scale = rows.stored["codebook"].float(), rows.stored["row_scale"].float()
            found[rows.codebook] = levels * scale
    return found


def stored(layer: Layer, tensors: Tensors) -> Layer:
    """The layer with these codebooks, as int8 levels times a bfloat16 scale per row."""
    new = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    for rows in rows_of(Layer(layer.spec, new)):
        if rows.codebook in tensors:
            book = tensors[rows.codebook]
            levels, scale = round_codebook(book, torch.full((len(book),), book.shape[1]))
            rows.stored["codebook"].copy_(levels)
            rows.stored["row_scale"].copy_(scale[:, None])
    return Layer(layer.spec, new)


def product(x: Tensor, layer: Layer, tensors: Tensors) -> Tensor:
    """x [..., c] times the layer with these codebooks: [..., r] in the dtype of x."""
    grid, scale = layer.spec.group is not None, layer.tensors.get("in_scale")
    scaled = x if grid or scale is None else x * scale.to(x.dtype)
    books = [] if grid else [_book(layer, rows, tensors) for rows in rows_of(layer)]
    return add_adapter(_Product.apply(scaled, layer, *books), x, layer)


def _code(layer: Layer, width: int) -> str:
    code = layer.spec.code_of(width)
    assert code is not None
    return code.name


def _book(layer: Layer, rows: Rows, tensors: Tensors) -> Tensor:
    """The values that the codes of these rows stand for, float32 [n, 2^b]."""
    if rows.codebook in tensors:
        return tensors[rows.codebook]
    code, width = layer.spec.code_of(rows.width), rows.width
    assert code is not None
    every = torch.arange(2**width, dtype=torch.uint8).expand(len(rows.index), -1)
    return code.levels(every, width, rows.stored) * rows.stored["row_scale"].float()


def _codes(layer: Layer, rows: Rows) -> Tensor:
    """Codes uint8 [n, c] of these rows; 2^b, behind all others, where a weight is pruned."""
    spec = layer.spec
    codes = unpack_codes(rows.stored["weight"], rows.width, spec.codes).contiguous()
    if spec.sparsity is None:
        return codes
    mask = unpack_positions(rows.stored["positions"], spec.sparsity, spec.cols)
    return torch.full_like(mask, 2**rows.width, dtype=torch.uint8).masked_scatter_(mask, codes)


def _each(layer: Layer, books: tuple[Tensor, ...]) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """(rows, their codes, their book with a 0 for what is pruned), by width."""
    for rows, book in zip(rows_of(layer), books, strict=True):
        if layer.spec.sparsity is not None:
            book = torch.nn.functional.pad(book, (0, 1))
        yield rows, _codes(layer, rows), book.contiguous()


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
