"""Folders whose embedding and head are layers: in transformers, saved again, tampered with."""

import copy
import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from conftest import FAMILIES, quantized_linears, random_quantized, tiny_model
from folder_sample import IDS, assert_same_logits, config_of, logits, open_folder, stored
from layer_sample import mixed, spoil, with_options
from skimlm.errors import FormatError, SkimError
from skimlm.evaluate.report import inspect, inspect_text
from skimlm.format import dequantize, effective, pack
from skimlm.models.blocks import embeddings
from skimlm.models.checkpoint import load
from skimlm.models.write import plan_bytes, save, write_packed
from skimlm.pipeline.export import export
from skimlm.runtime import decode
from skimlm.runtime.tables import PackedEmbedding, PackedHead
from skimlm.storage.folder import folder_bytes

TABLE, HEAD, UP = "model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"


def tables_of(model, **options):
    """A random layer for the embedding, and for a head that is not tied to it."""
    (name, table), head, tied = embeddings(model)
    names = [name] if tied else [name, head[0]]
    shape = table.weight.shape
    return {n: random_quantized(*shape, seed=90 + i, **options) for i, n in enumerate(names)}


def compress(out, model, tokenizer=None, **options):
    """Save a model with random layers everywhere; returns them by name."""
    quantized = quantized_linears(model) | tables_of(model, **options)
    save(out, model, tokenizer, quantized, embed_bits=16, bits=3.2)
    return quantized


