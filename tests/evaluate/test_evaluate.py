"""Perplexity against a slow oracle: plain logits, a Python loop over tokens, float64."""

import copy
import math

import pytest
import torch

from conftest import (
    CONFIGS,
    FAMILIES,
    GATED,
    bos_tokenizer,
    byte_tokenizer,
    quantized_linears,
    tiny_model,
)
from skimlm.errors import SkimError
from skimlm.evaluate import perplexity as evaluate
from skimlm.evaluate.perplexity import held_out_text, perplexity, read_text, summarise, wikitext
from skimlm.models.checkpoint import load
from skimlm.models.write import save
from skimlm.pipeline.text import default_text

TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 äöü — and then it rests. " * 3


def oracle_nll(model, ids: list[int], seq_len: int) -> list[float]:
    """Mean negative log-likelihood of every whole window."""
    means = []
    for start in range(0, len(ids) - seq_len + 1, seq_len):
        window = ids[start : start + seq_len]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        losses = []
        for position in range(seq_len - 1):
            row = logits[position].tolist()
            top = max(row)
            total = top + math.log(sum(math.exp(value - top) for value in row))
            losses.append(total - row[window[position + 1]])
        means.append(sum(losses) / len(losses))
    return means


SCALED = {  # families that change the head's output, each in its own way
    "softcapped": ("Gemma3TextConfig", CONFIGS["gemma3"][1] | {"final_logit_softcapping": 3.0}),
    "granite": ("GraniteConfig", GATED | {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", GATED | {"logit_scale": 0.25}),
    "hyperclovax": ("HyperCLOVAXConfig", GATED | {"logits_scaling": 0.5}),
}


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
@pytest.mark.parametrize("parts", ["whole", "uneven"])
def test_it_equals_the_plain_computation(family, parts, tokenizer, monkeypatch):
    if parts == "uneven":
        monkeypatch.setattr(evaluate, "CHUNK", 7)
        monkeypatch.setattr(evaluate, "MAX_LOGITS", 259 * 17)
    if family in SCALED:
        monkeypatch.setitem(CONFIGS, family, SCALED[family])
    model = tiny_model(family)
    expected = oracle_nll(model, tokenizer(TEXT).input_ids, 48)
    result = perplexity(model, tokenizer, TEXT, seq_len=48)
    assert len(expected) == 5
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 5), rel=1e-5)


def test_equal_logits_give_the_size_of_the_vocabulary(tokenizer):
    model = tiny_model()
    model.get_output_embeddings().weight.data.zero_()
    assert perplexity(model, tokenizer, TEXT, seq_len=32).perplexity == pytest.approx(259)


def test_a_compressed_model_scores_like_the_dense_one_it_stands_for(tmp_path, tokenizer):
    model = tiny_model(dtype=torch.bfloat16)
    quantized = quantized_linears(model, in_scale=True)
    save(tmp_path / "out", model, tokenizer, quantized, embed_bits=8, bits=4.0)
    small, _ = load(tmp_path / "out", torch.float32)
    result = perplexity(small, tokenizer, TEXT, seq_len=64)
    dense = small.dequantize()
    assert result.nll == pytest.approx(oracle_nll(dense, tokenizer(TEXT).input_ids, 64), rel=1e-5)


def test_windows_do_not_overlap_and_the_rest_is_dropped(tokenizer):
    model, text = tiny_model(), TEXT[:100]
    result = perplexity(model, tokenizer, text, seq_len=16)
    size = len(text.encode())
    assert (result.tokens, result.windows, result.predicted_tokens) == (size, 6, 90)
    assert result.bos == "none (the tokenizer adds none)"
    first = perplexity(model, tokenizer, text, seq_len=16, limit=2)
    assert (first.windows, first.predicted_tokens) == (2, 30)
    assert first.nll == result.nll[:2]
    assert perplexity(model, tokenizer, text, seq_len=16, limit=99).windows == 6


