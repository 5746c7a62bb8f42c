"""One token through all decoder blocks in one native call, for models of the llama family.

Decoding a small model, most of the time goes to Python and to starting torch's operations, not to
the weights. `fuse` gives the body of such a model (what stands between embedding and head) a
forward that, while one token of one sequence passes, runs all blocks as native code
(`native/decode.cpp`): in float32 between input and output, rounding keys and values to the dtype of
the cache. In all other cases (several tokens or sequences, gradients, hooks, hidden states or
attention weights asked for, padding, another cache than transformers' DynamicCache, sliding
windows) it is the forward transformers made.

The cache stays a DynamicCache anyone may use. Only, its tensors are views of longer ones, which
double when they are full, in place of being copied for every token.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from skimlm import native
from skimlm.runtime.linear import CompressedLinear

# Bodies that do nothing but: blocks of norm, attention with rotation, norm and gated mlp, then a
# norm. They differ in biases (qwen2), norms of heads (qwen3), q/k/v and gate/up in one (phi3).
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")
RECORDED = ("output_attentions", "output_hidden_states")
SIZED = ("weight", "codebook", "row_zero")
# the name that transformers gives the cache: another one since 5.24
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
ROOM = 256  # tokens a cache is given ahead, at least
MISFIT = "the buffers of the compressed linears do not fit each other"
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


class _Packed(ctypes.Structure):
    """`Packed` of native/product.h."""

    _fields_ = [
        *[(n, POINTER) for n in ("codes", "widths", "levels", "row_scale", "zeros", "in_scale")],
        ("bias", POINTER),
        *[(n, SIZE) for n in ("codes_size", "levels_size", "zeros_size", "r", "c")],
        ("order", POINTER),
        ("counts", POINTER),
    ]


class _Linear(ctypes.Structure):
    """`SkimlmLinear` of native/decode.cpp."""

    _fields_ = [
        ("packed", ctypes.POINTER(_Packed)),
        ("sparse", ctypes.POINTER(native.Sparse)),
    ]


class _Block(ctypes.Structure):
    """`SkimlmBlock` of native/decode.cpp."""

    _fields_ = [
        ("in_count", SIZE),
        ("mlp_count", SIZE),
        *[(n, POINTER) for n in ("norm", "q_norm", "k_norm", "mlp_norm")],
        ("into", _Linear * 3),
        ("o", _Linear),
        ("mlp", _Linear * 2),
        ("down", _Linear),
    ]


class _Body(ctypes.Structure):
    """`SkimlmBody` of native/decode.cpp."""

    _fields_ = [
        *[(n, SIZE) for n in ("bf16", "width", "heads", "kv_heads", "head_dim", "count")],
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("norm", POINTER),
        ("blocks", ctypes.POINTER(_Block)),
    ]


@dataclass
class _Plan:
    """A body as the native call sees it, and what it points into."""

    weights: list[tuple[dict[str, Any], str]]  # what a module calls them: they may be replaced
    places: list[int]  # where they stood when the plan was made
    hooks: list[Any]  # those of all modules inside: they must be empty
    adapted: list[CompressedLinear]  # none may be in training, with an adapter of floats
    body: _Body
    kept: list[Any]


@dataclass
class _Grown:
    """The long tensors [1, kv_heads, capacity, head_dim] behind a cache's keys and values."""

    layers: list[Any]
    keys: list[Tensor]
    values: list[Tensor]
    places: list[int]  # of all keys, then all values
    pointers: Any  # the same for the native call

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]


# beside the objects, not on them: pointers can be neither copied nor pickled
_plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()
_grown: WeakKeyDictionary[DynamicCache, _Grown] = WeakKeyDictionary()


def fuse(model: Any) -> bool:
    """Let the body of a compressed model take single tokens natively; whether it qualifies."""
    body = model.base_model
    if isinstance(body, _OneToken):
        return True
    known = {f"{family}Model" for family in FAMILIES}
    if type(body).__name__ not in known or not type(body).__module__.startswith("transformers."):
        return False
    if any(_parts(block) is None for block in body.layers):
        return False
    kind: Any = type(body)
    body.__class__ = _fused(kind)
    return True


@functools.lru_cache
def _fused(kind: Any) -> type:
    # under the same name: save_pretrained writes it to config.json
    return type(kind.__name__, (_OneToken, kind), {"__module__": kind.__module__})


