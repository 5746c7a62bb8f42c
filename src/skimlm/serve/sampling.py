"""The next token of logits: the likeliest, or drawn by a seed of the request's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skimlm.serve.shape import Rule

COLDEST = 1e-5  # as good as greedy, and no overflow


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a temperature of 0 is greedy.

    Of the likeliest tokens those are drawn from that together have `top_p`, `top_k` at most (0:
    any). Logits of tokens that were said before become less by `presence`, and by `frequency` for
    every time; `bias` is added to logits by id. A `rule` says which tokens may come at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    rule: Rule | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the likeliest token, nothing else looked at."""
        return not (self.temperature or self.presence or self.frequency or self.bias or self.rule)


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, how: Sampling) -> None:
        self.how = how
        self.chance = torch.Generator().manual_seed(how.seed)

    def choose(self, logits: Tensor, said: Sequence[int]) -> int:
        """A token for logits [vocabulary], `said` being the answer so far."""
        how = self.how
        if how.rule is not None:
            allowed = how.rule.allowed()[: len(logits)]
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        token = self._choose(logits, said)
        if how.rule is not None:
            how.rule.take(token)
        return token

    def _choose(self, logits: Tensor, said: Sequence[int]) -> int:
        how = self.how
        logits = logits.float().cpu() if how.plain else logits.float().cpu().clone()
        if how.bias:
            ids = torch.tensor([*how.bias])
            logits[ids] += torch.tensor([*how.bias.values()])
        if said and (how.presence or how.frequency):
            ids, counts = torch.tensor(said).unique(return_counts=True)
            logits[ids] -= how.presence + how.frequency * counts
        if how.temperature == 0:
            return int(logits.argmax())
        logits = (logits - logits.max()) / max(how.temperature, COLDEST)
        return int(self._draw(logits.softmax(0)))

    def _draw(self, chances: Tensor) -> Tensor:
        how = self.how
        if how.top_k == 0 and how.top_p >= 1:
            return torch.multinomial(chances, 1, generator=self.chance)[0]
        chances, ids = chances.sort(descending=True, stable=True)
        before = chances.cumsum(0) - chances  # of all likelier ones
        chances[1:][before[1:] >= how.top_p] = 0  # the likeliest stays, however little top_p is
        if how.top_k:
            chances[how.top_k :] = 0
        return ids[torch.multinomial(chances, 1, generator=self.chance)[0]]
