"""A folder that is whole or absent: made beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from skimlm.errors import SkimError, first_line


def sync(folder: Path) -> None:
    """Force every file of a folder, and the folder itself, to disk."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def whole_folder(out: Path, part: Path | None = None) -> Iterator[Path]:
    """A folder that takes the name of `out` when the body succeeds, and vanishes otherwise.

    It is one beside `out`, or `part`, on the same disk, which is left to the caller if all fails.
    """
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if part is None:
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        else:
            folder = part
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        folder.chmod(0o777 & ~_umask())  # mkdtemp's 0700 is not what a model folder should have
        yield folder
        sync(folder)
        _replace(folder, out)
    except (OSError, SafetensorError) as error:
        raise SkimError(f"{out}: could not be written: {first_line(error)}") from error
    finally:
        if folder is not None and part is None:
            shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an old `out` is put aside first and back if anything fails."""
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_name(folder.name + ".old")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_out(out: str | os.PathLike[str], force: bool = False, mark: str = "config.json") -> None:
    """Refuse an OUT that exists; with `force`, one that is not a model folder (has no `mark`)."""
    out = Path(out)
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise SkimError(f"{out}: exists, use --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / mark).is_file()):
        raise SkimError(f"{out}: is not a model folder, --force does not replace it")


def folder_bytes(out: str | os.PathLike[str]) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
