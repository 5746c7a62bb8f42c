"""Training of what a fitted model can still move: codebooks and norm weights, codes fixed.

    train         the whole model; loss: KL(original || compressed), summed over tokens
    train_block   one decoder block, where the model does not fit in memory; loss: the error of its
                  output, each token's over the length of the original's, which is what the next
                  block's norm leaves of it, each number weighted by its mean squared gradient

On calibration windows. A codebook entry gathers the gradient of all weights that share it, so about
a million numbers are trained instead of the weights themselves (moving codes too, as PV-Tuning
2405.14852 does, needs far more tokens than a CPU sees in minutes). Guard: the loss on held-out
windows is measured before, during and after, and the best state seen is kept, the start included.
Not in the SKIM paper.

Parameters are relative: codebook = start + theta * spread of its row, norm = original * (1 + gain).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from skimlm import native, shards
from skimlm.calibrate import backward_from_loss
from skimlm.errors import SkimError
from skimlm.head import final_hidden, head_logits
from skimlm.hooks import forwards_replaced, frozen
from skimlm.weights.fit import Fit, affine_values
from skimlm.weights.kmeans import lookup

HELD_OUT = 8  # windows
BATCH = 2  # windows of a step
CHECKS = 3  # times the held-out loss is measured along the way
BETAS = (0.9, 0.98)
Progress = Callable[[int, int, float], None]


@dataclass
class State:
    """Everything a run needs to go on: parameters, Adam's moments, the best seen, losses so far."""

    step: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)  # theta.NAME [r, k], gain.NAME [c]
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)  # values at the least held-out loss
    losses: list[float] = field(default_factory=list)  # held out, nats per token


