"""Low-rank adapters: E [r, c] ~ B^T A with A [k, c], B [k, r], under what the inputs weigh.

    naive    ||E - B^T A||_F                       the SVD of E
    diag     ||(E - B^T A) diag(s)||_F             SLiM-LoRA: s = root mean square of the inputs
    gram     ||X (E - B^T A)^T||_F                 exact for the Gram matrix H = X^T X (QERA)

All three are one: with the k leading eigenvectors U of E H E^T (H = I, diag(s^2), or the Gram
matrix) the minimiser is U U^T E, so A = U^T E and B = U^T; nothing is inverted, so dead inputs need
no care. Components stand in rows.
"""

import math

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.format.layer import ADAPTER_GROUP
from skimlm.format.pack import Adapter, factor_values

ROUND = 16  # ranks are multiples of this


def rank_of(ratio: float, r: int, c: int) -> int:
    """Rank of an adapter of `ratio` times the smaller side, rounded up to a multiple of 16."""
    if not 0 <= ratio <= 1:
        raise SkimError(f"rank must be 0 (no adapters) to 1 times the smaller side, got {ratio:g}")
    return min(math.ceil(int(ratio * min(r, c)) / ROUND) * ROUND, min(r, c)) if ratio else 0


def low_rank(
    e: Tensor, k: int, h: Tensor | None = None, start: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(A [k, c], B [k, r]) of least error; `h` is None, s^2 [c], or a Gram matrix [c, c].

    Exact where the eigenvectors of the smaller side are cheap; with `start`, a B [k, r] to begin
    from, or a large matrix, by subspace iteration (Halko 0909.4061) with 16 extra vectors.
    """
    r, c = e.shape
    if k == 0 or not bool(e.any()):
        return torch.zeros(k, c), torch.zeros(k, r)
    if min(r, c) <= EXACT and start is None:
        u = _leading(e, k, h)
    else:
        u = _iterated(e, k, h, start, seed)
    return u.T @ e, u.T.contiguous()


EXACT = 1024  # side up to which eigenvectors are taken exactly


def _leading(e: Tensor, k: int, h: Tensor | None) -> Tensor:
    """The k leading eigenvectors [r, k] of E H E^T, by those of the smaller side."""
    r, c = e.shape
    if r <= c:
        return torch.linalg.eigh(_times(e, h).double() @ e.T.double())[1][:, -k:].flip(1).float()
    # R^T R = H turns E H E^T into M M^T with M = E R^T, whose left singular vectors are sought
    if h is None:
        m = e.double()
    elif h.dim() == 1:
        m = e.double() * h.double().clamp(min=0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(h.double())
        m = e.double() @ (vectors * values.clamp(min=0).sqrt())
    values, vectors = torch.linalg.eigh(m.T @ m)
    u = m @ vectors[:, -k:].flip(1)
    # a direction of no weight has no vector: QR gives it one that is orthogonal to the others
    return torch.linalg.qr(u)[0].float()


def _iterated(e: Tensor, k: int, h: Tensor | None, start: Tensor | None, seed: int) -> Tensor:
    r = len(e)
    extra = min(k + 16, r) - (0 if start is None else len(start))
    new = torch.randn(r, extra, generator=torch.Generator().manual_seed(seed))
    q = new if start is None else torch.cat([start.T, new], 1)
    for _ in range(2 if start is not None else 4):
        q = torch.linalg.qr(_times(e, h) @ (e.T @ q))[0]
    small = q.T @ e
    values, vectors = torch.linalg.eigh(_times(small, h) @ small.T)
    return q @ vectors[:, -k:].flip(1)


def _times(e: Tensor, h: Tensor | None) -> Tensor:
    return e if h is None else e * h if h.dim() == 1 else e @ h


def quantized(
    e: Tensor, a: Tensor, b: Tensor, bits: int, h: Tensor | None = None, rounds: int = 2
) -> Adapter:
    """An adapter for `e` in 16 or 4 bits, from (A, B) that `low_rank` found for it.

    In 4 bits each factor is fitted again, by least squares, to the other one as it is stored.
    """
    balance = (a.norm(dim=1) / b.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()[:, None]
    a, b = a / balance, b * balance  # trained later, both take steps of one size
    if bits == 16:
        return Adapter(a.bfloat16(), b.bfloat16())
    codes_b, scale_b = nibbles(b)
    codes_a, scale_a = nibbles(a)
    for _ in range(rounds):
        stored_b = factor_values(codes_b, scale_b)
        codes_a, scale_a = nibbles(_solve(stored_b @ stored_b.T, stored_b @ e))
        stored_a = factor_values(codes_a, scale_a)
        ah = _times(stored_a, h)
        codes_b, scale_b = nibbles(_solve(ah @ stored_a.T, ah @ e.T))
    return Adapter(codes_a, codes_b, scale_a, scale_b)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram^-1 right, a little ridge for components that are 0."""
    n = len(gram)
    ridge = 1e-6 * gram.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.solve(gram.double() + ridge.double() * torch.eye(n), right.double()).float()


def nibbles(x: Tensor, candidates: int = 10) -> tuple[Tensor, Tensor]:
    """int8 codes of `x` [k, n], and bfloat16 scales of least squared error for groups of 128."""
    k, n = x.shape
    parts = torch.nn.functional.pad(x, (0, -n % ADAPTER_GROUP)).view(k, -1, ADAPTER_GROUP)
    low, high = parts.amin(-1), parts.amax(-1)
    full = torch.where(high > -low, high, low) / -8  # the longer side gets the extra code
    best, scale = torch.full_like(full, torch.inf), torch.zeros_like(full)
    codes = torch.zeros_like(parts)
    for shrink in torch.linspace(1.1, 0.7, candidates).tolist():
        trial = (full * shrink).bfloat16().float()
        step = torch.where(trial == 0, 1.0, trial)[..., None]
        code = (parts / step).round_().clamp_(-8, 7)
        error = (code * trial[..., None] - parts).square_().sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, trial, scale)
        codes = torch.where(better[..., None], code, codes)
    return codes.flatten(1)[:, :n].to(torch.int8).contiguous(), scale.bfloat16()
