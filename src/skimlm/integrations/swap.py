"""Compressed layers in place of a model's dense ones, and back; their files checked before.

swap_in(model, config, dtype)     the skeleton of a model gets its empty compressed layers
check_files(model, config, files) what is stored is what they expect
complete(model)                   after loading
swap_out(model, dtype)            dense layers again
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from skimlm.errors import FormatError
from skimlm.format.check import check_stored
from skimlm.format.layer import NAMES, Layer, LayerSpec
from skimlm.models.blocks import embeddings, multiplier_of
from skimlm.models.structure import join, separate
from skimlm.runtime.decode import fuse, unfuse
from skimlm.runtime.linear import CompressedLinear, Packed
from skimlm.runtime.tables import (
    CompressedEmbedding,
    CompressedHead,
    PackedEmbedding,
    PackedHead,
)
from skimlm.storage.safetensors import DTYPES, read_header

if TYPE_CHECKING:
    from skimlm.integrations.transformers import SkimlmConfig

CONFIG = "config.json"
EMBEDDINGS, HEADS = (CompressedEmbedding, PackedEmbedding), (CompressedHead, PackedHead)


def swap_in(model: Any, config: SkimlmConfig, dtype: torch.dtype) -> None:
    """Replace linears, embedding and head by empty compressed ones, on the meta device."""
    separate(model, _layout(model, config))
    for name in config.linears:
        own = _own_name(model, name)
        old = model.get_submodule(own)
        if type(old) is not nn.Linear:
            raise FormatError("is not a linear of this model", file=CONFIG, tensor=name)
        spec = config.spec(name, old.out_features, old.in_features)
        new = CompressedLinear(spec, bias=old.bias is not None, dtype=dtype, device="meta")
        model.set_submodule(own, new)
    _swap_in_tables(model, config, dtype)


def _swap_in_tables(model: Any, config: SkimlmConfig, dtype: torch.dtype) -> None:
    """Replace embedding and head, each by a layer where config.json names it, else by a table."""
    (name, table), head, tied = embeddings(model)
    own = [name] if head is None or tied else [name, head[0]]
    named = {n: stored for stored in config.tables for n in aliases(model, stored) if n in own}
    unknown = [stored for stored in config.tables if stored not in named.values()]
    if unknown and (head is not None or len(unknown) > 1):  # a body alone has no head
        reason = f"is no embedding or head of this model, which has {' and '.join(own)}"
        raise FormatError(reason, file=CONFIG, tensor=unknown[0])

    def form(own: str, rows: int, cols: int) -> LayerSpec | None:
        return config.spec(named[own], rows, cols) if own in named else None

    rows, cols = table.weight.shape
    spec, at = form(name, rows, cols), dict[str, Any](dtype=dtype, device="meta")
    if spec or config.embed_bits < 16:
        like = {"multiplier": multiplier_of(table), "padding_idx": table.padding_idx}
        like |= {"dense_type": type(table)} | at
        model.set_submodule(
            name,
            PackedEmbedding(spec, **like)
            if spec
            else CompressedEmbedding(rows, cols, config.embed_bits, **like),
        )
    if head is None:
        return
    rows, cols = head[1].out_features, head[1].in_features
    spec = form(name if tied else head[0], rows, cols)
    if spec or config.embed_bits < 16:
        at |= {"tied": tied, "bias": head[1].bias is not None}
        model.set_submodule(
            head[0],
            PackedHead(spec, **at) if spec else CompressedHead(rows, cols, config.embed_bits, **at),
        )


def complete(model: Any) -> None:
    """After loading: a tied head gets the table, single tokens take the native way."""
    table, head, tied = embeddings(model)
    if head and tied and isinstance(head[1], HEADS):
        head[1].tie(table[1])
    fuse(model)


def swap_out(model: Any, dtype: torch.dtype, config: SkimlmConfig) -> Any:
    """Replace every compressed layer by the dense one it stands for, kept as the family does."""
    unfuse(model)
    table, head, tied = embeddings(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (CompressedLinear, *EMBEDDINGS, *HEADS)):
            model.set_submodule(name, module.dense(dtype))
    if head and tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    if layout := getattr(config, "layout", None):
        with init_empty_weights():
            like = type(model)(copy.deepcopy(model.config))
        join(model, layout, like)
    return model


def _layout(model: Any, config: SkimlmConfig) -> dict[str, bool]:
    """What config.json says of matrices that the family keeps otherwise; FormatError if it lies."""
    layout = getattr(config, "layout", {})
    if not isinstance(layout, dict):
        raise FormatError("layout must be a map of names", file=CONFIG)
    parameters = dict(model.named_parameters())
    for name, transposed in layout.items():
        kept = parameters.get(name)
        module = model.get_submodule(name.rpartition(".")[0]) if kept is not None else None
        if kept is None or (kept.ndim != 3 and not isinstance(module, (nn.Linear, Conv1D))):
            raise FormatError("layout: is no matrix of this model", file=CONFIG, tensor=name)
        if not isinstance(transposed, bool):
            raise FormatError("layout must be true or false", file=CONFIG, tensor=name)
    return layout


def check_files(model: Any, config: SkimlmConfig, files: Sequence[Path]) -> None:
    """Check the stored tensors of every linear and table before transformers reads them.

    Only the packed codes stay unread: any bytes of the right length are valid codes.
    """
    if not files or files[0].suffix != ".safetensors":
        raise FormatError("a compressed model is safetensors", file=files[0] if files else CONFIG)
    where = {name: (file, entry) for file in files for name, entry in read_header(file).items()}
    handles = {file: safe_open(file, framework="pt") for file in files}

    def stored(prefix: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found = {name: where[prefix + name] for name in names if prefix + name in where}
        return {
            name: handles[file].get_tensor(prefix + name) if name != "weight" else _meta(entry)
            for name, (file, entry) in found.items()
        }

    try:
        for layer_name, module in model.named_modules():
            if isinstance(module, Packed) and module.owns_layer:
                names = aliases(model, layer_name)
                name = next((n for n in names if f"{n}.widths" in where), layer_name)
                check_stored(Layer(module.spec, stored(f"{name}.", NAMES)), name=name)
            if isinstance(module, (CompressedEmbedding, CompressedHead)) and module.owns_scale:
                names = aliases(model, layer_name)
                name = next((n for n in names if f"{n}.scale" in where), layer_name)
                _check_table(name, module, stored(f"{name}.", ("weight", "scale")))
    except FormatError as error:
        raise error.at(where[error.tensor][0] if error.tensor in where else files[0]) from None


def _check_table(
    name: str, layer: CompressedEmbedding | CompressedHead, tensors: dict[str, torch.Tensor]
) -> None:
    for part in ("weight", "scale"):
        want, tensor = getattr(layer, part), f"{name}.{part}"
        if part not in tensors:
            raise FormatError("is missing", tensor=tensor)
        got = tensors[part]
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            raise FormatError(
                f"must be {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}",
                tensor=tensor,
            )
    if not tensors["scale"].isfinite().all():
        raise FormatError("holds NaN or Inf", tensor=f"{name}.scale")


def _meta(entry: Mapping[str, Any]) -> torch.Tensor:
    """A header entry as a tensor without data."""
    dtype = {name: dtype for dtype, name in DTYPES.items()}.get(entry["dtype"], torch.complex64)
    return torch.empty(entry["shape"], dtype=dtype, device="meta")


def aliases(model: Any, name: str) -> tuple[str, str]:
    """A name with and without the prefix under which a causal model holds its decoder."""
    prefix = model.base_model_prefix + "."
    return name, name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _own_name(model: Any, name: str) -> str:
    """config.json's name of a linear as this model calls it."""
    for own in aliases(model, name):
        try:
            model.get_submodule(own)
            return own
        except AttributeError:
            continue
    raise FormatError("is not a linear of this model", file=CONFIG, tensor=name)
