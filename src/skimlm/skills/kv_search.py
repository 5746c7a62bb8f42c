"""The fewest keys and values of a skill that measurably do what its full text does.

Sizes from half of the text down are tried, each fitted by itself (kv.py): the first that passes the
gate from below is served. Seconds on a CPU, nothing is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.runtime.prefix import FAMILIES, fits
from skimlm.skills import kv
from skimlm.skills.document import Document
from skimlm.skills.front import side_by_side
from skimlm.skills.gate import Gate, Progress, Settings, evidence, examine, fewest, measured
from skimlm.skills.kv import Pack, Watched
from skimlm.skills.recall import ASK
from skimlm.skills.splice import closing, opening
from skimlm.skills.store import Skill, fingerprints

STUDIED = {
    "train": 12,
    "dev": 16,
}  # questions; 24 to study gave .987 where 12 gave .990 (docs/log.md)
ENOUGH = 0.01  # nats per token: as good as the text, where a skill does next to nothing
MOST, SHRINK, LEAST = 0.5, 0.75, 0.05  # shares of the text: the largest, of the one before, the end
USUAL = 0.1  # the first that is tried is the next above
REPEATED = 2.0
PART, OVERLAP = 96, 32  # tokens repeated at once, and those before them that are read again


def compress(
    model: Any,
    tokenizer: Any,
    document: Document,
    ids: Tensor,
    k: int | None,
    settings: Settings,
    target: float,
    floor: float,
    progress: Progress | None = None,
) -> Skill:
    """Compress a skill to `k` positions of its text, or to the fewest that pass the gate."""
    gate, first, watched = studied(
        model, tokenizer, document, ids, settings, target, floor, progress
    )

    def attempt(size: int) -> tuple[Pack, dict[str, Any]]:
        keep = kv.choose(watched, size + first, first)
        pack = kv.fit(gate.text, watched, keep, first)
        prefix = side_by_side(model, [pack])
        return pack, measured(gate, "kv", pack.tokens, pack.tokens, prefix)

    sizes = resolutions(len(ids)) if k is None else [k]
    usual = sum(size < USUAL * len(ids) for size in sizes)
    pack, passed, rows = fewest(gate, sizes, attempt, usual)
    served = pack.tokens if passed or k is not None else None
    made_for, facts = fingerprints(model, tokenizer), evidence(gate, rows)
    return Skill(document, pack, served, "kv", made_for, facts, document.source)


def studied(
    model: Any,
    tokenizer: Any,
    document: Document,
    ids: Tensor,
    settings: Settings,
    target: float,
    floor: float,
    progress: Progress | None,
) -> tuple[Gate, int, list[Watched]]:
    """What measures a skill, the positions before its text, and what study queries look at."""
    check_fits(model)
    gate = examine(
        model, tokenizer, document, ids, settings, target, floor, progress, ENOUGH, False
    )
    first = sum(map(len, opening(tokenizer, [[]])))
    return gate, first, kv.watch(model, gate.text, study_rows(gate), settings.seed)


def check_fits(model: Any) -> None:
    """Refuse a model whose attention is not the plain one of FAMILIES."""
    if not fits(model):
        raise SkimError(
            f"{model.config.model_type}: keys and values can be kept for plain attention to the"
            f" whole text ({', '.join(FAMILIES)}): use --kind soft or --kind text"
        )


def resolutions(tokens: int) -> list[int]:
    """Sizes that are tried, ascending: MOST of the text, SHRINK of it, and so on."""
    sizes = [max(1, int(tokens * MOST))]
    while (k := round(SHRINK * sizes[-1])) >= max(1, LEAST * tokens) and k < sizes[-1]:
        sizes.append(k)
    return sizes[::-1]


def study_rows(gate: Gate) -> list[tuple[float, list[Tensor]]]:
    """Questions with their answers, and the text part by part as if it were being repeated.

    The text counts REPEATED times as much: at 12 % of three skills literal recall is then 0.91,
    0.67, 0.88 in place of 0.73, 0.67, 0.69, closure 0.974, 0.971, 0.955 and 0.978, 0.971, 0.967.
    """
    pairs = zip(gate.train.question_ids, gate.train.answers, strict=True)
    ask = closing(gate.tokenizer, ASK, True)
    parts = [
        torch.cat([ask, gate.ids[max(0, begin - OVERLAP) : begin + PART]])
        for begin in range(0, len(gate.ids), PART)
    ]
    return [(1.0, [torch.cat(pair) for pair in pairs]), (REPEATED, parts)]
