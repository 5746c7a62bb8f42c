"""A compressed skill as one file, `.skim`: safetensors with a JSON text in its metadata.

    write(path, skill)                 whole or not at all
    read(path) -> Skill                refuses anything that is not exactly what FORMAT.md says
    stale(skill, model, tokenizer)     why its content does not fit what is loaded; [] if it does
    standing(skill, tokenizer)         what stands in a prompt for it

The full text is inside: it can be read by people, hashed, and served when the content does not
fit. Nothing is pickled. A reader trusts nothing: sizes, types, finiteness and hashes are checked
before a number is used. A hash is no signature: who can write the file can write its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skimlm.errors import FormatError, SkimError, first_line
from skimlm.models.architecture import positions
from skimlm.skills import kv_file, soft_file, text_file
from skimlm.skills.document import MAX_BYTES, Document, parse
from skimlm.skills.front import Standing, taken
from skimlm.skills.kv import Pack
from skimlm.skills.soft_file import Soft
from skimlm.skills.splice import WRAPPER, pieces_of, token_ids, wrapper_tokens
from skimlm.skills.text_file import Extract
from skimlm.storage.folder import check_out_file
from skimlm.storage.safetensors import read_header, write_file

KEY = "skim"  # of the metadata of the file
SUFFIX = ".skim"
HASHES = ("tokenizer", "chat_template", "model")
# what knows each kind's part of a file
KINDS: dict[str, Any] = {"soft": soft_file, "kv": kv_file, "text": text_file}
Content: TypeAlias = Soft | Pack | Extract
LISTS = ("trainings", "candidates", "rungs")  # of the evidence


# keys of the metadata, and what they are
COMMON: dict[str, Any] = {
    "name": str, "text_sha256": str, "method": str, "k": (int, type(None)), "wrapper": list,
    "made_for": dict, "source": str, "evidence": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Skill:
    """A compressed skill; `k` is the resolution to serve, None: only the full text will do."""

    document: Document
    content: Content
    k: int | None
    method: str
    made_for: Mapping[str, Any]  # hashes of HASHES, model_type, width
    evidence: Mapping[str, Any] = field(default_factory=dict, repr=False)
    source: str = ""  # plain file name of the SKILL.md it was made from

    @property
    def name(self) -> str:
        """The skill's name."""
        return self.document.name

    @property
    def kind(self) -> str:
        """The kind of its content, one of KINDS."""
        return next(kind for kind, own in KINDS.items() if type(self.content) is own.CONTENT)


