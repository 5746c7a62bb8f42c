"""A prompt with skills in it, as pieces: token ids where there is text, vectors elsewhere.

    [chat prefix + "Relevant Skill:\n"] [skill] ["\n---\n"] [skill] ["\n\n" + question + suffix]

A skill is one piece of ids (its full text), or rows of soft tokens with pinned text between them.
Each piece of text is tokenised by itself: so a skill's tokens do not depend on what stands beside
it, and soft tokens are trained behind exactly the tokens they are served behind. Soft tokens take
ordinary positions. A prompt that does not fit is refused: nothing is cut off, least of all the
question, which stands at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.models.architecture import positions
from skimlm.models.tokenizer import check_ids, prefix_ids, text_ids

WRAPPER = ("Relevant Skill:\n", "\n---\n", "\n\n")  # before, between and after skills
PROBE = "skimlm-probe-0f9b"

Piece = Tensor  # ids [t], int64, or soft tokens [k, d], floating point


@dataclass(frozen=True)
class Pin:
    """Text that stays text: it stands after `at` soft tokens, or after the last of fewer."""

    at: int
    text: str


def shell(tokenizer: Any, raw: bool = False) -> tuple[str, str]:
    """What the chat template puts before and after a user's words; ("", "") without a template."""
    if raw or not tokenizer.chat_template:
        return "", ""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}], add_generation_prompt=True, tokenize=False
    )
    before, found, after = text.partition(PROBE)
    if not found or PROBE in after:
        raise SkimError("the chat template does not repeat a user's words once: use --raw")
    return before, after


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Ids [t] of a piece of text, nothing added; special tokens written in it are text as well."""
    return torch.tensor(text_ids(tokenizer, text), dtype=torch.long)


def template_ids(tokenizer: Any, text: str) -> Tensor:
    """Ids [t] of what a chat template wrote, nothing added: its special tokens count."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def opening(tokenizer: Any, skills: Sequence[Sequence[Piece]], raw: bool = False) -> list[Piece]:
    """All pieces before the question's: it is the same for every question, so it can be cached."""
    before, _ = shell(tokenizer, raw)
    first = template_ids(tokenizer, before + (WRAPPER[0] if skills else ""))
    if not before:
        first = torch.cat([torch.tensor(prefix_ids(tokenizer), dtype=torch.long), first])
    pieces = [first]
    for i, skill in enumerate(skills):
        pieces += [token_ids(tokenizer, WRAPPER[1])] if i else []
        pieces += skill
    return [piece for piece in pieces if len(piece)]


def closing(tokenizer: Any, question: str, with_skill: bool, raw: bool = False) -> Piece:
    """The piece with the question: what an answer follows directly.

    Special tokens in a question are text; in a `raw` one, a template written by hand, they count.
    """
    _, after = shell(tokenizer, raw)
    words = (WRAPPER[2] if with_skill else "") + question
    text = token_ids(tokenizer, words)
    if raw or torch.equal(text, template_ids(tokenizer, words)):
        return template_ids(tokenizer, words + after)
    return torch.cat([text, template_ids(tokenizer, after)])


def frame(
    tokenizer: Any, skills: Sequence[Sequence[Piece]], question: str, raw: bool = False
) -> list[Piece]:
    """All pieces of a prompt."""
    return [
        *opening(tokenizer, skills, raw),
        closing(tokenizer, question, bool(skills), raw),
    ]


def pieces_of(tokenizer: Any, soft: Tensor, pins: Sequence[Pin], k: int) -> list[Piece]:
    """The pieces of a skill at resolution `k`: the first k rows of `soft`, all pins in order."""
    pieces: list[Piece] = []
    done = 0
    for pin in pins:
        at = min(pin.at, k)
        pieces += [soft[done:at], token_ids(tokenizer, pin.text)]
        done = at
    pieces.append(soft[done:k])
    return [piece for piece in pieces if len(piece)]


def embed(model: Any, pieces: Sequence[Piece]) -> Tensor:
    """Input embeddings [1, t, d] of all pieces, in the model's dtype; gradients reach soft rows."""
    table = model.get_input_embeddings()
    rows = []
    for piece in pieces:
        piece = piece.to(model.device)
        if piece.ndim == 1:
            check_ids(model, piece)
            rows.append(table(piece))
        elif piece.shape[1] == model.config.get_text_config().hidden_size:
            rows.append(piece.to(model.dtype))
        else:
            raise SkimError(
                f"soft tokens are {piece.shape[1]} wide, the model takes"
                f" {model.config.get_text_config().hidden_size}: they were made for another model"
            )
    return torch.cat(rows)[None]


def length(pieces: Sequence[Piece]) -> int:
    """Positions the pieces take."""
    return sum(len(piece) for piece in pieces)


def wrapper_tokens(tokenizer: Any) -> int:
    """Tokens that one skill costs besides itself, full text or not."""
    return sum(len(token_ids(tokenizer, text)) for text in (WRAPPER[0], WRAPPER[2]))


def check_fits(model: Any, skills: int, prompt: int, new: int) -> None:
    """Refuse a prompt that leaves no room for `new` tokens; of `prompt`, skills take `skills`."""
    most = positions(model.config)
    if most and prompt + new > most:
        raise SkimError(
            f"prompt has {prompt:,} tokens, {skills:,} of them skills, and {new:,} are to come:"
            f" the model reads {most:,}; give fewer or compressed skills, or ask for fewer tokens"
        )
