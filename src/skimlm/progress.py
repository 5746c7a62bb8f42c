"""What a run tells while it goes: bars, seconds per phase, the most memory held."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """Give a function (phase, done, total) that draws one bar per phase on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield update


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
