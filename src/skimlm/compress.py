"""A model in, a compressed folder out: calibrate -> analyse -> allocate -> fit -> (train) -> write.

    recipe   statistics   bit pool    scaling vector   refinement   end-loss training
    paper    F and H      per linear  one step         none         none   (as published)
    fast     F and H~     the model   none             yes          none
    best     F and H~     the model   none             yes          codebooks, norm weights

The walk goes over the linears in the order of the blocks and keeps plain values per linear:
statistics, curve, fit, quantized weight. What a new width needs again (statistics, centroids,
error curves) goes to the analysis cache, so that a second budget for the same model and text needs
no calibration.
"""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import skimlm
from skimlm import analysis, budget, checkpoint
from skimlm.calibrate import default_text, read_documents, windows
from skimlm.errors import SkimError
from skimlm.report import peak_rss_bytes
from skimlm.weights import fit as fitting
from skimlm.weights.fit import WIDTHS, Fit
from skimlm.weights.kmeans import kmeans_rows
from skimlm.weights.pack import MAX_TABLE_WIDTH, QuantizedWeight, histogram
from skimlm.weights.refine import damped
from skimlm.weights.scale import normalise, scale_step, scaled_error
from skimlm.weights.train import train

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """What is done, and how much of it; windows are for the statistics, steps for the training."""

    samples: int = 128
    seq_len: int = 512
    fisher_windows: int = 64  # of the samples
    end_loss: bool = True  # H~ and one pool over the model; False: H and a pool per linear
    scale: bool = False  # after refinement it gained 0.3 % of the error, less than its bits cost
    rounds: int = 2
    sweeps: int = 3
    steps: int = 0


RECIPES = {
    "paper": Recipe(end_loss=False, scale=True, rounds=0, sweeps=0),
    "fast": Recipe(samples=40, fisher_windows=16),
    "best": Recipe(steps=64),
}


@dataclass
class Report:
    """What a run did and what it cost."""

    out: str
    method: str
    recipe: str
    bits_per_weight: float  # everything stored of the compressed linears, over their weights
    bytes: int  # of the whole folder; planned, for a dry run
    linears: int
    weights: int
    rows_by_width: dict[int, int]
    calibration: dict[str, Any]
    analysis_kept: bool  # no calibration was needed: the analysis was there from another run
    analysis_bytes: int  # what it takes in the cache; `skimlm cache --prune` frees it
    seconds: dict[str, float]  # per phase
    held_out_kl: list[float] = field(default_factory=list)  # nats per token along the training
    peak_rss_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)


