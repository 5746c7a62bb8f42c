"""Calls of tools in an answer, as templates of the Hermes kind have models write them (Qwen, ...).

<tool_call>
{"name": "weather", "arguments": {"city": "Bern"}}
</tool_call>
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator
from typing import Any

from skimlm.serve.text import overlap

BEGIN = "<tool_call>"
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)", re.S)


def written_so(tokenizer: Any) -> bool:
    """Whether a chat template asks for calls in this form."""
    return BEGIN in str(tokenizer.chat_template or "")


def split(text: str) -> tuple[str, list[dict[str, Any]]]:
    """What is said before the first call, and the calls; all is text if one cannot be read."""
    calls = []
    for match in CALL.finditer(text):
        try:
            made = json.loads(match[1])
        except ValueError:
            return text, []
        if not isinstance(made.get("name"), str):
            return text, []
        function = {
            "name": made["name"],
            "arguments": json.dumps(made.get("arguments", {}), ensure_ascii=False),
        }
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                      "function": function})  # fmt: skip
    return (text.partition(BEGIN)[0].rstrip(), calls) if calls else (text, [])


class Split:
    """Pieces of an answer as they come, but for its calls: afterwards they are in `calls`."""

    def __init__(self, pieces: AsyncIterator[str]) -> None:
        self.pieces = pieces
        self.calls: list[dict[str, Any]] = []

    async def __aiter__(self) -> AsyncIterator[str]:
        text, given = "", 0
        async for piece in self.pieces:
            text += piece
            end = text.find(BEGIN)
            if end < 0:  # the end may become the beginning of a call
                end = len(text) - overlap(text, BEGIN)
            if end > given:
                yield text[given:end]
                given = end
        said, self.calls = split(text)
        if rest := said[given:]:
            yield rest
