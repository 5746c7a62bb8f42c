"""Checkpoints that are published in codes of another kind, with no original beside them.

transformers de-quantizes these as it loads them: gpt-oss in MXFP4, DeepSeek and others in FP8. So a
model in memory and one that is streamed get the same numbers, by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimlm.errors import FormatError

KINDS = ("mxfp4", "fp8")


def dequantizing(config: Any) -> dict[str, Any] | None:
    """Take the quantization out of a config: what transformers is given to undo it.

    None for a model that is not quantized. Raises FormatError for a kind with a better original,
    and for one that this transformers cannot undo.
    """
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    from transformers import __version__
    from transformers.quantizers import AutoHfQuantizer

    kind = given.get("quant_method")
    if kind not in KINDS:
        raise FormatError(f"already quantized with {kind!r}, give the original checkpoint")
    undone = {**given, "dequantize": True}
    if not hasattr(AutoHfQuantizer.from_config(dict(undone), pre_quantized=True), "get_new_dtype"):
        raise FormatError(
            f"quantized with {kind!r}: transformers {__version__} is too old to undo it tensor by "
            "tensor, update it"
        )
    del config.quantization_config
    return undone


def quantizer_of(undone: Mapping[str, Any] | None) -> Any:
    """transformers' own reader of such tensors, None for a model that is not quantized."""
    if undone is None:
        return None
    from transformers.quantizers import AutoHfQuantizer

    return AutoHfQuantizer.from_config(dict(undone), pre_quantized=True)
