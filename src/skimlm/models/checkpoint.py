"""Models in: a Hugging Face folder, a hub id or a GGUF file, compressed or not.

    open_checkpoint(source) -> Checkpoint      all that can be wrong with a file, before any work
    load(source)            -> model, tokenizer

A checkpoint is hostile until read: headers are checked first, no pickle is opened, and no code that
comes with a model is run.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skimlm.errors import FormatError, SkimError, first_line, naming, one_line
from skimlm.format.layer import METHOD
from skimlm.models.architecture import auto_class, check_causal, skeleton
from skimlm.models.blocks import decoder_linears, embeddings
from skimlm.models.dequantize import check_blocks, dequantizing
from skimlm.models.gguf import alone, check_model_finite, gguf_options, read_gguf_config
from skimlm.models.gguf_metadata import check_gguf_tensors, read_metadata
from skimlm.models.probe import structure_of
from skimlm.models.side_files import CARRIED
from skimlm.models.structure import Structure, separate
from skimlm.models.tensors import check_extra, left_out, untie, untie_stored
from skimlm.storage.safetensors import (
    check_finite,
    read_json,
    tensor_files,
)

HUB_FILES = ["*.safetensors", *CARRIED]
CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened and checked source; `files` maps each tensor to its file (empty for GGUF)."""

    path: Path
    config: Any
    files: dict[str, Path] = field(repr=False)
    compressed: bool = False
    left_out: tuple[str, ...] = ()  # stored, and no part of what transformers makes of them
    undone: dict[str, Any] | None = None  # the quantization that transformers undoes as it loads

    @cached_property
    def structure(self) -> Structure:
        """How the blocks keep their matrices; SkimError if there is nothing to compress."""
        with naming(self.path):
            model = skeleton(self.path, self.config)
            found = structure_of(model)
            separate(model, found.layout)
            decoder_linears(model, dense=found.dense)
        return found

    @property
    def gguf(self) -> bool:
        """Whether the source is a GGUF file rather than a folder."""
        return self.path.is_file()


# ---- reading


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Check a model: files whole, numbers finite, architecture known."""
    path = _resolve(source, revision, cache_dir)
    if path.is_file():
        metadata = read_metadata(path)
        config = read_gguf_config(path, metadata)
        check_causal(path, config)
        model = skeleton(path, config)
        check_gguf_tensors(path, metadata, model)
        return Checkpoint(path, config, {})
    config, compressed, undone = _read_config(path)
    entries = tensor_files(path)
    files = {name: file for name, (file, _) in entries.items()}
    if compressed:
        check_finite(entries)
        return Checkpoint(path, config, files, compressed)
    model = skeleton(path / CONFIG, config)
    if undone:
        check_blocks(undone, entries)
    _check_shapes(model, entries)
    check_finite(entries)
    untie_stored(model, config, files)
    return Checkpoint(path, config, files, left_out=tuple(left_out(model, files)), undone=undone)


def open_compressed(source: str | os.PathLike[str]) -> Checkpoint:
    """Check a compressed folder; SkimError for any other model."""
    opened = open_checkpoint(source)
    if not opened.compressed:
        raise SkimError(f"{source}: not a compressed folder: make one with `skimlm compress`")
    return opened


def load(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Load a model, compressed or not, and its tokenizer unless that is at hand."""
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    tokenizer = tokenizer or load_tokenizer(source)
    options = gguf_options(source.path) if source.gguf else {}
    config = source.config
    if source.undone:
        config = copy.deepcopy(config)
        config.quantization_config = dict(source.undone)
    with one_line(source.path, "cannot be loaded"), alone(source.path) as folder:
        loaded: Any = auto_class(source.config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with the tensor's name
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    _check_loading(source, model, info)
    if not embeddings(model)[2]:
        untie(model.config)
    if source.gguf:
        check_model_finite(source.path, model)
    return model.eval(), tokenizer


def load_tokenizer(source: Checkpoint) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    options = {"gguf_file": source.path.name} if source.gguf else {}
    with one_line(source.path, "cannot be loaded: tokenizer"), alone(source.path) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        tokenizer("some of them fail at the first text only")
    return tokenizer


def _resolve(
    source: str | os.PathLike[str], revision: str | None, cache_dir: str | Path | None
) -> Path:
    """A local folder or .gguf file as it is; what is shaped like a hub id through the cache."""
    path, name = Path(source), os.fspath(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise SkimError(f"{name}: not a model folder and not a .gguf file")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")):
        raise SkimError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_FILES
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated classes
        raise SkimError(f"{name}: no such folder, and the hub says: {first_line(error)}") from error


def _read_config(path: Path) -> tuple[Any, bool, dict[str, Any] | None]:
    """A folder's config, whether it is one of our compressed ones, and what must be undone."""
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    file = path / CONFIG
    if (path / ADAPTER).is_file():
        beside = "beside a model" if file.is_file() else "alone"
        raise SkimError(
            f"{path / ADAPTER}: an adapter {beside}: merge it into its model and give the result, "
            "or give a folder of the model without it"
        )
    raw = read_json(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise FormatError(
            f"unknown architecture {kind!r}: transformers {__version__} has no such model_type, "
            "and code that comes with a model is never run",
            file=file,
        )
    quantized = raw.get("quantization_config") or {}
    if not isinstance(quantized, dict):
        raise FormatError("quantization_config must be an object", file=file)
    if (path / GENERATION).exists():
        read_json(path / GENERATION)  # transformers passes over a broken one without a word
    with one_line(file, "is not a usable config"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_causal(file, config)
    if quantized.get("quant_method") == METHOD:
        return config, True, None
    with naming(file), one_line(file, "its quantization cannot be undone"):
        return config, False, dequantizing(config)


def _check_shapes(model: Any, files: Mapping[str, Any]) -> None:
    """Refuse linears whose stored shape is not the model's."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        file, entry = files.get(f"{name}.weight", (None, {}))
        shape = [layer.out_features, layer.in_features]
        if file and entry["shape"] != shape:
            raise FormatError(
                f"shape {entry['shape']}, config.json makes it {shape}",
                file=file,
                tensor=f"{name}.weight",
            )


def _check_loading(source: Checkpoint, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a load that left a tensor random, or one of the file unused: transformers warns."""
    for name in sorted(info["missing_keys"]):
        raise FormatError("is missing", file=source.path, tensor=name)
    for name, got, want in sorted(info["mismatched_keys"]):
        raise FormatError(
            f"shape {list(got)}, the model has {list(want)}",
            file=source.files.get(name, source.path),
            tensor=name,
        )
    if source.compressed:
        for name in sorted(info["unexpected_keys"]):
            raise FormatError(
                "does not belong to this model", file=source.files.get(name), tensor=name
            )
    check_extra(model, info["unexpected_keys"], source.files, source.path)