def test_a_bos_of_the_tokenizer_begins_every_window_and_is_not_counted():
    model, tokenizer = tiny_model(), bos_tokenizer()
    result = perplexity(model, tokenizer, TEXT, seq_len=32)
    ids = byte_tokenizer()(TEXT).input_ids
    parts = [ids[i : i + 31] for i in range(0, len(ids) - 30, 31)]
    begun = [token for part in parts for token in [tokenizer.bos_token_id, *part]]
    assert result.bos == "<s> begins every window, not counted (the tokenizer adds it)"
    assert (result.tokens, result.windows) == (len(ids), len(parts))
    assert result.predicted_tokens == 31 * len(parts)  # every token of the text in a window
    assert result.nll == pytest.approx(oracle_nll(model, begun, 32), rel=1e-5)


def test_the_standard_error_is_that_of_the_windows_mean():
    nll = [3.0, 3.5, 2.5, 4.0]
    mean = 13.0 / 4
    variance = sum((x - mean) ** 2 for x in nll) / 3
    value, stderr = summarise(nll)
    assert value == pytest.approx(math.exp(mean))
    assert stderr == pytest.approx(math.exp(mean) * math.sqrt(variance / 4))


def test_one_window_has_no_standard_error(tokenizer):
    result = perplexity(tiny_model(), tokenizer, TEXT, seq_len=32, limit=1)
    assert result.windows == 1 and result.perplexity_stderr is None


def test_a_text_shorter_than_a_window_is_refused(tokenizer):
    with pytest.raises(SkimError, match="text too short: 5 tokens, one window needs 32; give a"):
        perplexity(tiny_model(), tokenizer, "hello", seq_len=32)


@pytest.mark.parametrize("seq_len", [1, 257])
def test_a_window_the_model_cannot_read_is_refused(tokenizer, seq_len):
    with pytest.raises(SkimError, match=f"seq-len must be 2 to 256, got {seq_len}"):
        perplexity(tiny_model(), tokenizer, TEXT * 9, seq_len=seq_len)


def test_the_model_is_left_as_it_was(tokenizer):
    model = tiny_model()
    before = dict(model.get_decoder().__dict__)
    perplexity(model, tokenizer, TEXT, seq_len=32)
    assert model.get_decoder().__dict__ == before


def test_a_model_that_bypasses_its_decoder_is_refused(tokenizer, monkeypatch):
    model = tiny_model()
    other = copy.deepcopy(model.get_decoder())
    monkeypatch.setattr(model, "get_decoder", lambda: other)
    with pytest.raises(SkimError, match="LlamaForCausalLM does not call its decoder"):
        perplexity(model, tokenizer, TEXT, seq_len=32)


def test_a_model_gone_wrong_has_no_perplexity(tokenizer):
    model = tiny_model()
    model.get_decoder().norm.weight.data[3] = float("nan")
    with pytest.raises(SkimError, match="window 1: the model's output is not finite"):
        perplexity(model, tokenizer, TEXT, seq_len=32)


def test_progress_counts_windows(tokenizer):
    seen = []
    perplexity(tiny_model(), tokenizer, TEXT, seq_len=64, progress=lambda *args: seen.append(args))
    assert seen == [("perplexity", i, 4) for i in (1, 2, 3, 4)]


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\r\nb\n\n ü".encode())
    assert read_text(tmp_path / "a.txt") == "a\r\nb\n\n ü"


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(SkimError, match=r"a\.txt: not UTF-8 \(byte 3\)"):
        read_text(tmp_path / "a.txt")


def test_wikitext_rows_are_joined_by_blank_lines(tmp_path):
    (tmp_path / "w.txt").write_bytes(" \n = Title = \n \n A\u2028b\x0b . \n".encode())
    assert wikitext(tmp_path / "w.txt") == "\n\n = Title = \n\n\n\n\n A\u2028b\x0b . \n"


def test_the_held_out_text_is_long_and_not_in_the_calibration_text():
    text, name = held_out_text()
    assert "pydoc_data.topics" in name
    assert len(text) > 300_000 and text == held_out_text()[0]
    seen = "\n".join(default_text())
    lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}
    shared = [line for line in lines if line in seen]
    assert len(lines) > 3000 and len(shared) <= len(lines) / 500, shared
