"""Pieces of text against the whole text decoded at once; calls of tools in it."""

import asyncio
import json
import random

import pytest

from conftest import byte_tokenizer
from skimlm.serve.text import Pieces
from skimlm.serve.tools import Split, split

TEXT = "Grüße, 東京 — naïve 🙂 ends\n\nhere. STOP not this"


class Slow:
    """A tokenizer without the fast library behind it."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


@pytest.fixture(params=["fast", "slow"])
def tokenizer(request):
    made = byte_tokenizer()
    return made if request.param == "fast" else Slow(made)


def ids_of(text):
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def run(pieces, ids):
    got = []
    for token in ids:
        got.append(pieces.add(token))
        if pieces.stopped:
            return got
    return [*got, pieces.end()]


def test_joined_they_are_the_text_and_each_is_whole(tokenizer):
    got = run(Pieces(tokenizer), ids_of(TEXT))
    assert "".join(got) == TEXT and len([piece for piece in got if piece]) > 30
    assert not any("\ufffd" in piece for piece in got)


@pytest.mark.parametrize("stops", [["STOP"], ["\n\n", "STOP"], ["zzz", "東京"], ["G"], ["", "no"]])
def test_nothing_of_a_stop_string_is_given(tokenizer, stops):
    found = [TEXT.find(stop) for stop in stops if stop and stop in TEXT]
    want = TEXT[: min(found)] if found else TEXT
    pieces = Pieces(tokenizer, stops)
    assert "".join(run(pieces, ids_of(TEXT))) == want and pieces.stopped == bool(found)


def test_what_could_have_become_a_stop_string_comes_later(tokenizer):
    pieces = Pieces(tokenizer, ["abcd"])
    got = run(pieces, ids_of("xabcabcx"))
    assert got == ["x", "", "", "", "abc", "", "", "abcx", ""] and not pieces.stopped
    assert run(Pieces(tokenizer, ["abcd"]), ids_of("xabc"))[-1] == "abc"


def test_against_brute_force(tokenizer):
    chance = random.Random(0)
    for _ in range(200):
        text = "".join(chance.choice("ab東 ") for _ in range(chance.randrange(30)))
        stops = ["".join(chance.choice("ab東 ") for _ in range(chance.randrange(1, 4)))
                 for _ in range(chance.randrange(3))]  # fmt: skip
        found = [text.find(stop) for stop in stops if stop in text]
        # the earliest end of a stop string decides, then the earliest begin
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        first = [at for at, end in zip(found, ends, strict=True) if end == min(ends)]
        got = "".join(run(Pieces(tokenizer, stops), ids_of(text)))
        assert got == (text[: min(first)] if first else text), (text, stops)


def test_bytes_that_are_no_character_are_said_to_be_none(tokenizer):
    ids = ids_of("aé")[:-1]
    assert "".join(run(Pieces(tokenizer), ids)) == "a\ufffd"


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def split_pieces(text, size):
    """The same for text that comes in pieces."""

    async def pieces():
        for i in range(0, len(text), size):
            yield text[i : i + size]

    async def all_of():
        apart = Split(pieces())
        return "".join([piece async for piece in apart]), apart.calls

    return asyncio.run(all_of())


@pytest.mark.parametrize(
    ("text", "said", "count"),
    [
        ("No call <tool", "No call <tool", 0),
        (CALL, "", 1),
        (f"Let me see.\n{CALL}\n{CALL}", "Let me see.", 2),
        (CALL.removesuffix("</tool_call>"), "", 1),
        ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", 0),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', 0),
        ('<tool_call>{"name": "x"', '<tool_call>{"name": "x"', 0),
    ],
)
def test_calls_are_taken_out_of_an_answer(text, said, count):
    got, calls = split(text)
    assert (got, len(calls)) == (said, count)
    for call in calls:
        assert call["type"] == "function" and call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
    assert len({call["id"] for call in calls}) == count
    for size in (1, 3, 7, 1000):
        piecewise, calls = split_pieces(text, size)
        assert (piecewise.rstrip(), len(calls)) == (said, count)