class _OneToken:
    """Mixed into a body: its own `forward` for one token, else that of the class behind it."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        given = inputs_embeds if input_ids is None else input_ids
        compiling = torch.compiler.is_compiling()
        length = 0 if compiling else _length(cache)
        plan = None
        if (
            given is not None
            and given.shape[:2] == (1, 1)
            and length
            and not any(kwargs.get(name, False) for name in RECORDED)
            and kwargs.get("return_dict", True)
            and _shows_all(attention_mask, length + 1)
        ):
            plan = _plan(self)
        if plan is None:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        body: Any = self
        x = body.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.tensor([[length]])
        hidden = _one_token(body, plan, x, position_ids, cache, length)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})


def _length(cache: Any) -> int:
    """Tokens in a cache that can be grown natively; 0 for any other."""
    if type(cache) is not DynamicCache or not cache.layers:
        return 0
    return cache.get_seq_length() if all(type(n) is DynamicLayer for n in cache.layers) else 0


def _shows_all(mask: Any, length: int) -> bool:
    """Whether an attention mask hides nothing of `length` tokens."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape == (1, length) and bool(mask.all())


def _one_token(
    model: Any, plan: _Plan, x: Tensor, position_ids: Tensor, cache: DynamicCache, length: int
) -> Tensor:
    cos, sin = model.rotary_emb(x, position_ids)
    dtype = torch.bfloat16 if plan.body.bf16 else torch.float32
    x, cos, sin = (t.to(dtype).contiguous() for t in (x, cos, sin))
    grown = _room(cache, length)
    out = torch.empty_like(x)
    status = native.library().skimlm_decode(
        ctypes.byref(plan.body),
        *(POINTER(tensor.data_ptr()) for tensor in (x, cos, sin)),
        SIZE(cos.shape[-1]),
        grown.pointers,
        SIZE(grown.capacity),
        SIZE(length),
        POINTER(out.data_ptr()),
        torch.get_num_threads(),
    )
    if status:
        raise ValueError(MISFIT)
    layers: list[Any] = cache.layers
    for layer, keys, values in zip(layers, grown.keys, grown.values, strict=True):
        layer.keys = keys.narrow(2, 0, length + 1)
        layer.values = values.narrow(2, 0, length + 1)
    return out


def _room(cache: DynamicCache, length: int) -> _Grown:
    """Long tensors behind the cache, the same as before if they are its own and have room."""
    grown = _grown.get(cache)
    layers: list[Any] = cache.layers
    if grown is not None and len(grown.layers) == len(layers) and length < grown.capacity:
        own = all(a is b for a, b in zip(grown.layers, layers, strict=True))
        places = [layer.keys.data_ptr() for layer in layers]
        places += [layer.values.data_ptr() for layer in layers]
        if own and places == grown.places:  # else somebody else's tensors are in the cache now
            return grown
    capacity = length + max(ROOM, length)

    def longer(tensor: Tensor) -> Tensor:
        out = tensor.new_empty(1, tensor.shape[1], capacity, tensor.shape[3])
        out[:, :, :length] = tensor
        return out

    keys = [longer(layer.keys) for layer in layers]
    values = [longer(layer.values) for layer in layers]
    places = [tensor.data_ptr() for tensor in (*keys, *values)]
    grown = _Grown(list(layers), keys, values, places, (POINTER * len(places))(*places))
    _grown[cache] = grown
    return grown


def _parts(block: Any) -> tuple[list[Any], list[Any]] | None:
    """(q/k/v, o, gate/up, down) and (norm, q_norm, k_norm, mlp_norm), None where there is none.

    None for a block that does not qualify: a linear left dense or scaled, another activation.
    """
    attention, mlp = block.self_attn, block.mlp
    if hasattr(attention, "qkv_proj"):
        into, gate_up, act = [attention.qkv_proj], [mlp.gate_up_proj], mlp.activation_fn
    else:
        into = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up, act = [mlp.gate_proj, mlp.up_proj], mlp.act_fn
    linears = [*into, attention.o_proj, *gate_up, mlp.down_proj]
    if not isinstance(act, (nn.SiLU, SiLUActivation)):
        return None
    if not all(type(m) is CompressedLinear for m in linears):
        return None
    if any(m.in_scale is not None for m in linears):
        return None
    norms = [block.input_layernorm, getattr(attention, "q_norm", None)]
    norms += [getattr(attention, "k_norm", None), block.post_attention_layernorm]
    return linears, norms


