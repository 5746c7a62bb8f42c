"""Refinement that keeps the format: codes and codebooks of every row under a full matrix H.

Two steps that never raise the error (w_hat - w) H (w_hat - w)^T of any row (LNQ, 2505.07004):
    codebook_step         codes fixed: c = (P^T H P)^-1 P^T H w, unused entries held in place
    coordinate_descent    codebook fixed: column by column, the entry nearest to
                          w_j - sum_{k != j} H_jk (w_hat_k - w_k) / H_jj; ties keep the code
The native versions keep the gradient G = (w_hat - w) H up to date, touched only when a code
changes, which after the first sweep is rare. The readable versions below are their oracles.
"""

import torch
from torch import Tensor

from skimlm import native

RIDGE = 1e-7


def damped(h: Tensor, shrink: float = 0.3, damp: float = 0.01) -> Tensor:
    """`h` shrunk towards its diagonal, plus `damp` of the mean diagonal; positive definite.

    A Gram matrix of few tokens has off-diagonal noise that refinement would fit; both guard
    against it.
    """
    diagonal = h.diagonal()
    out = (h + h.T) * ((1 - shrink) / 2)  # bfloat16 products are not symmetric to the last bit
    out.diagonal().copy_(diagonal + damp * diagonal.mean())
    return out.contiguous()


def dense(codes: Tensor, codebook: Tensor) -> Tensor:
    """De-quantized rows [r, c]: codebook[i, codes[i, j]]."""
    return codebook.gather(1, codes.long())


def row_errors(w: Tensor, w_hat: Tensor, h: Tensor) -> Tensor:
    """(w_hat - w) H (w_hat - w)^T of every row, [r]."""
    d = w_hat - w
    return ((d @ h) * d).sum(1)


def coordinate_descent(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, sweeps: int
) -> Tensor:
    """Codes after `sweeps` cyclic passes; `codes` uint8 [r, c] is the start and is left alone."""
    r, c = w.shape
    k = codebook.shape[1]
    _check(w, h, codebook, sizes, codes)
    gradient = ((dense(codes, codebook) - w) @ h).contiguous()
    codes = codes.clone()
    native.call("coordinate_descent", h, gradient, codebook, sizes, codes, r, c, k, sweeps)
    return codes


def codebook_step(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Least-squares codebooks for fixed codes: (codebook ascending, codes renamed to match)."""
    r, c = w.shape
    k = codebook.shape[1]
    _check(w, h, codebook, sizes, codes)
    codes, codebook = codes.clone(), codebook.clone()
    native.call("codebook_step", h, w, sizes, codes, codebook, r, c, k, float(ridge))
    return codebook, codes


def refine(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, rounds: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """`rounds` times `sweeps` of coordinate descent, then a codebook step; ends on descent."""
    for _ in range(rounds):
        codes = coordinate_descent(w, h, codebook, sizes, codes, sweeps)
        codebook, codes = codebook_step(w, h, codebook, sizes, codes)
    return codebook, coordinate_descent(w, h, codebook, sizes, codes, sweeps)


def _check(w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor) -> None:
    r, c = w.shape
    k = codebook.shape[1]
    native.require("w", w, torch.float32, (r, c))
    native.require("h", h, torch.float32, (c, c))
    native.require("codebook", codebook, torch.float32, (r, k))
    native.require("sizes", sizes, torch.int32, (r,))
    native.require("codes", codes, torch.uint8, (r, c))
    if k > 32 or bool((sizes < 1).any()) or bool((sizes > k).any()):
        raise ValueError(
            f"codebooks have 1..{min(k, 32)} entries, got sizes up to {int(sizes.max())}"
        )
    if r and bool((codes.amax(1).int() >= sizes).any()):
        raise ValueError("a code points past the end of its row's codebook")


def coordinate_descent_reference(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, sweeps: int
) -> Tensor:
    """The same passes, one coordinate at a time in float64."""
    codes = codes.clone()
    for i in range(len(w)):
        entries = codebook[i, : int(sizes[i])].double()
        target, matrix = w[i].double(), h.double()
        for _ in range(sweeps):
            for j in range(w.shape[1]):
                if matrix[j, j] <= 0:
                    continue
                d = entries[codes[i].long()] - target
                want = entries[codes[i, j].long()] - (d @ matrix[:, j]) / matrix[j, j]
                m = int((entries - want).abs().argmin())
                if (entries[m] - want).abs() < (entries[codes[i, j].long()] - want).abs():
                    codes[i, j] = m
    return codes


def codebook_step_reference(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, ridge: float = RIDGE
) -> Tensor:
    """The same solve by one-hot matrices in float64; entries keep their order (not sorted)."""
    out = codebook.double()
    for i in range(len(w)):
        n = int(sizes[i])
        p = torch.nn.functional.one_hot(codes[i].long(), n).double()
        a = p.T @ h.double() @ p
        if not a.trace() > 0:
            continue
        used = p.sum(0) > 0
        pull = torch.where(used, ridge, 1.0) * a.trace() / n
        out[i, :n] = torch.linalg.solve(
            a + pull.diag(), p.T @ h.double() @ w[i].double() + pull * out[i, :n]
        )
    return out