def fingerprints(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What soft tokens depend on, hashed: tokenizer, chat template, and the model's weights.

    Of every weight at most 4,096 numbers go in, evenly spread: another model, a fine-tuned or a
    quantized one has another hash, without a minute of hashing for billions of weights.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {list(tensor.shape)} ".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, -(-flat.numel() // 4096))].cpu()
        # in float32, whatever dtype it was loaded in; integers (codes) as they are
        some = some.float() if some.is_floating_point() else some
        weights.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        _without_settings(backend.to_str())
        if backend
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    return {
        "model": weights.hexdigest(),
        "tokenizer": _sha256(vocabulary),
        "chat_template": _sha256(str(tokenizer.chat_template or "")),
        "model_type": str(model.config.model_type),
        "width": int(model.config.get_text_config().hidden_size),
    }


def _without_settings(tokenizer: str) -> str:
    """A tokenizer.json without what the last call left in it: how to cut and to fill up texts."""
    for key in ('"truncation":', '"padding":'):
        start = tokenizer.index(key) + len(key)
        _, end = json.JSONDecoder().raw_decode(tokenizer, start)
        tokenizer = f"{tokenizer[:start]}null{tokenizer[end:]}"
    return tokenizer


class MadeFor(Protocol):
    """A skill, or a compressor of skills."""

    @property
    def made_for(self) -> Mapping[str, Any]:
        """Hashes of HASHES."""
        ...


def stale(
    made: MadeFor, model: Any, tokenizer: Any, now: Mapping[str, Any] | None = None
) -> list[str]:
    """Which of tokenizer, chat_template and model are not those something was made for.

    `now`: their fingerprints, where many are asked about.
    """
    now = now or fingerprints(model, tokenizer)
    return [what for what in HASHES if made.made_for[what] != now[what]]


def standing(skill: Skill, tokenizer: Any, k: int | None = None) -> Standing:
    """What stands in a prompt for the skill: at resolution `k`, by default the one chosen."""
    k = skill.k if k is None else k
    if k is None:
        return [token_ids(tokenizer, skill.document.text)]
    content = skill.content
    if k not in ladder(skill):
        have = ", ".join(str(k) for k in ladder(skill))
        raise SkimError(f"{skill.name}: no resolution {k}: it has {have}")
    if isinstance(content, Pack):
        return content
    if isinstance(content, Extract):
        return [token_ids(tokenizer, as_text(skill))]
    return pieces_of(tokenizer, content.vectors, content.pins, k)


def as_text(skill: Skill) -> str:
    """What stands in a prompt where nothing but text can: shortened, where that is its kind."""
    content = skill.content
    return content.text if isinstance(content, Extract) and skill.k else skill.document.text


def ladder(skill: Skill) -> tuple[int, ...]:
    """The resolutions that a skill has."""
    if isinstance(skill.content, Soft):
        return skill.content.ladder
    made = skill.content.tokens if isinstance(skill.content, Pack) else skill.k
    return () if made is None else (made,)


def tokens(stands: Standing, tokenizer: Any) -> int:
    """Positions that stand in a prompt for a skill, wrapper and pinned text included."""
    return taken(stands) + wrapper_tokens(tokenizer)


# ---- the file


def check_out(path: Path, force: bool) -> None:
    """Refuse an OUT that is no .skim, or stands there already: before minutes of work."""
    if path.suffix != SUFFIX:
        raise SkimError(f"{path}: a compressed skill is named *{SUFFIX}")
    check_out_file(path, KEY, force)


def write(path: str | os.PathLike[str], skill: Skill) -> None:
    """Write a skill, whole or not at all."""
    text = torch.tensor(list(skill.document.text.encode()), dtype=torch.uint8)
    own = KINDS[skill.kind]
    facts = {
        "format_version": own.VERSION,
        "name": skill.document.name,
        "text_sha256": skill.document.sha256,
        "method": skill.method,
        "k": skill.k,
        "wrapper": list(WRAPPER),
        "made_for": dict(skill.made_for),
        "source": skill.source,
        "evidence": dict(skill.evidence),
        **own.facts(skill.content),
    }
    if own.VERSION > 1:  # there was one kind
        facts["kind"] = skill.kind
        facts["facts_sha256"] = _facts_sha256(facts)
    meta = {KEY: json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False)}
    write_file(Path(path), {**own.tensors(skill.content), "text": text}, meta)


def read(path: str | os.PathLike[str]) -> Skill:
    """Read a .skim and check all of it; FormatError names the file and what is wrong."""
    path = Path(path)
    entries = read_header(path)
    try:
        with safe_open(path, framework="pt") as stream:
            facts = _facts(path, (stream.metadata() or {}).get(KEY))
            _check_entries(path, entries, facts["kind"])
            held = {name: stream.get_tensor(name) for name in entries}
    except SafetensorError as error:
        raise FormatError(first_line(error), file=path) from error
    document = _document(path, held["text"], facts)
    return Skill(
        document,
        KINDS[facts["kind"]].read(path, held, facts, document),
        facts["k"],
        facts["method"],
        facts["made_for"],
        facts["evidence"],
        facts["source"],
    )


