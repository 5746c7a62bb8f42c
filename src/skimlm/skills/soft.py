"""One skill compressed: the fewest soft tokens that measurably do what the full text does.

    closure(k) = 1 - KL(full text || k soft tokens) / KL(full text || no skill)      dev questions

A ladder of k is tried from half of the text down as long as it goes well: untrained (head, leads,
sections), amortised where there is a compressor for the model, and, from where none of them is good
enough, distilled from the best. The smallest k counts whose closure is at least `target` (or whose
KL is tiny) and whose literal recall is at least `floor`, and is trained on for a while. If none
does, the full text is served. What was measured stays in the artefact. The same inputs give the
same file: no clock, no judge, no network.

With a size given there is no choice: that many soft tokens are distilled, nested (distill.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skimlm import __version__
from skimlm.errors import SkimError
from skimlm.skills import compressor as compressing
from skimlm.skills import rollout, select
from skimlm.skills.compressor import Compressor
from skimlm.skills.distill import Training, distill, nested
from skimlm.skills.document import Document, spans
from skimlm.skills.gate import (
    ENOUGH,
    ROOM,
    Gate,
    Progress,
    Settings,
    choose,
    evidence,
    examine,
    measured,
)
from skimlm.skills.soft_file import Soft
from skimlm.skills.splice import Pin, opening, pieces_of, token_ids, wrapper_tokens
from skimlm.skills.store import Skill, check_reach, fingerprints

NESTED = (32, 64, 128, 256, 512, 1024, 2048)  # sizes below one that is set
MOST, LEAST = 0.5, 32  # of the text: above it soft tokens are not worth their trouble; tokens
SHRINK = 0.75  # a resolution, of the one before
UNTRAINED = ("head", "leads", "sections")  # methods tried before any training


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
    compressor: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Skill:
    """Compress a skill for a model: to a size, or (`adaptive` without one) as far as it goes."""
    if method not in (allowed := ("adaptive", "distill", "amortised", *select.METHODS)):
        raise SkimError(f"method must be one of {', '.join(allowed)}, got {method!r:.60}")
    settings = settings or Settings()
    ids = token_ids(tokenizer, document.text)
    check_reach(model, len(ids) + wrapper_tokens(tokenizer), ROOM + settings.answer, document.name)
    k = budget(len(ids), tokens, ratio)
    if method == "adaptive" and k is not None:
        method = "distill"
    if method in select.METHODS:
        if k is None:
            raise SkimError(f"--method {method} needs a size: give --ratio or --tokens")
        kept = ids[select.keep(model, tokenizer, document, k, method)]
        return _untrained_skill(model, tokenizer, document, rows_of(model, kept), method, ids)
    trained = _compressor(model, tokenizer, compressor)
    if method == "amortised":
        return _amortised(model, tokenizer, document, ids, k, trained)
    start, pins = layout(model, tokenizer, document, ids, pin)
    gate = examine(model, tokenizer, document, ids, settings, target, floor, progress)
    search = _Search(**vars(gate), start=start, pins=pins, compressor=trained)
    ladder = resolutions(len(start), wrapper_tokens(tokenizer))
    if method == "adaptive":
        return _skill(search, _fewest(search, ladder))
    return _skill(search, _sized(search, nest(min(k or ladder[-1], len(start)))))


def _skill(search: _Search, made: _Result) -> Skill:
    """The artefact, with all that was measured on the way."""
    chosen = made.chosen
    return Skill(
        search.document,
        Soft(made.soft, made.pins, tuple(made.ladder)),
        chosen["k"] if chosen else None,
        chosen["method"] if chosen else "distill",
        fingerprints(search.model, search.tokenizer),
        evidence(search, made.measured, trainings=made.trainings),
        search.document.source,
    )


def _untrained_skill(
    model: Any, tokenizer: Any, document: Document, soft: Tensor, method: str, ids: Tensor,
    **facts: Any,
) -> Skill:  # fmt: skip
    """The artefact of a method that neither trains nor measures; `ids` are the text's."""
    k, evidence = len(soft), {"text_tokens": len(ids), "skimlm": __version__, **facts}
    made_for = fingerprints(model, tokenizer)
    content = Soft(soft, (), (k,))
    return Skill(document, content, k, method, made_for, evidence, document.source)


