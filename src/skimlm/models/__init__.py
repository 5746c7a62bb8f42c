"""What a model is: found, opened and checked, its blocks one after the other, written again.

Compressed layers at work are in runtime/, what is done with a model in pipeline/.
"""

from typing import Any

from skimlm.exports import exported

HOMES = {
    "decoder_linears": "blocks",
    "Checkpoint": "checkpoint",
    "load": "checkpoint",
    "load_tokenizer": "checkpoint",
    "open_checkpoint": "checkpoint",
    "forwards_replaced": "hooks",
    "BlockSource": "source",
    "save": "write",
}


def __getattr__(name: str) -> Any:
    return exported(__name__, HOMES, name)
