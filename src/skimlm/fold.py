"""Which linears read the output of a norm, so that a scaling vector can live in the norm for free.

x = norm(h) feeds q, k and v (or gate and up): scaling column j of their weights by 1/s_j and the
norm's weight by s_j changes nothing, so their common scaling vector costs no stored bit and no
multiply. What feeds what is not read off names: it is seen in a forward pass (the very same tensor
object) and then proven, by folding random powers of two and asking for bit-equal logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from skimlm.calibrate import final_hidden


def scaled_norm(model: Any, norm: Any, s: Tensor) -> Tensor:
    """Weight that makes `norm` multiply its output by `s`; families that store w - 1 included."""
    weight = norm.weight.detach().float()
    if "gemma" in model.config.model_type.lower():
        return (weight + 1) * s - 1
    return weight * s


def foldable(model: Any, linears: dict[str, nn.Linear], ids: Tensor) -> dict[str, list[str]]:
    """Norms, by name, and the linears that read their output and nothing else does.

    `ids`: a few tokens [n, t] for the forward passes. Norms whose fold is not exact are left out.
    """
    groups = _readers(model, linears, ids)
    if not groups:
        return {}
    with torch.no_grad():
        before = final_hidden(model, ids)
        if _unchanged(model, linears, groups, ids, before):
            return groups
        return {
            name: readers
            for name, readers in groups.items()
            if _unchanged(model, linears, {name: readers}, ids, before)
        }


def _readers(model: Any, linears: dict[str, nn.Linear], ids: Tensor) -> dict[str, list[str]]:
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors alive: ids stay unique
    groups: dict[str, list[str]] = {}

    def produced(name: str):
        def hook(_module, _args, out):
            if isinstance(out, Tensor):
                made[id(out)] = (name, out)

        return hook

    def consumed(name: str):
        def hook(_module, args):
            if args and id(args[0]) in made:
                groups.setdefault(made[id(args[0])][0], []).append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.dim() == 1
            and getattr(module, "bias", None) is None
        ):
            handles.append(module.register_forward_hook(produced(name)))
    for name, linear in linears.items():
        handles.append(linear.register_forward_pre_hook(consumed(name)))
    try:
        with torch.no_grad():
            final_hidden(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return groups


def _unchanged(
    model: Any,
    linears: dict[str, nn.Linear],
    groups: dict[str, list[str]],
    ids: Tensor,
    before: Tensor,
) -> bool:
    """Whether folding powers of two into these norms leaves the final hidden states alone."""
    saved = []
    generator = torch.Generator().manual_seed(0)
    try:
        for name, readers in groups.items():
            norm = model.get_submodule(name)
            size = norm.weight.shape[0]
            s = 2.0 ** torch.randint(-1, 2, (size,), generator=generator)
            modules = [norm, *(linears[reader] for reader in readers)]
            saved += [(m.weight, m.weight.detach().clone()) for m in modules]
            norm.weight.copy_(scaled_norm(model, norm, s))
            for reader in readers:
                linears[reader].weight.div_(s.to(linears[reader].weight.dtype))
        after = final_hidden(model, ids)
    finally:
        for parameter, value in saved:
            parameter.copy_(value)
    scale = before.float().abs().amax().clamp(min=1e-6)
    return bool(((after - before).float().abs().amax() / scale) < 1e-2)
