"""What a request asks of the model: messages or a text, and skills, as a prefix and ids behind it.

Skills stand at the beginning of the first of the user's messages, as in `skimlm generate`: what is
before the question is the same for all requests with the same skills, and is read once. A system
message would stand before them: with skills it opens the question in place of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from skimlm.errors import SkimError
from skimlm.generate import prompt_ids
from skimlm.models.tokenizer import check_ids, well_formed
from skimlm.skills.splice import PROBE, WRAPPER, closing, shell, template_ids

Message = Mapping[str, Any]  # role, content, and what templates know of tools


def chat_ids(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None, skilled: bool
) -> Tensor:
    """Ids of a conversation, up to where the answer begins; with skills of all behind them."""
    if not tokenizer.chat_template:
        raise SkimError("this model has no chat template: use /v1/completions")
    whole = [well(message) for message in messages]
    plain = len(whole) == 1 and whole[0]["role"] == "user" and not tools
    if skilled:
        if plain:
            return closing(tokenizer, whole[0]["content"], True)
        return _behind_skills(tokenizer, whole, tools)
    if plain:
        return prompt_ids(tokenizer, whole[0]["content"])[0][0]
    return template_ids(tokenizer, _rendered(tokenizer, whole, tools))


def text_ids(tokenizer: Any, prompt: str, skilled: bool) -> Tensor:
    """Ids of a text that is gone on with, with skills or without."""
    prompt = well_formed(prompt)
    if skilled:
        return closing(tokenizer, prompt, True, raw=True)
    return prompt_ids(tokenizer, prompt, raw=True)[0][0]


def check(model: Any, tokenizer: Any, ids: Tensor, behind: int, most: int | None) -> int:
    """How many tokens can follow; SkimError if the prompt cannot be read or leaves no room."""
    if not len(ids):
        raise SkimError("the prompt is empty: give at least one token")
    check_ids(model, ids, tokenizer)
    if most is None:
        return 2**31
    room = most - behind - len(ids)
    if room < 1:
        raise SkimError(
            f"the prompt has {behind + len(ids):,} tokens, the model reads {most:,}: give less"
        )
    return room


def well(message: Message) -> dict[str, Any]:
    """A message whose text the tokenizer takes."""
    content = message.get("content")
    return {**message, "content": well_formed(content) if isinstance(content, str) else ""}


def _behind_skills(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None
) -> Tensor:
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
    others = [m for m in messages if m["role"] != "system"]
    if not others or others[0]["role"] != "user":
        raise SkimError("with skills the first message after system ones must be the user's")
    words = f"{system}\n\n{others[0]['content']}" if system else others[0]["content"]
    begun = [{**others[0], "content": PROBE + WRAPPER[2] + words}, *others[1:]]
    before, _, rest = _rendered(tokenizer, begun, tools).partition(PROBE)
    if before != shell(tokenizer)[0]:
        raise SkimError("this model's chat template begins otherwise here: use no skills with it")
    return template_ids(tokenizer, rest)


def _rendered(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
    from jinja2 import TemplateError

    how = {"tools": list(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **how
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise SkimError(f"the chat template does not take these messages: {error}") from None
    return str(text)
