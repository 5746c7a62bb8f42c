"""What a compressed skill keeps, measured on questions it has never seen. No judge, no network.

    KL       nats per token of the full-text teacher's own answers, over the whole vocabulary
    closure  1 - sum KL / sum KL without the skill       full text: 1; no skill: 0
    NLL      of those answers, and how often the likeliest next token is the teacher's
    recall   literals still said word for word (recall.py)
    answers  of the model's own, greedily: how many are the full text's to the token, and how many
             of the literals in those of the full text are in them
    seconds  to the first token, cold (a pack: from its file) and with all before the question in a
             prefix cache

Both ends of a closure are measured in the same run. Intervals: 95 %, percentile bootstrap over
questions, the same draw for numerator and denominator. A skill whose KL without it is below 0.1
does next to nothing for this model: its closure says nothing, and it counts in no mean.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.evaluate.report import table
from skimlm.skills import rollout, select, store
from skimlm.skills.distill import Study, ends, study
from skimlm.skills.document import Document, literals
from skimlm.skills.document import read as read_document
from skimlm.skills.front import Standing, before
from skimlm.skills.gate import ROOM
from skimlm.skills.kv import Pack
from skimlm.skills.recall import known, share
from skimlm.skills.rollout import Prefix
from skimlm.skills.soft import rows_of
from skimlm.skills.splice import closing, opening, token_ids, wrapper_tokens
from skimlm.train.losses import token_scores

SEED = 900_000  # of test answers: dev and training have others
FREE = 16  # questions that are answered greedily
WEAK = 0.1  # nats per token
DRAWS = 2000
Progress = Callable[[str, int, int], None]


def evaluate(
    model: Any,
    tokenizer: Any,
    files: Sequence[str | os.PathLike[str]],
    *,
    count: int = 64,
    answer: int = 48,
    everything: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure .skim files (a SKILL.md: its full text).

    `everything`: all resolutions, and the untrained methods at the same sizes.
    """
    if not files:
        raise SkimError("no skill to evaluate: give .skim files")
    opened = [open_skill(file, model, tokenizer) for file in files]
    rows = []
    for i, (document, skill) in enumerate(opened):
        rows.append(
            measure(model, tokenizer, document, skill, count, answer, everything, str(files[i]))
        )
        if progress:
            progress("evaluate", i + 1, len(opened))
    return {**summary(rows), "skills": rows}


def open_skill(
    file: str | os.PathLike[str], model: Any, tokenizer: Any
) -> tuple[Document, store.Skill | None]:
    """Read a file to be measured; soft tokens that do not fit are refused, not replaced."""
    if Path(file).suffix != store.SUFFIX:
        return read_document(file), None
    skill = store.read(file)
    store.check_source(file, skill)
    store.check_fresh(skill, model, tokenizer, str(file))
    return skill.document, skill


