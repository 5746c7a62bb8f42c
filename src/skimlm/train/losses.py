"""Losses of final hidden states and their gradients, the head in chunks: full logits never stand.

    loss = cross_entropy(model, targets)            of the next tokens
    loss = kl_divergence(model, known)              from a teacher, by its final hidden states
    loss_sum(loss, hidden)                          a float
    value, gradient = loss_gradient(loss, hidden)   d loss / d hidden
    backward(loss, hidden)                          the same, on into what `hidden` came from
    token_scores(model, teacher, student, ...)      what is measured of every token

A teacher's final hidden states (d numbers a token) are kept instead of its logits: its head runs
again wherever they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skimlm.models.head import head_logits

CHUNK = 512  # tokens whose logits stand at once


@dataclass(frozen=True)
class Loss:
    """A loss summed over tokens: of hidden states [c, d] and which rows of all [n, d] they are."""

    part: Callable[[Tensor, slice], Tensor]
    tokens: int  # that count: what a mean is over


def cross_entropy(model: Any, targets: Tensor) -> Loss:
    """-log p(target) in nats for targets [n]; target -1 does not count."""

    def part(hidden: Tensor, rows: slice) -> Tensor:
        logits = head_logits(model, hidden).float()
        return F.cross_entropy(logits, targets[rows], ignore_index=-1, reduction="sum")

    return Loss(part, int((targets >= 0).sum()))


def kl_divergence(model: Any, known: Tensor, teacher: Any = None, scale: float = 1.0) -> Loss:
    """KL(teacher || model) in nats over the whole vocabulary, times `scale`.

    `known` [n, d] are final hidden states of the teacher, which is the model itself if not given.
    """
    teacher = model if teacher is None else teacher

    def part(hidden: Tensor, rows: slice) -> Tensor:
        log_p = log_probabilities(teacher, known[rows]).detach()
        return scale * _kl(log_p, log_probabilities(model, hidden)).sum()

    return Loss(part, len(known))


def log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    """Log-probabilities [n, vocab] in float32 of final hidden states [n, d]."""
    return head_logits(model, hidden).float().log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms p (log p - log q) [n, vocab] of KL(p || q)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True)


def loss_sum(loss: Loss, hidden: Tensor, chunk: int = CHUNK) -> float:
    """The loss of hidden states [n, d] or [b, t, d], summed over tokens; no gradient."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.no_grad():
        return sum(loss.part(flat[rows], rows).item() for rows in chunks(len(flat), chunk))


def loss_gradient(loss: Loss, hidden: Tensor, chunk: int = CHUNK) -> tuple[float, Tensor]:
    """The loss of hidden states [n, d] or [b, t, d], summed, and its gradient by them."""
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    total = 0.0
    gradients: list[Tensor] = []
    with torch.enable_grad():
        for rows in chunks(len(flat), chunk):
            some = flat[rows].detach().requires_grad_()
            value = loss.part(some, rows)
            gradients += torch.autograd.grad(value, some)
            total += value.item()
    return total, torch.cat(gradients).view_as(hidden).to(hidden.dtype)


def backward(loss: Loss, hidden: Tensor, chunk: int = CHUNK) -> float:
    """Backpropagate the loss into `hidden` and what it came from; its sum over tokens."""
    total, gradient = loss_gradient(loss, hidden, chunk)
    hidden.backward(gradient)
    return total


@torch.no_grad()
def token_scores(
    model: Any,
    teacher: Tensor,
    student: Tensor,
    targets: Tensor | None = None,
    chunk: int = CHUNK,
) -> dict[str, Tensor]:
    """What is measured of every token, from final states [n, d] of the same head; each [n].

    kl: nats from teacher to student. With `targets` [n] also nll: of the target under the student,
    and agree: 1.0 where both would say the same.
    """
    found: dict[str, list[Tensor]] = {"kl": []}
    found |= {} if targets is None else {"nll": [], "agree": []}
    for rows in chunks(len(teacher), chunk):
        log_p, log_q = (log_probabilities(model, h[rows]) for h in (teacher, student))
        found["kl"].append(_kl(log_p, log_q).sum(-1))
        if targets is not None:
            found["nll"].append(-log_q.gather(1, targets[rows, None].to(log_q.device))[:, 0])
            found["agree"].append((log_p.argmax(-1) == log_q.argmax(-1)).float())
    return {name: torch.cat(parts) for name, parts in found.items()}


def chunks(count: int, chunk: int) -> list[slice]:
    """0 .. count - 1 in slices of at most `chunk`."""
    return [slice(first, first + chunk) for first in range(0, count, chunk)]


def next_tokens(ids: Tensor) -> Tensor:
    """What the tokens `ids` [n, t] should predict, [n t]; -1 at the end of a window."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1).flatten()
