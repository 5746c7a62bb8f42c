"""What a model is made of, found by structure: decoder blocks, their linears, its tables."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from skimlm.errors import FormatError, SkimError


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their names: the ModuleList that holds the most numbers."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise SkimError(f"no decoder blocks in {type(model).__name__}")
    name, found = max(lists, key=lambda pair: sum(t.numel() for t in pair[1].state_dict().values()))
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]


def decoder_linears(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, nn.Linear]:
    """The `nn.Linear`s inside the blocks by name, in model order; patterns as in a shell."""
    found = {}
    for block_name, block in decoder_blocks(model):
        for name, module in block.named_modules(prefix=block_name):
            _refuse_fused(name, module)
            if type(module) is nn.Linear:
                found[name] = module
    if not found:
        raise SkimError(f"no nn.Linear in the decoder blocks of {type(model).__name__}")
    wanted = {
        name: module
        for name, module in found.items()
        if (not include or any(fnmatchcase(name, p) for p in include))
        and not any(fnmatchcase(name, p) for p in exclude or ())
    }
    if not wanted:
        raise SkimError(f"include and exclude leave none of the {len(found)} linears")
    return wanted


def _refuse_fused(name: str, module: nn.Module) -> None:
    """Experts fused into one 3-D parameter are refused: to skip them would fool the user."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for own, parameter in module.named_parameters(name, recurse=False):
        if parameter.ndim == 3:
            raise FormatError(
                f"fused experts {list(parameter.shape)}: mixtures of experts are not supported",
                tensor=own,
            )


def embeddings(model: Any) -> tuple[tuple[str, Any], tuple[str, Any] | None, bool]:
    """(name, module) of the input embedding, of the head if any, and whether they are tied."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return (names[id(table)], table), None, False
    tied = f"{names[id(head)]}.weight" in model.all_tied_weights_keys
    return (names[id(table)], table), (names[id(head)], head), tied


def multiplier_of(table: nn.Module) -> float | None:
    """The constant a scaled embedding multiplies by, None for a plain one; refuses other kinds."""
    if type(table) is nn.Embedding:
        return None
    value = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    if isinstance(value, (int, float)):
        return float(value)
    raise SkimError(f"cannot compress an embedding of class {type(table).__name__}: use 16 bits")
