"""Checkpoints that are published in codes of another kind, with no original beside them.

transformers de-quantizes these as it loads them: gpt-oss in MXFP4, others in FP8. So a
model in memory and one that is streamed get the same numbers, by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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

    kind = given.get("quant_method")
    if kind not in KINDS:
        raise FormatError(f"already quantized with {kind!r}, give the original checkpoint")
    undone = {**given, "dequantize": True}
    if not hasattr(quantizer_of(undone), "get_new_dtype"):
        raise FormatError(
            f"quantized with {kind!r}: transformers {__version__} is too old to undo it tensor by "
            "tensor, update it"
        )
    del config.quantization_config
    return undone


def check_blocks(undone: Mapping[str, Any], entries: Mapping[str, tuple[Path, Any]]) -> None:
    """Refuse scales whose blocks do not divide their matrix.

    transformers takes size / number of scales for a block, whatever the config says: such a matrix
    (576 rows in blocks of 128, DeepSeek V3) it cannot undo, or undoes wrong.
    """
    block = undone.get("weight_block_size")
    if not block:
        return
    for name, (file, entry) in entries.items():
        weight = name.removesuffix("_scale_inv")
        if weight == name or weight not in entries:
            continue
        shape, scales = entries[weight][1]["shape"], entry["shape"]
        for size, count, length in zip(shape[-2:], scales[-2:], block, strict=False):
            if count > 1 and size != count * length:
                raise FormatError(
                    f"{size} in {count} blocks of {length}, which do not divide it: transformers "
                    "does not undo that; give a checkpoint in bfloat16",
                    file=file,
                    tensor=weight,
                )


def quantizer_of(undone: Mapping[str, Any] | None) -> Any:
    """transformers' own reader of such tensors, None for a model that is not quantized."""
    if undone is None:
        return None
    from transformers.quantizers import AutoHfQuantizer

    return AutoHfQuantizer.from_config(dict(undone), pre_quantized=True)
