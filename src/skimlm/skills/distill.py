"""Soft tokens for one skill, trained so that the model answers as if it had read the full text.

Only S [K, d] is trained; the model is frozen. Self-study: answers y to questions q are sampled from
the model with the full text in front of it (the teacher), and S is fitted by

    L(S) = mean over answers' tokens of KL(p(. | text, q, y<t) || p(. | S[:k], q, y<t))

with Adam, from the embeddings of K of the skill's own tokens (select.py), and the step with the
least divergence on dev questions is kept, so a training that does not help leaves the start. After
Cartridges (arXiv 2506.06266) and SKIM (arXiv 2606.12203).

Nested: S[:k] is the skill at resolution k, for every k of a ladder. Attention is causal, so one
pass over S gives the keys and values of all its prefixes. Every step reads some of its rows of
questions at each resolution, larger ones more; a step reads K + rows * (q + y) positions.

The model runs in its own dtype; S and Adam are in float32.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.models.hooks import frozen
from skimlm.skills import rollout
from skimlm.skills.document import Document
from skimlm.skills.questions import questions
from skimlm.skills.rollout import Prefix
from skimlm.skills.splice import Piece, Pin, closing, opening, pieces_of, token_ids
from skimlm.train.loop import Objective, State, descend
from skimlm.train.losses import kl_divergence, loss_gradient, token_scores

WARMUP = 5  # steps
BETAS = (0.9, 0.999)  # of Adam


@dataclass(frozen=True)
class Training:
    """How soft tokens are trained.

    Dev divergence is measured every `check` steps; after `patience` times without a better one
    training ends. With a `goal` for their mean, in nats per token, it also ends where that is
    reached, or where the pace of the last two checks would not reach it by the last step.
    """

    steps: int = 120
    rows: int = 8  # questions per step
    lr: float = 3e-3
    check: int = 20
    patience: int = 3
    goal: float = 0.0
    seed: int = 0

    def done(self, state: State) -> bool:
        """Whether training ends at the check that was made last."""
        checked = [note["step"] for note in state.notes]
        if checked[-1] - checked[best(state.losses)] >= self.patience * self.check:
            return True
        value, earlier = state.losses[-1], -min(3, len(checked))
        gone = checked[-1] - checked[earlier]
        if not self.goal or not gone:
            return False
        pace = (state.losses[earlier] - value) / gone
        return not self.goal < value <= self.goal + pace * (self.steps - state.step)


@dataclass(frozen=True)
class Study:
    """Questions, the teacher's answers and its final states: everything about one split."""

    questions: list[str]
    question_ids: list[Tensor]  # ids [q] of what stands behind the skill
    answers: list[Tensor]  # ids [y]
    teacher: list[Tensor] = field(repr=False)  # states [y, d]

    @property
    def tokens(self) -> int:
        """Tokens of all answers: what a divergence is a mean over."""
        return sum(len(answer) for answer in self.answers)

    def first(self, count: int) -> Study:
        """The study of the first `count` questions."""
        return Study(
            self.questions[:count],
            self.question_ids[:count],
            self.answers[:count],
            self.teacher[:count],
        )


@dataclass(frozen=True)
class Distilled:
    """Soft tokens [K, d] in float32, the step they are from (0: the start), and the way there."""

    soft: Tensor
    step: int
    history: list[dict[str, Any]]  # step, train_kl, dev_kl {k: nats}


def study(
    model: Any,
    tokenizer: Any,
    document: Document,
    text: Prefix,
    split: str,
    count: int,
    tokens: int = 48,
    seed: int = 0,
    taught: bool = True,
) -> Study:
    """Let the model answer `count` questions of a split behind the full text, `text`.

    Without `taught` there are no states of a teacher.
    """
    texts = questions(document, split, count)
    ids = [closing(tokenizer, question, True) for question in texts]
    answers = rollout.sample(model, text, ids, tokens, ends=ends(model, tokenizer), seed=seed)
    teacher = rollout.score_all(model, text, ids, answers) if taught else []
    return Study(texts, ids, answers, teacher)


def ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    found = [tokenizer.eos_token_id]
    configured = model.generation_config.eos_token_id
    found += configured if isinstance(configured, list) else [configured]
    return sorted({token for token in found if token is not None})


def divergences(model: Any, prefix: Prefix, study: Study) -> list[float]:
    """Sum of KL over the tokens of every answer, nats, behind `prefix` in place of the text."""
    states = rollout.score_all(model, prefix, study.question_ids, study.answers)
    pairs, chunk = zip(study.teacher, states, strict=True), rollout.chunk(model)
    return [float(token_scores(model, *pair, chunk=chunk)["kl"].sum()) for pair in pairs]


def nested(
    model: Any, tokenizer: Any, soft: Tensor, pins: Sequence[Pin], ladder: Sequence[int]
) -> dict[int, Prefix]:
    """What stands before the question at every resolution, from one pass over all soft tokens."""
    most = len(soft)
    before = opening(tokenizer, [[]])
    whole = rollout.read(model, [*before, *pieces_of(tokenizer, soft, pins, most)])
    texts = [token_ids(tokenizer, pin.text) for pin in pins]
    prefixes = {}
    for k in ladder:
        ahead = sum(len(t) for t, pin in zip(texts, pins, strict=True) if pin.at < k)
        behind: list[Piece] = [t for t, pin in zip(texts, pins, strict=True) if pin.at >= k]
        cut = whole.cut(sum(len(piece) for piece in before) + k + ahead)
        prefixes[k] = rollout.read(model, behind, after=cut) if behind and k < most else cut
        if k == most:
            prefixes[k] = whole
    return prefixes


