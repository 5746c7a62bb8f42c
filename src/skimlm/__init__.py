"""Compress a language model to any bit width or file size; importing this lets transformers load the result."""

import skimlm.integrations.transformers  # noqa: F401  registers quant_method "skimlm"

__version__ = "0.1.0"
