"""How completions are written: OpenAI's objects, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any


class Text:
    """How a text completion is written."""

    id, object, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, calls: bool = False) -> None:
        self.calls = calls  # whether calls of tools are looked for
        self.base = {
            "id": f"{self.id}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, calls: list[Any], finish: str) -> dict[str, Any]:
        """The answer in one."""
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.object, "choices": [choice]}

    def piece(
        self, text: str | None, finish: str | None = None, calls: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """A part of it; None begins."""
        choice = {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.chunk, "choices": [choice]}


class Chat(Text):
    """How a chat completion is written."""

    id, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, text: str, calls: list[Any], finish: str) -> dict[str, Any]:
        """The answer in one."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
            finish = "tool_calls"
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.object, "choices": [choice]}

    def piece(
        self, text: str | None, finish: str | None = None, calls: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """A part of it; None begins."""
        begun: dict[str, Any] = {"role": "assistant", "content": ""}
        delta: dict[str, Any] = begun if text is None else ({"content": text} if text else {})
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
            finish = "tool_calls"
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.chunk, "choices": [choice]}
