"""Low-rank adapters of a compressed model, trained through their rounding; nothing else moves."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from skimlm.format.pack import Adapter, unpack_adapter
from skimlm.models.head import final_hidden
from skimlm.models.hooks import frozen
from skimlm.runtime.linear import CompressedLinear
from skimlm.train.loop import Objective, descend, evenly
from skimlm.train.losses import (
    Loss,
    backward,
    cross_entropy,
    kl_divergence,
    loss_sum,
    next_tokens,
)
from skimlm.train.straight_through import factor_codes, rounded_factor

Progress = Callable[[str, int, int], None]
HELD_OUT = 16  # windows, at most an eighth of all
CHECKS = 5  # times the held-out loss is measured along the way

Values: TypeAlias = Mapping[str, Tensor]  # a.NAME [k, c] and b.NAME [k, r] of every adapter


def adapted(model: nn.Module) -> dict[str, CompressedLinear]:
    """The linears that have an adapter, by name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    return {name: layer for name, layer in layers.items() if layer.spec.rank}


def stored_adapter(layer: CompressedLinear) -> Adapter:
    """The adapter of a linear that has one, as it is stored."""
    adapter = unpack_adapter(layer.layer)
    assert adapter is not None
    return adapter


def train(
    model: Any,
    layers: Mapping[str, CompressedLinear],
    ids: Tensor,
    unseen: Tensor,
    order: list[list[int]],
    loss_of: Callable[[Tensor], Loss],
    lr: float,
    state_file: Path | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[dict[str, Adapter], list[float]]:
    """The best adapters seen, and the losses on `unseen` [m, t] at the start and at each check.

    Step i reads the windows `ids[order[i]]`; `loss_of(windows)` is what is brought down. `model` is
    left as it was.
    """
    before = {name: stored_adapter(layer) for name, layer in layers.items()}
    scales = {f"{f}.{n}": getattr(q, f"{f}_scale") for n, q in before.items() for f in "ab"}
    exact = {f"{f}.{n}": x for n, q in before.items() for f, x in _named(q).items()}
    units = {n: component_size(x) for n, x in exact.items()}
    steps, total = len(order), sum(map(len, order))
    done = list(itertools.accumulate(map(len, order)))

    def factor(name: str, theta: Tensor) -> Tensor:
        return rounded_factor(theta * units[name], scales[name])

    with frozen(model):
        tests = [(part, loss_of(part)) for part in unseen.split(len(order[0]))]

        def held_out(values: dict[str, Tensor]) -> float:
            with torch.no_grad(), _placed(layers, {n: factor(n, v) for n, v in values.items()}):
                total = sum(loss_sum(loss, final_hidden(model, part)) for part, loss in tests)
            return total / sum(loss.tokens for _, loss in tests)

        def gradients(values: dict[str, Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
            part = ids[order[step]]
            loss = loss_of(part)
            leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
            with _placed(layers, {n: factor(n, v) for n, v in leaves.items()}):
                backward(loss, final_hidden(model, part))
            return {n: (leaf.grad, lr) for n, leaf in leaves.items() if leaf.grad is not None}

        state = descend(
            {n: x / units[n] for n, x in exact.items()},
            Objective(gradients, held_out),
            steps,
            checks=evenly(steps, CHECKS),
            file=state_file,
            progress=lambda step: progress("finetune", done[step - 1], total),
        )
    best = {n: factor_codes(v * units[n], scales[n]) for n, v in state.best.items()}
    adapters = {
        n: dataclasses.replace(q, a=best[f"a.{n}"], b=best[f"b.{n}"]) for n, q in before.items()
    }
    return (adapters if min(state.losses) < state.losses[0] else before), state.losses


def component_size(factor: Tensor) -> Tensor:
    """Root mean square of every component of a factor [k, n], [k, 1]: the unit it moves in."""
    return factor.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def _named(adapter: Adapter) -> dict[str, Tensor]:
    return dict(zip("ab", adapter.values(), strict=True))


@contextmanager
def _placed(layers: Mapping[str, CompressedLinear], values: Values) -> Iterator[None]:
    """Within the block the linears compute with these factors of their adapters."""
    try:
        for name, layer in layers.items():
            layer.adapter = values[f"a.{name}"], values[f"b.{name}"]
        yield
    finally:
        for layer in layers.values():
            layer.adapter = None


def next_token_loss(model: Any) -> Callable[[Tensor], Loss]:
    """Of windows [n, t]: -log p(next token); the last token of a window predicts none."""
    return lambda ids: cross_entropy(model, next_tokens(ids))


def teacher_loss(model: Any, teacher: Any) -> Callable[[Tensor], Loss]:
    """Of windows [n, t]: KL(teacher || model) over all tokens."""

    def loss_of(ids: Tensor) -> Loss:
        with torch.no_grad():
            known = final_hidden(teacher, ids).flatten(0, 1)
        return kl_divergence(model, known, teacher)

    return loss_of
