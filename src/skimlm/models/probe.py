"""A run of a model's blocks without numbers: what they do with their matrices.

The weights are all zero and take no memory; a product with one is not computed, only noted. So
whatever a module does with a matrix is seen, by means that know no family:

    its own `forward`                  nn.Linear, its subclasses, Conv1D: a linear to compress
    taken from a stack, multiplied     experts: as many linears, in a `Stack` (experts.py)
    anything else                      stays as it is

Then each block is run alone, the others passing on what they get, as a walk over the blocks does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from skimlm.errors import first_line
from skimlm.models.blocks import decoder_blocks, decoder_of, embeddings
from skimlm.models.carried import State, left, put, returned
from skimlm.models.hooks import forwards_replaced
from skimlm.models.structure import Structure
from skimlm.runtime.experts import BATCHED, PRODUCTS

TOKENS = 2  # of the run
# functions whose result is noted like the whole
PARTS = (Tensor.__getitem__, Tensor.T.__get__, Tensor.t)  # type: ignore[attr-defined]
DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]


class _Empty(Tensor):
    """Zeros that note what is done with them; `source` is the parameter, `turned` if transposed."""

    source: str
    turned: bool
    notes: _Notes

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, source: str, notes: _Notes) -> _Empty:
        zero = torch.zeros((), dtype=dtype).expand(tuple(shape)).as_subclass(cls)
        zero.source, zero.turned, zero.notes = source, False, notes
        return zero

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        empty = next((x for x in (*args, *kwargs.values()) if isinstance(x, cls)), None)
        with torch._C.DisableTorchFunctionSubclass():
            if empty is None:
                return func(*args, **kwargs)
            product = _product(func, args)
            if product is not None:
                empty.notes.multiplied(args[1], product)
                out = empty.notes.made(args[1], _plain(args[0]), product.shape)
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return out if bias is None else out + _plain(bias)
            if (
                func.__name__.endswith("_")
                and args[0] is empty
                and not func.__name__.startswith("_")
            ):
                empty.notes.used(empty.source)  # written into: there is nothing to write
                return empty
            out = func(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
            if func == DTYPE:  # what is cast to it would become codes
                empty.notes.used(empty.source)
            if not isinstance(out, Tensor):
                return out
            if args and args[0] is empty and func in PARTS:
                return _part(func, empty, out)
            if empty.ndim >= 2:
                empty.notes.used(empty.source)
            return out.contiguous()  # to write into


@dataclass(frozen=True)
class _Product:
    shape: tuple[int, ...]
    transposed: bool  # x W rather than x W^T


def _product(func: Callable[..., Any], args: Sequence[Any]) -> _Product | None:
    """What `func` multiplies, if it is x W^T or x W with an empty W."""
    if len(args) < 2 or not isinstance(args[1], _Empty) or isinstance(args[0], _Empty):
        return None
    x, w = args[0], args[1]
    if func is F.linear and w.ndim == 2:
        return _Product((*x.shape[:-1], w.shape[0]), w.turned)
    if func in PRODUCTS and w.ndim == 2:
        return _Product((*x.shape[:-1], w.shape[1]), not w.turned)
    if func in BATCHED and w.ndim == 3 == x.ndim:
        return _Product((*x.shape[:-1], w.shape[2]), True)
    return None


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, _Empty) else value


def _part(func: Callable[..., Any], empty: _Empty, out: Tensor) -> _Empty:
    part = out.as_subclass(_Empty)
    part.source, part.notes = empty.source, empty.notes
    part.turned = empty.turned if func is Tensor.__getitem__ else not empty.turned
    return part


@dataclass
class _Notes:
    """What was seen of the parameters with two dimensions or more."""

    ways: dict[str, set[bool]] = field(default_factory=dict)  # multiplied: transposed?
    others: set[str] = field(default_factory=set)  # anything else was done
    inside: list[str] = field(default_factory=list)  # linears that run
    # what was added to each product: has it a gradient?
    ends: list[tuple[str, Tensor]] = field(default_factory=list)

    def multiplied(self, weight: _Empty, product: _Product) -> None:
        if weight.source not in (f"{n}.weight" for n in self.inside):
            self.ways.setdefault(weight.source, set()).add(product.transposed)

    def made(self, weight: _Empty, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The product, which comes from x and whose gradient can be asked for."""
        end = x.new_zeros((), requires_grad=True)
        self.ends.append((self.inside[-1] if self.inside else weight.source, end))
        return x.new_zeros(shape) + end + x.flatten()[:0].sum()

    def choosing(self, logits: Tensor) -> set[str]:
        """Linears that ran, but whose output no logit has a gradient of: it chooses something."""
        grads = torch.autograd.grad(logits.sum(), [e for _, e in self.ends], allow_unused=True)
        names = [name for name, _ in self.ends]
        moving = {name for name, grad in zip(names, grads, strict=True) if grad is not None}
        return set(names) - moving if moving else set()

    def used(self, source: str) -> None:
        if source not in (f"{n}.weight" for n in self.inside):
            self.others.add(source)


