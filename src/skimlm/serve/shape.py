"""Answers that keep to a JSON schema: of every token, which ones may come (llguidance)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from skimlm.errors import SkimError

HOW = {
    "lenient": True,  # what it does not know of a schema, it leaves
    "whitespace_flexible": False,  # or there may be white space without end
    "item_separator": ", ",
    "key_separator": ": ",
}


class Shapes:
    """Makes rules for one tokenizer and vocabulary; that takes a second, the first time."""

    def __init__(self, tokenizer: Any, rows: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.rows, self.ends = tokenizer, rows, list(ends)
        self._made: Any = None

    def rule(self, schema: dict[str, Any]) -> Rule:
        """What an answer to `schema` may say; SkimError for one that cannot be kept to."""
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise SkimError("response_format needs llguidance: pip install llguidance") from None
        try:
            if self._made is None:
                self._made = llguidance.hf.from_tokenizer(
                    self.tokenizer, n_vocab=self.rows, eos_token=self.ends
                )
            text = json.dumps({**schema, "x-guidance": HOW})
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
        except (ValueError, TypeError) as error:
            raise SkimError(f"response_format: {_line(error)}") from None
        matcher = llguidance.LLMatcher(self._made, grammar)
        if matcher.is_error():
            raise SkimError(f"response_format: {_line(matcher.get_error())}")
        return Rule(matcher)


class Rule:
    """Where one answer stands in its schema."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """Which tokens may come: bool [vocabulary]."""
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        return torch.from_numpy(numpy.unpackbits(bits, bitorder="little").astype(bool))

    def take(self, token: int) -> None:
        """Go on with a token."""
        self._matcher.consume_token(token)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
