"""What blocks hand each other besides hidden states.

    keys and values that later blocks share    put into a mapping that every block is given
    tokens that a block chose for the next     returned behind the hidden states

A block that is run alone is given what those before it have left, by these names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

HIDDEN = "x"  # the hidden states [n, t, d]
RETURNED = "returned"
State = Mapping[str, Tensor]  # hidden states, and what is handed on, all [n, ...]


def left(out: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a block that was called with the named arguments `given` hands on, by name."""
    found: dict[str, Any] = {}
    if isinstance(out, tuple):
        found = {f"{RETURNED}.{j}": value for j, value in enumerate(out) if j}
    for name, box in _boxes(given):
        for key, values in box.items():
            if isinstance(values, tuple):
                found |= {f"{name}.{key}.{j}": value for j, value in enumerate(values)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def put(state: State, given: Mapping[str, Any]) -> None:
    """Put what was handed on into the mappings that a block is called with."""
    parts: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    for full, tensor in state.items():
        name, _, key = full.rpartition(".")[0].partition(".")
        values = parts.setdefault(name, {})
        values[key] = (*values.get(key, ()), tensor)
    for name, box in _boxes(given):
        box.update(parts.get(name, {}))


def returned(state: State, count: int) -> tuple[Tensor | None, ...]:
    """What was returned behind the hidden states, for a block that returns `count` values."""
    return tuple(state.get(f"{RETURNED}.{j}") for j in range(1, count))


def _boxes(given: Mapping[str, Any]) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
    for name, value in given.items():
        if isinstance(value, MutableMapping):
            yield name, value
