"""A model in, a compressed folder out: calibrate -> analyse -> allocate -> fit -> (train) -> write.

    skim     statistics   rows             bit pool    scale      refined  end-loss training
    paper    F and H      codebooks        per linear  one step   no       none   (as published)
    fast     F and H~     trellises too    measured    none       yes      none
    best     F and H~     trellises too    measured    none       yes      levels, scales, norms

    slim     of a linear                               inputs from the compressed blocks before
    paper    mask, grid, adapter in one pass           of the block as it was   (as published)
    fast     all that is stored jointly, codebooks     of the block as it was
    best     the same, more rounds, then end-loss      of the block so far; original outputs
             training of adapters too

skim goes over the linears with plain values: statistics, curve, fit, quantized weight. What a
new width needs again (statistics, centroids, error curves) goes to the analysis cache, so that a
second budget for the same model and text needs no calibration. One pool over the model, one per
linear and others are tried on text of their own (measure.py). With sparsity or adapters its rows
lose and gain those first, and what they cost is paid from the same bits. slim goes block by block
(steps.py): every block is fitted to what the compressed ones before it give it.

All of it is one walk over the blocks (walk.py), of a model in memory or of one that is streamed:
the folder is the same, byte for byte.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import skimlm
from skimlm.errors import SkimError
from skimlm.format.layer import histogram
from skimlm.models.write import write_packed
from skimlm.pipeline import plan as planning
from skimlm.pipeline import sensitivity, steps
from skimlm.pipeline.calibrate import FEW
from skimlm.pipeline.config import CompressConfig
from skimlm.pipeline.given import Given, Progress, Tools, check_disk, load, provenance
from skimlm.pipeline.walk import Walk, packed
from skimlm.pipeline.widths import Plan, allocate, as_if_alike
from skimlm.pipeline.workers import Submit, here, pool
from skimlm.progress import Clock, peak_rss_bytes
from skimlm.storage import journal
from skimlm.storage.folder import check_apart, check_out, folder_bytes


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
    bits_per_table: float | None  # per weight of embedding and head, if they are in the pool
    calibration: dict[str, Any]
    analysis_kept: bool  # no calibration was needed: the analysis was there from another run
    analysis_bytes: int  # what it takes in the cache; `skimlm cache --prune` frees it
    streamed: bool  # block by block, the model never being in memory
    experts_sharing: int  # matrices of experts that saw too little text: fitted to their stack's
    coverage: dict[str, Any]  # how much of the model is compressed, what stays as it is and why
    planned: dict[str, float]  # memory and scratch in bytes, seconds
    seconds: dict[str, float]  # per phase
    # KL of ways to spend the bits, by name, and of what was refined then
    tried: dict[str, float] = field(default_factory=dict)
    held_out_kl: list[float] = field(default_factory=list)  # nats per token along the training
    peak_rss_bytes: int = 0

    @property
    def bits_per_parameter(self) -> float:
        """The whole folder, every file in it, over all parameters of the model."""
        return 8 * self.bytes / self.coverage["parameters"]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        facts = dataclasses.asdict(self)
        place = list(facts).index("bits_per_weight") + 1
        more = {"bits_per_parameter": self.bits_per_parameter}
        return dict([*facts.items()][:place]) | more | facts

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Report":
        """The report again."""
        known = {f.name: facts[f.name] for f in dataclasses.fields(cls)}
        known["rows_by_width"] = {int(w): rows for w, rows in known["rows_by_width"].items()}
        return cls(**known)


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
                given = load(model, config, kept)
                report = _run(given, config, kept, out, work, submit)
        shutil.rmtree(work)
    report.peak_rss_bytes = peak_rss_bytes(config.workers or 1)
    return report


def _planned(
    model: str | os.PathLike[str], out: Path, config: CompressConfig, tools: Tools
) -> Report:
    """What a run would do: nothing is written but the analysis."""
    check_out(out, config.force)
    given = load(model, config, tools)
    check_disk(given, config, tools, out)
    if given.source.streamed:  # an analysis would take as long as the run itself
        return _report(given, config, tools, out, as_if_alike(given, config))
    walk = given.walk(None, tools.progress, here)
    return _report(given, config, tools, out, allocate(given, config, tools, walk))


def _report(
    given: Given, config: CompressConfig, tools: Tools, out: Path, chosen: Plan
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
        rows_by_width=histogram(torch.cat([chosen.widths[n] for n in given.linears])),
        bits_per_table=chosen.table_bits,
        calibration=given.calibration,
        analysis_kept=chosen.kept,
        analysis_bytes=sensitivity.nbytes(tools.cache, chosen.key) if chosen.key else 0,
        streamed=given.source.streamed,
        experts_sharing=chosen.sharing,
        coverage=given.coverage.facts(),
        planned=dataclasses.asdict(given.needs),
        seconds=tools.clock.seconds,
        tried=dict(chosen.tried),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _run(
    given: Given, config: CompressConfig, tools: Tools, out: Path, work: Path, submit: Submit
) -> "Report":
    """Allocate, fit and write OUT by way of `work`."""
    journal.begin(work, _facts(config, given))
    tools.notice(planning.describe(given.needs, config, given.source.streamed))
    tools.notice(given.coverage.text())
    if given.left_out:
        tools.notice(f"left out, as transformers does: {', '.join(given.left_out)}")
    check_disk(given, config, tools, out)
    walk = given.walk(work, tools.progress, submit)
    chosen = allocate(given, config, tools, walk)
    _say_sharing(chosen.sharing, tools)
    report = _report(given, config, tools, out, chosen)
    with tools.clock("fit"):
        report.tried |= _fit(given, walk, config, tools, chosen)
    # A run that was interrupted during the training finds its state here and goes on.
    state = tools.cache / f"{given.key(config)}-{_digest(chosen)}.state"
    if (plan := config.settings).steps:
        with tools.clock("train"):
            trained = steps.train_packed(walk, chosen.specs, plan.steps, plan.rate, state)
            report.held_out_kl = trained
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
            provenance=provenance(config, given),
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
    given: Given, walk: Walk, config: CompressConfig, tools: Tools, chosen: Plan
) -> dict[str, float]:
    """Keep what OUT holds of every block; the KL of what was refined, where it was measured."""
    known, widths, plan, options = chosen.stored, chosen.widths, config.settings, config.options
    if known is None:
        assert options is not None
        if plan.steps:  # while the model is what it was
            steps.final_states(walk)
        steps.fit_slim(walk, plan, options, published=config.recipe == "paper")
        return {}
    if options is not None:
        steps.compose(walk, known, widths, options)
        return {}
    if given.tables:
        weights = {n: table.weight.detach() for n, table in given.tables.items()}
        steps.pack_tables(walk, weights, chosen.tables, widths, plan)
    rounded = chosen.rounded
    refined = steps.fit_skim(walk, given.unseen, known, widths, chosen.specs, plan, rounded)
    if refined is None or rounded is None:
        return {}
    if refined > rounded:
        tools.notice(
            f"refinement is left out, for it was measured worse: {refined:.4f} nats a token "
            f"against {rounded:.4f}; more --samples, or other text, may help"
        )
    return {"refined": refined}


def _facts(config: CompressConfig, given: Given) -> dict[str, Any]:
    """What must be the same when the run is resumed."""
    options = {name.replace("_", "-"): value for name, value in config.provenance().items()}
    return options | {
        "skimlm": skimlm.__version__,
        "model": sensitivity.files(given.path),
        "text": hashlib.sha256(given.ids.numpy().tobytes()).hexdigest(),
        "linears": hashlib.sha256("\n".join(given.linears).encode()).hexdigest(),
    }


def _digest(chosen: Plan) -> str:
    """How all layers are stored, in a few letters."""
    digest = hashlib.sha256()
    for name, spec in chosen.specs.items():
        digest.update(json.dumps([name, spec.entry()]).encode())
        digest.update(chosen.widths[name].numpy().tobytes())
    return digest.hexdigest()[:16]
