"""A GGUF read a tensor at a time: what transformers makes of the whole file, never more than one.

Names, permutations and offsets are transformers' own (its tensor processors), numbers are unpacked
by the `gguf` package: a tensor is bit for bit the one `from_pretrained(gguf_file=...)` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skimlm.errors import FormatError, SkimError, one_line
from skimlm.storage.safetensors import finite

ROWS = 8192  # of a table that are unpacked at a time: in float32 it is twice as large as in the end
TABLES = ("token_embd.weight", "output.weight")  # no processor moves their rows


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file, and how."""

    name: str  # the GGUF's
    kind: Any  # gguf.GGMLQuantizationType
    offset: int  # bytes
    dtype: np.dtype  # of what is stored: floats, or bytes of quantized blocks
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GgufTensors:
    """The tensors of a GGUF under the names that a model gives them."""

    path: Path
    dtype: torch.dtype
    places: dict[str, _Place]
    processor: Any
    mapping: dict[str, str]  # GGUF name -> name in the model

    @classmethod
    def open(cls, path: Path, model: Any, dtype: torch.dtype) -> GgufTensors:
        """The tensors of a file for a model, which may be on the meta device; none is read yet."""
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils as usual

        with one_line(path, "cannot be loaded"):
            reader = GGUFReader(path)
            architecture = usual.read_field(reader, "general.architecture")[0]
            _refuse_newer(path, architecture)
            config = usual.load_gguf_checkpoint(path, return_tensors=False)["config"]
            processor = usual.TENSOR_PROCESSORS.get(architecture, usual.TensorProcessor)(config)
            mapping = usual.get_gguf_hf_weights_map(model, processor)
            places = {
                mapping[t.name]: _Place(
                    t.name, t.tensor_type, int(t.data_offset), t.data.dtype, tuple(t.data.shape)
                )
                for t in reader.tensors
                if t.name in mapping
            }
        return cls(path, dtype, places, processor, mapping)

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self.places)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Path]]:
        """These tensors one after the other, each with its file."""
        for name in names:
            with one_line(self.path, f"{name}: cannot be read"):
                tensor = self._tensor(self.places[name])
            if not finite(tensor):
                raise FormatError("holds NaN or Inf", file=self.path, tensor=name)
            yield name, tensor, self.path

    def _tensor(self, place: _Place) -> Tensor:
        count = int(np.prod(place.shape, dtype=np.int64))
        # read, not mapped: a mapped file stays in memory while any of it is used
        data = np.fromfile(self.path, place.dtype, count, offset=place.offset).reshape(place.shape)
        if place.name not in TABLES:
            return self._processed(place, data)
        return torch.cat(
            [self._processed(place, data[i : i + ROWS]) for i in range(0, len(data), ROWS)]
        )

    def _processed(self, place: _Place, data: np.ndarray) -> Tensor:
        from gguf import dequantize

        made = self.processor.process(
            weights=dequantize(data, place.kind),
            name=place.name,
            tensor_key_mapping=self.mapping,
            parsed_parameters={"tensors": {}},
        )
        if made.name != place.name:
            raise SkimError("transformers puts this tensor together from several: not supported")
        return torch.from_numpy(np.copy(made.weights)).to(self.dtype)


def _refuse_newer(path: Path, architecture: str) -> None:
    """A few architectures are read by a part of transformers that takes files as a whole."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:  # before 5.2x there was no such part
        return
    if is_gguf_arch_supported(architecture):
        raise SkimError(
            f"{path}: a .gguf of {architecture!r} must fit in memory to be compressed; give a "
            "folder of safetensors"
        )
