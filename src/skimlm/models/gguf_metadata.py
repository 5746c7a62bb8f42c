"""What a GGUF says of its model, against what transformers makes of it.

transformers takes some metadata of each architecture and drops the rest, and tensors that its model
has no place for. Here every statement is looked at: it is true of the config as it stands, or the
config is set to it, or the file is refused by the name of the statement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import FormatError, SkimError, one_line

ROPE_FREQS = "rope_freqs.weight"
EPS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon")
CLOSE = 1e-4  # metadata is stored in float32, a config in decimals


@dataclass(frozen=True)
class Metadata:
    """The architecture, its metadata without that prefix, and the names of the tensors."""

    architecture: str
    facts: dict[str, Any]
    tensors: tuple[str, ...]
    rope_factors: Tensor | None  # what each rotation's frequency is divided by


def read_metadata(path: Path) -> Metadata:
    """Read what a whole GGUF of a model says; SkimError for a shard, an adapter, a projector."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise FormatError("not a GGUF file", file=path)
    with one_line(path, "not a readable GGUF"):
        found, tensors = _read(path)
        factors = _rope_factors(path) if ROPE_FREQS in tensors else None
    if (shards := found.get("split.count", 1)) > 1:
        raise FormatError(
            f"is shard {found.get('split.no', 0) + 1} of {shards}: merge them into one file "
            "(llama-gguf-split --merge), and give that",
            file=path,
        )
    if (kind := found.get("general.type", "model")) != "model":
        raise FormatError(f"holds {kind!r}, not a model", file=path)
    architecture = found.get("general.architecture")
    if not isinstance(architecture, str):
        raise FormatError("names no general.architecture", file=path)
    prefix = f"{architecture}."
    facts = {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix)}
    return Metadata(architecture, facts, tensors, factors)


def _read(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All metadata but the vocabulary, and the names of the tensors."""
    try:
        from transformers.integrations.gguf import read_gguf_metadata
    except ImportError:  # before 5.2x; gguf's own reader takes seconds for a large vocabulary
        reader = _reader(path)
        found = {n: _value(f) for n, f in reader.fields.items() if not n.startswith("tokenizer.")}
        return found, tuple(tensor.name for tensor in reader.tensors)
    found, names = read_gguf_metadata(str(path))
    return {n: v for n, v in found.items() if not n.startswith("tokenizer.")}, names


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SkimError(f"{path}: to read GGUF, `pip install skimlm[gguf]`") from None
    return GGUFReader(path)


def _value(field: Any) -> Any:
    """A field's number, text, or list of them."""
    values = [field.parts[index] for index in field.data]
    if field.types and field.types[-1].name == "STRING":
        plain = [bytes(value).decode("utf-8", "replace") for value in values]
    else:
        plain = [value.tolist()[0] for value in values]
    return plain if field.types and field.types[0].name == "ARRAY" else plain[0]


def _rope_factors(path: Path) -> Tensor:
    tensor = next(t for t in _reader(path).tensors if t.name == ROPE_FREQS)
    return torch.tensor(tensor.data.tolist(), dtype=torch.float64)


def apply_metadata(path: Path, metadata: Metadata, config: Any) -> None:
    """Make a config say what the file says; FormatError for what it has no word for."""
    consumed = _consumed(metadata.architecture)
    for name, value in metadata.facts.items():
        check = _CHECKS.get(name)
        if check is None and name.startswith("rope.scaling."):
            check = _no_scaling
        if check is None and (name in consumed or not value):
            continue  # read by transformers; a count of 0, a feature that is off
        if check is None or not check(config, value, metadata.facts):
            raise FormatError(
                f"{metadata.architecture}.{name} is {_short(value)}, which transformers' "
                f"{config.model_type} does not take from a GGUF: give the model as a folder",
                file=path,
            )
    if metadata.rope_factors is not None:
        _apply_rope_factors(path, metadata.rope_factors, config)


def _consumed(architecture: str) -> set[str]:
    """The metadata that transformers reads for an architecture."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    names = {architecture, architecture.replace("-", "_")}
    names |= {n for n in GGUF_CONFIG_MAPPING if n.replace("_", "") == architecture}
    read = {key for n in names for key in GGUF_CONFIG_MAPPING.get(n, {})}
    try:
        from transformers.integrations.gguf import get_gguf_config
    except ImportError:  # before 5.2x
        return read
    asked = _Asked()
    try:
        get_gguf_config(asked.of(architecture), ())
    except Exception:  # not one of those that are read this way
        return read
    return read | asked.names


class _Asked(dict[str, Any]):
    """Metadata that is not there and notes which of it is asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.prefix = ""

    def of(self, architecture: str) -> _Asked:
        self.prefix = f"{architecture}."
        self["general.architecture"] = architecture
        return self

    def __missing__(self, name: str) -> Any:
        self.names.add(name.removeprefix(self.prefix))
        return [1, 1] if name.endswith(("head_count_kv", "sections")) else 1

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name.removeprefix(self.prefix))
        return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


