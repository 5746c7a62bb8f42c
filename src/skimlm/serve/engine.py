"""Continuous batching: requests come and go, all that run get their next token in one native call.

    engine = Engine(model, rows=16, waiting=64)
    engine.submit(job)          from any thread; Full if too many wait
    engine.cancel(job)          its work stops before the next token

One thread does all the work. Each turn it reads a part of one prompt, if one waits for it, and
gives every running request a token (runtime/decode.py), so a long prompt delays the others by a
part of it. A request's tokens do not depend on what else runs: native rows are to the bit what they
are alone, prompts are read one at a time in parts of the same size, and each request draws by a
seed of its own. A model that has no native way gets one request after the other: right, and slower.

When answers grow beyond the memory that there is for keys and values, the youngest request waits
again; what it said is read once more when there is room, and it goes on where it was.
"""

from __future__ import annotations

import collections
import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from skimlm import native
from skimlm.models.architecture import positions
from skimlm.runtime import decode
from skimlm.runtime.prefix import PrefixCache, attending
from skimlm.serve.sampling import Sampler, Sampling
from skimlm.skills import rollout
from skimlm.skills.rollout import Prefix

PART = 512  # tokens of a prompt that are read at once: a third of a second of a small model
FEW = 64  # tokens of a whole prompt that go along with the tokens of others, in the native call
SHARE = 0.5  # of the memory that is free at the start, for keys and values

ANSWER = 256  # tokens that room is kept for where an answer may be of any length
Put = Callable[["Job", "int | str | BaseException"], None]


class Full(Exception):
    """Too many requests wait."""


@dataclass(eq=False)
class Job:
    """A request: ids [t] behind a prefix, at most `most` tokens, `put` gets each as it comes.

    Last it gets why there are no more: "stop" (one of `ends`, which it does not get), "length", or
    an error. It is called on the engine's thread, as `prefix` is; after `cancel` at most once.
    """

    ids: Tensor
    most: int
    put: Put
    ends: Sequence[int] = ()
    prefix: Callable[[], Prefix] | None = None
    sampling: Sampling = Sampling()
    cancelled: bool = False
    cache: Any = field(default=None, repr=False)
    read: int = 0  # of ids
    said: list[int] = field(default_factory=list, repr=False)
    sampler: Sampler | None = field(default=None, repr=False)

    @property
    def taken(self) -> int:
        """Positions it takes by now."""
        return len(self.ids) + len(self.said)

    @property
    def room(self) -> int:
        """Positions it is likely to take."""
        return len(self.ids) + max(len(self.said), min(self.most, ANSWER))


