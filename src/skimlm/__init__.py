"""Compress a language model to any bit width or file size; transformers then loads the result.

    skimlm.compress("my-model", "small", bits=3.2)
    skimlm.load("small").generate("Why is the sky blue?").text

Importing skimlm loads neither torch nor transformers, but once transformers is loaded, before or
after, it reads compressed folders: `AutoModelForCausalLM.from_pretrained("small")`.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from typing import TYPE_CHECKING, Any

import wrapt

from skimlm.errors import FormatError, SkimError

if TYPE_CHECKING:
    from skimlm.api import (
        CompressConfig,
        Generation,
        Model,
        Perplexity,
        Skill,
        compress,
        export,
        finetune,
        inspect,
        load,
    )
    from skimlm.pipeline.compress import Report
    from skimlm.pipeline.export import Report as ExportReport
    from skimlm.pipeline.finetune import Report as FinetuneReport

__version__ = "0.1.0"
__all__ = [
    "CompressConfig",
    "ExportReport",
    "FinetuneReport",
    "FormatError",
    "Generation",
    "Model",
    "Perplexity",
    "Report",
    "SkimError",
    "Skill",
    "__version__",
    "compress",
    "export",
    "finetune",
    "inspect",
    "load",
]
# what does not stand in api.py, which loads a model without the code that makes one
ELSEWHERE = {
    "Report": "skimlm.pipeline.compress:Report",
    "ExportReport": "skimlm.pipeline.export:Report",
    "FinetuneReport": "skimlm.pipeline.finetune:Report",
}


def __getattr__(name: str) -> Any:
    """Names of the API, loaded when they are first used: torch takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module 'skimlm' has no attribute {name!r}")
    value = pkgutil.resolve_name(ELSEWHERE.get(name, f"skimlm.api:{name}"))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("transformers.quantizers")
def _register(module: Any) -> None:
    """Enter quant_method "skimlm"; transformers stays usable where that fails."""
    try:
        importlib.import_module("skimlm.integrations.transformers")
    except Exception as error:  # whatever it is, the import of transformers is not ours to break
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(
            f"transformers cannot read folders that skimlm compressed: {reason}", stacklevel=2
        )
