"""What a tokenizer does around a text, and whether its tokens are the model's."""

import re
from typing import Any

from torch import Tensor

from skimlm.errors import SkimError

PROBE = "a"
LONE = re.compile("[\ud800-\udfff]")


def prefix_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as BOS; [] if none.

    A model that was trained with them makes enormous gradients of a window that begins without.
    """
    whole = tokenizer(PROBE, verbose=False)["input_ids"]
    bare = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    ends = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in ends if whole[i : i + len(bare)] == bare), 0)]


def check_ids(model: Any, ids: Tensor, tokenizer: Any = None) -> None:
    """Refuse tokens that a model has no embedding for; `tokenizer` knows what they are called."""
    rows = model.get_input_embeddings().num_embeddings
    most = int(ids.max()) if ids.numel() else 0
    if most >= rows:
        name = "" if tokenizer is None else f" {tokenizer.convert_ids_to_tokens(most)!r}"
        raise SkimError(
            f"the text has token {most}{name}, but the model's embedding has {rows} rows: the "
            "tokenizer does not belong to this model, or its added tokens never got their rows"
        )


def well_formed(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which no tokenizer takes."""
    return LONE.sub("\ufffd", text)
