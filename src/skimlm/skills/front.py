"""What stands before a question: texts, soft tokens and kept keys and values, as one prefix.

    before(model, tokenizer, skills) -> Prefix       read where there is something to read

Packs (kv.py) are made apart, each behind the same opening, and come first: they are there without
being read. One behind another is turned to its new place (`moved`), the opening is that of the
first. Whatever is text or soft tokens is read behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.runtime.prefix import Group, PrefixCache
from skimlm.skills import kv, rollout
from skimlm.skills.kv import Pack
from skimlm.skills.rollout import Prefix
from skimlm.skills.splice import WRAPPER, Piece, opening, token_ids

Standing: TypeAlias = list[Piece] | Pack  # in a prompt for one skill


def before(model: Any, tokenizer: Any, skills: Sequence[Standing], raw: bool = False) -> Prefix:
    """Everything before the question; gradients are not followed."""
    packs = [skill for skill in skills if isinstance(skill, Pack)]
    texts = [skill for skill in skills if not isinstance(skill, Pack)]
    with torch.no_grad():
        if not packs:
            return rollout.read(model, opening(tokenizer, texts, raw))
        prefix = side_by_side(model, tokenizer, packs)
        between = token_ids(tokenizer, WRAPPER[1])
        pieces = [piece for text in texts for piece in (between, *text)]
        return rollout.read(model, pieces, after=prefix) if pieces else prefix


def side_by_side(model: Any, tokenizer: Any, packs: Sequence[Pack]) -> Prefix:
    """Packs one after the other, as if their texts followed each other."""
    for pack in packs:
        kv.check_fits(pack, model)
    first, *others = packs
    layers, end = kv.groups(first, model.dtype), first.length
    gap = len(token_ids(tokenizer, WRAPPER[1]))
    for pack in others:
        if pack.first != first.first:
            raise SkimError("skills made behind different beginnings cannot be used together")
        steps = end + gap - pack.first
        more = kv.groups(pack, model.dtype)
        layers = [
            [
                _joined(one, other, pack.first, steps, model)
                for one, other in zip(*pair, strict=True)
            ]
            for pair in zip(layers, more, strict=True)
        ]
        end += gap + pack.length - pack.first
    return Prefix(PrefixCache(layers, end), end)


def _joined(group: Group, other: Group, first: int, steps: int, model: Any) -> Group:
    """Another pack's entries, without its opening, `steps` further on behind those of `group`."""
    assert group.bias is not None and other.bias is not None
    return Group(
        torch.cat([group.keys, moved(model, other.keys[:, first:], steps)], 1),
        torch.cat([group.values, other.values[:, first:]], 1),
        torch.cat([group.bias, other.bias[:, first:]], 1),
    )


def moved(model: Any, keys: Tensor, steps: int) -> Tensor:
    """Keys [..., d] turned to places `steps` further on: a rotation of pairs (j, j + half)."""
    rotary = model.base_model.rotary_emb
    if rotary.rope_type in ("dynamic", "longrope"):
        raise SkimError(f"rotary positions of type {rotary.rope_type} change with the length of a"
                        " text: skills cannot be put together")  # fmt: skip
    angles = steps * rotary.inv_freq.double()
    n = 2 * len(angles)
    cos, sin = angles.cos().repeat(2).float(), angles.sin().repeat(2).float()
    turned = keys[..., :n].float()
    left, right = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-right, left], -1) * sin
    return torch.cat([turned.to(keys.dtype), keys[..., n:]], -1)