# ---- one statement at a time: whether the config says it too, after setting it where that is safe

Check = Callable[[Any, Any, dict[str, Any]], bool]


def _same(a: Any, b: Any) -> bool:
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return math.isclose(a, b, rel_tol=CLOSE) if numbers else a == b


def _set(*names: str) -> Check:
    """The first of these attributes that a config has."""

    def check(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
        name = next((n for n in names if hasattr(config, n)), None)
        if name is not None and not _same(getattr(config, name), value):
            setattr(config, name, value)
        return name is not None

    return check


def _is(*names: str) -> Check:
    """An attribute that more than itself was made from: it must say the same already."""

    def check(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
        found = [getattr(config, n) for n in names if getattr(config, n, None) is not None]
        return any(_same(own, value) for own in found) or (not found and not value)

    return check


def _constant(*allowed: Any) -> Check:
    return lambda _config, value, _facts: any(_same(a, value) for a in allowed)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _key_length(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
    if hasattr(config, "global_head_dim"):
        return value in (config.global_head_dim, config.head_dim)
    if value != _head_dim(config) and hasattr(config, "head_dim"):
        config.head_dim = value
    return value == _head_dim(config)


def _rope(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """The rotation parameters of a config, which may have some for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get(kind, {}) if any(isinstance(v, dict) for v in found.values()) else found


def _theta(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
    rope = _rope(config)
    if "rope_theta" in rope and not _same(rope["rope_theta"], value):
        rope["rope_theta"] = value
    return "rope_theta" in rope


def _theta_of_windows(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
    rope = _rope(config, "sliding_attention")
    if rope is not _rope(config) and "rope_theta" in rope:
        rope["rope_theta"] = value
    return _same(rope.get("rope_theta"), value)


def _rotated(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
    part = _rope(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1))
    own = getattr(config, "rotary_dim", None) or int(_head_dim(config) * (part or 1))
    return value == own


def _window(config: Any, value: Any, facts: dict[str, Any]) -> bool:
    every = facts.get("context_length", 0) or getattr(config, "max_position_embeddings", 0)
    return _same(getattr(config, "sliding_window", None), value) or value >= every


def _pattern(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
    """Which layers see a window: every n-th sees all, or a list says of each."""
    types = getattr(config, "layer_types", None) or []
    slides = [kind == "sliding_attention" for kind in types]
    if isinstance(value, list):
        return [bool(v) for v in value] == slides
    return slides == [bool((i + 1) % value) for i in range(len(types))]


def _no_scaling(_config: Any, value: Any, facts: dict[str, Any]) -> bool:
    """Rotations as they are: transformers' reader sets no other."""
    kind, factor = facts.get("rope.scaling.type", "none"), facts.get("rope.scaling.factor", 1)
    scales = kind != "none" and factor not in (0, 1)
    return not scales and facts.get("rope.scaling.attn_factor", 1) in (0, 1)


def _scale(config: Any, value: Any, _facts: dict[str, Any]) -> bool:
    own = getattr(config, "attention_multiplier", None)
    scalar = getattr(config, "query_pre_attn_scalar", None) or _head_dim(config)
    return _same(own or scalar**-0.5, value)


_CHECKS: dict[str, Check] = {
    "tensor_data_layout": lambda *_: True,
    "attention.causal": _constant(True),
    "pooling_type": _constant(0),
    "attention.layer_norm_rms_epsilon": _set(*EPS),
    "attention.layer_norm_epsilon": _set(*EPS),
    "attention.key_length": _key_length,
    "attention.value_length": _key_length,
    "attention.scale": _scale,
    "attention.sliding_window": _window,
    "attention.sliding_window_pattern": _pattern,
    "attn_logit_softcapping": _set("attn_logit_softcapping"),
    "final_logit_softcapping": _set("final_logit_softcapping"),
    "rope.dimension_count": _rotated,
    "rope.freq_base": _theta,
    "rope.freq_base_swa": _theta_of_windows,
    "use_parallel_residual": _set("use_parallel_residual"),
    "expert_count": _is("num_experts", "num_local_experts"),
    "expert_used_count": _is("num_experts_per_tok"),
    "logit_scale": _is("logit_scale"),
    "embedding_scale": _is("embedding_multiplier"),
    "residual_scale": _is("residual_multiplier"),
}


# ---- llama 3's rotations


def _apply_rope_factors(path: Path, factors: Tensor, config: Any) -> None:
    """Say in the config what divides the frequencies: only llama 3's rule has words for it."""
    if bool((factors == 1).all()):
        return
    rope = _rope(config)
    rule = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if rope.get("rope_type") != "default" or not _follows(factors, rule, rope, config):
        raise FormatError(
            "rotates by frequencies that are not llama 3's: give the model as a folder",
            file=path,
            tensor=ROPE_FREQS,
        )
    rope |= rule


def _follows(factors: Tensor, rule: dict[str, Any], rope: dict[str, Any], config: Any) -> bool:
    """Whether the factors are those of a rule for llama 3."""
    dims = _head_dim(config)
    exponents = torch.arange(0, dims, 2, dtype=torch.float64) / dims
    turns = rule["original_max_position_embeddings"] / (
        2 * math.pi * float(rope["rope_theta"]) ** exponents
    )
    low, high, factor = (rule[n] for n in ("low_freq_factor", "high_freq_factor", "factor"))
    share = ((turns - low) / (high - low)).clamp(0, 1)
    want = 1 / ((1 - share) / factor + share)
    return factors.shape == want.shape and torch.allclose(factors, want, rtol=CLOSE)


# ---- tensors


def check_gguf_tensors(path: Path, metadata: Metadata, model: Any) -> None:
    """Refuse tensors that transformers would drop: those its model has no place for."""
    from transformers import modeling_gguf_pytorch_utils as reader

    try:
        from transformers.integrations.gguf import is_gguf_arch_supported

        if is_gguf_arch_supported(metadata.architecture):
            return  # loaded by another way, which tells what it did not use
    except ImportError:  # before 5.2x there is the one way
        pass
    kind = reader.TENSOR_PROCESSORS.get(metadata.architecture, reader.TensorProcessor)
    extra: list[str] = []
    for whole in (
        _Flat(model),
        model,
    ):  # few architectures are named by their parts, slow to go over
        with one_line(path, "its tensors have no known place"):
            places = reader.get_gguf_hf_weights_map(whole, kind(config=model.config.to_dict()))
        extra = sorted(set(metadata.tensors) - set(places) - {ROPE_FREQS, "output.weight"})
        if not extra:
            return
    more = f" (nor for {len(extra) - 1} more)" if len(extra) > 1 else ""
    raise FormatError(
        f"is stored, but transformers' {model.config.model_type} has no place for it{more}: "
        "give the model as a folder",
        file=path,
        tensor=extra[0],
    )


class _Flat:
    """A model as its tensors' names alone."""

    def __init__(self, model: Any) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[Any]:
        return []
