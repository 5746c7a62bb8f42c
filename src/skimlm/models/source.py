"""The decoder blocks of a model, with their numbers only while they are used.

    source = open_source(checkpoint, streamed)
    with source.loaded(blocks):                    numbers of these blocks are there
        state, final = source.run(blocks, ids, state)

A model in memory has its numbers always; of one that is streamed, from safetensors or a GGUF, only
what stands outside its blocks is loaded, and each block is read when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skimlm.errors import FormatError, SkimError, one_line
from skimlm.models.architecture import skeleton
from skimlm.models.blocks import decoder_blocks, embeddings
from skimlm.models.carried import HIDDEN, State, left, put
from skimlm.models.checkpoint import Checkpoint, load
from skimlm.models.dequantize import quantizer_of
from skimlm.models.folder_tensors import FolderTensors
from skimlm.models.gguf_tensors import GgufTensors
from skimlm.models.head import final_hidden
from skimlm.models.hooks import forwards_replaced
from skimlm.models.probe import passing, structure_of
from skimlm.models.structure import Origin, Structure, separate
from skimlm.models.tensors import check_extra, untie

Span = range  # numbers of blocks that follow each other


class Tensors(Protocol):
    """The tensors of a checkpoint, by their names in the model."""

    @property
    def names(self) -> Collection[str]: ...

    @property
    def path(self) -> Path: ...

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Path]]:
        """These tensors, each with its file, floats in the dtype of the model."""
        ...


@dataclass(frozen=True)
class BlockSource:
    """A model of which blocks are loaded when their turn comes, or that is in memory as a whole."""

    model: Any
    tensors: Tensors | None = None  # None: the model is in memory
    structure: Structure | None = None  # None: it is found when it is needed

    @property
    def streamed(self) -> bool:
        """Whether blocks are loaded one at a time."""
        return self.tensors is not None

    @cached_property
    def blocks(self) -> list[str]:
        """Names of the blocks, in order."""
        return [name for name, _ in decoder_blocks(self.model)]

    @property
    def spans(self) -> list[Span]:
        """The blocks that are in memory together: all of them, or each alone."""
        count = len(self.blocks)
        return [range(i, i + 1) for i in range(count)] if self.streamed else [range(count)]

    def module(self, i: int) -> Any:
        """Block `i`."""
        return self.model.get_submodule(self.blocks[i])

    @contextmanager
    def loaded(self, span: Span, but: Collection[str] = ()) -> Iterator[None]:
        """Within the block these decoder blocks have their numbers, those of tensors `but` not."""
        if len(span) < len(self.blocks):
            _ = self.known  # found before the caller watches what runs
        with self._filled(span, but):
            yield

    @contextmanager
    def _filled(self, span: Span, but: Collection[str]) -> Iterator[None]:
        if self.tensors is None:
            yield
            return
        every = (f"{self.blocks[i]}.{name}" for i in span for name in self.module(i).state_dict())
        names = [name for name in every if name not in but]
        slots = [_slot(self.model, name) for name in names]
        empty = [place[own] for place, own in slots]
        try:
            _put(self.model, names, self.tensors)
            yield
        finally:
            for (place, own), tensor in zip(slots, empty, strict=True):
                place[own] = tensor

    def run(self, span: Span, ids: Tensor, state: State | None) -> tuple[State, Tensor]:
        """What blocks make of `state`, and what the body returns after the last of all [n, t, d].

        The model's own forward pass on `ids` [n, t] gives each block its masks and positions; other
        blocks pass on what they get, as do those that text alone does not reach (mllama's that look
        at an image). Without `state` the first block gets the embeddings.
        """
        count, ends = len(self.blocks), list[State]()
        names = {self.blocks[i]: i for i in range(count) if i not in span}
        names |= {self.blocks[i]: i for i in (span[0], span[-1])}
        carries = len(span) < count and self.known.carries

        def make(name: str, block: Any) -> Callable[..., Any]:
            usual, i = block.forward, names[name]
            if i not in span:
                return passing(self.returns(i), state or {})

            def forward(*args: Any, **kwargs: Any) -> Any:
                if i == span[0] and state is not None:
                    args, kwargs = _replaced(state[HIDDEN], args, kwargs)
                    put(state, kwargs)
                out = usual(*args, **kwargs)
                if i == span[-1]:
                    hidden = out[0] if isinstance(out, tuple) else out
                    ends.append({HIDDEN: hidden} | (left(out, kwargs) if carries else {}))
                return out

            return forward

        with ExitStack() as stack:
            inside = {n: self.model.get_submodule(n) for n in names}
            stack.enter_context(forwards_replaced(inside, make))
            if state is None and torch.is_grad_enabled():  # so that the blocks have gradients
                hook = self.model.get_input_embeddings().register_forward_hook(_asks_gradient)
                stack.callback(hook.remove)
            final = final_hidden(self.model, ids)
        if not ends and state is None:
            raise SkimError(f"{self.blocks[span[0]]}: does not run on text alone")
        return (ends[-1] if ends else state or {}), final

    @cached_property
    def known(self) -> Structure:
        """What the blocks give each other."""
        return self.structure or structure_of(self.model)

    def returns(self, i: int) -> int:
        """How many values block `i` returns, 0 for hidden states alone or where it does not run.

        Where blocks need of each other what is not handed on, none can be run alone: a SkimError.
        """
        if why := self.known.joined:
            raise SkimError(
                f"{type(self.model).__name__} cannot be run block by block, as method slim and "
                f"models that are streamed are: {why}"
            )
        return self.known.returns.get(self.blocks[i], 0)


def _asks_gradient(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out.requires_grad_()


def _replaced(hidden: Tensor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def open_source(
    source: Checkpoint, streamed: bool, tokenizer: Any = None, dtype: torch.dtype = torch.bfloat16
) -> BlockSource:
    """The blocks of a model; `streamed`: they are on the meta device until they are used.

    Raises SkimError for a checkpoint to stream whose tensors are not named as the model names them.
    """
    if not streamed:
        whole = load(source, dtype, tokenizer=tokenizer)[0]
        separate(whole, source.structure.layout)
        return BlockSource(whole, None, source.structure)
    if shared := sorted(source.structure.shared):
        raise SkimError(
            f"{source.path}: blocks share weights ({shared[0]}): such a model must fit in memory "
            "to be compressed"
        )
    model = _skeleton(source, dtype)
    tensors: Tensors
    if source.gguf:
        tensors = GgufTensors.open(source.path, model, dtype)
    else:
        # as the family builds it: conversions look at its parameters
        built = skeleton(source.path, source.config, dtype) if source.structure.layout else model
        quantizer = quantizer_of(source.undone)
        tensors = FolderTensors.open(source.path, source.files, built, quantizer)
        check_extra(model, tensors.unused, source.files, source.path)
    apart = Separated(tensors, separate(model, source.structure.layout))
    inside = tuple(f"{prefix}." for prefix, _ in decoder_blocks(model))
    _put_outside(model, apart, inside)
    _as_loaded(model, inside)
    _empty_buffers(model, inside)
    if not embeddings(model)[2]:
        untie(model.config)
    return BlockSource(model.eval(), apart, source.structure)


def _empty_buffers(model: Any, inside: tuple[str, ...]) -> None:
    """Buffers of blocks that a checkpoint stores are read with them, like parameters."""
    for name in model.state_dict():
        if name.startswith(inside):
            place, own = _slot(model, name)
            place[own] = place[own].to("meta")


def _put_outside(model: Any, tensors: Tensors, inside: tuple[str, ...]) -> None:
    """Read everything that stands outside the blocks; tied tensors are one."""
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    tied = model.all_tied_weights_keys
    # of two tied tensors either may be stored; both, if stored, are equal (`untie_stored`)
    absent = {n for pair in tied.items() for n in pair if n not in tensors.names}
    if both := [pair for pair in tied.items() if absent.issuperset(pair)]:
        absent -= set(both[0])  # reported as missing
    _put(model, [name for name in names if name not in absent], tensors)
    for name, kept in tied.items():
        if kept in absent:
            place, slot = _slot(model, kept)
            place[slot] = model.get_parameter(name)
    model.tie_weights()


def _as_loaded(model: Any, inside: tuple[str, ...]) -> None:
    """What a family still does to tensors that were read: youtu's padding token becomes zero."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(inside):
            tensor._is_hf_initialized = True  # not to be made up
    blocks = {module for _, block in decoder_blocks(model) for module in block.modules()}
    for module in model.modules():
        module._is_hf_initialized = module in blocks
    model.initialize_weights()


