"""Blocks that are read when their turn comes, against the model loaded whole."""

import dataclasses
import filecmp

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from gguf_sample import write_gguf
from skimlm.errors import SkimError
from skimlm.models import gguf_tensors
from skimlm.models.checkpoint import load, open_checkpoint
from skimlm.models.source import BlockSource, open_source
from skimlm.pipeline.compress import compress
from skimlm.pipeline.config import RECIPES, CompressConfig

gguf = pytest.importorskip("gguf")
IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, tiny_model(num_attention_heads=8), byte_tokenizer())
    return file


def test_what_a_family_changes_as_it_loads_is_changed_in_a_streamed_model_too(tmp_path):
    model, row = tiny_model("youtu", torch.bfloat16), tiny_model("youtu").config.pad_token_id
    assert model.get_input_embeddings().weight[row].any()
    byte_tokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # it is loaded with zeros for the padding token
    opened = open_checkpoint(tmp_path)
    source, whole = open_source(opened, streamed=True), load(opened)[0]
    tables = [m.get_input_embeddings().weight for m in (source.model, whole)]
    assert torch.equal(*tables) and not tables[0][row].any() and tables[0][row - 1].any()


@pytest.fixture(scope="module")
def rounded_file(gguf_file):
    """The same file with its linears in blocks of 8 and 4 bits, its tables in 8."""
    file = gguf_file.with_name("rounded.gguf")
    old = gguf.GGUFReader(gguf_file)
    writer = gguf.GGUFWriter(file, "llama")
    for field in old.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kinds = [*field.types, None]
        writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1])
    for number, tensor in enumerate(old.tensors):
        kind = gguf.GGMLQuantizationType.F32
        if tensor.data.ndim == 2 and tensor.data.shape[1] % 32 == 0:
            wide = number % 2 or "embd" in tensor.name
            kind = gguf.GGMLQuantizationType.Q8_0 if wide else gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, gguf.quantize(tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(params=["gguf_file", "rounded_file"])
def file(request):
    return request.getfixturevalue(request.param)


def test_a_gguf_read_a_tensor_at_a_time_is_what_the_whole_file_gives(file, monkeypatch):
    monkeypatch.setattr(gguf_tensors, "ROWS", 100)  # tables in pieces
    model, _ = load(file)
    want, seen = model.state_dict(), set()
    source = open_source(open_checkpoint(file), streamed=True)
    for i, prefix in enumerate(source.blocks):
        with source.loaded(range(i, i + 1)):
            for name, tensor in source.module(i).state_dict().items():
                assert torch.equal(tensor, want[f"{prefix}.{name}"])
                assert tensor.dtype == torch.bfloat16
                seen.add(f"{prefix}.{name}")
        assert all(p.is_meta for p in source.module(i).parameters())
    for name, tensor in source.model.state_dict().items():
        if not tensor.is_meta:
            assert torch.equal(tensor, want[name])
            seen.add(name)
    assert seen == want.keys()
    assert source.model.config.to_diff_dict() == model.config.to_diff_dict()


def test_numbers_that_are_not_finite_are_named_when_they_are_read(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    write_gguf(tmp_path / "nan.gguf", model, byte_tokenizer())
    source = open_source(open_checkpoint(tmp_path / "nan.gguf"), streamed=True)
    with source.loaded(range(1)):
        pass
    with pytest.raises(SkimError, match=r"nan.gguf: model.layers.1.mlp.up_proj.weight: holds NaN"):
        with source.loaded(range(1, 2)):
            pass


@pytest.mark.parametrize(
    "options",
    [
        dict(bits=3.2),
        dict(recipe="paper", bits=3.2),
        dict(method="slim", bits=3),
        dict(sparsity="2:4", rank=0.1, bits=4.4),
    ],
    ids=str,
)
def test_a_gguf_streamed_gives_the_folder_that_it_gives_in_memory(
    rounded_file, tmp_path, monkeypatch, options
):
    few = dataclasses.replace(RECIPES["fast"], fisher_windows=3)
    monkeypatch.setitem(RECIPES, "fast", few)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}; " for i in range(60)))
    how = dict(recipe="fast", samples=5, seq_len=24, text=tmp_path / "text.txt") | options
    for name, workers in (("whole", None), ("parts", 1)):
        cache = tmp_path / f"c-{name}"
        config = CompressConfig(cache_dir=cache, workers=workers, **how)
        report = compress(rounded_file, tmp_path / name, config)
        assert report.streamed == (workers is not None)
    names = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "parts").iterdir())
    same = filecmp.cmpfiles(tmp_path / "whole", tmp_path / "parts", names, shallow=False)
    assert same == (names, [], [])


HANDED = {"gemma4": {"shared_kv_states"}, "hy_v4": {"returned"}}  # besides hidden states


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "phi3", *HANDED])
def test_blocks_run_alone_make_together_what_the_model_makes(family):
    model = tiny_model(family)
    source, state = BlockSource(model), None
    with torch.no_grad():
        for i in range(len(source.blocks)):
            state, final = source.run(range(i, i + 1), IDS, state)
            handed = {name.partition(".")[0] for name in state} - {"x"}
            assert handed == HANDED.get(family, set())
        whole, whole_final = source.run(range(len(source.blocks)), IDS, None)
        want = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    assert torch.equal(final, want) and torch.equal(whole_final, want)
    assert torch.equal(state["x"], whole["x"])
    assert not any("forward" in vars(m) for m in model.modules())
