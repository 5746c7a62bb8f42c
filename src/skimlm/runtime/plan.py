"""What the native way of a token takes for granted of a model, and whether it is still so.

`make` looks a body up: its blocks, every module in them, every attribute, hook and tensor. What it
finds is the plan, if transformers' own code would do to a token what native/decode.cpp does. Then

    `Plan.holds`      looks everything up again: at the beginning of a sequence, and when it may
                      have changed (watched.py)
    `Plan.may_hold`   looks at what is cheap: between two tokens

What the body itself does around its blocks, embedding and rotation, is not planned: it runs.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skimlm.errors import FormatError
from skimlm.format.check import check_sizes
from skimlm.native.structs import BodyStruct
from skimlm.runtime.cpu import KNOWN_ROW_CODES
from skimlm.runtime.experts import Stack
from skimlm.runtime.linear import CompressedLinear
from skimlm.runtime.prefix import NAME, PrefixLayer
from skimlm.runtime.structs import Parts, body_struct
from skimlm.runtime.watched import ANY_MODULE, HOOKS, events, start, untouched

# Bodies that do nothing but: blocks of norm, attention with rotation, norm and gated mlp or
# experts, then a norm. They differ in biases (qwen2), norms of heads (qwen3), q/k/v and gate/up in
# one (phi3).
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Mixtral", "Qwen3Moe")
PARTS = (
    *("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm"),
    *("SparseMoeBlock", "TopKRouter", "Experts"),  # of mixtures
)
ACTIVATIONS = (nn.SiLU, SiLUActivation)
# of a config: what decides what a body does, where transformers asks for it at every token
ASKED = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("sliding_window", "use_sliding_window", "layer_types", "attention_chunk_size", "is_causal"),
    *("_attn_implementation_internal", "_experts_implementation_internal", "_output_attentions"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("use_cache", "num_experts_per_tok", "norm_topk_prob"),
)
# functions of a family's file that its attention uses
HELPERS = ("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "eager_attention_forward")
Functions = tuple[tuple[Any, ...], tuple[str, ...], tuple[Any, ...]]  # owners, names, what it is
LIBRARIES = ("torch", "transformers", "skimlm")  # whose code is as we know it


@dataclass
class Seen:
    """Modules and all that hangs on them, as it was at one moment."""

    objects: list[Any]  # classes, attributes, submodules, tensors of every module, in order
    tensors: list[tuple[Any, ...]]  # where each tensor lies, and how

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Seen)
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
            and self.tensors == other.tensors
        )


@dataclass
class Plan:
    """A body as the native call sees it, and what that rests on."""

    struct: BodyStruct
    dtype: torch.dtype
    width: int
    cached: tuple[int, int, int]  # layers, heads and head size of its cache
    window: int  # tokens that every layer sees
    modules: list[nn.Module]  # all in the blocks, and the last norm
    seen: Seen
    events: tuple[int, int, int]
    config: Any
    asked: dict[str, Any]  # of the config, a copy
    functions: Functions  # code that others may replace
    chosen: tuple[Any, ...]  # functions of attention, its mask and experts, chosen by name
    output: type  # what the body returns
    kept: list[Any]  # what `struct` points into
    layers: nn.ModuleList
    layer_count: int
    biases: tuple[list[Tensor], list[Tensor]]  # copies in float32, and what they are copies of
    dicts: list[dict[str, Any]] = field(default_factory=list)  # of modules that are not Watched
    hooks: list[Any] = field(default_factory=list)
    norms: tuple[list[Any], list[Tensor], list[int]] = ([], [], [])

    def holds(self, body: Any) -> bool:
        """Whether everything is as it was planned, every single thing looked at."""
        before = events()
        if not self._same_code(body) or look(self.modules) != self.seen or any(self.hooks):
            return False
        blocks = list(body.layers)[: body.config.num_hidden_layers]
        if [*blocks, body.norm] != self.modules_of_body() or body.layers is not self.layers:
            return False
        self.events = before
        return True

    def modules_of_body(self) -> list[nn.Module]:
        """The blocks and the last norm."""
        return self.modules[: self.cached[0] + 1]

    def may_hold(self, body: Any) -> bool:
        """False if anything may have changed since `holds`, at 2 % of a small model's token.

        It misses what is done without torch: a private dict of a module written to, the class of a
        module or the storage of a packed tensor exchanged by one who holds it from before.
        """
        if events() != self.events or not self._same_code(body):
            return False
        parameters, tensors, places = self.norms
        layers = body._modules.get("layers")
        if layers is not self.layers or len(layers) != self.layer_count:
            return False
        if not all(map(operator.is_, map(dict.get, parameters, repeat("weight")), tensors)):
            return False
        return list(map(Tensor.data_ptr, tensors)) == places and not any(
            map(dict.__contains__, self.dicts, repeat("forward"))
        )

    def _same_code(self, body: Any) -> bool:
        """The config, and all functions that are looked up by name."""
        return (
            body.config is self.config
            and list(map(self.config.__dict__.get, ASKED)) == list(self.asked.values())
            and not body.training
            and not any(ANY_MODULE)
            and _chosen(self.asked) == self.chosen
            and all(map(operator.is_, map(getattr, *self.functions[:2]), self.functions[2]))
        )


def family(body: Any) -> ModuleType | None:
    """The file of transformers that an unchanged body of a known family comes from."""
    for name in FAMILIES:
        snake = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name).lower()
        file = f"transformers.models.{snake}.modeling_{snake}"
        module = sys.modules.get(file)
        if module is not None and type(body) is getattr(module, f"{name}Model"):
            return module
    return None


def plain_head(model: Any, head: Any) -> bool:
    """Whether logits are nothing but the head's product with the states of a known body."""
    file = family(model.base_model)
    kind = None if file is None else getattr(file, f"{_name(file)}ForCausalLM")
    return (
        type(model) is kind
        and head is model._modules.get("lm_head")
        and all(_genuine(type(m).forward) and untouched(m) for m in (model, head))
    )


