"""Generation against a plain greedy loop, and what is streamed and counted."""

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from skimlm.errors import SkimError
from skimlm.generate import _stream, generate

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}>{% endif %}"


def oracle_greedy(model, ids: list[int], count: int) -> list[int]:
    """The likeliest token again and again, the whole text read each time; stops at </s>."""
    new: list[int] = []
    while len(new) < count and (not new or new[-1] != 258):
        with torch.no_grad():
            logits = model(torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
    return new


def words(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_text_is_streamed_and_counted(tokenizer):
    model, pieces = tiny_model(), []
    result = generate(model, tokenizer, "Hello, you", 20, write=pieces.append)
    expected = oracle_greedy(model, tokenizer("Hello, you").input_ids, 20)
    assert result.text == words(tokenizer, expected)
    assert "".join(pieces) == result.text
    assert (result.prompt_tokens, result.tokens) == (10, len(expected))
    assert not result.chat_template
    assert result.seconds_to_first_token > 0 and result.tokens_per_second > 0


def test_the_models_own_sampling_defaults_are_not_used(tokenizer):
    model = tiny_model()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    expected = words(tokenizer, oracle_greedy(model, tokenizer("abc").input_ids, 12))
    assert generate(model, tokenizer, "abc", 12).text == expected


def test_a_chat_template_is_used_unless_raw():
    model, tokenizer = tiny_model(), byte_tokenizer()
    tokenizer.chat_template = CHAT
    chat = generate(model, tokenizer, "hi", 8)
    assert chat.chat_template and chat.prompt_tokens == len("<user>hi>")
    assert chat.text == words(tokenizer, oracle_greedy(model, tokenizer("<user>hi>").input_ids, 8))
    raw = generate(model, tokenizer, "hi", 8, raw=True)
    assert not raw.chat_template and raw.prompt_tokens == 2
    assert raw.text == words(tokenizer, oracle_greedy(model, tokenizer("hi").input_ids, 8))


def test_sampling_follows_its_seed(tokenizer):
    model = tiny_model()

    def sample(seed):
        return generate(model, tokenizer, "abc", 16, temperature=1.5, seed=seed).text

    assert sample(1) == sample(1) != sample(2)


def test_pieces_are_whole_and_spaces_survive(tokenizer):
    text, pieces = " two  words\n\n é and more ", []
    stream = _stream(tokenizer, pieces.append)
    stream.put(tokenizer("the prompt", return_tensors="pt").input_ids)
    for token in tokenizer(text).input_ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == text and len(pieces) > 3


def test_one_token_has_no_rate(tokenizer):
    result = generate(tiny_model(), tokenizer, "abc", 1)
    assert result.tokens == 1 and result.tokens_per_second is None
    assert "1 generated; first after" in result.summary()
    assert "tokens/s" not in result.summary()


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(SkimError, match="prompt is empty"):
        generate(tiny_model(), tokenizer, "", 4)


def test_penalties_of_the_models_own_config_are_not_used_and_ours_is(tokenizer):
    model = tiny_model()
    plain = generate(model, tokenizer, "Hello, you", 20).text
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.no_repeat_ngram_size = 1
    before = model.generation_config.to_dict()
    assert generate(model, tokenizer, "Hello, you", 20).text == plain
    assert generate(model, tokenizer, "Hello, you", 20, repetition_penalty=3.0).text != plain
    assert model.generation_config.to_dict() == before
