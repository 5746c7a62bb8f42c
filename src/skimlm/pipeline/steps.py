"""What methods do on the walk: SLiM, skim, sparsity and adapters, training.

fit_slim             every linear fitted to the inputs at hand, block after block
fit_skim             every linear under the analysis, held against windows that nothing saw
decompose, compose   skim with sparsity or adapters: a first fit, then codebooks over it
train_packed         what packed blocks can still move, trained against the loss at the end
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.format.layer import Layer, LayerSpec, layout
from skimlm.format.pack import QuantizedWeight, effective, pack
from skimlm.models.carried import HIDDEN, State
from skimlm.models.hooks import frozen
from skimlm.models.structure import routed
from skimlm.pipeline import gram, sensitivity
from skimlm.pipeline.calibrate import FEW
from skimlm.pipeline.config import Recipe
from skimlm.pipeline.gram import Gram
from skimlm.pipeline.measure import Trial, divergences
from skimlm.pipeline.recipes import composed_linear, first_fit, packed_linear
from skimlm.pipeline.tables import packed_table
from skimlm.pipeline.walk import TABLES, Walk, apart, each, follow, packed
from skimlm.quantize import slim
from skimlm.quantize.refine import damped
from skimlm.runtime.ops import dequantize
from skimlm.train.codebooks import train
from skimlm.train.student import Student

SHARED = "experts-sharing"  # how many of a block
PLAIN = "unrefined"  # kept where refinement was measured to be worse, with what was measured
WINDOWS = 4  # that go through together where blocks are fitted to their inputs
# (name, W, inputs) -> (what replaces W, what is stored of it), begun at once
FitLinear = Callable[[str, Tensor, Gram], Callable[[], tuple[Tensor, dict[str, Tensor]]]]


def fit_to_inputs(walk: Walk, fit: FitLinear, *, staged: bool, matched: bool) -> None:
    """Replace each linear by what `fit` makes of it and of its inputs, block after block.

    Errors of early blocks are then seen, and partly undone, by later ones (GPTQ, SLiM). Beyond the
    published walk, both optional:
        staged    linears that read the same input are one stage; later stages are fitted to inputs
                  that already went through the compressed earlier ones
        matched   the target moves towards the original model's output (gram.py)
    """

    def block(i: int, state: State | None, _after: State | None) -> dict[str, Tensor]:
        linears = walk.inside(range(i, i + 1))
        weights, tensors = apart(walk, i)
        names = gram.stages(walk, i, linears, state) if staged else [list(linears)]
        experts = routed(walk.source.model, linears)
        fitted = shared = 0
        for stage in names:
            inside = {name: linears[name] for name in stage}
            grams = gram.grams(walk, i, inside, state, WINDOWS, matched)
            shared += sum(grams[name].tokens < FEW for name in experts & grams.keys())
            results = {name: fit(name, weights[name], grams.pop(name)) for name in stage}
            for name in stage:
                weight, stored = results.pop(name)()
                fitted += 1
                walk.tell("fit", i, fitted)
                linears[name].weight.copy_(weight)
                tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
        walk.store.drop_all(gram.INPUTS)
        walk.store.keep(SHARED, i, {"count": torch.tensor(shared)})
        return tensors

    def original(i: int, state: State | None) -> State:
        return gram.advance_original(walk, i, state, WINDOWS)

    follow(walk, block, WINDOWS, original if matched else None)


def sharing(walk: Walk) -> int:
    """How many matrices of experts saw so few tokens that they were fitted to their stack's."""
    blocks = range(len(walk.source.blocks))
    return sum(int(walk.store.read_one(SHARED, i, "count")) for i in blocks)


def fit_slim(walk: Walk, plan: Recipe, options: slim.Options, published: bool) -> None:
    """SLiM: keep what OUT holds of every block."""

    def fit(_name: str, w: Tensor, inputs: Gram) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
        result = walk.submit(slim_linear, w, inputs, options, published)

        def finish() -> tuple[Tensor, dict[str, Tensor]]:
            q = result()
            return effective(q), dict(pack(q).tensors)

        return finish

    fit_to_inputs(walk, fit, staged=plan.staged, matched=plan.matched)


def slim_linear(w: Tensor, inputs: Gram, options: slim.Options, published: bool) -> QuantizedWeight:
    """W as SLiM has it on these inputs."""
    w = w.float()
    if published:
        return slim.fit_paper(w, inputs.h, options)
    return slim.fit(w, damped(inputs.h, shrink=0.0), options, inputs.target(w))


# ---- skim


def fit_skim(
    walk: Walk,
    unseen: Tensor,
    known: Mapping[str, sensitivity.Analysis],
    chosen: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    plan: Recipe,
    rounded: float | None,
) -> float | None:
    """Keep what OUT holds of every block, refined; the KL of that on windows that nothing saw.

    `chosen` are the widths. `rounded` is the KL of rows that are only rounded, where that was
    measured: if refinement is worse, its H~ tells nothing of other text, and rows stay rounded.
    """
    store = walk.store

    def fit(phase: str = "fit") -> None:
        used = dataclasses.replace(plan, rounds=0) if store.has(PLAIN, 0) else plan
        each(walk, phase, "packed", packed_linear, lambda n: (known[n], chosen[n], used))

    fit()
    if rounded is None:
        return None
    if not store.has(PLAIN, 0):
        read = packed(walk)

        def weight(name: str, _w: Tensor) -> Tensor:
            return dequantize(_layer(specs[name], name, read))

        trial = {"refined": Trial(frozenset(walk.linears), weight)}
        check = dataclasses.replace(
            walk, ids=unseen, progress=lambda _, *done: walk.progress("check", *done)
        )
        refined = divergences(check, trial)["refined"]
        if refined <= rounded:
            return refined
        store.keep(PLAIN, 0, {"refined": torch.tensor(refined).double()})
        store.drop_all("packed")
        fit("fit again")
    return float(store.read_one(PLAIN, 0, "refined"))


