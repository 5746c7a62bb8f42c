"""Literal recall: of what can be copied word for word from the full text, how much still can be.

A literal is a command, path, URL, flag, number or code word of the skill. The model is asked to
quote the skill, its answer begins with the words before the literal, and it goes on greedily: is
the literal there? Only literals the full text lets the model say count, so the share is 1 for
the full text by construction, and None where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from skimlm.models.tokenizer import inner_ids
from skimlm.skills import rollout
from skimlm.skills.document import Document, body_start, literals
from skimlm.skills.rollout import Prefix
from skimlm.skills.splice import closing, token_ids

ASK = "Quote the skill word for word."
COUNT = 16  # literals, evenly spread over the text
BEFORE = 80  # characters the answer begins with
LONGEST, SLACK = 12, 5  # tokens of a literal, and of what may stand before it
Cloze: TypeAlias = tuple[Tensor, str]  # ids that ask for a literal, and the literal


def known(
    model: Any, tokenizer: Any, document: Document, text: Prefix, count: int = COUNT
) -> list[Cloze]:
    """Of `count` literals those that are said behind the full text, with what asks for them."""
    clozes = cloze(tokenizer, document, count)
    said = _said(model, tokenizer, text, clozes)
    return [pair for pair, right in zip(clozes, said, strict=True) if right]


def share(model: Any, tokenizer: Any, prefix: Prefix, clozes: Sequence[Cloze]) -> float | None:
    """Share of `clozes` that is said behind `prefix`; None of none."""
    return sum(_said(model, tokenizer, prefix, clozes)) / len(clozes) if clozes else None


def cloze(tokenizer: Any, document: Document, count: int) -> list[Cloze]:
    """(ids of question and beginning of the answer, the literal that should follow)."""
    begin, found = body_start(document.text), []
    ask = closing(tokenizer, ASK, True)
    for place, literal in literals(document.text):
        before = document.text[max(begin, place - BEFORE) : place].rstrip()
        if place - BEFORE > begin:
            before = before.partition(" ")[2] or before  # not from the middle of a word
        if before.strip() and len(token_ids(tokenizer, literal)) <= LONGEST:
            begun = torch.tensor(inner_ids(tokenizer, before), dtype=torch.long)
            found.append((torch.cat([ask, begun]), literal))
    if len(found) <= count:
        return found
    return [found[i * len(found) // count] for i in range(count)]


def _said(model: Any, tokenizer: Any, prefix: Prefix, clozes: Sequence[Cloze]) -> list[bool]:
    if not clozes:
        return []
    questions = [question for question, _ in clozes]
    answers = rollout.sample(model, prefix, questions, LONGEST + SLACK, temperature=0)
    texts = [tokenizer.decode(answer) for answer in answers]
    return [literal in text for text, (_, literal) in zip(texts, clozes, strict=True)]
