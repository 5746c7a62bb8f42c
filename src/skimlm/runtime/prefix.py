"""Attention behind a prefix whose keys and values are no part of the cache that grows.

    cache = PrefixCache(layers, length)     its rows are empty, their next token's place is `length`
    with attending(model): model(ids, past_key_values=cache)

The prefix is read once for all rows of a batch. transformers would copy its keys and values into
every row at every step: behind 800 tokens 32 rows of SmolLM2 then take 1.1 s per sampled token on
one core. Of a prefix's positions each key-value head may keep others, and its own number of them,
which no tensor of transformers' caches can hold. A row's own keys grow apart from those of the
prefix, all rows' queries meet these in one product, and both are brought together by one softmax:

    out = (sum_i e^{s_i} v_i + sum_j e^{t_j} w_j) / (sum_i e^{s_i} + sum_j e^{t_j})    s, v: prefix

It is for models of the families below whose attention is transformers' own, plain and unchanged
(`fits`). Gradients flow through all of it, into the prefix too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import sdpa_mask

from skimlm.errors import SkimError

NAME = "skimlm_prefix"
FAMILIES = (  # attention with scaling and nothing else: tests hold each against the whole text
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi", "phi3"),
    *("gemma", "olmo", "olmo2", "olmoe", "granite", "granitemoe", "smollm3", "starcoder2"),
    *("stablelm", "glm", "glm4", "ernie4_5", "cohere", "helium", "seed_oss", "arcee", "nemotron"),
    *("hunyuan_v1_dense", "apertus", "persimmon", "bitnet"),
    *("gpt2", "gpt_neox", "gpt_bigcode", "biogpt", "opt"),
)
PLAIN = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")  # all compute the same


class Group(NamedTuple):
    """Neighbouring key-value heads of a layer that have equally many positions.

    A layer's groups are its heads in order: one of all, or one of each where their numbers differ.
    """

    keys: Tensor  # [g, p, d]
    values: Tensor  # [g, p, d]
    # float32 [g, p], of the logits: its exponential is how often a position counts
    bias: Tensor | None = None


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


class _Behind:
    """A layer of a cache, behind `groups` that stand for `length` positions.

    A list `asked` gets, of every call, the scaled queries [b, h, n, d] and, in float32, the
    log [b, h, n] of what they give their row's own keys: sum_j e^{t_j}.
    """

    groups: Sequence[Group]
    length: int
    asked: list[tuple[Tensor, Tensor]] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        keys, values = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        keys = keys.view_as(keys)  # a tensor of this call: the attribute must not reach the cache's
        keys.behind = self
        return keys, values

    def get_seq_length(self) -> Any:
        """Positions so far: where the next token stands."""
        return self.length + super().get_seq_length()  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What a mask is for: the rows' own tokens, which begin at `length`."""
        own, _ = super().get_mask_sizes(query_length)  # type: ignore[misc]
        return own, self.length


class PrefixLayer(_Behind, DynamicLayer):
    """One that grows."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As above; transformers counts with `get_seq_length`."""
        return self.get_seq_length() - self.length + query_length, self.length


class StaticPrefixLayer(_Behind, StaticLayer):
    """One whose room is made once."""


class PrefixCache(DynamicCache):
    """The rows' own keys and values behind a prefix: `layers` has its groups, layer by layer.

    `length` positions were taken by the text that the prefix stands for. With `room` there is place
    for so many tokens of a row and no more, made once (transformers' static cache).
    """

    def __init__(
        self, layers: Sequence[Sequence[Group]], length: int, room: int | None = None
    ) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [PrefixLayer() if room is None else StaticPrefixLayer(room) for _ in layers]
        for layer, groups in zip(self.layers, layers, strict=True):
            layer.groups, layer.length = groups, length

    def fresh(self) -> PrefixCache:
        """Another one behind the same prefix, without the rows' own tokens."""
        return PrefixCache([layer.groups for layer in self.layers], self.layers[0].length)

    def absorbed(self) -> PrefixCache:
        """Another one, whose prefix goes on with the tokens of this one's only row."""
        layers = [_extended(layer.groups, layer.keys[0], layer.values[0]) for layer in self.layers]
        return PrefixCache(layers, self.get_seq_length())


