"""What a run works on: the model, its linears, the calibration windows; and with what."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import skimlm
from skimlm.errors import SkimError, naming
from skimlm.models.architecture import check_positions, skeleton
from skimlm.models.blocks import decoder_linears
from skimlm.models.checkpoint import load_tokenizer, open_checkpoint
from skimlm.models.coverage import Coverage, coverage
from skimlm.models.source import BlockSource, open_source
from skimlm.models.structure import Structure, separate
from skimlm.models.tokenizer import check_ids
from skimlm.pipeline import plan as planning
from skimlm.pipeline import sensitivity
from skimlm.pipeline.config import CompressConfig
from skimlm.pipeline.states import StateStore
from skimlm.pipeline.tables import uses
from skimlm.pipeline.text import default_text, read_documents, read_text, windows
from skimlm.pipeline.walk import Walk
from skimlm.pipeline.workers import Submit
from skimlm.progress import Clock
from skimlm.storage import journal

UNSEEN = 4  # windows, to hold predictions against
Progress = Callable[[str, int, int], None]


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
class Given:
    """What there is to work on: the model, its linears, the calibration windows."""

    path: Path
    source: BlockSource
    tokenizer: Any
    linears: dict[str, nn.Linear]
    tables: dict[str, Any]  # embedding and head where they share the linears' budget
    ids: Tensor  # [windows, tokens]
    unseen: Tensor  # the same of windows that nothing is fitted to, if the text has so many
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

    def key(self, config: CompressConfig) -> str:
        """The name of its analysis."""
        return _key(self.path, self.ids, config, self.linears, self.tables)

    def walk(self, work: Path | None, progress: Progress, submit: Submit) -> Walk:
        """The walk over the blocks; what a streamed one keeps lies in `work`."""
        store = StateStore(work if self.source.streamed else None)
        tables = bool(self.tables)
        return Walk(self.source, self.linears, self.ids, store, submit, progress, tables)


def load(model: str | os.PathLike[str], config: CompressConfig, tools: Tools) -> Given:
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
        pooled = config.pools_tables and not structure.tables
        bits = 16 if structure.tables else config.resolved().embed_bits or 16
        covered = coverage(shape, linears, every, structure, pooled or bits < 16)
        with naming(opened.path):
            covered.check(config.allow_partial)
        tokenizer = load_tokenizer(opened)
        origin = "the built-in text" if text is None else text
        key = config.text_key
        documents = default_text() if text is None else read_documents(text, key, tokenizer)
        both = plan.samples + UNSEEN, plan.seq_len, config.seed
        ids, unseen = windows(documents, tokenizer, *both, origin).tensor_split([plan.samples])
        check_ids(shape, ids, tokenizer)
        tables = list(uses(shape)) if pooled else []
        analysis = _key(opened.path, ids, config, linears, tables)
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
            {name: source.model.get_submodule(name) for name in tables},
            ids,
            unseen,
            calibration,
            needs,
            structure,
            bits,
            covered,
            opened.left_out,
        )


def _key(
    path: Path, ids: Tensor, config: CompressConfig, linears: Iterable[str], tables: Iterable[str]
) -> str:
    """The name of the analysis of these linears and tables."""
    return sensitivity.key(path, ids, config.settings, [*sorted(linears), *tables])


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


def check_disk(given: Given, config: CompressConfig, tools: Tools, out: Path) -> None:
    """Refuse a streamed run whose scratch does not fit; what an earlier run left counts."""
    if not given.source.streamed:
        return
    left = sum(f.stat().st_size for f in journal.place(out).rglob("*") if f.is_file())
    have = left + sensitivity.nbytes(tools.cache, given.key(config))
    place = next(folder for folder in out.resolve().parents if folder.exists())
    planning.check_disk(place, given.needs.scratch - have)


def provenance(config: CompressConfig, given: Given) -> dict[str, Any]:
    """How the folder was made, for its config.json; `CompressConfig.from_folder` reads it."""
    facts = {"skimlm": skimlm.__version__, "config": config.provenance()}
    return facts | {"calibration": given.calibration, "coverage": given.coverage.facts()}
