"""The transformers plug-in: with `skimlm` imported, `from_pretrained` reads compressed folders.

config.json's `quantization_config` names the method and says how every linear is stored, which
fixes the size of every buffer. So the skeleton gets its compressed layers before a byte is loaded,
transformers loads by name as usual, and `save_pretrained` writes the same buffers back.

The files are checked before that: a tampered folder raises a FormatError naming file and tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from skimlm.errors import FormatError
from skimlm.format.check import check_stored
from skimlm.format.layer import FORMAT_VERSION, METHOD, Layer, LayerSpec
from skimlm.models.blocks import embeddings, multiplier_of
from skimlm.runtime.decode import fuse, unfuse
from skimlm.runtime.linear import CompressedEmbedding, CompressedHead, CompressedLinear
from skimlm.storage.safetensors import DTYPES, read_header

CONFIG = "config.json"


@register_quantization_config(METHOD)
class SkimlmConfig(QuantizationConfigMixin):
    """What config.json says about a compressed model; written by `skimlm.models.write.save`."""

    def __init__(
        self,
        format_version: int = 1,
        bits: float = 0.0,
        embed_bits: int = 16,
        linears: dict[str, dict[str, Any]] | None = None,
        provenance: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version, self.bits, self.embed_bits = format_version, bits, embed_bits
        self.linears, self.provenance = linears or {}, provenance or {}
        if not isinstance(self.linears, dict):
            raise FormatError("linears must be a map of names", file=CONFIG)
        if format_version not in range(1, FORMAT_VERSION + 1):
            raise FormatError(
                f"format_version {format_version!r}, this skimlm reads 1 to {FORMAT_VERSION}",
                file=CONFIG,
            )
        if embed_bits not in (4, 8, 16):
            raise FormatError(f"embed_bits must be 4, 8 or 16, got {embed_bits!r}", file=CONFIG)

    def spec(self, name: str, rows: int, cols: int) -> LayerSpec:
        """How a linear of this shape is stored."""
        try:
            spec = LayerSpec.read(self.linears[name], rows, cols)
            if spec.version > self.format_version:
                options = ", ".join(spec.options())
                raise FormatError(f"format_version {self.format_version} has no {options}")
        except FormatError as error:
            raise FormatError(error.reason, file=CONFIG, tensor=name) from None
        return spec


@register_quantizer(METHOD)
class SkimlmQuantizer(HfQuantizer):
    """Gives a model its compressed layers, and takes them away again."""

    requires_calibration = True  # dense models are not compressed while loading
    quantization_config: SkimlmConfig

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        swap_in(model, self.quantization_config, dtype or torch.get_default_dtype())
        check_files(model, self.quantization_config, [Path(f) for f in checkpoint_files or ()])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        table, head, tied = embeddings(model)
        if head and tied and isinstance(head[1], CompressedHead):
            head[1].tie(table[1])
        fuse(model)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # config.dtype, which comes here, is a string after a `save_pretrained`
        given = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return swap_out(model, given or model.dtype)

    def is_serializable(self) -> bool:
        """A loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes have no gradient."""
        return False


def swap_in(model: Any, config: SkimlmConfig, dtype: torch.dtype) -> None:
    """Replace linears, embedding and head by empty compressed ones, on the meta device."""
    for name in config.linears:
        own = _own_name(model, name)
        old = model.get_submodule(own)
        if type(old) is not nn.Linear:
            raise FormatError("is not a linear of this model", file=CONFIG, tensor=name)
        spec = config.spec(name, old.out_features, old.in_features)
        new = CompressedLinear(spec, bias=old.bias is not None, dtype=dtype, device="meta")
        model.set_submodule(own, new)
    if config.embed_bits == 16:
        return
    (name, table), head, tied = embeddings(model)
    model.set_submodule(
        name,
        CompressedEmbedding(
            table.weight.shape[0],
            table.weight.shape[1],
            config.embed_bits,
            multiplier=multiplier_of(table),
            padding_idx=table.padding_idx,
            dense_type=type(table),
            dtype=dtype,
            device="meta",
        ),
    )
    if head:
        new_head = CompressedHead(
            head[1].out_features,
            head[1].in_features,
            config.embed_bits,
            tied=tied,
            bias=head[1].bias is not None,
            dtype=dtype,
            device="meta",
        )
        model.set_submodule(head[0], new_head)


def swap_out(model: Any, dtype: torch.dtype) -> Any:
    """Replace every compressed layer by the dense one it stands for."""
    unfuse(model)
    table, head, tied = embeddings(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (CompressedLinear, CompressedHead, CompressedEmbedding)):
            model.set_submodule(name, module.dense(dtype))
    if head and tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def check_files(model: Any, config: SkimlmConfig, files: Sequence[Path]) -> None:
    """Check the stored tensors of every linear and table before transformers reads them.

    Only the packed codes stay unread: any bytes of the right length are valid codes.
    """
    if not files or files[0].suffix != ".safetensors":
        raise FormatError("a compressed model is safetensors", file=files[0] if files else CONFIG)
    where = {name: (file, entry) for file in files for name, entry in read_header(file).items()}
    handles = {file: safe_open(file, framework="pt") for file in files}

    def stored(prefix: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found = {name: where[prefix + name] for name in names if prefix + name in where}
        return {
            name: handles[file].get_tensor(prefix + name) if name != "weight" else _meta(entry)
            for name, (file, entry) in found.items()
        }

    try:
        for name in config.linears:
            layer = model.get_submodule(_own_name(model, name))
            name = next((n for n in aliases(model, name) if f"{n}.widths" in where), name)
            tensors = stored(f"{name}.", CompressedLinear.stored)
            check_stored(Layer(layer.spec, tensors), name=name)
        for layer_name, module in model.named_modules():
            if isinstance(module, (CompressedEmbedding, CompressedHead)) and module.owns_scale:
                names = aliases(model, layer_name)
                name = next((n for n in names if f"{n}.scale" in where), layer_name)
                _check_table(name, module, stored(f"{name}.", ("weight", "scale")))
    except FormatError as error:
        raise error.at(where[error.tensor][0] if error.tensor in where else files[0]) from None


def _check_table(
    name: str, layer: CompressedEmbedding | CompressedHead, tensors: dict[str, torch.Tensor]
) -> None:
    for part in ("weight", "scale"):
        want, tensor = getattr(layer, part), f"{name}.{part}"
        if part not in tensors:
            raise FormatError("is missing", tensor=tensor)
        got = tensors[part]
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            raise FormatError(
                f"must be {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}",
                tensor=tensor,
            )
    if not tensors["scale"].isfinite().all():
        raise FormatError("holds NaN or Inf", tensor=f"{name}.scale")


def _meta(entry: Mapping[str, Any]) -> torch.Tensor:
    """A header entry as a tensor without data."""
    dtype = {name: dtype for dtype, name in DTYPES.items()}.get(entry["dtype"], torch.complex64)
    return torch.empty(entry["shape"], dtype=dtype, device="meta")


def aliases(model: Any, name: str) -> tuple[str, str]:
    """A name with and without the prefix under which a causal model holds its decoder."""
    prefix = model.base_model_prefix + "."
    return name, name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _own_name(model: Any, name: str) -> str:
    """config.json's name of a linear as this model calls it."""
    for own in aliases(model, name):
        try:
            model.get_submodule(own)
            return own
        except AttributeError:
            continue
    raise FormatError("is not a linear of this model", file=CONFIG, tensor=name)
