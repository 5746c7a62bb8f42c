"""The analysis of a model: what every bit budget starts from, computed once and kept on disk.

Per linear [r, c]: H~ damped (or H as it is) float32 [c, c], F bfloat16 [r, c], the row weights, the
k-means centroids of 1..5 bits, tables of trellises and the error curve E[i, width], in a file of
its own; a folder of them is kept under a key of model, text, windows and version, so that another
width of the same model skips calibration. It is read a linear at a time: no more than one needs to
be in memory. The files are a cache: they can be deleted any time.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import skimlm
from skimlm.errors import SkimError, first_line
from skimlm.format.row_codes import WINDOWS
from skimlm.pipeline.calibrate import Statistics
from skimlm.quantize.fit import analyse
from skimlm.quantize.refine import damped
from skimlm.storage.safetensors import write_file

VERSION = 7
PARTS = ("hessian", "fisher", "row_weight", "centroids", "tables", "scales", "errors")
SUMS = "tables"  # the file beside those of the linears
EDGES = 1024  # of k-means on rows of over 2048: within 5e-4 of the optimum, 5 times as fast


@dataclass
class Analysis:
    """What is known about one linear before a width is chosen."""

    hessian: Tensor  # float32 [c, c], positive definite but for the published method
    fisher: Tensor  # bfloat16 [r, c]
    row_weight: Tensor  # float32 [r], mean 1
    centroids: list[Tensor]  # float32 [r, 2^b] for b = 1..5
    tables: Tensor  # of trellises, float32 [widths, 128]
    scales: Tensor  # of trellis rows, float32 [r, widths]
    errors: Tensor  # float64 [r, widths]
    tokens: int  # that calibration gave it


def folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where analyses are kept."""
    return Path(cache_dir or os.environ.get("SKIMLM_CACHE") or user_cache_dir("skimlm"))


def files(source: Path) -> list[list[Any]]:
    """Name, size and time of every file of weights: what tells that a model has changed."""
    found = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in found]


class Plan(Protocol):
    """What of a recipe the analysis depends on."""

    @property
    def end_loss(self) -> bool: ...

    @property
    def fisher_windows(self) -> int: ...


