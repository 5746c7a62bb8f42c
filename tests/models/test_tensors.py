"""Tensors that a config does not announce, tables that it ties, and files beside the tensors."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import quantized_linears, tiny_model
from skimlm.errors import FormatError, SkimError
from skimlm.models.blocks import embeddings
from skimlm.models.checkpoint import load, open_checkpoint
from skimlm.models.side_files import side_files
from skimlm.models.source import open_source
from skimlm.models.write import save

FILE = "model.safetensors"


@pytest.fixture
def folder(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "model")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add(folder, **tensors):
    """Store more tensors; `__` stands for a dot."""
    old = load_file(folder / FILE)
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(old | new, folder / FILE, metadata={"format": "pt"})
    return old


def whole(folder):
    """The model in memory, and as it is streamed."""
    opened = open_checkpoint(folder)
    return load(opened)[0], open_source(opened, True).model


BIAS = "model.layers.{}.self_attn.q_proj.bias"


@pytest.mark.parametrize("read", [load, lambda f: open_source(open_checkpoint(f), True)])
def test_a_bias_that_the_config_does_not_announce_is_refused_by_name(folder, read):
    add(folder, **{BIAS.format(i): torch.ones(64) for i in range(2)})
    with pytest.raises(FormatError, match=r"layers.0.self_attn.q_proj.bias: is stored, but Llam"):
        read(folder)
    with pytest.raises(FormatError, match=r"\(nor model.layers.1.self_attn.q_proj.bias\)"):
        read(folder)


@pytest.mark.parametrize("read", [load, lambda f: open_source(open_checkpoint(f), True)])
def test_a_head_of_another_kind_is_refused_though_no_class_is_named(folder, read):
    edit_config(folder, architectures=None)
    add(folder, score__weight=torch.ones(1, 64))
    with pytest.raises(FormatError, match="score.weight: is stored"):
        read(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids"]
)
def test_what_a_model_makes_itself_may_be_stored(folder, name):
    add(folder, **{name: torch.ones(8)})
    assert not open_checkpoint(folder).left_out
    for model in whole(folder):
        assert name not in model.state_dict()


def test_what_transformers_leaves_out_on_purpose_is_known(folder, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    add(folder, mtp__norm__weight=torch.ones(64))
    assert open_checkpoint(folder).left_out == ("mtp.norm.weight",)
    assert len(whole(folder)) == 2


# ---- two tables


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(folder, tmp_path, tokenizer):
    head = torch.randn(259, 64).bfloat16()
    table = add(folder, lm_head__weight=head)["model.embed_tokens.weight"]
    for i, model in enumerate(whole(folder)):
        assert torch.equal(model.lm_head.weight, head)
        assert torch.equal(model.model.embed_tokens.weight, table)
        assert not model.config.tie_word_embeddings and not embeddings(model)[2]
        if i:
            continue
        for bits in (16, 8, 4):
            out = tmp_path / f"out{bits}"
            save(out, model, tokenizer, quantized_linears(model), embed_bits=bits, bits=3.2)
            again = load(out)[0].dequantize()
            error = (again.lm_head.weight - head).norm() / head.norm()
            assert error <= {16: 0, 8: 0.02, 4: 0.2}[bits]


def test_a_table_stored_twice_stays_tied_and_is_stored_once(folder, tmp_path, tokenizer):
    table = load_file(folder / FILE)["model.embed_tokens.weight"]
    add(folder, lm_head__weight=table.clone())
    for model in whole(folder):
        assert embeddings(model)[2] and model.lm_head.weight is model.model.embed_tokens.weight
    out = save(
        tmp_path / "out", load(folder)[0], tokenizer, quantized_linears(tiny_model()),
        embed_bits=8, bits=3.2,
    )  # fmt: skip
    assert not any("lm_head" in name for name in load_file(out / FILE))


def test_a_tied_table_may_be_stored_as_the_head_alone(folder):
    tensors = load_file(folder / FILE)
    table = tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    for model in whole(folder):
        assert torch.equal(model.model.embed_tokens.weight, table)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_table_that_is_not_stored_at_all_is_missing(folder):
    tensors = load_file(folder / FILE)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(SkimError, match="lm_head.weight|embed_tokens.weight"):
        load(folder)
    with pytest.raises(SkimError, match="is not in the checkpoint under this name"):
        open_source(open_checkpoint(folder), True)


# ---- files beside the tensors


def test_the_small_files_come_along_as_they_are(folder, tmp_path, tokenizer):
    kept = {
        "preprocessor_config.json": b'{"a": 1}',
        "chat_template.jinja": b"{{ x }}",
        "tokenizer.model": bytes(range(256)),
        "special_tokens_map.json": b"{  }\n",
        "merges.txt": b"a b\r\n",
        "LICENSE": b"be kind",
        "README.md": b"# the model",
        "additional_chat_templates/tool.jinja": b"T",
        "generation_config.json": b'{"do_sample": false, "temperature": 0.6}',
    }
    left = ["pytorch_model.bin", "modeling.py", "trainer_state.json", "optimizer.pt", "a.gguf"]
    (folder / "additional_chat_templates").mkdir()
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    for name in left:
        (folder / name).write_bytes(b"\x80\x04.")
    (folder / "linked.json").symlink_to(folder / "LICENSE")
    model = load(folder)[0]
    out = save(
        tmp_path / "out", model, tokenizer, quantized_linears(model), embed_bits=8, bits=3.2,
        source=folder,
    )  # fmt: skip
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert not (out / "linked.json").is_symlink()
    assert (out / "linked.json").read_bytes() == b"be kind"
    assert not set(left) & set(os.listdir(out))
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    assert "config.json" not in map(str, side_files(folder))