def _name(file: ModuleType) -> str:
    return next(name for name in FAMILIES if hasattr(file, f"{name}Model"))


def parts(file: ModuleType, block: Any) -> Parts | None:
    """The parts of a block.

    None for a block that does not qualify: one with a module of another class than the family has,
    a linear left dense or scaled, another activation, experts with more than codes.
    """
    name = _name(file)
    kinds = {getattr(file, f"{name}{part}", None) for part in PARTS}
    kinds |= {CompressedLinear, Stack, nn.Dropout, *ACTIVATIONS}
    if not set(map(type, block.modules())) <= kinds:
        return None
    attention, mlp, router = block.self_attn, block.mlp, None
    if hasattr(attention, "qkv_proj"):
        into, gate_up, act = [attention.qkv_proj], [mlp.gate_up_proj], mlp.activation_fn
        down = [mlp.down_proj]
    else:
        into = [attention.q_proj, attention.k_proj, attention.v_proj]
        if hasattr(mlp, "experts"):
            router, act = mlp.gate, mlp.experts.act_fn
            gate_up, down = (
                list(getattr(stack, "_modules", {}).values())
                for stack in (mlp.experts.gate_up_proj, mlp.experts.down_proj)
            )
        else:
            gate_up, act, down = [mlp.gate_proj, mlp.up_proj], mlp.act_fn, [mlp.down_proj]
    norms = [block.input_layernorm, getattr(attention, "q_norm", None)]
    norms += [getattr(attention, "k_norm", None), block.post_attention_layernorm]
    found = Parts(into, attention.o_proj, gate_up, down, norms, router)
    if type(act) not in ACTIVATIONS or any(type(m) is not CompressedLinear for m in found.linears):
        return None
    if router is not None and not _experts_fit(gate_up, down):
        return None
    known = all(m.spec.row_codes <= KNOWN_ROW_CODES for m in found.linears)
    return found if known and all(m.in_scale is None for m in found.linears) else None


def _experts_fit(first: list[CompressedLinear], last: list[CompressedLinear]) -> bool:
    """Whether experts are alike and nothing but codes: native code looks at those chosen only."""
    for experts in (first, last):
        for expert in experts:
            same = expert.spec.rows, expert.spec.cols
            if same != (experts[0].spec.rows, experts[0].spec.cols) or not expert.spec.plain:
                return False
            try:
                check_sizes(expert.layer)
            except FormatError:
                return False
    return len(first) == len(last) > 0


def make(body: Any) -> Plan | None:
    """Look up everything the native call needs; None where it cannot run."""
    start()
    began, config, file = events(), body.config, family(body)
    asked, dtype = _asked(config), body.norm.weight.dtype
    if file is None or dtype not in (torch.bfloat16, torch.float32) or any(ANY_MODULE):
        return None
    window, chosen = _window(asked), _chosen(asked)
    if window is None or not _usual(asked) or not _usual_choice(asked):
        return None
    blocks = list(body.layers)[: config.num_hidden_layers]
    modules = [*blocks, body.norm]
    modules += [m for block in blocks for m in block.modules() if m is not block]
    functions = _functions(file, {type(body), *map(type, modules)})
    if not blocks or functions is None or not all(map(untouched, modules)):
        return None
    found = [parts(file, block) for block in blocks]
    qualified = [part for part in found if part]
    if len(qualified) < len(found) or not _regular(blocks, body.norm, dtype):
        return None
    seen = look(modules)
    built = body_struct(body, blocks, qualified, dtype)
    if built is None:
        return None
    struct, kept, biases = built
    others = [m for m in modules if type(m) is not CompressedLinear]
    norms = [m for m in others if "weight" in m._parameters]
    weights: list[Any] = [m._parameters["weight"] for m in norms]
    return Plan(
        struct=struct,
        dtype=dtype,
        width=struct.width,
        cached=(len(blocks), struct.kv_heads, struct.head_dim),
        window=window,
        modules=modules,
        seen=seen,
        events=began,
        config=config,
        asked=asked,
        functions=functions,
        chosen=chosen,
        output=getattr(file, "MoeModelOutputWithPast", BaseModelOutputWithPast),
        kept=kept,
        layers=body.layers,
        layer_count=len(body.layers),
        biases=biases,
        dicts=[m.__dict__ for m in others],
        hooks=[m.__dict__[kind] for m in modules for kind in HOOKS],
        norms=([m._parameters for m in norms], weights, [w.data_ptr() for w in weights]),
    )