def compress(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "skim",
    recipe: str = "best",
    bits: float = 3.2,
    size: int | None = None,
    index_bits: int | None = None,
    text: str | os.PathLike[str] | None = None,
    text_key: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    embed_bits: int = 8,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    force: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress a model to `bits` per weight all-in, to `size` bytes on disk, or to a fixed width.

    Raises SkimError for everything a user can get wrong; OUT is whole or absent.
    """
    plan = _checked(method, recipe, bits, index_bits, embed_bits, samples, seq_len)
    progress = progress or (lambda *_: None)
    checkpoint.check_out(out, force)
    if Path(source).exists() and Path(source).resolve() == Path(out).resolve():
        raise SkimError(f"{out}: is the model itself; name another folder")
    clock = Clock()
    with clock("load"):
        documents = default_text() if text is None else read_documents(text, text_key)
        opened = checkpoint.open_checkpoint(source, revision=revision)
        if opened.compressed:
            raise SkimError(f"{source}: is compressed already; give the original model")
        model, tokenizer = checkpoint.load(opened)
        linears = checkpoint.linears(model, include, exclude)
        origin = "the built-in text" if text is None else str(text)
        ids = windows(documents, tokenizer, plan.samples, plan.seq_len, seed, origin)
        if plan.steps and len(ids) < 2:
            raise SkimError(f"{origin}: one window is too little to train on; give more text")
    calibration = {
        "text": Path(origin).name,
        "windows": len(ids),
        "seq_len": ids.shape[1],
        "seed": seed,
    }
    provenance: dict[str, Any] = {"skimlm": skimlm.__version__, "method": method, "recipe": recipe}
    provenance["calibration"] = calibration
    price = budget.prices(linears, plan.scale)
    target = budget.Target(bits, size, index_bits)

    def planned_bytes(widths: budget.Widths) -> int:
        """Bytes of OUT with these widths, every file counted."""
        others = checkpoint.plan_bytes(
            model,
            tokenizer,
            embed_bits,
            {n: histogram(w) for n, w in widths.items()},
            in_scale=plan.scale,
            bits=price.bits(widths) / price.total,
            provenance=provenance,
        )
        return others + round(price.bits(widths) / 8)

    budget.check(target, linears, price, planned_bytes)
    with clock("analyse"):
        cache = analysis.folder(cache_dir)
        key = analysis.key(opened.path, ids, plan, sorted(linears))
        stored, cached = analysis.get(cache, key, model, linears, ids, plan, progress)
    with clock("allocate"):
        errors = {n: stored[n].errors for n in linears}
        widths = budget.choose(target, errors, linears, price, plan.end_loss, planned_bytes)
    report = Report(
        out=str(out),
        method=method,
        recipe=recipe,
        bits_per_weight=price.bits(widths) / price.total,
        bytes=planned_bytes(widths) if dry_run else 0,
        linears=len(linears),
        weights=price.total,
        rows_by_width=histogram(torch.cat(list(widths.values()))),
        calibration=calibration,
        analysis_kept=cached,
        analysis_bytes=analysis.nbytes(cache, key),
        seconds=clock.seconds,
    )
    if not dry_run:
        # A run that was interrupted during the training finds its state here and goes on.
        state = cache / f"{key}-{_digest(widths)}.state"
        quantized, report.held_out_kl = quantize(
            model, linears, stored, widths, plan, ids, progress, clock, state
        )
        with clock("write"):
            checkpoint.save(
                out,
                model,
                tokenizer,
                quantized,
                embed_bits=embed_bits,
                bits=report.bits_per_weight,
                provenance=provenance,
                force=force,
            )
        state.unlink(missing_ok=True)
        report.bytes = checkpoint.folder_bytes(out)
    report.peak_rss_bytes = peak_rss_bytes()
    return report


def _checked(
    method: str,
    recipe: str,
    bits: float,
    index_bits: int | None,
    embed_bits: int,
    samples: int | None,
    seq_len: int | None,
) -> Recipe:
    """The recipe with the user's numbers in it; SkimError for what is not allowed."""
    if method != "skim":
        raise SkimError(f"method must be skim, got {method!r}")
    if recipe not in RECIPES:
        raise SkimError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if embed_bits not in (4, 8, 16):
        raise SkimError(f"embed bits must be 16, 8 or 4, got {embed_bits}")
    if not 1.5 <= bits <= 8:
        raise SkimError(f"bits must be 1.5 to 8, got {bits}")
    if index_bits is not None and index_bits not in WIDTHS:
        raise SkimError(f"index bits must be 1 to 8, got {index_bits}")
    plan = RECIPES[recipe]
    least = 2 if plan.steps else 1
    if samples is not None and samples < least:
        raise SkimError(f"samples must be at least {least} windows, got {samples}")
    if seq_len is not None and seq_len < 2:
        raise SkimError(f"seq-len must be at least 2, got {seq_len}")
    return dataclasses.replace(
        plan, samples=samples or plan.samples, seq_len=seq_len or plan.seq_len
    )


def quantize(
    model: Any,
    linears: dict[str, nn.Linear],
    stored: Mapping[str, analysis.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    ids: Tensor,
    progress: Progress,
    clock: "Clock",
    state_file: Path | None = None,
    teacher: dict[int, Tensor] | None = None,
) -> tuple[dict[str, QuantizedWeight], list[float]]:
    """Fit every linear at its widths, train if the plan says so, and round to what is stored.

    Trained norm weights are put into `model`; its linears are left alone. Also returns the held-out
    losses of the training. For `state_file` and `teacher` see `weights.train.train`.
    """
    with clock("fit"):
        fits = fit_all(linears, stored, widths, plan, progress)
    losses: list[float] = []
    if plan.steps:
        with clock("train"):
            norms, losses = train(
                model,
                linears,
                fits,
                ids,
                steps=plan.steps,
                state_file=state_file,
                teacher=teacher,
                progress=lambda done, total, _loss: progress("train", done, total),
            )
            with torch.no_grad():
                for name, weight in norms.items():
                    model.get_parameter(name).copy_(weight)
    with clock("round"):
        quantized = {}
        for name, fit in fits.items():
            # Trained codebooks answer to the end loss: their codes are not refined again.
            settle = plan.rounds and not plan.steps
            w = linears[name].weight.detach().float().cpu()
            quantized[name] = fitting.finish(
                w, damped(stored[name].hessian) if settle else None, fit
            )
    return quantized, losses


def fit_all(
    linears: dict[str, nn.Linear],
    stored: Mapping[str, analysis.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    progress: Progress,
) -> dict[str, Fit]:
    """Codebooks and codes of every linear at its widths, scaled or refined as the plan says."""
    fits: dict[str, Fit] = {}
    for done, (name, linear) in enumerate(linears.items(), 1):
        known = stored[name]
        w = linear.weight.detach().float().cpu()
        h = damped(known.hessian)
        fit = fitting.start(w, known.fisher.float(), widths[name], known.centroids)
        if plan.scale:
            fit = _published_scale(w, h, known, widths[name], fit)
        if plan.rounds:
            fitting.refine_fit(w, h, fit, plan.rounds, plan.sweeps)
        fits[name] = fit
        progress("fit", done, len(linears))
    return fits


def _published_scale(
    w: Tensor, h: Tensor, stats: analysis.Analysis, widths: Tensor, fit: Fit
) -> Fit:
    """One iteration of SKIM's scale step and re-clustering, kept only if the full error falls."""
    ones = torch.ones(w.shape[1])
    weight = stats.row_weight
    v = fit.dense()
    s = normalise(scale_step([w], [v], [h], [weight], ones))
    f = stats.fisher.float() * s * s
    scaled = w / s
    again = fitting.start(scaled, f, widths, kmeans_rows(scaled, f, MAX_TABLE_WIDTH)[0])
    before = scaled_error(w, v, h, weight, ones)
    after = scaled_error(w, again.dense(), h, weight, s)
    best, fit.in_scale, again.in_scale = (again if after < before else fit), ones, s
    return best


def _digest(widths: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(torch.cat(list(widths.values())).numpy().tobytes()).hexdigest()[:16]


class Clock:
    """Seconds per phase, in the order they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)
