"""A compressed folder: its tensors, config and tokenizer, planned to the byte and written."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from skimlm.errors import SkimError, naming
from skimlm.format.layer import METHOD, TABLES_VERSION, LayerSpec, layout
from skimlm.format.pack import QuantizedWeight, pack
from skimlm.format.table import table_layout
from skimlm.models.blocks import embeddings, multiplier_of
from skimlm.models.checkpoint import Checkpoint
from skimlm.models.side_files import copy_side_files
from skimlm.quantize.table import quantize_table
from skimlm.storage.folder import check_out, folder_bytes, whole_folder
from skimlm.storage.safetensors import (
    file_bytes,
    index_text,
    split_shards,
    write_shards,
)

MAX_SHARD = "5GB"


def save(
    out: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    quantized: Mapping[str, QuantizedWeight],
    *,
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None = None,
    source: Path | None = None,
    force: bool = False,
    max_shard_size: int | str = MAX_SHARD,
    layout: Mapping[str, bool] | None = None,
) -> Path:
    """Write a compressed folder: `quantized` replaces those linears, the rest is the model's.

    It may have the embedding, and a head that is not tied to it; `embed_bits` is of those that it
    leaves out. The small files of the folder `source`, if given, come along; else the tokenizer's
    are made. `layout` is what was separated (structure.py).
    """
    out = Path(out)
    check_out(out, force)
    with whole_folder(out) as folder:
        write_model(
            folder,
            model,
            tokenizer,
            quantized,
            embed_bits=embed_bits,
            bits=bits,
            provenance=provenance,
            source=source,
            max_shard_size=max_shard_size,
            layout=layout,
        )
    return out


def write_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    quantized: Mapping[str, QuantizedWeight],
    *,
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None = None,
    source: Path | None = None,
    max_shard_size: int | str = MAX_SHARD,
    layout: Mapping[str, bool] | None = None,
) -> None:
    """The files of a compressed folder, into an empty one; see `save`."""
    tensors = _tensors(model, quantized, embed_bits)
    specs = {name: q.spec for name, q in quantized.items()}
    _write_texts(folder, model, tokenizer, specs, embed_bits, bits, provenance, source, layout)
    write_shards(folder, split_shards(tensors, max_shard_size))


def write_packed(
    folder: Path,
    model: Any,
    tokenizer: Any,
    specs: Mapping[str, LayerSpec],
    read: Callable[[str], Tensor],
    *,
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None = None,
    source: Path | None = None,
    layout: Mapping[str, bool] | None = None,
    max_shard_size: int | str = MAX_SHARD,
) -> None:
    """The same files where what the blocks hold is had by `read(name)`, a tensor at a time.

    `specs` has every compressed linear, and embedding and head where they are layers too; `layout`
    is where the family keeps its matrices otherwise (structure.py).
    """
    tensors = _other_tensors(model, specs, embed_bits, quantize_table) | _packed_plan(specs)
    _write_texts(folder, model, tokenizer, specs, embed_bits, bits, provenance, source, layout)
    write_shards(folder, split_shards(tensors, max_shard_size), read)


def _packed_plan(specs: Mapping[str, LayerSpec]) -> dict[str, Tensor]:
    """The tensors that layers are stored in, on the meta device."""
    return {
        f"{name}.{part}": torch.empty(shape, dtype=dtype, device="meta")
        for name, spec in specs.items()
        for part, (dtype, shape) in layout(spec).items()
    }


def rewrite(
    source: Checkpoint,
    folder: Path,
    changed: Mapping[str, Tensor | None],
    config: Mapping[str, Any],
) -> None:
    """Copy a folder into `folder` with another config, some tensors changed or (None) left out.

    All else that belongs to a model stays as it is; every tensor stays in the file it was in.
    """
    copy_side_files(source.path, folder)
    files: dict[str, dict[str, Tensor]] = {}
    for path in sorted(set(source.files.values())):
        with safe_open(path, framework="pt") as stream:
            tensors = {n: changed.get(n, stream.get_tensor(n)) for n in stream.keys()}
        kept = {n: tensor for n, tensor in tensors.items() if tensor is not None}
        files |= {path.name: kept} if kept else {}
    if len(files) == 1:  # then there is no index that could name it
        files = {"model.safetensors": files.popitem()[1]}
    write_shards(folder, files)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers writes it
    (folder / "config.json").write_text(text, encoding="utf-8")


def plan_bytes(
    model: Any,
    tokenizer: Any,
    specs: Mapping[str, LayerSpec],
    *,
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None = None,
    source: Path | None = None,
    layout: Mapping[str, bool] | None = None,
    max_shard_size: int | str = MAX_SHARD,
) -> int:
    """Bytes that `write_model` will write besides the tensors of the layers `specs`, exactly.

    The rest is what it will get.
    """
    packed = _packed_plan(specs)
    tensors = _other_tensors(model, specs, embed_bits, _table_plan) | packed
    with tempfile.TemporaryDirectory() as folder:
        _write_texts(
            Path(folder), model, tokenizer, specs, embed_bits, bits, provenance, source, layout
        )
        total = folder_bytes(folder)
    files = split_shards(tensors, max_shard_size)
    total += sum(file_bytes(file) for file in files.values())
    total += len((index_text(files) or "").encode())
    return total - sum(tensor.nbytes for tensor in packed.values())


def _tensors(
    model: Any, quantized: Mapping[str, QuantizedWeight], embed_bits: int
) -> dict[str, Tensor]:
    """Everything the weight files hold."""
    tensors = _other_tensors(model, quantized, embed_bits, quantize_table)
    for name, q in quantized.items():
        module = model.get_submodule(name)
        if q.shape != module.weight.shape:
            raise SkimError(
                f"{name}: quantized as {list(q.shape)}, not {list(module.weight.shape)}"
            )
        with naming(name):
            tensors |= {f"{name}.{part}": tensor for part, tensor in pack(q).tensors.items()}
    return tensors


def _other_tensors(
    model: Any,
    replaced: Iterable[str],
    embed_bits: int,
    quantize: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """The state dict without `replaced` weights and tied copies, tables through `quantize`."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, source in model.all_tied_weights_keys.items():
        if not torch.equal(tensors[name], tensors[source]):
            raise SkimError(f"{name} differs from {source}, but the config ties them")
        del tensors[name]
    for name in replaced:
        if other := model.all_tied_weights_keys.get(f"{name}.weight"):
            raise SkimError(f"{name}: is tied to {other.removesuffix('.weight')}: give that alone")
        del tensors[f"{name}.weight"]
    left = [name for name in _tables(model) if f"{name}.weight" in tensors]
    if embed_bits < 16 or len(left) < len(_tables(model)):
        multiplier_of(model.get_input_embeddings())  # refuses the kinds it does not know
    for name in left if embed_bits < 16 else ():
        weight, scale = quantize(tensors[f"{name}.weight"], embed_bits)
        tensors |= {f"{name}.weight": weight, f"{name}.scale": scale}
    return tensors


