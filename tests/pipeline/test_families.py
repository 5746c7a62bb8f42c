"""Families whose matrices are no plain linears, and models in which one reads text: whole journeys.

The oracle is the folder's own dense export, loaded by transformers alone.
"""

import filecmp
import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import byte_tokenizer, tiny_model
from skimlm.cli import main

TEXT = ". ".join(f"{i} times {i + 3} is {i * (i + 3)}, the last digit {i % 7}" for i in range(200))
IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def skimlm(*args):
    return CliRunner().invoke(main.main, [str(arg) for arg in args], prog_name="skimlm")


def compress(source, out, text, *more):
    options = ["--recipe", "fast", "--bits", 4, "--samples", 4, "--seq-len", 32, "--text", text]
    done = skimlm("compress", source, out, *options, *more, "--cache-dir", out.parent / "cache")
    assert done.exit_code == 0, done.output
    return done


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def same_files(a, b):
    names = sorted(f.name for f in a.iterdir())
    assert names == sorted(f.name for f in b.iterdir())
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "gpt2"])
def test_from_a_checkpoint_to_an_answer(family, tmp_path, text):
    source, out = tmp_path / "source", tmp_path / "out"
    dense = tiny_model(family, dtype=torch.bfloat16)
    dense.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    done = compress(source, out, text)
    assert "compressed: " in done.stderr

    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert skimlm("export", out, tmp_path / "dense", "--dtype", "float32").exit_code == 0
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert type(own) is type(dense)
    want, got = logits(own, input_ids=IDS), logits(model, input_ids=IDS)
    assert (got - want).abs().max() < 2e-3 * want.std()
    original = logits(dense.float(), input_ids=IDS)
    assert (want - original).norm() < 0.8 * original.norm()  # tokens are routed anew

    greedy = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(IDS[:1], **greedy), own.generate(IDS[:1], **greedy))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again, input_ids=IDS), got)

    compress(source, tmp_path / "streamed", text, "--workers", 1)
    assert same_files(out, tmp_path / "streamed")
    for name, more in (("slim", ()), ("slim-streamed", ("--workers", 1))):
        compress(source, tmp_path / name, text, "--method", "slim", *more)
    assert same_files(tmp_path / "slim", tmp_path / "slim-streamed")

    facts = json.loads(skimlm("inspect", out, "--json").stdout)
    assert facts["provenance"]["coverage"]["share"] > 0.9


def llava():
    """A tiny model that sees: 16 places of an image."""
    words = dict(vocab_size=259, hidden_size=64, intermediate_size=72, num_hidden_layers=2)
    words |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    words |= dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
    sight = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaConfig(
        text_config=words | dict(model_type="llama"),
        vision_config=sight | dict(model_type="clip_vision_model", image_size=56, patch_size=14),
        image_token_index=250,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model


def test_a_model_that_sees_keeps_its_sight(tmp_path, text):
    source, out = tmp_path / "source", tmp_path / "out"
    dense = llava()
    dense.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "Mine"}')
    done = compress(source, out, text)
    assert "beside the text" in done.stderr
    assert (out / "preprocessor_config.json").read_text() == '{"image_processor_type": "Mine"}'

    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    before, after = dense.state_dict(), model.state_dict()
    kept = [name for name in before if "language_model" not in name and "lm_head" not in name]
    assert len(kept) > 20
    assert all(torch.equal(before[name].float(), after[name]) for name in kept)

    assert skimlm("export", out, tmp_path / "dense", "--dtype", "float32").exit_code == 0
    own = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids = torch.cat([torch.full((1, 16), 250), IDS[:1]], dim=1)
    seen = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56))
    want, got = logits(own, **seen), logits(model, **seen)
    assert (got - want).abs().max() < 2e-3 * want.std()
    greedy = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**seen, **greedy), own.generate(**seen, **greedy))
    compress(source, tmp_path / "streamed", text, "--workers", 1)
    assert same_files(out, tmp_path / "streamed")


def test_less_than_half_is_refused_unless_it_is_asked_for(tmp_path, text):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model("llama", vocab_size=20_000).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    options = ["--recipe", "fast", "--samples", 4, "--seq-len", 32, "--embed-bits", 16]
    options += ["--text", text, "--cache-dir", tmp_path / "cache"]
    done = skimlm("compress", source, out, *options)
    assert done.exit_code == 1 and not out.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {source}: only 4% of this model's weights can be compressed: ")
    assert "embed_tokens.weight (1,280,000) is in 16 bits" in line and "--allow-partial" in line
    done = skimlm("compress", source, out, *options, "--allow-partial")
    assert done.exit_code == 0, done.output
    # what the user leaves out does not count
    some = ["--exclude", "*.0.*", "--embed-bits", 8, "--force"]
    assert skimlm("compress", source, out, *options, *some).exit_code == 0


@pytest.mark.parametrize("method", ["skim", "slim"])
def test_experts_that_see_hardly_a_token_are_counted(tmp_path, text, method):
    source = tmp_path / "source"
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    how = "--method", method, "--json"
    done = compress(source, tmp_path / "few", text, "--samples", 1, *how)
    assert json.loads(done.stdout)["experts_sharing"] == 2 * 2 * 4  # 32 tokens, and 64 are few
    assert "16 matrices of experts saw under 64 tokens" in done.stderr
    done = compress(source, tmp_path / "more", text, "--samples", 40, *how)
    assert json.loads(done.stdout)["experts_sharing"] == 0
    assert "matrices of experts" not in done.stderr
