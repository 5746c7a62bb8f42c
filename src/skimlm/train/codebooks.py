"""Training of what a compressed model can still move, codes fixed: levels, scales, adapters, norms.

The loss is KL(original || compressed), summed over tokens, on calibration windows. A codebook entry
gathers the gradient of all weights that share it, so about a million numbers are trained instead of
the weights themselves (moving codes too, as PV-Tuning 2405.14852 does, needs far more tokens than a
CPU sees in minutes). Guard: the loss on held-out windows is measured before, during and after, and
the best state seen is kept, the start included. Not in the SKIM paper.

It takes the memory of the result, not of the original: linears compute from their packed codes
(packed.py), of the original its final hidden states are enough, and activations of a block can be
made again when its gradient is due.

A parameter is start + theta * unit, where one unit is the spread of a row's codebook or of a
trellis, the size of a component of an adapter, the scale of a row or the norm weight itself; theta
is trained, from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skimlm.format.layer import Layer
from skimlm.models.head import final_hidden
from skimlm.models.hooks import forwards_replaced, frozen
from skimlm.train.adapters import component_size
from skimlm.train.loop import Objective, descend, evenly, passes
from skimlm.train.losses import backward, kl_divergence, loss_sum
from skimlm.train.packed import FACTORS, ROW_SCALE, moving, product, stored
from skimlm.train.student import Student

HELD_OUT = 8  # windows
BATCH = 2  # windows of a step
CHECKS = 3  # times the held-out loss is measured along the way
NORMS = 0.5  # share of the rate that norms take


@dataclass(frozen=True)
class Trained:
    """What a training made of a student."""

    layers: dict[str, Layer]
    norms: dict[str, Tensor]  # weights of norms
    losses: list[float]  # held out, at the start and at each check


@dataclass(frozen=True)
class _Parameter:
    """Something that moves: start + theta * unit."""

    start: Tensor
    unit: Tensor
    rate: float

    def at(self, theta: Tensor) -> Tensor:
        return self.start + theta * self.unit


def train(
    student: Student,
    ids: Tensor,
    known: Tensor,
    *,
    steps: int,
    rate: float,
    batch: int = BATCH,
    state_file: Path | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Trained:
    """Train on all windows `ids` [n, t] but the last `HELD_OUT`, towards `known` [n, t, d].

    `rate` is Adam's, of theta; `known` are the original's final hidden states. Model and layers are
    left as they were. With `state_file` the state is kept there, and a run that finds one goes on
    to the same result.
    """
    model, held = student.model, min(HELD_OUT, len(ids) // 2)
    seen = len(ids) - held
    norms = norm_parameters(student.original)
    parameters = _parameters(student.layers, norms, rate)
    order = passes(seen, batch * steps, batch)

    def loss_of(rows: list[int]) -> Any:
        return kl_divergence(model, known[rows].flatten(0, 1), student.original)

    def held_out(thetas: dict[str, Tensor]) -> float:
        values = {n: p.at(thetas[n]) for n, p in parameters.items()}
        with torch.no_grad(), _computing(student, values), _placed(norms, values):
            parts = torch.arange(seen, len(ids)).split(batch)
            total = sum(
                loss_sum(loss_of(rows.tolist()), final_hidden(model, ids[rows])) for rows in parts
            )
        return total / (held * ids.shape[1])

    def gradients(thetas: dict[str, Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
        values = {n: p.at(thetas[n]).requires_grad_() for n, p in parameters.items()}
        loss = loss_of(order[step])
        with _computing(student, values), _placed(norms, values):
            backward(loss, final_hidden(model, ids[order[step]]))
            found = {n: norms.get(n, value).grad for n, value in values.items()}
        return {
            n: (grad.float() * parameters[n].unit / loss.tokens, parameters[n].rate)
            for n, grad in found.items()
            if grad is not None
        }

    with frozen(student.original):
        state = descend(
            {n: torch.zeros_like(p.start) for n, p in parameters.items()},
            Objective(gradients, held_out),
            steps,
            checks=evenly(steps, CHECKS),
            file=state_file,
            progress=lambda step: progress(step, steps),
        )
    best = {n: p.at(state.best[n]) for n, p in parameters.items()}
    moved = _by_layer(best)
    layers = {n: stored(layer, moved.get(n, {})) for n, layer in student.layers.items()}
    return Trained(layers, {n: best[n].to(p.dtype) for n, p in norms.items()}, state.losses)


def norm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of norms, by name."""
    found = module.named_parameters()
    return {n: p for n, p in found if p.dim() == 1 and n.endswith("weight")}


def _parameters(
    layers: Mapping[str, Layer], norms: Mapping[str, nn.Parameter], rate: float
) -> dict[str, _Parameter]:
    """Everything that moves: tensors of layers as LAYER:TENSOR, norms by their names."""
    found = {}
    for name, layer in layers.items():
        for own, start in moving(layer).items():
            if own in FACTORS:
                unit = component_size(start)
            elif own.startswith(ROW_SCALE):
                unit = start
            else:
                unit = start.std(-1, keepdim=True, correction=0).clamp(min=1e-12)
            found[f"{name}:{own}"] = _Parameter(start, unit, rate)
    for name, norm in norms.items():
        start = norm.detach().float()
        found[name] = _Parameter(start, start, rate * NORMS)
    return found


def _by_layer(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of layers, by layer and by their own names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        layer, _, own = name.partition(":")
        if own:
            found.setdefault(layer, {})[own] = value
    return found


@contextmanager
def _computing(student: Student, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block linears compute from their layers with these values."""
    moved = _by_layer(values)

    def linear(name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        layer, own = student.layers[name], moved.get(name, {})

        def forward(x: Tensor) -> Tensor:
            z = product(x, layer, own)
            return z if module.bias is None else z + module.bias

        return forward

    def block(_name: str, module: Any) -> Callable[..., Any]:
        return partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)

    recomputed = {name: student.original.get_submodule(name) for name in student.recomputed}
    with forwards_replaced(student.linears, linear), forwards_replaced(recomputed, block):
        yield


@contextmanager
def _placed(norms: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the norms have these weights, and gradients where the values have them."""
    before = {n: p.detach().clone() for n, p in norms.items()}
    try:
        for n, p in norms.items():
            p.data.copy_(values[n])
            p.requires_grad_(values[n].requires_grad)
        yield
    finally:
        for n, p in norms.items():
            p.data.copy_(before[n])
            p.requires_grad_(False)
            p.grad = None