class Engine:
    """Runs jobs on one model; `stop` when nothing is to come."""

    def __init__(self, model: Any, rows: int = 16, waiting: int = 64) -> None:
        self.model, self.rows, self.most_waiting = model, rows, waiting
        self.context = positions(model.config)  # None: no end
        self.waiting: collections.deque[Job] = collections.deque()
        self.running: list[Job] = []
        self.reading: Job | None = None
        self.budget = _budget(model)  # positions of all that run
        # elsewhere the model's own code reads several tokens faster
        self.few = FEW if not native.missing() and native.library().skimlm_has_vbmi() else 0
        self.tokens = self.prompt_tokens = self.together = 0  # so far; calls that took several
        self.failures = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = self._start()

    def submit(self, job: Job) -> None:
        """Let a job run when its turn comes."""
        with self._changed:
            waiting = sum(not other.cancelled for other in self.waiting)
            if self._stopping or waiting >= self.most_waiting:
                raise Full
            self.waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Let a job end: it gets nothing more."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def alive(self) -> bool:
        """Whether the engine's thread runs; one that has died is started again."""
        with self._changed:
            if self._stopping:
                return False
            if self._thread.is_alive():
                return True
            self._thread = self._start()
            return False

    def stop(self) -> None:
        """End the thread; jobs that still run get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self._fail(RuntimeError("the server is stopping"))

    # ---- the thread

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._work, name="engine", daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # this thread's own
        gc.collect()
        gc.freeze()  # a token makes many tensors: looking at all modules for each takes a tenth
        try:
            while self._wait():
                try:
                    with torch.inference_mode():
                        self._turn()
                except Exception as error:
                    self._fail(error)
        except BaseException as error:  # the thread ends: nobody waits for it in vain
            self._fail(error)
            raise

    def _wait(self) -> bool:
        """Until there is work; False when there is to be no more."""
        with self._changed:
            while not (self._stopping or self.waiting or self.running or self.reading):
                self._changed.wait()
            self._admit()
            return not self._stopping

    def _admit(self) -> None:
        """Take the next job that is not cancelled, if there is room for it."""
        while self.reading is None and self.waiting and len(self.running) < self.rows:
            job = self.waiting[0]
            taken = sum(other.room for other in self.running)
            if self.running and taken + job.room > self.budget and not job.cancelled:
                return
            self.waiting.popleft()
            if not job.cancelled:
                self.reading = job

    def _turn(self) -> None:
        for job in self.running:
            if job.cancelled:
                job.cache = None
        self._let_go()
        while len(self.running) > 1 and sum(job.taken for job in self.running) > self.budget:
            youngest = self.running.pop()
            youngest.cache, youngest.read = None, 0
            with self._changed:
                self.waiting.appendleft(youngest)
        others_wait = self.reading is None or self._read(self.reading)
        if others_wait and self.running:
            self._step(self.running)
        self._let_go()

    def _let_go(self) -> None:
        """Forget the jobs that have ended."""
        self.running = [job for job in self.running if job.cache is not None]

    def _read(self, job: Job) -> bool:
        """A part of a prompt, with the last one comes the first token; whether others still wait.

        A short prompt goes along with the tokens of the others.
        """
        try:
            if job.cancelled:
                self.reading, job.cache = None, None
                return True
            if job.cache is None:
                job.sampler = job.sampler or Sampler(job.sampling)
                job.cache = (
                    DynamicCache(config=self.model.config)
                    if job.prefix is None
                    else rollout.lent(self.model, job.prefix(), 1)
                )
            short = len(job.ids) <= self.few and not job.said
            if short and self._together([*self.running, job]):
                self.prompt_tokens += len(job.ids)
                self.reading = None
                self.running.append(job)
                return False
            part = job.ids[job.read : job.read + PART]
            logits = self._next(job, part)
            job.read += len(part)
            self.prompt_tokens += len(part)
            if job.read == len(job.ids):
                self.reading = None
                if job.said:  # it had to wait in between
                    self._again(job)
                else:
                    self._take(job, logits)
                if job.cache is not None:
                    self.running.append(job)
        except Exception as error:  # of this one prompt: the others go on
            self.reading, job.cache = None, None
            self.failures += 1
            job.put(job, error)
        return True

    def _next(self, job: Job, part: Tensor) -> Tensor:
        """Logits after a part of a prompt, read in the way that its length decides."""
        return self._alone(job, part) if len(job.ids) <= self.few else self._forward(job, part)

    def _again(self, job: Job) -> None:
        """Read what a job has said, but for the last token, as it was said."""
        for token in torch.tensor(job.said[:-1]).split(1):
            self._alone(job, token)

    def _alone(self, job: Job, ids: Tensor) -> Tensor:
        """Logits after some tokens of one job, natively if that is possible."""
        rows = decode.together(self.model, [ids], [job.cache])
        return self._forward(job, ids) if rows is None else rows[0]

    def _together(self, jobs: Sequence[Job]) -> bool:
        """A token for each in one native call; whether that was possible."""
        ids = [torch.tensor([job.said[-1]]) if job.said else job.ids for job in jobs]
        rows = decode.together(self.model, ids, [job.cache for job in jobs])
        if rows is None:
            return False
        self.together += len(jobs) > 1
        likeliest = rows.argmax(-1).tolist()
        for job, logits, first in zip(jobs, rows, likeliest, strict=True):
            self._take(job, logits, first)
        return True

    def _step(self, jobs: Sequence[Job]) -> None:
        """One token for each."""
        if not self._together(jobs):
            for job in jobs:
                self._take(job, self._forward(job, torch.tensor([job.said[-1]])))

    def _forward(self, job: Job, ids: Tensor) -> Tensor:
        """Logits [vocabulary] of the model's own code behind a job's cache."""
        how: dict[str, Any] = {decode.CACHE: job.cache, "logits_to_keep": 1, "use_cache": True}
        ids = ids[None].to(self.model.device)
        if isinstance(job.cache, PrefixCache):
            with attending(self.model):
                return self.model(ids, **how).logits[0, -1]
        return self.model(ids, **how).logits[0, -1]

    def _take(self, job: Job, logits: Tensor, likeliest: int | None = None) -> None:
        """Choose a job's next token, and let it go if that was the last, or cannot be chosen."""
        if job.cancelled:
            job.cache = None
            return
        assert job.sampler is not None
        try:
            greedy = likeliest is not None and job.sampling.plain
            token = likeliest if greedy else job.sampler.choose(logits, job.said)
        except Exception as error:  # the others have theirs to come
            job.cache = None
            self.failures += 1
            job.put(job, error)
            return
        assert token is not None
        self.tokens += 1
        done = "stop" if token in job.ends else None
        if done is None:
            job.said.append(token)
            job.put(job, token)
            done = "length" if len(job.said) >= job.most else None
        if done is not None:
            job.cache = None
            job.put(job, done)

    def _fail(self, error: BaseException) -> None:
        """Tell all jobs that run, and those that wait if there is no thread any more."""
        self.failures += 1
        failed = [*self.running, *([self.reading] if self.reading else [])]
        if self._stopping:
            failed += self.waiting
            self.waiting.clear()
        self.running, self.reading = [], None
        for job in failed:
            job.cache = None
            if not job.cancelled:
                job.put(job, error)


def _budget(model: Any) -> int:
    """Positions whose keys and values fit into SHARE of the memory that is free."""
    import psutil

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    # twice as long as what they hold, at most (decode._make_room)
    return int(SHARE * psutil.virtual_memory().available / (2 * position))
