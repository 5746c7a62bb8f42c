"""What a user asks of a compression, checked: method, recipe, size, and what linears will hold."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import skimlm
from skimlm.errors import SkimError
from skimlm.format.layer import LayerSpec
from skimlm.format.row_codes import MAX_TABLE_WIDTH, MAX_WIDTH
from skimlm.pipeline import budget, sensitivity
from skimlm.pipeline.recipes import METHODS, RECIPES, Recipe
from skimlm.quantize import slim
from skimlm.quantize.fit import WIDTHS
from skimlm.quantize.mask import Sparsity


@dataclass(frozen=True)
class Asked:
    """What the user wants, checked."""

    method: str
    recipe: str
    plan: Recipe
    options: slim.Options | None  # None: codes alone
    target: budget.Target
    embed_bits: int
    seed: int

    def facts(self, model: Path, ids: Tensor, linears: Iterable[str]) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {
            "skimlm": skimlm.__version__,
            "model": sensitivity.files(model),
            "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
            "linears": hashlib.sha256("\n".join(linears).encode()).hexdigest(),
            "method": self.method,
            "recipe": self.recipe,
            "samples": self.plan.samples,
            "seq-len": self.plan.seq_len,
            "seed": self.seed,
            "bits": self.target.bits,
            "size": self.target.size,
            "index-bits": self.target.index_bits,
            "embed-bits": self.embed_bits,
            "options": repr(self.options),
        }


def recipe_of(
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


def options_of(
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


def specs_of(
    linears: Mapping[str, nn.Linear], options: slim.Options | None, in_scale: bool
) -> dict[str, LayerSpec]:
    """How every linear will be stored, but for its widths; SkimError where that does not fit."""
    specs = {}
    for name, linear in linears.items():
        shape = linear.weight.shape
        try:
            spec = LayerSpec(*shape) if options is None else options.spec(*shape)
        except SkimError as error:
            raise SkimError(f"{name}: {error}") from None
        specs[name] = dataclasses.replace(spec, in_scale=in_scale)
    return specs
