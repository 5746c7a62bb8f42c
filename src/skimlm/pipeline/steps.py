"""What methods do on the walk: SLiM, training, sparsity and adapters.

fit_slim             every linear fitted to the inputs at hand, block after block
fit_trained          codebooks and codes, then training towards what the block gave as it was
decompose, compose   skim with sparsity or adapters: a first fit, then codebooks over it
fit_trained_model    all linears fitted, trained against the loss at the end: a model in memory
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skimlm.format.pack import QuantizedWeight, dequantize, effective, pack
from skimlm.models.carried import HIDDEN, State
from skimlm.models.structure import routed
from skimlm.pipeline import gram, sensitivity
from skimlm.pipeline.calibrate import FEW
from skimlm.pipeline.config import Recipe
from skimlm.pipeline.gram import Gram
from skimlm.pipeline.recipes import composed_linear, first_fit, fit_linear, settled
from skimlm.pipeline.walk import Walk, apart, each, follow
from skimlm.progress import Clock
from skimlm.quantize import slim
from skimlm.quantize.fit import Fit
from skimlm.train.codebooks import norm_parameters, train, train_block

SHARED = "experts-sharing"  # how many of a block
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
    return slim.fit(w, inputs.h, options, inputs.target(w))


def fit_trained(
    walk: Walk,
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
) -> None:
    """Fit every block, and train it to make of the compressed ones' output the original's."""

    def block(i: int, state: State | None, after: State | None) -> dict[str, Tensor]:
        assert after is not None
        targets = after[HIDDEN]
        span = range(i, i + 1)
        linears, module = walk.inside(span), walk.source.module(i)
        weights, tensors = apart(walk, i)
        results = {
            name: walk.submit(fit_linear, weight.float(), stored[name], widths[name], plan)
            for name, weight in weights.items()
        }
        fits = {name: result() for name, result in results.items()}
        norms = {f"{walk.source.blocks[i]}.{n}": p for n, p in norm_parameters(module).items()}
        trained, _ = train_block(
            lambda rows: walk.run(span, rows, state)[HIDDEN],
            linears,
            fits,
            norms,
            targets,
            _output_weight(linears, stored, targets.shape[-1]),
            steps=plan.steps,
        )
        tensors |= trained
        for name, weight in trained.items():
            norms[name].copy_(weight)
        for name, linear in linears.items():
            q = settled(weights[name].float(), stored[name], fits.pop(name), plan)
            tensors |= {f"{name}.{part}": tensor for part, tensor in pack(q).tensors.items()}
            linear.weight.copy_(dequantize(q))
        return tensors

    batch = walk.batch
    follow(walk, block, batch, lambda i, x: walk.advance(range(i, i + 1), x, batch))


def _output_weight(
    linears: Mapping[str, nn.Linear], stored: Mapping[str, sensitivity.Analysis], width: int
) -> Tensor:
    """What each number of a block's output counts in the end [d]: the gradient it gets.

    That is the gradient of the last linear that writes to the residual stream; a norm behind it,
    as in gemma, scales it.
    """
    names = [name for name, linear in linears.items() if linear.out_features == width]
    return stored[names[-1]].row_weight if names else torch.ones(width)


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


# ---- the whole model, in memory


def fit_trained_model(
    walk: Walk,
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    clock: Clock,
    state_file: Path | None = None,
) -> list[float]:
    """Fit every linear, train against the end loss, and keep what OUT holds of every block."""
    with clock("fit"):
        fits = fit_all(walk, stored, widths, plan)
    with clock("train"):
        losses = train_fits(walk, fits, plan, state_file)

    def finish(w: Tensor, name: str) -> dict[str, Tensor]:
        return dict(pack(settled(w.float(), stored[name], fits.pop(name), plan)).tensors)

    with clock("round"):
        each(walk, "round", "packed", finish, lambda name: (name,))
    return losses


def train_fits(
    walk: Walk,
    fits: dict[str, Fit],
    plan: Recipe,
    state_file: Path | None = None,
    teacher: dict[int, Tensor] | None = None,
) -> list[float]:
    """Train codebooks in place and put the trained norm weights into the model; held-out losses.

    The model's linears are left alone. For `state_file` and `teacher` see `train.codebooks.train`.
    """
    model = walk.source.model
    norms, losses = train(
        model,
        dict(walk.linears),
        fits,
        walk.ids,
        steps=plan.steps,
        state_file=state_file,
        teacher=teacher,
        progress=lambda done, total, _loss: walk.progress("train", done, total),
    )
    with torch.no_grad():
        for name, weight in norms.items():
            model.get_parameter(name).copy_(weight)
    return losses


def fit_all(
    walk: Walk,
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
) -> dict[str, Fit]:
    """Codebooks and codes of every linear at its widths, scaled or refined as the plan says."""
    fits: dict[str, Fit] = {}
    for done, (name, linear) in enumerate(walk.linears.items(), 1):
        w = linear.weight.detach().float()
        fits[name] = fit_linear(w, stored[name], widths[name], plan)
        walk.progress("fit", done, len(walk.linears))
    return fits