def train(
    model: Any,
    linears: dict[str, nn.Linear],
    fits: dict[str, Fit],
    ids: Tensor,
    *,
    steps: int,
    batch: int = BATCH,
    lr: float = 1e-3,
    norm_lr: float = 5e-4,
    state_file: Path | None = None,
    teacher: dict[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the codebooks of `fits` in place, on all windows `ids` [n, t] but the last `HELD_OUT`.

    Returns the trained norm weights (the model's own are left as they were) and the held-out losses
    at the start and at each check. `lr` is relative to the spread of a row's codebook, `norm_lr` to
    each norm weight. With `state_file` the state is kept there at every check, and a run that finds
    one goes on from it to the same result. `teacher` collects the original's hidden states per
    window: pass the same dict again to train another width without computing them again.
    """
    held = min(HELD_OUT, len(ids) // 2)
    ids, unseen = ids[: len(ids) - held], ids[len(ids) - held :]
    norms = norm_parameters(model)
    with frozen(model):
        known = {} if teacher is None else teacher
        unseen_teacher = [_hidden(model, unseen[i : i + batch]) for i in range(0, held, batch)]

        def prepare(rows: list[int]) -> None:
            for i in set(rows) - set(known):
                known[i] = _hidden(model, ids[i : i + 1])

        def backward(rows: list[int]) -> tuple[float, int]:
            target = torch.cat([known[i] for i in rows])
            losses: list[float] = []
            hidden = final_hidden(model, ids[rows])
            backward_from_loss(hidden, _kl_gradient(model, target, losses))
            return sum(losses), len(target)

        def held_out_loss() -> float:
            parts = [_hidden(model, unseen[i : i + batch]) for i in range(0, held, batch)]
            pairs = zip(parts, unseen_teacher, strict=True)
            return sum(_kl_sum(model, part, target) for part, target in pairs) / unseen.numel()

        order = _order(len(ids), batch, steps)
        objective = Objective(prepare, backward, held_out_loss)
        return _descend(linears, fits, norms, objective, order, lr, norm_lr, state_file, progress)


def train_block(
    run: Callable[[Tensor], Tensor],
    linears: Mapping[str, nn.Linear],
    fits: dict[str, Fit],
    norms: Mapping[str, nn.Parameter],
    given: Tensor,
    wanted: Tensor,
    weight: Tensor,
    *,
    steps: int,
    batch: int = BATCH,
    lr: float = 1e-3,
    norm_lr: float = 5e-4,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the codebooks of a block's linears in place, towards `wanted` [n, t, d] from `given`.

    `run(x)` is the block, whose parameters ask for no gradient; `weight` [d] says what each output
    counts. Returns its trained norm weights and the held-out losses, like `train`.
    """
    held = min(HELD_OUT, len(given) // 2)
    seen = len(given) - held

    def loss(rows: Tensor) -> Tensor:
        target = wanted[rows].float()
        error = (run(given[rows]).float() - target).square() @ weight
        return (error / (target.square() @ weight).clamp(min=1e-12)).sum()

    def backward(rows: list[int]) -> tuple[float, int]:
        value = loss(torch.tensor(rows))
        value.backward()
        return value.item(), len(rows) * given.shape[1]

    def held_out_loss() -> float:
        with torch.no_grad():
            parts = torch.arange(seen, len(given)).split(batch)
            return sum(loss(rows).item() for rows in parts) / (held * given.shape[1])

    objective = Objective(lambda _: None, backward, held_out_loss)
    order = _order(seen, batch, steps)
    with torch.enable_grad():
        return _descend(linears, fits, norms, objective, order, lr, norm_lr)


@dataclass(frozen=True)
class Objective:
    """What is trained for; windows are given by their numbers."""

    prepare: Callable[[list[int]], None]  # called while the original is in place
    backward: Callable[[list[int]], tuple[float, int]]  # the loss, summed over so many tokens
    held_out: Callable[[], float]  # loss per token of windows that are not trained on


def _descend(
    linears: Mapping[str, nn.Linear],
    fits: dict[str, Fit],
    norms: Mapping[str, nn.Parameter],
    objective: Objective,
    order: list[list[int]],
    lr: float,
    norm_lr: float,
    state_file: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """A step for every group of windows of `order`; the best state seen is put into the fits."""
    original = {n: p.detach().clone() for n, p in norms.items()}
    base = {n: f.codebook[:, : int(f.sizes.max())].contiguous() for n, f in fits.items()}
    spread = {n: b.std(1, keepdim=True, correction=0).clamp(min=1e-12) for n, b in base.items()}
    state = read_state(state_file, _begin(base, original))
    steps = len(order)
    marks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}

    def codebooks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: base[n] + values[f"theta.{n}"] * spread[n] for n in fits}

    def norm_weights(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: (o.float() * (1 + values[f"gain.{n}"])).to(o.dtype) for n, o in original.items()}

    def held_out_loss() -> float:
        values = state.values
        with fitted(linears, fits, codebooks(values)), _placed(norms, norm_weights(values)):
            return objective.held_out()

    if not state.losses:
        state.losses.append(held_out_loss())
    while state.step < steps:
        rows = order[state.step]
        objective.prepare(rows)
        books = {n: b.requires_grad_() for n, b in codebooks(state.values).items()}
        with (
            fitted(linears, fits, books),
            _placed(norms, norm_weights(state.values), grad=True),
        ):
            loss, tokens = objective.backward(rows)
            moved = {f"theta.{n}": (b.grad, spread[n]) for n, b in books.items()}
            moved |= {f"gain.{n}": (p.grad, original[n].float()) for n, p in norms.items()}
            for p in norms.values():
                p.grad = None
        rate = schedule(state.step, steps)
        for name, (grad, unit) in moved.items():
            if grad is not None:
                size = lr if name.startswith("theta.") else norm_lr
                adam(state, name, grad.float() * unit / tokens, size * rate)
        state.step += 1
        if progress:
            progress(state.step, steps, loss / tokens)
        if state.step in marks:
            state.losses.append(held_out_loss())
            if state.losses[-1] <= min(state.losses):
                state.best = {n: v.clone() for n, v in state.values.items()}
            write_state(state_file, state)
    for name, codebook in codebooks(state.best).items():
        fits[name].codebook[:, : codebook.shape[1]] = codebook
        sort_entries(fits[name])
    return norm_weights(state.best), state.losses


def norm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of norms, by name."""
    found = module.named_parameters()
    return {n: p for n, p in found if p.dim() == 1 and n.endswith("weight")}


def sort_entries(fit: Fit) -> None:
    """Put every codebook back in ascending order and rename the codes; values do not change."""
    unused = torch.arange(fit.codebook.shape[1]) >= fit.sizes[:, None]
    fit.codebook, order = fit.codebook.masked_fill(unused, torch.inf).sort(stable=True, dim=1)
    last = fit.codebook.gather(1, fit.sizes.long()[:, None] - 1)
    fit.codebook = torch.where(unused, last, fit.codebook)
    rank = order.argsort(1).to(torch.uint8)
    fit.codes = rank.gather(1, fit.codes.clamp(max=rank.shape[1] - 1).long())


# ---- the forward pass


class _Lookup(torch.autograd.Function):
    """z = x W^T with W[i, j] = codebook[i, codes[i, j]]; the gradient of W is summed per entry."""

    @staticmethod
    def forward(ctx, x, codebook, codes, fixed):
        r, c = codes.shape
        if x.dtype == torch.bfloat16:
            w = lookup(codes, codebook.detach())
        else:
            w = codebook.gather(1, codes.long()).to(x.dtype)
        if fixed is not None:
            w[fixed[0]] = fixed[1].to(x.dtype)
        ctx.save_for_backward(x, w, codes)
        ctx.entries = codebook.shape[1]
        ctx.fixed = None if fixed is None else fixed[0]
        return x @ w.T

    @staticmethod
    def backward(ctx, gradient):
        x, w, codes = ctx.saved_tensors
        r, c = codes.shape
        full = (gradient.reshape(-1, r).T @ x.reshape(-1, c)).contiguous()
        out = torch.zeros(r, ctx.entries)
        if full.dtype == torch.bfloat16:
            native.call("reduce_bf16", codes, full, out, r, c, ctx.entries)
        else:
            out.scatter_add_(1, codes.long(), full.float())
        if ctx.fixed is not None:
            out[ctx.fixed] = 0  # rows on a grid have no codebook to train
        return gradient @ w, out, None, None


def fitted(
    linears: Mapping[str, nn.Linear], fits: Mapping[str, Fit], codebooks: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """Within the block the linears compute with `codebooks` and the codes of their fits."""

    def watch(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        fit = fits[name]
        fixed = None if fit.affine is None else (~fit.table_rows, affine_values(fit.affine))

        def forward(x: Tensor) -> Tensor:
            if fit.in_scale is not None:
                x = x * fit.in_scale.to(x.dtype)
            z = _Lookup.apply(x, codebooks[name], fit.codes, fixed)
            return z if linear.bias is None else z + linear.bias

        return forward

    return forwards_replaced(linears, watch)


@contextmanager
def _placed(
    norms: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], grad: bool = False
) -> Iterator[None]:
    """Within the block the norms have these weights (and take gradients if `grad`)."""
    before = {n: p.detach().clone() for n, p in norms.items()}
    try:
        for n, p in norms.items():
            p.data.copy_(weights[n])
            p.requires_grad_(grad)
        yield
    finally:
        for n, p in norms.items():
            p.data.copy_(before[n])
            p.requires_grad_(False)


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """Final hidden states of some windows, [n t, d]."""
    with torch.no_grad():
        return final_hidden(model, ids).flatten(0, 1)


def _kl(model: Any, hidden: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student) from final hidden states [t, d]."""
    student = head_logits(model, hidden).float().log_softmax(-1)
    target = head_logits(model, teacher).float().log_softmax(-1)
    return nn.functional.kl_div(student, target, reduction="sum", log_target=True)


def _kl_sum(model: Any, hidden: Tensor, teacher: Tensor) -> float:
    with torch.no_grad():
        pieces = zip(hidden.split(512), teacher.split(512), strict=True)
        return sum(float(_kl(model, h, t)) for h, t in pieces)


def _kl_gradient(
    model: Any, teacher: Tensor, losses: list[float]
) -> Callable[[Tensor, slice], Tensor]:
    """d KL / d hidden for `backward_from_loss`; the loss of each part is appended to `losses`."""

    def gradient(h: Tensor, part: slice) -> Tensor:
        h = h.requires_grad_()
        with torch.enable_grad():
            loss = _kl(model, h, teacher[part])
        losses.append(loss.item())
        return torch.autograd.grad(loss, h)[0]

    return gradient


# ---- the optimiser and its state


def _begin(base: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> State:
    values = {f"theta.{n}": torch.zeros_like(b) for n, b in base.items()}
    values |= {f"gain.{n}": torch.zeros(w.shape) for n, w in norms.items()}
    first, second, best = ({n: torch.zeros_like(v) for n, v in values.items()} for _ in range(3))
    return State(0, values, first, second, best)


def _order(count: int, batch: int, steps: int) -> list[list[int]]:
    """Which windows each step sees: one shuffled pass after the other."""
    generator = torch.Generator().manual_seed(0)
    queue: list[int] = []
    while len(queue) < batch * steps:
        queue += torch.randperm(count, generator=generator).tolist()
    return [queue[i * batch : (i + 1) * batch] for i in range(steps)]


def schedule(step: int, steps: int) -> float:
    """Warm up over a twentieth of the steps, then a cosine down to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def adam(state: State, name: str, grad: Tensor, rate: float) -> None:
    """One Adam step (1412.6980) on `state.values[name]`."""
    b1, b2 = BETAS
    first = state.first[name].mul_(b1).add_(grad, alpha=1 - b1)
    second = state.second[name].mul_(b2).addcmul_(grad, grad, value=1 - b2)
    t = state.step + 1
    down = (second / (1 - b2**t)).sqrt_().add_(1e-8)
    state.values[name].addcdiv_(first, down, value=-rate / (1 - b1**t))


PARTS: Sequence[str] = ("values", "first", "second", "best")


def write_state(path: Path | None, state: State) -> None:
    """Keep `state` in a file, whole or not at all."""
    if path is None:
        return
    tensors = {f"{part}:{n}": v for part in PARTS for n, v in getattr(state, part).items()}
    facts = {"step": str(state.step), "losses": json.dumps(state.losses)}
    shards.write_file(path, tensors, facts)


def read_state(path: Path | None, start: State) -> State:
    """The state in a file, or `start` if there is none; SkimError unless it fits `start`."""
    if path is None or not path.exists():
        return start
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            state = State(int(facts["step"]), losses=json.loads(facts["losses"]))
            for key in file.keys():
                part, name = key.split(":", 1)
                getattr(state, part)[name] = file.get_tensor(key)
        if any(_shapes(getattr(state, part)) != _shapes(getattr(start, part)) for part in PARTS):
            raise ValueError("other tensors than this training has")
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise SkimError(
            f"{path}: damaged state of a training ({shards.first_line(error)}); "
            "delete it and run again"
        ) from None
    return state


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
