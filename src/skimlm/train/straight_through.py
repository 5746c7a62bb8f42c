"""What is trained is computed with as a file will hold it: rounded forwards, not backwards.

The gradient of a rounded number is passed on to the number itself (straight-through, 1308.3432).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skimlm.format.layer import ADAPTER_GROUP
from skimlm.format.pack import factor_values, spread


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(x)`, with the gradient of x."""
    return _Rounded.apply(x, rounding)


def factor_codes(x: Tensor, scale: Tensor | None) -> Tensor:
    """A factor of an adapter [k, n] as stored: bfloat16, or int8 codes -8..7 to its scales."""
    if scale is None:
        return x.bfloat16()
    step = spread(scale, ADAPTER_GROUP, x.shape[1])
    return (x / torch.where(step == 0, 1.0, step)).round_().clamp_(-8, 7).to(torch.int8)


def rounded_factor(x: Tensor, scale: Tensor | None) -> Tensor:
    """The value that a factor [k, n] has once it is stored, float32, with the gradient of x."""
    return straight_through(x, lambda x: factor_values(factor_codes(x, scale), scale))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounding):
        return rounding(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