def measure(
    model: Any,
    tokenizer: Any,
    document: Document,
    skill: store.Skill | None,
    count: int,
    answer: int,
    everything: bool,
    file: str,
    others: Sequence[store.Skill] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """All metrics of one skill at the resolution it is served at.

    With `everything` all its resolutions, those of `others` (the same text compressed in another
    way) and the untrained methods, at the same sizes.
    """
    ids = token_ids(tokenizer, document.text)
    store.check_reach(model, len(ids) + wrapper_tokens(tokenizer), ROOM + answer, document.name)
    with torch.no_grad():
        text = rollout.read(model, opening(tokenizer, [[ids]]))
        bare = rollout.read(model, opening(tokenizer, []))
    test = study(model, tokenizer, document, text, "test", count, answer, SEED)
    none = scores(model, bare, test, [closing(tokenizer, q, False) for q in test.questions])
    full = scores(model, text, test)
    variants: list[tuple[str, int, Standing]] = []
    if everything:
        variants = _variants(model, tokenizer, document, ids, [skill, *others] if skill else others)
    stands = store.standing(skill, tokenizer) if skill else [ids]
    served = skill is not None and skill.k is not None
    variants.insert(0, (skill.method if skill and served else "full text", len(ids), stands))
    clozes = known(model, tokenizer, document, text)
    rows = []
    for method, k, some in variants:
        prefix = before(model, tokenizer, [some])
        found = scores(model, prefix, test)
        tokens = store.tokens(some, tokenizer)
        rows.append(
            {"method": method, "k": k, "tokens": tokens}
            | _facts(found, none, test)
            | {"literal_recall": share(model, tokenizer, prefix, clozes), "kl_sums": found["kl"]}
        )
    first, rest = rows[0], rows[1:]
    both = [text, before(model, tokenizer, [stands])]
    path = Path(file) if Path(file).is_file() else None
    facts = {
        "name": document.name,
        "file": file,
        "kind": skill.kind if skill and served else "text",
        "bytes": path.stat().st_size if path else None,
        "method": first["method"],
        "text_tokens": len(ids) + wrapper_tokens(tokenizer),
        **{key: first[key] for key in first if key not in ("method", "k")},
        **_both_ends(none, full, test),
        **same_answers(model, tokenizer, document, test, both, answer),
        "seconds": timing(model, tokenizer, test.question_ids[0], ids, stands, path, clock=clock),
    }
    return facts | ({"all": rest} if everything else {})


def scores(
    model: Any, prefix: Prefix, study: Study, questions: Sequence[Tensor] | None = None
) -> dict[str, list[float]]:
    """Per answer, summed over its tokens: kl, nll and agree."""
    states = rollout.score_all(model, prefix, questions or study.question_ids, study.answers)
    found: dict[str, list[float]] = {"kl": [], "nll": [], "agree": []}
    chunk = rollout.chunk(model)
    for teacher, state, said in zip(study.teacher, states, study.answers, strict=True):
        for key, values in token_scores(model, teacher, state, said, chunk).items():
            found[key].append(float(values.sum()))
    return found


def same_answers(
    model: Any,
    tokenizer: Any,
    document: Document,
    test: Study,
    prefixes: Sequence[Prefix],
    tokens: int,
) -> dict[str, float | None]:
    """How far the model's own answers to FREE questions are the same behind two prefixes.

    Literals: of the skill's that the first answers say, how many the second say; None of none.
    """
    questions, last = test.question_ids[:FREE], ends(model, tokenizer)
    said = [
        rollout.sample(model, prefix, questions, tokens, ends=last, temperature=0)
        for prefix in prefixes
    ]
    pairs = [tuple(map(tokenizer.decode, pair)) for pair in zip(*said, strict=True)]
    words = {literal for _, literal in literals(document.text)}
    kept = [word in other for one, other in pairs for word in words if word in one]
    return {
        "answers_equal": sum(one == other for one, other in pairs) / len(pairs),
        "answers_literals": sum(kept) / len(kept) if kept else None,
    }


def closure(kl: Sequence[float], none: Sequence[float]) -> float:
    """1 - sum KL / sum KL without the skill."""
    return 1 - sum(kl) / sum(none) if sum(none) > 0 else 0.0


def bootstrap(
    kl: Sequence[float], none: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a closure: questions drawn with replacement, both sums from one draw."""
    chance = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(kl), (draws, len(kl)), generator=chance)
    above = torch.tensor(kl, dtype=torch.float64)[picks].sum(1)
    below = torch.tensor(none, dtype=torch.float64)[picks].sum(1).clamp(min=1e-12)
    low, high = (1 - above / below).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def difference(
    kl: Sequence[float], other: Sequence[float], none: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """Closure of `kl` minus that of `other`, with its paired 95 % interval."""
    gap = [b - a for a, b in zip(kl, other, strict=True)]
    low, high = bootstrap([n - g for n, g in zip(none, gap, strict=True)], none, seed=seed)
    return closure([n - g for n, g in zip(none, gap, strict=True)], none), low, high


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over skills that do something; what is served as full text counts as what it is."""
    strong = [row for row in rows if not row["weak"]]
    mean = statistics.fmean
    return {
        "mean_closure": mean(row["closure"] for row in strong) if strong else None,
        "mean_ratio": mean(r["tokens"] / r["text_tokens"] for r in strong) if strong else None,
        "weak": [row["name"] for row in rows if row["weak"]],
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def timing(
    model: Any,
    tokenizer: Any,
    question: Tensor,
    ids: Tensor,
    stands: Standing,
    file: Path | None = None,
    reps: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds until the first token could be picked: cold, and behind a cached prefix.

    A pack is read from its `file` every time.
    """
    found: dict[str, float] = {}
    variants: dict[str, list[Standing]] = {"full": [[ids]], "skill": [stands], "none": []}
    for name, skills in variants.items():
        cold, warm = [], []
        with torch.inference_mode():
            for _ in range(reps):
                start = clock()
                if name == "skill" and isinstance(stands, Pack) and file:
                    skills = [store.standing(store.read(file), tokenizer)]
                prefix = before(model, tokenizer, skills)
                middle = clock()
                rollout.sample(model, prefix, [question], 1, temperature=0)
                end = clock()
                cold.append(end - start)
                warm.append(end - middle)
        found |= {f"{name}_cold": statistics.median(cold), f"{name}_warm": statistics.median(warm)}
    return found


def _variants(
    model: Any, tokenizer: Any, document: Document, ids: Tensor, skills: Sequence[store.Skill]
) -> list[tuple[str, int, Standing]]:
    """Every resolution of the artefacts, and the untrained methods at the same k."""
    sizes = {k for skill in skills for k in store.ladder(skill)}
    sizes = sizes or {k for k in (32, 64, 128, 256) if k < len(ids)}
    found = [
        (s.method, k, store.standing(s, tokenizer, k)) for s in skills for k in store.ladder(s)
    ]
    for method in select.METHODS:
        for k in sorted(sizes):
            kept = ids[select.keep(model, tokenizer, document, k, method)]
            found.append((method, k, [rows_of(model, kept)]))
    return found


def _facts(
    found: Mapping[str, list[float]], none: Mapping[str, list[float]], test: Study
) -> dict[str, Any]:
    low, high = bootstrap(found["kl"], none["kl"])
    return {
        "closure": closure(found["kl"], none["kl"]),
        "closure_95": [low, high],
        "kl": _mean(found["kl"], test),
        "nll": _mean(found["nll"], test),
        "top1": _mean(found["agree"], test),
    }


def _both_ends(
    none: Mapping[str, list[float]], full: Mapping[str, list[float]], test: Study
) -> dict[str, Any]:
    """What the model does without the skill and behind its full text."""
    return {
        "kl_no_skill_sums": none["kl"],  # per question, as kl_sums: for intervals over skills
        "kl_no_skill": _mean(none["kl"], test),
        "nll_no_skill": _mean(none["nll"], test),
        "nll_full_text": _mean(full["nll"], test),
        "questions": len(test.questions),
        "answer_tokens": test.tokens,
        "weak": _mean(none["kl"], test) < WEAK,
    }


def _mean(sums: Sequence[float], study: Study) -> float:
    return sum(sums) / study.tokens


# ---- for people


def text(facts: Mapping[str, Any]) -> str:
    """Lay out what `evaluate` returns."""
    header = ["skill", "method", "text", "tokens", "closure", "95 %", "KL", "KL none", "recall"]
    header += ["same answers", "literals", "cold s", "full", "warm s", "full"]
    rows = [
        [
            row["name"] + (" (weak)" if row["weak"] else ""),
            row["method"],
            str(row["text_tokens"]),
            str(row["tokens"]),
            f"{row['closure']:.3f}",
            f"{row['closure_95'][0]:.2f}..{row['closure_95'][1]:.2f}",
            f"{row['kl']:.3f}",
            f"{row['kl_no_skill']:.3f}",
            *(
                "-" if row[key] is None else f"{row[key]:.2f}"
                for key in ("literal_recall", "answers_equal", "answers_literals")
            ),
            *(f"{row['seconds'][k]:.3f}" for k in ("skill_cold", "full_cold")),
            *(f"{row['seconds'][k]:.3f}" for k in ("skill_warm", "full_warm")),
        ]
        for row in facts["skills"]
    ]
    lines = [table([header, *rows])]
    if facts["mean_closure"] is not None:
        lines.append(
            f"mean closure {facts['mean_closure']:.3f} at {facts['mean_ratio']:.1%} of the tokens"
        )
    if facts["weak"]:
        lines.append(
            f"weak, in no mean: {', '.join(facts['weak'])}: without the skill the answers differ"
            f" by less than {WEAK} nats per token"
        )
    return "\n".join(lines)


def check_plot(file: str | os.PathLike[str]) -> None:
    """Refuse a plot that could not be drawn, before minutes of work."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SkimError("--plot needs matplotlib: pip install 'skimlm[plot]'") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if Path(file).suffix[1:] not in kinds:
        raise SkimError(f"{file}: cannot be drawn: give a .png, .svg or .pdf")


def plot(facts: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Draw what `evaluate(everything=True)` gave into a file."""
    figure(facts).savefig(file)


def figure(facts: Mapping[str, Any]) -> Any:
    """Closure against the share of the text's tokens: a colour per method, a line per skill."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.add_subplot()
    alpha = 1.0 if len(facts["skills"]) == 1 else 0.4
    colors: dict[str, str] = {}
    for row in facts["skills"]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for one in row["all"]:
            share = one["tokens"] / row["text_tokens"]
            lines.setdefault(one["method"], []).append((share, one["closure"]))
        for method, points in lines.items():
            label = None if method in colors else method
            color = colors.setdefault(method, f"C{len(colors)}")
            xy = zip(*sorted(points), strict=True)
            axes.plot(*xy, "o-", color=color, alpha=alpha, markersize=4, label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="tokens / tokens of the full text", ylabel="closure", xlim=(0, 1))
    axes.legend()
    return drawn
