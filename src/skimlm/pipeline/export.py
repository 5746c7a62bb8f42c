"""A compressed folder for tools that do not know skimlm.

    dense    OUT            an ordinary Hugging Face folder with W + B^T A, rounded once
    peft     OUT/base       the folder without its adapters, compressed as it is or ordinary
             OUT/adapter    A and B in the files of PEFT, float32: lora_A = A, lora_B = B^T, scale 1

PEFT adds lora_B lora_A * (lora_alpha / r) to linears of a model, so lora_alpha is r. It
wraps `nn.Linear` only: a base that stays compressed goes through `model.dequantize()` first.
"""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.format.layer import TABLES_VERSION
from skimlm.integrations.swap import aliases
from skimlm.models.checkpoint import Checkpoint, load, open_compressed
from skimlm.models.side_files import copy_side_files
from skimlm.models.write import rewrite
from skimlm.runtime.linear import CompressedLinear
from skimlm.storage.folder import check_apart, check_out, folder_bytes, mark, whole_folder
from skimlm.storage.safetensors import read_json, write_shards
from skimlm.train.adapters import adapted

TARGETS = ("dense", "peft")


@dataclasses.dataclass
class Report:
    """What was written."""

    out: str
    to: str
    dtype: str | None  # of an ordinary folder's weights
    adapters: int  # files of PEFT hold so many
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "dense",
    *,
    dtype: torch.dtype | None = None,
    dense_base: bool = False,
    force: bool = False,
) -> Report:
    """Write a compressed folder as `to`: "dense" or "peft"; `dtype` defaults to the model's.

    Raises SkimError for what a user can get wrong; OUT is whole or absent.
    """
    if to not in TARGETS:
        raise SkimError(f"export to {' or '.join(TARGETS)}, got {to!r}")
    out = Path(out)
    check_apart(out, path)
    check_out(out, force)
    opened = open_compressed(path)
    dense = to == "dense" or dense_base
    if dtype is not None and not dense:
        raise SkimError("a dtype is for an ordinary folder: add --dense-base or export to dense")
    dtype = dtype or _dtype(opened.config.dtype)
    model, _ = load(opened, dtype)
    layers = adapted(model)
    if to == "peft" and not layers:
        raise SkimError(f"{path}: has no adapters to export; compress with --rank 0.1")
    with whole_folder(out) as folder:
        base = folder
        if to == "peft":
            base = folder / "base"
            base.mkdir()
            _write_adapter(folder / "adapter", layers)
        if dense:
            _write_dense(base, opened.path, model, dtype, merged=to == "dense")
        else:
            _write_without_adapters(base, opened, model)
        mark(folder, f"export to {to}")
    return Report(
        out=str(out),
        to=to,
        dtype=str(dtype).removeprefix("torch.") if dense else None,
        adapters=len(layers) if to == "peft" else 0,
        bytes=folder_bytes(out),
    )


def _dtype(given: Any) -> torch.dtype:
    """A config's dtype, which may be a string or absent."""
    return getattr(torch, given) if isinstance(given, str) else given or torch.bfloat16


def _write_dense(
    folder: Path, source: Path, model: Any, dtype: torch.dtype, *, merged: bool
) -> None:
    """An ordinary folder of W + B^T A, or of W where it is not `merged`."""
    for layer in adapted(model).values() if not merged else ():
        layer.drop_adapter()
    model = model.dequantize(dtype)
    model.save_pretrained(folder)
    copy_side_files(source, folder)


def _write_without_adapters(folder: Path, opened: Checkpoint, model: Any) -> None:
    """The compressed folder as it is, its adapters left out."""
    config = read_json(opened.path / "config.json")
    quantization = config["quantization_config"]
    for entry in quantization["linears"].values():
        entry.pop("rank", None), entry.pop("adapter_bits", None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    specs = [layer.spec.without_adapter() for layer in layers.values()]
    tables = [TABLES_VERSION] if quantization.get("tables") else []
    quantization["format_version"] = max([spec.version for spec in specs] + tables)
    stored = sum(m.nbytes - _adapter_bytes(m) for m in layers.values())
    quantization["bits"] = 8 * stored / sum(m.in_features * m.out_features for m in layers.values())
    left_out: dict[str, Tensor | None] = {
        f"{alias}.{part}": None
        for name in adapted(model)
        for alias in aliases(model, name)
        for part in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale")
    }
    rewrite(opened, folder, left_out, config)


def _adapter_bytes(layer: CompressedLinear) -> int:
    return sum(t.nbytes for name, t in layer.layer.tensors.items() if name.startswith("lora_"))


def _write_adapter(folder: Path, layers: dict[str, CompressedLinear]) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT reads them."""
    folder.mkdir()
    ranks = {name: layer.spec.rank for name, layer in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../base",
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {}
    for name, layer in layers.items():
        a, b = layer.adapter_values()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.float()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.float().T
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    write_shards(folder, {"adapter_model.safetensors": tensors})
