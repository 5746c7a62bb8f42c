"""Texts as text: what is written in them is never a control token, whatever the tokenizer."""

import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from conftest import CORPUS, byte_tokenizer, sentencepiece
from skimlm.models.tokenizer import encode_text, inner_ids, text_ids

LITERAL = "Read </s> or <s> all of them.</s>"


class Characters(transformers.PythonBackend):
    """A slow tokenizer: one token per character."""

    def __init__(self, **kwargs):
        super().__init__(unk_token="<unk>", eos_token="</s>", **kwargs)

    def get_vocab(self):
        return {chr(i): i for i in range(256)} | self.added_tokens_encoder

    @property
    def vocab_size(self):
        return 256

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def one_for_all() -> transformers.PreTrainedTokenizerFast:
    """As GPT-2 has it: one special token is end, beginning and unknown."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.eos_token
    return tokenizer


KINDS = {
    "bytes": byte_tokenizer,
    "one for all": one_for_all,
    "sentencepiece bpe": lambda: sentencepiece("bpe"),
    "sentencepiece unigram": lambda: sentencepiece("unigram"),
    "slow": Characters,
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


def test_a_special_token_written_in_a_text_is_text(kind):
    assert kind.eos_token_id not in text_ids(kind, "a</s>")
    ids = text_ids(kind, LITERAL)
    assert kind.eos_token_id in kind(LITERAL, add_special_tokens=False)["input_ids"]
    assert not {kind.eos_token_id, kind.bos_token_id} & set(ids)
    assert kind.decode(ids).strip() == LITERAL


def test_a_text_without_special_tokens_is_tokenised_as_ever(kind):
    kind.add_tokens(["Run notes"])  # added, but nothing special
    for text in (*CORPUS, " two  spaces", "\n", ""):
        assert text_ids(kind, text) == kind(text, add_special_tokens=False)["input_ids"]


def test_where_the_tokenizer_can_do_it_itself_its_own_way_is_taken():
    tokenizer = sentencepiece("bpe")
    made = tokenizer(LITERAL, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert text_ids(tokenizer, LITERAL) == made
    assert "\u2581</" in tokenizer.convert_ids_to_tokens(made)  # a cut would be between the two


def test_added_tokens_that_the_tokenizer_calls_special_count_though_nothing_else_names_them():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    ids = text_ids(tokenizer, "a<|im_end|>b")
    assert ids == [tokenizer.convert_tokens_to_ids(c) for c in "a<|im_end|>b"]


def test_nothing_is_put_around_a_text():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 257), ("</s>", 258)]
    )
    assert len(text_ids(tokenizer, "abc")) == 3


@pytest.mark.parametrize("name", [name for name in KINDS if name != "slow"])
def test_offsets_are_where_the_tokens_stand(name):
    tokenizer = KINDS[name]()
    made = encode_text(tokenizer, LITERAL, return_offsets_mapping=True)
    assert list(made["input_ids"]) == text_ids(tokenizer, LITERAL)
    places = made["offset_mapping"]
    covered = {i for begin, end in places for i in range(begin, end)}
    assert all(i in covered for i, char in enumerate(LITERAL) if char != " ")
    assert places == sorted(places) and max(covered) < len(LITERAL)


def test_a_text_that_goes_on_another_gets_no_space_before_it(kind):
    for text in ("note", "\nRun", "(move) them", "10 of", " note", "</s> note", ""):
        before = text_ids(kind, "Read")
        assert kind.decode(before + inner_ids(kind, text)).strip() == ("Read" + text).strip()