def structure_of(model: Any) -> Structure:
    """Run `model`, which keeps its buffers but needs no numbers, on two tokens."""
    notes, found, blocks = _Notes(), Structure(), decoder_blocks(model)
    linears = {
        name: module
        for prefix, block in blocks
        for name, module in block.named_modules(prefix=prefix)
        if _is_linear(module)
    }
    table, head, _ = embeddings(model)
    tables = dict([table, *([head] if head else [])])
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with ExitStack() as stack:
        stack.enter_context(_without_numbers(model, notes))
        stack.enter_context(_eager_experts(model))
        stack.enter_context(torch.enable_grad())  # so that it is seen what a family runs without
        stack.enter_context(_evaluating(model))
        stack.enter_context(forwards_replaced(linears | tables, _noting(notes)))
        handed: dict[str, State] = {}
        with forwards_replaced(dict(blocks), _counting(found.returns, handed)):
            logits: list[Tensor] = []
            found.failed = _raised(
                lambda: logits.append(model(input_ids=ids, use_cache=False).logits)
            )
        choosing = set[str]()
        if logits:
            _raised(lambda: choosing.update(notes.choosing(logits[0])))
        found.joined = found.failed or _alone(model, dict(blocks), ids, found.returns)
        if found.joined and not found.failed:
            why = _alone(model, dict(blocks), ids, found.returns, handed)
            found.joined, found.carries = why, not why
    _read_notes(model, blocks, linears, notes, choosing, found)
    found.silent -= {f"{name}.weight" for name in tables}
    tied = {n.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for n in pair}
    found.shared = tied & linears.keys()
    for name in tables:
        if f"{name}.weight" in notes.others or f"{name}.weight" in notes.ways:
            found.tables = f"{name} is looked at by other code"
    return found


def _raised(run: Callable[[], Any]) -> str:
    """What a family's own code, which may raise anything, raises."""
    try:
        run()
    except Exception as error:
        return first_line(error) or type(error).__name__
    return ""


def _counting(
    returns: dict[str, int], handed: dict[str, State]
) -> Callable[[str, Any], Callable[..., Any]]:
    """Note how many values a block returns, and what it hands on besides hidden states."""

    def make(name: str, block: Any) -> Callable[..., Any]:
        usual = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            out = usual(*args, **kwargs)
            returns[name] = len(out) if isinstance(out, tuple) else 0
            handed[name] = left(out, kwargs)
            return out

        return forward

    return make


def passing(returns: int, state: State) -> Callable[..., Any]:
    """The forward of a block that passes on the hidden states it gets, and what else there is."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *returned(state, returns)) if returns else given

    return forward


def _alone(
    model: Any,
    blocks: Mapping[str, Any],
    ids: Tensor,
    returns: Mapping[str, int],
    handed: Mapping[str, State] | None = None,
) -> str:
    """Why some block cannot be run alone, empty if each can; with what those before it `handed`."""
    state: State = {}
    for name in blocks:

        def make(n: str, block: Any, name: str = name, state: State = state) -> Any:
            usual = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                put(state, kwargs)
                return usual(*args, **kwargs)

            return forward if n == name else passing(returns.get(n, 0), state)

        with forwards_replaced(blocks, make):
            if why := _raised(lambda: decoder_of(model)(input_ids=ids, use_cache=False)):
                return f"{name}: {why}"
        state = (handed or {}).get(name, {})
    return ""


def _read_notes(
    model: Any,
    blocks: Sequence[tuple[str, nn.Module]],
    linears: Mapping[str, nn.Module],
    notes: _Notes,
    choosing: Collection[str],
    found: Structure,
) -> None:
    for prefix, block in blocks:
        for name, parameter in block.named_parameters(prefix=prefix):
            ways = notes.ways.get(name, set())
            if parameter.ndim == 3 and len(ways) == 1 and name not in notes.others:
                found.layout[name] = ways.pop()
    inside = tuple(f"{name}." for name, _ in blocks)
    met = notes.ways.keys() | notes.others
    if not found.failed:
        found.silent = {
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not name.startswith(inside) and name not in met
        }
    unreached = tuple(f"{name}." for name, _ in blocks if name not in found.returns)
    for name, module in linears.items():
        weight = f"{name}.weight"
        if not found.failed and name.startswith(unreached):
            found.unreached.add(name)
        elif name in choosing:
            found.routers.add(name)
        elif weight in notes.others or weight in notes.ways:
            found.by_hand.add(name)
        elif type(module) is not nn.Linear:
            found.layout[weight] = isinstance(module, Conv1D)
    for stack in (n for n in found.layout if model.get_parameter(n).ndim == 3):
        count, parent = model.get_parameter(stack).shape[0], stack.rpartition(".")[0]
        beside = f"{parent.rpartition('.')[0]}."
        found.routers |= {
            n for n, m in linears.items() if n.startswith(beside) and _outputs(m) == count
        }


def _outputs(module: Any) -> int:
    return module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return _multiplies(type(module), module.bias is not None)
    return isinstance(module, Conv1D)


def _multiplies(kind: type[nn.Linear], bias: bool) -> bool:
    """Whether a subclass of nn.Linear is x W^T + bias and nothing else."""
    if kind.forward is nn.Linear.forward:
        return True
    probe = kind.__new__(kind)
    nn.Linear.__init__(probe, 3, 2, bias)
    x = torch.randn(4, 3)
    try:
        return torch.allclose(probe(x), F.linear(x, probe.weight, probe.bias), atol=1e-5)
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False


def _noting(notes: _Notes) -> Callable[[str, Any], Callable[..., Any]]:
    def make(name: str, module: Any) -> Callable[..., Any]:
        usual = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            notes.inside.append(name)
            try:
                return usual(*args, **kwargs)
            finally:
                notes.inside.pop()

        return forward

    return make


@contextmanager
def _without_numbers(model: nn.Module, notes: _Notes) -> Iterator[None]:
    """Within the block every parameter is an empty one."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            for own, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                name = f"{path}.{own}" if path else own
                kind = parameter.dtype
                module._parameters[own] = _Empty.of(parameter.shape, kind, name, notes)
                stack.callback(module._parameters.__setitem__, own, parameter)
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model does not train."""
    before = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(before)


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Within the block experts run a family's own code, not that for whole stacks."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, getattr(c, "_experts_implementation", None)) for c in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, usual in before:
            config._experts_implementation = usual