def _tables(model: Any) -> list[str]:
    """Names of the embedding and of a head with a table of its own."""
    (table, _), head, tied = embeddings(model)
    return [table] if head is None or tied else [table, head[0]]


def _table_plan(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What `quantize_table` would return, without the numbers."""
    rows, cols = table.shape
    shape, dtype = table_layout(rows, cols, bits)
    scale = torch.empty(rows, dtype=torch.bfloat16, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta"), scale


def _write_texts(
    folder: Path,
    model: Any,
    tokenizer: Any,
    specs: Mapping[str, LayerSpec],
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None,
    source: Path | None,
    layout: Mapping[str, bool] | None = None,
) -> None:
    """Write config.json, generation_config.json, the tokenizer's and all other small files.

    Those of the folder `source` stay as they are.
    """
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    entries = {name: spec.entry() for name, spec in specs.items()}
    tables = {name: entries.pop(name) for name in _tables(model) if name in entries}
    versions = [spec.version for spec in specs.values()] + ([TABLES_VERSION] if tables else [])
    config.quantization_config = {
        "quant_method": METHOD,
        "format_version": max(versions, default=1),
        "bits": bits,
        "embed_bits": embed_bits,
        "linears": entries,
        "provenance": dict(provenance or {}),
        **({"layout": dict(layout)} if layout else {}),
        **({"tables": tables} if tables else {}),
    }
    config.save_pretrained(folder)
    known = source is not None and (source / "generation_config.json").is_file()
    if model.can_generate() and not known:  # older transformers refuse to write many that are there
        model.generation_config.save_pretrained(folder)
    if source is not None and source.is_dir():
        copy_side_files(source, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
