"""Token windows -> what the fit needs to know about every linear.

With x_t the input of a linear at token t and g_t = d loss / d z_t the gradient at its output
z = x W^T (loss = sum over tokens of the cross entropy, so that layers and windows compare):
    hessian        H  = sum_t x_t x_t^T                           layer-wise (GPTQ)
    end_hessian    H~ = sum_t (mean_i g_ti^2) x_t x_t^T           end loss (GuidedQuant, 2505.07004)
    fisher         F_ij = sum_windows (sum_t g_ti x_tj)^2         SqueezeLLM, 2306.07629
    row_weight     rho_i = sum_t g_ti^2 / sum_t mean_i g_ti^2     what the mean over rows hides
Products run in bfloat16 (2-5x faster on CPUs with AMX), sums over windows in float32. A few windows
at a time go through the blocks in order, so nothing here needs more than their activations. The
Fisher diagonal settles on far fewer windows than H~ does (SqueezeLLM: 10 sequences), so only the
first `fisher_windows` pay for it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from skimlm.errors import SkimError
from skimlm.models.hooks import forwards_replaced
from skimlm.storage.safetensors import finite
from skimlm.train.losses import chunks

BATCH = 2  # windows that go through the model together
PART = 2**20  # numbers of a product that are squared at a time
TILE = 512  # rows of a sum of squares at a time: what lies left of a tile is not computed
FEW = 64  # tokens, below which an expert has no statistics of its own
Observe = Callable[[str, Tensor, Tensor], None]


@dataclass
class Statistics:
    """Sums over the calibration tokens of one linear [r, c]; see the module docstring."""

    end_hessian: Tensor  # [c, c] float32
    fisher: Tensor  # [r, c] float32
    row_weight: Tensor  # [r] float32, mean 1
    hessian: Tensor | None = None  # [c, c] float32, shared by linears that read the same input
    tokens: int = 0

    @property
    def sums(self) -> list[Tensor]:
        """All of them."""
        found = [self.end_hessian, self.fisher, self.row_weight, self.hessian]
        return [tensor for tensor in found if tensor is not None]

    @property
    def input_rms(self) -> Tensor:
        """Root mean square of every input channel [c] (needs `hessian`)."""
        if self.hessian is None:
            raise ValueError("input_rms needs the layer-wise hessian, which was not collected")
        return (self.hessian.diagonal() / max(self.tokens, 1)).clamp(min=0).sqrt()


class Summed(Protocol):
    """Sums over the tokens that an expert saw."""

    tokens: int

    @property
    def sums(self) -> list[Tensor]: ...


def share(experts: Sequence[Summed]) -> None:
    """Give experts of a stack that saw hardly a token those of all together, by their tokens."""
    total = sum(expert.tokens for expert in experts)
    if not total or all(expert.tokens >= FEW for expert in experts):
        return
    for sums in zip(*(expert.sums for expert in experts), strict=True):
        whole = torch.zeros_like(sums[0])
        for one in sums:
            whole += one
        for one, expert in zip(sums, experts, strict=True):
            if expert.tokens < FEW:
                one.copy_(whole * (max(expert.tokens, 1) / total))


def check_seen(of: Mapping[str, Summed], stacks: Sequence[Sequence[str]]) -> None:
    """Refuse a matrix of which no token tells anything: it would be taken for one that is idle."""
    for name in (n for n, summed in of.items() if not summed.tokens):
        if not any(name in names and any(of[n].tokens for n in names) for names in stacks):
            alike = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            raise SkimError(
                f"{name}: no token of the calibration text reaches it; give other text, or leave "
                f"all like it as they are with --exclude '{alike}'"
            )


def padded(x: Tensor, size: int = FEW) -> Tensor:
    """x [n, t, c] with tokens of zeros up to a multiple of `size`.

    For each other number of tokens torch keeps code for the product, and heap between it: 32 MB
    each for an expert of 5760 x 2880, 5 GB after 16 windows.
    """
    return nn.functional.pad(x, (0, 0, 0, -x.shape[1] % size))


class _Observe(torch.autograd.Function):
    """z = x W^T + b whose backward also feeds x and dz to `observe`; W needs no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, observe):
        ctx.save_for_backward(x, weight)
        ctx.observe = observe
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.observe(x, gradient)
        return gradient @ weight, None, None, None


