"""Compressed layers at work: operations by device, modules, decoding of one token.

How their bytes are laid out is in format/, the native code in native/.
"""

from typing import Any

from skimlm.exports import exported
from skimlm.runtime import cpu  # noqa: F401  native code enters the table of operations

HOMES = {
    "CompressedLinear": "linear",
    "matmul": "ops",
}


def __getattr__(name: str) -> Any:
    return exported(__name__, HOMES, name)
