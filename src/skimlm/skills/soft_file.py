"""Soft tokens in a `.skim`: the tensor `soft` [K, d] in bfloat16, its resolutions and its pins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import FormatError
from skimlm.skills.document import Document
from skimlm.skills.splice import Pin
from skimlm.storage.safetensors import finite

VERSION = 1
MAX_ROWS, MAX_WIDTH = 16_384, 65_536
MAX_PINS = 4_096
METHODS = ("head", "leads", "selfinfo", "sections", "distill", "amortised")
TENSORS = ("soft",)
FACTS: dict[str, Any] = {"soft_sha256": str, "resolutions": list, "pins": list}


@dataclass(frozen=True)
class Soft:
    """Vectors that stand in a prompt for a skill's text, at several resolutions, pins between."""

    vectors: Tensor = field(repr=False)  # [K, d] bfloat16
    pins: tuple[Pin, ...]
    ladder: tuple[int, ...]  # resolutions: vectors[:k]


CONTENT = Soft


def tensors(content: Soft) -> dict[str, Tensor]:
    """What is stored, by name."""
    return {"soft": content.vectors.detach().to(torch.bfloat16).cpu().contiguous()}


def facts(content: Soft) -> dict[str, Any]:
    """What the metadata says of it, FACTS."""
    return {
        "soft_sha256": soft_sha256(tensors(content)["soft"]),
        "resolutions": list(content.ladder),
        "pins": [[pin.at, pin.text] for pin in content.pins],
    }


def check_entries(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse other types and sizes before a tensor is read."""
    shape, kind = entries["soft"]["shape"], entries["soft"]["dtype"]
    if kind != "BF16" or len(shape) != 2:
        raise FormatError(f"{kind} {shape}, must be BF16 [k, d]", file=path, tensor="soft")
    if not (1 <= shape[0] <= MAX_ROWS and 1 <= shape[1] <= MAX_WIDTH):
        raise FormatError(
            f"{shape}: at most {MAX_ROWS:,} soft tokens of {MAX_WIDTH:,} numbers",
            file=path,
            tensor="soft",
        )


def read(
    path: Path, held: Mapping[str, Tensor], facts: Mapping[str, Any], document: Document
) -> Soft:
    """Make it of the tensors `held`, all of it checked."""
    soft = held["soft"]
    if not finite(soft):
        raise FormatError("holds NaN or Inf: compress the skill again", file=path, tensor="soft")
    if soft_sha256(soft) != facts["soft_sha256"]:
        raise FormatError("has been changed: compress the skill again", file=path, tensor="soft")
    _check_pins(path, facts, document, len(soft))
    pins = tuple(Pin(at, text) for at, text in facts["pins"])
    return Soft(soft, pins, tuple(facts["resolutions"]))


def soft_sha256(soft: Tensor) -> str:
    """Hash of the vectors' bytes, little-endian bfloat16."""
    return hashlib.sha256(soft.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def describe(content: Soft) -> dict[str, Any]:
    """What it is, as plain values."""
    norms = content.vectors.float().norm(dim=1)
    return {
        "resolutions": list(content.ladder),
        "width": content.vectors.shape[1],
        "pins": len(content.pins),
        "norms": {"mean": float(norms.mean()), "max": float(norms.max())},
    }


def _check_pins(path: Path, facts: Mapping[str, Any], document: Document, rows: int) -> None:
    """Refuse resolutions out of range, and pinned text that is not the skill's."""
    ladder, k = facts["resolutions"], facts["k"]
    if not ladder or any(type(r) is not int or not 1 <= r <= rows for r in ladder):
        raise FormatError(f"resolutions must be 1 to {rows}", file=path)
    if ladder != sorted(set(ladder)) or ladder[-1] != rows:
        raise FormatError(f"resolutions must ascend to {rows}", file=path)
    if k is not None and k not in ladder:
        raise FormatError(f"k {k} is none of its resolutions", file=path)
    last = 0
    for pin in facts["pins"][: MAX_PINS + 1]:
        good = isinstance(pin, list) and len(pin) == 2 and type(pin[0]) is int
        if not good or not last <= pin[0] <= rows or not isinstance(pin[1], str) or not pin[1]:
            raise FormatError("pins must be [place, text], ascending", file=path)
        if pin[1].strip() not in document.text:
            raise FormatError("pins text that is not the skill's", file=path)
        last = pin[0]
    if len(facts["pins"]) > MAX_PINS:
        raise FormatError(f"more than {MAX_PINS:,} pins", file=path)
