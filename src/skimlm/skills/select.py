"""A skill in k tokens without any training: which of its own tokens to keep.

    head      the first k: skills say what matters first
    leads     half of k from the head, the rest from the beginnings of all sections, equally long
    selfinfo  the k least expected ones: -log p(token | text before) under the model itself, spans
              that only work word for word before all others (after Selective Context and LLMLingua)
    sections  whole sections, those nearest to the description first (BM25), until k tokens are full

All return the kept tokens' places, ascending; those of a smaller k are among those of a larger one.
They are candidates of their own, what distillation starts from, and what it has to beat.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from skimlm.evaluate.perplexity import token_nll
from skimlm.models.tokenizer import encode_text
from skimlm.skills.document import Document, Section, sections, spans

METHODS = ("head", "leads", "selfinfo", "sections")
HEAD = 32  # tokens of the text that come before all leads: its name, and what it is for


def keep(model: Any, tokenizer: Any, document: Document, k: int, method: str) -> Tensor:
    """Places [k] of the tokens of `document.text` that `method` keeps, ascending."""
    ids, places = tokens(tokenizer, document.text)
    if k >= len(ids):
        return torch.arange(len(ids))
    if method == "head":
        return torch.arange(k)
    if method == "leads":
        return torch.tensor(list(itertools.chain(*section_leads(document, places, k))))
    if method == "selfinfo":
        return selfinfo(model, document.text, ids, places, k)
    if method == "sections":
        return by_section(document, places, k)
    raise AssertionError(method)


def tokens(tokenizer: Any, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Ids [n] of a text and where each token stands in it: [begin, end) in characters."""
    made = encode_text(tokenizer, text, return_offsets_mapping=True)
    return torch.tensor(made["input_ids"], dtype=torch.long), made["offset_mapping"]


def selfinfo(model: Any, text: str, ids: Tensor, places: list[tuple[int, int]], k: int) -> Tensor:
    """The k tokens that say most; tokens of spans come first, among them again by information."""
    with torch.no_grad():
        nll = token_nll(model, ids[None].to(model.device)).cpu()
    score = torch.cat([nll.new_full((1,), math.inf), nll])  # the first has no context
    fixed = torch.zeros(len(ids), dtype=torch.bool)
    ranges = iter(spans(text))
    begin, end = next(ranges, (len(text), len(text)))
    for i, (a, b) in enumerate(places):
        while a >= end:
            begin, end = next(ranges, (len(text), len(text) + 1))
        fixed[i] = b > begin
    # spans may be most of a text: then they, too, must leave room for what explains them
    score[fixed] += float(score[1:].median()) * 2
    return score.topk(k).indices.sort().values


def section_leads(
    document: Document, places: list[tuple[int, int]], k: int, most: int | None = None
) -> list[list[int]]:
    """By section, the first max(k / 2, HEAD) tokens of the text, and the first t of every section.

    t is as large as k allows; the first sections get one more. Of no section more than `most`:
    there may then be fewer than k.
    """
    members = [own[:most] for own in _members(sections(document.text), places)]
    k = min(k, sum(map(len, members)))
    left, head = max(k // 2, min(k, HEAD)), []
    for own in members:
        head.append(min(left, len(own)))
        left -= head[-1]

    def kept(t: int) -> int:
        return sum(max(some, min(t, len(own))) for some, own in zip(head, members, strict=True))

    t = bisect.bisect_right(range(k + 1), k, key=kept) - 1
    left, chosen = k - kept(t), []
    for some, own in zip(head, members, strict=True):
        more = int(left > 0 and some <= t < len(own))
        chosen.append(own[: max(some, t + more)])
        left -= more
    return chosen


def by_section(document: Document, places: list[tuple[int, int]], k: int) -> Tensor:
    """Front matter, then whole sections by rank; the last one is cut where k is reached."""
    parts = sections(document.text)
    ranks = bm25([part.text for part in parts], f"{document.name} {document.description}")
    order = sorted(range(len(parts)), key=lambda i: (bool(parts[i].path), -ranks[i], i))
    members = _members(parts, places)
    chosen = [token for part in order for token in members[part]][:k]
    return torch.tensor(sorted(chosen))


def _members(parts: list[Section], places: list[tuple[int, int]]) -> list[list[int]]:
    """The tokens of every section, by where they begin."""
    starts = list(itertools.accumulate((len(part.text) for part in parts[:-1]), initial=0))
    members: list[list[int]] = [[] for _ in parts]
    for token, (begin, _) in enumerate(places):
        members[bisect.bisect_right(starts, begin) - 1].append(token)
    return members


def bm25(texts: list[str], query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Okapi BM25 of each text for a query."""
    bags = [Counter(_words(text)) for text in texts]
    mean = sum(sum(bag.values()) for bag in bags) / max(1, len(bags))
    scores = []
    for bag in bags:
        total = 0.0
        for word in dict.fromkeys(_words(query)):
            seen = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - seen + 0.5) / (seen + 0.5))
            long = 1 - b + b * sum(bag.values()) / mean if mean else 1.0
            total += idf * bag[word] * (k1 + 1) / (bag[word] + k1 * long)
        scores.append(total)
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
