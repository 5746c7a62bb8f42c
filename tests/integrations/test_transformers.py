"""A compressed folder in plain transformers: every family, tied and untied, and tampered with."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from conftest import FAMILIES, quantized_linears, tiny_model
from folder_sample import IDS, assert_same_logits, config_of, logits, open_folder, stored
from layer_sample import mixed
from skimlm.errors import FormatError
from skimlm.format import effective, pack
from skimlm.integrations.transformers import SkimlmConfig
from skimlm.models.blocks import embeddings
from skimlm.models.checkpoint import load
from skimlm.models.write import plan_bytes, save
from skimlm.runtime import decode
from skimlm.runtime.linear import CompressedLinear
from skimlm.runtime.tables import CompressedEmbedding, CompressedHead
from skimlm.storage.folder import folder_bytes


def compress(out, model, tokenizer=None, embed_bits=8, **kwargs):
    """Save a model with random compressed linears; returns them by name."""
    quantized = quantized_linears(model, **kwargs)
    save(out, model, tokenizer, quantized, embed_bits=embed_bits, bits=3.2)
    return quantized


def compress_mixed(out, model, tokenizer=None, **kwargs):
    """`compress` with linears of format version 2."""
    quantized = mixed(quantized_linears(model, **kwargs))
    save(out, model, tokenizer, quantized, embed_bits=8, bits=3.2)
    return quantized


def make_dense(model, quantized, loaded):
    """Put the numbers of a compressed model into the dense one it came from."""
    for name, q in quantized.items():
        weight = model.get_submodule(name).weight
        weight.data = effective(q).to(weight.dtype)
    (table, compressed), head, tied = embeddings(loaded)
    if isinstance(compressed, CompressedEmbedding):
        model.get_submodule(table).weight.data = compressed.dequantize(model.dtype)
        tied or setattr(
            model.get_submodule(head[0]).weight, "data", head[1].dequantize(model.dtype)
        )
    return model


@pytest.mark.parametrize("embed_bits", [8, 4, 16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dense_model(tmp_path, family, tied, embed_bits):
    dtype = torch.bfloat16 if embed_bits == 8 else torch.float32
    model = tiny_model(family, dtype, tie_word_embeddings=tied)
    quantized = compress(tmp_path / "out", model, embed_bits=embed_bits, in_scale=tied)
    loaded = open_folder(tmp_path / "out", dtype)
    table, head, loaded_tied = embeddings(loaded)
    assert loaded_tied == tied
    assert (head[1].weight is table[1].weight) == tied
    assert isinstance(table[1], CompressedEmbedding) == (embed_bits != 16)
    assert loaded.dtype == dtype
    assert_same_logits(logits(loaded), logits(make_dense(model, quantized, loaded)))


@pytest.mark.parametrize("embed_bits", [8, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_round_trip_is_bit_equal(tmp_path, family, embed_bits):
    compress(tmp_path / "out", tiny_model(family), embed_bits=embed_bits, in_scale=True)
    first = open_folder(tmp_path / "out")
    first.save_pretrained(tmp_path / "again")
    second = open_folder(tmp_path / "again")
    assert torch.equal(logits(first), logits(second))
    assert stored(tmp_path / "again") == stored(tmp_path / "out")
    old, new = (
        json.loads((tmp_path / d / "config.json").read_text())["quantization_config"]
        for d in ("out", "again")
    )
    assert old == new


def check_comes_back(tmp_path, model, quantized, version):
    """The folder `out` loads, runs, is saved again as it is, and becomes dense again."""
    loaded = open_folder(tmp_path / "out")
    want = logits(loaded)
    assert_same_logits(want, logits(make_dense(model, quantized, loaded)))
    loaded.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "out")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")
    assert config_of(tmp_path / "out")["format_version"] == version
    assert torch.equal(logits(open_folder(tmp_path / "again")), want)
    assert_same_logits(logits(loaded.dequantize()), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_version_2_load_run_and_come_back(tmp_path, family):
    model = tiny_model(family)
    check_comes_back(tmp_path, model, compress_mixed(tmp_path / "out", model, in_scale=True), 2)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_trellis_rows_load_run_and_come_back_in_a_folder_of_version_3(tmp_path, family):
    model, widths = tiny_model(family), [19, 3, 18, 17, 7, 20]
    quantized = compress(tmp_path / "out", model, in_scale=True, widths=widths)
    check_comes_back(tmp_path, model, quantized, 3)


def test_linears_of_version_1_keep_a_folder_at_version_1(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"))
    config = config_of(tmp_path / "out")
    assert config["format_version"] == 1
    assert all(entry.keys() == {"widths", "in_scale"} for entry in config["linears"].values())


def test_blocks_of_version_2_decode_natively(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    compress_mixed(tmp_path / "out", model)
    loaded = open_folder(tmp_path / "out")
    assert isinstance(loaded.model.forward, decode.OneToken)
    with torch.no_grad():
        cache = loaded(IDS[:1, :-1], use_cache=True).past_key_values
        step = loaded(IDS[:1, -1:], past_key_values=cache).logits
    assert_same_logits(step[0, 0], logits(loaded)[0, -1])


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_plan_of_linears_of_version_2_is_exact_to_the_byte(
    tmp_path, tokenizer, family, max_shard_size
):
    model = tiny_model(family, torch.bfloat16)
    quantized = mixed(quantized_linears(model, in_scale=True, widths=[2, 3, 7]))
    specs = {name: q.spec for name, q in quantized.items()}
    options = dict(embed_bits=8, bits=3.21, provenance={"seed": 1}, max_shard_size=max_shard_size)
    rest = plan_bytes(model, tokenizer, specs, **options)
    out = save(tmp_path / "out", model, tokenizer, quantized, **options)
    assert folder_bytes(out) == rest + sum(pack(q).nbytes for q in quantized.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_works(tmp_path, family):
    compress(tmp_path / "out", tiny_model(family))
    model = open_folder(tmp_path / "out", torch.bfloat16)
    out = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 24)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_a_static_cache_and_an_assistant_give_the_same_tokens(tmp_path, family):
    compress(tmp_path / "out", tiny_model(family))
    compress(tmp_path / "small", tiny_model(family, num_hidden_layers=1))
    model, small = open_folder(tmp_path / "out"), open_folder(tmp_path / "small")
    how = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    want = model.generate(IDS[:1], **how)
    assert torch.equal(model.generate(IDS[:1], **how, cache_implementation="static"), want)
    assert torch.equal(model.generate(IDS[:1], **how, assistant_model=small), want)
    dense = open_folder(tmp_path / "out").dequantize()
    assert torch.equal(dense.generate(IDS[:1], **how, assistant_model=model), want)


def test_a_pipeline_goes_on_with_a_text(tmp_path, tokenizer):
    compress(tmp_path / "out", tiny_model("llama"), tokenizer)
    made = pipeline("text-generation", str(tmp_path / "out"), dtype=torch.float32)
    (got,) = made("Read every", max_new_tokens=5, do_sample=False)
    model = open_folder(tmp_path / "out")
    ids = tokenizer("Read every", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert got["generated_text"] == tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_dequantize_gives_an_ordinary_model(tmp_path, family, tied):
    compress(tmp_path / "out", tiny_model(family, tie_word_embeddings=tied))
    model = open_folder(tmp_path / "out")
    assert_same_logits(logits(model.dequantize()), logits(open_folder(tmp_path / "out")))
    want = logits(model)
    kinds = {type(m) for m in model.modules()}
    assert not kinds & {CompressedLinear, CompressedEmbedding, CompressedHead}
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(logits(open_folder(tmp_path / "dense")), want)


def test_a_tied_table_is_stored_once(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"))
    names = [name for name in stored(tmp_path / "out") if not name.startswith("model.layers")]
    assert sorted(names) == [
        "model.embed_tokens.scale",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]


def test_linears_left_out_stay_dense(tmp_path):
    model = tiny_model("llama")
    quantized = quantized_linears(model)
    del quantized["model.layers.0.mlp.up_proj"]
    save(tmp_path / "out", model, None, quantized, embed_bits=8, bits=3.2)
    loaded = open_folder(tmp_path / "out")
    kept = loaded.model.layers[0].mlp.up_proj
    assert type(kept) is torch.nn.Linear
    assert torch.equal(kept.weight, model.model.layers[0].mlp.up_proj.weight)


def test_the_default_dtype_is_the_one_it_was_saved_in(tmp_path):
    compress(tmp_path / "out", tiny_model("llama", torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_casting_a_loaded_model_keeps_its_numbers(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"), in_scale=True)
    model = open_folder(tmp_path / "out")
    want = model.model.layers[0].mlp.up_proj.dequantize()
    assert torch.equal(model.to(torch.bfloat16).model.layers[0].mlp.up_proj.dequantize(), want)
    assert model(IDS).logits.dtype == torch.bfloat16


def test_the_decoder_alone_loads_too(tmp_path):
    compress(tmp_path / "out", tiny_model("llama"))
    whole = open_folder(tmp_path / "out")
    alone = open_folder(tmp_path / "out", cls=AutoModel)
    with torch.no_grad():
        assert torch.equal(alone(IDS)[0], whole.model(IDS)[0])


def test_sharded_folders_load(tmp_path):
    model = tiny_model("llama")
    quantized = quantized_linears(model)
    save(tmp_path / "one", model, None, quantized, embed_bits=8, bits=3.2)
    save(tmp_path / "many", model, None, quantized, embed_bits=8, bits=3.2, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-0000*-of-0000*.safetensors"))) > 2
    assert torch.equal(
        logits(open_folder(tmp_path / "many")), logits(open_folder(tmp_path / "one"))
    )


def test_compressing_while_loading_is_refused(llama_folder):
    with pytest.raises(ValueError, match="skimlm does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=SkimlmConfig())


def test_without_skimlm_transformers_refuses_the_folder(tmp_path):
    """The one thing that must never happen is a model with random linears."""
    compress(tmp_path / "out", tiny_model("llama"))
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print('loaded', 'skimlm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "size" in done.stderr and "RuntimeError" in done.stderr


# ---- tampering: every case must be refused by from_pretrained, naming file and tensor


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    """A compressed untied llama; copied, never changed."""
    out = tmp_path_factory.mktemp("sound") / "out"
    compress(out, tiny_model("llama", tie_word_embeddings=False), tokenizer, in_scale=True)
    return out


@pytest.fixture(scope="module")
def sound_parts(tmp_path_factory, tokenizer):
    """The same with parts: DOWN is 2:4 on a grid, GATE a bitmap of codebooks, UP has none."""
    out = tmp_path_factory.mktemp("parts") / "out"
    compress_mixed(out, tiny_model("llama", tie_word_embeddings=False), tokenizer)
    return out


UP, DOWN, GATE = (f"model.layers.1.mlp.{name}_proj" for name in ("up", "down", "gate"))
TENSORS = {
    "short codes": (f"{UP}.weight", lambda t: t[:-1], "must be uint8"),
    "long codes": (f"{UP}.weight", lambda t: torch.cat((t, t)), "must be uint8"),
    "codes of another dtype": (f"{UP}.weight", lambda t: t.to(torch.int8), "must be uint8"),
    "width 9": (f"{UP}.widths", lambda t: t * 0 + 9, r"row widths must be .*, got 9"),
    "widths that move rows": (f"{UP}.widths", lambda t: 9 - t, "are not config.json's"),
    "NaN row scale": (f"{UP}.row_scale", lambda t: t * float("nan"), "holds NaN or Inf"),
    "Inf input scale": (f"{UP}.in_scale", lambda t: t / 0, "holds NaN or Inf"),
    "short codebook": (f"{UP}.codebook", lambda t: t[1:], "must be int8"),
    "no zero points": (f"{UP}.row_zero", None, "is missing"),
    "no codes": (f"{UP}.weight", None, "is missing"),
    "no input scale": (f"{UP}.in_scale", None, "is missing"),
    "Inf table scale": ("lm_head.scale", lambda t: t / 0, "holds NaN or Inf"),
    "no table scale": ("model.embed_tokens.scale", None, "is missing"),
    "table of floats": ("lm_head.weight", lambda t: t.float(), "must be torch.int8"),
    "table of another width": (
        "model.embed_tokens.weight",
        lambda t: t[:, 1:],
        "must be torch.int8",
    ),
}


TRELLIS_TENSORS = {
    "no trellis": (f"{UP}.trellis", None, "is missing"),
    "one table of two": (f"{UP}.trellis", lambda t: t[:1], "must be int8"),
    "a trellis without sign": (f"{UP}.trellis", lambda t: t.byte(), "must be int8"),
    "rows of a code": (f"{UP}.widths", lambda t: t % 16, "are not config.json's"),
}


@pytest.fixture(scope="module")
def sound_trellis(tmp_path_factory, tokenizer):
    """The same with trellis rows of 2 and 3 bits."""
    out = tmp_path_factory.mktemp("trellis") / "out"
    model = tiny_model("llama", tie_word_embeddings=False)
    compress(out, model, tokenizer, widths=[19, 3, 18])
    return out


PART_TENSORS = {
    "no positions": (f"{DOWN}.positions", None, "is missing"),
    "short positions": (f"{DOWN}.positions", lambda t: t[1:], "must be uint8"),
    "all codes": (f"{DOWN}.weight", lambda t: torch.cat((t, t)), "must be uint8"),
    "a full bitmap": (
        f"{GATE}.positions",
        lambda t: t | 255,
        "every row must keep 21 columns, got",
    ),
    "a NaN on the grid": (f"{DOWN}.row_scale", lambda t: t * float("nan"), "holds NaN or Inf"),
    "a scale per row": (f"{DOWN}.row_scale", lambda t: t[:, 0], "must be bfloat16"),
    "no A": (f"{GATE}.lora_a", None, "is missing"),
    "Inf in B": (f"{GATE}.lora_b", lambda t: t / 0, "holds NaN or Inf"),
    "another rank": (f"{DOWN}.lora_b", lambda t: t[1:], "must be uint8"),
    "no scales of B": (f"{DOWN}.lora_b_scale", None, "is missing"),
    "a codebook on a grid": (f"{DOWN}.codebook", lambda _: torch.zeros(3).char(), "not belong"),
    "an adapter nobody asked for": (f"{UP}.lora_a", lambda _: torch.zeros(3, 64), "not belong"),
}


@pytest.mark.parametrize("case", [*TENSORS, *PART_TENSORS, *TRELLIS_TENSORS])
def test_tampered_tensors_are_refused(sound, sound_parts, sound_trellis, tmp_path, case):
    name, change, message = (TENSORS | PART_TENSORS | TRELLIS_TENSORS)[case]
    folder, with_trellis = tmp_path / "out", sound_trellis if case in TRELLIS_TENSORS else None
    shutil.copytree(with_trellis or (sound if case in TENSORS else sound_parts), folder)
    tensors = load_file(folder / "model.safetensors")
    old = tensors.pop(name, None)
    if change:
        tensors[name] = change(old).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    text = str(caught.value)
    assert "model.safetensors" in text and "\n" not in text
    assert name.rpartition(".")[0] in text


def test_widths_must_be_those_of_the_config(sound, tmp_path):
    """Two rows that swap a narrow and a wide width leave every shape as it was; three do not."""
    folder = tmp_path / "out"
    shutil.copytree(sound, folder)
    config = json.loads((folder / "config.json").read_text())
    counts = config["quantization_config"]["linears"][UP]["widths"]
    counts["2"], counts["3"] = counts["2"] + 1, counts["3"] - 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"{UP}.widths: rows by width .* are not config.json's"):
        AutoModelForCausalLM.from_pretrained(folder)


def setter(*path):
    def change(config, value):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


LINEAR = ("linears", UP)
CONFIGS = {
    "newer version": (setter("format_version"), 4, "format_version 4, this skimlm reads 1 to 3"),
    "parts in version 1": (setter(*LINEAR, "group"), 64, f"{UP}: format_version 1 has no group"),
    "trellis rows in version 1": (
        setter(*LINEAR, "widths"),
        {"3": 60, "18": 2, "19": 10},
        f"{UP}: format_version 1 has no trellis rows",
    ),
    "odd embed bits": (setter("embed_bits"), 5, "embed_bits must be 4, 8 or 16, got 5"),
    "width 9": (setter(*LINEAR, "widths"), {"9": 72}, f"{UP}: has no valid width histogram"),
    "negative rows": (setter(*LINEAR, "widths"), {"2": 73, "3": -1}, "no valid width histogram"),
    "widths not a map": (setter(*LINEAR, "widths"), [72], f"{UP}: has no valid width histogram"),
    "too many rows": (setter(*LINEAR, "widths"), {"3": 73}, f"{UP}: widths of 73 rows, .* 72"),
    "unknown linear": (
        setter("linears", "model.nowhere"),
        {"widths": {"3": 1}},
        "model.nowhere: is",
    ),
    "a norm": (
        setter("linears", "model.norm"),
        {"widths": {"3": 64}},
        "model.norm: is not a linear",
    ),
    "linears not a map": (setter("linears"), 3, "linears must be a map"),
}


HALF = ("linears", DOWN)
PART_CONFIGS = {
    "version 1 with parts": (setter("format_version"), 1, "format_version 1 has no sparsity, kept"),
    "another sparsity": (setter(*HALF, "sparsity"), "1:4", f"{DOWN}: sparsity must be '2:4' or"),
    "2:4 as a bitmap": (setter(*HALF, "sparsity"), "bitmap", f"{DOWN}.positions: must be uint8"),
    "kept as text": (setter(*HALF, "kept"), "36", f"{DOWN}: kept must be a positive integer"),
    "more kept": (setter(*HALF, "kept"), 37, f"{DOWN}: 2:4 keeps half .* not 37 of 72"),
    "kept of another bitmap": (setter("linears", GATE, "kept"), 20, f"{GATE}.weight: must be"),
    "group 0": (setter(*HALF, "group"), 0, f"{DOWN}: group must be a positive integer, got 0"),
    "wider groups": (setter(*HALF, "group"), 36, f"{DOWN}.row_scale: must be bfloat16"),
    "rank 17": (setter(*HALF, "rank"), 17, f"{DOWN}.lora_a: must be uint8"),
    "an endless rank": (setter(*HALF, "rank"), 2**70, f"{DOWN}: rank must be 1..65536"),
    "8 bits": (setter(*HALF, "adapter_bits"), 8, f"{DOWN}: adapter_bits must be 4 or 16"),
    "16 bits": (setter(*HALF, "adapter_bits"), 16, f"{DOWN}.lora_a: must be bfloat16"),
    "no bits": (setter(*HALF, "adapter_bits"), None, f"{DOWN}: adapter_bits must be a positive"),
    "an adapter too many": (
        setter("linears", UP),
        {"widths": {"4": 72}, "rank": 2, "adapter_bits": 4},
        f"{UP}.* is missing|{UP}.* must be",
    ),
}


@pytest.mark.parametrize("case", [*CONFIGS, *PART_CONFIGS])
def test_tampered_configs_are_refused(sound, sound_parts, tmp_path, case):
    change, value, message = (CONFIGS | PART_CONFIGS)[case]
    folder = tmp_path / "out"
    shutil.copytree(sound if case in CONFIGS else sound_parts, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"], value)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert re.search(r"config\.json|\.safetensors", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_truncated_compressed_file_is_named_with_the_tensor_it_cuts(sound, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(sound, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(FormatError, match=r"model.safetensors: .*: truncated: ends at byte"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FormatError, match=r"model.safetensors: .*: truncated: ends at byte"):
        load(folder)


def test_surplus_tensors_are_refused_by_load(sound, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors") | {"model.stray": torch.zeros(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="model.safetensors: model.stray: does not belong"):
        load(folder)


def test_norms_of_a_compressed_folder_must_be_finite(sound, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="model.safetensors: model.norm.weight: holds NaN or Inf"):
        load(folder)


def test_load_opens_a_compressed_folder(sound, tokenizer):
    model, loaded_tokenizer = load(sound, torch.float32)
    assert torch.equal(logits(model), logits(open_folder(sound)))
    assert not model.training
    assert loaded_tokenizer("hi").input_ids == tokenizer("hi").input_ids
