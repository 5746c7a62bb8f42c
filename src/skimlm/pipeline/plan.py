"""What a run will take, said before it starts: memory, disk and time.

Memory is counted from shapes, in bytes: an upper estimate that measured peaks stay below
(docs/results.md). Time is arithmetic over what this processor does in a fifth of a second.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from skimlm.errors import SkimError
from skimlm.format.row_codes import MAX_WIDTH
from skimlm.models.blocks import decoder_blocks
from skimlm.pipeline.calibrate import BATCH
from skimlm.pipeline.config import CompressConfig
from skimlm.pipeline.machine import available_memory, processors
from skimlm.train.codebooks import BATCH as STEP
from skimlm.train.codebooks import CHECKS, HELD_OUT
from skimlm.train.losses import CHUNK as HEAD_TOKENS

IMPORTED = 800_000_000  # torch and transformers themselves
# Against SmolLM2-135M and blocks of the shapes of Qwen2.5-0.5B, 1.5B and LLaMA-2-7B on 2 cores,
# AMD EPYC (docs/log.md). Seconds are of one thread.
REACHED = 0.8  # share of a large product's rate that the linears of a pass reach
ACTIVATION = 2.2e-9  # seconds of a number that a linear reads or writes: attention, norms and so on
HALF = 0.56  # of a square of inputs is computed (calibrate.py)
KMEANS = 450e-9  # seconds of a weight: codebooks of five widths
CURVES = 850e-9  # the same of the error curves of all trellis widths
CURVE_PRODUCTS = 5  # with H, half of it, for ten widths
TRELLIS = 1100e-9  # seconds of a weight: fits of trellis rows
TRELLIS_PRODUCTS = 6  # with H in float32
TRIALS = 5  # roundings of all linears, as one pass of Viterbi each, that are measured
VITERBI = 30e-9  # seconds of a weight
UNPACK = 1.5e-9  # seconds of a weight that is trained, for each pass
LOGIT = 10e-9  # seconds of a logit that is trained: two softmaxes and what goes back
ROW = 4 + 248 + 16 + 96  # bytes that are kept of a row: its weight, centroids, scales, errors
PRODUCT_PER_THREAD = 80e9  # additions and products in float32 a second
SWEEP = 2  # products of a weight with H that a sweep over codes takes
JOINT = 32  # the same of a sweep over mask, codes and adapter
TERMS = 2**28  # bytes of logits, probabilities and their variances at a time (tables.py)
SLIM_BATCH = 4  # windows that go through together
# of logits in float32 that stand at once: cross entropy and its gradient, KL and its gradient
ENTROPY, DIVERGENCE = 3, 7
MOVING = 4 * 7  # bytes of a number that is trained, as value, gradient, moments, best
ENTRIES = 16  # of a row with a codebook that move


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


def needs(s: Sizes, config: CompressConfig, known: bool = False) -> tuple[Needs, Needs]:
    """What it takes to hold the whole model, and to stream it block by block.

    `known`: the analysis is at hand from another run.
    """
    plan, slim = config.settings, config.method == "slim"
    workers = config.workers or (0 if config.ray is None else 1)
    tokens = plan.samples * plan.seq_len
    at_once = (SLIM_BATCH if slim else BATCH) * plan.seq_len
    states = 2 * tokens * s.width
    logits = 4 * min(HEAD_TOKENS, at_once) * s.vocabulary
    one = max(itertools.starmap(_at_work, s.linears))
    codes = sum(r * c for r, c in s.linears)
    stored = round(codes * _widest(config) / 8)

    def sums(shapes: list[tuple[int, int]]) -> int:
        if known:
            return 0
        squares = 1 if plan.end_loss and not slim else 2
        return sum(4 * squares * c * c + (0 if slim else 4 * r * c) for r, c in shapes)

    def activations(shapes: list[tuple[int, int]]) -> int:
        return 4 * at_once * sum(r + c for r, c in shapes)

    def running(shapes: list[tuple[int, int]]) -> int:
        return 0 if known else activations(shapes) + (0 if slim else ENTROPY * logits)

    # slim: what the original's linears of a block read, and hidden states of both
    inputs = 2 * tokens * sum(c for _, c in s.inside) if plan.matched else 0
    kept = (2 if plan.matched else 1) * states if slim else 0
    outside = max(s.weights - s.block * s.blocks, 0)

    def training(shapes: list[tuple[int, int]]) -> int:
        """Packed layers and what moves of them, the original's outputs, one linear at work."""
        if not plan.steps:
            return 0
        borders = 2 * s.blocks * STEP * plan.seq_len * s.width
        at_work = max(6 * r * c for r, c in s.linears)
        passing = states + borders + activations(shapes) + DIVERGENCE * logits
        return stored + _moving(s, config) + passing + at_work

    # embedding and head in the pool: made dense for a product, and the terms of their logits
    tables = 4 * s.vocabulary * s.width + TERMS if config.pools_tables else 0
    whole = IMPORTED + tables + 2 * s.weights + sums(s.inside if slim else s.linears)
    whole += kept + inputs + (stored if slim else 0)
    busy = running(s.inside if slim else s.linears)
    whole += max(busy, one + (0 if slim else stored), training(s.linears))
    # statistics are dropped one after the other; slim has hidden states of both models
    left = (s.inside[0 if slim or workers else i :] for i in range(len(s.inside)))
    analysing = (sums(rest) + _at_work(*shape) for rest, shape in zip(left, s.inside, strict=True))
    part = max(one, sums(s.inside) + running(s.inside), *analysing)
    part += 2 * s.block + (3 if slim else 2) * states
    part = max(part, training(s.inside)) + workers * (IMPORTED + one)
    part += IMPORTED + tables + 2 * outside
    analysed = 0 if slim else sum(4 * c * c + 2 * r * c + ROW * r for r, c in s.linears)
    scratch = analysed + (3 if plan.steps else 2) * stored + inputs + (s.blocks + 3) * states
    rate = _rate()
    seconds = [_seconds(s, config, known, streamed, rate) for streamed in (False, True)]
    return Needs(whole, analysed + stored, seconds[0]), Needs(part, scratch, seconds[1])


