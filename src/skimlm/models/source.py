"""A model read a decoder block at a time: the rest in memory, each block while it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from skimlm.errors import FormatError, one_line
from skimlm.models.blocks import decoder_blocks
from skimlm.models.checkpoint import Checkpoint, load_tokenizer
from skimlm.models.tensors import check_extra


def load_outside(
    source: Checkpoint, dtype: torch.dtype = torch.bfloat16, *, tokenizer: Any = None
) -> tuple[Any, Any]:
    """A model whose decoder blocks are on the meta device, all else loaded, and its tokenizer.

    Raises SkimError for a checkpoint whose tensors are not named as the model names them.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = tokenizer or load_tokenizer(source)
    with one_line(source.path, "cannot be loaded"):
        with init_empty_weights(include_buffers=False):  # buffers are made, not stored
            model: Any = AutoModelForCausalLM.from_config(
                source.config, dtype=dtype, trust_remote_code=False
            )
        if (source.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.path)
    inside = tuple(f"{prefix}." for prefix, _ in decoder_blocks(model))
    own = model.state_dict()
    names = [name for name in own if not name.startswith(inside)]
    tied = model.all_tied_weights_keys
    # of two tied tensors either may be stored; both, if stored, are equal (`untie_stored`)
    absent = {n for pair in tied.items() for n in pair if n not in source.files}
    if both := [pair for pair in tied.items() if absent.issuperset(pair)]:
        absent -= set(both[0])  # reported as missing
    _put(source, model, [name for name in names if name not in absent], dtype)
    check_extra(model, source.files.keys() - own.keys(), source.files, source.path)
    for name, kept in tied.items():
        if kept in absent:
            place, slot = _slot(model, kept)
            place[slot] = model.get_parameter(name)
    model.tie_weights()
    return model.eval(), tokenizer


@contextmanager
def loaded_block(source: Checkpoint, model: nn.Module, prefix: str) -> Iterator[nn.Module]:
    """A decoder block with its numbers, which are on the meta device before and after."""
    block = model.get_submodule(prefix)
    names = [f"{prefix}.{name}" for name in block.state_dict()]
    slots = [_slot(model, name) for name in names]
    empty = [place[own] for place, own in slots]
    try:
        _put(source, model, names, next(block.parameters()).dtype)
        yield block
    finally:
        for (place, own), tensor in zip(slots, empty, strict=True):
            place[own] = tensor


def _put(source: Checkpoint, model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Read tensors of a checkpoint into the model, floats as `dtype`."""
    files: dict[Path, list[str]] = {}
    for name in names:
        if name not in source.files:
            raise FormatError(
                "is not in the checkpoint under this name: such a model must fit in memory to be "
                "compressed",
                file=source.path,
                tensor=name,
            )
        files.setdefault(source.files[name], []).append(name)
    for file, here in files.items():
        with safe_open(file, framework="pt") as stream:
            for name in here:
                tensor = stream.get_tensor(name)
                # a copy: views of a file are not aligned, and stay in memory while they are used
                tensor = tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor
                place, own = _slot(model, name)
                if tensor.shape != place[own].shape:
                    raise FormatError(
                        f"shape {list(tensor.shape)}, the model has {list(place[own].shape)}",
                        file=file,
                        tensor=name,
                    )
                parameter = isinstance(place[own], nn.Parameter)
                place[own] = nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a module keeps the tensor called `name`."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if own in module._parameters else module._buffers), own
