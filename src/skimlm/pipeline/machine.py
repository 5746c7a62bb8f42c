"""What this process may use of the machine: memory and processors, within its container.

Inside a container the machine's own figures are not the process's: the control groups it is in say
how much is left, version 1 or 2, each of them and all above it (Linux, cgroups(7)).
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")  # lines of number:controllers:path


def available_memory(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Bytes that can still be taken without swapping or being killed."""
    left = [psutil.virtual_memory().available]
    for folder in _folders("memory", groups, own):
        used = _number(folder / "memory.current")
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        if used is None:  # version 1
            used = _number(folder / "memory.usage_in_bytes")
            limits = [_number(folder / "memory.limit_in_bytes")]
        cache = _cache(folder / "memory.stat")  # of files: given back when memory runs short
        left += [limit - max((used or 0) - cache, 0) for limit in limits if limit is not None]
    return max(min(left), 0)


def processors(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Processors this process may keep busy at a time, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    most = [float(len(affinity(0)) if affinity else os.cpu_count() or 1)]
    for folder in _folders("cpu", groups, own):
        words = _text(folder / "cpu.max").split()  # version 2: quota and period
        if not words:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [_text(folder / name).strip() for name in names]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            most.append(int(words[0]) / int(words[1]))
    return max(1, math.ceil(min(most)))


def _folders(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """The group of this process for a controller, and those above it."""
    for line in _text(own).splitlines():
        _, names, path = line.split(":", 2) if line.count(":") >= 2 else ("", "?", "")
        if names and controller not in names.split(","):
            continue
        top = groups / controller if names else groups
        place = top / path.lstrip("/")
        # in a container the path may be the host's: its own group is then mounted at the top
        chain = [place, *place.parents] if place.exists() else [top]
        yield from (folder for folder in chain if folder == top or top in folder.parents)


def _cache(stat: Path) -> int:
    facts = dict(line.split() for line in _text(stat).splitlines() if len(line.split()) == 2)
    found = facts.get("total_inactive_file", facts.get("inactive_file", "0"))
    return int(found) if found.isdigit() else 0


def _number(file: Path) -> int | None:
    """The number in a file; None if there is none, as in "max"."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
