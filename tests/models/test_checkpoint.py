"""Models in and out: structure, inputs refused in one line, and a save that is whole or absent."""

import dataclasses
import json
import os
import resource
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, quantized_linears, tiny_model
from gguf_sample import write_gguf
from skimlm.errors import FormatError, SkimError
from skimlm.format import pack
from skimlm.models import write as writing
from skimlm.models.blocks import decoder_blocks, decoder_linears, multiplier_of
from skimlm.models.checkpoint import load, open_checkpoint
from skimlm.models.write import plan_bytes, save
from skimlm.storage import folder as folders
from skimlm.storage.folder import check_out, folder_bytes
from skimlm.storage.safetensors import check_finite, finite, read_header

BLOCKS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
PER_BLOCK = {"phi3": 4, "opt": 6, "gpt_neox": 4}


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A private copy of the tiny llama."""
    return shutil.copytree(llama_folder, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path, tokenizer):
    """A tiny llama in several shards."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refuse(source, message, kind=SkimError, call=open_checkpoint):
    """The call must fail in one line that matches."""
    with pytest.raises(kind, match=message) as caught:
        call(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def edit_tensors(folder, **changes):
    """Change tensors of model.safetensors in place; None removes one, `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        name = name.replace("__", ".")
        tensor = tensors.pop(name)
        if change:
            tensors[name] = change(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- structure


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_are_found_in_every_family(family):
    model = tiny_model(family)
    names = [name for name, _ in decoder_blocks(model)]
    prefix = BLOCKS.get(family, "model.layers")
    assert names == [f"{prefix}.0", f"{prefix}.1"]
    found = decoder_linears(model)
    assert len(found) == 2 * PER_BLOCK.get(family, 7)
    assert all(type(module) is torch.nn.Linear for module in found.values())
    assert all(name.startswith(prefix) for name in found)
    assert list(found) == [n for n, _ in model.named_modules() if n in found]


def test_projections_outside_the_blocks_are_left_alone():
    model = tiny_model("opt", word_embed_proj_dim=32)
    outside = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear} - set(
        decoder_linears(model)
    )
    assert outside == {"model.decoder.project_in", "model.decoder.project_out", "lm_head"}


def test_include_and_exclude_are_shell_patterns():
    model = tiny_model()
    assert len(decoder_linears(model, include=["*.mlp.*"])) == 6
    assert len(decoder_linears(model, exclude=["*.mlp.*"])) == 8
    assert list(decoder_linears(model, ["*.0.mlp.*"], ["*up_proj", "*down_proj"])) == [
        "model.layers.0.mlp.gate_proj"
    ]
    with pytest.raises(SkimError, match="include and exclude leave none of the 14 linears"):
        decoder_linears(model, ["*.mlp.*"], ["*.mlp.*"])


def test_linears_that_stay_dense_are_not_found():
    model = tiny_model()
    every = list(decoder_linears(model))
    assert list(decoder_linears(model, dense=every[1:])) == every[:1]
    with pytest.raises(SkimError, match="no nn.Linear in the decoder blocks of LlamaForCausalLM"):
        decoder_linears(model, dense=every)


# ---- reading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_gives_the_model_and_tokenizer_back(tmp_path, tokenizer, family, dtype):
    model = tiny_model(family, dtype)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load(tmp_path, dtype)
    assert loaded.dtype == dtype and not loaded.training
    got, want = loaded.state_dict(), model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert loaded_tokenizer.decode(loaded_tokenizer("naïve\n").input_ids) == "naïve\n"


def test_an_opened_checkpoint_knows_where_its_tensors_are(sharded):
    opened = open_checkpoint(sharded)
    assert opened.config.model_type == "llama" and not opened.compressed and not opened.gguf
    assert len(set(opened.files.values())) > 2
    assert opened.files["model.norm.weight"].name.startswith("model-0000")
    assert load(opened)[0].dtype == torch.bfloat16


def test_a_missing_shard_is_named_with_a_tensor_of_it(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink(missing_ok=False)
    refuse(sharded, r"model-00002-of-00003.safetensors: model\..*: shard is missing", FormatError)


def test_a_truncated_shard_is_named_with_the_tensor_it_cuts(sharded):
    file = sharded / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refuse(sharded, r"model-00002-of-00003.safetensors: model\..*: truncated", FormatError)


@pytest.mark.parametrize("size", [0, 4, 100])
def test_a_file_shorter_than_its_header_is_refused(folder, size):
    os.truncate(folder / "model.safetensors", size)
    refuse(folder, "model.safetensors: truncated or not safetensors", FormatError)


def test_a_huge_header_length_is_refused_before_it_is_read(folder):
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.write((2**62).to_bytes(8, "little"))
    refuse(folder, "model.safetensors: .* the header does not fit", FormatError)


def test_a_header_whose_ranges_do_not_fit_the_shapes_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[64]', b'"shape":[65]', 1))
    refuse(folder, r"model.safetensors: model\..*: byte range does not fit", FormatError)


def test_a_shard_without_the_tensor_the_index_promises_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.ghost": weight_map["model.norm.weight"]})
    refuse(sharded, "model.ghost: is not in the shard the index names", FormatError)


def test_an_index_cannot_point_outside_its_folder(sharded):
    edit_json(sharded / "model.safetensors.index.json", weight_map={"a": "../evil.safetensors"})
    refuse(sharded, "a: shard '../evil.safetensors' is not a plain file name", FormatError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder, bad):
    def poison(tensor):
        tensor[3, 5] = bad
        return tensor

    edit_tensors(folder, model__layers__1__mlp__up_proj__weight=poison)
    message = "model.safetensors: model.layers.1.mlp.up_proj.weight: holds NaN or Inf"
    refuse(folder, message, FormatError)


def test_a_single_number_may_be_infinite_but_no_nan(tmp_path):
    save_file({"bound": torch.tensor(float("-inf"))}, tmp_path / "a.safetensors")
    entries = read_header(tmp_path / "a.safetensors")
    check_finite({name: (tmp_path / "a.safetensors", entries[name]) for name in entries})
    save_file({"bound": torch.tensor(float("nan"))}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="a.safetensors: bound: holds NaN or Inf"):
        check_finite({"bound": (tmp_path / "a.safetensors", entries["bound"])})


def test_a_linear_of_another_shape_is_named(folder):
    edit_tensors(folder, model__layers__1__mlp__up_proj__weight=lambda t: t[1:].clone())
    refuse(
        folder, r"up_proj.weight: shape \[71, 64\], config.json makes it \[72, 64\]", FormatError
    )


def test_any_other_tensor_of_another_shape_is_named(folder):
    edit_tensors(folder, model__norm__weight=lambda t: t[1:].clone())
    refuse(folder, r"model.norm.weight: shape \[63\], the model has \[64\]", FormatError, load)


def test_a_missing_tensor_is_named_not_made_up(folder):
    edit_tensors(folder, model__layers__0__self_attn__q_proj__weight=None)
    refuse(folder, "model.layers.0.self_attn.q_proj.weight: is missing", FormatError, load)


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, "no model.safetensors or model.safetensors.index.json")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refuse(folder, "pytorch_model.bin: pickled weights are never opened, convert to safetensors")


def test_an_unknown_architecture_is_refused_and_its_code_not_run(folder):
    (folder / "modeling.py").write_text("raise SystemExit('remote code was run')")
    remote = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    edit_json(folder / "config.json", model_type="made_up", auto_map=remote)
    refuse(folder, "config.json: unknown architecture 'made_up'", FormatError)
    refuse(folder, "config.json: unknown architecture 'made_up'", FormatError, load)


def test_code_that_comes_with_a_known_architecture_is_ignored(folder):
    (folder / "modeling.py").write_text("raise SystemExit('remote code was run')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.M"})
    assert type(load(folder)[0]).__name__ == "LlamaForCausalLM"


def test_a_model_that_is_no_language_model_is_refused(folder):
    edit_json(folder / "config.json", model_type="vit")
    refuse(folder, "config.json: unknown architecture: 'vit' is not a causal", FormatError)


def test_a_checkpoint_someone_else_quantized_is_refused(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(folder, "config.json: already quantized with 'gptq'", FormatError)


def test_a_broken_config_is_one_line(folder):
    edit_json(folder / "config.json", hidden_size="many")
    refuse(folder, "config.json: ")
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json: not valid JSON", FormatError)
    (folder / "config.json").write_text("[]")
    refuse(folder, "config.json: not a JSON object", FormatError)
    (folder / "config.json").unlink()
    refuse(folder, "config.json: no such file")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("config.json", b'{"a":' * 20_000, "config.json: not valid JSON"),
        ("config.json", b'{"model_type": ["llama"]}', r"unknown architecture \['llama'\]"),
        ("config.json", b'{"model_type": "llama", "quantization_config": 3}', "must be an object"),
        ("tokenizer.json", b"[1]", "cannot be loaded: tokenizer"),
        ("tokenizer.json", b'{"a":' * 20_000, "cannot be loaded: tokenizer"),
        ("tokenizer_config.json", b'{"tokenizer_class": "BertTokenizer"}', "loaded: tokenizer"),
        ("tokenizer_config.json", b'{"tokenizer_class": "Nope"', "cannot be loaded"),
        ("generation_config.json", b"[", "generation_config.json: not valid JSON"),
        ("model.safetensors.index.json", b'{"weight_map": 3}', "has no weight_map"),
    ],
)
def test_a_damaged_side_file_is_one_line(folder, name, data, message):
    (folder / name).write_bytes(data)
    refuse(folder, message, call=load)


def test_a_folder_without_tokenizer_is_refused_in_one_line(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refuse(folder, f"{folder}: cannot be loaded: ", call=load)


def test_paths_that_lead_nowhere(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere: no such file or folder")
    refuse("./nowhere", "nowhere: no such file or folder")
    refuse("model.gguf", "model.gguf: no such file or folder")
    (tmp_path / "notes.txt").write_text("hello")
    refuse(tmp_path / "notes.txt", "notes.txt: not a model folder and not a .gguf file")


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refuse("someone/model", "someone/model: no such folder, and the hub says: cannot reach the hub")


def test_a_hub_id_is_read_from_the_cache_without_pickles(monkeypatch, llama_folder, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(llama_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    opened = open_checkpoint("someone/model", revision="v1", cache_dir=tmp_path)
    assert opened.path == llama_folder
    assert asked["name"] == "someone/model" and asked["revision"] == "v1"
    assert asked["cache_dir"] == tmp_path
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])


# ---- GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tokenizer):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, tiny_model(), tokenizer)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_loads_as_the_dense_model(gguf_file, dtype):
    model, tokenizer = load(gguf_file, dtype)
    want = tiny_model().to(dtype).state_dict()
    got = model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer.decode(tokenizer("hi there").input_ids) == "hi there"


def test_a_gguf_can_be_saved_compressed(gguf_file, tmp_path):
    model, tokenizer = load(gguf_file)
    quantized = quantized_linears(model)
    save(tmp_path / "out", model, tokenizer, quantized, embed_bits=8, bits=3.2)
    assert load(tmp_path / "out")[1]("hi").input_ids == tokenizer("hi").input_ids


def test_broken_ggufs_are_one_line(gguf_file, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGML" + bytes(100))
    refuse(bad, "bad.gguf: not a GGUF file", FormatError)
    bad.write_bytes(gguf_file.read_bytes()[:300])
    refuse(bad, "bad.gguf: not a readable GGUF: ")
    bad.write_bytes(gguf_file.read_bytes()[:-5000])
    refuse(bad, "bad.gguf: ", call=load)


# ---- writing


@pytest.fixture
def job(tokenizer):
    """A model, the tokenizer and random compressed linears: the arguments of `save`."""
    model = tiny_model()
    return model, tokenizer, quantized_linears(model)


def write(out, job, **options):
    return save(out, *job, **dict(embed_bits=8, bits=3.2) | options)


def test_the_folder_holds_all_that_transformers_needs(tmp_path, job):
    provenance = {"method": "skim", "seed": 0}
    out = write(tmp_path / "deep" / "out", job, provenance=provenance)
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    stored = config["quantization_config"]
    assert stored["provenance"] == provenance and stored["bits"] == 3.2
    name, q = next(iter(job[2].items()))
    widths = {str(b): n for b, n in q.spec.counts.items()}
    assert stored["linears"][name] == {"widths": widths, "in_scale": False}
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_files_have_the_usual_permissions(tmp_path, job):
    out = write(tmp_path / "out", job)
    mask = os.umask(0)
    os.umask(mask)
    for file in out.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask


def test_saving_leaves_the_model_as_it_was(tmp_path, job):
    model = job[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(tmp_path / "out", job)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert getattr(model.config, "quantization_config", None) is None


def test_an_existing_out_needs_force(tmp_path, job):
    out = write(tmp_path / "out", job)
    inode = out.stat().st_ino
    refuse(out, f"{out}: exists, use --force to replace it", call=lambda out: write(out, job))
    assert out.stat().st_ino == inode
    write(out, job, force=True, embed_bits=4)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["embed_bits"] == 4
    assert os.listdir(tmp_path) == ["out"]


def test_force_never_replaces_what_is_not_a_model(tmp_path, job):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    for out in (precious, file):
        refuse(out, "not written by skimlm", call=lambda out: write(out, job, force=True))
    assert (precious / "chapter1.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", force=True)
    check_out(tmp_path / "absent")


def test_a_full_disk_leaves_nothing(tmp_path, job):
    size = (write(tmp_path / "fits", job) / "model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, limits[1]))
    try:
        refuse(tmp_path / "out", "out: could not be written: ", call=lambda out: write(out, job))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["fits"]


@pytest.mark.parametrize("step", ["write_shards", "sync", "replace"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_ctrl_c_leaves_no_out_and_no_temporary_folder(tmp_path, job, monkeypatch, step, old):
    if old:
        write(tmp_path / "out", job, embed_bits=16)
    before = folder_bytes(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing if step == "write_shards" else folders, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", job, force=True)
    assert os.listdir(tmp_path) == (["out"] if old else [])
    assert folder_bytes(tmp_path) == before


def test_an_out_that_cannot_be_made_is_one_line(tmp_path, job):
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file" / "out", "could not be written", call=lambda out: write(out, job))


def test_quantized_weights_must_fit_the_model(tmp_path, job):
    model, tokenizer, quantized = job
    name = "model.layers.0.mlp.up_proj"
    wrong = quantized | {name: quantized["model.layers.0.mlp.down_proj"]}
    with pytest.raises(SkimError, match=rf"{name}: quantized as \[64, 72\], not \[72, 64\]"):
        write(tmp_path / "out", (model, tokenizer, wrong))
    wrong[name] = dataclasses.replace(quantized[name], codes=quantized[name].codes | 255)
    with pytest.raises(FormatError, match=f"{name}: codes: a code does not fit"):
        write(tmp_path / "out", (model, tokenizer, wrong))
    assert os.listdir(tmp_path) == []


def test_tables_the_config_ties_must_be_equal(tmp_path, job):
    model = job[0]
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with pytest.raises(SkimError, match="lm_head.weight differs from model.embed_tokens.weight"):
        write(tmp_path / "out", job)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("embed_bits", [16, 8, 4])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_plan_is_exact_to_the_byte(tmp_path, tokenizer, family, embed_bits, max_shard_size):
    model = tiny_model(family, torch.bfloat16)
    quantized = quantized_linears(model, in_scale=True, widths=[2, 3, 7])
    options = dict(embed_bits=embed_bits, bits=3.21, provenance={"seed": 1})
    options |= dict(max_shard_size=max_shard_size)
    specs = {name: q.spec for name, q in quantized.items()}
    rest = plan_bytes(model, tokenizer, specs, **options)
    out = save(tmp_path / "out", model, tokenizer, quantized, **options)
    assert folder_bytes(out) == rest + sum(pack(q).nbytes for q in quantized.values())


def test_finite_checks_every_kind_of_tensor():
    assert finite(torch.tensor([1, 2])) and finite(torch.empty(0))
    assert finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
    assert not finite(torch.tensor([float("-inf"), 1.0]).bfloat16())


def test_multiplier_of_refuses_embeddings_it_does_not_know():
    class Strange(torch.nn.Embedding):
        pass

    with pytest.raises(SkimError, match="embedding of class Strange: use 16 bits"):
        multiplier_of(Strange(3, 4))
