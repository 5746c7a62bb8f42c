"""What a checkpoint's files hold, against what its model has: nothing is dropped without a word."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from skimlm.errors import FormatError

# tables that older models stored and every model makes anew: positions, rotations, causal masks
MADE = re.compile(
    r"(^|\.)(position_ids|masked_bias|causal_mask|rotary_emb\.\w+|(original_)?inv_freq"
    r"|att(entio)?n\.(attention\.)?bias)$"
)
NAMED = 3  # tensors that a message names


def left_out(model: Any, names: Collection[str]) -> list[str]:
    """Those of a checkpoint's tensors that its model's class leaves out on purpose."""
    own = model.state_dict().keys()
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return [
        name
        for name in sorted(names)
        if name not in own
        and not MADE.search(name)
        and any(re.search(pattern, name) for pattern in patterns)
    ]


def check_extra(model: Any, names: Collection[str], files: Mapping[str, Path], path: Path) -> None:
    """Refuse tensors `names` that are no part of the model, but for those it makes itself."""
    made = {name for name, _ in model.named_buffers()}
    extra = sorted(n for n in names if n not in made and not MADE.search(n))
    extra = [name for name in extra if name not in left_out(model, extra)]
    if extra:
        raise FormatError(
            f"is stored, but {type(model).__name__} has none as config.json describes it"
            f"{_more(extra)}: mend config.json or take it out of the checkpoint",
            file=files.get(extra[0], path),
            tensor=extra[0],
        )


def _more(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    others = ", ".join(names[1:NAMED])
    return f" (nor {others}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''})"


def untie_stored(model: Any, config: Any, files: Mapping[str, Path]) -> None:
    """Make the config say that the head is its own where the files hold one of other numbers.

    transformers then uses both tables, whatever the config says; a folder made of such a model
    would tie them again.
    """
    for name, source in model.all_tied_weights_keys.items():
        if name not in files or source not in files:
            continue
        if not torch.equal(_read(files, name), _read(files, source)):
            if model.get_submodule(name.rpartition(".")[0]) is not model.get_output_embeddings():
                reason = f"differs from {source}, but the config ties them"
                raise FormatError(reason, file=files[name], tensor=name)
            untie(config)


def untie(config: Any) -> None:
    """The config of a model whose head is a table of its own."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _read(files: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as stream:
        return stream.get_tensor(name)
