"""GGUF files: what transformers needs to be told to read one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from skimlm.errors import FormatError, one_line
from skimlm.models.gguf_metadata import Metadata, apply_metadata
from skimlm.storage.safetensors import (
    finite,
)


def read_gguf_config(path: Path, metadata: Metadata) -> Any:
    """The transformers config of a GGUF, saying all that the file says."""
    from transformers import AutoConfig

    with one_line(path, "not a readable GGUF"), alone(path) as folder:
        config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
        apply_metadata(path, metadata, config)
    return config


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """A folder with nothing but this GGUF, or the folder as it is.

    transformers also reads what lies beside a GGUF: tokenizer files, adapters.
    """
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


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