def key(source: Path, ids: Tensor, plan: Plan, names: list[str]) -> str:
    """Name of an analysis: changes with model files, token windows, linears and version."""
    config = source / "config.json"
    facts = {
        "version": [VERSION, skimlm.__version__],
        "files": files(source),
        "config": config.read_text("utf-8") if config.is_file() else "",
        "tokens": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "shape": list(ids.shape),
        "plan": [plan.end_loss, plan.fisher_windows],
        "linears": names,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class Stored(Mapping[str, Analysis]):
    """The analyses of linears, each read from its file in `place` when it is asked for."""

    def __init__(self, place: Path, linears: Mapping[str, nn.Linear]) -> None:
        self.place = place
        self.shapes = {name: tuple(m.weight.shape) for name, m in linears.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Analysis:
        if name not in self.shapes:
            raise KeyError(name)
        parts = self._read(name, PARTS)
        centroids = list(parts.pop("centroids").split([2, 4, 8, 16, 32], dim=1))
        return Analysis(**parts, centroids=centroids, tokens=self.tokens(name))

    def errors(self, name: str) -> Tensor:
        """The error curve of a linear alone."""
        return self._read(name, ("errors",))["errors"]

    def tokens(self, name: str) -> int:
        """How many tokens of the calibration came to a linear."""
        with self._open(name) as file:
            return int((file.metadata() or {}).get("tokens", ""))

    def missing(self) -> list[str]:
        """Linears that have no file."""
        return [name for name in self if not self._file(name).exists()]

    @property
    def has_sums(self) -> bool:
        """Whether what embedding and head need is there."""
        return self._file(SUMS).exists()

    def sums(self) -> dict[str, Tensor]:
        """What was summed for embedding and head."""
        with self._open(SUMS) as file:
            return {part: file.get_tensor(part) for part in file.keys()}

    def keep_sums(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what was summed for embedding and head (tables.py)."""
        self._write(SUMS, tensors, {})

    def keep(self, name: str, analysis: Analysis) -> None:
        """Write the file of a linear, whole or not at all."""
        tensors = {
            "hessian": analysis.hessian,
            "fisher": analysis.fisher,
            "row_weight": analysis.row_weight,
            "centroids": torch.cat(analysis.centroids, dim=1),
            "tables": analysis.tables,
            "scales": analysis.scales,
            "errors": analysis.errors,
        }
        self._write(name, tensors, {"tokens": str(analysis.tokens)})

    def _write(self, name: str, tensors: Mapping[str, Tensor], facts: dict[str, str]) -> None:
        try:
            write_file(self._file(name), dict(tensors), facts)
        except SkimError as error:
            raise SkimError(f"{error}; choose another --cache-dir") from None

    def _file(self, name: str) -> Path:
        return self.place / f"{name}.safetensors"

    def _read(self, name: str, parts: Iterable[str]) -> dict[str, Tensor]:
        r, c = self.shapes[name]
        want: dict[str, tuple[int | None, ...]] = {"hessian": (c, c), "fisher": (r, c)}
        want |= {"row_weight": (r,), "centroids": (r, 62)}
        want |= {"tables": (None, WINDOWS), "scales": (r, None), "errors": (r, None)}
        with self._open(name) as file:
            found = {part: file.get_tensor(part) for part in parts}
            for part, tensor in found.items():
                shape = tuple(
                    n if n is None else m for n, m in zip(want[part], tensor.shape, strict=False)
                )
                if len(tensor.shape) != len(want[part]) or shape != want[part]:
                    raise ValueError(f"{part} has another shape")
        return found

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self._file(name)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, ValueError) as error:
            what = first_line(error)
            raise SkimError(
                f"{path}: damaged analysis ({what}); delete its folder and run again"
            ) from None


def stored(cache: Path, name: str, linears: Mapping[str, nn.Linear]) -> Stored:
    """The analysis called `name` in the cache, of which files may be missing."""
    place = cache / name
    if place.exists():
        os.utime(place)
    return Stored(place, linears)


def missing(cache: Path, name: str, linears: Mapping[str, nn.Linear]) -> list[str]:
    """Linears that the analysis called `name` does not have."""
    return Stored(cache / name, linears).missing()


def of(weight: Tensor, s: Statistics, end_loss: bool) -> Analysis:
    """The analysis of a linear from its statistics."""
    weight = weight.float()
    # H~ is noisier than a Gram matrix of as many tokens; the published method uses H as it is
    h = damped(s.end_hessian) if s.hessian is None else s.hessian
    # In units of the end loss a row counts by its own gradients, which the mean in H~ hides.
    row_weight = s.row_weight if end_loss else torch.ones(len(weight))
    curve = analyse(weight, s.fisher, h, EDGES if end_loss else 0, trellises=end_loss)
    errors = curve.errors * row_weight[:, None].double()
    start = curve.centroids, curve.tables, curve.scales
    return Analysis(h, s.fisher.bfloat16(), row_weight, *start, errors, s.tokens)


def nbytes(cache: Path, name: str) -> int:
    """Bytes of a kept analysis."""
    return _size(cache / name)


def entries(cache: Path) -> list[tuple[str, int, float]]:
    """(name, bytes, time of last use) of everything kept, training states included."""
    facts = [(f.stem, _size(f), f.stat().st_mtime) for f in _kept(cache)]
    return sorted(facts, key=lambda entry: entry[2])


def prune(cache: Path) -> int:
    """Delete everything that is kept; the bytes that were freed."""
    freed = 0
    for path in _kept(cache):
        freed += _size(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files)


def _kept(cache: Path) -> list[Path]:
    """Folders named by a key, training states, and what version 1 kept in single files."""
    files = [f for f in cache.glob("*") if f.suffix in (".safetensors", ".state")]
    return files + [f for f in cache.glob("*") if re.fullmatch("[0-9a-f]{32}", f.name)]
