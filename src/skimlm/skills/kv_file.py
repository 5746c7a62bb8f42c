"""Kept keys and values in a `.skim`: their tensors, and what has to be true of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import FormatError
from skimlm.skills.document import Document
from skimlm.skills.kv import Pack
from skimlm.storage.safetensors import finite

VERSION = 3
CONTENT = Pack
MAX_ENTRIES, MAX_WIDTH, MAX_LENGTH = 2**28, 65_536, 2**24
METHODS = ("kv",)
FACTS: dict[str, Any] = {"kv_sha256": str, "length": int, "first": int}
# dtype and shape of every tensor: n entries of keys d and values e wide, by layers and heads
TENSORS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "keys": ("I8", ("n", "d")),
    "values": ("I8", ("n", "e")),
    "key_steps": ("BF16", ("layers", "heads", 2, "d")),
    "value_steps": ("BF16", ("n",)),
    "bias": ("F16", ("n",)),
    "places": ("I32", ("n",)),
    "counts": ("I32", ("layers", "heads")),
}


def tensors(content: Pack) -> dict[str, Tensor]:
    """What is stored, by name."""
    return {name: getattr(content, name).cpu().contiguous() for name in TENSORS}


def facts(content: Pack) -> dict[str, Any]:
    """What the metadata says of it, FACTS."""
    hashed = kv_sha256(tensors(content))
    return {"kv_sha256": hashed, "length": content.length, "first": content.first}


def kv_sha256(held: Mapping[str, Tensor]) -> str:
    """Hash of the tensors' bytes, one after the other as in TENSORS, little-endian."""
    found = hashlib.sha256()
    for name in TENSORS:
        found.update(held[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_entries(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse other types and sizes before a tensor is read."""
    sizes: dict[str | int, int] = {}
    for name, (dtype, shape) in TENSORS.items():
        found, kind = entries[name]["shape"], entries[name]["dtype"]
        good = kind == dtype and len(found) == len(shape)
        for size, meant in zip(found, shape, strict=False):
            good = good and size == sizes.setdefault(meant, size if meant != 2 else 2)
        if not good:
            wanted = ", ".join(str(sizes.get(size, size)) for size in shape)
            raise FormatError(f"{kind} {found}, must be {dtype} [{wanted}]", file=path, tensor=name)
    n, width = sizes["n"], max(sizes["d"], sizes["e"])
    if not (1 <= n <= MAX_ENTRIES and 1 <= width <= MAX_WIDTH):
        raise FormatError(
            f"{n:,} entries of {width:,} numbers: at most {MAX_ENTRIES:,} of {MAX_WIDTH:,}",
            file=path,
            tensor="keys",
        )


def read(
    path: Path, held: Mapping[str, Tensor], facts: Mapping[str, Any], document: Document
) -> Pack:
    """Make it of the tensors `held`, all of it checked."""
    if kv_sha256(held) != facts["kv_sha256"]:
        raise FormatError("keys and values have been changed: compress the skill again", file=path)
    for name in ("key_steps", "value_steps", "bias"):
        if not finite(held[name]):
            raise FormatError("holds NaN or Inf: compress the skill again", file=path, tensor=name)
    length, first, counts, places = facts["length"], facts["first"], held["counts"], held["places"]
    if not 0 <= first <= length <= MAX_LENGTH:
        raise FormatError(f"metadata: length {length}, of them {first} before the text", file=path)
    if int(counts.min()) < first or int(counts.sum(dtype=torch.int64)) != len(places):
        raise FormatError("do not add up to its entries", file=path, tensor="counts")
    begins = torch.zeros(len(places) + 1, dtype=torch.bool)
    begins[counts.flatten().cumsum(0)] = begins[0] = True
    ascending = (places[1:] > places[:-1]) | begins[1:-1]
    if not ascending.all() or int(places.min()) < 0 or int(places.max()) >= length:
        raise FormatError(f"must ascend below {length:,} in every head", file=path, tensor="places")
    starts = counts.flatten().cumsum(0) - counts.flatten()
    opening = torch.arange(first)
    if not torch.equal(places[starts[:, None] + opening], opening.int().expand(len(starts), -1)):
        raise FormatError(f"every head keeps the first {first}", file=path, tensor="places")
    k = facts["k"]
    pack = Pack(**{name: held[name] for name in TENSORS}, length=length, first=first)
    if k is not None and k != pack.tokens:
        raise FormatError(f"k {k} is not the {pack.tokens} that are kept", file=path)
    return pack


def describe(content: Pack) -> dict[str, Any]:
    """What it is, as plain values."""
    layers, heads = content.counts.shape
    return {
        "resolutions": [content.tokens],
        "width": content.keys.shape[1],
        "layers": layers,
        "heads": heads,
        "length": content.length,
    }
