"""A SKILL.md made cheaper for one model, in one of three kinds.

kv     keys and values of the positions that matter (kv_search.py): read with no prefill at all
soft   trained vectors in place of its tokens (soft.py), for engines that take embeddings
text   the lines that matter (extract.py), for engines that take nothing but text
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from skimlm.errors import SkimError
from skimlm.skills import extract, kv_search, soft
from skimlm.skills.document import Document
from skimlm.skills.gate import ROOM, Progress, Settings
from skimlm.skills.splice import token_ids, wrapper_tokens
from skimlm.skills.store import Skill, check_reach

KINDS = ("kv", "soft", "text")
TARGET, FLOOR = 0.95, 0.9  # closure, and literal recall, that are asked for


def compress(
    model: Any,
    tokenizer: Any,
    document: Document,
    *,
    kind: str | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    target: float = TARGET,
    floor: float = FLOOR,
    settings: Mapping[str, Any] = MappingProxyType({}),
    progress: Progress | None = None,
    **for_soft: Any,
) -> Skill:
    """Compress a skill: to a size, or as far as the gate lets it.

    It becomes keys and values, or soft tokens where options `for_soft` (`method`, `pin`,
    `compressor`) are given. `settings` are fields of Settings, others are as usual for the kind.
    """
    kind = kind or ("soft" if any(for_soft.values()) else "kv")
    if kind not in KINDS:
        raise SkimError(f"kind must be one of {', '.join(KINDS)}, got {kind!r:.60}")
    if kind != "soft" and any(for_soft.values()):
        named = ", ".join(name for name, value in for_soft.items() if value)
        raise SkimError(f"{named}: of soft tokens alone: leave it out, or give kind soft")
    studied = Settings(**({} if kind == "soft" else kv_search.STUDIED) | dict(settings))
    ids = token_ids(tokenizer, document.text)
    check_reach(model, len(ids) + wrapper_tokens(tokenizer), ROOM + studied.answer, document.name)
    k = soft.budget(len(ids), tokens, ratio)
    if kind == "soft":
        given = {name: value for name, value in for_soft.items() if value}
        return soft.compress(
            model, tokenizer, document, tokens=tokens, ratio=ratio, target=target, floor=floor,
            settings=studied, progress=progress, **given,
        )  # fmt: skip
    make = kv_search.compress if kind == "kv" else extract.compress
    return make(model, tokenizer, document, ids, k, studied, target, floor, progress)
