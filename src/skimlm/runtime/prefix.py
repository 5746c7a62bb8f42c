"""Attention of many short rows behind one long prefix, whose keys are read once for all rows.

transformers would copy the prefix's keys and values into every row at every step: behind 800 tokens
32 rows of SmolLM2 then take 1.1 s per sampled token on one core. Here a row's own keys grow apart
from the prefix's (1, g, p, d), all rows' queries meet those in one product, and both parts are
brought together under one softmax:

    out = (sum_i e^{s_i} v_i + sum_j e^{t_j} w_j) / (sum_i e^{s_i} + sum_j e^{t_j})    s, v: prefix

It is for models of the families below whose attention is transformers' own, plain and unchanged
(`fits`); all others take transformers' way, with the same numbers. Gradients flow through all of
it, into the prefix too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from skimlm.errors import SkimError

NAME = "skimlm_shared_prefix"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # attention with scaling and nothing else


PLAIN = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")  # all compute the same


def fits(model: Any) -> bool:
    """Whether a model's attention is nothing but what is computed here: known, not guessed."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and "full_attention" not in kinds
    if config.model_type not in FAMILIES or windowed or not kinds <= {"full_attention"}:
        return False
    if model.config._attn_implementation not in PLAIN:
        return False
    if model.training and getattr(config, "attention_dropout", 0):
        return False
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and _attends(m)]
    home = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    own = all(_unchanged(module, home) for module in layers)
    return own and len(layers) == config.num_hidden_layers


def _attends(module: Any) -> bool:
    return any(c.__name__.endswith("Attention") for c in type(module).__mro__)


def _unchanged(module: Any, home: str) -> bool:
    """Whether a module runs the code of its class in the file `home`, and that is transformers'."""
    forward = type(module).forward
    here = type(module).__module__ == home and forward.__module__ == home
    return here and "forward" not in vars(module)


class SharedCache(DynamicCache):
    """The rows' own keys and values; the prefix's go along with them, as an attribute."""

    def __init__(self, prefix: DynamicCache, length: int) -> None:
        super().__init__()
        self.prefix, self.length = prefix, length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any
    ):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kw)
        layer = self.prefix.layers[layer_idx]
        keys = keys.view_as(keys)  # a tensor of this call: the attribute must not reach the cache's
        keys.prefix = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen: where the next token stands."""
        return self.length + super().get_seq_length(layer_idx)


@contextmanager
def shared(model: Any) -> Iterator[None]:
    """While it lasts the model attends in this way."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def causal_mask(own: int, new: int, seen: Tensor | None = None) -> Tensor:
    """What `new` tokens see of their own row's `own` ones: bool [1 or b, 1, new, own].

    `seen` [b, own] is False for pads. A pad sees itself: rows of nothing would be NaN.
    """
    mask = torch.ones(new, own, dtype=torch.bool).tril(own - new)[None, None]
    if seen is None:
        return mask
    diagonal = torch.ones(new, own, dtype=torch.bool).tril(own - new).triu(own - new)
    return (mask & seen[:, None, None, :]) | diagonal


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [b, h, n, d] over the prefix and the rows' own keys [b, g, t, d]."""
    if not hasattr(key, "prefix") or attention_mask is None or dropout:
        raise SkimError(
            f"{type(module).__name__} changes keys behind the cache, drops the mask or drops out:"
            " skills cannot be measured with this model's attention"
        )
    keys, values = key.prefix  # [1, g, p, d]
    (b, h, n, d), g = query.shape, key.shape[1]
    r = h // g
    grouped = (query * scaling).view(b, g, r, n, d)
    far_query = grouped.transpose(0, 1).reshape(g, b * r * n, d)
    far = (far_query @ keys[0].transpose(1, 2)).float()  # [g, b r n, p]
    near = (grouped.reshape(b, g, r * n, d) @ key.transpose(2, 3)).float().view(b, g, r, n, -1)
    near = near.masked_fill(~attention_mask[:, :, None], -torch.inf)
    far_top = far.amax(-1).view(g, b, r, n).transpose(0, 1)
    top = torch.maximum(far_top, near.amax(-1)).detach()  # [b, g, r, n]
    # in place: fresh memory of this size costs more in page faults than the arithmetic
    far = far.sub_(top.transpose(0, 1).reshape(g, -1, 1)).exp_()
    near = near.sub_(top[..., None]).exp_()
    total = far.sum(-1).view(g, b, r, n).transpose(0, 1) + near.sum(-1)
    out = (far.to(value.dtype) @ values[0]).view(g, b, r, n, d).transpose(0, 1).float()
    out = out + (near.to(value.dtype).view(b, g, r * n, -1) @ value).view(b, g, r, n, d)
    out = (out / total[..., None]).to(value.dtype)
    return out.reshape(b, h, n, d).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
