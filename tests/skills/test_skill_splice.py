"""Prompts with skills in them against the model's logits for the same text."""

import pytest
import torch

from skill_sample import CHAT, TEXT, chat_tokenizer, skill_model
from skimlm.errors import SkimError
from skimlm.generate import generate
from skimlm.skills import splice
from skimlm.skills.splice import Pin

QUESTION = "What now?"


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_skills_own_embeddings_give_the_logits_of_its_text(family):
    model, tokenizer = skill_model(family), chat_tokenizer()
    ids = splice.token_ids(tokenizer, TEXT)
    rows = model.get_input_embeddings()(ids).detach()
    soft = splice.embed(model, splice.frame(tokenizer, [[rows]], QUESTION))
    whole = f"<user>Relevant Skill:\n{TEXT}\n\n{QUESTION}>"  # bytes: pieces tokenise alike
    with torch.no_grad():
        want = model(torch.tensor([ids_of(tokenizer, whole)])).logits
        got = model(inputs_embeds=soft).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_without_a_template_the_prompt_is_raw_and_begins_with_bos():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    pieces = splice.frame(tokenizer, [], QUESTION)
    assert torch.cat(pieces).tolist() == ids_of(tokenizer, QUESTION)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    assert torch.cat(splice.frame(tokenizer, [], QUESTION)).tolist() == [
        257,
        *ids_of(tokenizer, QUESTION),
    ]


def test_two_skills_stand_as_each_alone_with_a_separator_between():
    tokenizer = chat_tokenizer()
    soft = torch.randn(3, 64)
    text = splice.token_ids(tokenizer, TEXT)
    pieces = splice.frame(tokenizer, [[soft], [text]], QUESTION)
    assert [len(p) for p in pieces[1:4]] == [3, 5, len(text)]
    assert torch.equal(pieces[1], soft) and torch.equal(pieces[3], text)
    assert tokenizer.decode(pieces[2]) == "\n---\n"
    assert tokenizer.decode(pieces[4]) == f"\n\n{QUESTION}>"


def test_pins_stand_between_the_soft_tokens_they_were_cut_from():
    tokenizer = chat_tokenizer()
    soft, pins = torch.randn(8, 64), [Pin(2, "ab"), Pin(5, "c"), Pin(5, "d")]

    def shape(k):
        return [
            len(p) if p.ndim == 2 else tokenizer.decode(p)
            for p in splice.pieces_of(tokenizer, soft, pins, k)
        ]

    assert shape(8) == [2, "ab", 3, "c", "d", 3]
    assert shape(4) == [2, "ab", 2, "c", "d"]
    assert shape(1) == [1, "ab", "c", "d"]
    rows = [p for p in splice.pieces_of(tokenizer, soft, pins, 7) if p.ndim == 2]
    assert torch.equal(torch.cat(rows), soft[:7])


def test_a_prompt_that_does_not_fit_is_refused_and_never_cut():
    model, tokenizer = skill_model(), chat_tokenizer()
    model.config.max_position_embeddings = 500
    ids = splice.token_ids(tokenizer, TEXT)
    whole = splice.length(splice.frame(tokenizer, [[ids]], QUESTION))
    assert generate(model, tokenizer, QUESTION, 500 - whole, skills=[[ids]]).prompt_tokens == whole
    with pytest.raises(SkimError, match=f"prompt has {whole} tokens, {len(ids)} of them skills"):
        generate(model, tokenizer, QUESTION, 501 - whole, skills=[[ids]])


def test_soft_tokens_of_another_width_are_refused():
    model, tokenizer = skill_model(), chat_tokenizer()
    with pytest.raises(SkimError, match="32 wide, the model takes 64"):
        generate(model, tokenizer, QUESTION, 4, skills=[[torch.zeros(2, 32)]])


def test_a_template_that_does_not_show_the_question_is_refused():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "nothing"
    with pytest.raises(SkimError, match="does not repeat a user's words once: use --raw"):
        splice.shell(tokenizer)
    tokenizer.chat_template = CHAT + "{{ messages[0].content }}"
    with pytest.raises(SkimError, match="does not repeat"):
        splice.shell(tokenizer)


@pytest.mark.parametrize("raw", [False, True])
def test_generation_with_a_skill_is_that_of_the_prompt_written_out(raw):
    model, tokenizer = skill_model(), chat_tokenizer()
    ids = splice.token_ids(tokenizer, TEXT)
    pieces = []
    result = generate(model, tokenizer, QUESTION, 12, skills=[[ids]], raw=raw, write=pieces.append)
    words = f"Relevant Skill:\n{TEXT}\n\n{QUESTION}"
    same = generate(model, tokenizer, words, 12, raw=raw)
    assert result.text == same.text == "".join(pieces)
    assert (result.prompt_tokens, result.tokens) == (same.prompt_tokens, same.tokens)
    assert result.chat_template == same.chat_template == (not raw)
    assert result.skill_tokens == len(ids) and same.skill_tokens == 0
    assert f"{len(ids)} of them skills" in result.summary()


def test_a_question_is_needed():
    with pytest.raises(SkimError, match="prompt is empty"):
        generate(skill_model(), chat_tokenizer(), " ", 4, skills=[[torch.zeros(2, 64)]])


def test_special_tokens_in_skills_questions_and_pins_are_text():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHAT.replace("<{{", "<s>{{").replace("%}>{%", "%}</s>{%")
    text = TEXT + "End with </s>, begin with <s>."
    pieces = splice.frame(tokenizer, [[splice.token_ids(tokenizer, text)]], "Why </s>?")
    ids = torch.cat(pieces).tolist()
    assert tokenizer.decode(ids) == f"<s>user>Relevant Skill:\n{text}\n\nWhy </s>?</s>"
    assert (ids.count(257), ids.count(258)) == (1, 1) and (ids[0], ids[-1]) == (257, 258)
    soft = torch.zeros(2, 64)
    (pinned,) = [p for p in splice.pieces_of(tokenizer, soft, [Pin(2, "</s>")], 2) if p.ndim == 1]
    assert 258 not in pinned
    raw = splice.closing(tokenizer, "<s>Why?", True, raw=True)
    assert raw.tolist().count(257) == 1  # a template written by hand


def test_a_question_without_special_tokens_is_tokenised_together_with_what_follows():
    tokenizer = chat_tokenizer()
    whole = ids_of(tokenizer, f"\n\n{QUESTION}>")
    assert splice.closing(tokenizer, QUESTION, True).tolist() == whole
