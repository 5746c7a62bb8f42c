"""A folder that is whole or absent: made beside its place, then put there in one step.

    OUT              what is written; what was there before only if skimlm wrote it
    .OUT.skimlm/     while a command is at work on OUT
        lock         held by its process
        new/         OUT before it has its name
    .OUT.before/     the former OUT, where a system cannot exchange two folders in one step

What a killed process left is removed, or brought back, by the next that writes the same OUT.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from skimlm.errors import SkimError, first_line
from skimlm.format.layer import METHOD

MARK = "skimlm.json"  # in a folder skimlm wrote whose config.json does not say so
LOCK = "lock"
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def sync(folder: Path) -> None:
    """Force every file of a folder, and the folder itself, to disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and os.name == "nt":  # folders cannot be opened there
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(work: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a working folder, which is made; SkimError if another process does."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise SkimError(f"{out}: another run is at work on it") from None
    except OSError as error:
        raise SkimError(f"{out}: could not be written: {first_line(error)}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_folder(out: Path, part: Path | None = None) -> Iterator[Path]:
    """A folder that takes the name of `out` when the body succeeds, and vanishes otherwise.

    It is one beside `out`, or `part`, on the same disk, whose lock the caller holds and which is
    left to him if all fails.
    """
    if part is not None:
        with _written(out, part) as folder:
            yield folder
        return
    out = real(out)
    work = out.with_name(f".{out.name}.skimlm")
    with locked(work, out):
        try:
            with _written(out, work / "new") as folder:
                yield folder
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _written(out: Path, folder: Path) -> Iterator[Path]:
    try:
        recover(out)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        sync(folder)
        replace(folder, out)
    except (OSError, SafetensorError) as error:
        raise SkimError(f"{out}: could not be written: {first_line(error)}") from error


def replace(folder: Path, out: Path) -> None:
    """Put `folder` at `out` in one step; what was at `out` is deleted."""
    if not out.exists():
        folder.rename(out)
    elif _is_here(out):  # renamed, a shell standing in it would stand in a deleted folder
        _fill(folder, out)
    elif _exchange(folder, out):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        before = _before(out)
        out.rename(before)
        try:
            folder.rename(out)
        except BaseException:
            before.rename(out)
            raise
        shutil.rmtree(before, ignore_errors=True)


def recover(out: Path) -> None:
    """Undo half a replacement that a killed process left."""
    before = _before(out)
    if before.exists():
        if out.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(out)


def _before(out: Path) -> Path:
    return out.with_name(f".{out.name}.before")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # an old Linux, macOS, Windows
        return False
    if rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _is_here(out: Path) -> bool:
    with suppress(OSError):
        return out.samefile(Path.cwd())
    return False


def _fill(folder: Path, out: Path) -> None:
    """Move everything into `out`, config.json last: without it there is no model."""
    for old in out.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(out / path.name)
    folder.rmdir()


# ---- what may be written where


def real(out: str | os.PathLike[str]) -> Path:
    """OUT with `.`, `..`, links and trailing slashes resolved."""
    return Path(os.path.realpath(out))


def check_apart(out: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Refuse an OUT that is an input, contains it or lies in it, whatever it is called."""
    target = real(out)
    for path in inputs:
        source = real(path)
        if not source.exists():
            continue
        if source == target:
            raise SkimError(f"{out}: is the model itself; name another folder")
        if target in source.parents:
            raise SkimError(f"{out}: contains {path}; name another folder")
        if source in target.parents:
            raise SkimError(f"{out}: lies in {path}, the model itself; name another folder")


def check_out(out: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse an OUT that exists; with `force`, one that skimlm has not written. Empty is free."""
    target = real(out)
    recover(target)
    if not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        if os.path.ismount(target):
            raise SkimError(f"{out}: is a mount point; name a folder inside it")
        return
    _check_replaced(out, force, lambda: is_ours(target))


def check_out_file(file: Path, key: str, force: bool) -> None:
    """The same for a single file of safetensors: skimlm's have `key` in their metadata."""

    def ours() -> bool:
        try:
            with safe_open(file, framework="pt") as stream:
                return key in (stream.metadata() or {})
        except (SafetensorError, OSError):
            return False

    if file.exists():
        _check_replaced(file, force, ours)


def _check_replaced(out: str | os.PathLike[str], force: bool, ours: Callable[[], bool]) -> None:
    if not force:
        raise SkimError(f"{out}: exists, use --force to replace it")
    if not ours():
        raise SkimError(f"{out}: was not written by skimlm, --force does not replace it")


def is_ours(folder: Path) -> bool:
    """Whether skimlm wrote this folder: its config.json says so, or a mark."""
    if (folder / MARK).is_file():
        return "made_by" in _json(folder / MARK)
    quantization = _json(folder / "config.json").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def mark(folder: Path, what: str) -> None:
    """Note in a folder that skimlm made it: transformers and PEFT read no such file."""
    facts = {"made_by": METHOD, "what": what}
    (folder / MARK).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _json(file: Path) -> dict[str, Any]:
    """A file as JSON; nothing if it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def folder_bytes(out: str | os.PathLike[str]) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
