"""Steps of Adam (1412.6980) that can be interrupted, and never end worse than they began.

    state = descend(values, steps, gradients, held_out)      best values in state.best

The loss on what is held out is measured before, `checks` times on the way and at the end; the best
values seen are kept, the start included. With a file everything is kept there at every check, and a
run that finds it goes on to the same result. Codebooks, adapters and compressors are trained so.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skimlm.errors import SkimError, first_line
from skimlm.storage.safetensors import write_file

BETAS = (0.9, 0.98)


@dataclass
class State:
    """Everything a run needs to go on: values, Adam's moments, the best seen, losses so far."""

    step: int
    values: dict[str, Tensor]
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)  # values at the least held-out loss
    losses: list[float] = field(default_factory=list)  # held out


def descend(
    values: Mapping[str, Tensor],
    steps: int,
    gradients: Callable[[dict[str, Tensor], int], Mapping[str, tuple[Tensor, float]]],
    held_out: Callable[[dict[str, Tensor]], float],
    *,
    checks: int,
    file: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> State:
    """Take `steps` steps from `values`, which stay as they are.

    `gradients(values, step)` gives name -> (gradient, rate); a name it leaves out does not move.
    The rate is warmed up and brought down to zero. `progress` is called with the steps done.
    """
    state = _read(file, _begin(values))
    marks = {round(steps * (i + 1) / checks) for i in range(checks)}
    if not state.losses:
        state.losses.append(held_out(state.values))
    while state.step < steps:
        share = schedule(state.step, steps)
        for name, (gradient, rate) in gradients(state.values, state.step).items():
            adam(state, name, gradient, rate * share)
        state.step += 1
        progress(state.step)
        if state.step in marks:
            loss = held_out(state.values)
            if loss < min(state.losses):
                state.best = {n: v.clone() for n, v in state.values.items()}
            state.losses.append(loss)
            write_state(file, state)
    return state


def schedule(step: int, steps: int) -> float:
    """Share of the rate: up over a twentieth of the steps, then a cosine down to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _begin(values: Mapping[str, Tensor]) -> State:
    first, second = ({n: torch.zeros_like(v) for n, v in values.items()} for _ in range(2))
    own, best = ({n: v.detach().clone() for n, v in values.items()} for _ in range(2))
    return State(0, own, first, second, best)


def adam(state: State, name: str, gradient: Tensor, rate: float) -> None:
    """One step on `state.values[name]`, in place."""
    b1, b2 = BETAS
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
    facts = {"step": str(state.step), "losses": json.dumps(state.losses)}
    write_file(path, tensors, facts)


def _read(path: Path | None, start: State) -> State:
    """The state in a file, or `start` if there is none; SkimError unless it fits `start`."""
    if path is None or not path.exists():
        return start
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            state = State(int(facts["step"]), {}, losses=json.loads(facts["losses"]))
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