def check_fresh(skill: Skill, model: Any, tokenizer: Any, where: str) -> None:
    """Refuse a skill that was made for another model or tokenizer."""
    if wrong := stale(skill, model, tokenizer):
        raise SkimError(
            f"{where}: made for another {' and '.join(wrong)}: compress the skill again"
        )


def check_source(path: str | os.PathLike[str], skill: Skill) -> None:
    """Refuse a skill whose SKILL.md, lying beside it, says something else by now.

    A file of that name that shares neither name nor description is another skill's.
    """
    from skimlm.skills.document import read as read_document

    source, made_from = Path(path).parent / skill.source, skill.document
    if not skill.source or not source.is_file():
        return
    found = read_document(source)
    own = found.name == made_from.name or found.description == made_from.description
    if own and found.sha256 != made_from.sha256:
        raise SkimError(
            f"{path}: {source.name} beside it has been edited since: run"
            f" `skimlm skill compress {source} {path} --force` again"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_entries(path: Path, entries: Mapping[str, Mapping[str, Any]], kind: str) -> None:
    """Refuse other tensors, types and sizes before any is read."""
    own = KINDS[kind]
    if set(entries) != (wanted := {*own.TENSORS, "text"}):
        raise FormatError(
            f"holds {', '.join(sorted(entries))}, one of kind {kind} {', '.join(sorted(wanted))}",
            file=path,
        )
    own.check_entries(path, entries)
    shape, dtype = entries["text"]["shape"], entries["text"]["dtype"]
    if dtype != "U8" or len(shape) != 1 or not 1 <= shape[0] <= MAX_BYTES:
        raise FormatError(f"{dtype} {shape}, must be U8 [bytes]", file=path, tensor="text")


def _facts_sha256(facts: Mapping[str, Any]) -> str:
    """Hash of the metadata but for this, as JSON with sorted keys, in ASCII."""
    return _sha256(json.dumps({k: v for k, v in facts.items() if k != "facts_sha256"},
                              sort_keys=True))  # fmt: skip


def _facts(path: Path, text: str | None) -> dict[str, Any]:
    """Parse the metadata, every key of the type FORMAT.md gives it."""
    try:
        facts = json.loads(text or "")
        assert isinstance(facts, dict)
    except (ValueError, AssertionError, RecursionError):
        raise FormatError(
            f"not a compressed skill: no `{KEY}` in its metadata", file=path
        ) from None
    kind, version = facts.setdefault("kind", "soft"), facts.get("format_version")
    known = {kind: own.VERSION for kind, own in KINDS.items()}
    if type(version) is not int or version not in known.values():
        reads = ", ".join(str(number) for number in sorted({*known.values()}))
        raise FormatError(f"format {version!r}, this skimlm reads {reads}", file=path)
    if not isinstance(kind, str) or known.get(kind) != version:
        reason = f"metadata: format {version} has no kind {kind!r:.40}"
        again = ": compress the skill again" if version < known.get(str(kind), 0) else ""
        raise FormatError(reason + again, file=path)
    for key, type_ in (COMMON | KINDS[kind].FACTS).items():
        if key not in facts or not isinstance(facts[key], type_) or isinstance(facts[key], bool):
            raise FormatError(f"metadata: {key} is missing or of a wrong kind", file=path)
    if version > 1 and _facts_sha256(facts) != facts.get("facts_sha256"):
        raise FormatError("metadata has been changed: compress the skill again", file=path)
    if facts["wrapper"] != list(WRAPPER):
        raise FormatError("made for another wrapper: compress the skill again", file=path)
    if facts["method"] not in KINDS[kind].METHODS:
        raise FormatError(f"metadata: unknown method {facts['method'][:40]!r}", file=path)
    made_for = facts["made_for"]
    if any(not isinstance(made_for.get(key), str) for key in HASHES):
        raise FormatError(f"metadata: made_for has no {', '.join(HASHES)}", file=path)
    source = facts["source"]
    if source != Path(source).name or source.startswith(".") or "\\" in source or "\0" in source:
        raise FormatError(f"source {source[:80]!r} is not a plain file name", file=path)
    return facts


def _document(path: Path, raw: Tensor, facts: Mapping[str, Any]) -> Document:
    try:
        text = bytes(raw.numpy()).decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("not UTF-8", file=path, tensor="text") from None
    document = parse(text, str(path))
    if document.text != text or document.sha256 != facts["text_sha256"]:
        raise FormatError("has been changed: compress the skill again", file=path, tensor="text")
    if document.name != facts["name"]:
        raise FormatError(f"named {facts['name'][:80]!r}, its text {document.name!r}", file=path)
    return document


def check_reach(model: Any, text_tokens: int, room: int, name: str) -> None:
    """Refuse a text that the model cannot read at once with `room` tokens behind it."""
    most = positions(model.config)
    if most and text_tokens + room > most:
        raise SkimError(
            f"{name}: {text_tokens:,} tokens, with a question and its answer the model reads"
            f" {most - room:,} of a skill: split it into several skills"
        )


def served(path: str | os.PathLike[str], model: Any, tokenizer: Any) -> tuple[Standing, str | None]:
    """What is served for a file, and a warning where the full text stands in for its content.

    A SKILL.md is its full text. A .skim made for another model or tokenizer is, too, and says so;
    one that is damaged, or whose SKILL.md beside it was edited, is refused.
    """
    from skimlm.skills.document import read as read_document

    if Path(path).suffix != SUFFIX:
        return [token_ids(tokenizer, read_document(path).text)], None
    skill = read(path)
    check_source(path, skill)
    return fitting(skill, model, tokenizer, str(path))


def fitting(
    skill: Skill, model: Any, tokenizer: Any, where: str, now: Mapping[str, Any] | None = None
) -> tuple[Standing, str | None]:
    """What is served for a skill, and a warning where its full text stands in for its content.

    `now` as in `stale`.
    """
    if skill.k is None:
        return standing(skill, tokenizer), None
    wrong = stale(skill, model, tokenizer, now)
    if not wrong:
        return standing(skill, tokenizer), None
    warning = f"{where}: made for another {' and '.join(wrong)}: its full text is used"
    return [token_ids(tokenizer, skill.document.text)], warning


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a .skim as plain values, JSON-ready; no model is needed."""
    skill = read(path)
    measured = skill.evidence.get("candidates", skill.evidence.get("rungs"))  # older files: rungs
    rows = measured if isinstance(measured, list) else []
    return {
        "path": str(path),
        "format_version": KINDS[skill.kind].VERSION,
        "kind": skill.kind,
        "name": skill.document.name,
        "description": skill.document.description,
        "bytes": Path(path).stat().st_size,
        "method": skill.method,
        "k": skill.k,
        "text_sha256": skill.document.sha256,
        **KINDS[skill.kind].describe(skill.content),
        "made_for": dict(skill.made_for),
        "source": skill.source,
        "evidence": {k: v for k, v in skill.evidence.items() if k not in LISTS},
        "candidates": [row for row in rows if isinstance(row, dict)],
    }


def inspect_text(facts: Mapping[str, Any]) -> str:
    """Lay out what `inspect` returns."""
    from skimlm.evaluate.report import facts_text, table

    flat = {
        k: v for k, v in facts.items() if k not in ("candidates", "evidence", "made_for", "norms")
    }
    if flat["k"] is None:
        flat["k"] = "none is good enough: the full text is served"
    flat |= {key: facts["evidence"].get(key, "-") for key in ("text_tokens", "kl_no_skill")}
    lines = [facts_text(flat)]
    columns = ("method", "k", "tokens", "closure", "kl", "literal_recall")
    if facts["candidates"]:
        rows = [[_cell(row.get(column)) for column in columns] for row in facts["candidates"]]
        lines += ["", "measured on dev questions:", table([list(columns), *rows])]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