def made_dense(model, quantized):
    """The dense model with the numbers of the compressed layers."""
    for name, q in quantized.items():
        weight = model.get_submodule(name).weight
        weight.data = effective(q).to(weight.dtype)
    model.tie_weights()
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dense_model(tmp_path, family, tied):
    """gemma3 scales its embeddings, opt and gpt_neox have names of their own."""
    dtype = torch.bfloat16 if family in ("llama", "gemma3") else torch.float32
    model = tiny_model(family, dtype, tie_word_embeddings=tied)
    quantized = compress(tmp_path / "out", model, in_scale=tied)
    loaded = open_folder(tmp_path / "out", dtype)
    table, head, loaded_tied = embeddings(loaded)
    assert loaded_tied == tied and type(table[1]) is PackedEmbedding and type(head[1]) is PackedHead
    assert (head[1].weight is table[1].weight) == tied
    assert loaded.dtype == dtype
    assert_same_logits(logits(loaded), logits(made_dense(model, quantized)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_save_pretrained_gives_the_same_folder_again(tmp_path, family, tied):
    compress(tmp_path / "out", tiny_model(family, tie_word_embeddings=tied))
    first = open_folder(tmp_path / "out")
    first.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(open_folder(tmp_path / "again")), logits(first))
    assert stored(tmp_path / "again") == stored(tmp_path / "out")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")


def test_config_json_names_tables_apart_from_linears(tmp_path):
    quantized = compress(tmp_path / "out", tiny_model(tie_word_embeddings=False))
    config = config_of(tmp_path / "out")
    assert config["format_version"] == 3
    assert sorted(config["tables"]) == [HEAD, TABLE] and not {TABLE, HEAD} & set(config["linears"])
    assert config["tables"][HEAD] == quantized[HEAD].spec.entry()


def test_a_tied_table_is_stored_once(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"))
    names = [name for name in stored(tmp_path / "out") if not name.startswith("model.layers")]
    parts = ("codebook", "row_scale", "row_zero", "weight", "widths")
    assert sorted(names) == [*(f"{TABLE}.{part}" for part in parts), "model.norm.weight"]


@pytest.mark.parametrize("chosen", [TABLE, HEAD])
@pytest.mark.parametrize("embed_bits", [8, 16])
def test_what_is_no_layer_is_stored_in_embed_bits(tmp_path, chosen, embed_bits):
    model = tiny_model("llama", tie_word_embeddings=False)
    table = tables_of(model)[chosen]
    quantized = quantized_linears(model) | {chosen: table}
    save(tmp_path / "out", model, None, quantized, embed_bits=embed_bits, bits=3.2)
    loaded = open_folder(tmp_path / "out")
    other = loaded.get_submodule(HEAD if chosen == TABLE else TABLE)
    assert (type(other) in (torch.nn.Linear, torch.nn.Embedding)) == (embed_bits == 16)
    if embed_bits == 8:
        weight = model.get_submodule(HEAD if chosen == TABLE else TABLE).weight
        weight.data = other.dequantize()
    assert_same_logits(logits(loaded), logits(made_dense(model, quantized)))


def test_tables_may_be_sparse_or_grids(tmp_path):
    model = tiny_model("llama")
    q = with_options(random_quantized(*model.lm_head.weight.shape, in_scale=True), "2:4", 32, 16)
    quantized = mixed(quantized_linears(model)) | {TABLE: q}
    save(tmp_path / "out", model, None, quantized, embed_bits=8, bits=3.2)
    assert_same_logits(logits(open_folder(tmp_path / "out")), logits(made_dense(model, quantized)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_decoder_alone_loads_too(tmp_path, tied):
    compress(tmp_path / "out", tiny_model("llama", tie_word_embeddings=tied))
    whole = open_folder(tmp_path / "out")
    alone = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(alone(IDS)[0], whole.model(IDS)[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_token_is_decoded_and_text_generated(tmp_path, family):
    compress(tmp_path / "out", tiny_model(family))
    model = open_folder(tmp_path / "out")
    assert family != "llama" or isinstance(model.model.forward, decode.OneToken)
    with torch.no_grad():
        cache = model(IDS[:1, :-1], use_cache=True).past_key_values
        step = model(IDS[:1, -1:], past_key_values=cache).logits
    assert_same_logits(step[0, 0], logits(model)[0, -1])
    out = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 24)


def test_a_loaded_model_is_copied_and_pickled(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"))
    model = open_folder(tmp_path / "out")
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        twin.model.embed_tokens.row_scale.zero_()
        assert not logits(twin).any() and torch.equal(logits(model), want)


def test_casting_keeps_the_numbers(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"))
    model = open_folder(tmp_path / "out")
    want = model.model.embed_tokens.dequantize()
    assert torch.equal(model.to(torch.bfloat16).lm_head.dequantize(), want)
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dequantize_and_export_give_an_ordinary_model(tmp_path, tokenizer, family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    quantized = compress(tmp_path / "out", model, tokenizer)
    want = logits(made_dense(model, quantized))
    assert_same_logits(logits(open_folder(tmp_path / "out").dequantize()), want)
    export(tmp_path / "out", tmp_path / "dense", dtype=torch.float32)
    assert not (
        set(json.loads((tmp_path / "dense/config.json").read_text())) & {"quantization_config"}
    )
    assert_same_logits(logits(open_folder(tmp_path / "dense")), want)


def test_a_base_without_adapters_keeps_its_version_and_tables(tmp_path, tokenizer):
    model = tiny_model("llama")
    quantized = {
        name: with_options(q, rank=2, adapter_bits=4)
        for name, q in quantized_linears(model).items()
    } | tables_of(model)
    save(tmp_path / "out", model, tokenizer, quantized, embed_bits=16, bits=3.2)
    export(tmp_path / "out", tmp_path / "parts", "peft")
    assert config_of(tmp_path / "parts" / "base")["format_version"] == 3
    plain = {name: dequantize(q) for name, q in quantized.items()}
    for name, weight in plain.items():
        model.get_submodule(name).weight.data = weight
    assert_same_logits(logits(open_folder(tmp_path / "parts" / "base")), logits(model))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("embed_bits", [16, 8])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_plan_is_exact_to_the_byte(tmp_path, tokenizer, family, embed_bits, max_shard_size):
    model = tiny_model(family, torch.bfloat16, tie_word_embeddings=False)
    quantized = quantized_linears(model, widths=[2, 3, 7]) | tables_of(model)
    quantized.pop(list(tables_of(model))[-1])
    options = dict(embed_bits=embed_bits, bits=3.21, max_shard_size=max_shard_size)
    rest = plan_bytes(model, tokenizer, {n: q.spec for n, q in quantized.items()}, **options)
    out = save(tmp_path / "out", model, tokenizer, quantized, **options)
    assert folder_bytes(out) == rest + sum(pack(q).nbytes for q in quantized.values())


def test_write_packed_reads_tables_as_it_reads_linears(tmp_path):
    model = tiny_model("llama")
    quantized = compress(tmp_path / "want", model)
    parts = {
        f"{name}.{part}": tensor
        for name, q in quantized.items()
        for part, tensor in pack(q).tensors.items()
    }
    (tmp_path / "got").mkdir()
    specs = {name: q.spec for name, q in quantized.items()}
    write_packed(tmp_path / "got", model, None, specs, parts.get, embed_bits=16, bits=3.2)
    assert stored(tmp_path / "got") == stored(tmp_path / "want")
    assert config_of(tmp_path / "got") == config_of(tmp_path / "want")


def test_a_tied_head_cannot_be_a_layer_of_its_own(tmp_path):
    model = tiny_model("llama")
    quantized = {HEAD: random_quantized(*model.lm_head.weight.shape)}
    with pytest.raises(SkimError, match=f"{HEAD}: is tied to {TABLE}"):
        save(tmp_path / "out", model, None, quantized, embed_bits=8, bits=3.2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_inspect_shows_tables_and_counts_them_apart_from_linears(tmp_path, tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    quantized = compress(tmp_path / "out", model)
    facts = inspect(tmp_path / "out")
    names = [TABLE] if tied else [TABLE, HEAD]
    assert [table["name"] for table in facts["tables"]] == names
    sizes = {name: pack(quantized[name]).nbytes for name in names}
    assert {table["name"]: table["nbytes"] for table in facts["tables"]} == sizes
    assert facts["bytes_by_part"]["embeddings"] == sum(sizes.values())
    linears = sum(pack(q).nbytes for n, q in quantized.items() if n not in names)
    assert facts["bits_per_weight"] == 8 * linears / facts["weights"]
    assert len(facts["linears"]) == 14
    text = inspect_text(facts)
    bits = facts["tables"][0]["bits_per_weight"]
    assert f"embeddings ({bits:.4f}" in text and re.search(rf"^{TABLE} +\d+x64", text, re.M)


def test_tables_alone_may_be_compressed(tmp_path):
    model = tiny_model("llama")
    quantized = tables_of(model)
    save(tmp_path / "out", model, None, quantized, embed_bits=16, bits=16.0)
    assert inspect(tmp_path / "out")["linears"] == []
    assert_same_logits(logits(open_folder(tmp_path / "out")), logits(made_dense(model, quantized)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """An untied folder whose embedding and head are layers."""
    out = tmp_path_factory.mktemp("tables") / "out"
    model = tiny_model("llama", tie_word_embeddings=False)
    compress(out, model)
    return out


TENSORS = {
    "missing widths": (f"{TABLE}.widths", lambda t: None, "is missing"),
    "a width of 0": (f"{TABLE}.widths", spoil(3, 0), "row widths must be"),
    "shorter codes": (f"{TABLE}.weight", lambda t: t[:-1], "must be uint8"),
    "codes of another type": (f"{HEAD}.weight", lambda t: t.view(torch.int8), "must be uint8"),
    "a scale that is no number": (f"{HEAD}.row_scale", spoil(0, float("nan")), "NaN or Inf"),
    "a codebook of another size": (f"{HEAD}.codebook", lambda t: t[1:], "must be int8"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tampered_tables_are_refused(sound, tmp_path, case):
    name, change, message = TENSORS[case]
    folder = tmp_path / "out"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    tensors = {n: t.contiguous() for n, t in tensors.items() if t is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"model.safetensors: {name}: .*{message}") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def changed(config, *path, value):
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


ADAPTER = {"widths": {"4": 259}, "rank": 2, "adapter_bits": 4}
CONFIGS = {
    "an older version": (("format_version",), 2, "format_version 2 has no tables"),
    "tables not a map": (("tables",), 3, "tables must be a map of names"),
    "an entry that is none": (("tables", HEAD), 3, f"{HEAD}: has no valid width histogram"),
    "a linear": (("tables", UP), {"widths": {"4": 72}}, f"{UP}: is no embedding or head"),
    "nowhere": (("tables", "model.nowhere"), {}, "nowhere: is no embedding or head of this model"),
    "too many rows": (("tables", TABLE, "widths"), {"3": 300}, f"{TABLE}: widths of 300 rows"),
    "an adapter": (("tables", HEAD), ADAPTER, f"{HEAD}: .*no adapter"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_tampered_configs_are_refused(sound, tmp_path, case):
    path, value, message = CONFIGS[case]
    folder = tmp_path / "out"
    shutil.copytree(sound, folder)
    config = json.loads((folder / "config.json").read_text())
    rows = sum(config["quantization_config"]["tables"][TABLE]["widths"].values())
    if isinstance(value, dict) and "rank" in value:
        value = value | {"widths": {"4": rows}}
    changed(config["quantization_config"], *path, value=value)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tied_head_cannot_be_named(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    tables = config["quantization_config"]["tables"]
    tables[HEAD] = tables[TABLE]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"{HEAD}: is no embedding or head .*has {TABLE}$"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_load_opens_such_a_folder(tmp_path, tokenizer):
    compress(tmp_path / "out", tiny_model("llama"), tokenizer)
    model, _ = load(tmp_path / "out", torch.float32)
    assert torch.equal(logits(model), logits(open_folder(tmp_path / "out")))
