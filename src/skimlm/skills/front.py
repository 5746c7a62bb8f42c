"""What stands before a question: texts, soft tokens and kept keys and values, as one prefix.

    before(model, tokenizer, skills) -> Prefix       read where there is something to read
    ahead(tokenizer, skills) -> int                  positions it takes

Packs (kv.py) are made apart, each behind the same beginning, and come first: they are there without
being read. Several stand side by side, all at their own places behind one beginning, and the
question behind the longest. So each is seen as it was when it was made. Put one after the other, as
their texts would be, they keep less, and so do their texts (docs/log.md): four skills of 306 to 783
tokens kept 0.52 of what each does alone, their texts 0.59, side by side 0.63. With all but the
beginning counting 1 / sqrt(n), for there are n times as many to look at, it is 0.69.

Whatever is text or soft tokens is read behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.runtime.prefix import Group, PrefixCache
from skimlm.skills import kv, rollout
from skimlm.skills.kv import Pack
from skimlm.skills.rollout import Prefix
from skimlm.skills.splice import WRAPPER, Piece, length, opening, token_ids

Standing: TypeAlias = list[Piece] | Pack  # in a prompt for one skill


def before(model: Any, tokenizer: Any, skills: Sequence[Standing], raw: bool = False) -> Prefix:
    """Everything before the question; gradients are not followed."""
    packs, texts = _kinds(skills)
    with torch.no_grad():
        if not packs:
            return rollout.read(model, opening(tokenizer, texts, raw))
        prefix = side_by_side(model, packs)
        between = token_ids(tokenizer, WRAPPER[1])
        pieces = [piece for text in texts for piece in (between, *text)]
        return rollout.read(model, pieces, after=prefix) if pieces else prefix


def ahead(tokenizer: Any, skills: Sequence[Standing], raw: bool = False) -> int:
    """Positions that `before` takes: where the question begins."""
    packs, texts = _kinds(skills)
    if not packs:
        return length(opening(tokenizer, texts, raw))
    between = len(token_ids(tokenizer, WRAPPER[1]))
    return max(pack.length for pack in packs) + sum(between + length(text) for text in texts)


def _kinds(skills: Sequence[Standing]) -> tuple[list[Pack], list[list[Piece]]]:
    """Those that are there without being read, and those that are read behind them."""
    packs = [skill for skill in skills if isinstance(skill, Pack)]
    return packs, [skill for skill in skills if not isinstance(skill, Pack)]


def taken(stands: Standing) -> int:
    """Positions that stand in a prompt for a skill."""
    return stands.tokens if isinstance(stands, Pack) else length(stands)


def side_by_side(model: Any, packs: Sequence[Pack]) -> Prefix:
    """Packs at their own places behind the beginning of the first."""
    for pack in packs:
        kv.check_fits(pack, model)
        if pack.first != packs[0].first:
            raise SkimError("skills made behind different beginnings cannot be used together")
    apart = [kv.groups(pack, model.dtype, model.device) for pack in packs]
    end = max(pack.length for pack in packs)
    layers = [
        [_joined(heads, packs[0].first) for heads in zip(*layer, strict=True)]
        for layer in zip(*apart, strict=True)
    ]
    return Prefix(PrefixCache(layers, end), end)


def _joined(groups: Sequence[Group], first: int) -> Group:
    """One head's entries of all packs, the beginning once."""
    less = 0.5 * math.log(len(groups))
    keys, values = (
        torch.cat([getattr(g, name)[:, first if i else 0 :] for i, g in enumerate(groups)], 1)
        for name in ("keys", "values")
    )
    biases = [_bias(group) for group in groups]
    lowered = [bias[:, first:] - less for bias in biases]
    return Group(keys, values, torch.cat([biases[0][:, :first], *lowered], 1))


def _bias(group: Group) -> Tensor:
    return group.keys.new_zeros(group.keys.shape[:2]).float() if group.bias is None else group.bias
