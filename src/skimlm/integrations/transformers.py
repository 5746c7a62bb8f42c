"""The transformers plug-in: with `skimlm` imported, `from_pretrained` reads compressed folders.

config.json's `quantization_config` names the method and says how every linear is stored, which
fixes the size of every buffer. So the skeleton gets its compressed layers before a byte is loaded,
transformers loads by name as usual, and `save_pretrained` writes the same buffers back.

The files are checked before that: a tampered folder raises a FormatError naming file and tensor.

This is imported while transformers is (`skimlm/__init__.py`), so of transformers and of what needs
it only `transformers.quantizers` is sure to be there: the rest waits in swap.py for its first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from skimlm.errors import FormatError
from skimlm.format.layer import FORMAT_VERSION, METHOD, TABLES_VERSION, LayerSpec

CONFIG = "config.json"


@register_quantization_config(METHOD)
class SkimlmConfig(QuantizationConfigMixin):
    """What config.json says about a compressed model; written by `skimlm.models.write.save`."""

    tables: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # in no file that has none

    def __init__(
        self,
        format_version: int = 1,
        bits: float = 0.0,
        embed_bits: int = 16,
        linears: dict[str, dict[str, Any]] | None = None,
        provenance: dict[str, Any] | None = None,
        layout: dict[str, bool] | None = None,
        tables: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD
        if layout:  # how the family keeps matrices that are linears here (models/structure.py)
            self.layout = layout
        if tables:  # embedding and head, where they are layers
            self.tables = tables
        self.format_version, self.bits, self.embed_bits = format_version, bits, embed_bits
        self.linears, self.provenance = linears or {}, provenance or {}
        for name in ("linears", "tables"):
            if not isinstance(getattr(self, name), Mapping):
                raise FormatError(f"{name} must be a map of names", file=CONFIG)
        if format_version not in range(1, FORMAT_VERSION + 1):
            raise FormatError(
                f"format_version {format_version!r}, this skimlm reads 1 to {FORMAT_VERSION}",
                file=CONFIG,
            )
        if embed_bits not in (4, 8, 16):
            raise FormatError(f"embed_bits must be 4, 8 or 16, got {embed_bits!r}", file=CONFIG)
        if self.tables and format_version < TABLES_VERSION:
            raise FormatError(f"format_version {format_version} has no tables", file=CONFIG)

    def rows(self, name: str, usual: int) -> int:
        """Rows of a linear that is stored; `usual` where its entry does not say it."""
        try:
            return sum(self.linears[name]["widths"].values())
        except (TypeError, KeyError, AttributeError):
            return usual  # what is wrong with it `spec` says

    def spec(self, name: str, rows: int, cols: int) -> LayerSpec:
        """How a linear or a table of this shape is stored."""
        table = name in self.tables
        try:
            spec = LayerSpec.read((self.tables if table else self.linears)[name], rows, cols)
            if table and spec.rank:
                raise FormatError("embedding and head have no adapter")
            if newer := spec.beyond(self.format_version):
                raise FormatError(f"format_version {self.format_version} has no {', '.join(newer)}")
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
        from skimlm.integrations.swap import check_files, swap_in

        swap_in(model, self.quantization_config, dtype or torch.get_default_dtype())
        with torch._C.DisableTorchFunction():  # the mode for the meta device costs 0.1 s here
            check_files(model, self.quantization_config, [Path(f) for f in checkpoint_files or ()])

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> list[Any]:
        """What is stored has the model's own names: nothing is renamed, stacked or split."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from skimlm.integrations.swap import complete

        complete(model)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        from skimlm.integrations.swap import swap_out

        # config.dtype, which comes here, is a string after a `save_pretrained`
        given = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return swap_out(model, given or model.dtype, self.quantization_config)

    def is_serializable(self) -> bool:
        """A loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes have no gradient."""
        return False
