"""Answers sampled from the model, and what it thinks of given answers, behind one shared prefix.

    prefix = read(model, pieces)                   keys and values of everything before the question
    answers = sample(model, prefix, questions)     batched; nothing of the prefix is read again
    hidden = score(model, prefix, questions, answers)   states that predict the answers' tokens

A prefix is read once, at batch 1, and its keys and values are lent to every row of a batch. Rows
that are scored are padded on the right, where causal attention does not look: a row's result does
not depend on its batch mates. Gradients flow through `score` and `read` into soft tokens.

Divergence is over the whole vocabulary, in nats per token of the answer:

    KL(teacher || student) = sum_v p_T(v) (log p_T(v) - log p_S(v))

A teacher's final states (d numbers a token) are kept instead of its logits: the head runs again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from skimlm.models.blocks import decoder_of
from skimlm.runtime.decode import CACHE
from skimlm.runtime.prefix import PrefixCache, attending, causal_mask, fits, whole
from skimlm.skills.splice import Piece, embed

BATCH = 16  # rows at a time without gradients
MAX_LOGITS = 2**24  # floats of logits at once: 64 MB, 341 tokens at a vocabulary of 49,152


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first `length` positions, batch 1."""

    cache: DynamicCache
    length: int

    def lend(self, rows: int) -> DynamicCache:
        """A cache for `rows` rows that grows by itself and leaves this one as it is."""
        twin = copy.copy(self.cache)
        twin.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in twin.layers:
            layer.keys = layer.keys[:, :, : self.length].expand(rows, -1, -1, -1)
            layer.values = layer.values[:, :, : self.length].expand(rows, -1, -1, -1)
        return twin

    def cut(self, length: int) -> Prefix:
        """The same for fewer positions: causal attention makes it what `read` would give."""
        return Prefix(self.cache, length)


