"""How much of a model is compressed, what stays as it is and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from skimlm.errors import SkimError
from skimlm.models.architecture import positions
from skimlm.models.blocks import decoder_of, embeddings
from skimlm.models.structure import Structure

NAMED = 4  # matrices that a message names
LEAST = 0.5  # of what reads and writes text, below which nothing is done unasked


@dataclass(frozen=True)
class Coverage:
    """Numbers of parameters: each of a model's is in one of these."""

    linears: int  # compressed
    tables: int  # embeddings and head, compressed
    excluded: int  # left out by the user
    beside: int  # parts beside the decoder that reads text: vision, audio
    dense: Mapping[str, tuple[int, str]]  # other matrices, layers taken together: count, reason
    small: int  # vectors: norms, biases; tables of positions

    @property
    def parameters(self) -> int:
        """All of them."""
        matrices = sum(count for count, _ in self.dense.values())
        return self.linears + self.tables + self.excluded + self.beside + matrices + self.small

    @property
    def share(self) -> float:
        """What is compressed of the matrices, without those that are beside or left out."""
        could = self.parameters - self.beside - self.excluded - self.small
        return (self.linears + self.tables) / could if could else 0.0

    def check(self, allow_partial: bool) -> None:
        """Refuse a model of which less than half would be compressed, unless that is allowed."""
        if self.share < LEAST and not allow_partial:
            raise SkimError(
                f"only {self.share:.0%} of this model's weights can be compressed: "
                f"{self.named()}; --allow-partial does it all the same"
            )

    def named(self) -> str:
        """The largest matrices that stay as they are, with the reason."""
        largest = sorted(self.dense.items(), key=lambda item: -item[1][0])
        texts = [f"{name} ({count:,}) {why}" for name, (count, why) in largest[:NAMED]]
        more = len(largest) - NAMED
        return ", ".join(texts) + (f" and {more} more" if more > 0 else "")

    def text(self) -> str:
        """One line for the user."""
        whole = self.linears + self.tables
        line = f"compressed: {whole:,} of {self.parameters:,} parameters, {self.share:.1%}"
        line += f" of the matrices without {self.beside:,} beside the text" if self.beside else ""
        return line + (f"; as they are: {self.named()}" if self.dense else "")

    def facts(self) -> dict[str, Any]:
        """Plain values, for reports."""
        return {
            "parameters": self.parameters,
            "compressed": self.linears + self.tables,
            "share": round(self.share, 4),
            "beside": self.beside,
            "dense": {name: {"parameters": n, "why": why} for name, (n, why) in self.dense.items()},
        }


def coverage(
    model: Any,
    linears: Collection[str],
    every: Collection[str],
    structure: Structure,
    compressed_tables: bool,
) -> Coverage:
    """What becomes of the parameters of a separated model.

    `linears` are compressed, of `every` one that could be.
    """
    (table, _), head, _ = embeddings(model)
    tables = {f"{table}.weight"} | ({f"{head[0]}.weight"} if head else set())
    decoder = next(n for n, m in model.named_modules() if m is decoder_of(model))
    inside = (f"{decoder}." if decoder else "", *tables)
    counts = {"linears": 0, "tables": 0, "excluded": 0, "beside": 0, "small": 0}
    dense: dict[str, tuple[int, str]] = {}
    for name, parameter in model.named_parameters():
        if name in model.all_tied_weights_keys:  # counted with the one it is
            continue
        owner, count = name.rpartition(".")[0], parameter.numel()
        kind = "small" if parameter.ndim < 2 or _of_positions(model, owner) else ""
        if name in tables and compressed_tables:
            kind = "tables"
        elif name.endswith(".weight") and owner in linears:
            kind = "linears"
        elif name.endswith(".weight") and owner in every:
            kind = "excluded"
        elif not name.startswith(inside) or name in structure.silent:
            kind = "beside"
        if kind:
            counts[kind] += count
            continue
        alike = re.sub(r"\.\d+(?=\.)", ".*", name)
        known = dense.get(alike, (0, _why(model, name, tables, structure)))
        dense[alike] = (known[0] + count, known[1])
    return Coverage(**counts, dense=dense)


def _of_positions(model: nn.Module, name: str) -> bool:
    """Whether a module is a table of as many rows as the model has positions, or hardly more."""
    table, most = model.get_submodule(name), positions(model.config)
    return (
        isinstance(table, nn.Embedding)
        and most is not None
        and (most <= table.num_embeddings <= most + 8)
    )


def _why(model: nn.Module, name: str, tables: Collection[str], structure: Structure) -> str:
    owner = name.rpartition(".")[0]
    if name in tables:
        return f"stays in 16 bits: {structure.tables}" if structure.tables else "is in 16 bits"
    if owner in structure.by_hand:
        return "is multiplied by hand"
    if owner in structure.shared:
        return "is shared between blocks"
    if owner in structure.unreached:
        return "is not reached by text"
    if owner in structure.routers:
        return "chooses experts or tokens"
    if isinstance(model.get_submodule(owner), nn.Embedding):
        return "is looked up"
    if isinstance(model.get_submodule(owner), nn.modules.conv._ConvNd):
        return "is a convolution"
    return "is no linear" if not structure.failed else f"is not known ({structure.failed})"
