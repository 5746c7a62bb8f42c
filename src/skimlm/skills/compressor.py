"""An amortised compressor: one pass of the model itself turns any skill's text into soft tokens.

    [chat prefix "Relevant Skill:\\n"] [text]      the model as it is
                        [slots of section 1]      the model, with LoRA on its attention
                        [slots of section 2] ...

    slot j of a section = E(its token j) + offset j
    soft token          = E(its token j) + P(RMSNorm(H))     H: the slot's state

    P(x) = out GELU(in x + bias) / sqrt(h)                   h: width inside; a step of Adam on
                                                             `out` moves a sum of h terms at once

Slots stand for the first tokens of sections (`section_leads` of select.py says how many), each
behind the whole text and the slots of its own section before it, and behind nothing else: the first
of a section's soft tokens are what fewer of them would have been. `out` starts at 0: what is not
trained is the sections' leads, and training can be judged by what it gains on them. The text's keys
and values are those the model has anyway when it reads the skill: nothing is adapted there, and no
gradient needs them.
After SKIM (arXiv 2606.12203), whose compressor is a second model of the size of the first.

    read(path) / write(path, compressor)     safetensors with a JSON text in its metadata
    shipped(model, tokenizer)                one that comes with the package, of this very model
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from skimlm.errors import FormatError, SkimError, first_line
from skimlm.models.blocks import decoder_of
from skimlm.models.hooks import forwards_replaced
from skimlm.runtime.decode import CACHE
from skimlm.skills import select
from skimlm.skills.document import Document
from skimlm.skills.rollout import read as read_pieces
from skimlm.skills.splice import opening
from skimlm.skills.store import HASHES, fingerprints, stale
from skimlm.storage.folder import check_out_file
from skimlm.storage.safetensors import write_file

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
KEY, FORMAT_VERSION = "skim_compressor", 1
SHIPPED = Path(__file__).with_name("compressors")
SCALE = 2.0  # of what adapters add
EPSILON = 1e-6


@dataclass(frozen=True)
class Compressor:
    """Its numbers by name, float32, and what it was made for and trained on.

    offset [K, d]; in.weight [h, d], in.bias [h], out.weight [d, h]; of every adapted linear
    NAME.a [rank, c] and NAME.b [r, rank].
    """

    values: dict[str, Tensor] = field(repr=False)
    made_for: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)  # how it was trained, and the losses

    @property
    def slots(self) -> int:
        """Soft tokens it makes of a section at most."""
        return len(self.values["offset"])


def begin(
    model: Any, tokenizer: Any, slots: int = 256, rank: int = 16, hidden: int = 1024, seed: int = 0
) -> Compressor:
    """An untrained compressor: its soft tokens are the embeddings of the sections' first tokens."""
    adapted = _adapted(model)
    if not adapted:
        raise SkimError(
            f"a compressor adapts linears named {', '.join(ADAPTED)}: this model has none"
        )
    width = model.config.get_text_config().hidden_size
    g = torch.Generator().manual_seed(seed)

    def normal(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=g) / math.sqrt(cols)

    values = {
        "offset": torch.zeros(slots, width),
        "in.weight": normal(hidden, width),
        "in.bias": torch.zeros(hidden),
        "out.weight": torch.zeros(width, hidden),
    }
    for name, linear in adapted.items():
        values[f"{name}.a"] = normal(rank, linear.in_features)
        values[f"{name}.b"] = torch.zeros(linear.out_features, rank)
    return Compressor(values, fingerprints(model, tokenizer))