def run(
    body: Any,
    model: Any,
    prefix: Prefix,
    cache: DynamicCache,
    ids: Tensor,
    pads: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """One call of `body` (the model or its decoder) for ids [b, l] behind `prefix` and `cache`.

    `pads` [b, t] is True for pads among the rows' own t tokens so far, these included.
    """
    rows, new = ids.shape
    own = cache.get_seq_length() - prefix.length + new
    place = torch.arange(prefix.length + own - new, prefix.length + own).expand(rows, new)
    if pads is not None:
        place = place - pads.sum(1, keepdim=True)
    kwargs |= {"position_ids": place.clamp(min=0).to(model.device), "use_cache": True}
    ids = ids.to(model.device)
    if isinstance(cache, PrefixCache):
        mask = causal_mask(own, new, None if pads is None else ~pads).to(model.device)
        with attending(model):
            return body(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **kwargs)
    return body(input_ids=ids, **{CACHE: cache}, **kwargs)


def shares(model: Any, prefix: Prefix) -> bool:
    """Whether rows can share the prefix's keys in place of having copies; there must be some."""
    return prefix.length > 0 and fits(model)


def lent(model: Any, prefix: Prefix, rows: int) -> DynamicCache:
    """A cache behind `prefix` for `rows` rows, by the faster way where it is possible."""
    if isinstance(prefix.cache, PrefixCache):
        return prefix.cache.fresh()
    if shares(model, prefix):
        return PrefixCache(whole(prefix.cache, prefix.length), prefix.length)
    return prefix.lend(rows)


def read(model: Any, pieces: Sequence[Piece], after: Prefix | None = None) -> Prefix:
    """Run `pieces` through the model's body, behind another prefix if given."""
    if not pieces:  # no chat template, no BOS and no skill: nothing stands before a question
        return after or Prefix(DynamicCache(), 0)
    embedded = embed(model, pieces)
    if after and isinstance(after.cache, PrefixCache):
        cache: DynamicCache = after.cache.fresh()
        with attending(model):
            decoder_of(model)(inputs_embeds=embedded, use_cache=True, **{CACHE: cache})
        cache = cache.absorbed()
        return Prefix(cache, cache.get_seq_length())
    cache = after.lend(1) if after else DynamicCache()  # no config: keep all, windows are masks
    decoder_of(model)(inputs_embeds=embedded, use_cache=True, **{CACHE: cache})
    return Prefix(cache, (after.length if after else 0) + embedded.shape[1])


@torch.no_grad()
def sample(
    model: Any,
    prefix: Prefix,
    questions: Sequence[Tensor],
    tokens: int,
    *,
    ends: Sequence[int] = (),
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 32,
) -> list[Tensor]:
    """Answers of up to `tokens` tokens, one per question (ids [t]); 0 is greedy.

    An answer ends with the first of `ends`, which is part of it. The same seed gives the same
    answers, whatever other questions there are.
    """
    answers: dict[int, Tensor] = {}
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    while order:
        some = order[:batch]
        if not shares(model, prefix):  # a sliding window would count the pads of shorter rows
            some = [i for i in some if len(questions[i]) == len(questions[some[0]])]
        order = order[len(some) :]
        rows = [questions[i] for i in some]
        seeds = [torch.Generator().manual_seed(seed + i) for i in some]
        made = _sample_batch(model, prefix, rows, tokens, ends, temperature, seeds)
        answers |= zip(some, made, strict=True)
    return [answers[i] for i in range(len(questions))]


def _sample_batch(
    model: Any,
    prefix: Prefix,
    questions: Sequence[Tensor],
    tokens: int,
    ends: Sequence[int],
    temperature: float,
    seeds: Sequence[torch.Generator],
) -> list[Tensor]:
    """Left padding here: all rows then go on at the same place; pads are masked out."""
    rows, wide = len(questions), max(len(q) for q in questions)
    ids = torch.zeros(rows, wide, dtype=torch.long)
    pads = torch.zeros(rows, wide + tokens, dtype=torch.bool)
    for i, question in enumerate(questions):
        ids[i, wide - len(question) :] = question
        pads[i, : wide - len(question)] = True
    cache = lent(model, prefix, rows)
    new = torch.zeros(rows, 0, dtype=torch.long)
    going = torch.ones(rows, dtype=torch.bool)
    for step in range(tokens):
        last = ids if step == 0 else new[:, -1:]
        out = run(model, model, prefix, cache, last, pads[:, : wide + step], logits_to_keep=1)
        chosen = _choose(out.logits[:, -1].float().cpu(), temperature, seeds)
        new = torch.cat([new, chosen[:, None]], 1)
        going &= torch.tensor([int(token) not in ends for token in chosen])
        if not going.any():
            break
    return [_until(row, ends) for row in new]


def _choose(logits: Tensor, temperature: float, seeds: Sequence[torch.Generator]) -> Tensor:
    if temperature == 0:
        return logits.argmax(1)
    chance = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in seeds])
    upto = (logits / temperature).softmax(1).cumsum(1, dtype=torch.float64)
    return torch.searchsorted(upto, chance * upto[:, -1:], right=True)[:, 0]


def _until(ids: Tensor, ends: Sequence[int]) -> Tensor:
    for i, token in enumerate(ids.tolist()):
        if token in ends:
            return ids[: i + 1]
    return ids


def score(
    model: Any, prefix: Prefix, questions: Sequence[Tensor], answers: Sequence[Tensor]
) -> Tensor:
    """Final hidden states [sum of answers' tokens, d] that predict the answers, in order."""
    rows = [torch.cat([q, a[:-1]]) for q, a in zip(questions, answers, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    cache = lent(model, prefix, len(rows))
    hidden = run(decoder_of(model), model, prefix, cache, ids).last_hidden_state
    parts = [
        hidden[i, len(q) - 1 : len(q) - 1 + len(a)]
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    return torch.cat(parts)


@torch.no_grad()
def score_all(
    model: Any,
    prefix: Prefix,
    questions: Sequence[Tensor],
    answers: Sequence[Tensor],
    batch: int = BATCH,
) -> list[Tensor]:
    """States [t, d] for every answer; rows of like length go together."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]) + len(answers[i]))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        own = [answers[i] for i in some]
        hidden = score(model, prefix, [questions[i] for i in some], own)
        found |= zip(some, hidden.split([len(a) for a in own]), strict=True)
    return [found[i] for i in range(len(questions))]


def chunk(model: Any) -> int:
    """Tokens whose logits stand at once."""
    return max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
