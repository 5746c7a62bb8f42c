"""One skill compressed: the fewest soft tokens that measurably do what the full text does.

    closure(k) = 1 - KL(full text || k soft tokens) / KL(full text || no skill)      dev questions

A ladder of k up to half of the text is tried, untrained (head, sections) and distilled. The
smallest k counts whose closure is at least `target` (or whose KL is tiny) and whose literal recall
is at least `floor`; of equals the untrained one, which is plain words. If none does, the full text
is served. What was measured stays in the artefact. The same inputs give the same file: no clock,
no judge, no network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skimlm import __version__
from skimlm.errors import SkimError
from skimlm.skills import compressor as compressing
from skimlm.skills import rollout, select
from skimlm.skills.distill import Study, distill, divergences, nested, study
from skimlm.skills.document import Document, spans
from skimlm.skills.recall import recall
from skimlm.skills.rollout import Prefix
from skimlm.skills.splice import Pin, closing, opening, pieces_of, token_ids, wrapper_tokens
from skimlm.skills.store import Skill, check_reach, fingerprints

RUNGS = (32, 64, 128, 256, 512, 1024, 2048)
MOST = 0.5  # of the text: above it soft tokens are not worth their trouble
ENOUGH = 0.05  # nats per token: as good as the text, however small the effect of the skill
ROOM = 256  # positions kept for a question and its answer
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How much is asked and trained; the defaults take minutes per skill on a CPU."""

    train: int = 96  # questions
    dev: int = 24
    answer: int = 48  # tokens
    steps: int = 100
    rows: int = 8  # questions per step
    lr: float = 3e-3
    seed: int = 0


