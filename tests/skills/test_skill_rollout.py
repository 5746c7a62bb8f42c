"""Answers behind a shared prefix against the whole text read again for every row and token."""

import copy
import warnings

import pytest
import torch
import transformers

from conftest import CONFIGS, quantized_linears, tiny_model
from skimlm.errors import SkimError
from skimlm.models.checkpoint import load
from skimlm.models.write import save
from skimlm.runtime import prefix as attention
from skimlm.skills import rollout

TEXT = torch.arange(40, 90)
QUESTIONS = [torch.arange(60, 70), torch.arange(100, 103), torch.arange(33, 39)]
ANSWERS = [torch.arange(70, 77), torch.arange(90, 91), torch.arange(50, 55)]
WAYS = ("llama", "qwen3", "phi3", "opt", "gemma3", "falcon")  # the last two: transformers' own way


def oracle_states(model, text, question, answer):
    """Final states that predict the answer, everything read in one piece."""
    ids = torch.cat([text, question, answer[:-1]])[None]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
    return hidden[len(text) + len(question) - 1 :]


def oracle_greedy(model, text, question, count):
    new = torch.zeros(0, dtype=torch.long)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.cat([text, question, new])[None]).logits[0, -1]
        new = torch.cat([new, logits.argmax()[None]])
    return new


@pytest.mark.parametrize("family", WAYS)
def test_rows_behind_a_prefix_are_what_the_whole_text_gives(family):
    model = tiny_model(family)
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
    assert attention.fits(model) == (family in attention.FAMILIES)
    got = rollout.score_all(model, prefix, QUESTIONS, ANSWERS, batch=2)
    for states, question, answer in zip(got, QUESTIONS, ANSWERS, strict=True):
        want = oracle_states(model, TEXT, question, answer)
        torch.testing.assert_close(states, want, atol=2e-5, rtol=1e-4)


