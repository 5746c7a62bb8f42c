"""A model in, a folder out: the config, the plan, the one walk over the blocks, its steps.

`skimlm.compress` starts it. The mathematics is in quantize/, training in train/.
"""

from typing import Any

from skimlm.exports import exported

HOMES = {
    "specs_of": "budget",
    "CompressConfig": "config",
    "DEFAULTS": "config",
    "EXCLUSIVE": "config",
    "OPTIONS": "config",
    "RECIPES": "config",
    "SLIM_RECIPES": "config",
    "default_text": "config",
    "one_of": "config",
    "parse_bytes": "config",
    "packed_linear": "recipes",
    "settled": "recipes",
    "widths_of": "recipes",
    "StateStore": "states",
    "fit_to_inputs": "steps",
    "train_packed": "steps",
    "read_documents": "text",
    "windows": "text",
    "Walk": "walk",
    "analyse": "walk",
    "each": "walk",
    "packed": "walk",
}


def __getattr__(name: str) -> Any:
    return exported(__name__, HOMES, name)
