"""A model in, a compressed folder out: calibrate -> analyse -> allocate -> fit -> (train) -> write.

    recipe   statistics      pool    scaling vector          refinement   end-loss training
    paper    F and H         layer   one step, stored        none         none      SKIM as
    published fast     F and H~        model   in the norms, no bits   yes          none
    best     F and H~        model   in the norms, no bits   yes          codebooks and norm weights

The walk goes over the linears in the order of the blocks and keeps plain values per linear:
statistics, curve, fit, quantized weight. What a new width needs again (statistics, centroids,
error curves) goes to the analysis cache, so that a second budget for the same model and text needs
no calibration.
"""

import dataclasses
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import skimlm
from skimlm import analysis, checkpoint, fold
from skimlm.calibrate import default_text, read_documents, windows
from skimlm.errors import SkimError
from skimlm.weights import fit as fitting
from skimlm.weights.allocate import allocate
from skimlm.weights.fit import WIDTHS, Fit
from skimlm.weights.pack import row_bits
from skimlm.weights.refine import damped
from skimlm.weights.scale import normalise, scale_step, scaled_error
from skimlm.weights.train import train

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """What is done, and how much of it; windows are for the statistics, steps for the training."""

    samples: int = 128
    seq_len: int = 512
    end_loss: bool = True  # H~ and one pool over the model; False: H and a pool per linear
    fold_scale: bool = True
    rounds: int = 3
    sweeps: int = 3
    steps: int = 0


