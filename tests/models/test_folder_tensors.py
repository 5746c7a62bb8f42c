"""Tensors of a folder under the model's names: bit for bit those of `from_pretrained`."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from skimlm.errors import FormatError, SkimError
from skimlm.models.checkpoint import open_checkpoint
from skimlm.models.folder_tensors import FolderTensors
from skimlm.models.source import open_source

# renamed, stacked from single experts, stacked in another order, as they are
FAMILIES = ("gpt_neox", "mixtral", "gpt_oss", "jetmoe", "gpt2", "llama")


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path, tokenizer):
    tiny_model(request.param, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_every_tensor_is_the_one_that_transformers_loads(folder):
    opened = open_checkpoint(folder)
    whole = open_source(opened, streamed=False)
    streamed = open_source(opened, streamed=True)
    want = whole.model.state_dict()
    assert streamed.model.state_dict().keys() == want.keys()
    for i in range(2):
        with streamed.loaded(range(i, i + 1)):
            for name, tensor in streamed.module(i).state_dict().items():
                full = f"{streamed.blocks[i]}.{name}"
                assert tensor.dtype == want[full].dtype and torch.equal(tensor, want[full]), full
        assert all(t.is_meta for t in streamed.module(i).state_dict().values())
    for name, tensor in streamed.model.state_dict().items():
        assert tensor.is_meta == name.startswith(tuple(f"{b}." for b in streamed.blocks))
        assert tensor.is_meta or torch.equal(tensor, want[name]), name


def test_names_are_known_before_anything_is_read(tmp_path, monkeypatch):
    tiny_model("mixtral").save_pretrained(tmp_path)
    opened, model = open_checkpoint(tmp_path), tiny_model("mixtral")
    monkeypatch.setattr("skimlm.models.folder_tensors.safe_open", lambda *_, **__: pytest.fail())
    tensors = FolderTensors.open(tmp_path, opened.files, model)
    assert set(tensors.names) == model.state_dict().keys() and not tensors.unused


def test_an_expert_that_is_missing_or_of_another_shape_is_one_line(tmp_path, tokenizer):
    tiny_model("mixtral").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if ".experts.2." in n)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(SkimError, match="cannot be put together|shape"):
        source = open_source(open_checkpoint(tmp_path), streamed=True)
        with source.loaded(range(1)), source.loaded(range(1, 2)):
            pass
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SkimError, match="shape|cannot be put together"):
        source = open_source(open_checkpoint(tmp_path), streamed=True)
        with source.loaded(range(1)), source.loaded(range(1, 2)):
            pass


def test_tensors_that_become_nothing_are_refused(tmp_path, tokenizer):
    tiny_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"score.weight": torch.zeros(2, 64)}, file, {"format": "pt"})
    opened = open_checkpoint(tmp_path)
    for streamed in (True, False):
        with pytest.raises(FormatError, match="score.weight: is stored, but MixtralForCausalLM"):
            open_source(opened, streamed, tokenizer)