def distill(
    model: Any,
    tokenizer: Any,
    start: Tensor,
    pins: Sequence[Pin],
    ladder: Sequence[int],
    train: Study,
    dev: Study,
    training: Training,
    file: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Distilled:
    """Train soft tokens from `start` [K, d], nested; on dev every k of `ladder` counts the same.

    With `file` the state is kept there at every check, and a run that finds it goes on.
    """
    assert max(ladder) == len(start)
    limit, steps, rows = longest(model), training.steps, training.rows
    shuffle = shuffled(len(train.answers), training.seed)
    order = [[next(shuffle) for _ in range(rows)] for _ in range(steps)]
    seen: list[float] = []  # losses since the last check
    dev_kl: list[float] = []  # of the last check

    def gradients(values: dict[str, Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
        soft = values["soft"].detach().requires_grad_()
        prefixes = nested(model, tokenizer, soft, pins, ladder)
        seen.append(backward_divergence(model, prefixes, train, order[step], step + 1))
        assert soft.grad is not None
        return {"soft": (soft.grad, training.lr)}

    def held_out(values: dict[str, Tensor]) -> float:
        with torch.no_grad():
            prefixes = nested(model, tokenizer, values["soft"], pins, ladder)
        dev_kl[:] = [sum(divergences(model, p, dev)) / dev.tokens for p in prefixes.values()]
        return sum(dev_kl) / len(ladder)

    def project(values: dict[str, Tensor]) -> None:
        soft = values["soft"]  # a vector longer than any word's is far from all the model knows
        soft *= (limit / soft.norm(dim=1, keepdim=True)).clamp(max=1)

    def note(step: int) -> dict[str, Any]:
        mean = sum(seen) / len(seen) if seen else None
        seen.clear()
        return {"step": step, "train_kl": mean, "dev_kl": list(dev_kl)}

    with frozen(model):
        state = descend(
            {"soft": start.detach().float()},
            Objective(gradients, held_out, project, note),
            steps,
            checks={*range(training.check, steps, training.check), steps},
            schedule=schedule,
            betas=BETAS,
            done=training.done,
            file=file,
            progress=lambda step: progress("distill", step, steps) if progress else None,
        )
    history = [n | {"dev_kl": dict(zip(ladder, n["dev_kl"], strict=True))} for n in state.notes]
    return Distilled(state.best["soft"], history[best(state.losses)]["step"], history)


def best(losses: Sequence[float]) -> int:
    """The first of the least."""
    return min(range(len(losses)), key=losses.__getitem__)


def backward_divergence(
    model: Any, prefixes: Mapping[int, Prefix], train: Study, rows: Sequence[int], step: int
) -> float:
    """Backpropagate the mean KL per token over `rows` of the study into the soft tokens.

    `assign` says at which resolution each row is read.
    """
    ladder = list(prefixes)
    numbers = assign(len(ladder), len(rows), step)
    tokens = sum(len(train.answers[row]) for row in rows)
    total, hidden, gradients = 0.0, [], []
    for i in sorted(set(numbers)):
        mine = [row for row, number in zip(rows, numbers, strict=True) if number == i]
        answers = [train.answers[row] for row in mine]
        question_ids = [train.question_ids[row] for row in mine]
        hidden.append(rollout.score(model, prefixes[ladder[i]], question_ids, answers))
        teacher = torch.cat([train.teacher[row] for row in mine])
        loss = kl_divergence(model, teacher, scale=1 / tokens)
        value, gradient = loss_gradient(loss, hidden[-1], rollout.chunk(model))
        gradients.append(gradient)
        total += value
    torch.autograd.backward(hidden, gradients)
    return total


def assign(resolutions: int, rows: int, step: int) -> list[int]:
    """The resolution of every row of a step: number i comes i + 1 times as often as the smallest.

    Rows of one resolution are neighbours, so that few passes are made per step.
    """
    cycle = [i for i in reversed(range(resolutions)) for _ in range(i + 1)]
    return [cycle[(step * rows + j) % len(cycle)] for j in range(rows)]


def longest(model: Any, chunk: int = 8192) -> float:
    """Norm of the longest input embedding, as the model's table gives it out: scaled, unpacked."""
    table, words = model.get_input_embeddings(), model.config.get_text_config().vocab_size
    with torch.no_grad():
        parts = torch.arange(words, device=model.device).split(chunk)
        return max(float(table(ids).float().norm(dim=1).max()) for ids in parts)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, then a cosine down to a tenth."""
    step += 1
    if step <= WARMUP:
        return step / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def shuffled(count: int, seed: int) -> Iterator[int]:
    """0 .. count - 1 in a new order again and again."""
    chance = random.Random(seed)
    while True:
        yield from chance.sample(range(count), count)
