"""What a tokenizer does around a text: the tokens that every text begins with."""

from typing import Any

PROBE = "a"


def prefix_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as BOS; [] if none.

    A model that was trained with them makes enormous gradients of a window that begins without.
    """
    whole = tokenizer(PROBE, verbose=False)["input_ids"]
    bare = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    ends = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in ends if whole[i : i + len(bare)] == bare), 0)]
