"""The model that is trained: it computes from stored layers, all else is the original's."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from skimlm.format.layer import Layer
from skimlm.models.blocks import embeddings, multiplier_of
from skimlm.runtime.tables import PackedEmbedding, PackedHead


@dataclass(frozen=True)
class Student:
    """A model whose linears compute from stored layers, embedding and head too if there are any."""

    original: Any  # the weights of the linears may be on the meta device
    linears: Mapping[str, nn.Linear]
    layers: Mapping[str, Layer]  # of the linears
    tables: Mapping[str, Layer] = field(default_factory=dict)  # of embedding and head
    recomputed: Collection[str] = ()  # blocks whose activations are not kept for the gradient

    @cached_property
    def model(self) -> Any:
        """The original with the tables as embedding and head; its blocks are the original's."""
        return viewed(self.original, packed_tables(self.original, self.tables))


def packed_tables(model: Any, layers: Mapping[str, Layer]) -> dict[str, nn.Module]:
    """Embedding and head that compute from these layers, by their names; a tied head is one."""
    (name, table), head, tied = embeddings(model)
    found: dict[str, nn.Module] = {}
    embedding = None
    if name in layers:
        embedding = found[name] = PackedEmbedding(
            layers[name].spec,
            multiplier=multiplier_of(table),
            padding_idx=table.padding_idx,
            dense_type=type(table),
            dtype=model.dtype,
        )
        _fill(embedding, layers[name])
    own = name if tied else head[0] if head else ""
    if head and own in layers:
        made = PackedHead(
            layers[own].spec, tied=tied, bias=head[1].bias is not None, dtype=model.dtype
        )
        if embedding is not None and tied:
            made.tie(embedding)
        else:
            _fill(made, layers[own])
        if made.bias is not None:
            made.bias.data.copy_(head[1].bias.detach())
        found[head[0]] = made
    return found


def _fill(module: nn.Module, layer: Layer) -> None:
    module.load_state_dict(dict(layer.tensors), strict=False)


def viewed(model: Any, modules: Mapping[str, nn.Module]) -> Any:
    """The model with other modules at these names; every other module is the model's own."""

    def view(module: nn.Module, prefix: str) -> nn.Module:
        if not any(name.startswith(prefix) for name in modules):
            return module
        made = copy.copy(module)
        made._modules = {
            name: modules.get(prefix + name) or (child and view(child, f"{prefix}{name}."))
            for name, child in module._modules.items()
        }
        return made

    return view(model, "") if modules else model
