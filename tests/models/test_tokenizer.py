"""Tokens that a model has no embedding for are refused in one line, wherever text comes in."""

import pytest
import torch

from conftest import byte_tokenizer, quantized_linears, tiny_model
from skimlm.errors import SkimError
from skimlm.evaluate.perplexity import perplexity
from skimlm.generate import generate
from skimlm.models.checkpoint import load
from skimlm.models.tokenizer import check_ids
from skimlm.models.write import save
from skimlm.pipeline.compress import compress
from skimlm.pipeline.config import CompressConfig
from skimlm.skills.splice import embed

TEXT = "some words <|extra|> here. " * 100
ONE_LINE = r"token 259 '<\|extra\|>', but the model's embedding has 259 rows"


@pytest.fixture
def larger():
    """The byte tokenizer with one token more than the tiny models know."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    return tokenizer


def test_the_last_row_is_a_token_and_the_next_is_none():
    check_ids(tiny_model(), torch.tensor([[0, 258]]))
    check_ids(tiny_model(), torch.tensor([], dtype=torch.long))
    with pytest.raises(SkimError, match="the text has token 259, but"):
        check_ids(tiny_model(), torch.tensor([0, 259]))


@pytest.mark.parametrize("embed_bits", [4, 8])
def test_rows_of_a_compressed_embedding_are_counted(tmp_path, tokenizer, embed_bits):
    model = tiny_model()
    job = (model, tokenizer, quantized_linears(model))
    loaded, _ = load(save(tmp_path / "out", *job, embed_bits=embed_bits, bits=3.2))
    check_ids(loaded, torch.tensor([258]))
    with pytest.raises(SkimError, match="token 259, .* 259 rows"):
        check_ids(loaded, torch.tensor([259]))


def test_a_perplexity_of_such_a_text_is_refused(larger):
    with pytest.raises(SkimError, match=ONE_LINE):
        perplexity(tiny_model(), larger, TEXT, seq_len=64)
    perplexity(tiny_model(), larger, "some words " * 9 + "<|extra|>", seq_len=64)


def test_a_prompt_with_such_a_token_is_refused(larger):
    with pytest.raises(SkimError, match=ONE_LINE):
        generate(tiny_model(), larger, "hi <|extra|>", max_new_tokens=1)


def test_a_prompt_that_is_no_utf8_is_read_with_replacement_characters(tokenizer):
    got, want = (
        generate(tiny_model(), tokenizer, f"hi {c}", max_new_tokens=3) for c in "\udcff\ufffd"
    )
    assert got.text == want.text and got.prompt_tokens == 6


def test_a_skill_with_such_a_token_is_refused():
    with pytest.raises(SkimError, match="token 300, but"):
        embed(tiny_model(), [torch.tensor([5, 300])])


def test_calibration_text_with_such_a_token_is_refused_before_the_model_is_loaded(
    tmp_path, larger, llama_folder, monkeypatch
):
    for file in llama_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    larger.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded")
    )
    with pytest.raises(SkimError, match=ONE_LINE):
        how = CompressConfig(recipe="fast", text=tmp_path / "text.txt", samples=4, seq_len=64)
        compress(tmp_path, tmp_path.with_name(f"{tmp_path.name}-out"), how)
