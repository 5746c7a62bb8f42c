"""Experts apart: one linear for each, where a family keeps a stack of matrices.

transformers keeps the experts of a layer as one parameter [experts, rows, columns], and a module's
own code takes matrices from it: `F.linear(x, self.gate_up_proj[expert])`. A `Stack` stands in that
parameter's place, and what is taken from it is a `Matrix`: to multiply by one runs the linear of
that expert. So a module routes, gates and adds up as it always did, and an expert is a linear like
any other: it can be observed, compressed, and is never unpacked together with the others.

For one token that code takes longer than the products. Where transformers has functions of its own
for a module's experts, `forward` is one more: one product for all experts of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from skimlm.format.layer import Layer
from skimlm.runtime import ops
from skimlm.runtime.linear import CompressedLinear
from skimlm.runtime.watched import ANY_MODULE, untouched

PRODUCTS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})
BATCHED = frozenset({torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__})


class Stack(nn.Module):
    """Linears "0", "1", ... in place of a parameter [experts, out, in], or [experts, in, out]."""

    def __init__(self, linears: Iterable[nn.Module], transposed: bool) -> None:
        """`transposed`: the parameter is [experts, in, out]."""
        super().__init__()
        self.transposed = transposed
        for i, linear in enumerate(linears):
            self.add_module(str(i), linear)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | Tensor) -> Matrix:
        """The matrix of one expert."""
        return Matrix(self._modules[str(int(index) % len(self))], self.transposed)

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        return torch.Size([len(self), *self[0].shape])

    @property
    def dtype(self) -> torch.dtype:
        """What the experts compute in."""
        return self[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self[0].device

    def size(self, dim: int) -> int:
        """One number of its shape."""
        return self.shape[dim]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The parameter again."""
        return torch.stack([self[i].dense(dtype) for i in range(len(self))])

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """x [experts, n, in] times the stack, expert by expert; other functions get all of it."""
        if func in BATCHED and isinstance(args[1], cls) and args[0].ndim == 3:
            return torch.stack([x @ args[1][i] for i, x in enumerate(args[0])])
        return func(*_dense(args), **(kwargs or {}))


class Matrix:
    """What a module takes from a `Stack`: the matrix of an expert, W [out, in] or W^T."""

    def __init__(self, linear: Any, transposed: bool) -> None:
        self.linear, self.transposed = linear, transposed

    @property
    def shape(self) -> torch.Size:
        """Its rows and columns."""
        sizes = self.linear.out_features, self.linear.in_features
        return torch.Size(reversed(sizes) if self.transposed else sizes)

    @property
    def dtype(self) -> torch.dtype:
        """What the expert computes in; that of its codes where it is compressed."""
        return self.linear.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the expert is."""
        return self.linear.weight.device

    @property
    def T(self) -> Matrix:  # as torch calls it
        """The matrix with its rows as columns."""
        return Matrix(self.linear, not self.transposed)

    def t(self) -> Matrix:
        """The matrix with its rows as columns."""
        return self.T

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Its numbers."""
        dequantize = getattr(self.linear, "dequantize", None)
        weight = dequantize(dtype) if dequantize else self.linear.weight
        return weight.T if self.transposed else weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Products run the expert's linear; every other function gets its numbers."""
        given = dict(kwargs or {})
        other = args[1] if len(args) > 1 else None
        if isinstance(other, cls) and isinstance(args[0], Tensor):
            if func is F.linear and not other.transposed:
                bias = args[2] if len(args) > 2 else given.get("bias")
                out = other.linear(args[0])
                return out if bias is None else out + bias
            if func in PRODUCTS and other.transposed:
                return other.linear(args[0])
        return func(*_dense(args), **given)


def _dense(args: Sequence[Any]) -> list[Any]:
    """Arguments with the numbers of stacks and matrices, in the dtype of the tensor beside them."""
    floats = (x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())
    dtype = next(floats, torch.get_default_dtype())
    return [x.dense(dtype) if isinstance(x, (Stack, Matrix)) else x for x in args]


# ---- one token

APART = "skimlm"  # the name of `forward` in a config
# whether `one_token` gave what the module's own code gave, the first time
_agree: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of the tokens [n, d]: top_k_index and top_k_weights [n, k] say which, and how much.

    One token takes `one_token` where that gives the same numbers, all else the module's own code.
    """
    own = inspect.unwrap(type(self).forward)
    given = hidden_states, top_k_index, top_k_weights
    layers = _layers(self, hidden_states, top_k_index) if len(hidden_states) == 1 else None
    if layers is None or _agree.get(self) is False:
        return own(self, *given)
    out = one_token(self, *given, *layers)
    if self in _agree:
        return out
    expected = own(self, *given)
    _agree[self] = torch.equal(out, expected)
    return expected


ALL_EXPERTS_FUNCTIONS.register(APART, forward)


def one_token(
    self: Any, x: Tensor, index: Tensor, weights: Tensor, first: list[Layer], last: list[Layer]
) -> Tensor:
    """Outputs of a token's experts, weighted and added up in their order; `x` [1, d], the rest too.

    `first` and `last` are the chosen ones' matrices, in that order.
    """
    order = index[0].argsort()
    chosen = index[0][order]
    out = ops.matmul_each(x, first)
    if self.has_bias:
        out = out + (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[chosen]
    out = self._apply_gate(out) if self.has_gate else self.act_fn(out)
    out = ops.matmul_each(out, last)
    if self.has_bias:
        out = out + self.down_proj_bias[chosen]
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    out = (out * weights[0][order, None]).to(x.dtype)
    total = torch.zeros_like(x)
    for row in out.split(1):
        total = total + row
    return total


def _layers(self: Any, x: Tensor, index: Tensor) -> tuple[list[Layer], list[Layer]] | None:
    """The matrices of a token's experts, ascending; None unless all is as it was planned."""
    if torch.compiler.is_compiling() or any(ANY_MODULE):
        return None
    if getattr(self, "_is_expert_parallel", False) or (torch.is_grad_enabled() and x.requires_grad):
        return None
    chosen = sorted(index[0].tolist())
    found: list[list[Layer]] = []
    for stack in (self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj):
        if not isinstance(stack, Stack) or not 0 <= chosen[0] <= chosen[-1] < len(stack):
            return None
        experts: list[Any] = [stack._modules[str(i)] for i in chosen]
        if not all(_as_planned(expert) for expert in experts):
            return None
        found.append([expert.layer for expert in experts])
    return found[0], found[1]


def _as_planned(expert: Any) -> bool:
    """Whether an expert is a compressed linear, run as such."""
    usual = type(expert) is CompressedLinear and untouched(expert)
    return usual and expert.adapter is None and expert.bias is None
