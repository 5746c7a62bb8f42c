"""A model in, a compressed folder out: calibrate -> analyse -> allocate -> fit -> (train) -> write.

    skim     statistics   bit pool    scaling vector   refinement   end-loss training
    paper    F and H      per linear  one step         none         none   (as published)
    fast     F and H~     the model   none             yes          none
    best     F and H~     the model   none             yes          codebooks, norm weights

    slim     of a linear                               inputs from the compressed blocks before
    paper    mask, grid, adapter in one pass           of the block as it was   (as published)
    fast     all that is stored jointly, codebooks     of the block as it was
    best     the same, more turns                      of the block so far; original outputs

skim goes over the linears with plain values: statistics, curve, fit, quantized weight. What a
new width needs again (statistics, centroids, error curves) goes to the analysis cache, so that a
second budget for the same model and text needs no calibration. With sparsity or adapters its rows
lose and gain those first, and what they cost is paid from the same bits. slim goes block by block
(blockwise.py): every block is fitted to what the compressed ones before it give it.
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
from skimlm import analysis, blockwise, budget, checkpoint
from skimlm.calibrate import default_text, read_documents, windows
from skimlm.errors import SkimError
from skimlm.recipes import METHODS, RECIPES, Recipe, fit_linear, settled
from skimlm.report import peak_rss_bytes
from skimlm.weights import slim
from skimlm.weights.fit import WIDTHS, Fit
from skimlm.weights.kmeans import kmeans_rows
from skimlm.weights.mask import Sparsity
from skimlm.weights.pack import (
    MAX_TABLE_WIDTH,
    MAX_WIDTH,
    Parts,
    QuantizedWeight,
    effective,
    histogram,
)
from skimlm.weights.train import train

Progress = Callable[[str, int, int], None]


SHRINK = 0.3  # of H~ towards its diagonal: it is noisier than a Gram matrix of as many tokens


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
    bits: float | None = None,
    size: int | None = None,
    index_bits: int | None = None,
    sparsity: str | None = None,
    rank: float | None = None,
    adapter_bits: int | None = None,
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

    With the method slim `bits` (4) is the width of the weights that stay. `sparsity` ("none",
    "2:4", "0.5") and `rank` (0) of adapters in `adapter_bits` (4, 16) are for both methods; slim's
    defaults are 2:4 and 0.1. Raises SkimError for everything a user can get wrong; OUT is whole or
    absent.
    """
    bits = (4.0 if method == "slim" else 3.2) if bits is None else bits
    plan = _checked(method, recipe, bits, index_bits, embed_bits, samples, seq_len)
    options = _options(method, recipe, plan, bits, index_bits, size, sparsity, rank, adapter_bits)
    progress = progress or (lambda *_: None)
    checkpoint.check_out(out, force)
    if Path(source).exists() and Path(source).resolve() == Path(out).resolve():
        raise SkimError(f"{out}: is the model itself; name another folder")
    clock = Clock()
    with clock("load"):
        given = _load(source, plan, revision, include, exclude, text, text_key, seed)
    model, linears = given.model, given.linears
    parts = parts_of(linears, options)
    price = budget.prices(linears, plan.scale, parts)
    provenance = _provenance(method, recipe, options, given.calibration)

    def planned_bytes(widths: budget.Widths) -> int:
        """Bytes of OUT with these widths, every file counted."""
        others = checkpoint.plan_bytes(
            model,
            given.tokenizer,
            embed_bits,
            {n: histogram(w) for n, w in widths.items()},
            in_scale=plan.scale,
            parts=parts,
            bits=price.bits(widths) / price.total,
            provenance=provenance,
        )
        return others + round(price.bits(widths) / 8)

    cache, key, cached = analysis.folder(cache_dir), "", False
    stored: dict[str, analysis.Analysis] = {}
    first: dict[str, QuantizedWeight] = {}
    if method == "slim":
        widths = budget.uniform(linears, round(bits))
    else:
        target = budget.Target(bits, size, index_bits)
        budget.check(target, linears, price, planned_bytes)
        with clock("analyse"):
            key = analysis.key(given.path, given.ids, plan, sorted(linears))
            stored, cached = analysis.get(cache, key, model, linears, given.ids, plan, progress)
            errors = {n: stored[n].errors for n in linears}
            if options is not None:
                first, errors = decompose(linears, stored, options, progress)
        with clock("allocate"):
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
        calibration=given.calibration,
        analysis_kept=cached,
        analysis_bytes=analysis.nbytes(cache, key) if key else 0,
        seconds=clock.seconds,
    )
    if not dry_run:
        # A run that was interrupted during the training finds its state here and goes on.
        state = cache / f"{key}-{_digest(widths)}.state"
        if options is None:
            quantized, report.held_out_kl = quantize(
                model, linears, stored, widths, plan, given.ids, progress, clock, state
            )
        else:
            with clock("fit"):
                quantized = (
                    fit_blocks(model, linears, given.ids, recipe, plan, options, progress)
                    if method == "slim"
                    else compose(linears, stored, widths, options, first, progress)
                )
        with clock("write"):
            checkpoint.save(
                out,
                model,
                given.tokenizer,
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


@dataclass(frozen=True)
class Given:
    """What there is to work on: the model, its linears, the calibration windows."""

    path: Path
    model: Any
    tokenizer: Any
    linears: dict[str, nn.Linear]
    ids: Tensor  # [windows, tokens]
    calibration: dict[str, Any]  # how the windows came about, for the provenance


def _load(
    source: str | os.PathLike[str],
    plan: Recipe,
    revision: str | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    text: str | os.PathLike[str] | None,
    text_key: str | None,
    seed: int,
) -> Given:
    """Read model and text; SkimError for a model that is compressed and for too little text."""
    documents = default_text() if text is None else read_documents(text, text_key)
    opened = checkpoint.open_checkpoint(source, revision=revision)
    if opened.compressed:
        raise SkimError(f"{source}: is compressed already; give the original model")
    model, tokenizer = checkpoint.load(opened)
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
    linears = checkpoint.linears(model, include, exclude)
    return Given(opened.path, model, tokenizer, linears, ids, calibration)


def _provenance(
    method: str, recipe: str, options: slim.Options | None, calibration: dict[str, Any]
) -> dict[str, Any]:
    """How the folder was made, for its config.json."""
    facts: dict[str, Any] = {"skimlm": skimlm.__version__, "method": method, "recipe": recipe}
    if options is not None:
        facts |= {"sparsity": str(options.sparsity or "none"), "rank": options.rank}
        facts |= {"adapter_bits": options.adapter_bits} if options.rank else {}
    return facts | {"calibration": calibration}


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
    if method not in METHODS:
        raise SkimError(f"method must be {' or '.join(METHODS)}, got {method!r}")
    if recipe not in RECIPES:
        raise SkimError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if embed_bits not in (4, 8, 16):
        raise SkimError(f"embed bits must be 16, 8 or 4, got {embed_bits}")
    if not 1.5 <= bits <= 8:
        raise SkimError(f"bits must be 1.5 to 8, got {bits}")
    if index_bits is not None and index_bits not in WIDTHS:
        raise SkimError(f"index bits must be 1 to 8, got {index_bits}")
    plan = METHODS[method][recipe]
    least = 2 if plan.steps else 1
    if samples is not None and samples < least:
        raise SkimError(f"samples must be at least {least} windows, got {samples}")
    if seq_len is not None and seq_len < 2:
        raise SkimError(f"seq-len must be at least 2, got {seq_len}")
    return dataclasses.replace(
        plan, samples=samples or plan.samples, seq_len=seq_len or plan.seq_len
    )


def _options(
    method: str,
    recipe: str,
    plan: Recipe,
    bits: float,
    index_bits: int | None,
    size: int | None,
    sparsity: str | None,
    rank: float | None,
    adapter_bits: int | None,
) -> slim.Options | None:
    """What a linear has besides codes, with the method's defaults; None if nothing."""
    pattern = Sparsity.parse(sparsity or ("2:4" if method == "slim" else "none"))
    rank = (0.1 if method == "slim" else 0.0) if rank is None else rank
    if adapter_bits not in (None, 4, 16):
        raise SkimError(f"adapter bits must be 4 or 16, got {adapter_bits}")
    if not 0 <= rank <= 1:
        raise SkimError(
            f"rank must be 0 (no adapters) to 1, a share of a linear's smaller side, got {rank:g}"
        )
    if method == "skim" and pattern is None and not rank:
        return None
    options = slim.Options(
        bits=3, sparsity=pattern, rank=rank, adapter_bits=adapter_bits or 4, rounds=plan.turns
    )
    if method == "skim":
        if plan.scale:
            raise SkimError("recipe paper is SKIM as published: it has no sparsity and no adapters")
        if index_bits is not None and index_bits > MAX_TABLE_WIDTH:
            raise SkimError(f"with sparsity or adapters index bits are 1 to 5, got {index_bits}")
        return options
    if size is not None or index_bits is not None:
        raise SkimError("method slim has one width for all: give --bits, not a size or index bits")
    most = MAX_WIDTH if recipe == "paper" else MAX_TABLE_WIDTH
    if bits != round(bits) or not 2 <= bits <= most:
        raise SkimError(
            f"with method slim bits are the width of the weights that stay, 2 to {most} with "
            f"recipe {recipe}, got {bits:g}"
        )
    return dataclasses.replace(options, bits=round(bits), group=0 if recipe == "paper" else None)


def parts_of(linears: Mapping[str, nn.Linear], options: slim.Options | None) -> dict[str, Parts]:
    """What every linear will have besides codes; SkimError where the sparsity does not fit one."""
    if options is None:
        return {}
    parts = {}
    for name, linear in linears.items():
        try:
            parts[name] = options.parts(*linear.weight.shape)
        except SkimError as error:
            raise SkimError(f"{name}: {error}") from None
    return parts


def fit_blocks(
    model: Any,
    linears: dict[str, nn.Linear],
    ids: Tensor,
    recipe: str,
    plan: Recipe,
    options: slim.Options,
    progress: Progress,
) -> dict[str, QuantizedWeight]:
    """SLiM: fit the blocks one after the other; the linears of `model` take the new weights."""
    quantized: dict[str, QuantizedWeight] = {}

    def fit(name: str, w: Tensor, gram: blockwise.Gram) -> Tensor:
        if recipe == "paper":
            q = slim.fit_paper(w, gram.h, options)
        else:
            q = slim.fit(w, gram.h, options, gram.target(w))
        quantized[name] = q
        return effective(q)

    blockwise.walk(
        model,
        linears,
        ids,
        fit,
        staged=plan.staged,
        matched=plan.matched,
        progress=lambda done, total: progress("fit", done, total),
    )
    return quantized


def decompose(
    linears: dict[str, nn.Linear],
    stored: Mapping[str, analysis.Analysis],
    options: slim.Options,
    progress: Progress,
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """A first sparse and low-rank fit of every linear, and what its rows then lose by width [r, 5].

    The error is that of k-means under the Fisher diagonal over the weights that stay; what mask and
    adapter lose is the same at every width.
    """
    first, errors = {}, {}
    for done, (name, linear) in enumerate(linears.items(), 1):
        w = linear.weight.detach().float().cpu()
        known = stored[name]
        q = slim.fit(w, known.hessian, options, shrink=SHRINK, row_weight=known.row_weight)
        left = slim.rest(w, q.adapter)
        fisher = known.fisher.float()
        weight = fisher if q.mask is None else fisher * q.mask
        costs = kmeans_rows(left.contiguous(), weight.contiguous(), MAX_TABLE_WIDTH)[1]
        first[name], errors[name] = q, costs
        progress("decompose", done, len(linears))
    return first, errors


def compose(
    linears: dict[str, nn.Linear],
    stored: Mapping[str, analysis.Analysis],
    widths: Mapping[str, Tensor],
    options: slim.Options,
    first: Mapping[str, QuantizedWeight],
    progress: Progress,
) -> dict[str, QuantizedWeight]:
    """Codebooks of the allocated widths over a mask, with adapters, refined under H~."""
    quantized = {}
    for done, (name, linear) in enumerate(linears.items(), 1):
        known = stored[name]
        quantized[name] = slim.fit(
            linear.weight.detach().float().cpu(),
            known.hessian,
            options,
            widths=widths[name],
            adapter=first[name].adapter,
            shrink=SHRINK,
            row_weight=known.row_weight,
        )
        progress("fit", done, len(linears))
    return quantized


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
            w = linears[name].weight.detach().float().cpu()
            quantized[name] = settled(w, stored[name], fit, plan)
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
        w = linear.weight.detach().float().cpu()
        fits[name] = fit_linear(w, stored[name], widths[name], plan)
        progress("fit", done, len(linears))
    return fits


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
