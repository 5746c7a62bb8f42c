"""GGUF files: what transformers needs to be told to read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from skimlm.errors import FormatError, one_line
from skimlm.storage.safetensors import (
    finite,
)


def read_gguf_config(path: Path) -> Any:
    from transformers import AutoConfig

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise FormatError("not a GGUF file", file=path)
    with one_line(path, "not a readable GGUF"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    return config


def gguf_options(path: Path) -> dict[str, Any]:
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x the default keeps the GGUF blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def check_model_finite(path: Path, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not finite(tensor):
            raise FormatError("holds NaN or Inf", file=path, tensor=name)
