"""What skim does with one linear by a recipe's numbers: tensors in, tensors out.

fit_linear, settled      W, what is known of it, widths -> codebooks and codes -> what is stored
first_fit, composed_linear      the same with sparsity or adapters: those first, then codebooks
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skimlm.format.pack import Adapter, QuantizedWeight, pack
from skimlm.format.row_codes import MAX_TABLE_WIDTH, code_bits
from skimlm.pipeline.config import Recipe
from skimlm.pipeline.sensitivity import Analysis
from skimlm.quantize import fit as fitting
from skimlm.quantize import slim, trellis_fit
from skimlm.quantize.fit import GRIDS, WIDTHS, Fit
from skimlm.quantize.kmeans import kmeans_rows
from skimlm.quantize.scale import normalise, scale_step, scaled_error


def widths_of(plan: Recipe, options: slim.Options | None) -> Sequence[int]:
    """The widths that rows can have.

    The published method knows no trellis; sparse rows and rows with adapters have codebooks.
    """
    if options is not None:
        return WIDTHS[:MAX_TABLE_WIDTH]
    return WIDTHS if plan.end_loss else GRIDS


def fit_linear(
    w: Tensor, known: Analysis, widths: Tensor, plan: Recipe, fixed: bool = False
) -> Fit:
    """Codebooks and codes of W float32 [r, c] at its widths, scaled or refined as the plan says.

    `fixed`: trellises have the tables that are known.
    """
    h = known.hessian
    fit = fitting.start(w, known.fisher.float(), widths, known.centroids)
    if plan.scale:
        fit = _published_scale(w, h, known, widths, fit)
    if plan.rounds:
        fitting.refine_fit(w, h, fit, plan.rounds, plan.sweeps)
    start = known.row_weight, known.tables, known.scales
    rounds = trellis_fit.ROUNDS if plan.rounds else 0
    fitting.fit_trellises(w, known.fisher.float(), h, *start, fit, fixed, rounds)
    return fit


def rounded_linear(w: Tensor, known: Analysis, widths: Tensor) -> Tensor:
    """W float32 [r, c] at its widths as it is before refinement: what the error curves are of."""
    f = known.fisher.float()
    out = fitting.start(w, f, widths, known.centroids).dense()
    starts = fitting.trellis_starts(widths, known.tables, known.scales)
    for width, own, table, scale in starts:
        out[own] = trellis_fit.rounded(w[own], f[own], table, scale, code_bits(width))
    return out


def settled(w: Tensor, known: Analysis, fit: Fit, plan: Recipe) -> QuantizedWeight:
    """A fit rounded to what is stored; refined codes settle on it."""
    return fitting.finish(w, known.hessian if plan.rounds else None, fit)


def packed_linear(w: Tensor, known: Analysis, widths: Tensor, plan: Recipe) -> dict[str, Tensor]:
    """The tensors that are stored for W at its widths."""
    w = w.float()
    return dict(pack(settled(w, known, fit_linear(w, known, widths, plan), plan)).tensors)


def first_fit(w: Tensor, known: Analysis, options: slim.Options) -> dict[str, Tensor]:
    """An adapter of a first sparse and low-rank fit, and what the rows then lose by width [r, 5].

    The error is that of k-means under the Fisher diagonal over the weights that stay; what mask and
    adapter lose is the same at every width.
    """
    w = w.float()
    q = slim.fit(w, known.hessian, options, row_weight=known.row_weight)
    left = slim.rest(w, q.adapter)
    fisher = known.fisher.float()
    weight = fisher if q.mask is None else fisher * q.mask
    costs = kmeans_rows(left.contiguous(), weight.contiguous(), MAX_TABLE_WIDTH)[1]
    factors = {} if q.adapter is None else vars(q.adapter)
    return {"errors": costs} | {name: t for name, t in factors.items() if t is not None}


def composed_linear(
    w: Tensor, known: Analysis, widths: Tensor, options: slim.Options, first: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What is stored for W: codebooks of its widths over a mask, with an adapter, under H~."""
    factors = {name: tensor for name, tensor in first.items() if name != "errors"}
    q = slim.fit(
        w.float(),
        known.hessian,
        options,
        widths=widths,
        adapter=Adapter(**factors) if factors else None,
        row_weight=known.row_weight,
    )
    return dict(pack(q).tensors)


def _published_scale(w: Tensor, h: Tensor, stats: Analysis, widths: Tensor, fit: Fit) -> Fit:
    """One iteration of SKIM's scale step and re-clustering, kept only if the full error falls."""
    ones = torch.ones(w.shape[1])
    weight = stats.row_weight
    v = fit.dense()
    s = normalise(scale_step([w], [v], [h], [weight], ones))
    f = stats.fisher.float() * s * s
    scaled = w / s
    again = fitting.start(scaled, f, widths, kmeans_rows(scaled, f, MAX_TABLE_WIDTH)[0])
    before = scaled_error(w, v, h, weight, ones)
    after = scaled_error(w, again.dense(), h, weight, s)
    best, fit.in_scale, again.in_scale = (again if after < before else fit), ones, s
    return best
