"""Training of an amortised compressor (compressor.py) on a folder of skills.

    examples   every skill in chunks of at most LONGEST tokens, cut at headings; of each chunk, with
               its full text in front of the model: answers to study questions, sampled, and pieces
               of the text itself, to be repeated
    steps      one example and one k of a ladder each: the compressor reads it, and the divergence
               between the model with the full text and with k soft tokens is brought down

First the text is repeated (reconstruction), then questions are answered (alignment). What is
trained starts as the sections' leads (select.py). The state is kept as it goes: a run that was
stopped goes on, to the same result. A few skills are kept apart, all their chunks: their divergence
is measured along the way, and the best state of all is the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from skimlm.errors import SkimError, first_line
from skimlm.models.hooks import frozen
from skimlm.skills import compressor as compressing
from skimlm.skills import distill, document, rollout
from skimlm.skills.compressor import Compressor
from skimlm.skills.distill import Study, divergences, study
from skimlm.skills.document import Document
from skimlm.skills.splice import closing, opening, token_ids
from skimlm.storage.safetensors import write_file
from skimlm.train.loop import Objective, descend, evenly

LONGEST, SHORTEST = 1024, 48  # tokens of an example
PIECE = 48  # tokens of a text to be repeated
SHOWN = 8  # tokens that say which piece
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How much is trained; the defaults take about two hours of a core on a model of 135M."""

    steps: int = 600
    rows: int = 6  # questions per step
    questions: int = 16  # per example, and as many pieces to repeat
    answer: int = 48  # tokens
    ladder: tuple[int, ...] = (32, 64, 128, 256)
    rank: int = 16
    hidden: int = 1024
    lr: float = 1e-3
    repeat: float = 0.1  # share of the steps that go to reconstruction
    held: int = 3  # skills kept apart
    checks: int = 8  # times their divergence is measured, on half of their questions
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A text, and what the model says behind it."""

    text: Document
    ids: Tensor  # [n]
    answers: Study
    pieces: Study


def texts(
    paths: Sequence[Path], tokenizer: Any, held: int
) -> tuple[list[Document], list[Document]]:
    """Chunks of all skills but the last `held`, and theirs; skills in the order of their hashes."""

    def count(text: str) -> int:
        return len(token_ids(tokenizer, text))

    skills = sorted((document.read(path) for path in paths), key=lambda d: d.sha256)
    if len(skills) < held + 1:
        raise SkimError(f"{len(skills)} skills to train on: more than {held} are needed")
    parts = []
    for skill in skills:
        found = document.chunks(skill.text, LONGEST, count)
        parts.append([dataclasses.replace(skill, text=text) for text in _joined(found, count)])
    split = len(skills) - held
    return [d for some in parts[:split] for d in some], [d for some in parts[split:] for d in some]


def _joined(sections: Sequence[document.Section], count: Callable[[str], int]) -> list[str]:
    """Neighbouring sections together up to LONGEST tokens; what stays too short is left out."""
    found, held = [], ""
    for section in sections:
        if held and count(held + section.text) > LONGEST:
            found.append(held)
            held = ""
        held += section.text
    return [
        part for text in [*found, held] for part in _halves(text, count) if count(part) >= SHORTEST
    ]


def _halves(text: str, count: Callable[[str], int]) -> list[str]:
    """The text in equal parts of at most 2 LONGEST tokens: one line may be longer than that."""
    if count(text) <= 2 * LONGEST:
        return [text]
    middle = len(text) // 2
    return _halves(text[:middle], count) + _halves(text[middle:], count)


def make_example(model: Any, tokenizer: Any, text: Document, settings: Settings) -> Example:
    """What the model says to questions behind a text, and pieces of the text."""
    ids = token_ids(tokenizer, text.text)
    with torch.no_grad():
        prefix = rollout.read(model, opening(tokenizer, [[ids]]))
    seed = settings.seed + int(text.sha256[:8], 16)
    count, tokens = settings.questions, settings.answer
    answers = study(model, tokenizer, text, prefix, "train", count, tokens, seed)
    return Example(text, ids, answers, _pieces(model, tokenizer, ids, prefix, count, seed))


def _pieces(
    model: Any, tokenizer: Any, ids: Tensor, prefix: rollout.Prefix, count: int, seed: int
) -> Study:
    """Pieces of the text from random places on, named by the tokens before them."""
    chance = random.Random(seed)
    places = [chance.randrange(max(1, len(ids) - SHOWN - 1)) for _ in range(count)]
    texts = [f'Continue exactly: "{tokenizer.decode(ids[p : p + SHOWN])}' for p in places]
    question_ids = [closing(tokenizer, text, True) for text in texts]
    answers = [ids[p + SHOWN : p + SHOWN + PIECE] for p in places]
    states = rollout.score_all(model, prefix, question_ids, answers)
    return Study(texts, question_ids, answers, states)


def train(
    model: Any,
    tokenizer: Any,
    paths: Sequence[Path],
    work: Path,
    *,
    settings: Settings | None = None,
    start: Compressor | None = None,
    progress: Progress | None = None,
) -> Compressor:
    """Train a compressor on SKILL.md files; examples and state are kept in the folder `work`.

    Runs of other settings or skills may share it: an example is made once. With `start` it goes on
    from another compressor, whose rank and width it keeps.
    """
    settings = settings or Settings()
    tell = progress or (lambda *_: None)
    learned, held = texts(paths, tokenizer, settings.held)
    if start:
        compressing.check_fits(start, model, tokenizer, "the compressor to start from")
    begun_with = dict(start.facts) if start else None
    start = start or compressing.begin(
        model, tokenizer, max(settings.ladder), settings.rank, settings.hidden, settings.seed
    )
    key = _key(start, (settings, begun_with), learned + held)
    about = (settings.questions, settings.answer, settings.seed)  # what an example depends on
    examples = []
    for i, text in enumerate([*learned, *held]):
        file = work / f"{_key(start, about, [text])}.safetensors"
        examples.append(_kept(file, model, tokenizer, text, settings))
        tell("study", i + 1, len(learned) + len(held))
    unseen = examples[len(learned) :]
    order = _order(len(learned), settings)

    def gradients(values: dict[str, Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
        return _gradients(model, tokenizer, start, examples[order[step]], values, step, settings)

    def held_out(values: dict[str, Tensor]) -> float:
        return _measure(model, tokenizer, start, values, unseen, settings)

    with frozen(model):
        state = descend(
            start.values,
            Objective(gradients, held_out),
            settings.steps,
            checks=evenly(settings.steps, settings.checks),
            file=work / f"{key}.state",
            progress=lambda step: tell("train", step, settings.steps),
        )
    facts = {
        "skills": sorted({text.name for text in learned}),
        "lessons": len(learned),
        "held_out": sorted({text.name for text in held}),
        "held_out_kl": state.losses,  # nats per token, all of the ladder; the first is the start
        "start": begun_with,  # facts of a compressor it was trained on from; None: leads
        "settings": dataclasses.asdict(settings),
    }
    return Compressor(state.best, start.made_for, facts)


def _gradients(
    model: Any,
    tokenizer: Any,
    start: Compressor,
    what: Example,
    values: dict[str, Tensor],
    step: int,
    settings: Settings,
) -> dict[str, tuple[Tensor, float]]:
    """Of the divergence on one example, by name, with the rate."""
    leaves = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    ladder = _ladder(settings, len(what.ids))
    now = [ladder[step % len(ladder)]]
    prefixes = _prefixes(model, tokenizer, Compressor(leaves, start.made_for), what, now)
    said = what.pieces if step < settings.repeat * settings.steps else what.answers
    chance = random.Random(settings.seed + step)
    rows = chance.sample(range(len(said.answers)), min(settings.rows, len(said.answers)))
    distill.backward_divergence(model, prefixes, said, rows, step)
    return {n: (leaf.grad, settings.lr) for n, leaf in leaves.items() if leaf.grad is not None}


def _prefixes(
    model: Any, tokenizer: Any, compressor: Compressor, what: Example, ladder: Sequence[int]
) -> dict[int, rollout.Prefix]:
    """What stands before a question at every resolution, smallest first; slots are read once."""
    leads = {k: compressing.section_leads(compressor, tokenizer, what.text, k) for k in ladder}
    most = leads[ladder[-1]]
    soft = compressing.soft_tokens(compressor, model, tokenizer, what.ids, most)
    at = torch.tensor(sum(most, []))
    some = {k: soft[torch.isin(at, torch.tensor(sum(leads[k], [])))] for k in ladder}
    return {k: rollout.read(model, opening(tokenizer, [[some[k]]])) for k in ladder}


def _measure(
    model: Any,
    tokenizer: Any,
    start: Compressor,
    values: dict[str, Tensor],
    examples: Sequence[Example],
    settings: Settings,
) -> float:
    """Mean divergence from the full text, nats per token, over examples and the ladder."""
    total = []
    with torch.no_grad():
        for what in examples:
            made = Compressor(values, start.made_for)
            prefixes = _prefixes(model, tokenizer, made, what, _ladder(settings, len(what.ids)))
            some = what.answers.first(-(-settings.questions // 2))
            for prefix in prefixes.values():
                kl = sum(divergences(model, prefix, some)) / some.tokens
                total.append(kl / len(prefixes))
    return sum(total) / len(examples)


def _ladder(settings: Settings, tokens: int) -> list[int]:
    """Resolutions up to half of a text, and at least the smallest."""
    ladder = [k for k in settings.ladder if k <= tokens // 2]
    return ladder or [min(settings.ladder[0], tokens)]


def _order(count: int, settings: Settings) -> list[int]:
    """Which example each step sees: one shuffled pass after the other."""
    examples = distill.shuffled(count, settings.seed)
    return [next(examples) for _ in range(settings.steps)]


def _key(start: Compressor, settings: Any, texts: Sequence[Document]) -> str:
    """Names what is kept: of another model, other settings or texts, it has another."""
    what = hashlib.sha256(repr((dict(start.made_for), settings)).encode())
    for text in texts:
        what.update(text.sha256.encode())
    return what.hexdigest()[:16]


def _kept(file: Path, model: Any, tokenizer: Any, text: Document, settings: Settings) -> Example:
    """An example from its file, or made and written there."""
    if not file.exists():
        made = make_example(model, tokenizer, text, settings)
        tensors = {"ids": made.ids}
        for part in ("answers", "pieces"):
            found: Study = getattr(made, part)
            for i, row in enumerate(
                zip(found.question_ids, found.answers, found.teacher, strict=True)
            ):
                names = (f"{part}.{i:04}.{what}" for what in ("question", "answer", "teacher"))
                tensors |= {n: t.clone().contiguous() for n, t in zip(names, row, strict=True)}
        write_file(file, tensors, {})
    try:
        with safe_open(file, framework="pt") as stream:
            read = {name: stream.get_tensor(name) for name in stream.keys()}
    except Exception as error:
        raise SkimError(f"{file}: damaged ({first_line(error)}); delete it") from error

    def rows(part: str) -> Study:
        count = sum(name.startswith(part) and name.endswith("answer") for name in read)
        columns = [
            [read[f"{part}.{i:04}.{what}"] for i in range(count)]
            for what in ("question", "answer", "teacher")
        ]
        return Study([], *columns)

    return Example(text, read["ids"], rows("answers"), rows("pieces"))
