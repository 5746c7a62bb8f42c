"""A skill as less text: the fewest of its lines that measurably do what all of them do.

For engines and hosted models that take nothing but text. A line counts by how much answers look at
its tokens (kv.py: the mean square of attention, over all heads). Lines are kept in their order and
as they are; front matter always, the headings above a kept line, and the fence around one.
"""

from __future__ import annotations

import io
import itertools
from typing import Any

import torch
from torch import Tensor

from skimlm.skills import kv_search, rollout
from skimlm.skills.document import FENCE, HEADING, Document, body_start
from skimlm.skills.gate import Progress, Settings, evidence, fewest, measured
from skimlm.skills.select import tokens as placed
from skimlm.skills.splice import opening, token_ids
from skimlm.skills.store import Skill, fingerprints
from skimlm.skills.text_file import Extract

MOST, STEP, LEAST = 0.9, 0.1, 0.3  # shares of the text that are tried


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
    """Shorten a skill to at most `k` tokens, or to the fewest lines that pass the gate."""
    gate, first, watched = kv_search.studied(
        model, tokenizer, document, ids, settings, target, floor, progress
    )
    score = torch.stack([layer.score.sum(0) for layer in watched]).sum(0)[first:]
    worth = lines_worth(tokenizer, document, score)

    def attempt(size: int) -> tuple[Extract, dict[str, Any]]:
        made = Extract(shortened(tokenizer, document, worth, size))
        short = token_ids(tokenizer, made.text)
        with torch.no_grad():
            prefix = rollout.read(model, opening(tokenizer, [[short]]))
        return made, measured(gate, "extract", len(short), len(short), prefix)

    shares = [LEAST + STEP * i for i in range(round((MOST - LEAST) / STEP) + 1)]
    sizes = [max(1, int(share * len(ids))) for share in shares] if k is None else [k]
    made, passed, rows = fewest(gate, sizes, attempt, len(sizes) - 2)
    served = len(token_ids(tokenizer, made.text)) if passed or k is not None else None
    made_for, facts = fingerprints(model, tokenizer), evidence(gate, rows)
    return Skill(document, made, served, "extract", made_for, facts, document.source)


def lines_worth(tokenizer: Any, document: Document, score: Tensor) -> list[float]:
    """What each line counts: the mean of its tokens' `score` [n]."""
    _, places = placed(tokenizer, document.text)
    ends = list(itertools.accumulate(map(len, _lines(document.text))))
    sums, counts = [0.0] * len(ends), [0] * len(ends)
    line = 0
    for (begin, _), value in zip(places, score.tolist(), strict=True):
        while begin >= ends[line]:
            line += 1
        sums[line] += value
        counts[line] += 1
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]


def shortened(tokenizer: Any, document: Document, worth: list[float], size: int) -> str:
    """The lines that count most, with what has to stand around them, in at most `size` tokens."""
    lines = _lines(document.text)
    around, heads = needed(document.text), headings(document.text)
    front = body_start(document.text)
    ends = itertools.accumulate(map(len, lines))
    kept = {i for i, end in enumerate(ends) if end <= front}
    for i in sorted(range(len(lines)), key=lambda i: (-worth[i], i)):
        if not lines[i].strip() or i in heads:  # a heading comes with what stands below it
            continue
        more = kept | {i} | around[i]
        if len(token_ids(tokenizer, _joined(lines, more))) <= size:
            kept = more
    return _joined(lines, kept)


def needed(text: str) -> list[set[int]]:
    """For each line the others that it cannot do without: its headings, both ends of its fence."""
    heads, fences = headings(text), _fences(text)
    above: list[int] = []  # the headings that hold
    found = []
    for i in range(len(_lines(text))):
        if i in heads:
            above = [line for line in above if heads[line] < heads[i]]
        ends = {end for fence in fences if fence[0] <= i <= fence[1] for end in fence}
        found.append({*above} | ends)
        if i in heads:
            above.append(i)
    return found


def headings(text: str) -> dict[int, int]:
    """Lines that are headings, with their levels."""
    inside = {i for begin, end in _fences(text) for i in range(begin, end + 1)}
    lines = {_line(text, match.start()): match[0] for match in HEADING.finditer(text)}
    return {i: len(t) - len(t.lstrip("#")) for i, t in lines.items() if i not in inside}


def _fences(text: str) -> list[tuple[int, int]]:
    """First and last lines of what stands in code fences."""
    spans = [match.span() for match in FENCE.finditer(text)]
    return [(_line(text, begin), _line(text, end - 1)) for begin, end in spans]


def _lines(text: str) -> list[str]:
    """With their ends; `splitlines` ends some where a token or a heading does not."""
    return list(io.StringIO(text, newline="\n"))


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place)


def _joined(lines: list[str], kept: set[int]) -> str:
    """The kept lines; a blank one stays where one stood between two of them."""
    made: list[str] = []
    gap = False
    for i, line in enumerate(lines):
        if i in kept:
            made += ["\n"] if gap and made and made[-1].strip() else []
            made.append(line)
            gap = False
        elif not line.strip():
            gap = True
    return "".join(made).rstrip()
