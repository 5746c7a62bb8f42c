"""Refinement that keeps the format: codes, masks and codebooks of every row under a full matrix H.

Steps that never raise the error (w_hat - w) H (w_hat - w)^T of any row (LNQ, 2505.07004):
    codebook_step         codes fixed: c = (P^T H P)^-1 P^T H w, unused entries held in place
    coordinate_descent    codebook fixed: column by column, the entry nearest to
                          w_j - sum_{k != j} H_jk (w_hat_k - w_k) / H_jj; ties keep the code
    sparse_descent        the same where some weights are 0; with `pairs` every four columns choose
                          anew which two of them stay, both at the best codes for the pair
The native versions keep the gradient G = (w_hat - w) H up to date, touched only when a code
changes, which after the first sweep is rare; many rows at a time go through a tile of H (4 to 6
times as fast as row by row at 2048x4096). The readable versions below are their oracles.
"""

import itertools

import torch
from torch import Tensor

from skimlm import native
from skimlm.format.pack import spread

RIDGE = 1e-7
SPAN = 2048  # columns of a tile of H
PRUNED = 255  # the code of a weight that is 0
DOUBLE = torch.float64


def damped(h: Tensor, shrink: float = 0.3, damp: float = 0.01) -> Tensor:
    """`h` shrunk towards its diagonal, plus `damp` of the mean diagonal; positive definite.

    A Gram matrix of few tokens has off-diagonal noise that refinement would fit; both guard
    against it.
    """
    diagonal = h.diagonal()
    out = h + h.T  # products of bfloat16 are not symmetric to the last bit
    out *= (1 - shrink) / 2
    out.diagonal().copy_(diagonal + damp * diagonal.mean())
    return out


def dense(codes: Tensor, codebook: Tensor) -> Tensor:
    """De-quantized rows [r, c]: codebook[i, codes[i, j]]."""
    return codebook.gather(1, codes.long())


def row_errors(w: Tensor, w_hat: Tensor, h: Tensor) -> Tensor:
    """(w_hat - w) H (w_hat - w)^T of every row, [r]."""
    d = w_hat - w
    return ((d @ h) * d).sum(1)


def quadratic(d: Tensor, h: Tensor) -> Tensor:
    """d H d^T of every row [r]; of H [c, c] bfloat16, symmetric, one of each pair of tiles."""
    low, total = d.bfloat16(), torch.zeros(len(d))
    for begin in range(0, d.shape[1], SPAN):
        end = begin + SPAN
        product = low[:, begin:end] @ h[begin:end, begin:]
        total += (product[:, :SPAN] * d[:, begin:end]).sum(1)
        total += 2 * (product[:, SPAN:] * d[:, end:]).sum(1)
    return total


def coordinate_descent(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, sweeps: int
) -> Tensor:
    """Codes after `sweeps` cyclic passes; `codes` uint8 [r, c] is the start and is left alone."""
    _check(w, h, codebook, sizes, codes)
    if native.missing():
        return coordinate_descent_reference(w, h, codebook, sizes, codes, sweeps)
    codes = codes.clone()
    _descend(h, _gradient(w, h, codebook, codes), codebook, sizes, codes, sweeps)
    return codes