def compress(
    model: Any,
    tokenizer: Any,
    document: Document,
    *,
    method: str = "adaptive",
    tokens: int | None = None,
    ratio: float | None = None,
    target: float = 0.9,
    floor: float = 0.0,
    pin: bool = False,
    settings: Settings | None = None,
    source: str = "",
    compressor: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Skill:
    """Compress a skill for a model: to a size, or (`adaptive` without one) as far as it goes."""
    settings = settings or Settings()
    ids = token_ids(tokenizer, document.text)
    check_reach(model, len(ids) + wrapper_tokens(tokenizer), ROOM + settings.answer, document.name)
    k = budget(len(ids), tokens, ratio)
    if method == "adaptive" and k is not None:
        method = "distill"
    made_for = fingerprints(model, tokenizer)
    if method == "amortised":
        if compressor is None:
            raise SkimError("--method amortised needs --compressor FILE (skimlm skill train)")
        return _amortised(model, tokenizer, document, ids, k, made_for, compressor, source)
    if method in select.METHODS:
        if k is None:
            raise SkimError(f"--method {method} needs a size: give --ratio or --tokens")
        kept = ids[select.keep(model, tokenizer, document, k, method)]
        facts = {"text_tokens": len(ids), "skimlm": __version__}
        return Skill(document, rows_of(model, kept), (), (k,), k, method, made_for, facts, source)
    start, pins = layout(model, tokenizer, document, ids, pin)
    ladder = rungs(len(ids), len(start)) if k is None else nest(min(k, len(start)))
    start = start[: ladder[-1]]
    pins = tuple(Pin(min(p.at, ladder[-1]), p.text) for p in pins)
    found = _study(model, tokenizer, document, ids, settings, progress)
    trained = distill(
        model, tokenizer, start, pins, ladder, found.train, found.dev,
        steps=settings.steps, rows=settings.rows, lr=settings.lr, seed=settings.seed,
        progress=progress,
    )  # fmt: skip
    soft = trained.soft.to(torch.bfloat16)
    measured = _measure(model, tokenizer, document, ids, soft, pins, ladder, found, target)
    chosen = choose(measured, target, floor) if method == "adaptive" else None
    if method == "distill":
        chosen = next(
            row for row in measured if (row["method"], row["k"]) == ("distill", ladder[-1])
        )
    evidence = {
        "text_tokens": len(ids),
        "target": target,
        "floor": floor,
        "kl_no_skill": found.none / found.dev.tokens,
        "questions": {"train": len(found.train.asked), "dev": len(found.dev.asked)},
        "answer_tokens": settings.answer,
        "rungs": measured,
        "step": trained.step,
        "history": trained.history,
        "settings": vars(settings),
        "skimlm": __version__,
    }
    if chosen and chosen["method"] in select.METHODS:
        # the vectors of words: plain text, and nothing trained goes along
        kept = ids[select.keep(model, tokenizer, document, chosen["k"], chosen["method"])]
        soft, ladder, pins = rows_of(model, kept), [chosen["k"]], ()
    return Skill(
        document,
        soft,
        pins,
        tuple(ladder),
        chosen["k"] if chosen else None,
        chosen["method"] if chosen else "distill",
        made_for,
        evidence,
        source,
    )


def _amortised(
    model: Any,
    tokenizer: Any,
    document: Document,
    ids: Tensor,
    k: int | None,
    made_for: dict[str, Any],
    file: str | os.PathLike[str],
    source: str,
) -> Skill:
    """One pass of a trained compressor; by default a quarter of the text, or all of its slots."""
    trained = compressing.read(file)
    compressing.check_fits(trained, model, tokenizer, str(file))
    if k is not None and k > trained.slots:
        raise SkimError(f"{k:,} soft tokens: the compressor makes at most {trained.slots:,}")
    ladder = nest(k or max(1, min(trained.slots, len(ids) // 4)))
    with torch.no_grad():
        soft = compressing.soft_tokens(trained, model, tokenizer, ids, ladder[-1])
    facts = {"text_tokens": len(ids), "skimlm": __version__, "compressor": dict(trained.facts)}
    soft = soft.to(torch.bfloat16)
    k = ladder[-1]
    return Skill(document, soft, (), tuple(ladder), k, "amortised", made_for, facts, source)


def budget(text_tokens: int, tokens: int | None, ratio: float | None) -> int | None:
    """Soft tokens asked for; None: not said."""
    if tokens is None and ratio is None:
        return None
    k = tokens if tokens is not None else round(ratio * text_tokens)  # type: ignore[operator]
    if not 1 <= k < text_tokens:
        raise SkimError(
            f"{k:,} soft tokens for a text of {text_tokens:,}: give 1 to {text_tokens - 1:,}"
        )
    return k


def rungs(text_tokens: int, most: int) -> list[int]:
    """Powers of two up to half of the text, and that half."""
    half = max(1, min(most, int(text_tokens * MOST)))
    return [k for k in RUNGS if k < 0.8 * half] + [half]


def nest(k: int) -> list[int]:
    """A fixed size with the powers of two below it."""
    return [rung for rung in RUNGS if rung < 0.9 * k] + [k]


def rows_of(model: Any, ids: Tensor) -> Tensor:
    """Input embeddings [t, d] of token ids, in bfloat16."""
    with torch.no_grad():
        return model.get_input_embeddings()(ids.to(model.device)).to(torch.bfloat16).cpu()


def layout(
    model: Any, tokenizer: Any, document: Document, ids: Tensor, pin: bool
) -> tuple[Tensor, tuple[Pin, ...]]:
    """What soft tokens start from [n, d], and pins: with `pin` all spans stay text."""
    if not pin:
        return rows_of(model, ids).float(), ()
    parts, pins, at, end = [], [], 0, 0
    for begin, stop in spans(document.text):
        parts.append(token_ids(tokenizer, document.text[end:begin]))
        at += len(parts[-1])
        pins.append(Pin(at, document.text[begin:stop]))
        end = stop
    parts.append(token_ids(tokenizer, document.text[end:]))
    prose = torch.cat(parts)
    if not len(prose):
        raise SkimError(f"{document.name}: nothing to compress but pinned text: leave out --pin")
    return rows_of(model, prose).float(), tuple(pins)


def choose(
    measured: Sequence[dict[str, Any]], target: float, floor: float
) -> dict[str, Any] | None:
    """The cheapest measured row that is good enough, untrained before trained; None if none is."""
    good = [
        row
        for row in measured
        if (row["closure"] >= target or row["kl"] <= ENOUGH)
        and (row["literal_recall"] is None or row["literal_recall"] >= floor)
    ]
    return min(good, key=lambda row: (row["tokens"], row["method"] == "distill"), default=None)


@dataclass(frozen=True)
class _Found:
    """The studies of a skill, with the prefix of its full text and the dev divergence without."""

    text: Prefix
    train: Study
    dev: Study
    none: float  # sum over tokens


def _study(
    model: Any,
    tokenizer: Any,
    document: Document,
    ids: Tensor,
    settings: Settings,
    progress: Progress | None,
) -> _Found:
    step = progress or (lambda phase, done, total: None)
    step("study", 0, 3)
    with torch.no_grad():
        text = rollout.read(model, opening(tokenizer, [[ids]]))
    studies = []
    for i, (split, count) in enumerate((("train", settings.train), ("dev", settings.dev))):
        seed = settings.seed + 100_000 * i
        studies.append(study(model, tokenizer, document, text, split, count, settings.answer, seed))
        step("study", i + 1, 3)
    none = sum(without(model, tokenizer, studies[1]))
    step("study", 3, 3)
    return _Found(text, studies[0], studies[1], none)


def without(model: Any, tokenizer: Any, study: Study) -> list[float]:
    """Sum of KL per answer of a model that has no skill at all."""
    with torch.no_grad():
        bare = rollout.read(model, opening(tokenizer, []))
    asked = [closing(tokenizer, question, False) for question in study.asked]
    return divergences(model, bare, Study(study.asked, asked, study.answers, study.teacher))


def _measure(
    model: Any,
    tokenizer: Any,
    document: Document,
    ids: Tensor,
    soft: Tensor,
    pins: Sequence[Pin],
    ladder: Sequence[int],
    found: _Found,
    target: float,
) -> list[dict[str, Any]]:
    """Dev closure of every candidate as it will be served, and literal recall where it matters."""
    with torch.no_grad():
        prefixes = nested(model, tokenizer, soft, pins, ladder)
        candidates = [
            ("distill", k, sum(len(p) for p in pieces_of(tokenizer, soft, pins, k)), prefixes[k])
            for k in ladder
        ]
        for method in ("head", "sections"):
            for k in ladder:
                kept = ids[select.keep(model, tokenizer, document, k, method)]
                prefix = rollout.read(model, opening(tokenizer, [[kept]]))
                candidates.append((method, len(kept), len(kept), prefix))
    rows: list[dict[str, Any]] = []
    wrapper = wrapper_tokens(tokenizer)
    for method, k, tokens, prefix in candidates:
        total = sum(divergences(model, prefix, found.dev))
        rows.append(
            {
                "method": method,
                "k": k,
                "tokens": tokens + wrapper,
                "closure": 1 - total / found.none if found.none > 0 else 0.0,
                "kl": total / found.dev.tokens,
            }
        )
    some = [
        i
        for i, row in enumerate(rows)
        if row["method"] == "distill" or row["closure"] >= target or row["kl"] <= ENOUGH
    ]
    said = recall(model, tokenizer, document, found.text, [candidates[i][3] for i in some])
    shares = dict(zip(some, said, strict=True))
    return [row | {"literal_recall": shares.get(i)} for i, row in enumerate(rows)]
