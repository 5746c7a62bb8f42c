"""A shortened text in a `.skim`: the tensor `extract`, its bytes in UTF-8."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import FormatError
from skimlm.skills.document import MAX_BYTES, Document

VERSION = 2
METHODS = ("extract",)
TENSORS = ("extract",)
FACTS: dict[str, Any] = {"extract_sha256": str}


@dataclass(frozen=True)
class Extract:
    """Lines of a skill's text that stand in a prompt for all of it."""

    text: str


CONTENT = Extract


def tensors(content: Extract) -> dict[str, Tensor]:
    """What is stored, by name."""
    return {"extract": torch.tensor(list(content.text.encode()), dtype=torch.uint8)}


def facts(content: Extract) -> dict[str, Any]:
    """What the metadata says of it, FACTS."""
    return {"extract_sha256": hashlib.sha256(content.text.encode()).hexdigest()}


def check_entries(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse other types and sizes before a tensor is read."""
    shape, kind = entries["extract"]["shape"], entries["extract"]["dtype"]
    if kind != "U8" or len(shape) != 1 or not 1 <= shape[0] <= MAX_BYTES:
        raise FormatError(f"{kind} {shape}, must be U8 [bytes]", file=path, tensor="extract")


def read(
    path: Path, held: Mapping[str, Tensor], facts: Mapping[str, Any], document: Document
) -> Extract:
    """Make it of the tensors `held`, all of it checked: every line must be the skill's."""
    raw = bytes(held["extract"].numpy())
    if hashlib.sha256(raw).hexdigest() != facts["extract_sha256"]:
        raise FormatError("has been changed: compress the skill again", file=path, tensor="extract")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("not UTF-8", file=path, tensor="extract") from None
    if not {*text.splitlines()} <= {*document.text.splitlines(), ""}:
        raise FormatError("holds lines that are not the skill's", file=path, tensor="extract")
    return Extract(text)


def describe(content: Extract) -> dict[str, Any]:
    """What it is, as plain values."""
    return {"resolutions": [], "extract_bytes": len(content.text.encode())}
