"""A skill as keys and values: of each layer and key-value head, the positions that answers look at.

    prefix = rollout.read(model, opening + text)       every position, once
    watched = watch(model, prefix, kinds)              what study queries look at, and what they get
    keep = choose(watched, kept, first)                bool [layers, heads, positions]
    pack = fit(prefix, watched, keep, first)           int8, with biases and values fitted

Study queries are the tokens of answers to study questions and of the text repeated word for word:
what is asked about a skill, and its literals (after KVzip, arXiv 2505.23416). A position counts by
the mean square of the attention it gets, and all heads of all layers compete for the same room: few
heads carry what is copied word for word, and they need most of the text, the others little of it.

What is dropped is made good in closed form, head by head (after Attention Matching, arXiv
2602.16284): a bias b_j of each kept logit, so that the kept ones weigh as much as all did, and
values that give what all gave. With a_ij the attention of query i to kept position j, weighted c_i,
and z_i the sum of all that query i then gives, its row's own tokens included,

    e^b = argmin_w sum_i c_i (sum_j a_ij w_j - mass_i)^2
    V'  = argmin_V sum_i c_i |sum_j a_ij e^{b_j} / z_i V_j - out_i|^2 + ridge
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.models.blocks import decoder_of
from skimlm.runtime.prefix import Group
from skimlm.skills import rollout
from skimlm.skills.rollout import Prefix

LAST = 4  # positions at the end of the text that every head keeps
LEAST = 8  # positions more than those that all keep, of every head
QUERIES = 2048  # tokens whose queries are looked at, at most
FORCED = 1e3  # above any square of an attention
RIDGE, PULL = 0.02, 1e-3  # towards the values and a bias of 0, of a Gram matrix' mean diagonal
LITTLE = 1e-12  # where nobody looks, nothing moves
STEPS = 200  # of the projected gradient
FEW, MANY = 0.1, 20.0  # how often a kept position may count
CHUNK = 1024  # queries whose attention to all positions stands at once


@dataclass(frozen=True)
class Pack:
    """What is kept of a text: n entries, layer after layer, head after head, as the text goes."""

    keys: Tensor = field(repr=False)  # int8 [n, d], turned to their places
    values: Tensor = field(repr=False)  # int8 [n, d]
    key_steps: Tensor = field(repr=False)  # bfloat16 [layers, heads, 2, d]: middle, and a step
    value_steps: Tensor = field(repr=False)  # bfloat16 [n]
    bias: Tensor = field(repr=False)  # float16 [n]
    places: Tensor = field(repr=False)  # int32 [n], ascending within a head
    counts: Tensor = field(repr=False)  # int32 [layers, heads]
    length: int  # positions of the text and all before it
    first: int  # of these, the ones before the text: every head keeps them

    @property
    def tokens(self) -> int:
        """Positions of the text that are kept, the mean over layers and heads."""
        return round(len(self.places) / self.counts.numel()) - self.first


@dataclass(frozen=True)
class Watched:
    """What N study queries of one layer's heads look at, in a prefix of T positions."""

    queries: Tensor  # [g, N, d], scaled
    total: Tensor  # float32 [g, N]: log of the sum over prefix and own tokens
    mass: Tensor  # float32 [g, N]: the prefix' share of it
    out: Tensor  # [g, N, d]: what comes from the prefix
    score: Tensor  # float32 [g, T]: weighted mean square of attention
    weights: Tensor  # float32 [N], adding up to 1


@torch.no_grad()
def watch(
    model: Any, prefix: Prefix, kinds: Sequence[tuple[float, Sequence[Tensor]]], seed: int = 0
) -> list[Watched]:
    """Run rows of ids behind a prefix and look, layer by layer, at their queries.

    `kinds` of rows, each with what it counts; all tokens of a kind count the same.
    """
    rows = sorted((row for _, kind in kinds for row in kind), key=len)
    share = {id(row): counts / sum(map(len, kind)) for counts, kind in kinds for row in kind}
    weights = torch.cat([torch.full((len(row),), share[id(row)]) for row in rows])
    chance = torch.Generator().manual_seed(seed)
    picked = torch.zeros(len(weights), dtype=torch.bool)
    picked[torch.randperm(len(weights), generator=chance)[:QUERIES]] = True
    weights = weights[picked] / weights[picked].sum()
    asked: list[list[tuple[Tensor, Tensor]]] = []  # by batch and layer, of the picked tokens
    done = 0
    for first in range(0, len(rows), rollout.BATCH):
        some = rows[first : first + rollout.BATCH]
        tokens = sum(map(len, some))
        asked.append(_ask(model, prefix, some, picked[done : done + tokens]))
        done += tokens
    found = []
    for layer, of_layer in zip(prefix.cache.layers, zip(*asked, strict=True), strict=True):
        queries, own = (torch.cat(parts) for parts in zip(*of_layer, strict=True))
        keys, values = layer.keys[0, :, : prefix.length], layer.values[0, :, : prefix.length]
        found.append(_watched(Group(keys.cpu(), values.cpu()), queries, own, weights))
    return found


