"""A model in, a compressed folder out: calibrate -> analyse -> allocate -> fit -> (train) -> write.

    skim     statistics   bit pool    scaling vector   refinement   end-loss training
    paper    F and H      per linear  one step         none         none   (as published)
    fast     F and H~     the model   none             yes          none
    best     F and H~     the model   none             yes          codebooks, norm weights

    (best, where the model does not fit in memory: trained to the output of every block)

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
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import skimlm
from skimlm.errors import SkimError
from skimlm.format.layer import histogram
from skimlm.format.row_codes import MAX_WIDTH
from skimlm.models.architecture import skeleton
from skimlm.models.blocks import decoder_linears
from skimlm.models.checkpoint import load_tokenizer, open_checkpoint
from skimlm.models.source import BlockSource, open_source
from skimlm.models.tokenizer import check_ids
from skimlm.models.write import plan_bytes, write_packed
from skimlm.pipeline import budget, sensitivity, steps
from skimlm.pipeline import plan as resources
from skimlm.pipeline.calibrate import BATCH
from skimlm.pipeline.config import Asked, options_of, recipe_of, specs_of
from skimlm.pipeline.recipes import packed_linear
from skimlm.pipeline.states import StateStore
from skimlm.pipeline.text import default_text, read_documents, read_text, windows
from skimlm.pipeline.walk import Walk, analyse, each, packed
from skimlm.pipeline.workers import Submit, here, pool
from skimlm.progress import Clock, peak_rss_bytes
from skimlm.quantize.fit import WIDTHS
from skimlm.storage import journal
from skimlm.storage.folder import check_apart, check_out, folder_bytes

Progress = Callable[[str, int, int], None]


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
    streamed: bool  # block by block, the model never being in memory
    planned: dict[str, float]  # memory and scratch in bytes, seconds
    seconds: dict[str, float]  # per phase
    held_out_kl: list[float] = field(default_factory=list)  # nats per token along the training
    peak_rss_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Report":
        """The report again."""
        widths = {int(width): rows for width, rows in facts["rows_by_width"].items()}
        return cls(**{**facts, "rows_by_width": widths})


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
    resume: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Report:
    """Compress a model to `bits` per weight all-in, to `size` bytes on disk, or to a fixed width.

    With the method slim `bits` (4) is the width of the weights that stay. `sparsity` ("none",
    "2:4", "0.5") and `rank` (0) of adapters in `adapter_bits` (4, 16) are for both methods; slim's
    defaults are 2:4 and 0.1. A model that does not fit in memory, or in `max_memory` bytes, is
    streamed (stream.py), its linears worked on by `workers` processes or the cluster at `ray`.
    `resume` goes on with a run that was stopped. Raises SkimError for everything a user can get
    wrong; OUT is whole or absent.
    """
    bits = (4.0 if method == "slim" else 3.2) if bits is None else bits
    plan = recipe_of(method, recipe, bits, index_bits, embed_bits, samples, seq_len)
    options = options_of(method, recipe, plan, bits, index_bits, size, sparsity, rank, adapter_bits)
    out, clock = Path(out), Clock()
    check_apart(out, source)
    asked = Asked(
        method, recipe, plan, options, budget.Target(bits, size, index_bits), embed_bits, seed
    )
    tools = Tools(clock, progress or (lambda *_: None), notice or (lambda _: None), cache_dir)

    def given() -> Given:
        with clock("load"):
            return _load(
                source,
                asked,
                revision,
                include,
                exclude,
                text,
                text_key,
                max_memory,
                None if workers is None and ray is None else workers or 1,
            )

    if dry_run:
        check_out(out, force)
        found = given()
        _check_disk(found, asked, tools, out)
        alike = found.source.streamed  # an analysis would take as long as the run itself
        walk = found.walk(None, tools.progress, here)
        chosen = _as_if_alike(found, asked) if alike else _allocate(found, asked, tools, walk)
        return _report(found, asked, tools, out, chosen)
    if resume and not force and out.exists() and not journal.place(out).exists():
        raise SkimError(f"{out}: is there, with no unfinished run beside it; --force replaces it")
    if not (resume and journal.finished(out)):
        check_out(out, force)
    with journal.unfinished(out, resume, force) as work:
        if resume and (done := journal.finished(out)):
            report = Report.from_json(done)
        else:
            clock.seconds |= journal.seconds(work)

            def tell(*done: Any) -> None:
                clock.tick()
                journal.keep_seconds(work, clock.seconds)
                tools.progress(*done)

            with pool(workers, ray) as submit:
                kept = dataclasses.replace(tools, progress=tell)
                report = _run(given(), asked, kept, out, work, submit)
        shutil.rmtree(work)
    report.peak_rss_bytes = peak_rss_bytes(workers or 1)
    return report


@dataclass(frozen=True)
class Tools:
    """Where a run tells what it does, and keeps what the next one may use."""

    clock: Clock
    progress: Progress
    notice: Callable[[str], None]
    cache_dir: str | os.PathLike[str] | None

    @property
    def cache(self) -> Path:
        """The folder of analyses."""
        return sensitivity.folder(self.cache_dir)


@dataclass(frozen=True)
class Plan:
    """The widths of all rows, and what they cost."""

    widths: budget.Widths
    bits: float  # per weight
    bytes: int  # of OUT
    key: str  # of the analysis, empty for slim
    kept: bool  # the analysis was there
    stored: Mapping[str, sensitivity.Analysis]


def _prices(given: "Given", asked: Asked) -> tuple[budget.Prices, Callable[[budget.Widths], int]]:
    """What widths cost, and the bytes of OUT with them, every file counted."""
    specs = specs_of(given.linears, asked.options, asked.plan.scale)
    price = budget.prices(specs)
    provenance = _provenance(asked, given)

    def planned_bytes(widths: budget.Widths) -> int:
        others = plan_bytes(
            given.model,
            given.tokenizer,
            {n: specs[n].with_widths(w) for n, w in widths.items()},
            embed_bits=asked.embed_bits,
            bits=price.bits(widths) / price.total,
            provenance=provenance,
            source=given.path,
        )
        return others + round(price.bits(widths) / 8)

    return price, planned_bytes


def _allocate(given: "Given", asked: Asked, tools: Tools, walk: Walk) -> Plan:
    """Analyse the model and choose the widths; slim has one width for all."""
    linears, plan, target = given.linears, asked.plan, asked.target
    price, planned_bytes = _prices(given, asked)

    def made(widths: budget.Widths, *known: Any) -> Plan:
        return Plan(widths, price.bits(widths) / price.total, planned_bytes(widths), *known)

    if asked.method == "slim":
        return made(budget.uniform(linears, round(target.bits)), "", False, {})
    budget.check(target, linears, price, planned_bytes)
    with tools.clock("analyse"):
        key = sensitivity.key(given.path, given.ids, plan, sorted(linears))
        stored = sensitivity.stored(tools.cache, key, linears)
        kept = analyse(walk, stored, plan)
        errors = {n: stored.errors(n) for n in linears}
        if asked.options is not None:
            errors = steps.decompose(walk, stored, asked.options)
    with tools.clock("allocate"):
        widths = budget.choose(target, errors, linears, price, plan.end_loss, planned_bytes)
    return made(widths, key, kept, stored)


def _as_if_alike(given: "Given", asked: Asked) -> Plan:
    """A plan without an analysis, of the right size: all rows lose alike."""
    curve = 0.25 ** torch.arange(len(WIDTHS), dtype=torch.float64)
    linears = given.linears
    errors = {n: curve.expand(m.out_features, -1).clone() for n, m in linears.items()}
    price, planned_bytes = _prices(given, asked)
    budget.check(asked.target, linears, price, planned_bytes)
    widths = budget.choose(asked.target, errors, linears, price, True, planned_bytes)
    bits = price.bits(widths) / price.total
    return Plan(widths, bits, planned_bytes(widths), "", False, {})


def _report(given: "Given", asked: Asked, tools: Tools, out: Path, chosen: Plan) -> "Report":
    """What is known of a run before OUT is written."""
    return Report(
        out=str(out),
        method=asked.method,
        recipe=asked.recipe,
        bits_per_weight=chosen.bits,
        bytes=chosen.bytes,
        linears=len(given.linears),
        weights=sum(m.weight.numel() for m in given.linears.values()),
        rows_by_width=histogram(torch.cat(list(chosen.widths.values()))),
        calibration=given.calibration,
        analysis_kept=chosen.kept,
        analysis_bytes=sensitivity.nbytes(tools.cache, chosen.key) if chosen.key else 0,
        streamed=given.source.streamed,
        planned=dataclasses.asdict(given.needs),
        seconds=tools.clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _run(
    given: "Given", asked: Asked, tools: Tools, out: Path, work: Path, submit: Submit
) -> "Report":
    """Allocate, fit and write OUT by way of `work`."""
    journal.begin(work, asked.facts(given.path, given.ids, given.linears))
    tools.notice(resources.describe(given.needs, given.source.streamed))
    if given.left_out:
        tools.notice(f"left out, as transformers does: {', '.join(given.left_out)}")
    _check_disk(given, asked, tools, out)
    walk = given.walk(work, tools.progress, submit)
    chosen = _allocate(given, asked, tools, walk)
    report = _report(given, asked, tools, out, chosen)
    # A run that was interrupted during the training finds its state here and goes on.
    state = tools.cache / f"{chosen.key}-{_digest(chosen.widths)}.state"
    report.held_out_kl = _fit(walk, asked, tools, chosen, state)
    with tools.clock("write"), journal.model_folder(work, out) as folder:
        specs = specs_of(given.linears, asked.options, asked.plan.scale)
        write_packed(
            folder,
            given.model,
            given.tokenizer,
            {n: specs[n].with_widths(w) for n, w in chosen.widths.items()},
            packed(walk),
            embed_bits=asked.embed_bits,
            bits=chosen.bits,
            provenance=_provenance(asked, given),
            source=given.path,
        )
        report.bytes = folder_bytes(folder)
        journal.write_report(work, report.to_json())
    state.unlink(missing_ok=True)
    return report


def _fit(walk: Walk, asked: Asked, tools: Tools, chosen: Plan, state: Path) -> list[float]:
    """Keep what OUT holds of every block; the held-out losses of a training."""
    known, widths, plan, options = chosen.stored, chosen.widths, asked.plan, asked.options
    if options is None and plan.steps and not walk.source.streamed:
        return steps.fit_trained_model(walk, known, widths, plan, tools.clock, state)
    with tools.clock("fit"):
        if asked.method == "slim":
            assert options is not None
            steps.fit_slim(walk, plan, options, published=asked.recipe == "paper")
        elif options is not None:
            steps.compose(walk, known, widths, options)
        elif plan.steps:
            steps.fit_trained(walk, known, widths, plan)
        else:
            each(
                walk, "fit", "packed", packed_linear, lambda name: (known[name], widths[name], plan)
            )
    return []


@dataclass(frozen=True)
class Given:
    """What there is to work on: the model, its linears, the calibration windows."""

    path: Path
    source: BlockSource
    tokenizer: Any
    linears: dict[str, nn.Linear]
    ids: Tensor  # [windows, tokens]
    calibration: dict[str, Any]  # how the windows came about, for the provenance
    needs: resources.Needs
    left_out: Sequence[str] = ()  # tensors of the checkpoint that the model has no place for

    @property
    def model(self) -> Any:
        """The model; its blocks may be on the meta device."""
        return self.source.model

    def walk(self, work: Path | None, progress: Progress, submit: Submit) -> Walk:
        """The walk over the blocks; what a streamed one keeps lies in `work`."""
        store = StateStore(work if self.source.streamed else None)
        return Walk(self.source, self.linears, self.ids, store, submit, progress)


def _load(
    source: str | os.PathLike[str],
    asked: Asked,
    revision: str | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    text: str | os.PathLike[str] | None,
    text_key: str | None,
    max_memory: int | None,
    workers: int | None,
) -> Given:
    """Read text and model, or what stands outside its blocks where the whole does not fit.

    A model whose work is shared by `workers` is streamed whether it fits or not.
    """
    plan = asked.plan
    if text is not None:
        read_text(text)  # what cannot be read is said before the model is opened
    opened = open_checkpoint(source, revision=revision)
    if opened.compressed:
        raise SkimError(f"{source}: is compressed already; give the original model")
    shape = skeleton(opened.path, opened.config)
    wanted = decoder_linears(shape, include, exclude)
    sizes = resources.sizes(shape, wanted)
    target = asked.target
    bits = target.bits if target.size is None and target.index_bits is None else MAX_WIDTH
    whole, part = resources.needs(sizes, plan, plan.samples, BATCH, workers or 0, bits)
    streamed = resources.streams(whole, part, max_memory, plan.samples, bool(workers))
    tokenizer = load_tokenizer(opened)
    origin = "the built-in text" if text is None else str(text)
    documents = default_text() if text is None else read_documents(text, text_key, tokenizer)
    ids = windows(documents, tokenizer, plan.samples, plan.seq_len, asked.seed, origin)
    check_ids(shape, ids, tokenizer)
    model_source = open_source(opened, streamed, tokenizer)
    if plan.steps and len(ids) < 2:
        raise SkimError(f"{origin}: one window is too little to train on; give more text")
    calibration = {
        "text": Path(origin).name,
        "windows": len(ids),
        "seq_len": ids.shape[1],
        "seed": asked.seed,
    }
    linears = decoder_linears(model_source.model, include, exclude)
    needs = part if streamed else whole
    return Given(
        opened.path, model_source, tokenizer, linears, ids, calibration, needs, opened.left_out
    )


def _check_disk(given: Given, asked: Asked, tools: Tools, out: Path) -> None:
    """Refuse a streamed run whose scratch does not fit; what an earlier run left counts."""
    if not given.source.streamed:
        return
    key = sensitivity.key(given.path, given.ids, asked.plan, sorted(given.linears))
    left = sum(f.stat().st_size for f in journal.place(out).rglob("*") if f.is_file())
    have = left + sensitivity.nbytes(tools.cache, key)
    place = next(folder for folder in out.resolve().parents if folder.exists())
    resources.check_disk(place, given.needs.scratch - have)


def _provenance(asked: Asked, given: Given) -> dict[str, Any]:
    """How the folder was made, for its config.json."""
    facts: dict[str, Any] = {
        "skimlm": skimlm.__version__,
        "method": asked.method,
        "recipe": asked.recipe,
    }
    if asked.options is not None:
        options = asked.options
        facts |= {"sparsity": str(options.sparsity or "none"), "rank": options.rank}
        facts |= {"adapter_bits": options.adapter_bits} if options.rank else {}
    if asked.plan.steps:
        facts["trained"] = "block by block" if given.source.streamed else "the model"
    return facts | {"calibration": given.calibration}


def _digest(widths: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(torch.cat(list(widths.values())).numpy().tobytes()).hexdigest()[:16]