def soft_tokens(
    compressor: Compressor,
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    sections: Sequence[Sequence[int]],
) -> Tensor:
    """Soft tokens [k, d] float32 in place of some of a text's tokens, ids [n].

    `sections` has their places, the first of every section (`section_leads`), at most `slots` each.
    """
    values = compressor.values
    kept = torch.tensor([place for places in sections for place in places])
    inside = torch.tensor([j for places in sections for j in range(len(places))])
    section = torch.tensor([i for i, places in enumerate(sections) for _ in places])
    words = model.get_input_embeddings()(ids[kept].to(model.device)).detach().float()
    slots = words + values["offset"][inside]
    with torch.no_grad():
        text = read_pieces(model, opening(tokenizer, [[ids]]))
    seen = (section[:, None] == section) & (inside[:, None] >= inside)
    seen = torch.cat([seen.new_ones(len(kept), text.length), seen], 1)
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, -torch.inf)
    with forwards_replaced(_adapted(model), _with_adapters(values)):
        hidden = decoder_of(model)(
            inputs_embeds=slots.to(model.dtype)[None],
            attention_mask=mask[None, None].to(model.device),
            position_ids=(text.length + inside)[None].to(model.device),
            use_cache=True,
            **{CACHE: text.lend(1)},
        ).last_hidden_state
    h = hidden[0].float()
    h = h * (h.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    h = F.gelu(F.linear(h, values["in.weight"], values["in.bias"]))
    return words + F.linear(h, values["out.weight"]) / math.sqrt(h.shape[1])


def section_leads(
    compressor: Compressor, tokenizer: Any, document: Document, k: int
) -> list[list[int]]:
    """Places by section that k soft tokens stand for; fewer where there are no more slots."""
    _, places = select.tokens(tokenizer, document.text)
    return select.section_leads(document, places, k, compressor.slots)


def shipped(model: Any, tokenizer: Any) -> Compressor | None:
    """The compressor in the package that was trained for this model, if there is one."""
    for path in sorted(SHIPPED.glob("*.safetensors")):
        if not stale(found := read(path), model, tokenizer):
            return found
    return None


def check_fits(compressor: Compressor, model: Any, tokenizer: Any, where: str) -> None:
    """Refuse a compressor of another model, tokenizer or chat template."""
    if other := stale(compressor, model, tokenizer):
        raise SkimError(
            f"{where}: was trained for another {' and '.join(other)}: "
            "train one with `skimlm skill train`"
        )


def _adapted(model: Any) -> dict[str, Any]:
    found = decoder_of(model).named_modules()
    return {name: m for name, m in found if name.rpartition(".")[2] in ADAPTED}


def _with_adapters(values: Mapping[str, Tensor]) -> Callable[[str, Any], Callable[..., Any]]:
    def make(name: str, module: Any) -> Callable[[Tensor], Tensor]:
        usual, a, b = module.forward, values[f"{name}.a"], values[f"{name}.b"]

        def forward(x: Tensor) -> Tensor:
            added: Tensor = SCALE * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            return usual(x) + added

        return forward

    return make


# ---- the file


def check_out(path: Path, force: bool) -> None:
    """Refuse an OUT that stands there already; with `force`, whatever is no compressor."""
    check_out_file(path, KEY, force)


def write(path: str | os.PathLike[str], compressor: Compressor) -> None:
    """Write a compressor in bfloat16, whole or not at all."""
    facts = {
        "format_version": FORMAT_VERSION,
        "made_for": dict(compressor.made_for),
        "facts": dict(compressor.facts),
    }
    tensors = {name: t.bfloat16().contiguous() for name, t in compressor.values.items()}
    write_file(Path(path), tensors, {KEY: json.dumps(facts)})


def read(path: str | os.PathLike[str]) -> Compressor:
    """Read a compressor; FormatError for anything that is none."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            names = list(file.keys())
            values = {name: file.get_tensor(name) for name in names} if text else {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"no readable file: {first_line(error)}", file=path) from None
    if not text:
        raise FormatError("is not a compressor of skimlm skill train", file=path)
    try:
        facts = json.loads(text)
        version, made_for = facts["format_version"], facts["made_for"]
        known = {what: str(made_for[what]) for what in HASHES}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"damaged metadata: {error}", file=path) from None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"format version {version}, this skimlm reads {FORMAT_VERSION}", file=path
        )
    for name, tensor in values.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise FormatError("is not all finite numbers", file=path, tensor=name)
    _check_shapes(path, values)
    floats = {name: tensor.float() for name, tensor in values.items()}
    return Compressor(floats, made_for | known, facts.get("facts", {}))


def _check_shapes(path: Path, values: Mapping[str, Tensor]) -> None:
    """Every tensor there and of the shape that the others ask for."""
    for name in ("offset", "in.weight", "in.bias", "out.weight"):
        if name not in values:
            raise FormatError("is missing", file=path, tensor=name)
        if values[name].dim() != (1 if name == "in.bias" else 2):
            raise FormatError(f"shape {list(values[name].shape)}", file=path, tensor=name)
    width, hidden = values["offset"].shape[-1], len(values["in.bias"])
    want: dict[str, tuple[int, ...]] = {
        "offset": (len(values["offset"]), width),
        "in.weight": (hidden, width),
        "in.bias": (hidden,),
        "out.weight": (width, hidden),
    }
    for name in set(values) - set(want):
        part = name.rpartition(".")[2]
        other = values.get(f"{name[:-2]}.{'b' if part == 'a' else 'a'}")
        if part not in ("a", "b") or other is None or other.dim() != 2 or values[name].dim() != 2:
            raise FormatError("does not belong in a compressor", file=path, tensor=name)
        rank = other.shape[1] if part == "a" else len(other)
        rows, cols = values[name].shape
        want[name] = (rank, cols) if part == "a" else (rows, rank)
    for name, shape in want.items():
        if tuple(values[name].shape) != shape:
            raise FormatError(
                f"shape {list(values[name].shape)}, should be {list(shape)}",
                file=path,
                tensor=name,
            )
