"""Text of tokens as they come, each piece as soon as it is whole, until a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Pieces:
    """Joined, the pieces are what the tokenizer makes of all tokens, up to the first of `stops`."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.stream = DecodeStream(skip_special_tokens=True) if self.backend else None
        self.ids: list[int] = []
        self.text = ""  # of all tokens so far, as far as it is whole
        self.given = 0  # characters of it
        self.stopped = False

    def add(self, token: int) -> str:
        """What is new with a token; what could become a stop string waits."""
        self.ids.append(token)
        if self.stream is not None:
            self.text += self.stream.step(self.backend, token) or ""
        else:
            whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            self.text = whole.rstrip("\ufffd") if len(whole) >= len(self.text) else self.text
        return self._new(last=False)

    def end(self) -> str:
        """What is left when no more tokens come: bytes that are no character become U+FFFD."""
        if not self.stopped:
            whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if whole.startswith(self.text):
                self.text = whole
        return self._new(last=True)

    def _new(self, last: bool) -> str:
        if self.stopped:
            return ""
        found = [at for stop in self.stops if (at := self.text.find(stop, self._from(stop))) >= 0]
        end = len(self.text)
        if found:
            self.stopped, end = True, min(found)
        elif not last:
            end -= max((overlap(self.text, stop) for stop in self.stops), default=0)
        piece, self.given = self.text[self.given : end], max(end, self.given)
        return piece

    def _from(self, stop: str) -> int:
        return max(0, self.given - len(stop))


def overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