def _extended(groups: Sequence[Group], keys: Tensor, values: Tensor) -> list[Group]:
    """Groups with more positions, keys and values [heads, t, d]."""
    made, at = [], 0
    for group in groups:
        own = keys[at : at + len(group.keys)], values[at : at + len(group.keys)]
        at += len(group.keys)
        bias = group.bias
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(own[0].shape[:2])], 1)
        longer = [torch.cat([a, b], 1) for a, b in zip(group[:2], own, strict=True)]
        made.append(Group(longer[0], longer[1], bias))
    return made


def whole(cache: DynamicCache, length: int) -> list[list[Group]]:
    """The first `length` positions of a cache of one row, all heads alike."""
    return [[Group(n.keys[0, :, :length], n.values[0, :, :length])] for n in cache.layers]


@contextmanager
def attending(model: Any) -> Iterator[None]:
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


def always_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers makes for torch's attention, also where it could do without."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


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
    if not hasattr(key, "behind") or attention_mask is None or dropout:
        raise SkimError(
            f"{type(module).__name__} changes keys behind the cache, drops the mask or drops out:"
            " skills cannot be measured with this model's attention"
        )
    layer, heads = key.behind, query.shape[1] // key.shape[1]
    check_sizes(layer.groups, key, value)
    parts: list[tuple[Tensor, ...]] = []
    at = 0
    for group in layer.groups:
        end = at + len(group.keys)
        own = key[:, at:end], value[:, at:end]
        some = query[:, at * heads : end * heads] * scaling
        parts.append((some, *_attend(some, own, group, attention_mask)))
        at = end
    if len(parts) > 1:  # heads again side by side
        parts = [tuple(torch.cat(some, 1) for some in zip(*parts, strict=True))]
    ((queries, out, near),) = parts
    if layer.asked is not None:
        layer.asked.append((queries, near))
    return out.transpose(1, 2), None


def check_sizes(groups: Sequence[Group], key: Tensor, value: Tensor) -> None:
    """Refuse a prefix of other heads or sizes than a layer's own keys and values."""
    got = sum(len(n.keys) for n in groups), groups[0].keys.shape[2], groups[0].values.shape[2]
    want = key.shape[1], key.shape[3], value.shape[3]
    if got != want:
        raise SkimError(
            f"keys and values kept of {got[0]} heads of {got[1]}, the model has {want[0]} of"
            f" {want[1]}: made for another model, compress the skill again"
        )


def _attend(
    query: Tensor, own: tuple[Tensor, Tensor], prefix: Group, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for the heads of one group: `query` [b, g r, n, d], `own` [b, g, t, d].

    Gives the output and the log of what the queries give their own keys.
    """
    key, value = own
    (b, h, n, d), g = query.shape, key.shape[1]
    r = h // g
    grouped = query.view(b, g, r, n, d)
    far_query = grouped.transpose(0, 1).reshape(g, b * r * n, d)
    # in float32, as torch's own attention has them: logits of bfloat16 are off by 1/256
    far = far_query.float() @ prefix.keys.float().transpose(1, 2)  # [g, b r n, p]
    far = far if prefix.bias is None else far + prefix.bias[:, None]
    near = grouped.reshape(b, g, r * n, d).float() @ key.float().transpose(2, 3)
    near = near.view(b, g, r, n, -1)
    near = near.masked_fill(~mask[:, :, None], -torch.inf)
    far_top = far.amax(-1).view(g, b, r, n).transpose(0, 1)
    top = torch.maximum(far_top, near.amax(-1)).detach()  # [b, g, r, n]
    # in place: fresh memory of this size costs more in page faults than the arithmetic
    far = far.sub_(top.transpose(0, 1).reshape(g, -1, 1)).exp_()
    near = near.sub_(top[..., None]).exp_()
    own_total = near.sum(-1)
    total = far.sum(-1).view(g, b, r, n).transpose(0, 1) + own_total
    out = (far.to(value.dtype) @ prefix.values).view(g, b, r, n, -1).transpose(0, 1).float()
    out = out + (near.to(value.dtype).view(b, g, r * n, -1) @ value).view_as(out)
    out = (out / total[..., None]).to(value.dtype)
    return out.reshape(b, h, n, -1), (own_total.log() + top).reshape(b, h, n)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, always_mask)