def _gradient(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """(w_hat - w) H, [r, c]."""
    return ((dense(codes, codebook) - w) @ h).contiguous()


def _descend(
    h: Tensor, gradient: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, sweeps: int
) -> None:
    """Change `codes` in place, and the gradient with them."""
    r, c = codes.shape
    k = codebook.shape[1]
    native.call("coordinate_descent", h, gradient, codebook, sizes, codes, r, c, k, sweeps)


def sparse_dense(codes: Tensor, codebook: Tensor, scale: Tensor, group: int) -> Tensor:
    """Rows [r, c] of sparse codes: codebook[i, codes[i, j]] * scale[i, j // group], or 0."""
    pruned = codes == PRUNED
    level = dense(codes.masked_fill(pruned, 0), codebook)
    return (level * spread(scale, group, codes.shape[1])).masked_fill_(pruned, 0)


def sparse_descent(
    w: Tensor,
    h: Tensor,
    codebook: Tensor,
    sizes: Tensor,
    scale: Tensor,
    group: int,
    codes: Tensor,
    pairs: bool,
    sweeps: int,
) -> Tensor:
    """Codes after `sweeps` passes over a sparse weight, 255 being a weight of 0.

    `scale` float32 [r, ceil(c / group)]. With `pairs` every aligned four columns keep two, which
    are chosen anew; without, the mask stays.
    """
    r, c = w.shape
    _check(w, h, codebook, sizes, codes, sparse=True)
    native.require("scale", scale, torch.float32, (r, -(-c // group)))
    if pairs and c % 4:
        raise ValueError(f"pairs need a multiple of 4 columns, got {c}")
    if native.missing():
        return sparse_descent_reference(w, h, codebook, sizes, scale, group, codes, pairs, sweeps)
    gradient = ((sparse_dense(codes, codebook, scale, group) - w) @ h).contiguous()
    codes = codes.clone()
    native.call(
        "sparse_descent",
        *(h, gradient, codebook, sizes, scale, group, codes),
        *(r, c, codebook.shape[1], int(pairs), sweeps),
    )
    return codes


def codebook_step(
    w: Tensor,
    h: Tensor,
    codebook: Tensor,
    sizes: Tensor,
    codes: Tensor,
    ridge: float = RIDGE,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Least-squares codebooks for fixed codes: (codebook ascending, codes renamed to match).

    Code 255 is a weight of 0 and stays one. `gradient` (w_hat - w) H [r, c] is brought up to date.
    """
    r, c = w.shape
    k = codebook.shape[1]
    _check(w, h, codebook, sizes, codes, sparse=True)
    if native.missing():
        stepped, renamed = _sorted(
            codebook_step_reference(w, h, codebook, sizes, codes, ridge), sizes, codes
        )
        if gradient is not None:
            gradient += (_level(renamed, stepped) - _level(codes, codebook)) @ h
        return stepped, renamed
    codes, codebook = codes.clone(), codebook.clone()
    native.call("codebook_step", h, w, sizes, codes, codebook, gradient, r, c, k, float(ridge))
    return codebook, codes


def refine(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, rounds: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """`rounds` times `sweeps` of coordinate descent, then a codebook step; ends on descent."""
    _check(w, h, codebook, sizes, codes)
    if native.missing():
        for _ in range(rounds):
            codes = coordinate_descent_reference(w, h, codebook, sizes, codes, sweeps)
            codebook, codes = codebook_step(w, h, codebook, sizes, codes)
        return codebook, coordinate_descent_reference(w, h, codebook, sizes, codes, sweeps)
    codes = codes.clone()
    gradient = _gradient(w, h, codebook, codes)
    for _ in range(rounds):
        _descend(h, gradient, codebook, sizes, codes, sweeps)
        codebook, codes = codebook_step(w, h, codebook, sizes, codes, gradient=gradient)
    _descend(h, gradient, codebook, sizes, codes, sweeps)
    return codebook, codes


def _check(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, sparse: bool = False
) -> None:
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
    used = codes.masked_fill(codes == PRUNED, 0) if sparse else codes
    if r and bool((used.amax(1).int() >= sizes).any()):
        raise ValueError("a code points past the end of its row's codebook")


def coordinate_descent_reference(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, sweeps: int
) -> Tensor:
    """The same passes in float64, one coordinate of all rows at a time."""
    codes, entries, target = codes.clone(), codebook.double(), w.double()
    unused = torch.arange(codebook.shape[1]) >= sizes.unsqueeze(1)
    for j in (j for _ in range(sweeps) for j in range(w.shape[1])):
        if h[j, j] <= 0:
            continue
        d = entries.gather(1, codes.long()) - target
        old = entries.gather(1, codes[:, j : j + 1].long())
        want = old - (d @ h[:, j].double() / h[j, j].double()).unsqueeze(1)
        distance = (entries - want).abs().masked_fill_(unused, torch.inf)
        least, m = distance.min(1, keepdim=True)
        codes[:, j : j + 1] = torch.where(least < (old - want).abs(), m, codes[:, j : j + 1])
    return codes


def codebook_step_reference(
    w: Tensor, h: Tensor, codebook: Tensor, sizes: Tensor, codes: Tensor, ridge: float = RIDGE
) -> Tensor:
    """The same solve by one-hot matrices in float64; entries keep their order (not sorted)."""
    out = codebook.double()
    for i in range(len(w)):
        n = int(sizes[i])
        p = (codes[i].unsqueeze(1) == torch.arange(n)).double()  # of a weight of 0 all zeros
        a = p.T @ h.double() @ p
        if not a.trace() > 0:
            continue
        used = p.sum(0) > 0
        pull = torch.where(used, ridge, 1.0) * a.trace() / n
        out[i, :n] = torch.linalg.solve(
            a + pull.diag(), p.T @ h.double() @ w[i].double() + pull * out[i, :n]
        )
    return out


def _sorted(codebook: Tensor, sizes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of every row ascending in float32, codes renamed to match."""
    codebook, codes = codebook.float(), codes.clone()
    for row, n, code in zip(codebook, sizes.tolist(), codes, strict=True):
        row[:n], order = row[:n].sort(stable=True)
        coded = code != PRUNED
        code[coded] = order.argsort()[code[coded].long()].to(torch.uint8)
    return codebook, codes


def _level(codes: Tensor, codebook: Tensor) -> Tensor:
    """`dense` where code 255 is a weight of 0."""
    pruned = codes == PRUNED
    return dense(codes.masked_fill(pruned, 0), codebook).masked_fill_(pruned, 0)


def sparse_descent_reference(
    w: Tensor,
    h: Tensor,
    codebook: Tensor,
    sizes: Tensor,
    scale: Tensor,
    group: int,
    codes: Tensor,
    pairs: bool,
    sweeps: int,
) -> Tensor:
    """The same passes in float64, row by row, one group of four and one coordinate at a time."""
    steps = scale.repeat_interleave(group, dim=1)[:, : w.shape[1]].double()
    rows = [
        _sparse_row(
            w[i].double(), h.double(), codebook[i, :n].double(), steps[i], row, pairs, sweeps
        )
        for i, (n, row) in enumerate(zip(sizes.tolist(), codes.tolist(), strict=True))
    ]
    return torch.tensor(rows, dtype=torch.uint8)


def _sparse_row(
    target: Tensor,
    matrix: Tensor,
    entries: Tensor,
    step: Tensor,
    codes: list[int],
    pairs: bool,
    sweeps: int,
) -> list[int]:
    """One row of `sparse_descent_reference`."""
    columns = range(len(codes))

    def value(code: int, j: int) -> Tensor:
        return torch.zeros((), dtype=DOUBLE) if code == PRUNED else entries[code] * step[j]

    def nearest(want: Tensor, j: int) -> int:
        return int((entries * step[j] - want).abs().argmin())

    def row() -> Tensor:
        return torch.stack([value(codes[j], j) for j in columns])

    for _ in range(sweeps):
        for j in columns[::4] if pairs else ():
            four = matrix[j : j + 4, j : j + 4]
            v = row()
            b = ((v - target) @ matrix)[j : j + 4] - four @ v[j : j + 4]  # gradient at 0
            best = float(v[j : j + 4] @ (b + four @ v[j : j + 4] / 2))
            for p, q in itertools.combinations(range(4), 2):
                both = torch.tensor([p, q])
                free = torch.linalg.solve(four[both][:, both], -b[both])
                for s, t, want in ((p, q, free[0]), (q, p, free[1])):
                    new, u = [PRUNED] * 4, torch.zeros(4, dtype=DOUBLE)
                    new[s] = nearest(want, j + s)
                    u[s] = value(new[s], j + s)
                    new[t] = nearest(-(b[t] + four[s, t] * u[s]) / four[t, t], j + t)
                    u[t] = value(new[t], j + t)
                    f = float(u @ (b + four @ u / 2))
                    if f < best - 1e-6 * abs(best):
                        best, codes[j : j + 4] = f, new
        for j in columns:
            if codes[j] == PRUNED or matrix[j, j] <= 0:
                continue
            old = value(codes[j], j)
            want = old - ((row() - target) @ matrix[:, j]) / matrix[j, j]
            m = nearest(want, j)
            if (value(m, j) - want).abs() < (old - want).abs():
                codes[j] = m
    return codes
