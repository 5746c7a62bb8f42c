"""How completions are written: OpenAI's objects, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from typing import Any


class Text:
    """How a text completion is written."""

    id, object, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self.base = {
            "id": f"{self.id}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        """The answer in one."""
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.object, "choices": [choice]}

    def piece(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """A part of it; None begins."""
        choice = {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.chunk, "choices": [choice]}


class Chat(Text):
    """How a chat completion is written."""

    id, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        """The answer in one."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.object, "choices": [choice]}

    def piece(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """A part of it; None begins."""
        begun: dict[str, Any] = {"role": "assistant", "content": ""}
        delta = begun if text is None else ({"content": text} if text else {})
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": self.chunk, "choices": [choice]}
