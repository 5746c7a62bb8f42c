"""The gate that a compressed skill has to pass, measured on questions it was not made from.

    closure = 1 - KL(full text || compressed) / KL(full text || no skill)      dev questions

It counts if its closure is at least `target` (or its KL is tiny) and its literal recall at least
`floor`. Of what passes, the cheapest is served; if nothing does, the full text. What was measured
stays in the artefact. The same inputs give the same: no clock, no judge, no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from skimlm import __version__
from skimlm.errors import SkimError
from skimlm.skills import rollout
from skimlm.skills.distill import Study, divergences, study
from skimlm.skills.document import Document
from skimlm.skills.recall import Cloze, known, share
from skimlm.skills.rollout import Prefix
from skimlm.skills.splice import closing, opening, wrapper_tokens

ENOUGH = 0.05  # nats per token: as good as the text, however small the effect of the skill
ROOM = 256  # positions kept for a question and its answer
Progress = Callable[[str, int, int], None]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Settings:
    """How much is studied and trained; the defaults take minutes per skill on a CPU."""

    train: int = 96  # questions
    dev: int = 24
    answer: int = 48  # tokens
    steps: int = 60  # at most, for the first size that is trained; half of it for those after
    check: int = 10  # steps between measurements on dev
    rows: int = 8  # questions per step
    lr: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Gate:
    """How the model does with and without the full text of a skill, and what is asked for."""

    model: Any
    tokenizer: Any
    document: Document
    ids: Tensor  # of the text
    text: Prefix  # behind the full text
    train: Study
    dev: Study
    none: float  # dev divergence without the skill, summed over tokens
    literals: list[Cloze]  # that the full text lets the model say
    settings: Settings
    target: float
    floor: float
    progress: Progress | None
    enough: float  # KL, nats per token, at which no closure is asked for


def examine(
    model: Any,
    tokenizer: Any,
    document: Document,
    ids: Tensor,
    settings: Settings,
    target: float,
    floor: float,
    progress: Progress | None,
    enough: float = ENOUGH,
    taught: bool = True,
) -> Gate:
    """Let the model study a skill from its full text; `taught`: to train on what it answers."""
    tell = progress or (lambda phase, done, total: None)
    tell("study", 0, 3)
    with torch.no_grad():
        text = rollout.read(model, opening(tokenizer, [[ids]]))
    studies = []
    for i, split in enumerate(("train", "dev")):
        count, seed = getattr(settings, split), settings.seed + 100_000 * i
        needed = taught or split == "dev"
        studies.append(
            study(model, tokenizer, document, text, split, count, settings.answer, seed, needed)
        )
        tell("study", i + 1, 3)
    train, dev = studies
    none = sum(without(model, tokenizer, dev))
    literals = known(model, tokenizer, document, text)
    tell("study", 3, 3)
    return Gate(
        model, tokenizer, document, ids, text, train, dev, none, literals, settings, target, floor,
        progress, enough,
    )  # fmt: skip


def choose(
    measured: Sequence[dict[str, Any]], target: float, floor: float, enough: float = ENOUGH
) -> dict[str, Any] | None:
    """The cheapest measured row that is good enough, untrained before trained; None if none is."""
    good = [
        row
        for row in measured
        if (row["closure"] >= target or row["kl"] <= enough)
        and (row["literal_recall"] is None or row["literal_recall"] >= floor)
    ]
    return min(good, key=lambda row: (row["tokens"], row["method"] == "distill"), default=None)


def measured(gate: Gate, method: str, k: int, tokens: int, prefix: Prefix) -> dict[str, Any]:
    """A row of the evidence; literals are asked for where they decide."""
    total = sum(divergences(gate.model, prefix, gate.dev))
    if not math.isfinite(total):
        raise SkimError(
            f"{gate.model.config.model_type}: answers behind {k} of kind {method} are no numbers"
            f" (KL {total}): --kind text needs none of it"
        )
    row: dict[str, Any] = {
        "method": method,
        "k": k,
        "tokens": tokens + wrapper_tokens(gate.tokenizer),
        "closure": 1 - total / gate.none if gate.none > 0 else 0.0,
        "kl": total / gate.dev.tokens,
        "literal_recall": None,
    }
    if method == "distill" or row["closure"] >= gate.target or row["kl"] <= gate.enough:
        row["literal_recall"] = share(gate.model, gate.tokenizer, prefix, gate.literals)
    return row


def without(model: Any, tokenizer: Any, study: Study) -> list[float]:
    """Sum of KL per answer of a model that has no skill at all."""
    with torch.no_grad():
        bare = rollout.read(model, opening(tokenizer, []))
    bare_ids = [closing(tokenizer, question, False) for question in study.questions]
    return divergences(model, bare, Study(study.questions, bare_ids, study.answers, study.teacher))


def fewest(
    gate: Gate,
    sizes: Sequence[int],
    attempt: Callable[[int], tuple[Made, dict[str, Any]]],
    usual: int,
) -> tuple[Made, bool, list[dict[str, Any]]]:
    """Of ascending sizes the smallest whose attempt passes, what was made, and all that was tried.

    An attempt gives what it made and its row of the evidence; the first is the size at index
    `usual`, the second its neighbour, then halves. If none passes it is the largest one.
    """
    made: dict[int, tuple[Made, dict[str, Any]]] = {}

    def passes(at: int) -> bool:
        if gate.progress:
            gate.progress("fit", len(made), len(made) + 1)
        made[at] = attempt(sizes[at])
        return choose([made[at][1]], gate.target, gate.floor, gate.enough) is not None

    low, high, at = -1, len(sizes), min(usual, len(sizes) - 1)  # low fails, high passes
    while high - low > 1:
        if passes(at):
            high = at
        else:
            low = at
        at = (at - 1 if at == high else at + 1) if len(made) == 1 else (low + high) // 2
        at = min(max(at, low + 1), high - 1)
    if gate.progress:
        gate.progress("fit", len(made), len(made))
    rows = [made[at][1] for at in sorted(made)]
    return made[min(high, len(sizes) - 1)][0], high < len(sizes), rows


def evidence(gate: Gate, candidates: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """What an artefact says of how it came to be."""
    return {
        "text_tokens": len(gate.ids),
        "target": gate.target,
        "floor": gate.floor,
        "kl_no_skill": gate.none / gate.dev.tokens,
        "questions": {"train": len(gate.train.questions), "dev": len(gate.dev.questions)},
        "answer_tokens": gate.settings.answer,
        "candidates": list(candidates),
        "settings": vars(gate.settings),
        "skimlm": __version__,
    } | facts
