"""Which width every row of a model gets: analyse, then spend the bits or bytes asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skimlm.format.layer import LayerSpec
from skimlm.format.row_codes import code_bits
from skimlm.models.structure import routed
from skimlm.models.write import plan_bytes
from skimlm.pipeline import budget, sensitivity, steps
from skimlm.pipeline.budget import specs_of
from skimlm.pipeline.calibrate import FEW
from skimlm.pipeline.config import CompressConfig
from skimlm.pipeline.given import Given, Tools
from skimlm.pipeline.given import provenance as provenance_of
from skimlm.pipeline.measure import POOLED, tried_widths
from skimlm.pipeline.recipes import widths_of
from skimlm.pipeline.tables import TableSums, analysis, uses
from skimlm.pipeline.walk import Walk, analyse

SPARE = 1e-4  # bits per weight that other widths leave, for the headers to grow
TRIED = "tried"  # what is kept of it, so that a run that goes on does not try again
FREE = 0.1  # bits per weight above the least, below which there is nothing to try


@dataclass(frozen=True)
class Plan:
    """The widths of all rows, and what they cost."""

    widths: budget.Widths
    specs: Mapping[str, LayerSpec]  # how every linear, and table, is stored at these widths
    bits: float  # per weight of the linears
    table_bits: float | None  # per weight of embedding and head, if they share the budget
    bytes: int  # of OUT
    key: str  # of the analysis, empty for slim
    kept: bool  # the analysis was there
    stored: sensitivity.Stored | None = None
    # the same of embedding and head, where they share the budget
    tables: Mapping[str, sensitivity.Analysis] = field(default_factory=dict)
    sharing: int = 0  # experts that calibration hardly visited
    tried: Mapping[str, float] = field(default_factory=dict)  # KL of ways to spend the bits
    rounded: float | None = None  # that of these widths: rows rounded, but not refined


def _prices(
    given: Given, config: CompressConfig
) -> tuple[budget.Prices, Callable[[budget.Widths], int]]:
    """What widths cost, and the bytes of OUT with them, every file counted."""
    price = budget.prices(_base(given, config), widths_of(config.settings, config.options))
    provenance = provenance_of(config, given)

    def planned_bytes(widths: budget.Widths) -> int:
        others = plan_bytes(
            given.model,
            given.tokenizer,
            _specs(given, config, widths),
            embed_bits=given.embed_bits,
            bits=_bits_per_weight(given, price, widths),
            provenance=provenance,
            source=given.path,
            layout=given.structure.layout,
        )
        return others + round(price.bits(widths) / 8)

    return price, planned_bytes


def _base(given: Given, config: CompressConfig) -> dict[str, LayerSpec]:
    """How linears, and tables that share their budget, are stored but for widths."""
    specs = specs_of(given.linears, config.options, config.settings.scale)
    return specs | {name: LayerSpec(*table.weight.shape) for name, table in given.tables.items()}


def _specs(given: Given, config: CompressConfig, widths: budget.Widths) -> dict[str, LayerSpec]:
    """The same with rows of these widths."""
    specs = _base(given, config)
    return {name: specs[name].with_widths(width) for name, width in widths.items()}


def _bits_per_weight(given: Given, price: budget.Prices, widths: budget.Widths) -> float:
    """Stored bits of the linears over their weights."""
    return _bits_of(price, widths, list(given.linears))


def _bits_of(price: budget.Prices, widths: budget.Widths, names: Sequence[str]) -> float:
    """Stored bits of some layers over their weights."""
    price = dataclasses.replace(price, specs={n: price.specs[n] for n in names})
    return price.bits({n: widths[n] for n in names}) / price.total


def allocate(given: Given, config: CompressConfig, tools: Tools, walk: Walk) -> Plan:
    """Analyse the model and choose the widths; slim has one width for all."""
    linears, plan, target = given.linears, config.settings, config.target
    price, planned_bytes = _prices(given, config)

    def made(widths: budget.Widths, *known: Any) -> Plan:
        return _plan(given, config, price, widths, planned_bytes(widths), *known)

    if config.method == "slim":
        return made(budget.uniform(price.specs, round(target.bits)), "", False)
    budget.check(target, price, planned_bytes)
    with tools.clock("analyse"):
        key = given.key(config)
        stored = sensitivity.stored(tools.cache, key, linears)
        kept = analyse(walk, stored, plan)
        errors = {n: stored.errors(n) for n in linears}
        sharing = sum(stored.tokens(n) < FEW for n in routed(given.model, linears))
        if config.options is not None:
            errors = steps.decompose(walk, stored, config.options)
        tables = _table_analyses(given, stored)
        errors |= {name: known.errors for name, known in tables.items()}
    with tools.clock("allocate"):
        widths = budget.choose(target, errors, price, plan.end_loss, planned_bytes)
        tried: dict[str, float] = {}
        rounded = None
        if _can_try(given, config):
            found, tried = _tried(given, walk, stored, errors, price, widths)
            rounded = tried.get(POOLED)
            # headers grow with histograms: what is over a size stays as it was
            if target.size is None or planned_bytes(widths | found) <= target.size:
                widths, rounded = widths | found, min(tried.values(), default=None)
                _say(tried, tools)
    return made(widths, key, kept, stored, tables, sharing, tried, rounded)


def _can_try(given: Given, config: CompressConfig) -> bool:
    """Whether there are errors of the end loss, and blocks that run alone, to measure them."""
    free = config.settings.end_loss and config.options is None and not config.index_bits
    return free and len(given.unseen) > 0 and not given.source.known.joined


def _tried(
    given: Given,
    walk: Walk,
    stored: sensitivity.Stored,
    errors: Mapping[str, Tensor],
    price: budget.Prices,
    widths: budget.Widths,
) -> tuple[budget.Widths, dict[str, float]]:
    """Of a few ways to spend the bits of the linears the one that is measured best."""
    linears = dataclasses.replace(price, specs={n: price.specs[n] for n in given.linears})
    bits = _bits_per_weight(given, price, widths) - SPARE
    least = linears.bits(budget.uniform(linears.specs, price.ends[0])) / linears.total
    if bits < least + FREE:
        return {}, {}

    def spend(errors: Mapping[str, Tensor], pooled: bool) -> budget.Widths:
        return budget.for_bits(errors, linears, bits, pooled)

    if not walk.store.has(TRIED, 0):
        own = {n: errors[n] for n in given.linears}
        columns = {width: column for column, width in enumerate(price.widths)}
        unseen = dataclasses.replace(walk, ids=given.unseen)
        found, tried = tried_widths(unseen, stored, own, spend, columns)
        told = {f"{TRIED}:{way}": torch.tensor(kl).double() for way, kl in tried.items()}
        walk.store.keep(TRIED, 0, found | told)
    kept = walk.store.read(TRIED, 0)
    found = {name: kept[name] for name in given.linears}
    return found, {n.split(":")[1]: float(kl) for n, kl in kept.items() if n not in found}


def _say(tried: Mapping[str, float], tools: Tools) -> None:
    best = min(tried, key=tried.__getitem__, default=POOLED)
    if best != POOLED:
        tools.notice(
            f"widths: {best}, measured better ({tried[best]:.4f} nats a token before refinement) "
            f"than {POOLED} ({tried[POOLED]:.4f})"
        )


def _table_analyses(given: Given, stored: sensitivity.Stored) -> dict[str, sensitivity.Analysis]:
    """What is known of embedding and head where they share the linears' budget."""
    if not given.tables:
        return {}
    sums, used = TableSums.from_tensors(stored.sums()), uses(given.model)
    return {
        name: analysis(table.weight.detach(), sums, used[name])
        for name, table in given.tables.items()
    }


def as_if_alike(given: Given, config: CompressConfig) -> Plan:
    """A plan without an analysis, of the right size: all rows lose alike."""
    price, planned_bytes = _prices(given, config)
    curve = torch.tensor([0.25 ** code_bits(width) for width in price.widths]).double()
    errors = {n: curve.expand(spec.rows, -1) for n, spec in price.specs.items()}
    budget.check(config.target, price, planned_bytes)
    widths = budget.choose(config.target, errors, price, True, planned_bytes)
    return _plan(given, config, price, widths, planned_bytes(widths), "", False)


def _plan(
    given: Given,
    config: CompressConfig,
    price: budget.Prices,
    widths: budget.Widths,
    planned: int,
    *known: Any,
) -> Plan:
    bits = _bits_per_weight(given, price, widths)
    tables = _bits_of(price, widths, list(given.tables)) if given.tables else None
    return Plan(widths, _specs(given, config, widths), bits, tables, planned, *known)
