"""What a run tells while it goes: bars, seconds per phase, the most memory held."""

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVERY = 30.0  # seconds between two lines, at most
WORTH = 1.0  # seconds a phase must take to be worth a line when it is done


def peak_rss_bytes(workers: int = 1) -> int:
    """Return the most memory this process has held at once.

    With several workers the most one of them has held is added for each: an upper bound.
    """
    try:  # ru_maxrss would inherit the parent's peak across exec
        status = Path("/proc/self/status").read_text()
        own = int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        own = _maxrss(resource.RUSAGE_SELF)
    return own + (workers * _maxrss(resource.RUSAGE_CHILDREN) if workers > 1 else 0)


def _maxrss(who: int) -> int:
    peak = resource.getrusage(who).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (phase, done, total) that shows on stderr how far each phase is.

    Bars on a terminal; elsewhere a plain line every 30 seconds, and one for every phase that is
    done. Both say how much time is left.
    """
    from rich.console import Console

    # not rich's own answer: FORCE_COLOR makes a terminal of a log file
    terminal = sys.stderr is not None and sys.stderr.isatty()
    with _bars(Console(stderr=True)) if terminal else _plain_lines() as update:
        yield update


@contextmanager
def _bars(console: Any) -> Iterator[Callable[[str, int, int], None]]:
    """One bar per phase."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, *times, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield update


@contextmanager
def _plain_lines() -> Iterator[Callable[[str, int, int], None]]:
    """Lines on stderr; a thread of its own sees to those that are due between two updates."""
    lines, over = Lines(lambda line: print(line, file=sys.stderr, flush=True)), threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            lines.tick()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lines.update
    finally:
        over.set()
        thread.join()


class Lines:
    """Progress as lines of text: `say` gets one at least every 30 seconds, `now` in seconds."""

    def __init__(
        self, say: Callable[[str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._now, self._lock = say, now, threading.Lock()
        self._phase, self._done, self._total = "", 0, 0
        self._first = 0  # what was done when the phase began, in a run that is gone on with
        self._begun = self._said = now()

    def update(self, phase: str, done: int, total: int) -> None:
        """So much of a phase is done."""
        with self._lock:
            now = self._now()
            if phase != self._phase:
                self._phase, self._first, self._begun = phase, min(done, 1) and done - 1, now
            self._done, self._total = done, total
            if now - self._said >= EVERY or (done >= total and now - self._begun >= WORTH):
                self._tell(now)

    def tick(self) -> None:
        """Tell what is due."""
        with self._lock:
            now = self._now()
            if self._phase and self._done < self._total and now - self._said >= EVERY:
                self._tell(now)

    def _tell(self, now: float) -> None:
        taken, made = now - self._begun, self._done - self._first
        line = f"{self._phase:<12} {self._done}/{self._total}, {_span(taken)}"
        if made > 0 and self._done < self._total:
            line += f", about {_span(taken / made * (self._total - self._done))} left"
        self._said = now
        self._say(line)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Clock:
    """Seconds per phase, in the order they ran; put earlier ones into `seconds` and they add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._now: tuple[str, float, float] | None = None  # phase, its seconds before, begun at

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._now = phase, self.seconds.get(phase, 0.0), time.perf_counter()
        yield
        self.tick()
        self._now = None

    def tick(self) -> None:
        """Bring the phase that runs up to date."""
        if self._now:
            phase, before, begun = self._now
            self.seconds[phase] = round(before + time.perf_counter() - begun, 3)
