"""What an embedding and a head lose by the width of each row, in the units of the linears' errors.

    sums = TableSums.of(model)
    with observed_tables(model, sums):      while the calibration windows pass, forward and backward
        analyse(walk, stored, plan)
    for name, use in uses(model).items():   one table that is "tied", or two
        known = analysis(weight, sums, use)               centroids, error curve: as of a linear
        packed_table(weight, known, widths, plan)         what is stored of it

Row v of a head, z_tv = w_v x_t the logit of token v at t, p_tv its probability. In place of the
square of the gradient p_tv - y_tv stands what the model expects of it: a token that is never the
target of the calibration text, as nearly all are, has that too (docs/log.md).
    s_tv  = p_tv (1 - p_tv)
    H     = sum_t mean_v(s_tv) x_t x_t^T         of all rows
    a_v   = sum_t s_tv                           what row v counts; rho_v = a_v / mean a
The logits of a row are off by some variance sigma^2 over the tokens, a_v sigma^2 = rho_v d H d^T.
To second order that is its error. But the probability of an unlikely token grows by
exp(sigma^2 / 2), and nearly all of the vocabulary is unlikely. With a normal error of the logit
    E_v   = 2 a_v (exp(sigma^2 / 2) - 1)         = a_v sigma^2 + ...

Row v of an embedding, g_t the gradient of the loss by what token t is looked up as:
    G     = sum_t g_t g_t^T                      of all rows
    k_v   ~ n_v^(1/2), sum_v k_v = 1             n_v = sum_t p_tv: how often v is expected
    E_v   = k_v d G d^T
n_v is a smoothed count: of tokens that do not occur in the text it is what Good and Turing give.
The gradients of a token that is frequent are smaller, about as n_v^(-1/2) (docs/log.md).

Rows of a table that is both lose the sum; they are refined under the mean of a_v H and k_v G.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skimlm.format.pack import QuantizedWeight, pack
from skimlm.format.row_codes import MAX_TABLE_WIDTH, code_bits
from skimlm.models.blocks import embeddings, multiplier_of
from skimlm.models.head import behind_head
from skimlm.models.hooks import forward_replaced
from skimlm.pipeline.config import Recipe
from skimlm.pipeline.recipes import fit_linear, settled
from skimlm.pipeline.sensitivity import EDGES, Analysis
from skimlm.quantize import trellis_fit
from skimlm.quantize.fit import TRELLISES, WIDTHS, errors_under
from skimlm.quantize.kmeans import kmeans_rows
from skimlm.quantize.refine import damped, quadratic

BITS = [code_bits(width) for width in TRELLISES]
CHUNK = 2**24  # logits in float32 at a time: some copies of 64 MB
ROWS = 2**14  # of a table that are worked on at a time
MOST = 60.0  # sigma^2 / 2: nothing is worse


@dataclass
class TableSums:
    """Sums over the calibration tokens of a model's embedding and head; see the module docstring.

    V tokens, embeddings of d numbers.
    """

    head_hessian: Tensor  # H [d, d] float32
    head_weight: Tensor  # a_v [V] float32
    expected: Tensor  # n_v [V] float32
    embedding_gram: Tensor  # G [d, d] float32
    tokens: int = 0

    @classmethod
    def of(cls, model: Any) -> TableSums:
        """No token yet."""
        rows, d = model.get_input_embeddings().weight.shape
        head = model.get_output_embeddings()
        outputs, c = (rows, d) if head is None else head.weight.shape
        return cls(torch.zeros(c, c), torch.zeros(outputs), torch.zeros(outputs), torch.zeros(d, d))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TableSums:
        """Invert `tensors`."""
        return cls(
            **{n: t for n, t in tensors.items() if n != "tokens"}, tokens=int(tensors["tokens"])
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return vars(self) | {"tokens": torch.tensor(self.tokens)}

    def see_states(self, x: Tensor, variance: Tensor, probability: Tensor) -> None:
        """Add what the head is given [n, d], and s_tv and p_tv float32 [n, V]."""
        weighted = (x * variance.mean(1, keepdim=True).sqrt()).to(x.dtype)
        self.head_hessian += (weighted.T @ weighted).float().cpu()
        self.head_weight += variance.sum(0).cpu()
        self.expected += probability.sum(0).cpu()
        self.tokens += len(x)

    def see_gradients(self, g: Tensor) -> None:
        """Add gradients [n, d] of the loss by what tokens are looked up as."""
        self.embedding_gram += (g.float().T @ g.float()).cpu()


@contextmanager
def observed_tables(model: Any, sums: TableSums) -> Iterator[None]:
    """Within the block passes with gradients add to `sums`: a window's forward and backward.

    Every token must come to the head once.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    usual = head.forward
    scale = multiplier_of(table) or 1.0  # by which its module multiplies a row

    def looked_up(_module: Any, _ids: Any, out: Tensor) -> None:
        if torch.is_grad_enabled():
            out.requires_grad_()
            out.register_hook(lambda g: sums.see_gradients(scale * g.reshape(-1, g.shape[-1])))

    def projected(x: Tensor) -> Tensor:
        z = usual(x)
        if torch.is_grad_enabled() and x.requires_grad:
            flat, logits = (t.detach().reshape(-1, t.shape[-1]) for t in (x, z))
            for rows in torch.arange(len(flat)).split(max(1, CHUNK // logits.shape[1])):
                sums.see_states(flat[rows], *_predicted(model, logits[rows]))
        return z

    hook = table.register_forward_hook(looked_up)
    try:
        with forward_replaced(head, projected):
            yield
    finally:
        hook.remove()


def _predicted(model: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """s_tv by what the head puts out, and p_tv, [n, V]: soft caps and scales behind it count."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        logits = behind_head(model, leaf)
        p = logits.detach().float().softmax(-1)
        (root,) = torch.autograd.grad(logits, leaf, (p * (1 - p)).sqrt().to(logits.dtype))
    return root.float().square_(), p


def analysis(weight: Tensor, sums: TableSums, use: str) -> Analysis:
    """What is known of a table [V, d] that is used as "embedding", "head", or "tied" for both.

    Widths, codebooks and codes then follow as those of a linear; a table of many rows goes by
    `rows_of` a part at a time.
    """
    h, a, g, k = sums.head_hessian, sums.head_weight, sums.embedding_gram, sums.expected.sqrt()
    by_head, by_embedding = (h / a.mean(), a), (g, k / k.sum())
    known = {"head": [by_head], "embedding": [by_embedding], "tied": [by_head, by_embedding]}[use]
    mixed = torch.stack([matrix * rows.mean() for matrix, rows in known]).sum(0)
    fisher = mixed.diagonal().bfloat16().expand(weight.shape)  # by which k-means weighs columns
    centroids: list[list[Tensor]] = []
    errors = torch.zeros(len(weight), len(WIDTHS), dtype=torch.float64)
    tables, scales = _learnt(weight, fisher), torch.empty(len(weight), len(BITS))
    for some in slices(len(weight)):
        w, f = weight[some].float(), fisher[some].float()
        centroids.append(kmeans_rows(w, f, MAX_TABLE_WIDTH, EDGES)[0])
        rounded = []
        for i, (table, bits) in enumerate(zip(tables, BITS, strict=True)):
            scales[some, i] = trellis_fit.find_scales(w, f, table, bits)
            rounded.append(trellis_fit.rounded(w, f, table, scales[some, i], bits))
        for matrix, rows in known:
            full = damped(matrix)
            more = [quadratic(w_hat - w, full.bfloat16()).double()[:, None] for w_hat in rounded]
            lost = torch.cat([errors_under(w, f, centroids[-1], full), *more], 1)
            lost = grown(lost) if rows is a else lost
            errors[some] += rows[some].double()[:, None] * lost
    share = torch.stack([rows * matrix.diagonal().sum() for matrix, rows in known]).sum(0)
    whole = [torch.cat(tables) for tables in zip(*centroids, strict=True)]
    weights = share / share.mean()
    return Analysis(damped(mixed), fisher, weights, whole, tables, scales, errors, sums.tokens)


def _learnt(weight: Tensor, fisher: Tensor) -> Tensor:
    """Tables [widths, 128] of the trellises that suit the rows of a table."""
    some = torch.arange(0, len(weight), -(-len(weight) // ROWS))
    w, f = weight[some].float(), fisher[some].float()
    return torch.stack([trellis_fit.learn_table(w, f, bits) for bits in BITS])


def uses(model: Any) -> dict[str, str]:
    """The tables of a model by name, and what each is used as: what `analysis` asks for."""
    (table, _), head, tied = embeddings(model)
    if head is None or tied:
        return {table: "embedding" if head is None else "tied"}
    return {table: "embedding", head[0]: "head"}


def packed_table(
    weight: Tensor, known: Analysis, widths: Tensor, plan: Recipe
) -> dict[str, Tensor]:
    """The tensors that are stored for a table at its widths: `packed_linear`, in parts.

    A trellis is learnt on some of its rows, and then fixed for all.
    """
    tables = known.tables.clone()
    for k, width in enumerate(TRELLISES):
        own = (widths == width).nonzero().flatten()
        if len(own):
            some = own[:: -(-len(own) // ROWS)]
            w, of_rows = weight[some].float(), rows_of(known, some)
            levels = fit_linear(w, of_rows, widths[some], plan).trellis[width].table
            tables[k] = levels * (tables[k].abs().max() / levels.abs().max())
    fixed = replace(known, tables=tables)

    def part(some: slice) -> QuantizedWeight:
        w, of_rows = weight[some].float(), rows_of(fixed, some)
        return settled(w, of_rows, fit_linear(w, of_rows, widths[some], plan, True), plan)

    return dict(pack(joined([part(some) for some in slices(len(weight))])).tensors)


def slices(rows: int) -> list[slice]:
    """The rows of a table in parts that are worked on at a time."""
    return [slice(i, min(i + ROWS, rows)) for i in range(0, rows, ROWS)]


def rows_of(known: Analysis, some: slice | Tensor) -> Analysis:
    """What is known of some rows."""
    return replace(
        known,
        fisher=known.fisher[some],
        row_weight=known.row_weight[some],
        centroids=[table[some] for table in known.centroids],
        scales=known.scales[some],
        errors=known.errors[some],
    )


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of all parts, one part after the other; a trellis is the same in all."""

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(q, name) for q in parts])

    codes, widths, codebook = whole("codes"), whole("widths"), whole("codebook")
    tables: dict[int, Tensor] = {}
    for q in parts:
        used = [width for width in TRELLISES if (q.widths == width).any()]
        tables |= dict(zip(used, q.trellis, strict=True))
    trellis = torch.stack([tables[w] for w in sorted(tables)]) if tables else parts[0].trellis
    scales = whole("row_scale"), whole("row_zero")
    return QuantizedWeight(codes, widths, codebook, *scales, trellis=trellis)


def grown(variance: Tensor) -> Tensor:
    """What a logit that is off by a normal error of this variance costs: 2 (exp(s / 2) - 1)."""
    return 2 * torch.expm1((variance / 2).clamp(max=MOST))
