"""Losses on final hidden states and their gradients, the head in chunks: no full logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skimlm.models.head import head_logits


def backward_from_loss(
    hidden: Tensor, gradient: Callable[[Tensor, slice], Tensor], chunk: int = 512
) -> None:
    """Backpropagate into `hidden` [n, t, d], the head in chunks: full logits never stand.

    `gradient(h, part)` returns d loss / d h for the rows `part` of the n t tokens.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    pieces = [
        gradient(flat[i : i + chunk].detach(), slice(i, i + chunk))
        for i in range(0, len(flat), chunk)
    ]
    hidden.backward(torch.cat(pieces).view_as(hidden).to(hidden.dtype))


def cross_entropy_gradient(model: Any, targets: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """d (sum of cross entropies) / d hidden for `backward_from_loss`; target -1 is left out."""

    def gradient(h: Tensor, part: slice) -> Tensor:
        h = h.requires_grad_()
        with torch.enable_grad():
            logits = head_logits(model, h).float()
            loss = nn.functional.cross_entropy(
                logits, targets[part], ignore_index=-1, reduction="sum"
            )
            return torch.autograd.grad(loss, h)[0]

    return gradient


def next_tokens(ids: Tensor) -> Tensor:
    """What the tokens `ids` [n, t] should predict, [n t]; -1 at the end of a window."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1).flatten()
