"""Predictions held against measurement: what other weights do to the model on text of its own.

Errors in units of the end loss are a prediction: the weights' part of the divergence to second
order, as the calibration text sees it. A few tokens of enormous gradient, or a text that is not
like others, can make it wrong. So it is measured: some windows that nothing was fitted to go
through the blocks once, and beside the model as it is go its trials, each with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skimlm.models.carried import State
from skimlm.models.hooks import forwards_replaced, frozen
from skimlm.models.source import Span
from skimlm.pipeline.walk import Walk, batches
from skimlm.train.losses import kl_divergence, loss_sum


@dataclass(frozen=True)
class Trial:
    """Other weights for some linears: `weight(name, W)` for each of `names`."""

    names: frozenset[str]
    weight: Callable[[str, Tensor], Tensor]


def divergences(walk: Walk, trials: Mapping[str, Trial]) -> dict[str, float]:
    """KL(model || trial) in nats per token over the windows of the walk, for every trial.

    All go block by block: no more than one block has other weights at a time.
    """
    source, count = walk.source, len(walk.source.blocks)
    original: State | None = None
    states: dict[str, State] = {}  # of trials that differ by now
    finals: dict[str, Tensor] = {}
    with torch.no_grad(), frozen(source.model):
        for i in range(count):
            span = range(i, i + 1)
            linears = walk.inside(span)
            with source.loaded(span):
                for name, trial in trials.items():
                    changed = {n: m for n, m in linears.items() if n in trial.names}
                    if changed or name in states:
                        with _weighing(changed, trial):
                            before = states.get(name, original)
                            states[name], finals[name] = _through(walk, span, before)
                original, known = _through(walk, span, original)
            walk.progress("measure", i + 1, count)
        loss = kl_divergence(source.model, known.flatten(0, 1))
        return {n: loss_sum(loss, finals.get(n, known)) / loss.tokens for n in trials}


def _through(walk: Walk, span: Span, state: State | None) -> tuple[State, Tensor]:
    """The state behind these blocks, and what the body would return then."""
    parts = [walk.run(span, rows, state) for rows in batches(len(walk.ids), walk.batch)]
    states = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    return states, torch.cat([final for _, final in parts])


def _weighing(linears: Mapping[str, nn.Linear], trial: Trial) -> AbstractContextManager[None]:
    """Within the block these linears compute with the weights of a trial."""

    def make(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight = trial.weight(name, linear.weight.detach().float()).to(linear.weight.dtype)
        return lambda x: nn.functional.linear(x, weight, linear.bias)

    return forwards_replaced(linears, make)
