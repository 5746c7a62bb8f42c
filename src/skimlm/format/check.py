"""Whether the tensors of a layer are those that layer.py declares, named where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from skimlm.errors import FormatError
from skimlm.format.layer import TENSORS, Layer, Shape, layout, stored_groups


def check_stored(layer: Layer, *, name: str = "", strict: bool = False) -> None:
    """Raise FormatError unless the tensors are those of the layer's spec; `name` is the layer's.

    `weight` may live on the meta device: any bytes of the right length are valid codes. `strict`
    looks at its padding bits too, as `unpack` does.
    """
    check_sizes(layer, name=name)
    for key, stored in layer.tensors.items():
        if stored.is_floating_point() and not stored.isfinite().all():
            raise FormatError("holds NaN or Inf", tensor=join(name, key))
    shared = {t.name for t in TENSORS if not t.order} & layer.tensors.keys()
    by_width = [(width, views) for width, _, views in stored_groups(layer)]
    for width, views in [*by_width, (0, {key: layer.tensors[key] for key in shared})]:
        for tensor in TENSORS:
            for check in (tensor.check, tensor.strict if strict else None):
                if check and tensor.name in views:
                    if wrong := check(views[tensor.name], layer.spec, width):
                        raise FormatError(wrong, tensor=join(name, tensor.name))


def check_sizes(layer: Layer, *, name: str = "") -> None:
    """The part of `check_stored` that keeps native code inside its buffers: dtypes and shapes.

    The values of `widths` too, since every other size follows from them.
    """

    def fail(tensor: str, reason: str) -> FormatError:
        return FormatError(reason, tensor=join(name, tensor))

    spec, tensors = layer.spec, layer.tensors
    spec.check()
    expected = layout(spec)
    if missing := [key for key in expected if key not in tensors]:
        raise fail(missing[0], "is missing")
    present = [tensor for tensor in TENSORS if tensor.name in expected]
    for tensor in sorted(present, key=lambda tensor: tensor.order != "model"):
        dtype, shape = expected[tensor.name]
        stored = tensors[tensor.name]
        if stored.dtype != dtype or stored.shape != shape:
            raise fail(tensor.name, f"must be {spelled(dtype, shape)}, got {spelled_of(stored)}")
        if tensor.order == "model" and tensor.check and (wrong := tensor.check(stored, spec, 0)):
            raise fail(tensor.name, wrong)
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise fail(surplus[0], "does not belong here")


def join(name: str, tensor: str) -> str:
    """A tensor's full name; `name` is its layer's, which may be unknown."""
    return f"{name}.{tensor}" if name else tensor


def spelled(dtype: torch.dtype, shape: Shape) -> str:
    """A dtype and a shape in an error, such as uint8 [3, 4]."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def spelled_of(tensor: Tensor) -> str:
    """The same of a tensor."""
    return spelled(tensor.dtype, tuple(tensor.shape))
