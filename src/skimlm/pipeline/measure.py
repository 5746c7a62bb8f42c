"""Predictions held against measurement: what other weights do to the model on text of its own.

Errors in units of the end loss are a prediction: the weights' part of the divergence to second
order, as the calibration text sees it. A few tokens of enormous gradient, or a text that is not
like others, can make it wrong. So it is measured: some windows that nothing was fitted to go
through the blocks once, and beside the model as it is go its trials, each with other weights.

    divergences(walk, trials)      KL of each trial
    tried_widths(...)              of a few ways to spend the bits the one that is measured best
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skimlm.format.row_codes import TRELLIS, code_bits
from skimlm.models.carried import State
from skimlm.models.hooks import forwards_replaced, frozen
from skimlm.models.source import Span
from skimlm.pipeline.budget import Widths
from skimlm.pipeline.recipes import rounded_linear
from skimlm.pipeline.sensitivity import Analysis
from skimlm.pipeline.walk import Walk, batches
from skimlm.train.losses import kl_divergence, loss_sum


@dataclass(frozen=True)
class Trial:
    """Other weights for some linears: `weight(name, W)` for each of `names`."""

    names: frozenset[str]
    weight: Callable[[str, Tensor], Tensor]


def divergences(
    walk: Walk, trials: Mapping[str, Trial], part: int = 0, parts: int = 1
) -> dict[str, float]:
    """KL(model || trial) in nats per token over the windows of the walk, for every trial.

    All go block by block: no more than one block has other weights at a time. It is told as `part`
    of so many `parts`.
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
            walk.progress("measure", part * count + i + 1, parts * count)
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


# ---- widths

GROUPS = 6  # of blocks that follow each other, whose prediction is held against measurement
FAR = 8.0  # a group's errors are corrected by no more than this factor
POOLED, CORRECTED = "one budget", "one budget, corrected by groups of blocks"
APART, ALIKE = "one budget per linear", "all rows alike"


def tried_widths(
    walk: Walk,
    known: Mapping[str, Analysis],
    errors: Mapping[str, Tensor],
    spend: Callable[[Mapping[str, Tensor], bool], Widths],
    columns: Mapping[int, int],
) -> tuple[Widths, dict[str, float]]:
    """The widths that the windows of `walk` like best, and the divergence of every way tried.

    `errors` [r, widths] per linear, `spend(errors, pooled)` what is bought by them, `columns` in
    which column a width stands. Rows are rounded as they are before refinement. Where groups of
    blocks diverge otherwise than their errors foretell, these are corrected by as much.
    """
    flat = {n: _alike(e, columns) for n, e in errors.items()}
    ways = {POOLED: spend(errors, True), APART: spend(errors, False), ALIKE: spend(flat, True)}
    names = frozenset(errors)
    trials = {way: Trial(names, _rounding(walk, known, widths)) for way, widths in ways.items()}
    groups = _groups(walk)
    trials |= {f"group {k}": Trial(group, trials[POOLED].weight) for k, group in groups.items()}
    found = divergences(walk, trials, 0, 2)
    measured = {k: found.pop(f"group {k}") for k in groups}
    predicted = {
        k: sum(_lost(errors[n], ways[POOLED][n], columns) for n in group)
        for k, group in groups.items()
    }
    factors = _factors(measured, predicted)
    bent = {n: errors[n] * factors[k] for k, group in groups.items() for n in group}
    ways[CORRECTED] = spend({n: bent[n] for n in errors}, True)
    trial = Trial(names, _rounding(walk, known, ways[CORRECTED]))
    found |= divergences(walk, {CORRECTED: trial}, 1, 2)
    return ways[min(found, key=found.__getitem__)], found


def _alike(errors: Tensor, columns: Mapping[int, int]) -> Tensor:
    """Curves of rows that all lose a quarter with every bit."""
    curve = torch.empty(errors.shape[1], dtype=torch.float64)
    for width, column in columns.items():
        curve[column] = 0.25 ** code_bits(width) * (0.6 if width > TRELLIS else 1.0)
    return curve.expand_as(errors)


def _groups(walk: Walk) -> dict[int, frozenset[str]]:
    """The linears of blocks that follow each other, in a few groups."""
    count = len(walk.source.blocks)
    number = min(GROUPS, count)
    cuts = [round(count * k / number) for k in range(number + 1)]
    inside = (frozenset(walk.inside(range(*ends))) for ends in itertools.pairwise(cuts))
    return {k: names for k, names in enumerate(inside) if names}


def _lost(errors: Tensor, widths: Tensor, columns: Mapping[int, int]) -> float:
    """The summed error of rows at their widths."""
    at = torch.tensor([columns[width] for width in widths.tolist()])
    return float(errors.gather(1, at[:, None]).sum())


def _factors(measured: Mapping[int, float], predicted: Mapping[int, float]) -> dict[int, float]:
    """How much more than foretold each group diverges, the geometric mean of all being 1."""
    logs = {k: math.log(max(measured[k], 1e-12) / max(predicted[k], 1e-12)) for k in measured}
    mean = sum(logs.values()) / len(logs)
    return {k: min(max(math.exp(log - mean), 1 / FAR), FAR) for k, log in logs.items()}


def _rounding(
    walk: Walk, known: Mapping[str, Analysis], widths: Widths
) -> Callable[[str, Tensor], Tensor]:
    """The weights of a trial, kept while a block is at work: its group may ask for them again."""
    most = max(len(walk.inside(range(i, i + 1))) for i in range(len(walk.source.blocks)))
    kept: OrderedDict[str, Tensor] = OrderedDict()

    def weight(name: str, w: Tensor) -> Tensor:
        if name not in kept:
            kept[name] = rounded_linear(w, known[name], widths[name]).to(torch.bfloat16)
            while len(kept) > most:
                kept.popitem(last=False)
        return kept[name]

    return weight
