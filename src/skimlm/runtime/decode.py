"""One token through all decoder blocks in one native call, for models of the llama family.

    fuse(model)                           single tokens of `model(...)`, `generate` ... are native
    together(model, ids, caches)          some tokens each of several sequences, each with its cache

Decoding a small model, most of the time goes to Python and to starting torch's operations, not to
the weights. `fuse` gives the body of such a model (what stands between embedding and head) a
forward that, while one token of one sequence passes, runs all blocks as native code
(`native/decode.cpp`): in float32 between input and output, rounding keys and values to the dtype of
the cache. It does so only if that is what transformers' own code would do: the model is as planned
(plan.py), nothing but a token and a cache is given, the token sees all of the cache, which is a
plain one or one behind a prefix (prefix.py), and no mode of torch is on. Else everything given goes
to the model's own forward.

What comes of several sequences together is to the bit what comes of each alone.

The cache stays a DynamicCache anyone may use. Only, its tensors are views of longer ones, which
double when they are full, in place of being copied for every token.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from skimlm import native
from skimlm.native.structs import POINTER, PrefixStruct, SequenceStruct
from skimlm.runtime import plan as planning
from skimlm.runtime.plan import Plan
from skimlm.runtime.prefix import PrefixCache, PrefixLayer
from skimlm.runtime.tables import CompressedHead, PackedHead

# the name that transformers gives the cache: another one since 5.24
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache"}
TAKEN |= {"cache", "past_key_values"}
LAYERS = {DynamicCache: DynamicLayer, PrefixCache: PrefixLayer}  # caches whose tokens are all seen
ROOM = 256  # tokens a cache is given ahead, at least


@dataclass
class _Room:
    """One long tensor behind all keys and values of a cache."""

    whole: Tensor  # [layers, 2, 1, kv_heads, capacity, head_dim]
    pointers: Any  # to all keys, then all values
    views: list[Tensor]  # what the cache got last: keys and values of the layers in turn
    prefix: Any  # PrefixStructs of all heads of all layers; None where nothing stands before
    groups: list[Any]  # what they point into: every layer's, as the cache has them

    @property
    def capacity(self) -> int:
        return self.whole.shape[4]

    def struct(self, length: int) -> SequenceStruct:
        """For native code, `length` tokens being there."""
        places = ctypes.addressof(self.pointers)
        prefix = None if self.prefix is None else ctypes.addressof(self.prefix)
        return SequenceStruct(places, self.capacity, length, prefix)


# beside the caches, not on them: they may be copied
_rooms: WeakKeyDictionary[DynamicCache, _Room] = WeakKeyDictionary()


def fuse(model: Any) -> bool:
    """Let the body of a compressed model take single tokens natively; whether it qualifies."""
    if native.missing():
        return False
    body = model.base_model
    file = planning.family(body)
    if file is None or any(planning.parts(file, block) is None for block in body.layers):
        return False
    if "forward" not in body.__dict__:
        body.forward = OneToken(body)
    return True


def unfuse(model: Any) -> None:
    """Take back what `fuse` did."""
    body = model.base_model
    if isinstance(body.__dict__.get("forward"), OneToken):
        del body.forward


class OneToken:
    """The forward of a body: native for one token where that changes nothing, else the body's own.

    It is an attribute of the body, and copied and pickled with it; the copy plans anew.
    """

    def __init__(self, body: Any) -> None:
        self.body = body
        self.plan: Plan | None = None
        self.looked = False  # nothing but native calls since everything was looked at

    def __getstate__(self) -> dict[str, Any]:
        return {"body": self.body, "plan": None, "looked": False}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            cache = _cache(args, kwargs)
            one = None if cache is None else _tokens(cache)
            if one is not None and one.length and _shows_all(kwargs, one.seen + 1):
                plan = self._plan([one], kwargs.get("use_cache"))
                if plan is not None:
                    return self._one_token(plan, one, kwargs)
            self.looked = False
        return type(self.body).forward(self.body, *args, **kwargs)

    def together(self, ids: Sequence[Tensor], caches: Sequence[Any]) -> Tensor | None:
        """States [sequences, width] after the last token of each, for `together`."""
        parts = list(zip(ids, caches, strict=True))
        tokens = [] if _mode() else [_tokens(cache, len(some)) for some, cache in parts]
        known = [one for one in tokens if one is not None]
        plan = self._plan(known, None) if known and len(known) == len(parts) else None
        out = None
        if plan is not None:
            places = torch.cat([torch.arange(one.seen, one.seen + one.new) for one in known])
            x = self.body.embed_tokens(torch.cat([*ids])[:, None])
            out = self._run(plan, known, x, places[:, None])
        self.looked = self.looked and out is not None
        if out is None:
            return None
        last = torch.tensor([one.new for one in known]).cumsum(0) - 1
        return out[last, 0]

    def _plan(self, tokens: Sequence[_Tokens], use_cache: bool | None) -> Plan | None:
        """The plan, made again if it does not hold; None to run as usual."""
        plan = self.plan
        known = self.looked and all([one.room is not None for one in tokens])
        if plan is None or not (known and plan.may_hold(self.body)):
            if plan is None or not plan.holds(self.body):
                plan, known = planning.make(self.body), False
                self.plan = plan
            self.looked = plan is not None
        if plan is None or any([one.seen + one.new > plan.window for one in tokens]):
            return None
        if not (plan.asked["use_cache"] if use_cache is None else use_cache):
            return None
        fits = known or all([_fits(plan, one.cache, one.length) for one in tokens])
        return plan if fits else None

    def _one_token(self, plan: Plan, one: _Tokens, given: dict[str, Any]) -> Any:
        body, ids, x = self.body, given.get("input_ids"), given.get("inputs_embeds")
        if x is None:
            x = body.embed_tokens(ids)
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.tensor([[one.seen]], device=x.device)
        out = self._run(plan, [one], x, positions)
        if out is not None:
            return plan.output(last_hidden_state=out, **{CACHE: one.cache})
        self.looked = False
        rest = {name: value for name, value in given.items() if name != "input_ids"}
        return type(body).forward(body, **rest | {"inputs_embeds": x})

    def _run(
        self, plan: Plan, tokens: Sequence[_Tokens], x: Tensor, positions: Tensor
    ) -> Tensor | None:
        """x [n, 1, width] through all blocks, the caches longer by it; None and nothing done."""
        n = sum([one.new for one in tokens])
        if not _is(x, plan.dtype, (n, 1, plan.width)):
            return None
        cos, sin = self._turns(tokens, x, positions)
        turned = (n, 1, cos.shape[-1])
        if not (_is(cos, plan.dtype, turned) and _is(sin, plan.dtype, turned)):
            return None
        for one in tokens:
            if one.room is None or one.length + one.new > one.room.capacity:
                one.room = _make_room(plan, one.cache, one.length, one.new)
                if one.room is None:
                    return None
                _rooms[one.cache] = one.room
        return _call(plan, (x, cos, sin), tokens)

    def _turns(
        self, tokens: Sequence[_Tokens], x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, 1, rotary] of the positions [n, 1]."""
        rotary = self.body.rotary_emb
        kind = str(getattr(rotary, "rope_type", ""))
        if len(tokens) == 1 or not ("dynamic" in kind or kind == "longrope"):
            return rotary(x, positions)
        # they look at the largest position of a call: each sequence has a call of its own
        sizes = [one.new for one in tokens]
        parts = zip(x.split(sizes), positions.split(sizes), strict=True)
        cos, sin = zip(*[rotary(some, places) for some, places in parts], strict=True)
        return torch.cat(cos), torch.cat(sin)


