"""What a run will take, said before it starts: memory, disk and time.

Memory is counted from shapes, in bytes: an upper estimate that measured peaks stay below
(docs/results.md). Time is arithmetic over what this processor does in a fifth of a second: within
a factor of two.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from skimlm.errors import SkimError
from skimlm.models.blocks import decoder_blocks
from skimlm.pipeline.config import Recipe
from skimlm.train.codebooks import BATCH as STEP
from skimlm.train.losses import CHUNK as HEAD_TOKENS

IMPORTED = 800_000_000  # torch and transformers themselves
KMEANS_PER_THREAD = 3e6  # weights a second, bench/kmeans.py
REFINE_PER_THREAD = 60e9  # additions and products a second


@dataclass(frozen=True)
class Needs:
    """What one way of running takes."""

    memory: int  # bytes at the peak
    scratch: int  # bytes on disk beside OUT, while it runs
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """What of a model's shapes matters here."""

    weights: int  # all of its numbers
    block: int  # those of its largest block
    width: int
    vocabulary: int
    blocks: int
    linears: list[tuple[int, int]]  # (r, c), all
    inside: list[tuple[int, int]]  # those of the largest block


def sizes(model: Any, linears: Mapping[str, nn.Linear]) -> Sizes:
    """The sizes of a model, which may be on the meta device."""
    found = decoder_blocks(model)
    name, largest = max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    table = model.get_input_embeddings().weight
    inside = [m for n, m in linears.items() if n.startswith(f"{name}.")]
    return Sizes(
        weights=sum(p.numel() for p in model.parameters()),
        block=sum(p.numel() for p in largest.parameters()),
        width=table.shape[1],
        vocabulary=table.shape[0],
        blocks=len(found),
        linears=[(m.out_features, m.in_features) for m in linears.values()],
        inside=[(m.out_features, m.in_features) for m in inside],
    )


def needs(
    s: Sizes, plan: Recipe, windows: int, batch: int, workers: int = 0, bits: float = 8
) -> tuple[Needs, Needs]:
    """What it takes to hold the whole model, and to stream it block by block.

    `workers` are processes beside this one, `bits` what is stored of a weight.
    """
    tokens = windows * plan.seq_len
    states = 2 * tokens * s.width
    at_once = batch * plan.seq_len

    def sums(shapes: list[tuple[int, int]]) -> int:
        squares = 1 if plan.end_loss else 2
        return sum(4 * squares * c * c + 4 * r * c for r, c in shapes)

    def activations(shapes: list[tuple[int, int]]) -> int:
        return 4 * at_once * sum(r + c for r, c in shapes)

    logits = 12 * min(HEAD_TOKENS, at_once) * s.vocabulary
    one = max(16 * r * c + 12 * c * c for r, c in s.linears)
    codes = sum(r * c for r, c in s.linears)
    whole = IMPORTED + 2 * s.weights + sums(s.linears)
    whole += max(activations(s.linears) + logits, one + codes * (12 if plan.steps else 1))
    outside = s.weights - s.block * s.blocks
    part = IMPORTED + 2 * max(outside, 0) + 2 * s.block + sums(s.inside) + 3 * states
    part += max(activations(s.inside), logits, one) + workers * (IMPORTED + one)
    part += 4 * s.block if plan.steps else 0  # codes, and weights looked up for the gradient
    analysed = sum(4 * c * c + 2 * r * c + 316 * r for r, c in s.linears)
    stored = round(codes * bits / 8)
    if plan.matched:  # what the original's linears of a block read, kept beside the states
        stored += 2 * tokens * sum(c for _, c in s.inside)
    seconds = _seconds(s, plan, tokens)
    return (
        Needs(whole, analysed + stored, seconds),
        Needs(part, analysed + 2 * stored + (s.blocks + 3) * states, seconds * 4 / 3),
    )


def _seconds(s: Sizes, plan: Recipe, tokens: int) -> float:
    """Forward, gradients, statistics, k-means and refinement."""
    a = torch.randn(1024, 1024).bfloat16()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.2:
        a @ a
        count += 1
    rate = count * 2 * 1024**3 / (time.perf_counter() - started)
    dense = sum(r * c for r, c in s.linears)
    squares = sum(c * c for _, c in s.linears)
    fisher = min(plan.fisher_windows * plan.seq_len, tokens)
    products = 2 * tokens * (2 * dense + squares) + 2 * fisher * dense
    products += 8 * STEP * plan.seq_len * plan.steps * dense  # and the original's outputs
    sweeps = plan.rounds * (plan.sweeps + 1)
    refined = 2 * sweeps * sum(r * c * c for r, c in s.linears)
    threads = torch.get_num_threads()
    return (
        products / rate
        + dense / (KMEANS_PER_THREAD * threads)
        + refined / (REFINE_PER_THREAD * threads)
    )


def streams(
    whole: Needs,
    part: Needs,
    limit: int | None,
    samples: int,
    shared: bool = False,
) -> bool:
    """Whether the model is streamed; SkimError for what does not fit in memory either way.

    `limit` in bytes; None: nine tenths of what is free. `shared` work is always streamed.
    """
    most = limit or int(0.9 * psutil.virtual_memory().available)
    what = "--max-memory allows" if limit else "are free"
    if whole.memory <= most and not shared:
        return False
    if part.memory > most:
        raise SkimError(
            f"about {_gb(part.memory)} of memory are needed block by block, {what} {_gb(most)}: "
            f"give fewer --samples than {samples}, or a smaller --seq-len"
        )
    return True


def check_disk(place: Any, scratch: int) -> None:
    """Refuse a run that needs more scratch than the disk of `place` has room for."""
    free = psutil.disk_usage(str(place)).free
    if scratch > free:
        raise SkimError(
            f"{place}: about {_gb(scratch)} of scratch are needed, {_gb(free)} are free"
        )


def describe(needed: Needs, streamed: bool) -> str:
    """The plan in one line."""
    how = "block by block" if streamed else "in memory"
    minutes = needed.seconds / 60
    span = f"{minutes / 60:.1f} h" if minutes > 90 else f"{max(minutes, 1):.0f} min"
    return (
        f"planned: {how}, at most {_gb(needed.memory)} of memory, {_gb(needed.scratch)} of disk "
        f"for scratch and cache, about {span}"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
