"""The compressed layers: the buffers of a file, and a forward pass over them.

`CompressedLinear` holds a linear as FORMAT.md stores it; `runtime/ops.py` multiplies by it.
`CompressedEmbedding` and `CompressedHead` hold a table [V, d] with one scale per row:

    8 bit: weight int8  [V, d]           value = weight * scale
    4 bit: weight uint8 [V, ceil(d/2)]   value = (nibble - 8) * scale, even columns low

Two things are not obvious. The table is a `Parameter`, because transformers ties parameters by
name: a tied head then gets the embedding's very tensor, and nothing is stored twice. And stored
numbers keep their dtype when the model is cast: `model.to(torch.bfloat16)` must not round scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skimlm.format.pack import (
    PLAIN,
    Parts,
    QuantizedWeight,
    histogram,
    layout,
    pack,
    pack_nibbles,
    unpack_nibbles,
)
from skimlm.runtime.ops import (
    FEW_TOKENS,
    NATIVE,
    adapter_stored,
    dequantize_packed,
    dequantize_parts,
    linear_packed,
    linear_parts,
    sparse_linear,
    table_packed,
)

ROWS = 4096  # table rows quantized at a time


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
        tensors = (getattr(self, name, None) for name in ("weight", *self.stored))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class CompressedLinear(_Stored):
    """A linear layer `[out_features, in_features]` kept in its packed form.

    y = x W^T + bias + (x A^T) B, the last term only with an adapter. To train it, set `adapter` to
    float A [rank, in_features] and B [rank, out_features]: they replace the stored ones.
    """

    stored = (
        *("widths", "codebook", "row_scale", "row_zero", "in_scale"),
        *("positions", "lora_a", "lora_b", "lora_a_scale", "lora_b_scale"),
    )
    weight: Tensor
    widths: Tensor
    codebook: Tensor | None
    row_scale: Tensor
    row_zero: Tensor | None
    in_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        counts: Mapping[int, int],
        *,
        in_scale: bool = False,
        parts: Parts = PLAIN,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for `counts[b]` rows of each width b; `dtype` is the bias's."""
        super().__init__()
        self.in_features, self.out_features = in_features, sum(counts.values())
        self.counts, self.parts = dict(counts), parts
        self.coded = parts.sparsity is not None or parts.group is not None  # unlike version 1
        self.adapter: tuple[Tensor, Tensor] | None = None
        for name in self.stored:
            self.register_buffer(name, None)
        for name, (kind, shape) in layout(counts, in_features, in_scale, parts).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        room = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if room is None else nn.Parameter(room, requires_grad=False)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, bias: Tensor | None = None) -> CompressedLinear:
        """Pack `q` into a layer; `bias` is kept as it is."""
        scaled, parts = q.in_scale is not None, Parts.of(q)
        counts = histogram(q.widths)
        layer = cls(q.shape[1], counts, in_scale=scaled, parts=parts, device="meta")
        for name, tensor in pack(q).items():
            layer.register_buffer(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W + B^T A as an ordinary matrix `[out_features, in_features]`, rounded once."""
        if not self.parts.rank:
            return self.sparse_weight(dtype)
        a, b = self.adapter_values()
        return torch.addmm(self.sparse_weight(torch.float32), b.float().T, a.float()).to(dtype)

    def sparse_weight(self, dtype: torch.dtype) -> Tensor:
        """W, the weight without its adapter."""
        if self.coded:
            return dequantize_parts(self.tensors(), self.in_features, self.parts, dtype)
        return dequantize_packed(
            self.weight,
            self.widths,
            self.codebook,
            self.row_scale,
            self.row_zero,
            self.in_scale,
            self.in_features,
            dtype,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors the layer has, by their last name."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def adapter_values(self) -> tuple[Tensor, Tensor]:
        """A `[rank, in_features]` and B `[rank, out_features]` as floats: `adapter`, or stored."""
        if self.adapter is not None:
            return self.adapter
        return adapter_stored(self.tensors(), self.out_features, self.in_features)

    def drop_adapter(self) -> None:
        """Be W alone."""
        self.parts = self.parts.without_adapter()
        for name in [n for n in self.tensors() if n.startswith("lora_")]:
            self._buffers[name] = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], got {list(x.shape)}")
        backward = torch.is_grad_enabled() and x.requires_grad
        if (self.coded or self.parts.rank) and self.adapter is None and not backward:
            product = sparse_linear if torch.compiler.is_compiling() else linear_parts
            return product(x, self.tensors(), self.parts, self.bias)
        out = self.sparse_part(x)
        return out + self.adapter_part(x) if self.parts.rank else out

    def adapter_part(self, x: Tensor) -> Tensor:
        """(x A^T) B, never merged into the weight."""
        a, b = self.adapter_values()
        return F.linear(x, a.to(x.dtype)) @ b.to(x.dtype)

    def sparse_part(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self.bias, self)
        if self.coded:
            parts = self.parts.without_adapter()
            plain = {n: t for n, t in self.tensors().items() if not n.startswith("lora_")}
            return linear_parts(x, plain, parts, self.bias)
        # the operator costs some microseconds more than the function, and only a compiler needs it;
        # so does looking six buffers up through the module
        linear = torch.ops.skimlm.linear if torch.compiler.is_compiling() else linear_packed
        stored: Any = self._buffers
        return linear(
            x,
            stored["weight"],
            stored["widths"],
            stored["codebook"],
            stored["row_scale"],
            stored["row_zero"],
            stored["in_scale"],
            self.bias,
            True,
        )

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The ordinary layer this stands for."""
        return _dense_linear(self.dequantize(dtype), self.bias)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, rows by width {self.counts}"
        return ", ".join([text, *(f"{key}={value}" for key, value in self.parts.entry().items())])


class _Product(torch.autograd.Function):
    """x W^T + bias; the backward pass de-quantizes W again, so that no dense weight is kept."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return F.linear(x, layer.sparse_weight(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.layer.sparse_weight(gradient.dtype), bias, None


class _Table(_Stored):
    """A `[rows, cols]` table of 8 or 4 bits with a scale per row."""

    stored = ("scale",)
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
        few = 0 < x.numel() < FEW_TOKENS * self.cols and x.device.type == "cpu"
        if not few or x.dtype not in NATIVE or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        table = torch.ops.skimlm.table if torch.compiler.is_compiling() else table_packed
        logits = table(x, self.weight, self.scale, self.bits)
        return logits if self.bias is None else logits + self.bias

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


def table_layout(rows: int, cols: int, bits: int) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of a table's stored codes."""
    return ((rows, cols), torch.int8) if bits == 8 else ((rows, -(-cols // 2)), torch.uint8)


def table_values(codes: Tensor, scale: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """De-quantize rows `[..., n]` with scales `[...]`: in float32, rounded once to `dtype`."""
    if codes.dtype == torch.uint8:
        codes = unpack_nibbles(codes, cols)
    return (codes.float() * scale.float().unsqueeze(-1)).to(dtype)


def quantize_table(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round `[rows, cols]` to 8 or 4 bits: the stored codes and a bfloat16 scale per row.

    Of a few shrinkings of a row's range the one of least squared error is taken: at 4 bits it pays
    to clip the outliers, at 8 it hardly ever does.
    """
    parts = [_quantize_rows(rows.float(), bits) for rows in table.detach().split(ROWS)]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes if bits == 8 else pack_nibbles(codes), scale


def _quantize_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes in -2**(bits-1) .. 2**(bits-1) - 1 and bfloat16 scales, by a search over scales."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = rows.aminmax(dim=1)
    # the side that reaches further gets the extra code: the scale carries the sign
    full = torch.where(most > -least, most / low, least / low)
    best = torch.full_like(full, float("inf"))
    codes = torch.zeros_like(rows, dtype=torch.int8)
    scale = torch.zeros_like(full, dtype=torch.bfloat16)
    for shrink in torch.linspace(0.5, 1.0, 16) if bits == 4 else torch.linspace(0.97, 1.0, 4):
        trial = (full * shrink).to(torch.bfloat16)  # what the file will hold
        step = torch.where(trial == 0, 1.0, trial.float()).unsqueeze(1)
        code = (rows / step).round_().clamp_(low, high)
        error = (code * trial.float().unsqueeze(1) - rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial, scale)
        codes[better] = code[better].to(torch.int8)
    return codes, scale
