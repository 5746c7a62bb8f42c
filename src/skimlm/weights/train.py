"""End-loss training of what a fitted model can still move: codebooks and norm weights, codes fixed.

Loss: KL(original || compressed) on calibration windows, summed over tokens. A codebook entry
gathers the gradient of all weights that share it, so a few hundred thousand free numbers are
trained instead of the weights themselves. Guard: the loss on held-out windows is measured before,
during and after, and the best state seen is the one kept, the start included. (Not in the SKIM
paper; cf. PV-Tuning 2405.14852, which also moves codes and needs far more tokens.)
"""

import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skimlm import native
from skimlm.calibrate import backward_from_loss, final_hidden, head_logits
from skimlm.weights.fit import Fit

HELD_OUT = 8  # windows


class _Lookup(torch.autograd.Function):
    """z = x W^T with W[i, j] = codebook[i, codes[i, j]]; the gradient of W is summed per entry."""

    @staticmethod
    def forward(ctx, x, codebook, codes, fixed):
        r, c = codes.shape
        if x.dtype == torch.bfloat16:
            w = torch.empty(r, c, dtype=torch.bfloat16)
            native.call("lookup_bf16", codes, codebook.detach(), w, r, c, codebook.shape[1])
        else:
            w = codebook.gather(1, codes.long()).to(x.dtype)
        if fixed is not None:
            w[fixed[0]] = fixed[1].to(x.dtype)
        ctx.save_for_backward(x, w, codes)
        ctx.entries = codebook.shape[1]
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
        return gradient @ w, out, None, None


@contextmanager
def fitted(
    linears: dict[str, nn.Linear], fits: dict[str, Fit], codebooks: dict[str, Tensor]
) -> Iterator:
    """Within the block the linears compute with `codebooks` and the codes of their fits."""

    def watch(name: str):
        fit = fits[name]
        wide = ~fit.table_rows
        dense = fit.dense() if bool(wide.any()) else None
        if dense is not None and fit.in_scale is not None:
            dense = dense / fit.in_scale
        fixed = None if dense is None else (wide, dense[wide])

        def forward(self: nn.Linear, x: Tensor) -> Tensor:
            if fit.in_scale is not None:
                x = x * fit.in_scale.to(x.dtype)
            z = _Lookup.apply(x, codebooks[name], fit.codes, fixed)
            return z if self.bias is None else z + self.bias

        return forward

    try:
        for name, linear in linears.items():
            linear.forward = types.MethodType(watch(name), linear)  # type: ignore[method-assign]
        yield
    finally:
        for linear in linears.values():
            del linear.forward


