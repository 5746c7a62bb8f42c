"""A server of a model and its skills, made ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI

from skimlm import inspect, load
from skimlm.errors import SkimError
from skimlm.serve.app import app
from skimlm.serve.engine import Engine
from skimlm.serve.guard import LOOPBACK, Limits
from skimlm.serve.skills import Skills


def make(
    model: str,
    name: str | None,
    skills: Path | None,
    host: str,
    key: str | None,
    revision: str | None,
    device: str,
    *,
    rows: int,
    queue: int,
    max_tokens: int | None,
    timeout: float,
) -> tuple[FastAPI, str]:
    """The application, and lines that say what it serves; SkimError for what cannot be served."""
    if host not in LOOPBACK and not key:
        raise SkimError(
            f"{host} can be reached from other machines: give --api-key, or listen on 127.0.0.1"
        )
    loaded = load(model, device, revision=revision)
    loaded.model.eval()
    name = name or Path(model).name or model
    offered = Skills(loaded.model, loaded.tokenizer, skills)
    engine = Engine(loaded.model, rows, queue)
    limits = Limits(seconds=timeout, tokens=max_tokens, key=key, hosts=() if key else LOOPBACK)
    made = app(
        loaded.model, loaded.tokenizer, name, offered, engine, limits, _about(model, loaded.model)
    )
    return made, _told(name, offered)


def _about(path: str, model: Any) -> dict[str, Any]:
    """What the model costs in memory beside its original, in bytes."""
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in _tensors(model)}.values())
    found: dict[str, Any] = {"bytes": weights, "original_bytes": weights}
    if Path(path).is_dir():
        try:
            facts = inspect(path)
        except SkimError:
            return found  # not one of ours
        found["bits_per_weight"] = facts.get("bits_per_weight")
        found["original_bytes"] = 2 * facts["parameters"] if "parameters" in facts else weights
    return found


def _tensors(model: Any) -> list[Any]:
    return [*model.parameters(), *model.buffers()]


def _told(name: str, skills: Skills) -> str:
    count = len(skills.entries)
    lines = [f"{name}, {count} skill{'s' if count != 1 else ''}"]
    lines += [f"warning: {e.warning}" for e in skills.entries.values() if e.warning]
    return "\n".join(lines)
