"""An unfinished run: the folder OUT.partial beside OUT, what was asked for, and a lock.

    OUT.partial/journal.json     the options, model and text of the run, checked by `--resume`
                lock             held by the process that works on it
                ...              what is done so far, each file whole (pipeline/walk.py)
                model/           OUT while it is written
                report.json      there when model/ is whole, and which folder that is: what is
                                 left is to put it in place
                seconds.json     what every phase has taken so far

Whatever the moment a run is killed at, `resume` goes on from what is there; OUT is whole or absent.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skimlm.errors import SkimError
from skimlm.storage.folder import LOCK, locked, real, recover, whole_folder
from skimlm.storage.safetensors import read_json

JOURNAL, MODEL, REPORT = "journal.json", "model", "report.json"
SECONDS = "seconds.json"


def place(out: Path) -> Path:
    """The folder of the unfinished run that will make `out`."""
    out = real(out)
    return out.with_name(out.name + ".partial")


@contextmanager
def unfinished(out: Path, resume: bool, force: bool) -> Iterator[Path]:
    """The locked folder for a run that makes `out`; gone afterwards if nothing in it is of use.

    One that an earlier run left is gone on with (`resume`), emptied (`force`), or refused.
    """
    work = place(out)
    left = _useful(work)
    if left and not resume and not force:
        raise SkimError(f"{work}: an unfinished run; --resume goes on with it, --force begins anew")
    with locked(work, out):
        recover(real(out))
        if finished(out):  # and killed before it had tidied up
            shutil.rmtree(work / MODEL, ignore_errors=True)
        if not resume:
            empty(work)
        try:
            yield work
        finally:
            if not _useful(work):
                shutil.rmtree(work, ignore_errors=True)


def begin(work: Path, facts: Mapping[str, Any]) -> None:
    """Write down what a run is about; SkimError if the one to resume was about something else."""
    file = work / JOURNAL
    if not file.exists():
        _write(file, facts)
        return
    known = read_json(file)
    now = json.loads(json.dumps(facts))  # tuples become lists, as in the file
    for key in now | known:
        if now.get(key) != known.get(key):
            was, given = (str(x.get(key))[:60] for x in (known, now))
            raise SkimError(
                f"{file}: the run was begun with {key} {was}, now it is {given}; give what it was "
                "begun with, or --force to begin anew"
            )


def finished(out: Path) -> dict[str, Any] | None:
    """The report of a run that was killed after OUT took its name, else None."""
    file = place(out) / REPORT
    if not file.exists() or not out.exists():
        return None
    written = read_json(file)
    return written.get("report") if written.get("folder") == out.stat().st_ino else None


@contextmanager
def model_folder(work: Path, out: Path) -> Iterator[Path]:
    """OUT while it is written; it takes its name when the body succeeds.

    The body writes the report last, by `write_report`.
    """
    (work / REPORT).unlink(missing_ok=True)
    try:
        with whole_folder(real(out), work / MODEL) as folder:
            yield folder
    except BaseException:
        (work / REPORT).unlink(missing_ok=True)
        shutil.rmtree(work / MODEL, ignore_errors=True)
        raise


def write_report(work: Path, report: Mapping[str, Any]) -> None:
    """Say that the model folder is whole."""
    _write(work / REPORT, {"folder": (work / MODEL).stat().st_ino, "report": report})


def keep_seconds(work: Path, seconds: Mapping[str, float]) -> None:
    """Note what every phase has taken, for a process that goes on with the run."""
    _write(work / SECONDS, seconds)


def seconds(work: Path) -> dict[str, float]:
    """What the phases took in the processes that worked on the run before."""
    return read_json(work / SECONDS) if (work / SECONDS).exists() else {}


def _write(file: Path, facts: Mapping[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    part.replace(file)


def empty(work: Path) -> None:
    """Remove all but the lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _useful(work: Path) -> bool:
    known = {Path(name).stem for name in (LOCK, JOURNAL, REPORT, SECONDS)}
    return work.exists() and any(path.stem not in known for path in work.iterdir())
