"""The one place that changes how a model runs, for the length of a block, and puts it back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block `module` runs `forward(*args, **kwargs)` in place of its own."""
    before = module.__dict__.get("forward")  # accelerate puts one on the instance
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def forwards_replaced(
    modules: Mapping[str, Any], make: Callable[[str, Any], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block every module runs `make(name, module)` in place of its own forward."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(forward_replaced(module, make(name, module)))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter asks for a gradient."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