@contextmanager
def observed(linears: Mapping[str, nn.Linear], observe: Observe) -> Iterator[None]:
    """Within the block, every backward pass calls observe(name, x [n, t, c], dz [n, t, r])."""

    def watch(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: _Observe.apply(x, linear.weight, linear.bias, partial(observe, name))

    with forwards_replaced(linears, watch):
        yield


class Sums:
    """The sums of `Statistics` for some linears while they are taken, a batch of windows at a time.

    The same windows in the same batches give the same bits, whichever linears are taken together.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        layerwise: bool,
        fisher_windows: int,
        stacks: Sequence[Sequence[str]] = (),
    ) -> None:
        """`stacks` are the linears that are experts of a layer, for `share`."""
        self.of: dict[str, Statistics] = {}
        self.stacks = stacks
        self.routed = {name for names in stacks for name in names}
        self.fisher_windows = fisher_windows
        self.first, self.count = 0, 0
        for name, linear in linears.items():
            r, c = linear.weight.shape
            sums = torch.zeros(c, c), torch.zeros(r, c), torch.zeros(r)
            self.of[name] = Statistics(*sums, torch.zeros(c, c) if layerwise else None)

    def begin(self, first: int, count: int) -> None:
        """What is observed next belongs to `count` windows from number `first` on."""
        self.first, self.count = first, count

    def observe(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add the inputs x [n, t, c] and the gradients g [n, t, r] of a linear's outputs."""
        s = self.of[name]
        # Some families (opt) flatten windows and tokens before a linear.
        x, g = x.reshape(self.count, -1, x.shape[-1]), g.reshape(self.count, -1, g.shape[-1])
        s.tokens += self.count * x.shape[1]
        if name in self.routed:
            x, g = padded(x), padded(g)
        for window in range(min(self.count, self.fisher_windows - self.first)):
            _add_squared(s.fisher, g[window], x[window])
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        squares = g.float().square()
        weighted = (x * squares.mean(1, keepdim=True).sqrt()).to(x.dtype)
        _add_square(s.end_hessian, weighted)
        s.row_weight += squares.sum(0).cpu()
        if s.hessian is not None:
            _add_square(s.hessian, x)

    def finished(self, dtype: torch.dtype) -> dict[str, Statistics]:
        """The sums, row weights with mean 1; SkimError where the model overflowed its `dtype`."""
        for names in self.stacks:
            share([self.of[n] for n in names])
        check_seen(self.of, self.stacks)
        for name, s in self.of.items():
            for square in (s.end_hessian, s.hessian):
                if square is not None:
                    _mirror(square)
            mean = s.row_weight.mean()
            s.row_weight = s.row_weight / mean if mean > 0 else torch.ones_like(s.row_weight)
            for matrix in (s.end_hessian, s.fisher, s.hessian):
                if matrix is not None and not finite(matrix):
                    raise SkimError(
                        f"{name}: calibration overflowed (not finite): the model's activations do "
                        f"not fit {dtype}; use other text"
                    )
        return self.of


def _add_square(total: Tensor, x: Tensor) -> None:
    """Add x^T x to its sum, but for what lies left of tiles on the diagonal."""
    for rows in chunks(x.shape[1], TILE):
        total[rows, rows.start :] += (x[:, rows].T @ x[:, rows.start :]).float().cpu()


def _add_squared(total: Tensor, g: Tensor, x: Tensor) -> None:
    """Add the squares of the entries of g^T x: fresh pages for all at once double the time."""
    for rows in chunks(len(total), max(1, PART // x.shape[1])):
        product = (g[:, rows].T @ x).float().cpu()
        total[rows].addcmul_(product, product)


def _mirror(total: Tensor) -> None:
    """Fill in what `_add_square` leaves out."""
    for rows in chunks(len(total), TILE):
        total[rows.stop :, rows] = total[rows, rows.stop :].T