def train(
    model: Any,
    linears: dict[str, nn.Linear],
    fits: dict[str, Fit],
    ids: Tensor,
    *,
    steps: int,
    batch: int = 2,
    lr: float = 1e-3,
    norm_lr: float = 5e-4,
    checks: int = 3,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the codebooks of `fits` in place, on all windows `ids` [n, t] but the last `HELD_OUT`.

    Returns the trained norm weights (the model's own are left as they were) and the held-out
    losses, in nats per token, at the start and at each check. `lr` is relative to each row's
    codebook spread, `norm_lr` to each norm weight.
    """
    held = ids[-HELD_OUT:]
    ids = ids[:-HELD_OUT]
    norms = {n: p for n, p in model.named_parameters() if p.dim() == 1 and n.endswith("weight")}
    original = {n: p.detach().clone() for n, p in norms.items()}
    gain = {n: torch.zeros_like(p, dtype=torch.float32).requires_grad_() for n, p in norms.items()}
    spread = {n: f.codebook.std(1, keepdim=True).clamp(min=1e-12) for n, f in fits.items()}
    base = {n: f.codebook[:, : int(f.sizes.max())].contiguous() for n, f in fits.items()}
    theta = {n: torch.zeros_like(base[n]).requires_grad_() for n in fits}
    groups = [
        {"params": list(theta.values()), "lr": lr},
        {"params": list(gain.values()), "lr": norm_lr},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    codebooks: dict[str, Tensor] = {}
    teacher: dict[int, Tensor] = {}

    def place() -> None:
        """Put the current parameters where the forward pass reads them."""
        for name in fits:
            codebooks[name] = (base[name] + theta[name].detach() * spread[name]).requires_grad_()
        with torch.no_grad():
            for name, p in norms.items():
                p.copy_(original[name].float() * (1 + gain[name]))

    def restore() -> None:
        with torch.no_grad():
            for name, p in norms.items():
                p.copy_(original[name])

    def teach(rows: list[int], source: Tensor) -> None:
        """Final hidden states of the original model for windows not seen before."""
        missing = [i for i in rows if i not in teacher]
        if missing:
            restore()
            with torch.no_grad():
                for i, hidden in zip(missing, final_hidden(model, source[missing]), strict=True):
                    teacher[i] = hidden

    def held_out_loss() -> float:
        total = 0.0
        with fitted(linears, fits, codebooks), torch.no_grad():
            for i in range(0, len(held), batch):
                hidden = final_hidden(model, held[i : i + batch]).flatten(0, 1)
                for j in range(0, len(hidden), 512):
                    total += float(
                        _kl(model, hidden[j : j + 512], held_teacher[i // batch][j : j + 512])
                    )
        return total / held.numel()

    with torch.no_grad():
        held_teacher = [
            final_hidden(model, held[i : i + batch]).flatten(0, 1)
            for i in range(0, len(held), batch)
        ]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    place()
    losses = [held_out_loss()]
    best = (
        losses[0],
        {n: b.clone() for n, b in base.items()},
        {n: o.clone() for n, o in original.items()},
    )
    order = torch.Generator().manual_seed(0)
    queue: list[int] = []
    marks = {round(steps * (i + 1) / checks) for i in range(checks)}
    try:
        for step in range(steps):
            if len(queue) < batch:
                queue = torch.randperm(len(ids), generator=order).tolist()
            rows, queue = queue[:batch], queue[batch:]
            teach(rows, ids)
            place()
            for p in norms.values():
                p.requires_grad_(True)
                p.grad = None
            with fitted(linears, fits, codebooks):
                hidden = final_hidden(model, ids[rows])
                target = torch.cat([teacher[i] for i in rows])
                step_loss: list[float] = []
                backward_from_loss(hidden, _kl_gradient(model, target, step_loss))
            for p in norms.values():
                p.requires_grad_(False)
            scale = 1 / target.shape[0]
            for name in fits:
                grad = codebooks[name].grad
                theta[name].grad = None if grad is None else grad * spread[name] * scale
            for name, p in norms.items():
                gain[name].grad = (
                    None if p.grad is None else p.grad.float() * original[name] * scale
                )
            optimizer.step()
            schedule.step()
            if progress:
                progress(step + 1, steps, sum(step_loss) * scale)
            if step + 1 in marks:
                place()
                losses.append(held_out_loss())
                if losses[-1] < best[0]:
                    best = (
                        losses[-1],
                        {n: c.detach().clone() for n, c in codebooks.items()},
                        {n: p.detach().clone() for n, p in norms.items()},
                    )
    finally:
        restore()
        for p, flag in flags:
            p.requires_grad_(flag)
    for name, fit in fits.items():
        fit.codebook[:, : best[1][name].shape[1]] = best[1][name]
        sort_entries(fit)
    return best[2], losses


def sort_entries(fit: Fit) -> None:
    """Put every codebook back in ascending order and rename the codes; values do not change."""
    unused = torch.arange(fit.codebook.shape[1]) >= fit.sizes[:, None]
    fit.codebook, order = fit.codebook.masked_fill(unused, torch.inf).sort(stable=True, dim=1)
    last = fit.codebook.gather(1, fit.sizes.long()[:, None] - 1)
    fit.codebook = torch.where(unused, last, fit.codebook)
    rank = order.argsort(1).to(torch.uint8)
    fit.codes = rank.gather(1, fit.codes.clamp(max=rank.shape[1] - 1).long())


def _kl(model: Any, hidden: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student) from final hidden states [t, d]."""
    student = head_logits(model, hidden).float().log_softmax(-1)
    target = head_logits(model, teacher).float().log_softmax(-1)
    return nn.functional.kl_div(student, target, reduction="sum", log_target=True)


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
