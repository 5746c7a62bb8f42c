"""The skills of a server: a folder's, by name, and what stands before questions that use some.

A prefix is read once for each choice of skills and shared by all that use it; the last ones stay.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skimlm.api import Skill
from skimlm.errors import SkimError
from skimlm.skills import document, store
from skimlm.skills.front import Standing, ahead, before, taken
from skimlm.skills.rollout import Prefix
from skimlm.skills.splice import token_ids

KEPT = 8  # prefixes


@dataclass(frozen=True)
class Entry:
    """A skill as it is served."""

    name: str
    description: str
    kind: str  # kv, soft or text
    tokens: int  # that stand in a prompt for it
    text_tokens: int  # of its full text
    file: str  # plain name
    stands: Standing
    warning: str | None = None  # where its full text is used in place of what was made of it


class Skills:
    """Skills by name; `prefix` gives what stands before a question."""

    def __init__(self, model: Any, tokenizer: Any, folder: str | Path | None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.entries = {} if folder is None else _entries(model, tokenizer, Path(folder))
        self.hits = self.misses = 0
        self._kept: collections.OrderedDict[tuple[Any, ...], Prefix] = collections.OrderedDict()

    def known(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names, each once; SkimError for one that is none."""
        for name in names:
            if name not in self.entries:
                known = ", ".join(self.entries) or "none"
                raise SkimError(f"no skill {name!r:.80}: there are {known}")
        return tuple(dict.fromkeys(names))

    def prefix(self, names: Sequence[str], raw: bool = False) -> Prefix:
        """What stands before a question with these skills; it runs the model, if they are new."""
        key = (*names, raw)
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            found = before(self.model, self.tokenizer, self._stands(names), raw)
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        else:
            self.hits += 1
        self._kept.move_to_end(key)
        return found

    def length(self, names: Sequence[str], raw: bool = False) -> int:
        """Positions it takes."""
        return ahead(self.tokenizer, self._stands(names), raw)

    def _stands(self, names: Sequence[str]) -> list[Standing]:
        return [self.entries[name].stands for name in names]

    def tokens(self, names: Sequence[str]) -> tuple[int, int]:
        """Tokens that stand in a prompt for skills, and those of their full texts."""
        some = [self.entries[name] for name in names]
        return sum(e.tokens for e in some), sum(e.text_tokens for e in some)


def _entries(model: Any, tokenizer: Any, folder: Path) -> dict[str, Entry]:
    if not folder.is_dir():
        raise SkimError(f"{folder}: no folder: --skills takes one of SKILL.md and .skim files")
    found: dict[str, Entry] = {}
    files = sorted(folder.rglob(f"*{store.SUFFIX}"))
    now = store.fingerprints(model, tokenizer) if files else None
    for path in files:
        entry = _compressed(path, model, tokenizer, now)
        if entry.name in found:
            first = found[entry.name].file
            raise SkimError(f"{path}: a second skill named {entry.name!r}, after {first}")
        found[entry.name] = entry
    for path in document.find([folder]):
        read = document.read(path)
        if read.name not in found:
            ids = token_ids(tokenizer, read.text)
            stands: Standing = [ids]
            found[read.name] = Entry(
                read.name, read.description, "text", len(ids), len(ids), path.name, stands
            )
    return dict(sorted(found.items()))


def _compressed(path: Path, model: Any, tokenizer: Any, now: Mapping[str, Any] | None) -> Entry:
    skill = Skill.load(path).stored
    stands, warning = store.fitting(skill, model, tokenizer, path.name, now)
    full = len(token_ids(tokenizer, skill.document.text))
    kind = skill.kind if warning is None and skill.k is not None else "text"
    text = skill.document
    return Entry(text.name, text.description, kind, taken(stands), full, path.name, stands, warning)
