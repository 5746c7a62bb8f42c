"""Text from a model, streamed: a prompt in, pieces of text out as soon as they are whole.

The prompt goes through the tokenizer's chat template if there is one (`raw=True`: as it is).
Decoding is greedy unless `temperature` is above 0; the model's own sampling defaults are not used,
so the same prompt gives the same text. Two speeds are measured, because different things bind them:
the time to the first token (reads the prompt: arithmetic) and the tokens per second after it (one
token at a time: reading the weights).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from skimlm.errors import SkimError
from skimlm.models.tokenizer import check_ids, well_formed
from skimlm.runtime.decode import CACHE
from skimlm.runtime.prefix import attending

if TYPE_CHECKING:
    from skimlm.skills.front import Standing


@dataclass(frozen=True)
class Generation:
    """A generated text and what it took."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None  # after the first token; None if there was no second
    chat_template: bool
    skill_tokens: int = 0  # of the prompt's: skills, full text or compressed

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, JSON-ready."""
        return asdict(self)

    def summary(self) -> str:
        """Say in one line what the text took."""
        speed = self.tokens_per_second
        rate = "" if speed is None else f", then {speed:.1f} tokens/s"
        return (
            f"{self.prompt_tokens} prompt tokens{' (chat template)' if self.chat_template else ''}"
            f"{f', {self.skill_tokens} of them skills' if self.skill_tokens else ''},"
            f" {self.tokens} generated; first after {self.seconds_to_first_token:.2f} s{rate}"
        )


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    raw: bool = False,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    skills: Sequence[Standing] = (),
    write: Callable[[str], None] | None = None,
) -> Generation:
    """Continue or answer `prompt`; `write` receives each piece of text when it is complete.

    `skills` stand before the prompt (skills/front.py has what they may be). What is given here is
    what is used: penalties, beams and sampling of the model's generation config are not.
    """
    from skimlm.skills.front import taken

    prompt = well_formed(prompt)  # bytes of a command line that are no UTF-8 come as such halves
    start = time.perf_counter()
    if skills:
        prompted, length, chat = _framed(model, tokenizer, skills, prompt, max_new_tokens, raw)
    else:
        ids, chat = prompt_ids(tokenizer, prompt, raw)
        if not ids.shape[1]:
            raise SkimError("prompt is empty: give at least one token")
        check_ids(model, ids, tokenizer)
        prompted, length = {"inputs": ids.to(model.device)}, ids.shape[1]
    stream = _stream(tokenizer, write or (lambda piece: None))
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        torch.manual_seed(seed)
    how |= {"repetition_penalty": repetition_penalty, "no_repeat_ngram_size": 0, "num_beams": 1}
    with torch.inference_mode(), attending(model) if CACHE in prompted else nullcontext():
        out = model.generate(
            **prompted,
            attention_mask=torch.ones(1, length, dtype=torch.long, device=model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad(tokenizer),
            streamer=stream,
            **how,
        )
    # behind embeddings only what is new comes back
    new = out[0, length if "inputs" in prompted else 0 :]
    rest = stream.last - stream.first
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=length,
        tokens=len(new),
        seconds_to_first_token=stream.first - start,
        tokens_per_second=(len(new) - 1) / rest if len(new) > 1 else None,
        chat_template=chat,
        skill_tokens=sum(map(taken, skills)),
    )


def _framed(
    model: Any, tokenizer: Any, skills: Sequence[Standing], prompt: str, new: int, raw: bool
) -> tuple[dict[str, Any], int, bool]:
    """A prompt with skills in it: what `generate` takes, its length, whether by template."""
    from skimlm.skills.kv import Pack

    if not prompt.strip():
        raise SkimError("prompt is empty: give at least one token")
    packed = any(isinstance(skill, Pack) for skill in skills)
    framed = _behind_packs if packed else _with_skills
    return framed(model, tokenizer, skills, prompt, new, raw)


def _with_skills(
    model: Any,
    tokenizer: Any,
    skills: Sequence[Any],
    prompt: str,
    new: int,
    raw: bool,
) -> tuple[dict[str, Any], int, bool]:
    """The same where all is text or soft tokens: embeddings."""
    from skimlm.skills import front, splice

    pieces = splice.frame(tokenizer, skills, prompt, raw)
    splice.check_fits(model, sum(map(front.taken, skills)), splice.length(pieces), new)
    with torch.inference_mode():
        embedded = splice.embed(model, pieces)
    return {"inputs_embeds": embedded}, embedded.shape[1], bool(splice.shell(tokenizer, raw)[0])


def _behind_packs(
    model: Any,
    tokenizer: Any,
    skills: Sequence[Standing],
    prompt: str,
    new: int,
    raw: bool,
) -> tuple[dict[str, Any], int, bool]:
    """The same where a skill is keys and values: a cache that holds all but the question."""
    from skimlm.skills import front, rollout, splice

    with torch.inference_mode():
        prefix = front.before(model, tokenizer, skills, raw)
    question = splice.closing(tokenizer, prompt, True, raw)
    check_ids(model, question[None], tokenizer)
    length = prefix.length + len(question)
    splice.check_fits(model, prefix.length, length, new)
    # what stands for positions that are in the cache already is never looked at
    ids = torch.cat([question[:1].expand(prefix.length), question])[None].to(model.device)
    prompted = {"inputs": ids, CACHE: rollout.lent(model, prefix, 1)}
    return prompted, length, bool(splice.shell(tokenizer, raw)[0])


def prompt_ids(tokenizer: Any, prompt: str, raw: bool = False) -> tuple[torch.Tensor, bool]:
    """Return the prompt's token ids `[1, t]` and whether a chat template was used."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt").input_ids.long(), False
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return ids["input_ids"], True


def _pad(tokenizer: Any) -> int | None:
    """Return a padding id; transformers warns where there is none, though nothing is padded."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _stream(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """Build a transformers streamer that calls `write` and notes when tokens came."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        first = last = 0.0

        def put(self, value: torch.Tensor) -> None:
            prompt = self.next_tokens_are_prompt
            super().put(value)
            if not prompt:
                self.last = time.perf_counter()
                self.first = self.first or self.last

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
