"""The scaling vector over input channels in closed form.

With w_hat_i = v_i * s (v_i the de-quantized row in the scaled domain) the layer error
sum_i rho_i (v_i * s - w_i) H (v_i * s - w_i)^T is quadratic in s, with the minimiser
    (H o V^T diag(rho) V) s = sum_i rho_i v_i o (H w_i)            o = element by element.
SKIM (2412.04180) reaches it by gradient descent; here it is one c x c solve. The step cannot raise
the error. Re-clustering w_i / s afterwards can, so callers keep a step only if the full error
falls.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skimlm.quantize.refine import row_errors


def scale_step(
    w: Sequence[Tensor],
    v: Sequence[Tensor],
    h: Sequence[Tensor],
    row_weight: Sequence[Tensor],
    s: Tensor,
    ridge: float = 1e-2,
) -> Tensor:
    """Best scaling vector [c] for fixed `v`, pulled towards the current `s` by `ridge`.

    One item per linear that reads the same input: `w`, `v` [r, c] float32, the weight and its
    quantized form before scaling; `h` [c, c]; `row_weight` [r]. Entries that would fall to 5 % of
    the median or below, and dead columns, keep their current value.
    """
    a = torch.zeros(len(s), len(s), dtype=torch.float64)
    b = torch.zeros(len(s), dtype=torch.float64)
    for w_, v_, h_, rho in zip(w, v, h, row_weight, strict=True):
        weighted = v_ * rho[:, None]
        a += h_ * (weighted.T @ v_)
        b += (weighted * (w_ @ h_)).sum(0)
    diagonal = a.diagonal().clone()
    pull = ridge * diagonal + 1e-12 * diagonal.mean().clamp(min=1e-30)
    a.diagonal().add_(pull)
    new = torch.linalg.solve(a, b + pull * s.double()).to(s.dtype)
    keep = (diagonal <= 0) | ~torch.isfinite(new) | (new <= 0.05 * new.median())
    return torch.where(keep, s, new)


def normalise(s: Tensor) -> Tensor:
    """`s` with geometric mean 1, as float16 would store it."""
    return (s / s.log().mean().exp()).half().float()


def scaled_error(w: Tensor, v: Tensor, h: Tensor, row_weight: Tensor, s: Tensor) -> Tensor:
    """sum_i rho_i (v_i * s - w_i) H (v_i * s - w_i)^T, a scalar."""
    return (row_errors(w, v * s, h) * row_weight).sum()
