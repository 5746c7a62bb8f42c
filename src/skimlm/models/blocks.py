"""What a model is made of, found by structure: decoder blocks, their linears, its tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from skimlm.errors import SkimError


def decoder_of(model: Any) -> Any:
    """The body of a model: what makes hidden states of token ids."""
    found = model.get_decoder()
    if found is not model:  # that of llama4 with vision has a head of its own
        return found if getattr(found, "lm_head", None) is None else decoder_of(found)
    bodies = [m for m in model.children() if isinstance(m, PreTrainedModel)]
    if len(bodies) != 1:
        raise SkimError(f"{type(model).__name__} has no body of its own: it cannot be compressed")
    return bodies[0]


def decoder_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their names: of the lists in its decoder, the largest.

    A tower beside the text (vision, audio) is a model with a config of its own kind: passed over.
    """
    decoder = decoder_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    towers = [
        f"{name}."
        for name, module in decoder.named_modules(prefix=names[id(decoder)])
        if isinstance(module, PreTrainedModel) and not _reads_text(module, model)
    ]
    lists = [
        (name, module)
        for name, module in decoder.named_modules(prefix=names[id(decoder)])
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not f"{name}.".startswith(tuple(towers))
    ]
    if not lists:
        raise SkimError(
            f"no list of decoder blocks in {type(model).__name__}: its decoder holds "
            f"{', '.join(f'{n} ({type(m).__name__})' for n, m in decoder.named_children())}"
        )
    name, found = max(lists, key=lambda pair: sum(t.numel() for t in pair[1].state_dict().values()))
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]


def _reads_text(module: PreTrainedModel, model: Any) -> bool:
    return type(module.config) in (type(model.config), type(model.config.get_text_config()))


def decoder_linears(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dense: Collection[str] = (),
) -> dict[str, nn.Linear]:
    """The `nn.Linear`s inside the blocks by name, in model order, without those that stay `dense`.

    `include` and `exclude` are patterns as in a shell.
    """
    found = {
        name: module
        for prefix, block in decoder_blocks(model)
        for name, module in block.named_modules(prefix=prefix)
        if type(module) is nn.Linear and name not in dense
    }
    if not found:
        raise SkimError(f"no nn.Linear in the decoder blocks of {type(model).__name__}")
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in found):
                raise SkimError(
                    f"{option} {pattern!r} matches none of the {len(found)} linears, which are "
                    f"named like {next(iter(found))}"
                )
    wanted = {
        name: module
        for name, module in found.items()
        if (not include or any(fnmatchcase(name, p) for p in include))
        and not any(fnmatchcase(name, p) for p in exclude or ())
    }
    if not wanted:
        raise SkimError(f"include and exclude leave none of the {len(found)} linears")
    return wanted


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
