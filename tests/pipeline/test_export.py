"""Exports: an ordinary folder is the compressed model, and PEFT's files are its adapters."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import quantized_linears, tiny_model
from layer_sample import with_options
from skimlm.cli import main
from skimlm.errors import SkimError
from skimlm.evaluate.report import inspect
from skimlm.models.checkpoint import open_compressed
from skimlm.models.write import rewrite, save
from skimlm.pipeline.export import export
from skimlm.runtime.linear import CompressedLinear
from skimlm.storage.folder import folder_bytes

IDS = torch.arange(40).view(2, 20)
KINDS = [  # of linears, in turn
    dict(sparsity="2:4", kept=2, group=32, rank=16, adapter_bits=4),
    dict(sparsity="bitmap", kept=3, rank=5, adapter_bits=16),
    {},
    dict(rank=16, adapter_bits=16),
]


def compress(out, tokenizer, family="llama", kinds=KINDS, **changes):
    """A folder of linears of version 2, one kind after the other."""
    model = tiny_model(family, torch.bfloat16, **changes)
    quantized = {}
    for (name, q), kind in zip(
        quantized_linears(model).items(), itertools.cycle(kinds), strict=False
    ):
        kept = q.shape[1] // kind["kept"] if "kept" in kind else 0
        quantized[name] = with_options(q, **(kind | {"kept": kept})) if kind else q
    save(out, model, tokenizer, quantized, embed_bits=8, bits=5, max_shard_size="50KB")
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    out = compress(tmp_path_factory.mktemp("export") / "small", tokenizer)
    assert len(list(out.glob("*.safetensors"))) > 1
    return out


def opened(path, dtype=torch.float32):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def compressed_linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_export_is_the_compressed_model(tmp_path, tokenizer, family, tied, dtype):
    source = compress(tmp_path / "small", tokenizer, family, tie_word_embeddings=tied)
    report = export(source, tmp_path / "out", dtype=dtype)
    dense, compressed = opened(tmp_path / "out", dtype), opened(source, torch.float32)
    assert not hasattr(dense.config, "quantization_config")
    assert not compressed_linears(dense) and dense.config.dtype == dtype
    for name, layer in compressed_linears(compressed).items():
        assert torch.equal(dense.get_submodule(name).weight, layer.dequantize(dtype))
    got, want = logits(dense), logits(compressed)
    most = 1e-5 if dtype == torch.float32 else 4e-2
    assert float((got - want).norm() / want.norm()) < most
    assert report.bytes == folder_bytes(tmp_path / "out")
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_the_dtype_of_a_dense_export_is_the_models(tmp_path, folder):
    assert export(folder, tmp_path / "out").dtype == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_dense_export_needs_no_skimlm(tmp_path, folder):
    export(folder, tmp_path / "out", dtype=torch.float32)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r});"
        f"assert AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})('a').input_ids;"
        "assert 'skimlm' not in sys.modules;"
        "print(model(torch.arange(40).view(2, 20)).logits.double().sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    want = logits(opened(tmp_path / "out")).double().sum().item()
    assert float(result.stdout) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("dense_base", [True, False])
def test_base_and_adapter_of_peft_make_the_effective_weight_exactly(tmp_path, folder, dense_base):
    dtype = torch.float32 if dense_base else None
    report = export(folder, tmp_path / "out", "peft", dense_base=dense_base, dtype=dtype)
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    base, source = opened(tmp_path / "out/base"), opened(folder)
    assert len(compressed_linears(base)) == (0 if dense_base else 14)
    adapted = {n: m for n, m in compressed_linears(source).items() if m.spec.rank}
    assert sorted(config["target_modules"]) == sorted(adapted) and report.adapters == len(adapted)
    assert len(tensors) == 2 * len(adapted)
    for name, layer in compressed_linears(source).items():
        own = base.get_submodule(name)
        weight = own.weight if dense_base else own.dequantize()
        if name in adapted:
            a = tensors[f"base_model.model.{name}.lora_A.weight"]
            b = tensors[f"base_model.model.{name}.lora_B.weight"]
            rank = config["rank_pattern"].get(name, config["r"])
            alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
            assert alpha / rank == 1 and a.dtype == b.dtype == torch.float32
            assert a.shape == (rank, layer.in_features) and b.shape == (layer.out_features, rank)
            stored = layer.adapter_values()
            assert torch.equal(a, stored[0]) and torch.equal(b.T, stored[1])
            weight = torch.addmm(weight, b.T.contiguous().T, a)  # as memory lies in the layer
        assert torch.equal(weight, layer.dequantize())


def test_config_of_peft_has_what_peft_reads(tmp_path, folder):
    export(folder, tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["r"] == config["lora_alpha"] == 16 and config["bias"] == "none"
    assert config["use_rslora"] is False  # would scale by alpha / sqrt(r)
    assert set(config["rank_pattern"].values()) == {5}
    assert str(tmp_path) not in json.dumps(config)


def test_a_compressed_base_is_the_folder_without_its_adapters(tmp_path, folder):
    export(folder, tmp_path / "out", "peft")
    base = tmp_path / "out" / "base"
    old, new = (
        {
            name: tensor
            for file in path.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for path in (folder, base)
    )
    assert new.keys() == {name for name in old if ".lora_" not in name}
    assert all(torch.equal(new[name], old[name]) for name in new)
    assert (base / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(base)("a").input_ids
    facts = inspect(base)
    assert facts["format_version"] == 2 and not any(layer["rank"] for layer in facts["linears"])
    config = json.loads((base / "config.json").read_text())["quantization_config"]
    assert config["bits"] == pytest.approx(facts["bits_per_weight"], rel=1e-12)


def test_a_base_of_nothing_but_codes_has_the_first_format_version(tmp_path, tokenizer):
    source = compress(tmp_path / "small", tokenizer, kinds=KINDS[3:])
    export(source, tmp_path / "out", "peft")
    assert inspect(source)["format_version"] == 2
    assert inspect(tmp_path / "out" / "base")["format_version"] == 1


def test_a_folder_that_one_file_is_left_of_needs_no_index(tmp_path, folder):
    source = open_compressed(folder)
    first, *others = sorted(set(source.files.values()))
    left_out = {name: None for name, file in source.files.items() if file != first}
    rewrite(source, tmp_path, left_out, {})
    assert others and [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == source.files.keys() - left_out.keys()


def test_force_replaces_only_what_an_export_made(tmp_path, folder):
    out = tmp_path / "out"
    for to in ("peft", "dense"):
        export(folder, out / to, to)
        with pytest.raises(SkimError, match=f"{to}: exists, use --force to replace it"):
            export(folder, out / to, to)
        export(folder, out / to, to, force=True)
    with pytest.raises(SkimError, match="not written by skimlm, --force does not replace it"):
        export(folder, out, "peft", force=True)


def test_what_a_user_can_get_wrong_is_one_line(tmp_path, folder, llama_folder, tokenizer):
    plain = compress(tmp_path / "plain", tokenizer, kinds=[{}])

    def refused(path, words, out="out", **options):
        with pytest.raises(SkimError, match=words) as caught:
            export(path, tmp_path / out, **options)
        assert "\n" not in str(caught.value)

    refused(plain, "plain: has no adapters to export", to="peft")
    refused(llama_folder, "not a compressed folder: make one with `skimlm compress`")
    refused(tmp_path / "none", "no such file or folder")
    refused(folder, "is the model itself; name another folder", out=folder)
    refused(folder, "is the model itself; name another folder", out=folder, force=True)
    refused(folder, "export to dense or peft, got 'gguf'", to="gguf")
    refused(folder, "add --dense-base or export to dense", to="peft", dtype=torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--dtype", "float32"], ["--to", "peft", "--dense-base"]])
def test_the_command_prints_the_report(tmp_path, folder, options):
    args = ["export", folder, tmp_path / "out", *options, "--json"]
    result = CliRunner().invoke(main.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes"] == folder_bytes(tmp_path / "out")
    assert facts["to"] == ("peft" if "peft" in options else "dense")
    assert facts["dtype"] == ("float32" if "float32" in options else "bfloat16")
