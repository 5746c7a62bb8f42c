"""Compress a language model to any bit width or file size; transformers then loads the result."""

import skimlm.integrations.transformers  # noqa: F401  registers quant_method "skimlm"

__version__ = "0.1.0"
