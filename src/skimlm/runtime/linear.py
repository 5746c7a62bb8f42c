"""A compressed linear: the buffers of a file, and a forward pass over them.

`runtime/ops.py` multiplies by them; embedding and head are in tables.py. Stored numbers keep their
dtype when the model is cast: `model.to(torch.bfloat16)` must not round scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skimlm.format.layer import NAMES, Layer, LayerSpec, layout
from skimlm.format.pack import QuantizedWeight, pack, unpack_adapter
from skimlm.runtime import ops
from skimlm.runtime.watched import Watched


class Stored(nn.Module):
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
    rows: int
    cols: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What is stored as an ordinary matrix `[rows, cols]`, rounded once."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight, bias left out."""
        tensors = (getattr(self, name, None) for name in self.stored)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Packed(Stored):
    """A matrix `[rows, cols]` kept in the packed form of a layer."""

    stored = NAMES
    owns_layer = True  # False for a head that uses the embedding's
    spec: LayerSpec
    bias: Tensor | None

    def __init__(self, spec: LayerSpec, device: torch.device | str | None = None) -> None:
        """Make room for a layer."""
        super().__init__()
        self.spec, self.rows, self.cols = spec, spec.rows, spec.cols
        self._seen: tuple[tuple[Tensor | None, ...], Layer] | None = None
        shapes = layout(spec)
        for name in NAMES:
            kind, shape = shapes.get(name, (None, None))
            room = None if shape is None else torch.empty(shape, dtype=kind, device=device)
            self.register_buffer(name, room)

    def held(self) -> Mapping[str, Tensor | None]:
        """The stored tensors by name."""
        return self._buffers

    @property
    def layer(self) -> Layer:
        """The stored tensors as the one value that operations take, the same until one changes."""
        held = self.held()
        if self._seen is None or not all(map(is_, held.values(), self._seen[0])):
            tensors = {name: t for name, t in held.items() if t is not None}
            self._seen = tuple(held.values()), Layer(self.spec, tensors)
        return self._seen[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._seen = None  # or it would keep what is moved away
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What is stored as an ordinary matrix `[rows, cols]`, rounded once."""
        return self.base_weight(dtype)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """W, the weight without its adapter."""
        return ops.dequantize(self.layer, dtype)

    def product(self, x: Tensor) -> Tensor:
        """`[..., cols]` times everything that is stored, in the dtype of `x`."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self.bias, self)
        # the operator costs some microseconds more than the function, and only a compiler needs it
        if torch.compiler.is_compiling():
            return ops.compiled_matmul(x, self.held(), self.spec, self.bias)
        return ops.matmul(x, self.layer, self.bias)


class CompressedLinear(Watched, Packed):
    """A linear layer `[out_features, in_features]` kept in its packed form.

    y = x W^T + bias + (x A^T) B, the last term only with an adapter. To train it, set `adapter` to
    float A [rank, in_features] and B [rank, out_features]: they replace the stored ones.
    """

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
        super().__init__(spec, device)
        self.in_features, self.out_features = spec.cols, spec.rows
        self.adapter: tuple[Tensor, Tensor] | None = None
        self.bias = bias_room(spec.rows, dtype, device) if bias else None

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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W + B^T A as an ordinary matrix `[out_features, in_features]`, rounded once."""
        if not self.spec.rank:
            return self.base_weight(dtype)
        a, b = self.adapter_values()
        return torch.addmm(self.base_weight(torch.float32), b.float().T, a.float()).to(dtype)

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
        if self.adapter is None and not (torch.is_grad_enabled() and x.requires_grad):
            return self.product(x)
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
        return ops.low_rank(x, a, b)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The ordinary layer this stands for."""
        return dense_linear(self.dequantize(dtype), self.bias)

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


def bias_room(
    rows: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Parameter:
    """Room for a bias that is stored as the model has it."""
    return nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False)


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ordinary linear of this weight."""
    rows, cols = weight.shape
    layer = nn.Linear(cols, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype))
    return layer
