"""What inspect says, against the files themselves."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import quantized_linears, tiny_model
from layer_sample import mixed
from skimlm.errors import FormatError, SkimError
from skimlm.evaluate.report import facts_text, inspect, inspect_text, table, with_error
from skimlm.models.write import save
from skimlm.progress import peak_rss_bytes
from skimlm.storage.folder import folder_bytes


@pytest.fixture(scope="module")
def folder_of_version_2(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "parts"
    model = tiny_model(dtype=torch.bfloat16)
    quantized = mixed(quantized_linears(model, in_scale=True))
    save(out, model, None, quantized, embed_bits=8, bits=4.5)
    return out, quantized


@pytest.fixture(scope="module", params=["tied", "untied"])
def compressed(request, tmp_path_factory, tokenizer):
    out = tmp_path_factory.mktemp("report") / "out"
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=request.param == "tied")
    quantized = quantized_linears(model, in_scale=True)
    facts = {"recipe": "best", "seed": 0}
    save(out, model, tokenizer, quantized, embed_bits=8, bits=4.5, provenance=facts)
    return out


def stored(out):
    return load_file(out / "model.safetensors")


def test_bits_count_every_stored_byte_of_the_linears(compressed):
    facts, tensors = inspect(compressed), stored(compressed)
    names = {name.removesuffix(".widths") for name in tensors if name.endswith(".widths")}
    assert {layer["name"] for layer in facts["linears"]} == names and len(names) == 14
    total = 0
    for layer in facts["linears"]:
        nbytes = sum(t.nbytes for n, t in tensors.items() if n.startswith(layer["name"] + "."))
        widths = tensors[layer["name"] + ".widths"].tolist()
        assert layer["nbytes"] == nbytes
        assert layer["widths"] == {str(b): widths.count(b) for b in sorted(set(widths))}
        assert layer["rows"] == len(widths) and layer["in_scale"]
        assert layer["bits_per_weight"] == 8 * nbytes / (layer["rows"] * layer["cols"])
        total += nbytes
    assert facts["weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 72 * 64)
    assert facts["bits_per_weight"] == 8 * total / facts["weights"]
    assert sum(facts["widths"].values()) == sum(layer["rows"] for layer in facts["linears"])


def test_everything_a_linear_has_is_shown_and_counted(folder_of_version_2):
    out, quantized = folder_of_version_2
    facts, tensors = inspect(out), stored(out)
    assert facts["format_version"] == 2 and json.loads(json.dumps(facts)) == facts
    total = 0
    for layer in facts["linears"]:
        name = layer["name"]
        facts_of = quantized[name].spec.facts()
        assert {key: layer[key] for key in facts_of} == facts_of
        mine = {n: t for n, t in tensors.items() if n.startswith(name + ".")}
        total += sum(t.nbytes for t in mine.values())
        assert layer["nbytes"] == sum(t.nbytes for t in mine.values())
    assert facts["bits_per_weight"] == 8 * total / facts["weights"]
    assert sum(facts["bytes_by_part"].values()) == facts["bytes"] == folder_bytes(out)
    lines = {line.split()[0]: line for line in inspect_text(facts).splitlines() if line}
    name = "model.layers.1.mlp."
    assert lines[name + "down_proj"].endswith(" scaled 2:4 group 32 rank 16 of 4 bit")
    assert lines[name + "gate_proj"].endswith(" scaled bitmap 33% rank 5 of 16 bit")
    assert lines[name + "up_proj"].endswith(" scaled")


def test_trellis_rows_are_shown_by_the_bits_of_their_codes(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    quantized = quantized_linears(model, widths=[19, 3])
    out = save(tmp_path / "out", model, None, quantized, embed_bits=8, bits=3.5)
    facts = inspect(out)
    rows = sum(q.shape[0] for q in quantized.values()) // 2
    assert facts["widths"] == {"3": rows, "19": rows} and facts["format_version"] == 3
    lines = inspect_text(facts).splitlines()
    assert f"rows by width    3 bit: {rows:,} (50.0%), t3 bit: {rows:,} (50.0%)" in lines
    assert any(line.endswith(" 3:32 t3:32") for line in lines)


def test_parts_add_up_to_the_folder(compressed):
    facts, tensors = inspect(compressed), stored(compressed)
    parts = facts["bytes_by_part"]
    assert facts["bytes"] == sum(f.stat().st_size for f in compressed.iterdir())
    assert sum(parts.values()) == facts["bytes"]
    tables = [t.nbytes for n, t in tensors.items() if re.search("embed_tokens|lm_head", n)]
    assert parts["embeddings"] == sum(tables) and len(tables) in (2, 4)
    norms = [t.nbytes for n, t in tensors.items() if "norm" in n]
    assert parts["other_tensors"] == sum(norms)
    assert facts["provenance"] == {"recipe": "best", "seed": 0}
    assert json.loads(json.dumps(facts)) == facts


def test_the_text_has_a_line_per_linear(compressed):
    facts = inspect(compressed)
    lines = inspect_text(facts).splitlines()
    assert lines[0] == f"{compressed}: llama, format 1"
    assert lines[1].startswith(f"bits per weight  {facts['bits_per_weight']:.4f}, everything")
    assert "recipe           best" in lines
    layer = facts["linears"][3]
    (line,) = (line for line in lines if line.startswith(layer["name"] + " "))
    assert line.split()[:3] == [layer["name"], "64x64", f"{layer['bits_per_weight']:.3f}"]
    assert line.endswith(" scaled")


def test_an_uncompressed_folder_is_refused(llama_folder):
    with pytest.raises(SkimError, match="not a compressed folder: make one with"):
        inspect(llama_folder)


def test_a_tampered_folder_is_refused(compressed, tmp_path):
    copied = shutil.copytree(compressed, tmp_path / "copy")
    tensors = stored(copied)
    tensors["model.layers.0.mlp.up_proj.widths"] += 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.safetensors: model\.layers\.0\.mlp\.up_proj\."):
        inspect(copied)


def test_a_table_aligns_numbers_right_and_names_left():
    rows = [["name", "bytes"], ["a", "1,000"], ["longer", "7"]]
    assert table(rows) == "name    bytes\na       1,000\nlonger      7"


def test_a_value_is_shown_with_its_error():
    assert with_error(21.6234, 0.5519) == "21.623 ± 0.552"
    assert with_error(21.6234, None) == "21.623 (one window)"


def test_peak_memory_is_at_least_what_is_held():
    before = peak_rss_bytes()
    held = torch.ones(50_000_000)
    assert peak_rss_bytes() >= max(before, held.nbytes)


def test_facts_are_one_line_each():
    facts = {"bits_per_weight": 3.19951, "bytes": 71234567, "seconds": {"fit": 1.25, "save": 3.0}}
    assert facts_text(facts | {"cached": True}).splitlines() == [
        "bits per weight    3.1995",
        "bytes              71,234,567",
        "seconds            fit 1.2, save 3.0",
        "cached             True",
    ]
