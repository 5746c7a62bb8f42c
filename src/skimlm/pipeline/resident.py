"""All linears of a model that is in memory: fitted, trained, rounded; stream.py is its counterpart.

quantize                skim: codebooks and codes; recipe best trains them against the model
decompose, compose      skim with sparsity or adapters: a first fit, then codebooks over it
fit_blocks              slim: block after block, each fitted to what the ones before it give
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skimlm.format.pack import QuantizedWeight, effective
from skimlm.format.row_codes import MAX_TABLE_WIDTH
from skimlm.pipeline import blockwise, sensitivity
from skimlm.pipeline.recipes import Recipe, fit_linear, settled
from skimlm.progress import Clock
from skimlm.quantize import slim
from skimlm.quantize.fit import Fit
from skimlm.quantize.kmeans import kmeans_rows
from skimlm.train.codebooks import train

Progress = Callable[[str, int, int], None]
SHRINK = 0.3  # of H~ towards its diagonal: it is noisier than a Gram matrix of as many tokens


def fit_blocks(
    model: Any,
    linears: dict[str, nn.Linear],
    ids: Tensor,
    recipe: str,
    plan: Recipe,
    options: slim.Options,
    progress: Progress,
) -> dict[str, QuantizedWeight]:
    """SLiM: fit the blocks one after the other; the linears of `model` take the new weights."""
    quantized: dict[str, QuantizedWeight] = {}

    def fit(name: str, w: Tensor, gram: blockwise.Gram) -> Tensor:
        if recipe == "paper":
            q = slim.fit_paper(w, gram.h, options)
        else:
            q = slim.fit(w, gram.h, options, gram.target(w))
        quantized[name] = q
        return effective(q)

    blockwise.walk(
        model,
        linears,
        ids,
        fit,
        staged=plan.staged,
        matched=plan.matched,
        progress=lambda done, total: progress("fit", done, total),
    )
    return quantized


def decompose(
    linears: dict[str, nn.Linear],
    stored: Mapping[str, sensitivity.Analysis],
    options: slim.Options,
    progress: Progress,
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """A first sparse and low-rank fit of every linear, and what its rows then lose by width [r, 5].

    The error is that of k-means under the Fisher diagonal over the weights that stay; what mask and
    adapter lose is the same at every width.
    """
    first, errors = {}, {}
    for done, (name, linear) in enumerate(linears.items(), 1):
        w = linear.weight.detach().float().cpu()
        known = stored[name]
        q = slim.fit(w, known.hessian, options, shrink=SHRINK, row_weight=known.row_weight)
        left = slim.rest(w, q.adapter)
        fisher = known.fisher.float()
        weight = fisher if q.mask is None else fisher * q.mask
        costs = kmeans_rows(left.contiguous(), weight.contiguous(), MAX_TABLE_WIDTH)[1]
        first[name], errors[name] = q, costs
        progress("decompose", done, len(linears))
    return first, errors


def compose(
    linears: dict[str, nn.Linear],
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    options: slim.Options,
    first: Mapping[str, QuantizedWeight],
    progress: Progress,
) -> dict[str, QuantizedWeight]:
    """Codebooks of the allocated widths over a mask, with adapters, refined under H~."""
    quantized = {}
    for done, (name, linear) in enumerate(linears.items(), 1):
        known = stored[name]
        quantized[name] = slim.fit(
            linear.weight.detach().float().cpu(),
            known.hessian,
            options,
            widths=widths[name],
            adapter=first[name].adapter,
            shrink=SHRINK,
            row_weight=known.row_weight,
        )
        progress("fit", done, len(linears))
    return quantized


def quantize(
    model: Any,
    linears: dict[str, nn.Linear],
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    ids: Tensor,
    progress: Progress,
    clock: Clock,
    state_file: Path | None = None,
    teacher: dict[int, Tensor] | None = None,
) -> tuple[dict[str, QuantizedWeight], list[float]]:
    """Fit every linear at its widths, train if the plan says so, and round to what is stored.

    Trained norm weights are put into `model`; its linears are left alone. Also returns the held-out
    losses of the training. For `state_file` and `teacher` see `weights.train.train`.
    """
    with clock("fit"):
        fits = fit_all(linears, stored, widths, plan, progress)
    losses: list[float] = []
    if plan.steps:
        with clock("train"):
            norms, losses = train(
                model,
                linears,
                fits,
                ids,
                steps=plan.steps,
                state_file=state_file,
                teacher=teacher,
                progress=lambda done, total, _loss: progress("train", done, total),
            )
            with torch.no_grad():
                for name, weight in norms.items():
                    model.get_parameter(name).copy_(weight)
    with clock("round"):
        quantized = {}
        for name, fit in fits.items():
            w = linears[name].weight.detach().float().cpu()
            quantized[name] = settled(w, stored[name], fit, plan)
    return quantized, losses


def fit_all(
    linears: dict[str, nn.Linear],
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    progress: Progress,
) -> dict[str, Fit]:
    """Codebooks and codes of every linear at its widths, scaled or refined as the plan says."""
    fits: dict[str, Fit] = {}
    for done, (name, linear) in enumerate(linears.items(), 1):
        w = linear.weight.detach().float().cpu()
        fits[name] = fit_linear(w, stored[name], widths[name], plan)
        progress("fit", done, len(linears))
    return fits
