"""Attention of many short rows behind one long prefix, whose keys are read once for all rows.

transformers would copy the prefix's keys and values into every row at every step: behind 800 tokens
32 rows of SmolLM2 then take 1.1 s per sampled token on one core. Here a row's own keys grow apart
from the prefix's (1, g, p, d), all rows' queries meet those in one product, and both parts are
brought together under one softmax:

    out = (sum_i e^{s_i} v_i + sum_j e^{t_j} w_j) / (sum_i e^{s_i} + sum_j e^{t_j})    s, v: prefix

It is for the families below without sliding windows; others take transformers' own way. Gradients
flow through all of it, into the prefix too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "skimlm_shared_prefix"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # attention with scaling and nothing else


def fits(model: Any) -> bool:
    """Whether a model's attention is nothing but what is computed here."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and "full_attention" not in kinds
    return config.model_type in FAMILIES and not windowed and kinds <= {"full_attention"}


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
    if not hasattr(key, "prefix"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    keys, values = key.prefix  # [1, g, p, d]
    (b, h, n, d), g = query.shape, key.shape[1]
    r = h // g
    grouped = (query * scaling).view(b, g, r, n, d)
    far_query = grouped.transpose(0, 1).reshape(g, b * r * n, d)
    far = (far_query @ keys[0].transpose(1, 2)).float()  # [g, b r n, p]
    near = (grouped.reshape(b, g, r * n, d) @ key.transpose(2, 3)).float().view(b, g, r, n, -1)
    assert attention_mask is not None
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