def model_of(family):
    """A small random one of any family."""
    if family in CONFIGS:
        return tiny_model(family)
    sizes = dict(hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(vocab_size=259, num_key_value_heads=2, head_dim=16, max_position_embeddings=512)
    config = transformers.AutoConfig.for_model(family, **sizes, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", attention.FAMILIES)
def test_every_family_attends_to_a_prefix_as_to_the_whole_text(family):
    model = model_of(family)
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
    if not attention.fits(model):
        pytest.skip(f"transformers {transformers.__version__} attends in another way")
    got = rollout.score_all(model, prefix, QUESTIONS, ANSWERS, batch=2)
    for states, question, answer in zip(got, QUESTIONS, ANSWERS, strict=True):
        want = oracle_states(model, TEXT, question, answer)
        torch.testing.assert_close(states, want, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("family", WAYS)
def test_greedy_answers_are_those_of_the_whole_text(family):
    model = tiny_model(family)
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
    got = rollout.sample(model, prefix, QUESTIONS, 6, temperature=0)
    for answer, question in zip(got, QUESTIONS, strict=True):
        assert answer.tolist() == oracle_greedy(model, TEXT, question, 6).tolist()


def windowed(model):
    model.config.sliding_window = 8


def another_attention(model):
    def mine(module, query, key, value, mask, scaling, **kwargs):
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("mine", mine)
    model.config._attn_implementation = "mine"


def patched_module(model):
    attention = model.model.layers[1].self_attn
    before = attention.forward
    attention.forward = lambda *args, **kwargs: before(*args, **kwargs)


def patched_class(model):
    class LlamaAttention(type(model.model.layers[1].self_attn)):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    model.model.layers[1].self_attn.__class__ = LlamaAttention


def patched_call(model):
    class LlamaAttention(type(model.model.layers[1].self_attn)):
        def __call__(self, *args, **kwargs):
            out, weights = super().__call__(*args, **kwargs)
            return 2 * out, weights

    model.model.layers[1].self_attn.__class__ = LlamaAttention


def dropping_out(model):
    model.config.attention_dropout = 0.5
    model.train()


CHANGES = (windowed, another_attention, patched_module, patched_class, patched_call, dropping_out)


@pytest.mark.parametrize("change", CHANGES)
def test_attention_that_is_not_as_planned_takes_transformers_own_way(change):
    model = tiny_model()
    change(model)
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
    assert not attention.fits(model) and not rollout.shares(model, prefix)
    model.eval()
    got = rollout.score_all(model, prefix, QUESTIONS, ANSWERS)
    for states, question, answer in zip(got, QUESTIONS, ANSWERS, strict=True):
        want = oracle_states(model, TEXT, question, answer)
        if change not in (windowed, dropping_out):
            torch.testing.assert_close(states, want, atol=2e-5, rtol=1e-4)


def test_keys_that_lost_the_prefix_are_refused_not_attended_without_it(monkeypatch):
    """A function that every family calls after the cache makes new keys of them."""
    model = tiny_model()
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
    update = attention.PrefixLayer.update

    def copying(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return keys.clone(), values

    monkeypatch.setattr(attention.PrefixLayer, "update", copying)
    with pytest.raises(SkimError, match="LlamaAttention changes keys behind the cache"):
        rollout.score_all(model, prefix, QUESTIONS, ANSWERS)


@pytest.mark.parametrize("family", WAYS)
def test_a_generation_config_changes_nothing_of_what_is_sampled_or_scored(family):
    plain, model = tiny_model(family), tiny_model(family)
    model.generation_config.update(
        repetition_penalty=9.0, no_repeat_ngram_size=1, bad_words_ids=[[5]], temperature=0.1,
        do_sample=True, top_k=1, min_new_tokens=3, suppress_tokens=list(range(90)), num_beams=2,
    )  # fmt: skip
    found = []
    for one in (plain, model):
        with torch.no_grad():
            prefix = rollout.read(one, [TEXT])
        said = rollout.sample(one, prefix, QUESTIONS, 8, seed=3)
        said += rollout.sample(one, prefix, QUESTIONS, 8, temperature=0)
        states = rollout.score_all(one, prefix, QUESTIONS * 2, said)
        found.append((torch.cat(said), torch.cat(states)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", WAYS)
def test_nothing_is_called_by_a_name_that_transformers_gives_up(family):
    model = tiny_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            prefix = rollout.read(model, [TEXT])
        rollout.sample(model, prefix, QUESTIONS, 2)
        rollout.score_all(model, prefix, QUESTIONS, ANSWERS)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_row_does_not_depend_on_its_batch_mates(family):
    model = tiny_model(family)
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
    together = rollout.score_all(model, prefix, QUESTIONS, ANSWERS)
    sampled = rollout.sample(model, prefix, QUESTIONS, 8, temperature=1.3, seed=5)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        alone = rollout.score_all(model, prefix, [question], [answer])[0]
        torch.testing.assert_close(together[i], alone, atol=2e-5, rtol=1e-4)
        again = rollout.sample(model, prefix, [question], 8, temperature=1.3, seed=5 + i)[0]
        assert sampled[i].tolist() == again.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_nothing_may_stand_before_a_question(family):
    model, nothing = tiny_model(family), torch.zeros(0, dtype=torch.long)
    prefix = rollout.read(model, [])
    got = rollout.score_all(model, prefix, QUESTIONS, ANSWERS)
    for states, question, answer in zip(got, QUESTIONS, ANSWERS, strict=True):
        want = oracle_states(model, nothing, question, answer)
        torch.testing.assert_close(states, want, atol=2e-5, rtol=1e-4)
    said = rollout.sample(model, prefix, QUESTIONS, 4, temperature=0)
    for answer, question in zip(said, QUESTIONS, strict=True):
        assert answer.tolist() == oracle_greedy(model, nothing, question, 4).tolist()


def test_an_answer_ends_with_its_end_token():
    model = tiny_model()
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
    free = rollout.sample(model, prefix, QUESTIONS[:1], 8, temperature=0)[0]
    end = int(free[3])
    stopped = rollout.sample(model, prefix, QUESTIONS[:1], 8, temperature=0, ends=[end])[0]
    assert stopped.tolist() == free[: free.tolist().index(end) + 1].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cut_prefix_is_that_of_the_shorter_text(family):
    model = tiny_model(family)
    with torch.no_grad():
        cut = rollout.read(model, [TEXT]).cut(20)
        short = rollout.read(model, [TEXT[:20]])
    got = rollout.score_all(model, cut, QUESTIONS, ANSWERS)
    want = rollout.score_all(model, short, QUESTIONS, ANSWERS)
    torch.testing.assert_close(torch.cat(got), torch.cat(want), atol=1e-5, rtol=1e-5)


def test_sampling_follows_the_models_distribution():
    model = tiny_model()
    with torch.no_grad():
        prefix = rollout.read(model, [TEXT])
        logits = model(torch.cat([TEXT, QUESTIONS[0]])[None]).logits[0, -1]
    draws = rollout.sample(model, prefix, QUESTIONS[:1] * 2000, 1, batch=500)
    counts = torch.bincount(torch.cat(draws), minlength=logits.numel()) / 2000
    assert (counts - logits.softmax(-1)).abs().max() < 0.04


def test_gradients_reach_the_prefix_as_through_the_whole_text():
    def gradient(shared):
        model = tiny_model("llama")
        rows = model.get_input_embeddings()(TEXT).detach().requires_grad_()
        if shared:
            prefix = rollout.read(model, [rows])
            states = rollout.score(model, prefix, QUESTIONS[:2], ANSWERS[:2])
        else:
            table, parts = model.get_input_embeddings(), []
            for question, answer in zip(QUESTIONS[:2], ANSWERS[:2], strict=True):
                tail = table(torch.cat([question, answer[:-1]]))
                whole = torch.cat([rows, tail])[None]
                hidden = model.get_decoder()(inputs_embeds=whole).last_hidden_state[0]
                parts.append(hidden[len(TEXT) + len(question) - 1 :])
            states = torch.cat(parts)
        states.sin().sum().backward()
        return rows.grad

    torch.testing.assert_close(gradient(True), gradient(False), atol=1e-5, rtol=1e-3)


def test_compressed_models_answer_like_their_dequantized_twin(tmp_path, tokenizer):
    dense = tiny_model(dtype=torch.bfloat16)
    out = tmp_path / "small"
    save(out, dense, tokenizer, quantized_linears(dense), embed_bits=8, bits=4.5)
    model, _ = load(out, torch.float32)
    twin = copy.deepcopy(model).dequantize(torch.float32)
    with torch.no_grad():
        prefixes = [rollout.read(m, [TEXT]) for m in (model, twin)]
    answers = [
        rollout.sample(m, p, QUESTIONS[:1], 6, temperature=0)[0].tolist()
        for m, p in zip((model, twin), prefixes, strict=True)
    ]
    assert answers[0] == answers[1]
