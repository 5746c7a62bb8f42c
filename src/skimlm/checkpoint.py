"""Models in and out: a Hugging Face folder, a hub id or a GGUF file in; a compressed folder out.

    open_checkpoint(source) -> Checkpoint      all that can be wrong with a file, before any work
    load(source)            -> model, tokenizer
    blocks(model), linears(model)              what there is to compress, found by structure
    save(out, ...)                             shards + config + tokenizer, all or nothing

A checkpoint is hostile until read: headers are checked first, no pickle is opened, and no code that
comes with a model is run. `save` writes a folder beside OUT and renames it: OUT is whole or absent.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from skimlm import shards
from skimlm.errors import FormatError, SkimError
from skimlm.linear import quantize_table, table_layout
from skimlm.weights.pack import PLAIN, Parts, QuantizedWeight, histogram, layout, pack

METHOD = "skimlm"  # quant_method in config.json
FORMAT_VERSION = 2  # the newest; a folder without any of its parts says 1
MAX_SHARD = "5GB"
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened and checked source; `files` maps each tensor to its file (empty for GGUF)."""

    path: Path
    config: Any
    files: dict[str, Path] = field(repr=False)
    compressed: bool = False

    @property
    def gguf(self) -> bool:
        """Whether the source is a GGUF file rather than a folder."""
        return self.path.is_file()


