"""Uniform grids: which scales, and rounding to them. SLiM-Quant (2410.09615) and its baselines.

A symmetric grid of b bits: level k in -2^(b-1) .. 2^(b-1) - 1, value k * step. A step belongs to a
group of `group` columns of a row (`group` = c: to the whole row); one step for a whole matrix is
the same step everywhere. `steps` [r, ceil(c / group)] are float32 that bfloat16 holds exactly: the
file stores bfloat16.
"""

import torch
from torch import Tensor

from skimlm.format.pack import spread


def absmax(w: Tensor, bits: int, group: int) -> Tensor:
    """Steps with which nothing is clipped: the largest |w| of each group at level 2^(b-1) - 1."""
    return _stored(_groups(w.abs(), group).amax(-1) / _top(bits))


def least_error(
    w: Tensor,
    bits: int,
    group: int,
    weight: Tensor | None = None,
    candidates: int = 64,
    least: float = 0.3,
) -> Tensor:
    """Steps of least sum of weight_j (w - rounded w)^2 of the grid as it is deployed.

    `weight` [c] or [r, c]; weights w of 0 that are pruned cost nothing where it is 0. `candidates`
    from `least` times to 1.0 times the absmax step: never worse than absmax.
    """
    parts = _groups(w, group)
    costs = None if weight is None else _groups(weight.expand_as(w).contiguous(), group)
    full = absmax(w, bits, group)
    best, steps = torch.full_like(full, torch.inf), full.clone()
    for shrink in torch.linspace(1.0, least, candidates).tolist():
        trial = _stored(full * shrink)
        d = _round(parts, trial[..., None], bits) - parts
        d = d.square_() if costs is None else d.square_().mul_(costs)
        error = d.sum(-1)
        better = error < best
        best, steps = torch.where(better, error, best), torch.where(better, trial, steps)
    return steps


def least_error_matrix(w: Tensor, bits: int, candidates: int = 128, least: float = 0.05) -> Tensor:
    """The one step for all of `w` with the least squared error of the deployed grid, [r, 1]."""
    full = w.abs().max() / _top(bits)
    trials = _stored(full * torch.linspace(1.0, least, candidates))
    errors = [float((_round(w, t, bits) - w).square_().sum(dtype=torch.float64)) for t in trials]
    return trials[int(torch.tensor(errors).argmin())].expand(len(w), 1).clone()


def slim_quant(w: Tensor, bits: int) -> Tensor:
    """SLiM-Quant^W as published: one cap for the matrix from a histogram of |w|, [r, 1] steps.

    Two levels: some ten equally spaced bins, then every bin between the neighbours of the best. The
    surrogate rounds down with a step of cap / 2^b, as the reference implementation does; there the
    bracket is empty when the bins are a multiple of ten and the last point wins, here it is not.
    """
    values = w.abs().flatten()
    low, high = float(values.min()), float(values.max())
    if not high > low:  # all equal: there is nothing to search
        return _stored(torch.full((len(w), 1), high / _top(bits)))
    bins = max(512, min(values.numel() // 1000, 20000))
    count = torch.histc(values, bins, low, high).double()
    width = (high - low) / bins
    density = count / (count.sum() * width)
    centre = low + (torch.arange(bins, dtype=torch.float64) + 0.5) * width

    def error(i: int) -> float:
        cap = centre[i]
        step = cap / 2**bits
        inside, outside = centre[:i], centre[i:]
        rounding = (density[:i] * (inside - step * (inside / step).floor()).square()).sum()
        clipping = (density[i:] * (outside - cap).square()).sum()
        return float(width * (rounding + clipping))

    points = [*range(0, bins, bins // 10)][:11]
    nearest = min(range(len(points)), key=lambda t: error(points[t]))
    begin = points[max(nearest - 1, 0)]
    end = points[nearest + 1] if nearest + 1 < len(points) else bins
    cap = centre[min(range(begin, end), key=error)]
    return _stored(torch.full((len(w), 1), float(cap) / _top(bits)))


def salient_columns(w: Tensor, square_sum: Tensor, share: float = 0.01) -> Tensor:
    """SLiM-Quant^O: the input scale [c] that halves the step of the `share` most salient columns.

    Saliency is square_sum_j sum_i |w_ij|, `square_sum` [c] of the inputs; the weight is divided by
    the scale before it is rounded: a salient column gets half the step and half the range.
    """
    c = w.shape[1]
    scale = torch.ones(c)
    scale[(square_sum * w.abs().sum(0)).topk(int(c * share)).indices] = 0.5
    return scale


def encode(w: Tensor, steps: Tensor, bits: int, group: int) -> Tensor:
    """Codes uint8 [r, c]: the level nearest to w, plus 2^(b-1)."""
    parts = _groups(w, group)
    levels = _levels(parts, steps[..., None], bits)
    return (levels + (1 << (bits - 1))).to(torch.uint8).flatten(1)[:, : w.shape[1]]


def decode(codes: Tensor, steps: Tensor, bits: int, group: int) -> Tensor:
    """Values float32 [r, c] of codes."""
    level = codes.float() - (1 << (bits - 1))
    return level * spread(steps, group, codes.shape[1])


def _top(bits: int) -> int:
    return max((1 << (bits - 1)) - 1, 1)


def _levels(w: Tensor, step: Tensor, bits: int) -> Tensor:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return (w / torch.where(step > 0, step, 1.0)).round_().clamp_(low, high)


def _round(w: Tensor, step: Tensor, bits: int) -> Tensor:
    return _levels(w, step, bits).mul_(step)


def _groups(w: Tensor, group: int) -> Tensor:
    """[r, ceil(c / group), group], the last one padded with zeros."""
    r, c = w.shape
    return torch.nn.functional.pad(w, (0, -c % group)).view(r, -1, group)


def _stored(steps: Tensor) -> Tensor:
    return steps.bfloat16().float()
