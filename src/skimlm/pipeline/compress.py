"""A model in, a compressed folder out: calibrate -> analyse -> allocate -> fit -> (train) -> write.

    skim     statistics   bit pool    scaling vector   refinement   end-loss training
    paper    F and H      per linear  one step         none         none   (as published)
    fast     F and H~     the model   none             yes          none
    best     F and H~     the model   none             yes          codebooks, norm weights

    slim     of a linear                               inputs from the compressed blocks before
    paper    mask, grid, adapter in one pass           of the block as it was   (as published)
    fast     all that is stored jointly, codebooks     of the block as it was
    best     the same, more rounds                     of the block so far; original outputs

skim goes over the linears with plain values: statistics, curve, fit, quantized weight. What a
new width needs again (statistics, centroids, error curves) goes to the analysis cache, so that a
second budget for the same model and text needs no calibration. With sparsity or adapters its rows
lose and gain those first, and what they cost is paid from the same bits. slim goes block by block
(steps.py): every block is fitted to what the compressed ones before it give it.

All of it is one walk over the blocks (walk.py), of a model in memory or of one that is streamed:
the folder is the same, byte for byte.
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
from skimlm.errors import SkimError, naming
from skimlm.format.layer import LayerSpec, histogram
from skimlm.format.row_codes import code_bits
from skimlm.models.architecture import check_positions, skeleton
from skimlm.models.blocks import decoder_linears
from skimlm.models.checkpoint import load_tokenizer, open_checkpoint
from skimlm.models.coverage import Coverage, coverage
from skimlm.models.source import BlockSource, open_source
from skimlm.models.structure import Structure, routed, separate
from skimlm.models.tokenizer import check_ids
from skimlm.models.write import plan_bytes, write_packed
from skimlm.pipeline import budget, sensitivity, steps
from skimlm.pipeline import plan as planning
from skimlm.pipeline.budget import specs_of
from skimlm.pipeline.calibrate import FEW
from skimlm.pipeline.config import CompressConfig
from skimlm.pipeline.recipes import packed_linear, widths_of
from skimlm.pipeline.states import StateStore
from skimlm.pipeline.text import default_text, read_documents, read_text, windows
from skimlm.pipeline.walk import Walk, analyse, each, packed
from skimlm.pipeline.workers import Submit, here, pool
from skimlm.progress import Clock, peak_rss_bytes
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
    experts_sharing: int  # matrices of experts that saw too little text: fitted to their stack's
    coverage: dict[str, Any]  # how much of the model is compressed, what stays as it is and why
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
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: CompressConfig,
    *,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Report:
    """Compress a model (folder, hub id or .gguf) into the folder OUT as `config` says.

    `progress(phase, done, total)` and `notice(line)` are told what happens. A model that does not
    fit in memory is streamed (walk.py). Raises SkimError for everything a user can get wrong; OUT
    is whole or absent.
    """
    out = Path(out)
    check_apart(out, model)
    tools = Tools(
        Clock(), progress or (lambda *_: None), notice or (lambda _: None), config.cache_dir
    )
    if config.dry_run:
        return _planned(model, out, config, tools)
    if config.resume and not config.force and out.exists() and not journal.place(out).exists():
        raise SkimError(f"{out}: is there, with no unfinished run beside it; --force replaces it")
    if not (config.resume and journal.finished(out)):
        check_out(out, config.force)
    with journal.unfinished(out, config.resume, config.force) as work:
        if config.resume and (done := journal.finished(out)):
            report = Report.from_json(done)
        else:
            tools.clock.seconds |= journal.seconds(work)

            def tell(*done: Any) -> None:
                tools.clock.tick()
                journal.keep_seconds(work, tools.clock.seconds)
                tools.progress(*done)

            with pool(config.workers, config.ray) as submit:
                kept = dataclasses.replace(tools, progress=tell)
                given = _load(model, config, kept)
                report = _run(given, config, kept, out, work, submit)
        shutil.rmtree(work)
    report.peak_rss_bytes = peak_rss_bytes(config.workers or 1)
    return report


def _planned(
    model: str | os.PathLike[str], out: Path, config: CompressConfig, tools: "Tools"
) -> Report:
    """What a run would do: nothing is written but the analysis."""
    check_out(out, config.force)
    given = _load(model, config, tools)
    _check_disk(given, config, tools, out)
    if given.source.streamed:  # an analysis would take as long as the run itself
        return _report(given, config, tools, out, _as_if_alike(given, config))
    walk = given.walk(None, tools.progress, here)
    return _report(given, config, tools, out, _allocate(given, config, tools, walk))


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
    specs: Mapping[str, LayerSpec]  # how every linear is stored at these widths
    bits: float  # per weight
    bytes: int  # of OUT
    key: str  # of the analysis, empty for slim
    kept: bool  # the analysis was there
    stored: Mapping[str, sensitivity.Analysis]
    sharing: int = 0  # experts that calibration hardly visited


def _prices(
    given: "Given", config: CompressConfig
) -> tuple[budget.Prices, Callable[[budget.Widths], int]]:
    """What widths cost, and the bytes of OUT with them, every file counted."""
    possible = widths_of(config.settings, config.options)
    price = budget.prices(specs_of(given.linears, config.options, config.settings.scale), possible)
    provenance = _provenance(config, given)

    def planned_bytes(widths: budget.Widths) -> int:
        others = plan_bytes(
            given.model,
            given.tokenizer,
            _specs(given, config, widths),
            embed_bits=given.embed_bits,
            bits=price.bits(widths) / price.total,
            provenance=provenance,
            source=given.path,
            layout=given.structure.layout,
        )
        return others + round(price.bits(widths) / 8)

    return price, planned_bytes


def _specs(given: "Given", config: CompressConfig, widths: budget.Widths) -> dict[str, LayerSpec]:
    """How every linear is stored with rows of these widths."""
    specs = specs_of(given.linears, config.options, config.settings.scale)
    return {name: specs[name].with_widths(width) for name, width in widths.items()}


def _allocate(given: "Given", config: CompressConfig, tools: Tools, walk: Walk) -> Plan:
    """Analyse the model and choose the widths; slim has one width for all."""
    linears, plan, target = given.linears, config.settings, config.target
    price, planned_bytes = _prices(given, config)

    def made(widths: budget.Widths, *known: Any) -> Plan:
        bits, specs = price.bits(widths) / price.total, _specs(given, config, widths)
        return Plan(widths, specs, bits, planned_bytes(widths), *known)

    if config.method == "slim":
        return made(budget.uniform(linears, round(target.bits)), "", False, {})
    budget.check(target, linears, price, planned_bytes)
    with tools.clock("analyse"):
        key = sensitivity.key(given.path, given.ids, plan, sorted(linears))
        stored = sensitivity.stored(tools.cache, key, linears)
        kept = analyse(walk, stored, plan)
        errors = {n: stored.errors(n) for n in linears}
        sharing = sum(stored.tokens(n) < FEW for n in routed(given.model, linears))
        if config.options is not None:
            errors = steps.decompose(walk, stored, config.options)
    with tools.clock("allocate"):
        widths = budget.choose(target, errors, linears, price, plan.end_loss, planned_bytes)
    return made(widths, key, kept, stored, sharing)


def _as_if_alike(given: "Given", config: CompressConfig) -> Plan:
    """A plan without an analysis, of the right size: all rows lose alike."""
    linears = given.linears
    price, planned_bytes = _prices(given, config)
    curve = torch.tensor([0.25 ** code_bits(width) for width in price.widths]).double()
    errors = {n: curve.expand(m.out_features, -1) for n, m in linears.items()}
    budget.check(config.target, linears, price, planned_bytes)
    widths = budget.choose(config.target, errors, linears, price, True, planned_bytes)
    bits = price.bits(widths) / price.total
    specs = _specs(given, config, widths)
    return Plan(widths, specs, bits, planned_bytes(widths), "", False, {})


def _report(
    given: "Given", config: CompressConfig, tools: Tools, out: Path, chosen: Plan
) -> "Report":
    """What is known of a run before OUT is written."""
    return Report(
        out=str(out),
        method=config.method,
        recipe=config.recipe,
        bits_per_weight=chosen.bits,
        bytes=chosen.bytes,
        linears=len(given.linears),
        weights=sum(m.weight.numel() for m in given.linears.values()),
        rows_by_width=histogram(torch.cat(list(chosen.widths.values()))),
        calibration=given.calibration,
        analysis_kept=chosen.kept,
        analysis_bytes=sensitivity.nbytes(tools.cache, chosen.key) if chosen.key else 0,
        streamed=given.source.streamed,
        experts_sharing=chosen.sharing,
        coverage=given.coverage.facts(),
        planned=dataclasses.asdict(given.needs),
        seconds=tools.clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _run(
    given: "Given", config: CompressConfig, tools: Tools, out: Path, work: Path, submit: Submit
) -> "Report":
    """Allocate, fit and write OUT by way of `work`."""
    journal.begin(work, _facts(config, given))
    tools.notice(planning.describe(given.needs, config, given.source.streamed))
    tools.notice(given.coverage.text())
    if given.left_out:
        tools.notice(f"left out, as transformers does: {', '.join(given.left_out)}")
    _check_disk(given, config, tools, out)
    walk = given.walk(work, tools.progress, submit)
    chosen = _allocate(given, config, tools, walk)
    _say_sharing(chosen.sharing, tools)
    report = _report(given, config, tools, out, chosen)
    # A run that was interrupted during the training finds its state here and goes on.
    state = tools.cache / f"{chosen.key}-{_digest(chosen.widths)}.state"
    report.held_out_kl = _fit(walk, config, tools, chosen, state)
    if config.method == "slim":  # which knows only now
        report.experts_sharing = steps.sharing(walk)
        _say_sharing(report.experts_sharing, tools)
    with tools.clock("write"), journal.model_folder(work, out) as folder:
        write_packed(
            folder,
            given.model,
            given.tokenizer,
            chosen.specs,
            packed(walk),
            embed_bits=given.embed_bits,
            bits=chosen.bits,
            provenance=_provenance(config, given),
            source=given.path,
            layout=given.structure.layout,
        )
        report.bytes = folder_bytes(folder)
        journal.write_report(work, report.to_json())
    state.unlink(missing_ok=True)
    return report


def _say_sharing(count: int, tools: Tools) -> None:
    if count:
        tools.notice(
            f"{count} matrices of experts saw under {FEW} tokens: they are fitted to what all "
            "experts of their layer saw; more --samples gives them their own"
        )


def _fit(
    walk: Walk, config: CompressConfig, tools: Tools, chosen: Plan, state: Path
) -> list[float]:
    """Keep what OUT holds of every block; the held-out losses of a training."""
    known, widths, plan, options = chosen.stored, chosen.widths, config.settings, config.options
    with tools.clock("fit"):
        if config.method == "slim":
            assert options is not None
            steps.fit_slim(walk, plan, options, published=config.recipe == "paper")
        elif options is not None:
            steps.compose(walk, known, widths, options)
        else:
            each(
                walk, "fit", "packed", packed_linear, lambda name: (known[name], widths[name], plan)
            )
    if not plan.steps:
        return []
    with tools.clock("train"):
        return steps.train_packed(walk, chosen.specs, plan.steps, state)


@dataclass(frozen=True)
class Given:
    """What there is to work on: the model, its linears, the calibration windows."""

    path: Path
    source: BlockSource
    tokenizer: Any
    linears: dict[str, nn.Linear]
    ids: Tensor  # [windows, tokens]
    calibration: dict[str, Any]  # how the windows came about, for the provenance
    needs: planning.Needs
    structure: Structure
    embed_bits: int
    coverage: Coverage
    left_out: Sequence[str] = ()  # tensors of the checkpoint that the model has no place for

    @property
    def model(self) -> Any:
        """The model; its blocks may be on the meta device."""
        return self.source.model

    def walk(self, work: Path | None, progress: Progress, submit: Submit) -> Walk:
        """The walk over the blocks; what a streamed one keeps lies in `work`."""
        store = StateStore(work if self.source.streamed else None)
        return Walk(self.source, self.linears, self.ids, store, submit, progress)


def _load(model: str | os.PathLike[str], config: CompressConfig, tools: Tools) -> Given:
    """Read text and model, or what stands outside its blocks where the whole does not fit."""
    with tools.clock("load"):
        plan, text = config.settings, config.text
        if text is not None:
            read_text(text)  # what cannot be read is said before the model is opened
        opened = open_checkpoint(model, revision=config.revision)
        if opened.compressed:
            raise SkimError(f"{model}: is compressed already; give the original model")
        check_positions(opened.config, plan.seq_len)
        structure, shape = opened.structure, skeleton(opened.path, opened.config)
        separate(shape, structure.layout)
        chosen = config.include, config.exclude, structure.dense
        linears = decoder_linears(shape, *chosen)
        every = decoder_linears(shape, dense=structure.dense)
        bits = 16 if structure.tables else config.embed_bits
        covered = coverage(shape, linears, every, structure, bits)
        with naming(opened.path):
            covered.check(config.allow_partial)
        tokenizer = load_tokenizer(opened)
        origin = "the built-in text" if text is None else text
        key = config.text_key
        documents = default_text() if text is None else read_documents(text, key, tokenizer)
        ids = windows(documents, tokenizer, plan.samples, plan.seq_len, config.seed, origin)
        check_ids(shape, ids, tokenizer)
        analysis = sensitivity.key(opened.path, ids, plan, sorted(linears))
        left = sensitivity.missing(tools.cache, analysis, linears)
        needs, streamed = _way(shape, linears, config, config.method == "skim" and not left)
        source = open_source(opened, streamed, tokenizer)
        if plan.steps and len(ids) < 2:
            raise SkimError(f"{origin}: one window is too little to train on; give more text")
        calibration = {
            "text": Path(origin).name,
            "windows": len(ids),
            "seq_len": ids.shape[1],
            "seed": config.seed,
        }
        linears = decoder_linears(source.model, *chosen)
        return Given(
            opened.path,
            source,
            tokenizer,
            linears,
            ids,
            calibration,
            needs,
            structure,
            bits,
            covered,
            opened.left_out,
        )


def _way(
    shape: nn.Module, linears: Mapping[str, nn.Linear], config: CompressConfig, known: bool
) -> tuple[planning.Needs, bool]:
    """What the run takes, and whether the model is streamed: shared work always is."""
    sizes = planning.sizes(shape, linears)
    whole, part = planning.needs(sizes, config, known)
    shared = config.workers is not None or config.ray is not None
    samples = config.settings.samples
    streamed = planning.streams(whole, part, config.max_memory, samples, shared)
    return (part if streamed else whole), streamed


def _check_disk(given: Given, config: CompressConfig, tools: Tools, out: Path) -> None:
    """Refuse a streamed run whose scratch does not fit; what an earlier run left counts."""
    if not given.source.streamed:
        return
    key = sensitivity.key(given.path, given.ids, config.settings, sorted(given.linears))
    left = sum(f.stat().st_size for f in journal.place(out).rglob("*") if f.is_file())
    have = left + sensitivity.nbytes(tools.cache, key)
    place = next(folder for folder in out.resolve().parents if folder.exists())
    planning.check_disk(place, given.needs.scratch - have)


def _provenance(config: CompressConfig, given: Given) -> dict[str, Any]:
    """How the folder was made, for its config.json; `CompressConfig.from_folder` reads it."""
    facts = {"skimlm": skimlm.__version__, "config": config.provenance()}
    return facts | {"calibration": given.calibration, "coverage": given.coverage.facts()}


def _facts(config: CompressConfig, given: Given) -> dict[str, Any]:
    """What must be the same when the run is resumed."""
    options = {name.replace("_", "-"): value for name, value in config.provenance().items()}
    return options | {
        "skimlm": skimlm.__version__,
        "model": sensitivity.files(given.path),
        "text": hashlib.sha256(given.ids.numpy().tobytes()).hexdigest(),
        "linears": hashlib.sha256("\n".join(given.linears).encode()).hexdigest(),
    }


def _digest(widths: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(torch.cat(list(widths.values())).numpy().tobytes()).hexdigest()[:16]
