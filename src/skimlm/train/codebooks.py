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
from skimlm.models.head import final_hidden
from skimlm.models.hooks import forwards_replaced, frozen
from skimlm.quantize.fit import Fit, affine_values
from skimlm.quantize.kmeans import lookup
from skimlm.train.loop import Objective, descend, evenly, passes
from skimlm.train.losses import backward, kl_divergence, loss_sum

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
        unseen_losses = [
            kl_divergence(model, _hidden(model, unseen[i : i + batch]))
            for i in range(0, held, batch)
        ]

        def prepare(rows: list[int]) -> None:
            for i in set(rows) - set(known):
                known[i] = _hidden(model, ids[i : i + 1])

        def backward_windows(rows: list[int]) -> tuple[float, int]:
            loss = kl_divergence(model, torch.cat([known[i] for i in rows]))
            return backward(loss, final_hidden(model, ids[rows])), loss.tokens

        def held_out_loss() -> float:
            parts = [_hidden(model, unseen[i : i + batch]) for i in range(0, held, batch)]
            pairs = zip(parts, unseen_losses, strict=True)
            return sum(loss_sum(loss, part) for part, loss in pairs) / unseen.numel()

        order = passes(len(ids), batch * steps, batch)
        loss = _WindowLoss(prepare, backward_windows, held_out_loss)
        return _descend(linears, fits, norms, loss, order, lr, norm_lr, state_file, progress)


def train_block(
    run: Callable[[Tensor], Tensor],
    linears: Mapping[str, nn.Linear],
    fits: dict[str, Fit],
    norms: Mapping[str, nn.Parameter],
    targets: Tensor,
    weight: Tensor,
    *,
    steps: int,
    batch: int = BATCH,
    lr: float = 1e-3,
    norm_lr: float = 5e-4,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the codebooks of a block's linears in place, towards its outputs `targets` [n, t, d].

    `run(rows)` is what the block, whose parameters ask for no gradient, makes of the windows of
    these numbers as the compressed blocks before give them; `weight` [d] says what each output
    counts. Returns its trained norm weights and the held-out losses, like `train`.
    """
    held = min(HELD_OUT, len(targets) // 2)
    seen = len(targets) - held

    def loss(rows: Tensor) -> Tensor:
        target = targets[rows].float()
        error = (run(rows).float() - target).square() @ weight
        return (error / (target.square() @ weight).clamp(min=1e-12)).sum()

    def backward_windows(rows: list[int]) -> tuple[float, int]:
        value = loss(torch.tensor(rows))
        value.backward()
        return value.item(), len(rows) * targets.shape[1]

    def held_out_loss() -> float:
        with torch.no_grad():
            parts = torch.arange(seen, len(targets)).split(batch)
            return sum(loss(rows).item() for rows in parts) / (held * targets.shape[1])

    order = passes(seen, batch * steps, batch)
    windows = _WindowLoss(lambda _: None, backward_windows, held_out_loss)
    with torch.enable_grad():
        return _descend(linears, fits, norms, windows, order, lr, norm_lr)


@dataclass(frozen=True)
class _WindowLoss:
    """A loss on windows, by their numbers."""

    prepare: Callable[[list[int]], None]  # called while the original is in place
    backward: Callable[[list[int]], tuple[float, int]]  # the loss, summed over so many tokens
    held_out: Callable[[], float]  # loss per token of windows that are not trained on


class _Parameters:
    """Codebooks and norm weights by what is trained: their relative changes, 0 at the start."""

    def __init__(self, fits: Mapping[str, Fit], norms: Mapping[str, nn.Parameter]) -> None:
        self.original = {n: p.detach().clone() for n, p in norms.items()}
        self.base = {n: f.codebook[:, : int(f.sizes.max())].contiguous() for n, f in fits.items()}
        self.spread = {
            n: b.std(1, keepdim=True, correction=0).clamp(min=1e-12) for n, b in self.base.items()
        }

    def start(self) -> dict[str, Tensor]:
        values = {f"theta.{n}": torch.zeros_like(b) for n, b in self.base.items()}
        return values | {f"gain.{n}": torch.zeros(w.shape) for n, w in self.original.items()}

    def codebooks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: b + values[f"theta.{n}"] * self.spread[n] for n, b in self.base.items()}

    def norms(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: (o.float() * (1 + values[f"gain.{n}"])).to(o.dtype) for n, o in self.original.items()
        }


def _descend(
    linears: Mapping[str, nn.Linear],
    fits: dict[str, Fit],
    norms: Mapping[str, nn.Parameter],
    windows: _WindowLoss,
    order: list[list[int]],
    lr: float,
    norm_lr: float,
    state_file: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """A step for every group of windows of `order`; the best state seen is put into the fits."""
    parameters, steps = _Parameters(fits, norms), len(order)
    losses: list[float] = []

    def held_out(values: dict[str, Tensor]) -> float:
        books, weights = parameters.codebooks(values), parameters.norms(values)
        with fitted(linears, fits, books), _placed(norms, weights):
            return windows.held_out()

    def gradients(values: dict[str, Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
        windows.prepare(order[step])
        books = {n: b.requires_grad_() for n, b in parameters.codebooks(values).items()}
        with fitted(linears, fits, books), _placed(norms, parameters.norms(values), grad=True):
            loss, tokens = windows.backward(order[step])
            moved = {f"theta.{n}": (b.grad, parameters.spread[n], lr) for n, b in books.items()}
            moved |= {
                f"gain.{n}": (p.grad, parameters.original[n].float(), norm_lr)
                for n, p in norms.items()
            }
            for p in norms.values():
                p.grad = None
        losses.append(loss / tokens)
        return {
            name: (grad.float() * unit / tokens, rate)
            for name, (grad, unit, rate) in moved.items()
            if grad is not None
        }

    def tell(step: int) -> None:
        if progress:
            progress(step, steps, losses[-1])

    objective, checks = Objective(gradients, held_out), evenly(steps, CHECKS)
    state = descend(
        parameters.start(), objective, steps, checks=checks, file=state_file, progress=tell
    )
    for name, codebook in parameters.codebooks(state.best).items():
        fits[name].codebook[:, : codebook.shape[1]] = codebook
        sort_entries(fits[name])
    return parameters.norms(state.best), state.losses


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
        if full.dtype == torch.bfloat16 and not native.missing():
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
