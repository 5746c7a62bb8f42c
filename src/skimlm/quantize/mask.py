"""Which weights stay: N:M or a share of every row, by magnitude, Wanda or SparseGPT.

A mask is boolean [r, c], True = kept. Rows are outputs, columns inputs:
    2:4   of every 4 columns in a row 2 stay (N:M: of every M columns N)
    0.5   of every row half its weights go, wherever they are
Every row keeps the same number, whatever the method: that is what the format stores. (As published,
magnitude and SparseGPT take one threshold for all rows.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skimlm.errors import SkimError


@dataclass(frozen=True)
class Sparsity:
    """`keep` of every `of` columns stay, or (`of` = 0) all but a share `ratio` of each row."""

    keep: int = 0
    of: int = 0
    ratio: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Sparsity | None":
        """From `none`, `2:4` or `0.5`; SkimError for anything else."""
        if text == "none":
            return None
        left, colon, right = text.partition(":")
        try:
            if colon and 0 < int(left) < int(right) <= 64:
                return cls(int(left), int(right))
            if not colon and 0 < float(text) < 1:
                return cls(ratio=float(text))
        except ValueError:
            pass
        raise SkimError(
            f"sparsity must be none, N:M such as 2:4, or the share to drop such as 0.5, got {text}"
        )

    def kept(self, cols: int) -> int:
        """Weights that stay in a row of `cols`; SkimError if the pattern does not fit."""
        if not self.of:
            return cols - int(cols * self.ratio)
        if cols % self.of:
            raise SkimError(
                f"sparsity {self.keep}:{self.of} needs a multiple of {self.of} inputs, got {cols}: "
                "leave such linears out with --exclude, or use a share such as 0.5"
            )
        return cols // self.of * self.keep

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.ratio:g}"


def best(score: Tensor, sparsity: Sparsity) -> Tensor:
    """Keep the weights of the largest `score` [r, c]; of equal ones the later (stable sort)."""
    r, c = score.shape
    of, keep = (sparsity.of, sparsity.keep) if sparsity.of else (c, sparsity.kept(c))
    sparsity.kept(c)
    order = score.view(r, c // of, of).argsort(dim=-1, stable=True)
    mask = torch.zeros(r, c // of, of, dtype=torch.bool)
    return mask.scatter_(-1, order[..., of - keep :], True).view(r, c)


def magnitude(w: Tensor, sparsity: Sparsity) -> Tensor:
    """Keep the largest |w|; needs no calibration."""
    return best(w.abs(), sparsity)


def wanda(w: Tensor, rms: Tensor, sparsity: Sparsity) -> Tensor:
    """Keep the largest |w_ij| rms_j (2306.11695); `rms` [c] of the inputs."""
    return best(w.abs() * rms, sparsity)


def sparsegpt(
    w: Tensor,
    h: Tensor,
    sparsity: Sparsity | None,
    quantize: Callable[[Tensor, int], Tensor] | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune (and round) column by column, each error spread over the columns to come.

    SparseGPT (2301.00774), with `quantize(column [r], j)` also GPTQ (2210.17323): the pruned
    weight is rounded and the joint residual goes on. `h` [c, c] is the Gram matrix of the inputs.
    N:M masks are chosen when their columns are reached, a share per row within each block.
    Returns the new weight and the mask; a dead input's weights become 0.
    """
    r, c = w.shape
    w, h = w.clone(), h.double()
    dead = h.diagonal() <= 0
    w[:, dead] = 0
    h = h + torch.diag(torch.where(dead, 1.0, 0.0) + damp * h.diagonal().mean())
    u = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True
    ).float()  # row j: what an error at column j does to the columns from j on
    mask = torch.ones(r, c, dtype=torch.bool)
    quotas = _quotas(c, block, sparsity)
    for begin, end, keep in quotas:
        score = None
        if keep < end - begin and not (sparsity and sparsity.of):
            score = (w[:, begin:end] / u.diagonal()[begin:end]).square()
            order = score.argsort(dim=1, stable=True)
            mask[:, begin:end].scatter_(1, order[:, : end - begin - keep], False)
        errors = torch.empty(r, end - begin)
        for j in range(begin, end):
            if sparsity and sparsity.of and j % sparsity.of == 0:
                part = slice(j, j + sparsity.of)
                mask[:, part] = best((w[:, part] / u.diagonal()[part]).square(), sparsity)
            column = w[:, j]
            q = column * mask[:, j] if quantize is None else quantize(column, j) * mask[:, j]
            error = (column - q) / u[j, j]
            w[:, j:end] -= error[:, None] * u[j, j:end]
            w[:, j] = q
            errors[:, j - begin] = error
        w[:, end:] -= errors @ u[begin:end, end:]
    return w, mask


def _quotas(c: int, block: int, sparsity: Sparsity | None) -> list[tuple[int, int, int]]:
    """Blocks (begin, end, columns that stay per row), which add up to what a row keeps."""
    if sparsity and sparsity.of:
        sparsity.kept(c)
        block = max(block // sparsity.of, 1) * sparsity.of
    total = sparsity.kept(c) if sparsity else c
    edges = [*range(0, c, block), c]
    kept = [round(total * e / c) for e in edges]
    return [(a, b, k - j) for a, b, j, k in zip(edges, edges[1:], kept, kept[1:], strict=False)]
