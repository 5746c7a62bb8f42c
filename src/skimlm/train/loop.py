"""The training loop: steps of Adam (1412.6980) that can be interrupted and never end worse.

    state = descend(values, objective, steps, checks=evenly(steps, 3))    best values: state.best

The loss on what is held out is measured before, at every check and at the end; the best values seen
are kept, the start included. With a file everything is kept there, at every check and every two
minutes, and a run that finds it goes on to the same result. Codebooks, adapters, soft tokens and
compressors are trained so; the loop does not know where gradients come from.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skimlm.errors import SkimError, first_line
from skimlm.storage.safetensors import write_file

BETAS = (0.9, 0.98)
KEEP = 120.0  # seconds of work that a run which is stopped may lose


@dataclass
class State:
    """Everything a run needs to go on: values, Adam's moments, the best seen, losses so far."""

    step: int
    values: dict[str, Tensor]
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)  # values at the least held-out loss
    losses: list[float] = field(default_factory=list)  # held out
    notes: list[Any] = field(default_factory=list)  # one for each loss, if the objective has any


@dataclass(frozen=True)
class Objective:
    """What values, by name, are trained for.

    gradients(values, step) gives name -> (gradient, rate); a name it leaves out does not move.
    held_out(values) is the loss that decides which values are best. project(values) brings values
    back, in place, to where they may be, after every step. note(step) is kept with the held-out
    loss: anything JSON has.
    """

    gradients: Callable[[dict[str, Tensor], int], Mapping[str, tuple[Tensor, float]]]
    held_out: Callable[[dict[str, Tensor]], float]
    project: Callable[[dict[str, Tensor]], None] = lambda _: None
    note: Callable[[int], Any] = lambda _: None


def cosine(step: int, steps: int) -> float:
    """Share of the rate: up over a twentieth of the steps, then a cosine down to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def descend(
    values: Mapping[str, Tensor],
    objective: Objective,
    steps: int,
    *,
    checks: Collection[int],
    schedule: Callable[[int, int], float] = cosine,
    betas: tuple[float, float] = BETAS,
    done: Callable[[State], bool] = lambda _: False,
    file: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> State:
    """Take at most `steps` steps from `values`, which stay as they are.

    `checks` are the steps after which the held-out loss is measured; then `done(state)` may end the
    training. `schedule(step, steps)` is the share of the rate that step 0, 1, ... takes. `progress`
    is called with the steps taken.
    """
    state = _read(file, _begin(values))
    if not state.losses:
        _check(state, objective)
    elif done(state):
        return state
    written = time.monotonic()
    while state.step < steps:
        share = schedule(state.step, steps)
        for name, (gradient, rate) in objective.gradients(state.values, state.step).items():
            adam(state, name, gradient, rate * share, betas)
        objective.project(state.values)
        state.step += 1
        progress(state.step)
        checked = state.step in checks
        if checked:
            _check(state, objective)
        if checked or time.monotonic() - written > KEEP:
            write_state(file, state)
            written = time.monotonic()
        if checked and done(state):
            break
    return state


def _check(state: State, objective: Objective) -> None:
    """Measure the held-out loss; keep the values if it is the least so far."""
    loss = objective.held_out(state.values)
    if not state.losses or loss < min(state.losses):
        state.best = {n: v.clone() for n, v in state.values.items()}
    state.losses.append(loss)
    state.notes.append(objective.note(state.step))


def evenly(steps: int, checks: int) -> set[int]:
    """So many steps to check after, the last one among them."""
    return {round(steps * (i + 1) / checks) for i in range(checks)}


def passes(count: int, total: int, batch: int, seed: int = 0) -> list[list[int]]:
    """Which of 0 .. count - 1 each step sees, `total` in all: one shuffled pass after the other."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while len(queue) < total:
        queue += torch.randperm(count, generator=generator).tolist()
    return [queue[i : min(i + batch, total)] for i in range(0, total, batch)]


def _begin(values: Mapping[str, Tensor]) -> State:
    first, second = ({n: torch.zeros_like(v) for n, v in values.items()} for _ in range(2))
    own, best = ({n: v.detach().clone() for n, v in values.items()} for _ in range(2))
    return State(0, own, first, second, best)


def adam(
    state: State, name: str, gradient: Tensor, rate: float, betas: tuple[float, float] = BETAS
) -> None:
    """One step on `state.values[name]`, in place."""
    b1, b2 = betas
    first = state.first[name].mul_(b1).add_(gradient, alpha=1 - b1)
    second = state.second[name].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    t = state.step + 1
    down = (second / (1 - b2**t)).sqrt_().add_(1e-8)
    state.values[name].addcdiv_(first, down, value=-rate / (1 - b1**t))


# ---- the file

PARTS: Sequence[str] = ("values", "first", "second", "best")


def write_state(path: Path | None, state: State) -> None:
    """Keep `state` in a file, whole or not at all."""
    if path is None:
        return
    tensors = {f"{part}:{n}": v for part in PARTS for n, v in getattr(state, part).items()}
    lists = {"losses": json.dumps(state.losses), "notes": json.dumps(state.notes)}
    facts = {"step": str(state.step), **lists}
    write_file(path, tensors, facts)


def _read(path: Path | None, start: State) -> State:
    """The state in a file, or `start` if there is none; SkimError unless it fits `start`."""
    if path is None or not path.exists():
        return start
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            notes = json.loads(facts.get("notes", "[]"))
            state = State(int(facts["step"]), {}, losses=json.loads(facts["losses"]), notes=notes)
            for key in file.keys():
                part, name = key.split(":", 1)
                getattr(state, part)[name] = file.get_tensor(key)
        if any(_shapes(getattr(state, part)) != _shapes(getattr(start, part)) for part in PARTS):
            raise ValueError("other tensors than this training has")
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise SkimError(
            f"{path}: damaged state of a training ({first_line(error)}); delete it and run again"
        ) from None
    return state


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
