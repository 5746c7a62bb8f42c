"""How a family's blocks keep their matrices, and the same with a linear for each.

Structure                  what a run without numbers has shown (probe.py)
separate(model, layout)    every matrix that can be is an `nn.Linear` of its own
join(model, layout)        the same numbers as the family keeps them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skimlm.runtime.experts import APART, Stack

# a parameter that is kept in another way than as the weight of an nn.Linear -> is it transposed?
Layout = Mapping[str, bool]


@dataclass
class Structure:
    """What the blocks of a model do with their matrices, and what they give each other."""

    layout: dict[str, bool] = field(default_factory=dict)
    by_hand: set[str] = field(default_factory=set)  # linears whose weight other code looks at
    routers: set[str] = field(default_factory=set)  # linears that choose experts, or tokens
    shared: set[str] = field(default_factory=set)  # linears whose weight is another's too
    unreached: set[str] = field(default_factory=set)  # linears of blocks that text does not reach
    silent: set[str] = field(default_factory=set)  # matrices outside blocks that text does not meet
    tables: str = ""  # why embedding and head stay in 16 bits
    returns: dict[str, int] = field(default_factory=dict)  # block -> values in its tuple, 0: none
    joined: str = ""  # why no block can be run without those before it
    carries: bool = False  # blocks hand on more than hidden states, and need it (carried.py)
    failed: str = ""  # why the run came to nothing: then only what is an nn.Linear is known

    @property
    def dense(self) -> set[str]:
        """Linears that stay as they are."""
        return self.by_hand | self.routers | self.shared | self.unreached


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
            module.add_module(own, Stack(linears, transposed).train(module.training))
            origins |= {f"{name}.{i}.weight": Origin(name, i, transposed) for i in range(len(kept))}
            if hasattr(module, "config"):  # or it would be dispatched to code for whole stacks
                module.config._experts_implementation = APART
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


def routed(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those linears that are experts."""
    return {name for stack in stacks(model, names) for name in stack}


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
