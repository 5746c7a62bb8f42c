"""A server of a model and its skills, made ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI

from skimlm import load
from skimlm.errors import SkimError
from skimlm.runtime.linear import Stored
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
    made = app(loaded.model, loaded.tokenizer, name, offered, engine, limits, about(loaded.model))
    return made, _told(name, offered)


def about(model: Any) -> dict[str, Any]:
    """What a model costs in memory beside its original in bfloat16, in bytes."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    packed, own = {}, set()
    for module in model.modules():
        held = [getattr(module, name, None) for name in getattr(module, "stored", ())]
        places = [tensor.data_ptr() for tensor in held if tensor is not None]
        if isinstance(module, Stored) and places:
            packed[places[0]] = module
            own.update(places)
    numbers = sum(module.rows * module.cols for module in packed.values())
    numbers += sum(tensor.numel() for place, tensor in tensors.items() if place not in own)
    return {
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "original_bytes": 2 * numbers,
    }


def _told(name: str, skills: Skills) -> str:
    count = len(skills.entries)
    lines = [f"{name}, {count} skill{'s' if count != 1 else ''}"]
    lines += [f"warning: {e.warning}" for e in skills.entries.values() if e.warning]
    return "\n".join(lines)
