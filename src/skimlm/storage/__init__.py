"""Files: safetensors, folders that are whole or absent, the journal of an unfinished run.

What the bytes of a layer mean is in format/.
"""

from typing import Any

from skimlm.exports import exported

HOMES = {
    "check_out": "folder",
    "folder_bytes": "folder",
    "read_json": "safetensors",
}


def __getattr__(name: str) -> Any:
    return exported(__name__, HOMES, name)