def _ask(
    model: Any, prefix: Prefix, rows: Sequence[Tensor], picked: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """By layer, queries [tokens, h, d] of the rows' picked tokens and the log of their own sums."""
    cache = rollout.lent(model, prefix, len(rows))
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.asked = []
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    rollout.run(decoder_of(model), model, prefix, cache, ids)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    real[real.clone()] = picked
    return [
        (query.cpu().transpose(1, 2)[real], near.cpu().transpose(1, 2)[real])
        for layer in layers
        for query, near in layer.asked
    ]


def _watched(group: Group, queries: Tensor, own: Tensor, weights: Tensor) -> Watched:
    """The same of one layer: `queries` [tokens, h, d], `own` [tokens, h]."""
    (tokens, heads, d), g = queries.shape, len(group.keys)
    # the r query heads of a key-value head, one after the other for every token
    queries = queries.view(tokens, g, -1, d).transpose(0, 1).reshape(g, -1, d).contiguous()
    own = own.view(tokens, g, -1).transpose(0, 1).reshape(g, -1).contiguous()
    r = heads // g
    weights = weights.repeat_interleave(r) / r
    total, mass = torch.empty_like(own), torch.empty_like(own)
    out = torch.empty(g, tokens * r, group.values.shape[2], dtype=queries.dtype)
    score = torch.zeros(g, group.keys.shape[1])
    for h in range(g):
        # in float32: biases of keys make logits of hundreds, which bfloat16 rounds to whole nats
        keys, values = group.keys[h].float().T, group.values[h]
        for begin in range(0, tokens * r, CHUNK):
            some = slice(begin, begin + CHUNK)
            a = queries[h, some].float() @ keys
            top = a.amax(1)
            a = a.sub_(top[:, None]).exp_()  # in place: fresh memory costs more than arithmetic
            given = a.sum(1)
            total[h, some] = torch.logaddexp(given.log() + top, own[h, some])
            share = (top - total[h, some]).exp()  # what makes a the attention
            mass[h, some] = given * share
            out[h, some] = ((a.to(values.dtype) @ values) * share[:, None]).to(out.dtype)
            score[h] += (weights[some] * share.square()) @ a.square_()
    return Watched(queries, total, mass, out, score, weights)


def choose(watched: Sequence[Watched], kept: int, first: int) -> Tensor:
    """The positions to keep: bool [layers, heads, T], `kept` of them in the mean.

    All heads keep the `first` ones, the LAST, and LEAST more, as far as there is room.
    """
    score = torch.stack([layer.score for layer in watched])
    positions = score.shape[-1]
    kept = min(kept, positions)
    score[..., max(first, positions - LAST) :] = FORCED
    score[..., :first] = 2 * FORCED
    must = score.topk(min(first + LAST + LEAST, kept), dim=-1).indices
    score.scatter_(-1, must, 3 * FORCED)
    keep = torch.zeros(score.numel(), dtype=torch.bool)
    keep[score.flatten().topk(kept * score[..., 0].numel()).indices] = True
    return keep.view(score.shape)


def fit(prefix: Prefix, watched: Sequence[Watched], keep: Tensor, first: int) -> Pack:
    """Store the chosen positions of a prefix, their biases and values fitted to study queries."""
    parts = []
    for cached, seen, chosen in zip(prefix.cache.layers, watched, keep, strict=True):
        for h, mine in enumerate(chosen):
            places = mine.nonzero()[:, 0]
            keys, steps = key_codes(cached.keys[0, h].cpu()[places])
            values = cached.values[0, h].cpu()[places].float()
            bias, values = _refit(seen, h, key_values(keys, steps), values, first)
            parts.append((keys, *value_codes(values), bias, places.to(torch.int32), steps[None]))
    keys, values, scale, bias, places, steps = map(torch.cat, zip(*parts, strict=True))
    steps, counts = steps.view(*keep.shape[:2], 2, -1), keep.sum(-1).to(torch.int32)
    return Pack(keys, values, steps, scale, bias.half(), places, counts, prefix.length, first)


def _refit(
    seen: Watched, h: int, keys: Tensor, values: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Bias [k] and values [k, d] of one head's kept positions; the `first` stay as they are."""
    # a rounded key may get more than there is, of a logit far off e^88 times as much
    a = (seen.queries[h].float() @ keys.T).sub_(seen.total[h][:, None]).clamp_(max=0).exp_()
    often, free = torch.ones(len(keys)), slice(first, None)
    if len(keys) > first:
        counted = a[:, free] * seen.weights[:, None]
        others = seen.mass[h] - a[:, :first].sum(1)
        often[free] = _counts(counted.T @ a[:, free], counted.T @ others)
    a.mul_(often)
    # what the row's own tokens get keeps its share: they all stand under the same sum
    a.div_((a.sum(1) + 1 - seen.mass[h])[:, None])
    counted = a[:, free] * seen.weights[:, None]
    gram = counted.T @ a[:, free]
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + LITTLE)
    missing = seen.out[h].float() - a @ values
    values = values.clone()
    values[free] += torch.linalg.solve(gram, counted.T @ missing)
    return often.log(), values


def _counts(gram: Tensor, aim: Tensor) -> Tensor:
    """Least squares of `gram` w = `aim`, FEW <= w <= MANY, by projected gradient from ones."""
    pull = PULL * gram.diagonal().mean()
    step = 1 / (gram.abs().sum(1).max() + pull + LITTLE)
    w = torch.ones(len(gram))
    for _ in range(STEPS):
        w = (w - step * (gram @ w - aim + pull * (w - 1))).clamp_(FEW, MANY)
    return w


def key_codes(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A head's keys [n, d] as int8, and bfloat16 [2, d]: middle and step of every number.

    Some numbers of a key are hundreds of times the others, and much the same in all keys (biases,
    of Qwen2: 358 beside 1): with a step for each key, as values have, logits were off by 33.
    """
    keys = keys.float()
    middle = ((keys.amax(0) + keys.amin(0)) / 2).to(torch.bfloat16)
    step = ((keys - middle.float()).abs().amax(0) / 127).clamp(min=1e-30).to(torch.bfloat16)
    return _codes((keys - middle.float()) / step.float()), torch.stack([middle, step])


def key_values(codes: Tensor, steps: Tensor) -> Tensor:
    """What `key_codes` made them of: float32 [n, d]."""
    middle, step = steps.float()
    return middle + codes * step


def value_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n, d] as int8, and the step of each in bfloat16 [n]."""
    step = (values.float().abs().amax(1) / 127).clamp(min=1e-30).to(torch.bfloat16)
    return _codes(values / step.float()[:, None]), step


def _codes(numbers: Tensor) -> Tensor:
    return numbers.round().clamp(-127, 127).to(torch.int8)


def groups(pack: Pack, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[list[Group]]:
    """A pack as it stands before a sequence: every head of every layer a group of its own."""
    heads, sizes = pack.counts.shape[1], pack.counts.flatten().tolist()
    split = zip(pack.keys.split(sizes), pack.key_steps.flatten(0, 1), strict=True)
    keys = [key_values(*head).to(device, dtype) for head in split]
    values = (pack.values * pack.value_steps.float()[:, None]).to(device, dtype)
    parts = (keys, values.split(sizes), pack.bias.float().to(device).split(sizes))
    flat = [Group(k[None], v[None], b[None]) for k, v, b in zip(*parts, strict=True)]
    return [flat[i : i + heads] for i in range(0, len(flat), heads)]


def check_fits(pack: Pack, model: Any) -> None:
    """Refuse a pack of other layers than a model's; the model's hash says more."""
    layers = model.config.get_text_config().num_hidden_layers
    if len(pack.counts) != layers:
        raise SkimError(
            f"keys and values kept of {len(pack.counts)} layers, the model has {layers}: made for"
            " another model, compress the skill again"
        )
