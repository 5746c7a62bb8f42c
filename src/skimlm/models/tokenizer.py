"""What a tokenizer makes of a text: around it, of what is written in it, and for which model."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from skimlm.errors import SkimError

PROBE = "a"
SPACE = "\u2581"  # how SentencePiece writes one
LONE = re.compile("[\ud800-\udfff]")
Encoded: TypeAlias = Mapping[str, Any]  # lists by name, an entry for every token


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


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, nothing added around it: special tokens written in it are text as well."""
    return list(encode_text(tokenizer, text)["input_ids"])


def inner_ids(tokenizer: Any, text: str) -> list[int]:
    """The same for a text that goes on another: without the space SentencePiece begins texts with.

    Where no text before it leaves its tokens alone, they are those of `text_ids`.
    """
    return list(_inside(tokenizer, partial(encode_text, tokenizer), text)["input_ids"])


def encode_text(tokenizer: Any, text: str, **how: Any) -> Encoded:
    """What the tokenizer gives for a text as in `text_ids`: input_ids, and what `how` asks for."""
    encode = partial(tokenizer, add_special_tokens=False, verbose=False, **how)
    split = partial(encode, split_special_tokens=True)
    for way in (encode, split):
        made: Encoded = way(text)
        if _is_text(tokenizer, text, made["input_ids"]):
            return made
    # they are words of the vocabulary (Unigram): each is cut behind its first character
    names = sorted((name for name in _special(tokenizer).values() if len(name) > 1), key=len)
    found = re.finditer("|".join(map(re.escape, reversed(names))), text)
    cuts = [0, *(match.start() + 1 for match in found), len(text)]
    parts = [split(text[: cuts[1]])]
    for begin, end in zip(cuts[1:], cuts[2:], strict=False):
        part = _inside(tokenizer, split, text[begin:end])
        parts.append({key: _moved(key, values, begin) for key, values in part.items()})
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


def _inside(tokenizer: Any, encode: Callable[[str], Encoded], text: str) -> Encoded:
    made = encode(text)
    first = tokenizer.convert_ids_to_tokens(made["input_ids"][:1])
    if not first or not first[0].startswith(SPACE) or text[0] in (" ", SPACE):
        return made
    for before in ("(", "0", "\n"):
        ids, both = encode(before)["input_ids"], encode(before + text)
        if both["input_ids"][: len(ids)] == ids:
            return {key: _moved(key, both[key][len(ids) :], -len(before)) for key in both}
    return made


def _moved(key: str, values: list[Any], by: int) -> list[Any]:
    """Places in a text that begins elsewhere."""
    return [(a + by, b + by) for a, b in values] if key == "offset_mapping" else values


def _is_text(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether no special token is among `ids`; what is unknown may be, where it is not written."""
    found = _special(tokenizer).keys() & set(ids)
    return not found or (found == {tokenizer.unk_token_id} and tokenizer.unk_token not in text)


def _special(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return dict(named) | {i: token.content for i, token in added if token.special}