def _compressor(
    model: Any, tokenizer: Any, file: str | os.PathLike[str] | None
) -> Compressor | None:
    """The compressor in a file, or the one that comes with the package for this model, if any."""
    if file is None:
        return compressing.shipped(model, tokenizer)
    trained = compressing.read(file)
    compressing.check_fits(trained, model, tokenizer, str(file))
    return trained


def _amortised(
    model: Any,
    tokenizer: Any,
    document: Document,
    ids: Tensor,
    k: int | None,
    trained: Compressor | None,
) -> Skill:
    """One pass of a trained compressor; by default a quarter of the text."""
    if trained is None:
        raise SkimError(
            "no compressor comes with skimlm for this model: "
            "train one (skimlm skill train) and give it with --compressor FILE"
        )
    sections = compressing.section_leads(trained, tokenizer, document, k or max(1, len(ids) // 4))
    made = sum(map(len, sections))
    if k is not None and made < k:
        raise SkimError(
            f"{k:,} soft tokens: the compressor makes at most {made:,} of this skill, "
            f"{trained.slots:,} of a section"
        )
    with torch.no_grad():
        soft = compressing.soft_tokens(trained, model, tokenizer, ids, sections).to(torch.bfloat16)
    return _untrained_skill(
        model, tokenizer, document, soft, "amortised", ids, compressor=dict(trained.facts)
    )


def budget(text_tokens: int, tokens: int | None, ratio: float | None) -> int | None:
    """Soft tokens to make of a text of so many tokens; None where no size is set."""
    if tokens is None and ratio is None:
        return None
    k = tokens if tokens is not None else round(ratio * text_tokens)  # type: ignore[operator]
    if not 1 <= k < text_tokens:
        raise SkimError(
            f"{k:,} soft tokens for a text of {text_tokens:,}: give 1 to {text_tokens - 1:,}"
        )
    return k


def resolutions(tokens: int, wrapper: int = 0) -> list[int]:
    """Half of what is not pinned, the wrapper counted on both sides, and less; ascending."""
    sizes = [max(1, int((tokens + wrapper) * MOST) - wrapper)]
    while (k := round(SHRINK * sizes[-1])) >= LEAST:
        sizes.append(k)
    return sizes[::-1]


def nest(k: int) -> list[int]:
    """A fixed size with the powers of two below it."""
    return [size for size in NESTED if size < 0.9 * k] + [k]


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


@dataclass(frozen=True)
class _Search(Gate):
    """A skill to be compressed, and where soft tokens start."""

    start: Tensor  # [n, d]
    pins: tuple[Pin, ...]
    compressor: Compressor | None


@dataclass(frozen=True)
class _Result:
    """Soft tokens with what was measured on the way; `chosen` is one of the rows."""

    soft: Tensor
    pins: tuple[Pin, ...]
    ladder: list[int]
    measured: list[dict[str, Any]]
    trainings: list[dict[str, Any]]
    chosen: dict[str, Any] | None


def _sized(search: _Search, ladder: list[int]) -> _Result:
    """Distilled to the largest of `ladder`, nested: the others are good beginnings of it."""
    most = ladder[-1]
    untrained = _untrained(search, most)
    start = _words(search, _best(untrained), most)
    soft, pins, trained = _trained(search, start, ladder, search.settings.steps)
    rows = [_distilled(search, soft, pins, k) for k in ladder] + untrained
    return _Result(soft, pins, ladder, rows, [trained], rows[len(ladder) - 1])


def _fewest(search: _Search, ladder: list[int]) -> _Result:
    """The fewest soft tokens that are good enough.

    From the largest size down: plain words as long as they do, then trained, each size alone and
    from the one before: a size that trains together with smaller ones gets less good (docs/log.md).
    The first that is not good enough is the last. A training ends as soon as dev says so, often
    after ten steps, when test is still 0.02 of closure behind (docs/log.md): what will be served
    is trained on. All but the first training have half of the steps.
    """
    rows, trainings, best = [], [], None
    method, last = "", None  # where training starts; the last soft tokens and their places
    few = -(-search.settings.steps // 2)
    for k in reversed(ladder):
        if last is None:
            untrained = _untrained(search, k)
            rows += untrained
            if choose(untrained, search.target, search.floor):
                continue
            method = _best(untrained)
        kept = _places(search, method, k)
        start = last[0][torch.isin(last[1], kept)] if last else _words(search, method, k)
        steps = few if last else search.settings.steps
        soft, pins, trained = _trained(search, start, [k], steps, goal=True)
        last = soft, kept
        rows.append(_distilled(search, soft, pins, k))
        trainings.append(trained | {"start": "distill" if best else method})
        good = choose(rows[-1:], search.target, search.floor) is not None
        if good or best is None:
            best = soft, pins, [k]
        if not good:
            break
    chosen = choose(rows, search.target, search.floor)
    if chosen and chosen["method"] != "distill":
        best = _words(search, chosen["method"], chosen["k"]), (), [chosen["k"]]
    elif chosen and best:
        soft, pins, trained = _trained(search, best[0], best[2], few)
        rows.append(_distilled(search, soft, pins, chosen["k"]))
        trainings.append(trained | {"start": "distill"})
        if better := choose(rows[-1:], search.target, search.floor):
            best, chosen = (soft, pins, best[2]), better
    assert best is not None
    return _Result(*best, rows, trainings, chosen)


def _untrained(search: _Search, k: int) -> list[dict[str, Any]]:
    """What untrained methods and a compressor do at a size; none of them keeps pins."""
    if search.pins:
        return []
    methods = [*UNTRAINED, "amortised"] if len(_places(search, "amortised", k)) == k else UNTRAINED
    rows = []
    for method in methods:
        words = _words(search, method, k)
        with torch.no_grad():
            prefix = rollout.read(search.model, opening(search.tokenizer, [[words]]))
        rows.append(measured(search, method, k, k, prefix))
    return rows


def _best(rows: Sequence[dict[str, Any]]) -> str:
    """The method that closes most."""
    return max(rows, key=lambda row: row["closure"])["method"] if rows else "head"


def _places(search: _Search, method: str, k: int) -> Tensor:
    """Rows of `search.start` that k soft tokens stand for; between pins, the first."""
    if search.pins:
        return torch.arange(k)
    if method == "amortised":
        return torch.tensor([place for places in _section_leads(search, k) for place in places])
    return select.keep(search.model, search.tokenizer, search.document, k, method)


def _section_leads(search: _Search, k: int) -> list[list[int]]:
    """Places that the compressor makes soft tokens for, by section; none without one."""
    if search.compressor is None:
        return []
    return compressing.section_leads(search.compressor, search.tokenizer, search.document, k)


def _words(search: _Search, method: str, k: int) -> Tensor:
    """Vectors [k, d] in bfloat16 that an untrained method, or the compressor, would serve."""
    if method != "amortised" or search.compressor is None:
        return search.start[_places(search, method, k)].to(torch.bfloat16)
    with torch.no_grad():
        soft = compressing.soft_tokens(
            search.compressor, search.model, search.tokenizer, search.ids, _section_leads(search, k)
        )
    return soft.to(torch.bfloat16).cpu()


def _trained(
    search: _Search, start: Tensor, ladder: list[int], steps: int, goal: bool = False
) -> tuple[Tensor, tuple[Pin, ...], dict[str, Any]]:
    """Soft tokens [k, d] from `start` [k, d] for the sizes of `ladder`, pins, how training went.

    With `goal` only as far as the target asks.
    """
    k, settings = ladder[-1], search.settings
    none = search.none / search.dev.tokens
    needed = max((1 - search.target) * none, ENOUGH) if goal else 0.0
    pins = tuple(Pin(min(p.at, k), p.text) for p in search.pins)
    training = Training(
        steps, settings.rows, settings.lr, settings.check, goal=needed, seed=settings.seed
    )
    found = distill(
        search.model, search.tokenizer, start, pins, ladder, search.train, search.dev, training,
        progress=search.progress,
    )  # fmt: skip
    facts = {"ladder": ladder, "step": found.step, "history": found.history}
    return found.soft.to(torch.bfloat16), pins, facts


def _distilled(search: _Search, soft: Tensor, pins: tuple[Pin, ...], k: int) -> dict[str, Any]:
    """Dev closure of soft tokens as they will be served."""
    with torch.no_grad():
        prefix = nested(search.model, search.tokenizer, soft[:k], pins, [k])[k]
    tokens = sum(len(piece) for piece in pieces_of(search.tokenizer, soft, pins, k))
    return measured(search, "distill", k, tokens, prefix)
