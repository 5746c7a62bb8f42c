"""One answer: a job's tokens, brought from the engine's thread to the loop that serves a client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from skimlm.errors import SkimError
from skimlm.serve.engine import Engine, Job
from skimlm.serve.text import Pieces


class Late(Exception):
    """An answer took longer than it may."""


class Failed(Exception):
    """The engine could not go on."""


class Answer:
    """Pieces of text as they come; afterwards why they ended, and what they took."""

    def __init__(self, engine: Engine, job: Job, pieces: Pieces, seconds: float) -> None:
        self.engine, self.job, self.pieces = engine, job, pieces
        self.finish = ""
        self.tokens = 0
        self.started = time.monotonic()
        self.first: float | None = None  # seconds to the first token
        self.last: float | None = None
        self._until = self.started + seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[int | str | BaseException] = asyncio.Queue()

    def put(self, job: Job, item: int | str | BaseException) -> None:
        """What the engine's thread calls."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens
            job.cancelled = True

    async def __aiter__(self) -> AsyncIterator[str]:
        """The pieces; the job is cancelled when nobody takes them any more."""
        try:
            while not self.finish:
                item = await self._next()
                if isinstance(item, int):
                    now = time.monotonic() - self.started
                    self.first, self.last = self.first if self.tokens else now, now
                    self.tokens += 1
                    piece = self.pieces.add(item)
                    self.finish = "stop" if self.pieces.stopped else ""
                elif isinstance(item, str):
                    self.finish, piece = item, self.pieces.end()
                elif isinstance(item, SkimError):
                    raise item
                else:
                    raise Failed(str(item)) from item
                if piece:
                    yield piece
        finally:
            self.engine.cancel(self.job)

    async def text(self) -> str:
        """All of it."""
        return "".join([piece async for piece in self])

    async def _next(self) -> Any:
        left = self._until - time.monotonic()
        try:
            return await asyncio.wait_for(self._queue.get(), max(left, 0))
        except asyncio.TimeoutError:
            raise Late from None

    def speed(self) -> float | None:
        """Tokens per second after the first."""
        if self.tokens < 2 or self.first is None or self.last is None or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)
