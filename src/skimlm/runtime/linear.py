"""The compressed layers: the buffers of a file, and a forward pass over them.

`CompressedLinear` holds a linear as FORMAT.md stores it, `CompressedEmbedding` and `CompressedHead`
a table (format/table.py); `runtime/ops.py` multiplies by them.

Two things are not obvious. The table is a `Parameter`, because transformers ties parameters by
name: a tied head then gets the embedding's very tensor, and nothing is stored twice. And stored
numbers keep their dtype when the model is cast: `model.to(torch.bfloat16)` must not round scales.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skimlm.format.layer import NAMES, Layer, LayerSpec, layout
from skimlm.format.pack import QuantizedWeight, pack, unpack_adapter
from skimlm.format.table import table_layout, table_values
from skimlm.runtime import ops
from skimlm.runtime.watched import Watched


class _Stored(nn.Module):
    """A module whose registered buffers keep their dtype: `.to()` and friends only move them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        stored = {name: self._buffers[name] for name in self.stored if name in self._buffers}
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    stored: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight, bias left out."""
        tensors = (getattr(self, name, None) for name in self.stored)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class CompressedLinear(Watched, _Stored):
    """A linear layer `[out_features, in_features]` kept in its packed form.

    y = x W^T + bias + (x A^T) B, the last term only with an adapter. To train it, set `adapter` to
    float A [rank, in_features] and B [rank, out_features]: they replace the stored ones.
    """

    stored = NAMES
    weight: Tensor
    widths: Tensor
    in_scale: Tensor | None

    def __init__(
        self,
        spec: LayerSpec,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for a layer; `dtype` is the bias's."""
        super().__init__()
        self.in_features, self.out_features, self.spec = spec.cols, spec.rows, spec
        self.adapter: tuple[Tensor, Tensor] | None = None
        self._seen: tuple[tuple[Tensor | None, ...], Layer] | None = None
        shapes = layout(spec)
        for name in NAMES:
            kind, shape = shapes.get(name, (None, None))
            room = None if shape is None else torch.empty(shape, dtype=kind, device=device)
            self.register_buffer(name, room)
        room = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if room is None else nn.Parameter(room, requires_grad=False)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, bias: Tensor | None = None) -> CompressedLinear:
        """Pack `q` into a layer; `bias` is kept as it is."""
        packed = pack(q)
        module = cls(packed.spec, device="meta")
        for name, tensor in packed.tensors.items():
            module.register_buffer(name, tensor)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    @property
    def layer(self) -> Layer:
        """The buffers as the one value that operations take, the same until one is replaced."""
        buffers = self._buffers.values()
        if self._seen is None or not all(map(is_, buffers, self._seen[0])):
            tensors = {name: t for name, t in self._buffers.items() if t is not None}
            self._seen = tuple(buffers), Layer(self.spec, tensors)
        return self._seen[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._seen = None  # or it would keep what is moved away
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W + B^T A as an ordinary matrix `[out_features, in_features]`, rounded once."""
        if not self.spec.rank:
            return self.base_weight(dtype)
        a, b = self.adapter_values()
        return torch.addmm(self.base_weight(torch.float32), b.float().T, a.float()).to(dtype)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """W, the weight without its adapter."""
        return ops.dequantize(self.layer, dtype)

    def adapter_values(self) -> tuple[Tensor, Tensor]:
        """A `[rank, in_features]` and B `[rank, out_features]` as floats: `adapter`, or stored."""
        if self.adapter is not None:
            return self.adapter
        stored = unpack_adapter(self.layer)
        if stored is None:
            raise ValueError("this layer has no adapter")
        return stored.values()

    def drop_adapter(self) -> None:
        """Be W alone."""
        self.spec = self.spec.without_adapter()
        for name in self._buffers.keys() - layout(self.spec).keys():
            self._buffers[name] = None
        self._seen = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        # the operator costs some microseconds more than the function, and only a compiler needs it
        compiling = torch.compiler.is_compiling()
        if self.adapter is None and not (torch.is_grad_enabled() and x.requires_grad):
            if compiling:
                return ops.compiled_matmul(x, self._buffers, self.spec, self.bias)
            return ops.matmul(x, self.layer, self.bias)
        out = self.base_product(x)
        return out + self.adapter_product(x) if self.spec.rank else out

    def base_product(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self.bias, self)
        return ops.matmul(x, self.layer.without_adapter(), self.bias)

    def adapter_product(self, x: Tensor) -> Tensor:
        """(x A^T) B, never merged into the weight."""
        a, b = self.adapter_values()
        return F.linear(x, a.to(x.dtype)) @ b.to(x.dtype)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The ordinary layer this stands for."""
        return _dense_linear(self.dequantize(dtype), self.bias)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, rows by width {self.spec.counts}"
        options = self.spec.options().items()
        return ", ".join([text, *(f"{key}={value}" for key, value in options)])


class _Product(torch.autograd.Function):
    """x W^T + bias; the backward pass de-quantizes W again, so that no dense weight is kept."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return F.linear(x, layer.base_weight(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.layer.base_weight(gradient.dtype), bias, None


class _Table(_Stored):
    """A `[rows, cols]` table of 8 or 4 bits with a scale per row."""

    stored = ("weight", "scale")
    owns_scale = True  # False for a head that uses the embedding's
    scale: Tensor

    def __init__(
        self, rows: int, cols: int, bits: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.rows, self.cols, self.bits = rows, cols, bits
        shape, dtype = table_layout(rows, cols, bits)
        room = torch.empty(shape, dtype=dtype, device=device)
        self.weight = nn.Parameter(room, requires_grad=False)
        self.register_buffer("scale", torch.empty(rows, dtype=torch.bfloat16, device=device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table as an ordinary matrix."""
        return table_values(self.weight, self.scale, self.cols, dtype)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.cols}, bits={self.bits}"


