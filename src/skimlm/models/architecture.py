"""Which models are causal language models, and one of them without its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from skimlm.errors import FormatError, SkimError, one_line

CAUSAL = ("forcausallm", "lmheadmodel")  # how such classes are named, lower case
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # of a text config


def check_causal(file: Path, config: Any) -> None:
    """Refuse a model that is not trained to continue a text, or whose head would be lost.

    `architectures` of a config is the class the tensors were saved from. Where that has another
    head (a score, a span, classes) or none, loading it as a causal model drops or invents one.
    """
    from transformers.models.auto import modeling_auto as auto

    kind, auto_kind = config.model_type, auto_class(config)
    if auto_kind is None:
        raise FormatError(
            f"unknown architecture: {kind!r} is not a causal language model", file=file
        )
    built = auto_kind._model_mapping[type(config)].__name__
    for name in config.architectures or ():
        if str(name).lower() != built.lower() and not str(name).lower().endswith(CAUSAL):
            raise FormatError(
                f"{name} is not a causal language model: it would be read as {built}, without "
                "its own head; give a checkpoint of that class",
                file=file,
            )
    if getattr(config, "is_encoder_decoder", False):
        raise FormatError(
            f"{kind!r} is an encoder with a decoder; only models of a decoder can be compressed",
            file=file,
        )
    encodes = type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING
    if encodes and not getattr(config, "is_decoder", True):
        raise FormatError(
            f"{kind!r} is an encoder: every token sees those after it (is_decoder is false); "
            "only decoders can be compressed",
            file=file,
        )


def auto_class(config: Any) -> Any:
    """The auto class that builds a model which continues a text; None if transformers has none.

    The one that has the class the checkpoint was saved from, else the first that knows the config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    known = {
        kind: kind._model_mapping[type(config)]
        for kind in kinds
        if type(config) in kind._model_mapping
    }
    saved = set(config.architectures or ())
    same = (kind for kind, built in known.items() if built.__name__ in saved)
    return next(same, next(iter(known), None))


def skeleton(file: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model without its numbers, on the meta device; an error names `file`."""
    from accelerate import init_empty_weights

    with one_line(file, "the model cannot be built"):
        with init_empty_weights(include_buffers=False):  # buffers are made, not stored
            return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)


def positions(config: Any) -> int | None:
    """Tokens that a model reads at once, None if its config sets no limit."""
    text = config.get_text_config()
    return next((limit for name in POSITIONS if (limit := getattr(text, name, None))), None)


def check_positions(config: Any, seq_len: int, least: int = 2) -> None:
    """Refuse windows that are longer than the model reads; SkimError names the limit."""
    most = positions(config)
    if seq_len < least or (most and seq_len > most):
        raise SkimError(f"seq-len must be {least} to {most or 'any number'}, got {seq_len}")