@dataclass
class _Tokens:
    """The tokens in a cache of one sequence, and how many come."""

    cache: Any
    length: int
    seen: int  # with the positions of a prefix
    room: _Room | None  # what is behind it, if it is as the last native call left it
    new: int = 1


def together(model: Any, ids: Sequence[Tensor], caches: Sequence[Any]) -> Tensor | None:
    """Some tokens each of several sequences: ids [t] behind what their caches hold, empty or not.

    Gives logits [sequences, vocabulary] after the last of each, to the bit what each gives alone,
    however its tokens are cut; every cache is longer by them. None, and nothing done, where the
    model's own code has to do it.
    """
    forward, head = model.base_model.__dict__.get("forward"), model.get_output_embeddings()
    if not isinstance(forward, OneToken) or not planning.plain_head(model, head):
        return None
    states = forward.together(ids, caches)
    if states is None:
        return None
    if isinstance(head, (PackedHead, CompressedHead)):
        return head.alone(states)
    return torch.cat([head(state[None]) for state in states])


def _cache(args: tuple[Any, ...], given: dict[str, Any]) -> DynamicCache | None:
    """The cache of a call that is one token of one sequence and nothing else, as torch runs it."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    token = embeds if ids is None else ids
    cache, old = given.get("cache"), given.get("past_key_values")
    cache = old if cache is None else cache
    if args or type(token) is not Tensor or token.shape[:2] != (1, 1) or not token.is_cpu:
        return None
    if type(cache) not in LAYERS or (ids is not None and embeds is not None):
        return None
    if token.dim() != (2 if embeds is None else 3):
        return None
    if any(given[name] is not None and given[name] is not False for name in given.keys() - TAKEN):
        return None
    return None if _mode() else cache


def _mode() -> bool:
    """Whether torch would not simply compute: gradients, casts, traces, transforms, own modes."""
    return bool(
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _len_torch_function_stack()
        or _len_torch_dispatch_stack()
    )


def _tokens(cache: Any, new: int = 1) -> _Tokens | None:
    """What is in a cache; None of one whose layers are not the plain ones of a known kind."""
    kind = LAYERS.get(type(cache))
    if kind is None or not new or "update" in cache.__dict__ or cache.offloading:
        return None
    if not cache.layers or any([type(n) is not kind for n in cache.layers]):
        return None
    length = DynamicLayer.get_seq_length(cache.layers[0])
    if not length and any([n.is_initialized for n in cache.layers]):
        return None
    return _Tokens(cache, length, _behind(cache) + length, _room(cache), new)


def _behind(cache: DynamicCache) -> int:
    """Positions before the tokens in a cache: those of its prefix."""
    return cache.layers[0].length if type(cache) is PrefixCache else 0


def _shows_all(given: dict[str, Any], length: int) -> bool:
    """Whether mask and positions are those of one more token behind all `length - 1` others."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if positions is not None and (type(positions) is not Tensor or positions.shape != (1, 1)):
        return False
    if mask is None:
        return True
    return type(mask) is Tensor and mask.shape == (1, length) and bool(mask.all())


