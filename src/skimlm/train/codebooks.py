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

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skimlm import native
from skimlm.models.head import final_hidden, head_logits
from skimlm.models.hooks import forwards_replaced, frozen
from skimlm.quantize.fit import Fit, affine_values
from skimlm.quantize.kmeans import lookup
from skimlm.train.loop import descend
from skimlm.train.losses import backward_from_loss

HELD_OUT = 8  # windows
BATCH = 2  # windows of a step
CHECKS = 3  # times the held-out loss is measured along the way
Progress = Callable[[int, int, float], None]


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
    steps = len(order)

    def codebooks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: base[n] + values[f"theta.{n}"] * spread[n] for n in fits}

    def norm_weights(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: (o.float() * (1 + values[f"gain.{n}"])).to(o.dtype) for n, o in original.items()}

    def held_out(values: dict[str, Tensor]) -> float:
        with fitted(linears, fits, codebooks(values)), _placed(norms, norm_weights(values)):
            return objective.held_out()

    def gradients(values: dict[str, Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
        rows = order[step]
        objective.prepare(rows)
        books = {n: b.requires_grad_() for n, b in codebooks(values).items()}
        with fitted(linears, fits, books), _placed(norms, norm_weights(values), grad=True):
            loss, tokens = objective.backward(rows)
            moved = {f"theta.{n}": (b.grad, spread[n], lr) for n, b in books.items()}
            moved |= {f"gain.{n}": (p.grad, original[n].float(), norm_lr) for n, p in norms.items()}
            for p in norms.values():
                p.grad = None
        losses.append(loss / tokens)
        return {
            name: (grad.float() * unit / tokens, rate)
            for name, (grad, unit, rate) in moved.items()
            if grad is not None
        }

    losses: list[float] = []

    def tell(step: int) -> None:
        if progress:
            progress(step, steps, losses[-1])

    start = {f"theta.{n}": torch.zeros_like(b) for n, b in base.items()}
    start |= {f"gain.{n}": torch.zeros(w.shape) for n, w in original.items()}
    state = descend(
        start, steps, gradients, held_out, checks=CHECKS, file=state_file, progress=tell
    )
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


def _order(count: int, batch: int, steps: int) -> list[list[int]]:
    """Which windows each step sees: one shuffled pass after the other."""
    generator = torch.Generator().manual_seed(0)
    queue: list[int] = []
    while len(queue) < batch * steps:
        queue += torch.randperm(count, generator=generator).tolist()
    return [queue[i * batch : (i + 1) * batch] for i in range(steps)]