def _skeleton(source: Checkpoint, dtype: torch.dtype) -> Any:
    """A model whose parameters are on the meta device."""
    from transformers import GenerationConfig

    model = skeleton(source.path, source.config, dtype)
    if (source.path / "generation_config.json").is_file():
        with one_line(source.path, "cannot be loaded"):
            model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model


@dataclass(frozen=True)
class Separated:
    """The tensors of a checkpoint where matrices that a family keeps otherwise are apart."""

    tensors: Tensors
    origins: Mapping[str, Origin]  # of weights, by their names in the separated model

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return self.tensors.path

    @cached_property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        there = self.tensors.names
        apart = {name for name, origin in self.origins.items() if origin.name in there}
        return (set(there) - {origin.name for origin in self.origins.values()}) | apart

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Path]]:
        """These tensors, each with its file; what is kept together is read once."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            own = self.origins[name].name if name in self.origins else name
            wanted.setdefault(own, []).append(name)
        for kept, tensor, file in self.tensors.read(list(wanted)):
            for name in wanted[kept]:
                origin = self.origins.get(name)
                yield name, origin.take(tensor) if origin else tensor, file


def _put(model: nn.Module, names: Sequence[str], tensors: Tensors) -> None:
    """Read tensors of a checkpoint into the model."""
    for name in names:
        if name not in tensors.names:
            raise FormatError(
                "is not in the checkpoint under this name: such a model must fit in memory to be "
                "compressed",
                file=tensors.path,
                tensor=name,
            )
    for name, tensor, file in tensors.read(names):
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