RECIPES = {
    "paper": Recipe(end_loss=False, fold_scale=False, rounds=0, sweeps=0),
    "fast": Recipe(samples=80, rounds=2),
    "best": Recipe(steps=96),
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
    text: str
    windows: int
    seq_len: int
    cached: bool
    held_out_kl: list[float]  # nats per token along the training, empty without
    seconds: dict[str, float]
    peak_rss_bytes: int

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
    if method != "skim" or recipe not in RECIPES:
        raise SkimError(f"method must be skim and recipe one of {', '.join(RECIPES)}")
    if embed_bits not in (4, 8, 16):
        raise SkimError(f"embed bits must be 16, 8 or 4, got {embed_bits}")
    if not 1.5 <= bits <= 8:
        raise SkimError(f"bits must be 1.5 to 8, got {bits}")
    progress = progress or (lambda *_: None)
    checkpoint.check_out(out, force)
    plan = RECIPES[recipe]
    plan = dataclasses.replace(
        plan, samples=samples or plan.samples, seq_len=seq_len or plan.seq_len
    )
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
    provenance = {
        "skimlm": skimlm.__version__,
        "method": method,
        "recipe": recipe,
        "target": {"size": size}
        if size
        else {"index_bits": index_bits}
        if index_bits
        else {"bits": bits},
        "calibration": {
            "text": Path(origin).name,
            "windows": len(ids),
            "seq_len": ids.shape[1],
            "seed": seed,
        },
    }
    costs = {
        n: np.array([row_bits(b, m.in_features) for b in WIDTHS], float) for n, m in linears.items()
    }
    total = sum(m.weight.numel() for m in linears.values())
    overhead = 0 if plan.fold_scale else sum(16 * m.in_features for m in linears.values())

    def planned_bytes(widths: Mapping[str, Tensor], stored_bits: float) -> int:
        counts = {n: checkpoint.histogram(w) for n, w in widths.items()}
        others = checkpoint.plan_bytes(
            model,
            tokenizer,
            embed_bits,
            counts,
            in_scale=not plan.fold_scale,
            bits=stored_bits / total,
            provenance=provenance,
        )
        return others + round(stored_bits / 8)

    budget = float("inf") if index_bits else bits * total - overhead
    if size is not None and not index_bits:
        budget = _budget_for_size(size, linears, costs, overhead, planned_bytes)
    least = sum(costs[n][0] * m.out_features for n, m in linears.items())
    if budget < least:
        raise SkimError(
            f"{bits} bits per weight is below what codebooks and bookkeeping allow here: "
            f"at least {(least + overhead) / total:.3f}"
        )

    with clock("analyse"):
        cache = analysis.folder(cache_dir)
        key = analysis.key(opened.path, ids, plan.end_loss, sorted(linears))
        stored, cached = analysis.get(cache, key, model, linears, ids, plan.end_loss, progress)
    with clock("allocate"):
        widths = _widths(stored, costs, linears, budget, index_bits, pooled=plan.end_loss)
        if size is not None and not index_bits:
            widths = _shrink_to_size(
                size, budget, stored, costs, linears, overhead, planned_bytes, plan.end_loss
            )
    achieved = _stored_bits(widths, costs) + overhead
    if dry_run:
        return _report(
            out,
            method,
            recipe,
            achieved / total,
            planned_bytes(widths, achieved),
            linears,
            widths,
            origin,
            ids,
            cached,
            [],
            clock,
        )
    with clock("fit"):
        groups = fold.foldable(model, linears, ids[:1, :64]) if plan.fold_scale else {}
        fits = fit_all(linears, stored, widths, plan, groups, progress)
    norms: dict[str, Tensor] = {}
    losses: list[float] = []
    if plan.steps:
        with clock("train"):
            norms, losses = train(
                model,
                linears,
                fits,
                ids,
                steps=plan.steps,
                progress=lambda done, all_, _loss: progress("train", done, all_),
            )
    with clock("write"):
        settle = None if plan.rounds == 0 or plan.steps else stored
        quantized = {
            name: fitting.finish(
                linears[name].weight.detach().float(),
                damped(settle[name].hessian) if settle else None,
                fit,
            )
            for name, fit in fits.items()
        }
        with torch.no_grad():
            for name, weight in norms.items():
                model.get_parameter(name).copy_(weight)
            for norm_name, readers in groups.items():
                norm, s = model.get_submodule(norm_name), fits[readers[0]].in_scale
                if s is not None:
                    norm.weight.copy_(fold.scaled_norm(model, norm, s))
                for name in readers:
                    quantized[name] = dataclasses.replace(quantized[name], in_scale=None)
        checkpoint.save(
            out,
            model,
            tokenizer,
            quantized,
            embed_bits=embed_bits,
            bits=achieved / total,
            provenance=provenance,
            force=force,
        )
    return _report(
        out,
        method,
        recipe,
        achieved / total,
        checkpoint.folder_bytes(out),
        linears,
        widths,
        origin,
        ids,
        cached,
        losses,
        clock,
    )


def fit_all(
    linears: dict[str, nn.Linear],
    stored: Mapping[str, analysis.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    groups: Mapping[str, list[str]],
    progress: Progress,
) -> dict[str, Fit]:
    """Codebooks and codes of every linear at its widths, scaled and refined as the plan says."""
    fits: dict[str, Fit] = {}
    together = list(groups.values())
    grouped = {name for names in together for name in names}
    together += [[name] for name in linears if name not in grouped]
    done = 0
    for names in sorted(together, key=lambda names: list(linears).index(names[0])):
        weights = {n: linears[n].weight.detach().float().cpu() for n in names}
        hessians = {n: damped(stored[n].hessian) for n in names}
        for n in names:
            fits[n] = fitting.start(
                weights[n], stored[n].fisher.float(), widths[n], stored[n].centroids
            )
        if not plan.fold_scale:
            for n in names:
                fits[n] = _published_scale(weights[n], hessians[n], stored[n], widths[n], fits[n])
        elif len(names) and names[0] in grouped:
            for n in names:
                fitting.refine_fit(weights[n], hessians[n], fits[n], 1, plan.sweeps)
            _common_scale(weights, hessians, stored, {n: fits[n] for n in names})
            for n in names:
                fitting.refine_fit(weights[n], hessians[n], fits[n], plan.rounds - 1, plan.sweeps)
        else:
            for n in names:
                fitting.refine_fit(weights[n], hessians[n], fits[n], plan.rounds, plan.sweeps)
        done += len(names)
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
    f = stats.fisher.float()
    scaled = w / s
    again = fitting.start(scaled, f * s * s, widths, fitting.kmeans_rows(scaled, f * s * s, 5)[0])
    before = scaled_error(w, v, h, weight, ones)
    after = scaled_error(w, again.dense(), h, weight, s)
    best, fit.in_scale, again.in_scale = (again if after < before else fit), ones, s
    return best


def _common_scale(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    stored: Mapping[str, analysis.Analysis],
    fits: Mapping[str, Fit],
) -> None:
    """One scaling vector for linears that read the same input; the error cannot rise."""
    names = list(fits)
    values = {n: fits[n].dense() for n in names}
    ones = torch.ones(weights[names[0]].shape[1])
    s = normalise(
        scale_step(
            [weights[n] for n in names],
            [values[n] for n in names],
            [hessians[n] for n in names],
            [stored[n].row_weight for n in names],
            ones,
        )
    )
    before = sum(
        scaled_error(weights[n], values[n], hessians[n], stored[n].row_weight, ones) for n in names
    )
    after = sum(
        scaled_error(weights[n], values[n], hessians[n], stored[n].row_weight, s) for n in names
    )
    if not after < before:
        s = ones
    for n in names:
        fits[n].in_scale = s


def _widths(
    stored: Mapping[str, analysis.Analysis],
    costs: Mapping[str, np.ndarray],
    linears: Mapping[str, nn.Linear],
    budget: float,
    index_bits: int | None,
    pooled: bool,
) -> dict[str, Tensor]:
    """Bits of every row of every linear, uint8 [r]."""
    if index_bits:
        return {
            n: torch.full((m.out_features,), index_bits, dtype=torch.uint8)
            for n, m in linears.items()
        }
    errors = {n: stored[n].errors.double().numpy() for n in linears}
    prices = {n: np.broadcast_to(costs[n], errors[n].shape) for n in linears}
    if not pooled:
        total = sum(m.weight.numel() for m in linears.values())
        return {
            n: _as_widths(allocate(errors[n], prices[n], budget * m.weight.numel() / total))
            for n, m in linears.items()
        }
    choice = _as_widths(
        allocate(
            np.concatenate(list(errors.values())), np.concatenate(list(prices.values())), budget
        )
    )
    return dict(zip(linears, choice.split([m.out_features for m in linears.values()]), strict=True))


def _as_widths(choice: np.ndarray) -> Tensor:
    return torch.from_numpy(choice + 1).to(torch.uint8)


def _stored_bits(widths: Mapping[str, Tensor], costs: Mapping[str, np.ndarray]) -> float:
    return float(sum(costs[n][w.numpy().astype(int) - 1].sum() for n, w in widths.items()))


def _budget_for_size(size: int, linears, costs, overhead, planned_bytes) -> float:
    """Bits for the linears that make the folder `size` bytes, about; see _shrink_to_size."""
    reach = {}
    for b in (1, 8):
        widths = {
            n: torch.full((m.out_features,), b, dtype=torch.uint8) for n, m in linears.items()
        }
        reach[b] = planned_bytes(widths, _stored_bits(widths, costs) + overhead)
    if not reach[1] <= size:
        raise SkimError(
            f"{size:,} bytes cannot be reached: the folder takes {reach[1]:,} bytes at 1 bit and "
            f"{reach[8]:,} at 8; --embed-bits 4 makes it smaller"
        )
    widths = {n: torch.full((m.out_features,), 3, dtype=torch.uint8) for n, m in linears.items()}
    stored = _stored_bits(widths, costs) + overhead
    others = planned_bytes(widths, stored) - stored / 8
    return (size - others) * 8 - overhead


def _shrink_to_size(
    size, budget, stored, costs, linears, overhead, planned_bytes, pooled
) -> dict[str, Tensor]:
    """Widths whose folder is at most `size`, headers and the histograms in config.json included."""
    for _ in range(8):
        widths = _widths(stored, costs, linears, budget, None, pooled)
        excess = planned_bytes(widths, _stored_bits(widths, costs) + overhead) - size
        if excess <= 0:
            return widths
        budget -= 8 * excess
    raise SkimError(f"{size:,} bytes cannot be met exactly; ask for a little more")


class Clock:
    """Seconds per phase, in the order they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)


def _report(
    out, method, recipe, bits, nbytes, linears, widths, origin, ids, cached, losses, clock
) -> Report:
    counts = torch.bincount(torch.cat(list(widths.values())).long(), minlength=9).tolist()
    return Report(
        out=str(out),
        method=method,
        recipe=recipe,
        bits_per_weight=bits,
        bytes=nbytes,
        linears=len(linears),
        weights=sum(m.weight.numel() for m in linears.values()),
        rows_by_width={b: n for b, n in enumerate(counts) if n},
        text=origin,
        windows=len(ids),
        seq_len=ids.shape[1],
        cached=cached,
        held_out_kl=losses,
        seconds=clock.seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