# ---- reading


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Check a model: files whole, numbers finite, architecture known, something to compress."""
    path = _resolve(source, revision, cache_dir)
    if path.is_file():
        return _open_gguf(path)
    config, compressed = _read_config(path)
    files = shards.tensor_files(path)
    if not compressed:
        _check_shapes(path, config, files)
    shards.check_finite(files)
    return Checkpoint(path, config, {name: file for name, (file, _) in files.items()}, compressed)


def open_compressed(source: str | os.PathLike[str]) -> Checkpoint:
    """Check a compressed folder; SkimError for any other model."""
    opened = open_checkpoint(source)
    if not opened.compressed:
        raise SkimError(f"{source}: not a compressed folder: make one with `skimlm compress`")
    return opened


def load(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Any, Any]:
    """Load a model, compressed or not, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not isinstance(source, Checkpoint):
        source = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    path, options = source.path, {}
    if source.gguf:
        path, options = source.path.parent, _gguf_options(source.path)
    with _one_line(source.path, "cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, **{k: v for k, v in options.items() if k == "gguf_file"}
        )
    with _one_line(source.path, "cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=source.config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with the tensor's name
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    _check_loading(source, info)
    if source.gguf:
        _check_model_finite(source.path, model)
    return model.eval(), tokenizer


def load_outside(source: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A model whose decoder blocks are on the meta device, all else loaded, and its tokenizer.

    Raises SkimError for a checkpoint whose tensors are not named as the model names them.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with _one_line(source.path, "cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):  # buffers are made, not stored
            model: Any = AutoModelForCausalLM.from_config(
                source.config, dtype=dtype, trust_remote_code=False
            )
        if (source.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.path)
    inside = tuple(f"{prefix}." for prefix, _ in blocks(model))
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    tied = [name for name in model.all_tied_weights_keys if name not in source.files]
    _put(source, model, [name for name in names if name not in tied], dtype)
    model.tie_weights()
    return model.eval(), tokenizer


@contextmanager
def loaded_block(source: Checkpoint, model: nn.Module, prefix: str) -> Iterator[nn.Module]:
    """A decoder block with its numbers, which are on the meta device before and after."""
    block = model.get_submodule(prefix)
    names = [f"{prefix}.{name}" for name in block.state_dict()]
    slots = [_slot(model, name) for name in names]
    empty = [place[own] for place, own in slots]
    try:
        _put(source, model, names, next(block.parameters()).dtype)
        yield block
    finally:
        for (place, own), tensor in zip(slots, empty, strict=True):
            place[own] = tensor


def _put(source: Checkpoint, model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Read tensors of a checkpoint into the model, floats as `dtype`."""
    files: dict[Path, list[str]] = {}
    for name in names:
        if name not in source.files:
            raise FormatError(
                "is not in the checkpoint under this name: such a model must fit in memory to be "
                "compressed",
                file=source.path,
                tensor=name,
            )
        files.setdefault(source.files[name], []).append(name)
    for file, here in files.items():
        with safe_open(file, framework="pt") as stream:
            for name in here:
                tensor = stream.get_tensor(name)
                # a copy: views of a file are not aligned, and stay in memory while they are used
                tensor = tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor
                place, own = _slot(model, name)
                if tensor.shape != place[own].shape:
                    raise FormatError(
                        f"shape {list(tensor.shape)}, the model has {list(place[own].shape)}",
                        file=file,
                        tensor=name,
                    )
                parameter = isinstance(place[own], nn.Parameter)
                place[own] = nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a module keeps the tensor called `name`."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if own in module._parameters else module._buffers), own


def _resolve(
    source: str | os.PathLike[str], revision: str | None, cache_dir: str | Path | None
) -> Path:
    """A local folder or .gguf file as it is; what is shaped like a hub id through the cache."""
    path, name = Path(source), os.fspath(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise SkimError(f"{name}: not a model folder and not a .gguf file")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")):
        raise SkimError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_FILES
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated classes
        raise SkimError(
            f"{name}: no such folder, and the hub says: {shards.first_line(error)}"
        ) from error


def _read_config(path: Path) -> tuple[Any, bool]:
    """The transformers config of a folder, and whether it is one of our compressed ones."""
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    file = path / "config.json"
    raw = shards.read_json(file)
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        raise FormatError(
            f"unknown architecture {kind!r}: transformers {__version__} has no such model_type, "
            "and code that comes with a model is never run",
            file=file,
        )
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if raw.get("quantization_config") and method != METHOD:
        raise FormatError(
            f"already quantized with {method!r}, give the original checkpoint", file=file
        )
    with _one_line(file, "is not a usable config"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FormatError(
            f"unknown architecture: {kind!r} is not a causal language model", file=file
        )
    return config, method == METHOD


def skeleton(file: Path, config: Any) -> nn.Module:
    """The model without its numbers, on the meta device; an error names `file`."""
    from transformers import AutoModelForCausalLM

    with _one_line(file, "the model cannot be built"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_shapes(path: Path, config: Any, files: Mapping[str, tuple[Path, Mapping]]) -> None:
    """Refuse models with nothing to compress, and linears whose stored shape is not the model's."""
    with _naming(path):
        layers = linears(skeleton(path / "config.json", config))
    for name, layer in layers.items():
        file, entry = files.get(f"{name}.weight", (None, {}))
        shape = [layer.out_features, layer.in_features]
        if file and entry["shape"] != shape:
            raise FormatError(
                f"shape {entry['shape']}, config.json makes it {shape}",
                file=file,
                tensor=f"{name}.weight",
            )


def _open_gguf(path: Path) -> Checkpoint:
    from transformers import AutoConfig

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise FormatError("not a GGUF file", file=path)
    with _one_line(path, "not a readable GGUF"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with _naming(path):
        linears(skeleton(path, config))
    return Checkpoint(path, config, {})


def _gguf_options(path: Path) -> dict[str, Any]:
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x the default keeps the GGUF blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def _check_model_finite(path: Path, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not shards.finite(tensor):
            raise FormatError("holds NaN or Inf", file=path, tensor=name)


def _check_loading(source: Checkpoint, info: Mapping[str, Any]) -> None:
    """Refuse a load that left a tensor random: transformers only warns."""
    for name in sorted(info["missing_keys"]):
        raise FormatError("is missing", file=source.path, tensor=name)
    for name, got, want in sorted(info["mismatched_keys"]):
        raise FormatError(
            f"shape {list(got)}, the model has {list(want)}",
            file=source.files.get(name, source.path),
            tensor=name,
        )
    if source.compressed:
        for name in sorted(info["unexpected_keys"]):
            raise FormatError(
                "does not belong to this model", file=source.files.get(name), tensor=name
            )


@contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises about a file into one line; our own errors pass."""
    try:
        yield
    except (SkimError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise SkimError(f"{path}: {what}: {shards.first_line(error)}") from error


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Put the path in front of an error that does not know it."""
    try:
        yield
    except FormatError as error:
        raise error.at(path) from error
    except SkimError as error:
        raise SkimError(f"{path}: {error}") from error


# ---- structure


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their names: the ModuleList that holds the most numbers."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise SkimError(f"no decoder blocks in {type(model).__name__}")
    name, found = max(lists, key=lambda pair: sum(t.numel() for t in pair[1].state_dict().values()))
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]


def linears(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, nn.Linear]:
    """The `nn.Linear`s inside the blocks by name, in model order; patterns as in a shell."""
    found = {}
    for block_name, block in blocks(model):
        for name, module in block.named_modules(prefix=block_name):
            _refuse_fused(name, module)
            if type(module) is nn.Linear:
                found[name] = module
    if not found:
        raise SkimError(f"no nn.Linear in the decoder blocks of {type(model).__name__}")
    wanted = {
        name: module
        for name, module in found.items()
        if (not include or any(fnmatchcase(name, p) for p in include))
        and not any(fnmatchcase(name, p) for p in exclude or ())
    }
    if not wanted:
        raise SkimError(f"include and exclude leave none of the {len(found)} linears")
    return wanted


def _refuse_fused(name: str, module: nn.Module) -> None:
    """Experts fused into one 3-D parameter are refused: to skip them would fool the user."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for own, parameter in module.named_parameters(name, recurse=False):
        if parameter.ndim == 3:
            raise FormatError(
                f"fused experts {list(parameter.shape)}: mixtures of experts are not supported",
                tensor=own,
            )


def embeddings(model: Any) -> tuple[tuple[str, Any], tuple[str, Any] | None, bool]:
    """(name, module) of the input embedding, of the head if any, and whether they are tied."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return (names[id(table)], table), None, False
    tied = f"{names[id(head)]}.weight" in model.all_tied_weights_keys
    return (names[id(table)], table), (names[id(head)], head), tied


def multiplier_of(table: nn.Module) -> float | None:
    """The constant a scaled embedding multiplies by, None for a plain one; refuses other kinds."""
    if type(table) is nn.Embedding:
        return None
    value = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    if isinstance(value, (int, float)):
        return float(value)
    raise SkimError(f"cannot compress an embedding of class {type(table).__name__}: use 16 bits")


# ---- writing


def save(
    out: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    quantized: Mapping[str, QuantizedWeight],
    *,
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
    max_shard_size: int | str = MAX_SHARD,
) -> Path:
    """Write a compressed folder: `quantized` replaces those linears, the rest is the model's."""
    out = Path(out)
    check_out(out, force)
    with shards.whole_folder(out) as folder:
        write(
            folder,
            model,
            tokenizer,
            quantized,
            embed_bits=embed_bits,
            bits=bits,
            provenance=provenance,
            max_shard_size=max_shard_size,
        )
    return out


def write(
    folder: Path,
    model: Any,
    tokenizer: Any,
    quantized: Mapping[str, QuantizedWeight],
    *,
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD,
) -> None:
    """The files of a compressed folder, into an empty one; see `save`."""
    tensors = _tensors(model, quantized, embed_bits)
    entries = {
        name: _entry(histogram(q.widths), q.in_scale is not None, Parts.of(q))
        for name, q in quantized.items()
    }
    _write_texts(folder, model, tokenizer, entries, embed_bits, bits, provenance)
    shards.write(folder, shards.split(tensors, max_shard_size))


def write_packed(
    folder: Path,
    model: Any,
    tokenizer: Any,
    counts: Mapping[str, Mapping[int, int]],
    read: Callable[[str], Tensor],
    *,
    in_scale: bool,
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD,
) -> None:
    """The same files for a model whose blocks are on the meta device.

    `counts` has the width histogram of every compressed linear; what its blocks hold is had by
    `read(name)`, a tensor at a time.
    """
    packed = _packed_plan(linears(model), counts, in_scale, {})
    tensors = _other_tensors(model, counts, embed_bits, quantize_table) | packed
    entries = {name: _entry(count, in_scale, PLAIN) for name, count in counts.items()}
    _write_texts(folder, model, tokenizer, entries, embed_bits, bits, provenance)
    shards.write(folder, shards.split(tensors, max_shard_size), read)


def _packed_plan(
    layers: Mapping[str, nn.Linear],
    counts: Mapping[str, Mapping[int, int]],
    in_scale: bool,
    parts: Mapping[str, Parts],
) -> dict[str, Tensor]:
    """The tensors that linears with these width histograms are stored in, on the meta device."""
    return {
        f"{name}.{part}": torch.empty(shape, dtype=dtype, device="meta")
        for name, count in counts.items()
        for part, (dtype, shape) in layout(
            count, layers[name].in_features, in_scale, parts.get(name, PLAIN)
        ).items()
    }


def check_out(out: str | os.PathLike[str], force: bool = False, mark: str = "config.json") -> None:
    """Refuse an OUT that exists; with `force`, one that is not a model folder (has no `mark`)."""
    out = Path(out)
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise SkimError(f"{out}: exists, use --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / mark).is_file()):
        raise SkimError(f"{out}: is not a model folder, --force does not replace it")


def rewrite(
    source: Checkpoint,
    folder: Path,
    changed: Mapping[str, Tensor | None],
    config: Mapping[str, Any],
) -> None:
    """Copy a folder into `folder` with another config, some tensors changed or (None) left out.

    All else stays as it is, byte by byte; every tensor stays in the file it was in.
    """
    for file in source.path.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != shards.INDEX:
            shutil.copyfile(file, folder / file.name)
    files: dict[str, dict[str, Tensor]] = {}
    for path in sorted(set(source.files.values())):
        with safe_open(path, framework="pt") as stream:
            tensors = {n: changed.get(n, stream.get_tensor(n)) for n in stream.keys()}
        kept = {n: tensor for n, tensor in tensors.items() if tensor is not None}
        files |= {path.name: kept} if kept else {}
    if len(files) == 1:  # then there is no index that could name it
        files = {"model.safetensors": files.popitem()[1]}
    shards.write(folder, files)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers writes it
    (folder / "config.json").write_text(text, encoding="utf-8")


def folder_bytes(out: str | os.PathLike[str]) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())


def plan_bytes(
    model: Any,
    tokenizer: Any,
    embed_bits: int,
    counts: Mapping[str, Mapping[int, int]] | None = None,
    *,
    names: Sequence[str] | None = None,
    in_scale: bool = True,
    parts: Mapping[str, Parts] | None = None,
    bits: float = 1 / 3,
    provenance: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD,
) -> int:
    """Bytes OUT will have besides the tensors of the compressed linears.

    Exact when `counts` gives every linear's width histogram and `in_scale`, `parts` (of the linears
    that have any), `bits`, `provenance` are what `save` will get; without `counts` an upper bound,
    at most some 300 bytes per linear too high. `names` says which linears that is for, all by
    default.
    """
    parts = parts or {}
    layers = linears(model)
    bound = counts is None
    if counts is None:
        chosen = layers if names is None else {name: layers[name] for name in names}
        counts = {name: {8: layer.out_features} for name, layer in chosen.items()}
    packed = _packed_plan(layers, counts, in_scale, parts)
    if bound:  # linears of narrow rows have a codebook too
        packed |= {
            f"{name}.codebook": torch.empty(
                32 * layers[name].out_features, dtype=torch.int8, device="meta"
            )
            for name in counts
        }
    entries = {
        name: _entry(
            dict.fromkeys(range(1, 9), layers[name].out_features) if bound else count,
            in_scale,
            parts.get(name, PLAIN),
        )
        for name, count in counts.items()
    }
    tensors = _other_tensors(model, counts, embed_bits, _table_plan) | packed
    with tempfile.TemporaryDirectory() as folder:
        _write_texts(Path(folder), model, tokenizer, entries, embed_bits, bits, provenance)
        total = folder_bytes(folder)
    files = shards.split(tensors, max_shard_size)
    total += sum(shards.file_bytes(file) for file in files.values())
    total += len((shards.index_text(files) or "").encode())
    return total - sum(tensor.nbytes for tensor in packed.values())


def _entry(counts: Mapping[int, int], in_scale: bool, parts: Parts) -> dict[str, Any]:
    """What config.json says of a linear; read back by `SkimlmConfig`."""
    widths = {str(b): n for b, n in counts.items()}
    return {"widths": widths, "in_scale": in_scale, **parts.entry()}


def _tensors(
    model: Any, quantized: Mapping[str, QuantizedWeight], embed_bits: int
) -> dict[str, Tensor]:
    """Everything the weight files hold."""
    tensors = _other_tensors(model, quantized, embed_bits, quantize_table)
    for name, q in quantized.items():
        module = model.get_submodule(name)
        if q.shape != module.weight.shape:
            raise SkimError(
                f"{name}: quantized as {list(q.shape)}, not {list(module.weight.shape)}"
            )
        with _naming(name):
            tensors |= {f"{name}.{part}": tensor for part, tensor in pack(q).items()}
    return tensors


def _other_tensors(
    model: Any,
    replaced: Iterable[str],
    embed_bits: int,
    quantize: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """The state dict without `replaced` weights and tied copies, tables through `quantize`."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name in replaced:
        del tensors[f"{name}.weight"]
    (table_name, table), head, tied = embeddings(model)
    for name, source in model.all_tied_weights_keys.items():
        if not torch.equal(tensors[name], tensors[source]):
            raise SkimError(f"{name} differs from {source}, but the config ties them")
        del tensors[name]
    if embed_bits == 16:
        return tensors
    multiplier_of(table)  # refuses the kinds it does not know
    for name in (table_name, *([head[0]] if head and not tied else [])):
        weight, scale = quantize(tensors[f"{name}.weight"], embed_bits)
        tensors |= {f"{name}.weight": weight, f"{name}.scale": scale}
    return tensors


def _table_plan(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What `quantize_table` would return, without the numbers."""
    rows, cols = table.shape
    shape, dtype = table_layout(rows, cols, bits)
    scale = torch.empty(rows, dtype=torch.bfloat16, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta"), scale


def _write_texts(
    folder: Path,
    model: Any,
    tokenizer: Any,
    linears: Mapping[str, Mapping[str, Any]],
    embed_bits: int,
    bits: float,
    provenance: Mapping[str, Any] | None,
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    newer = any(entry.keys() - {"widths", "in_scale"} for entry in linears.values())
    config.quantization_config = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION if newer else 1,
        "bits": bits,
        "embed_bits": embed_bits,
        "linears": dict(linears),
        "provenance": dict(provenance or {}),
    }
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
