"""A folder of safetensors read a tensor at a time, under the names that the model gives them.

Names and numbers of a checkpoint are not always those of the model: transformers renames, stacks
and splits tensors as it loads them (its weight conversions). The same conversions run here, for the
few tensors that are asked for: each is bit for bit the one `from_pretrained` gives.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from skimlm.errors import one_line


@dataclass(frozen=True)
class _Group:
    """Tensors of a checkpoint that become one tensor of the model, or several at once."""

    first: str  # the model's name of the first
    converter: Any  # None: the one tensor is taken as it is
    sources: list[tuple[str, str]]  # (name in the checkpoint, pattern of the converter)


@dataclass(frozen=True)
class FolderTensors:
    """The tensors of a folder."""

    path: Path
    files: Mapping[str, Path]  # by their names in the checkpoint
    dtypes: Mapping[str, torch.dtype]  # of floats, by their names in the model
    groups: Mapping[str, _Group]  # by names in the model
    unused: tuple[str, ...]  # names in the checkpoint that become nothing of the model
    model: Any
    quantizer: Any = None  # transformers' own, where tensors are read in codes

    @classmethod
    def open(
        cls, path: Path, files: Mapping[str, Path], model: Any, quantizer: Any = None
    ) -> FolderTensors:
        """The tensors of a folder for a model, which may be on the meta device; none is read."""
        own = model.state_dict()
        groups, unused = _groups(model, files, own, quantizer)
        kept = model._get_dtype_plan(model.dtype)
        special = {re.compile(p.replace("*", ".*")): kind for p, kind in kept.items()}
        dtypes = {
            name: next((kind for regex, kind in special.items() if regex.search(name)), like.dtype)
            for name, like in own.items()
        }
        return cls(path, files, dtypes, groups, tuple(unused), model, quantizer)

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self.groups.keys()

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Path]]:
        """These tensors, each with a file that it comes from."""
        left = dict.fromkeys(names)
        with ExitStack() as opened:
            # once, however many tensors come from it: a block of experts has hundreds
            stream = cache(lambda file: opened.enter_context(safe_open(file, framework="pt")))
            for name in names:
                if name not in left:
                    continue
                group = self.groups[name]
                for made, tensor in self._converted(group, stream).items():
                    if made in left:
                        del left[made]
                        yield made, tensor, self.files[group.sources[0][0]]

    def _converted(self, group: _Group, stream: Callable[[Path], Any]) -> dict[str, Tensor]:
        dtype = self.dtypes[group.first]
        if group.converter is None:
            return {group.first: self._read(group.sources[0][0], dtype, stream)}
        converter = copy.deepcopy(group.converter)
        for name, pattern in group.sources:
            read = partial(self._read, name, dtype, stream, converter)
            converter.add_tensor(group.first, name, pattern, read)
        with one_line(self.path, f"{group.first}: cannot be put together"):
            made = converter.convert(
                group.first, model=self.model, config=self.model.config, hf_quantizer=self.quantizer
            )
        tensors = {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def _read(
        self, name: str, dtype: torch.dtype, stream: Callable[[Path], Any], converter: Any = None
    ) -> Tensor:
        tensor: Tensor = stream(self.files[name]).get_tensor(name)
        kept = dtype
        if self.quantizer is not None and converter is not None:  # what it undoes, as it is stored
            kept = self.quantizer.get_new_dtype(converter, tensor, dtype) or tensor.dtype
        # a copy: views of a file are not aligned, and stay in memory while they are used
        return tensor.to(kept, copy=True) if tensor.is_floating_point() else tensor


def _groups(
    model: Any, names: Collection[str], own: Mapping[str, Tensor], quantizer: Any
) -> tuple[dict[str, _Group], list[str]]:
    """What becomes of the tensors of a checkpoint, by the names of what they become."""
    conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, groups, unused = model.base_model_prefix, dict[str, _Group](), []
    for stored in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, own)
        if name not in own and stored in own:
            name, pattern = rename_source_key(stored, [], [], prefix, own)
        if name not in own:
            unused.append(stored)
        elif name not in groups:
            converter = None if pattern is None else by_pattern[pattern]
            group = _Group(name, converter, [(stored, pattern or "")])
            for made in _made(name, converter):
                groups[made] = group
        elif groups[name].converter is not None:
            groups[name].sources.append((stored, pattern or ""))
    return groups, unused


def _made(first: str, converter: Any) -> list[str]:
    """The names that a converter gives what it makes."""
    if converter is None:
        return [first]
    targets = converter.target_patterns
    return [first.replace(targets[0], target) for target in targets]
