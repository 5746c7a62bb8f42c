"""The analysis of a model: what every bit budget starts from, computed once and kept on disk.

Per linear [r, c]: H~ (or H) float32 [c, c], F bfloat16 [r, c], the row weights, the k-means
centroids of widths 1..5 and the error curve E[i, b]. Kept under a key of model, text, windows and
version, so that another width of the same model skips calibration. The files are a cache: they can
be deleted any time.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import skimlm
from skimlm import shards
from skimlm.calibrate import statistics
from skimlm.errors import SkimError
from skimlm.weights.fit import analyse
from skimlm.weights.refine import damped

VERSION = 1


@dataclass
class Analysis:
    """What is known about one linear before a width is chosen."""

    hessian: Tensor  # float32 [c, c]
    fisher: Tensor  # bfloat16 [r, c]
    row_weight: Tensor  # float32 [r], mean 1
    centroids: list[Tensor]  # float32 [r, 2^b] for b = 1..5
    errors: Tensor  # float64 [r, 8]


def folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where analyses are kept."""
    return Path(cache_dir or os.environ.get("SKIMLM_CACHE") or user_cache_dir("skimlm"))


class Plan(Protocol):
    """What of a recipe the analysis depends on."""

    @property
    def end_loss(self) -> bool: ...

    @property
    def fisher_windows(self) -> int: ...


def key(source: Path, ids: Tensor, plan: Plan, names: list[str]) -> str:
    """Name of an analysis: changes with model files, token windows, linears and version."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    config = source / "config.json"
    facts = {
        "version": [VERSION, skimlm.__version__],
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "config": config.read_text("utf-8") if config.is_file() else "",
        "tokens": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "shape": list(ids.shape),
        "plan": [plan.end_loss, plan.fisher_windows],
        "linears": names,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def get(
    cache: Path,
    name: str,
    model: nn.Module,
    linears: dict[str, nn.Linear],
    ids: Tensor,
    plan: Plan,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Analysis], bool]:
    """The analysis called `name` and whether it was kept already; else computed and kept."""
    path = cache / f"{name}.safetensors"
    if path.exists():
        try:
            return _read(path, linears), True
        except (SafetensorError, KeyError, ValueError) as error:
            raise SkimError(
                f"{path}: damaged analysis ({error}); delete it and run again"
            ) from None
    collected = statistics(
        model,
        linears,
        ids,
        layerwise=not plan.end_loss,
        fisher_windows=plan.fisher_windows,
        progress=lambda done, total: progress("calibrate", done, total),
    )
    result = {}
    for done, (linear, s) in enumerate(collected.items(), 1):
        h = s.end_hessian if s.hessian is None else s.hessian
        weight = linears[linear].weight.detach().float().cpu()
        # In units of the end loss a row counts by its own gradients, which the mean in H~ hides.
        row_weight = s.row_weight if plan.end_loss else torch.ones(len(weight))
        centroids, errors = analyse(weight, s.fisher, damped(h))
        errors *= row_weight[:, None].double()
        result[linear] = Analysis(h, s.fisher.bfloat16(), row_weight, centroids, errors)
        progress("analyse", done, len(collected))
    _write(path, result)
    return result, False


def nbytes(cache: Path, name: str) -> int:
    """Bytes of a kept analysis."""
    path = cache / f"{name}.safetensors"
    return path.stat().st_size if path.exists() else 0


def entries(cache: Path) -> list[tuple[str, int, float]]:
    """(name, bytes, time of last use) of everything kept, training states included."""
    facts = [(f.stem, f.stat().st_size, f.stat().st_mtime) for f in _files(cache)]
    return sorted(facts, key=lambda entry: entry[2])


def prune(cache: Path) -> int:
    """Delete everything that is kept; the bytes that were freed."""
    freed = 0
    for file in _files(cache):
        freed += file.stat().st_size
        file.unlink()
    return freed


def _files(cache: Path) -> list[Path]:
    return [f for f in cache.glob("*") if f.suffix in (".safetensors", ".state")]


def _write(path: Path, result: dict[str, Analysis]) -> None:
    tensors = {}
    for name, a in result.items():
        tensors[f"{name}.hessian"] = a.hessian
        tensors[f"{name}.fisher"] = a.fisher
        tensors[f"{name}.row_weight"] = a.row_weight
        tensors[f"{name}.centroids"] = torch.cat(a.centroids, dim=1)
        tensors[f"{name}.errors"] = a.errors
    try:
        shards.write_file(path, tensors, {})
    except SkimError as error:
        raise SkimError(f"{error}; choose another --cache-dir") from None


def _read(path: Path, linears: dict[str, nn.Linear]) -> dict[str, Analysis]:
    result = {}
    with safe_open(path, framework="pt") as file:
        for name, linear in linears.items():
            r, c = linear.weight.shape
            part = {
                k: file.get_tensor(f"{name}.{k}")
                for k in ("hessian", "fisher", "row_weight", "errors")
            }
            if part["hessian"].shape != (c, c) or part["fisher"].shape != (r, c):
                raise ValueError(f"{name} has another shape")
            centroids = list(file.get_tensor(f"{name}.centroids").split([2, 4, 8, 16, 32], dim=1))
            result[name] = Analysis(**part, centroids=centroids)
    os.utime(path)
    return result