def look(modules: Iterable[nn.Module]) -> Seen:
    """Everything that hangs on modules: found the same again, nothing about them has changed."""
    objects: list[Any] = []
    tensors: list[Any] = []
    for module in modules:
        own = module.__dict__
        held = [*own["_parameters"].values(), *own["_buffers"].values()]
        objects += (type(module), *own.values(), *held, *own["_modules"].values())
        tensors += held
    return Seen(objects, [_place(t) for t in tensors if t is not None])


def _place(t: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how; of small ones, that may have been copied, whether written to."""
    version = None if t.is_inference() else t._version
    return t.data_ptr(), t.dtype, t.shape, t.stride(), t.device, version


def _asked(config: Any) -> dict[str, Any]:
    values = copy.deepcopy(list(map(config.__dict__.get, ASKED)))  # lists may change in place
    return dict(zip(ASKED, values, strict=True))


def _usual(asked: dict[str, Any]) -> bool:
    """Whether a config asks for nothing out of the ordinary."""
    attentions = ("_output_attentions", "output_attentions")
    outputs = (*attentions, "output_hidden_states", "output_router_logits")
    returns = asked["return_dict"] in (None, True) and asked["is_causal"] in (None, True)
    return returns and not any(asked[name] for name in outputs)


def _window(asked: dict[str, Any]) -> int | None:
    """Tokens that all layers see, sys.maxsize where that has no end; None for another masking."""
    types = set(asked["layer_types"] or ())
    if asked["attention_chunk_size"] or not types <= {"full_attention", "sliding_attention"}:
        return None
    whole = asked["sliding_window"] is None or types == {"full_attention"}
    return sys.maxsize if whole else asked["sliding_window"]


def _chosen(asked: dict[str, Any]) -> tuple[Any, ...]:
    """The functions of attention, its mask and experts; None: the family's own."""
    name = asked["_attn_implementation_internal"]
    experts = ALL_EXPERTS_FUNCTIONS.get(asked["_experts_implementation_internal"])
    return ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name), experts


def _usual_choice(asked: dict[str, Any]) -> bool:
    """Whether attention is transformers' own, written out or torch's, and experts ours or its."""
    function, mask, experts = _chosen(asked)
    name = asked["_attn_implementation_internal"]
    plain = name == "eager" and function is None or name in ("sdpa", NAME) and _genuine(function)
    return plain and _genuine(mask) and (experts is None or _genuine(experts))


def _regular(blocks: list[Any], norm: Any, dtype: torch.dtype) -> bool:
    """Whether all blocks are alike where the native call has one number for all of them."""
    first = blocks[0].self_attn
    norms = [m for b in blocks for m in b.modules() if hasattr(m, "variance_epsilon")]
    linears = [m for b in blocks for m in b.modules() if type(m) is CompressedLinear]
    held = [t for m in (norm, *blocks) for t in (*m.parameters(), *m.buffers())]
    return (
        all(b.self_attn.layer_idx == i for i, b in enumerate(blocks))
        and all(b.self_attn.head_dim == first.head_dim for b in blocks)
        and all(b.self_attn.scaling == first.scaling for b in blocks)
        and all(m.variance_epsilon == norm.variance_epsilon for m in norms)
        and all(m.weight.dtype == dtype for m in (*norms, norm))
        and all(m.adapter is None for m in linears)
        and all(type(t) in (Tensor, nn.Parameter, nn.Buffer) for t in held)
        and all(t.device.type == "cpu" and t.is_contiguous() for t in held)
    )


def _functions(file: ModuleType, classes: set[type]) -> Functions | None:
    """All code that a token passes, by where it is looked up; None if any is foreign."""
    places: list[tuple[Any, str]] = [(c, n) for c in classes for n in ("forward", "__call__")]
    places += [(file, name) for name in HELPERS if hasattr(file, name)]
    places += [(nn.Module, name) for name in ("__call__", "_call_impl")]
    places += [
        (DynamicCache, "update"),
        (DynamicLayer, "update"),
        (PrefixLayer, "update"),
        (F, "silu"),
    ]
    places += [(F, "scaled_dot_product_attention")]
    found = [getattr(owner, name) for owner, name in places]
    owners, names = zip(*places, strict=True)
    return (owners, names, tuple(found)) if all(map(_genuine, found)) else None


def _genuine(function: Any) -> bool:
    """Whether a function, and all that it wraps, is the libraries' own."""
    while isinstance(function, FunctionType):
        if function.__globals__.get("__name__", "").split(".")[0] not in LIBRARIES:
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return inspect.isbuiltin(function)