def _is(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether this is an ordinary tensor on the CPU of this type and shape."""
    plain = type(tensor) is Tensor and tensor.dtype == dtype and tensor.is_cpu
    return plain and tensor.shape == shape


def _fits(plan: Plan, cache: DynamicCache, length: int) -> bool:
    """Whether a cache holds what the plan says, in every layer alike."""
    count, heads, size = plan.cached
    shape = (1, heads, length, size)
    return len(cache.layers) == count and all(
        "update" not in layer.__dict__
        and (
            not length
            or (_is(layer.keys, plan.dtype, shape) and _is(layer.values, plan.dtype, shape))
        )
        for layer in cache.layers
    )


def _room(cache: DynamicCache) -> _Room | None:
    """What is behind a cache, if its tensors are the very views that it got last."""
    room = _rooms.get(cache)
    if room is None:
        return None
    now = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    same = len(now) == len(room.views) and all(map(operator.is_, now, room.views))
    return room if same and all(map(operator.is_, _groups(cache), room.groups)) else None


def _call(plan: Plan, inputs: tuple[Tensor, ...], tokens: Sequence[_Tokens]) -> Tensor | None:
    """The native call on x, cos and sin; the caches are longer by the tokens afterwards.

    None, and nothing done, if the stored tensors do not fit each other.
    """
    x, cos, sin = (tensor.contiguous() for tensor in inputs)
    copies, biases = plan.biases
    if copies:
        torch._foreach_copy_(copies, biases)
    out = torch.empty_like(x)
    rooms = [one.room for one in tokens if one.room is not None]
    structs = [
        room.struct(one.length + at)
        for room, one in zip(rooms, tokens, strict=True)
        for at in range(one.new)
    ]
    if not native.decode(plan.struct, x, cos, sin, (SequenceStruct * len(structs))(*structs), out):
        return None
    for room, one in zip(rooms, tokens, strict=True):
        views = list(room.whole.narrow(4, 0, one.length + one.new).flatten(0, 1).unbind())
        layers: list[Any] = one.cache.layers
        if not one.length:
            for layer in layers:
                layer.lazy_initialization(views[0], views[0])
        for i, layer in enumerate(layers):
            layer.keys, layer.values = views[2 * i], views[2 * i + 1]
        room.views = views
    return out


def _groups(cache: DynamicCache) -> list[Any]:
    """What stands before the tokens in a cache, layer by layer."""
    return [layer.groups for layer in cache.layers] if type(cache) is PrefixCache else []


def _prefix(plan: Plan, groups: list[Any]) -> Any:
    """The structs of a prefix; None if it is not as the plan says."""
    count, heads, size = plan.cached
    found = []
    for layer in groups:
        for keys, values, bias in layer:
            shape = (*keys.shape[:2], size)
            if not (_is(keys, plan.dtype, shape) and _is(values, plan.dtype, shape)):
                return None
            if not (keys.is_contiguous() and values.is_contiguous()):
                return None
            if bias is not None and not (
                _is(bias, torch.float32, shape[:2]) and bias.is_contiguous()
            ):
                return None
            for h in range(len(keys)):
                places = [None if t is None else t[h].data_ptr() for t in (keys, values, bias)]
                found.append(PrefixStruct(*places, shape[1]))
    return (PrefixStruct * len(found))(*found) if len(found) == count * heads else None


def _make_room(plan: Plan, cache: DynamicCache, length: int, new: int) -> _Room | None:
    """Longer tensors than the cache has, with its content; None if its prefix does not fit."""
    groups = _groups(cache)
    prefix = _prefix(plan, groups) if groups else None
    if groups and prefix is None:
        return None
    layers: list[Any] = cache.layers
    _, heads, size = plan.cached
    capacity = length + new + max(ROOM, length)
    whole = torch.empty(len(layers), 2, 1, heads, capacity, size, dtype=plan.dtype)
    if length:
        for layer, (keys, values) in zip(layers, whole, strict=True):
            keys[:, :, :length] = layer.keys
            values[:, :, :length] = layer.values
    places = [whole[i, j].data_ptr() for j in (0, 1) for i in range(len(layers))]
    return _Room(whole, (POINTER * len(places))(*places), [], prefix, groups)