def _plan(model: Any) -> _Plan | None:
    """The plan of a body, made again if its weights have moved; None to run as usual."""
    if model.training or torch.is_grad_enabled():
        return None
    if any(getattr(model.config, name, False) for name in RECORDED):
        return None
    plan = _plans.get(model)
    if plan is None or _places(plan.weights) != plan.places:
        plan = _make(model)
        if plan is not None:
            _plans[model] = plan
    if plan is None or any(plan.hooks) or any(m.adapter is not None for m in plan.adapted):
        return None
    return plan


def _places(weights: list[tuple[dict[str, Any], str]]) -> list[int]:
    return [0 if (w := owner.get(name)) is None else w.data_ptr() for owner, name in weights]


def _make(model: Any) -> _Plan | None:
    """Look up everything the native call needs; None where it cannot run."""
    dtype = model.norm.weight.dtype
    if dtype not in (torch.bfloat16, torch.float32) or model.norm.weight.device.type != "cpu":
        return None
    kept: list[Any] = []
    weights: list[tuple[dict[str, Any], str]] = []
    modules: list[nn.Module] = [model.norm, *model.layers]
    adapted: list[CompressedLinear] = []

    def pointer(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor)
        return tensor.data_ptr()

    def norm(module: Any) -> int | None:
        if module is None:
            return None
        weights.append((module._parameters, "weight"))
        modules.append(module)
        return pointer(module.weight.detach())

    def packed(linear: CompressedLinear, *order: int | None) -> _Packed:
        stored = linear._buffers
        at = [pointer(stored[n]) for n in ("weight", "widths", "codebook", "row_scale")]
        at += [pointer(stored["row_zero"]), None, pointer(bias_of(linear))]
        sizes = [0 if (t := stored[n]) is None else t.numel() for n in SIZED]
        return _Packed(*at, *sizes, linear.out_features, linear.in_features, *order)

    def sparse(linear: CompressedLinear, *order: int | None) -> native.Sparse:
        stored, bias, spec = linear.layer.tensors, bias_of(linear), linear.spec
        kept.extend([*stored.values(), bias])
        how = spec.sparsity, spec.kept, spec.group, spec.rank, spec.adapter_bits
        found = native.sparse(stored, bias, spec.rows, spec.cols, *how)
        if found is None:
            raise ValueError(MISFIT)
        found.order, found.counts = order
        if spec.rank:
            weights.extend((linear._buffers, name) for name in ("lora_a", "lora_b"))
            adapted.append(linear)
        return found

    def bias_of(linear: CompressedLinear) -> Tensor | None:
        return None if linear.bias is None else linear.bias.detach().float()

    def stored(linear: CompressedLinear) -> _Linear:
        weights.append((linear._buffers, "weight"))
        modules.append(linear)
        order = torch.argsort(linear.widths, stable=True).int()
        places = pointer(order), pointer(torch.bincount(linear.widths.long(), minlength=9))
        if linear.spec.version == 1:
            return _Linear(packed=ctypes.pointer(packed(linear, *places)))
        return _Linear(sparse=ctypes.pointer(sparse(linear, *places)))

    blocks = (_Block * len(model.layers))()
    for block, layer in zip(blocks, model.layers, strict=True):
        parts = _parts(layer)
        if parts is None or layer.training:
            return None
        linears, norms = parts
        modules += [layer.self_attn, layer.mlp]
        if any(m is not None and m.weight.dtype != dtype for m in norms):
            return None
        if any(not t.is_contiguous() for m in linears for t in m.buffers()):
            return None
        into = 1 if len(linears) == 4 else 3
        *first, down = [stored(linear) for linear in linears]
        block.in_count, block.mlp_count = into, len(first) - into - 1
        block.norm, block.q_norm, block.k_norm, block.mlp_norm = map(norm, norms)
        block.into[:into], block.o = first[:into], first[into]
        block.mlp[: block.mlp_count], block.down = first[into + 1 :], down
    attention, config = model.layers[0].self_attn, model.config
    kept.append(blocks)
    body = _Body(
        bf16=dtype == torch.bfloat16,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        count=len(blocks),
        eps=model.norm.variance_epsilon,
        scale=attention.scaling,
        norm=norm(model.norm),
        blocks=blocks,
    )
    hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
    return _Plan(weights, _places(weights), hooks, adapted, body, kept)