def _moving(s: Sizes, config: CompressConfig) -> int:
    """Bytes of what is trained: scales, and levels, which trellis rows share."""
    entries = 1 if config.options is None else ENTRIES
    return MOVING * (1 + entries) * sum(r for r, _ in s.linears)


def _at_work(r: int, c: int) -> int:
    """Bytes while a linear [r, c] is analysed or fitted.

    H twice, damped and not, or in its own order and the stream's, and half of it in bfloat16.
    """
    return 16 * r * c + 10 * c * c


def _widest(config: CompressConfig) -> float:
    """Bits per weight that OUT holds, at most."""
    exact = config.size is None and config.index_bits is None and config.method == "skim"
    return config.target.bits if exact else MAX_WIDTH


def _seconds(
    s: Sizes, config: CompressConfig, known: bool, streamed: bool, product_rate: float
) -> float:
    """Walks over the blocks, curves, fits and training, on these threads."""
    plan, slim = config.settings, config.method == "slim"
    threads = min(torch.get_num_threads(), processors())
    rate = REACHED * product_rate
    dense = sum(r * c for r, c in s.linears)
    squares = sum(c * c for _, c in s.linears)
    sides = sum(r + c for r, c in s.linears)
    tokens = plan.samples * plan.seq_len

    def passes(count: float, tokens: int) -> float:
        """Forward passes through all blocks, or backward passes, which cost as much."""
        return count * tokens * (2 * dense / rate + sides * ACTIVATION / threads)

    head = s.vocabulary * s.width
    products = sum(2 * r * c * c for r, c in s.linears)  # of all weights with the H of theirs
    refined = products / (PRODUCT_PER_THREAD * threads)
    joint = plan.iterations * (plan.sweeps + 1) * JOINT * refined  # one fit of every linear
    seconds = 0.0
    if slim:
        walks = 2 + (3 if plan.staged else 0) + (2 if plan.matched else 0)
        gram = (3 if plan.matched else 1.5) * squares  # in float32, where a pass is in bfloat16
        seconds += passes(walks, tokens) + 2 * tokens * gram / rate + joint
    elif not known:
        fisher = min(plan.fisher_windows * plan.seq_len, tokens)
        seconds += passes(2 + streamed * (1 - 1 / s.blocks), tokens)
        seconds += (2 * (tokens * HALF * squares + fisher * dense) + 4 * tokens * head) / rate
        seconds += dense * KMEANS / threads
        if plan.end_loss:
            seconds += dense * CURVES / threads + CURVE_PRODUCTS * products / rate
    if not slim and config.options is not None:
        seconds += 2 * joint  # with an adapter to begin with, then with the widths
    elif not slim and plan.end_loss and config.index_bits is None:
        seconds += dense * (TRELLIS + TRIALS * VITERBI) / threads + TRELLIS_PRODUCTS * refined
    elif not slim:
        seconds += plan.rounds * (plan.sweeps + 1) * SWEEP * refined
    if plan.steps:
        seen = STEP * plan.seq_len * plan.steps
        checked = (CHECKS + 1) * HELD_OUT * plan.seq_len
        seconds += passes(1, tokens) + passes(3 + streamed, seen) + passes(1, checked)
        seconds += (6 * seen + 4 * checked) * head / rate
        seconds += (seen + checked) * s.vocabulary * LOGIT / threads
        seconds += dense * plan.steps * (3 + streamed) * UNPACK / threads
    return seconds


def _rate() -> float:
    """Additions and products a second of a large bfloat16 product, measured for a fifth of one."""
    a = torch.randn(1024, 1024).bfloat16()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.2:
        a @ a
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - started)


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
    most = limit or int(0.9 * available_memory())
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


def describe(needed: Needs, config: CompressConfig, streamed: bool) -> str:
    """What will run, in one line."""
    how = "streamed block by block" if streamed else "in memory"
    minutes = needed.seconds / 60
    span = f"{minutes / 60:.1f} h" if minutes > 90 else f"{max(minutes, 1):.0f} min"
    return (
        f"planned: {config.method} {config.recipe}, {how}, at most {_gb(needed.memory)} of memory, "
        f"{_gb(needed.scratch)} of disk for scratch and cache, about {span}"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
