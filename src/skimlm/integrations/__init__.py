"""Plug-ins for other libraries: transformers reads compressed folders, lm-eval scores tasks.

Each is imported only where its library is.
"""

from typing import Any

from skimlm.exports import exported

HOMES = {
    "accuracy": "lm_eval",
    "read_task": "lm_eval",
}


def __getattr__(name: str) -> Any:
    return exported(__name__, HOMES, name)
