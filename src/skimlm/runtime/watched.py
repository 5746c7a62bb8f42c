"""Noticing that a module may have changed without looking at it.

To look at all modules and tensors of a small model takes a fifth of the time of its token: since
the last one the weights have passed through the processor's caches, so every object is far away.
Between two tokens of a sequence decode.py therefore looks at little, and asks `events` whether
anything was done to a module that this can miss:

    torch's own notes   a hook, module, parameter or buffer was registered, on any module
    `Watched`           an attribute or tensor of one of our layers was read or set from outside

The counts only grow. Equal ones mean that nothing of the kind has happened in this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry
from torch.utils.hooks import RemovableHandle

_seen = {"registered": 0, "touched": 0}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ANY_MODULE = [  # hooks that are called whatever the module
    getattr(registry, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def events() -> tuple[int, int, int]:
    """Hooks, registrations and uses of our layers so far, in this process."""
    return RemovableHandle.next_id, _seen["registered"], _seen["touched"]


@functools.cache
def start() -> None:
    """Have torch report every registration from now on."""

    def note(*_: Any) -> None:
        _seen["registered"] += 1

    registry.register_module_module_registration_hook(note)
    registry.register_module_parameter_registration_hook(note)
    registry.register_module_buffer_registration_hook(note)


def untouched(module: nn.Module) -> bool:
    """No forward of its own, no hook, not in training."""
    own = module.__dict__
    return not (module.training or "forward" in own or any(own[kind] for kind in HOOKS))


class Watched(nn.Module):
    """A module that notes when it is changed, or when its tensors are taken in hand."""

    def __setattr__(self, name: str, value: Any) -> None:
        _seen["touched"] += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _seen["touched"] += 1
        super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:  # of parameters and buffers: not in __dict__
        if not torch.compiler.is_compiling():
            _seen["touched"] += 1
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        _seen["touched"] += 1
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _seen["touched"] += 1
        super()._load_from_state_dict(*args, **kwargs)
