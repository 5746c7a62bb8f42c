"""Embedding and head in their compressed forms.

                           embedding              head
    a layer (layer.py)     PackedEmbedding        PackedHead        rows of any width
    a table (table.py)     CompressedEmbedding    CompressedHead    8 or 4 bits, a scale per row

What is stored as `weight` is a `Parameter` here, because transformers ties parameters by name: a
tied head then gets the embedding's very tensor, and nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skimlm.format.layer import NAMES, Layer, LayerSpec
from skimlm.format.pack import QuantizedWeight, pack
from skimlm.format.table import table_layout, table_values
from skimlm.runtime import ops
from skimlm.runtime.linear import Packed, Stored, bias_room, dense_linear


class _Table(Stored):
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


AnyTable = TypeVar("AnyTable", bound="_PackedTable")


class _PackedTable(Packed):
    """A table `[rows, cols]` in the packed form of a layer."""

    weight: Tensor

    def __init__(self, spec: LayerSpec, device: torch.device | str | None = None) -> None:
        super().__init__(spec, device)
        room = self._buffers.pop("weight")
        assert room is not None
        self.weight = nn.Parameter(room, requires_grad=False)

    def held(self) -> Mapping[str, Tensor | None]:
        """The stored tensors by name."""
        others = {name: self._buffers[name] for name in NAMES if name != "weight"}
        return {"weight": self._parameters["weight"], **others}

    @classmethod
    def from_quantized(cls: type[AnyTable], q: QuantizedWeight, **options: Any) -> AnyTable:
        """Pack `q` into a table."""
        table = cls(q.spec, **options)
        table.load_state_dict(dict(pack(q).tensors), strict=False)
        return table

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.cols}, rows by width {self.spec.counts}"


class _Embedding(Stored):
    """What compressed embeddings share; how rows are kept is another base's."""

    like: Tensor

    def __init__(
        self,
        *form: Any,
        multiplier: float | None = None,
        padding_idx: int | None = None,
        dense_type: type[nn.Embedding] = nn.Embedding,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room; `multiplier` is the constant by which some models scale their embeddings."""
        super().__init__(*form, device=device)
        self.num_embeddings, self.embedding_dim = self.rows, self.cols
        self.multiplier, self.padding_idx, self.dense_type = multiplier, padding_idx, dense_type
        # empty, never saved: integers cannot say which dtype the rest of the model runs in
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[...]` to embeddings `[..., cols]`."""
        found = self.look_up(ids, self.like.dtype)
        if self.multiplier is None:
            return found
        return found * torch.tensor(self.multiplier, dtype=found.dtype, device=found.device)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these ids as they are stored."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The ordinary embedding this stands for, of the class the model had."""
        scaled: dict[str, Any] = {} if self.multiplier is None else {"embed_scale": self.multiplier}
        new = self.dense_type(self.rows, self.cols, self.padding_idx, **scaled)
        weight = self.dequantize(dtype)
        new.weight = nn.Parameter(weight)
        return new.to(weight.device)


class CompressedEmbedding(_Embedding, _Table):
    """An embedding that is a table."""

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these ids as they are stored."""
        return table_values(self.weight[ids], self.scale[ids], self.cols, dtype)


class PackedEmbedding(_Embedding, _PackedTable):
    """An embedding that is a layer; what a token takes are its rows alone."""

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these ids as they are stored."""
        if torch.compiler.is_compiling():
            return ops.compiled_rows(self.held(), self.spec, ids, dtype)
        return ops.rows(self.layer, ids, dtype)


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
        self.bias = bias_room(rows, dtype, device) if bias else None

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

    def alone(self, x: Tensor) -> Tensor:
        """The same for x [n, cols], each row to the bit what it gives without the others."""
        return ops.table_matmul_alone(x, self.weight, self.scale, self.bits, self.bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The ordinary layer this stands for."""
        return dense_linear(self.dequantize(dtype), self.bias)


class PackedHead(_PackedTable):
    """An output projection that is a layer, its own or the embedding's."""

    embedding: PackedEmbedding | None = None  # whose layer it uses

    def __init__(
        self,
        spec: LayerSpec,
        *,
        tied: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room; `dtype` is the bias's. A `tied` one only has the place of `weight`."""
        super().__init__(spec, device)
        self.in_features, self.out_features = spec.cols, spec.rows
        self.owns_layer = not tied
        if tied:  # transformers ties `weight`; `tie` brings the rest along
            self._buffers.update(dict.fromkeys(self._buffers))
        self.bias = bias_room(spec.rows, dtype, device) if bias else None

    def tie(self, embedding: PackedEmbedding) -> None:
        """Use the embedding's layer."""
        self.weight = embedding.weight
        # no part of this module: its tensors are the embedding's to store and to move
        object.__setattr__(self, "embedding", embedding)
        if self.bias is not None:  # transformers has lengthened it to `len(weight)`
            self.bias.data = self.bias.data[: self.out_features]

    def held(self) -> Mapping[str, Tensor | None]:
        """The stored tensors by name."""
        return super().held() if self.embedding is None else self.embedding.held()

    @property
    def layer(self) -> Layer:
        """The stored tensors as the one value that operations take."""
        return super().layer if self.embedding is None else self.embedding.layer

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states `[..., cols]` to logits `[..., rows]`."""
        return self.product(x)

    def alone(self, x: Tensor) -> Tensor:
        """The same for x [n, cols], each row to the bit what it gives without the others."""
        return ops.matmul_alone(x, self.layer, self.bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The ordinary layer this stands for."""
        return dense_linear(self.dequantize(dtype), self.bias)
