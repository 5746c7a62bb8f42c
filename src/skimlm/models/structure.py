"""How a family's blocks keep their matrices, found by running them once without numbers.

    structure_of(model)        what is multiplied, and in which way: of a model on the meta device
    separate(model, layout)    every matrix that can be is an `nn.Linear` of its own
    join(model, layout)        the same numbers as the family keeps them

The run is on weights that are all zero and take no memory; a product with one is not computed, only
noted. So whatever a module does with a matrix is seen, by family-independent means:

    its own `forward`                  nn.Linear, its subclasses, Conv1D: a linear to compress
    taken from a stack, multiplied     experts: as many linears, in a `Stack` (experts.py)
    anything else                      stays as it is
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from skimlm.errors import first_line
from skimlm.models.blocks import decoder_blocks
from skimlm.models.experts import PRODUCTS, Stack
from skimlm.models.hooks import forwards_replaced

TOKENS = 2  # of the run
# functions whose result is noted like the whole
PARTS = (Tensor.__getitem__, Tensor.T.__get__, Tensor.t)  # type: ignore[attr-defined]
# a parameter that is kept in another way than as the weight of an nn.Linear -> is it transposed?
Layout = Mapping[str, bool]


@dataclass
class Structure:
    """What the blocks of a model do with their matrices."""

    layout: dict[str, bool] = field(default_factory=dict)
    by_hand: set[str] = field(default_factory=set)  # linears whose weight their parent multiplies
    routers: set[str] = field(default_factory=set)  # linears that choose among experts
    failed: str = ""  # why the run came to nothing: then only what is an nn.Linear is known

    @property
    def dense(self) -> set[str]:
        """Linears that stay as they are."""
        return self.by_hand | self.routers


@dataclass(frozen=True)
class Origin:
    """Where a family keeps the weight of a linear."""

    name: str
    index: int | None  # in a stack
    transposed: bool

    def take(self, kept: Tensor) -> Tensor:
        """The weight [out, in]."""
        part = kept if self.index is None else kept[self.index]
        return part.T.contiguous() if self.transposed else part


# ---- the run


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
                out = _plain(args[0]).new_zeros(product.shape)
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return out if bias is None else out + _plain(bias)
            out = func(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
            if not isinstance(out, Tensor):
                return out
            if args and args[0] is empty and func in PARTS:
                return _part(func, empty, out)
            if empty.ndim >= 2:
                empty.notes.used(empty.source)
            return out


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
    if func in (torch.bmm, Tensor.bmm, *PRODUCTS) and w.ndim == 3 == x.ndim:
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
    called: set[str] = field(default_factory=set)

    def multiplied(self, weight: _Empty, product: _Product) -> None:
        if weight.source not in (f"{n}.weight" for n in self.inside):
            self.ways.setdefault(weight.source, set()).add(product.transposed)

    def used(self, source: str) -> None:
        if source not in (f"{n}.weight" for n in self.inside):
            self.others.add(source)


def structure_of(model: Any) -> Structure:
    """Run the blocks of `model`, which keeps its buffers but no numbers, on two tokens."""
    notes, found = _Notes(), Structure()
    linears = {
        name: module
        for prefix, block in decoder_blocks(model)
        for name, module in block.named_modules(prefix=prefix)
        if _is_linear(module)
    }
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with ExitStack() as stack:
        stack.enter_context(_without_numbers(model, notes))
        stack.enter_context(_eager_experts(model))
        stack.enter_context(forwards_replaced(linears, _noting(notes)))
        stack.enter_context(torch.no_grad())
        try:
            model.get_decoder()(input_ids=ids, use_cache=False)
        except Exception as error:  # a family's own code, which may raise anything
            found.failed = first_line(error)
    _read_notes(model, linears, notes, found)
    return found


def _read_notes(
    model: Any, linears: Mapping[str, nn.Module], notes: _Notes, found: Structure
) -> None:
    for prefix, block in decoder_blocks(model):
        for name, parameter in block.named_parameters(prefix=prefix):
            ways = notes.ways.get(name, set())
            if parameter.ndim == 3 and len(ways) == 1 and name not in notes.others:
                found.layout[name] = ways.pop()
    for name, module in linears.items():
        weight = f"{name}.weight"
        if weight in notes.others or weight in notes.ways:
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
            notes.called.add(name)
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


# ---- apart, and as they were


def separate(model: Any, layout: Layout) -> dict[str, Origin]:
    """Give every matrix of `layout` a linear of its own; where each weight was, by its new name."""
    origins: dict[str, Origin] = {}
    for name, transposed in layout.items():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        kept = getattr(module, own)
        if kept.ndim == 3:
            del module._parameters[own]
            linears = [_linear(w, transposed, None) for w in kept.detach()]
            module.add_module(own, Stack(linears, transposed))
            origins |= {f"{name}.{i}.weight": Origin(name, i, transposed) for i in range(len(kept))}
            if hasattr(module, "config"):  # or it would be dispatched to code for whole stacks
                module.config._experts_implementation = "eager"
        else:
            model.set_submodule(path, _linear(kept.detach(), transposed, module.bias))
            origins[name] = Origin(name, None, transposed)
    return origins


def stacks(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Those linears that are experts, by their stacks."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent = name.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), Stack):
            found.setdefault(parent, []).append(name)
    return list(found.values())


def _linear(kept: Tensor, transposed: bool, bias: nn.Parameter | None) -> nn.Linear:
    weight = kept.T.contiguous() if transposed else kept
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = bias
    return linear


def join(model: Any, layout: Layout, like: Any) -> None:
    """Put dense matrices back where the family keeps them; `like` is a model as it is built."""
    for name, transposed in layout.items():
        path, _, own = name.rpartition(".")
        if like.get_parameter(name).ndim == 3:
            module = model.get_submodule(path)
            stack = getattr(module, own)
            dense = stack.dense(stack.dtype)
            del module._modules[own]
            module.register_parameter(own, nn.Parameter(dense, requires_grad=False))
            continue
        old, new = model.get_submodule(path), like.get_submodule(path)
        weight = old.weight.detach()
        new.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        if getattr(new, "bias", None) is not None:
            new.bias = old.bias
        model.set_submodule(path, new)
