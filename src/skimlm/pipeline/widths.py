"""Which width every row of a model gets: analyse, then spend the bits or bytes asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

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
from skimlm.pipeline.recipes import widths_of
from skimlm.pipeline.walk import Walk, analyse


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
    given: Given, config: CompressConfig
) -> tuple[budget.Prices, Callable[[budget.Widths], int]]:
    """What widths cost, and the bytes of OUT with them, every file counted."""
    possible = widths_of(config.settings, config.options)
    price = budget.prices(specs_of(given.linears, config.options, config.settings.scale), possible)
    provenance = provenance_of(config, given)

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


def _specs(given: Given, config: CompressConfig, widths: budget.Widths) -> dict[str, LayerSpec]:
    """How every linear is stored with rows of these widths."""
    specs = specs_of(given.linears, config.options, config.settings.scale)
    return {name: specs[name].with_widths(width) for name, width in widths.items()}


def allocate(given: Given, config: CompressConfig, tools: Tools, walk: Walk) -> Plan:
    """Analyse the model and choose the widths; slim has one width for all."""
    linears, plan, target = given.linears, config.settings, config.target
    price, planned_bytes = _prices(given, config)

    def made(widths: budget.Widths, *known: Any) -> Plan:
        bits, specs = price.bits(widths) / price.total, _specs(given, config, widths)
        return Plan(widths, specs, bits, planned_bytes(widths), *known)

    if config.method == "slim":
        return made(budget.uniform(price.specs, round(target.bits)), "", False, {})
    budget.check(target, price, planned_bytes)
    with tools.clock("analyse"):
        key = sensitivity.key(given.path, given.ids, plan, sorted(linears))
        stored = sensitivity.stored(tools.cache, key, linears)
        kept = analyse(walk, stored, plan)
        errors = {n: stored.errors(n) for n in linears}
        sharing = sum(stored.tokens(n) < FEW for n in routed(given.model, linears))
        if config.options is not None:
            errors = steps.decompose(walk, stored, config.options)
    with tools.clock("allocate"):
        widths = budget.choose(target, errors, price, plan.end_loss, planned_bytes)
    return made(widths, key, kept, stored, sharing)


def as_if_alike(given: Given, config: CompressConfig) -> Plan:
    """A plan without an analysis, of the right size: all rows lose alike."""
    linears = given.linears
    price, planned_bytes = _prices(given, config)
    curve = torch.tensor([0.25 ** code_bits(width) for width in price.widths]).double()
    errors = {n: curve.expand(m.out_features, -1) for n, m in linears.items()}
    budget.check(config.target, price, planned_bytes)
    widths = budget.choose(config.target, errors, price, True, planned_bytes)
    bits = price.bits(widths) / price.total
    specs = _specs(given, config, widths)
    return Plan(widths, specs, bits, planned_bytes(widths), "", False, {})