class CompressedEmbedding(_Table):
    """A compressed embedding; `multiplier` is the constant by which some models scale theirs."""

    like: Tensor

    def __init__(
        self,
        rows: int,
        cols: int,
        bits: int,
        *,
        multiplier: float | None = None,
        padding_idx: int | None = None,
        dense_type: type[nn.Embedding] = nn.Embedding,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(rows, cols, bits, device)
        self.num_embeddings, self.embedding_dim = rows, cols
        self.multiplier, self.padding_idx, self.dense_type = multiplier, padding_idx, dense_type
        # empty, never saved: integers cannot say which dtype the rest of the model runs in
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[...]` to embeddings `[..., cols]`."""
        dtype = self.like.dtype
        rows = table_values(self.weight[ids], self.scale[ids], self.cols, dtype)
        if self.multiplier is None:
            return rows
        return rows * torch.tensor(self.multiplier, dtype=dtype, device=rows.device)

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The ordinary embedding this stands for, of the class the model had."""
        scaled: dict[str, Any] = {} if self.multiplier is None else {"embed_scale": self.multiplier}
        new = self.dense_type(self.rows, self.cols, self.padding_idx, **scaled)
        new.weight = nn.Parameter(self.dequantize(dtype))
        return new.to(self.weight.device)


class CompressedHead(_Table):
    """An output projection whose table is compressed, its own or the embedding's."""

    def __init__(
        self,
        rows: int,
        cols: int,
        bits: int,
        *,
        tied: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(rows, cols, bits, device)
        self.in_features, self.out_features = cols, rows
        self.owns_scale = not tied
        if tied:  # transformers ties `weight`; `tie` brings the scale along
            self.register_buffer("scale", self.scale, persistent=False)
        room = torch.empty(rows, dtype=dtype, device=device) if bias else None
        self.bias = None if room is None else nn.Parameter(room, requires_grad=False)

    def tie(self, embedding: CompressedEmbedding) -> None:
        """Share the embedding's table."""
        self.weight = embedding.weight
        self.register_buffer("scale", embedding.scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states `[..., cols]` to logits `[..., rows]`."""
        product = ops.table_matmul
        if torch.is_grad_enabled() and x.requires_grad:
            product = ops.table_matmul_reference
        elif torch.compiler.is_compiling():
            product = torch.ops.skimlm.table_matmul
        return product(x, self.weight, self.scale, self.bits, self.bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The ordinary layer this stands for."""
        return _dense_linear(self.dequantize(dtype), self.bias)


def _dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, cols = weight.shape
    layer = nn.Linear(cols, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype))
    return layer
