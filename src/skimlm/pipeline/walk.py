"""One walk over the blocks of a model, in memory or not, every step of it to be resumed.

    source   gives block after block with its numbers (models/source.py): in memory, folder, GGUF
    store    keeps what is between blocks (states.py): in memory, or files of the unfinished run

    analyse  forward     hidden states before every span of blocks
             backward    last span first: run again with gradients, its linears analysed
    each     a function of one linear and its analysis, for every linear: fit, decompose, compose
    follow   block after block fitted to what the compressed ones before it give: slim, training
    packed   what OUT holds of the blocks, to be written

A span is what is in memory together: all blocks, or one. The numbers do not depend on it: the same
windows go through in the same batches. In the store lie, each whole:
    inputs-K                  hidden states before span K [n, t, d], with what else blocks hand on
                              (models/carried.py); gone once it is analysed
    gradient-K                d loss / d inputs-K: the analysis of span K and all after it is kept
    head-0                    sums for the head, until those for the embedding are there too
    first-I                   adapters and errors of block I to begin with (sparsity, adapters)
    original-I, compressed-I  hidden states before block I, in the model and in what becomes of it
    packed-I                  what OUT holds of block I
    unrefined-0               that it is not refined, for that was measured worse
    tried-0                   widths that were measured best, with what was measured
    tables-0                  what OUT holds of embedding and head, if they are layers too
    final-0                   what the model's head was given: what a training aims at
    trained-I                 what OUT holds of block I after a training
Before the first block hidden states are the embeddings, which are not kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from skimlm.models.carried import State
from skimlm.models.hooks import frozen
from skimlm.models.source import BlockSource, Span
from skimlm.models.structure import stacks
from skimlm.pipeline import sensitivity
from skimlm.pipeline.calibrate import BATCH, Statistics, Sums, observed
from skimlm.pipeline.config import Recipe
from skimlm.pipeline.states import StateStore
from skimlm.pipeline.tables import TableSums, observed_tables
from skimlm.pipeline.workers import Submit, here
from skimlm.train.losses import backward, cross_entropy, next_tokens

HEAD, TABLES = "head", "tables"
Progress = Callable[[str, int, int], None]
FitBlock = Callable[[int, State | None, State | None], dict[str, Tensor]]
Result = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Walk:
    """What the steps of a walk share."""

    source: BlockSource
    linears: Mapping[str, nn.Linear]  # those to compress
    ids: Tensor  # calibration windows [n, t]
    store: StateStore
    submit: Submit = here
    progress: Progress = lambda *_: None
    tables: bool = False  # embedding and head are analysed too

    @cached_property
    def batch(self) -> int:
        """Windows that go through together; one alone where experts would mix their tokens."""
        return 1 if stacks(self.source.model, self.linears) else BATCH

    def inside(self, span: Span) -> dict[str, nn.Linear]:
        """The linears of these blocks that are to be compressed."""
        prefixes = tuple(f"{self.source.blocks[i]}." for i in span)
        return {n: m for n, m in self.linears.items() if n.startswith(prefixes)}

    def state(self, kind: str, i: int) -> State | None:
        """Hidden states, and what goes with them, that are kept; None before the first block."""
        return self.store.read(kind, i) if i else None

    def leaves(self, kind: str, i: int, rows: slice) -> State | None:
        """Copies of the windows `rows` of `state`, that get gradients where they can have one."""
        if not i:
            return None
        kept = self.store.read_rows(kind, i, rows)
        return {n: t.requires_grad_(t.is_floating_point()) for n, t in kept.items()}

    @cached_property
    def before(self) -> list[int]:
        """How many linears stand before each block, and before the end."""
        blocks = range(len(self.source.blocks))
        return list(accumulate((len(self.inside(range(i, i + 1))) for i in blocks), initial=0))

    def tell(self, phase: str, i: int, more: int = 0) -> None:
        """Say that the linears of all blocks before `i` are done, and `more` of its own."""
        self.progress(phase, self.before[i] + more, len(self.linears))

    def run(self, span: Span, rows: slice | Tensor, state: State | None) -> tuple[State, Tensor]:
        """What these blocks make of the windows `rows` of `state`; what the body then returns."""
        # a copy: views of a file are not aligned, and stay in memory while they are used
        part = None if state is None else {n: t[rows].clone() for n, t in state.items()}
        return self.source.run(span, self.ids[rows], part)

    def advance(
        self,
        span: Span,
        state: State | None,
        batch: int,
        after: Callable[[int], None] = lambda _: None,
    ) -> State:
        """The state behind these blocks; `after(number)` is called after each batch."""
        out: dict[str, Tensor] = {}
        for number, rows in enumerate(batches(len(self.ids), batch)):
            for name, part in self.run(span, rows, state)[0].items():
                if name not in out:
                    out[name] = part.new_empty(len(self.ids), *part.shape[1:])
                out[name][rows] = part
            after(number)
        return out

    def final(self, span: Span, state: State | None, batch: int) -> Tensor:
        """What the body returns when these are its last blocks, [n, t, d]."""
        rows = batches(len(self.ids), batch)
        return torch.cat([self.run(span, some, state)[1] for some in rows])


def batches(count: int, batch: int) -> list[slice]:
    """Windows that go through together."""
    return [slice(i, min(i + batch, count)) for i in range(0, count, batch)]


# ---- analysis


def analyse(walk: Walk, stored: sensitivity.Stored, plan: Recipe) -> bool:
    """Fill `stored`; whether it was all there already."""
    missing = set(stored.missing())
    if not missing and (stored.has_sums or not walk.tables):
        return True
    store, spans = walk.store, walk.source.spans
    done = next((k for k in range(len(spans)) if store.has("gradient", k)), len(spans))
    gone = any(name in missing for span in spans[done:] for name in walk.inside(span))
    if walk.tables and not stored.has_sums:  # the embedding's are complete behind the first block
        gone |= done == 0 or (done < len(spans) and not store.has(HEAD, 0))
    if gone:
        for k in range(len(spans)):  # the cache was deleted since: begin anew
            store.drop("gradient", k)
        done = len(spans)
    with torch.no_grad(), frozen(walk.source.model):
        _forward(walk, done - 1)
        if not walk.tables:
            _backward(walk, stored, plan, done)
            return False
        sums = TableSums.of(walk.source.model)
        if done < len(spans):
            sums = TableSums.from_tensors(store.read(HEAD, 0))
        with observed_tables(walk.source.model, sums):
            _backward(walk, stored, plan, done, lambda: store.keep(HEAD, 0, sums.tensors()))
        stored.keep_sums(sums.tensors())
        store.drop(HEAD, 0)
    return False


def _forward(walk: Walk, last: int) -> None:
    """Keep the inputs of all spans up to `last`; those that are there already stay."""
    store, spans = walk.store, walk.source.spans
    begin = next((k for k in range(1, last + 1) if not store.has("inputs", k)), last + 1)
    for k in range(begin, last + 1):
        with walk.source.loaded(spans[k - 1]):
            state = walk.advance(spans[k - 1], walk.state("inputs", k - 1), walk.batch)
        store.keep("inputs", k, state)
        walk.progress("forward", k, last)


def _backward(
    walk: Walk,
    stored: sensitivity.Stored,
    plan: Recipe,
    done: int,
    behind: Callable[[], None] = lambda: None,
) -> None:
    """Spans `done` - 1 to 0: statistics, then the analysis of each linear while the next is run.

    `behind()` is called once the loss and the last span are behind.
    """
    store, spans = walk.store, walk.source.spans
    gradient: State | None = None if done == len(spans) else store.read("gradient", done)
    left, total = len(stored.missing()), len(stored)
    pending: dict[str, Callable[[], sensitivity.Analysis]] = {}

    def keep_pending() -> None:
        nonlocal left
        for name in list(pending):
            stored.keep(name, pending.pop(name)())
            left -= 1
            walk.progress("analyse", total - left, total)

    def finish(k: int, gradient: State | None) -> None:
        """Span `k` and all after it are analysed once this has returned."""
        keep_pending()
        if gradient is not None:
            store.keep("gradient", k, gradient)
        for kind, number in (("gradient", k + 1), ("inputs", k + 1), ("inputs", k)):
            store.drop(kind, number)

    for k in reversed(range(done)):
        with walk.source.loaded(spans[k]):
            collected, passed = statistics(
                walk,
                k,
                gradient,
                layerwise=not plan.end_loss,
                fisher_windows=plan.fisher_windows,
            )
            if k == len(spans) - 1:
                behind()
            if pending:
                finish(k + 1, gradient)
            gradient = passed
            for name, linear in walk.inside(spans[k]).items():
                weight, known = linear.weight.detach(), collected.pop(name)
                pending[name] = walk.submit(sensitivity.of, weight, known, plan.end_loss)
                del known
                if walk.submit is here:
                    keep_pending()
        if walk.submit is here:
            finish(k, gradient)
    if pending:
        finish(0, gradient)


def statistics(
    walk: Walk,
    k: int,
    gradient: State | None = None,
    *,
    layerwise: bool = False,
    fisher_windows: int = 64,
    batch: int | None = None,
) -> tuple[dict[str, Statistics], State | None]:
    """Statistics of the linears of span `k`, run with gradients, and d loss / d its inputs.

    `gradient` is that of its outputs, None behind the last block: the loss follows. An expert
    that saw hardly a token gets the sums of its stack. `layerwise` also collects H.
    """
    source = walk.source
    passed: dict[str, Tensor] = {}
    spans, count = source.spans, len(walk.ids)
    linears = walk.inside(spans[k])
    sums = Sums(linears, layerwise, fisher_windows, stacks(source.model, linears))
    with observed(linears, sums.observe), frozen(source.model), torch.enable_grad():
        for rows in batches(count, batch or walk.batch):
            ids = walk.ids[rows]
            state = walk.leaves("inputs", k, rows)
            sums.begin(rows.start, len(ids))
            out, final = source.run(spans[k], ids, state)
            if gradient is None:
                backward(cross_entropy(source.model, next_tokens(ids)), final)
            else:
                names = [name for name in gradient if out[name].requires_grad]
                ends = [out[name] for name in names]
                torch.autograd.backward(ends, [gradient[name][rows] for name in names])
            for name, tensor in (state or {}).items():
                if tensor.grad is not None:
                    if name not in passed:
                        passed[name] = tensor.new_zeros(len(walk.ids), *tensor.shape[1:])
                    passed[name][rows] = tensor.grad
            done = (len(spans) - 1 - k) * count + rows.stop
            walk.progress("calibrate", done, len(spans) * count)
    found = sums.finished(source.model.dtype)
    return found, passed or None


# ---- fit


def each(
    walk: Walk,
    phase: str,
    kind: str,
    function: Callable[..., dict[str, Tensor]],
    values: Callable[[str], tuple[Any, ...]],
) -> None:
    """Keep under `kind` what `function(weight, *values(name))` gives for the linears of each block.

    With what is packed go the other tensors of the block. What is there already stays.
    """
    pending: list[tuple[int, dict[str, Tensor], dict[str, Result]]] = []
    at_once = walk.submit is here

    def finish() -> None:
        i, tensors, results = pending.pop()
        for done, (name, result) in enumerate(results.items(), 1):
            tensors |= {f"{name}.{part}": tensor for part, tensor in result().items()}
            if not at_once:
                walk.tell(phase, i, done)
        walk.store.keep(kind, i, tensors)

    for i in range(len(walk.source.blocks)):
        if walk.store.has(kind, i):
            continue
        with walk.source.loaded(range(i, i + 1)):
            weights, others = apart(walk, i)
            results: dict[str, Result] = {}
            for name, weight in weights.items():
                results[name] = walk.submit(function, weight, *values(name))
                if at_once:
                    walk.tell(phase, i, len(results))
        if pending:
            finish()
        pending.append((i, others if kind == "packed" else {}, results))
        if at_once:
            finish()
    if pending:
        finish()


def follow(
    walk: Walk,
    fit_block: FitBlock,
    batch: int,
    advance_original: Callable[[int, State | None], State] | None = None,
) -> None:
    """Keep what `fit_block(i, compressed, after)` makes of each block, which it leaves compressed.

    `compressed` are the hidden states that the compressed blocks before give block `i`. With
    `advance_original` those of the model as it was go along: `after` is what it gives behind `i`.
    """
    last = len(walk.source.blocks) - 1
    with torch.no_grad(), frozen(walk.source.model):
        for i in range(last + 1):
            span = range(i, i + 1)
            if not walk.store.has("packed", i):
                with walk.source.loaded(span):
                    before, after = walk.state("compressed", i), None
                    if advance_original:
                        after = advance_original(i, walk.state("original", i))
                    tensors = fit_block(i, before, after)
                    if i < last:
                        compressed = walk.advance(span, before, batch)
                        walk.store.keep("compressed", i + 1, compressed)
                if after is not None and i < last:
                    walk.store.keep("original", i + 1, after)
                walk.store.keep("packed", i, tensors)  # the last: a block without it is done again
            for kind in ("original", "compressed"):
                walk.store.drop(kind, i)
            walk.tell("fit", i + 1)


def apart(walk: Walk, i: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a block that are compressed, and all its other tensors, by their names."""
    prefix = walk.source.blocks[i]
    state = walk.source.module(i).state_dict()
    others = {f"{prefix}.{name}": tensor.detach() for name, tensor in state.items()}
    return {n: others.pop(f"{n}.weight") for n in walk.inside(range(i, i + 1))}, others


def packed(walk: Walk) -> Callable[[str], Tensor]:
    """A function that reads what OUT holds of the blocks, by the tensor's name."""
    store, count = walk.store, len(walk.source.blocks)
    kind = "trained" if store.has("trained", 0) else "packed"
    places = [*((kind, i) for i in range(count)), *([(TABLES, 0)] if store.has(TABLES, 0) else [])]
    where = {name: place for place in places for name in store.names(*place)}
    return lambda name: store.read_one(*where[name], name)