# ---- sparsity and adapters under the analysis


def decompose(
    walk: Walk, stored: Mapping[str, sensitivity.Analysis], options: slim.Options
) -> dict[str, Tensor]:
    """Keep a first fit of every linear; what its rows lose by width [r, 5]."""
    each(walk, "decompose", "first", first_fit, lambda name: (stored[name], options))
    store, blocks = walk.store, range(len(walk.source.blocks))
    found = {n: i for i in blocks for n in walk.inside(range(i, i + 1))}
    return {n: store.read_one("first", found[n], f"{n}.errors").clone() for n in walk.linears}


def compose(
    walk: Walk,
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    options: slim.Options,
) -> None:
    """Keep codebooks of the allocated widths over a mask, with adapters, for every linear."""

    def values(name: str) -> tuple[Any, ...]:
        i = next(i for i in range(len(walk.source.blocks)) if name in walk.inside(range(i, i + 1)))
        first = walk.store.read("first", i)
        own = {n.removeprefix(f"{name}."): t for n, t in first.items() if n.startswith(f"{name}.")}
        return stored[name], widths[name], options, own

    each(walk, "fit", "packed", composed_linear, values)


# ---- embedding and head


def pack_tables(
    walk: Walk,
    weights: Mapping[str, Tensor],
    known: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
) -> None:
    """Keep embedding and head as layers, at their widths."""
    if walk.store.has(TABLES, 0):
        return
    packed = {n: packed_table(w, known[n], widths[n], plan) for n, w in weights.items()}
    tensors = {f"{n}.{part}": t for n, parts in packed.items() for part, t in parts.items()}
    walk.store.keep(TABLES, 0, tensors)


# ---- training


def train_packed(
    walk: Walk,
    specs: Mapping[str, LayerSpec],
    steps: int,
    rate: float,
    state_file: Path | None = None,
) -> list[float]:
    """Train what the packed blocks can still move against the loss at the end; held-out losses.

    `specs` are those of the linears, widths included. Kept under "trained". It takes the memory of
    what is packed and of one block at work, and what outside the linears is resident.
    """
    known = final_states(walk)
    source, store, blocks = walk.source, walk.store, range(len(walk.source.blocks))
    layers = {n: kept for i in blocks for n, kept in _packed_layers(walk, specs, i).items()}
    tables = {}
    if store.has(TABLES, 0):
        stored = store.read(TABLES, 0)
        read, own = stored.__getitem__, [n for n in specs if n not in walk.linears]
        tables = {n: _layer(specs[n], n, read) for n in own}
    with source.loaded(blocks, but={f"{name}.weight" for name in walk.linears}):
        # made again they are the same numbers, for a third more time
        recomputed = source.blocks if source.streamed else ()
        student = Student(source.model, walk.linears, layers, tables, recomputed)
        trained = train(
            student,
            walk.ids,
            known,
            steps=steps,
            rate=rate,
            state_file=state_file,
            progress=lambda done, total: walk.progress("train", done, total),
        )
    for i in blocks:
        if store.has("trained", i):
            continue
        tensors = dict(store.read("packed", i))
        tensors |= {n: weight for n, weight in trained.norms.items() if n in tensors}
        for name in walk.inside(range(i, i + 1)):
            parts = trained.layers[name].tensors.items()
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts}
        store.keep("trained", i, tensors)
    with torch.no_grad():
        for name, weight in trained.norms.items():
            own = source.model.get_parameter(name)
            if not own.is_meta:
                own.copy_(weight)
    return trained.losses


def _packed_layers(walk: Walk, specs: Mapping[str, LayerSpec], i: int) -> dict[str, Layer]:
    """The linears of block `i` as they are packed."""
    packed = walk.store.read("packed", i)
    names = walk.inside(range(i, i + 1))
    return {name: _layer(specs[name], name, packed.__getitem__) for name in names}


def _layer(spec: LayerSpec, name: str, read: Callable[[str], Tensor]) -> Layer:
    """A layer out of tensors that are read by their full names."""
    return Layer(spec, {part: read(f"{name}.{part}") for part in layout(spec)})


def final_states(walk: Walk) -> Tensor:
    """What the body of the model, as it was, gives its head for the windows, [n, t, d].

    Hidden states are kept from span to span, so that a stopped run goes on.
    """
    store, spans = walk.store, walk.source.spans
    last = len(spans) - 1
    if not store.has("final", 0):
        begin = next((k for k in range(last, 0, -1) if store.has("original", k)), 0)
        with torch.no_grad(), frozen(walk.source.model):
            for k in range(begin, last):
                with walk.source.loaded(spans[k]):
                    state = walk.advance(spans[k], walk.state("original", k), walk.batch)
                store.keep("original", k + 1, state)
                store.drop("original", k)
                walk.progress("forward", k + 1, len(spans))
            with walk.source.loaded(spans[last]):
                final = walk.final(spans[last], walk.state("original", last), walk.batch)
        store.keep("final", 0, {HIDDEN: final})
        store.drop("original", last)
    return store.read("final", 0)[HIDDEN]
