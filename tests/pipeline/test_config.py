"""The config: what is allowed, what stands for a default, and that it comes back from a folder."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from skimlm.errors import SkimError
from skimlm.format.row_codes import MAX_TABLE_WIDTH, MAX_WIDTH
from skimlm.pipeline import config as module
from skimlm.pipeline.budget import Target
from skimlm.pipeline.config import DEFAULTS, METHODS, OPTIONS, CompressConfig, default_text
from skimlm.quantize.mask import Sparsity
from skimlm.quantize.slim import Options

EVERYTHING = dict(
    method="skim",
    recipe="fast",
    bits=3.4,
    sparsity="2:4",
    rank=0.25,
    adapter_bits=16,
    embed_bits=4,
    text="/somewhere/words.jsonl",
    text_key="a,b",
    samples=12,
    seq_len=96,
    seed=7,
    include=("*q_proj", "*k_proj"),
    exclude=("*.0.*",),
    revision="v1",
    cache_dir="/cache",
    force=True,
    resume=True,
    max_memory=8_000_000_000,
    workers=2,
    dry_run=True,
)


def test_every_field_says_what_it_is_for_and_its_default_is_allowed():
    assert list(OPTIONS) == [f.name for f in dataclasses.fields(CompressConfig)]
    for name, option in OPTIONS.items():
        assert option.help and option.help[0].isupper() or option.help.startswith(("skim", "paper"))
        if DEFAULTS[name] is not None:
            assert option.checked(name, DEFAULTS[name]) == DEFAULTS[name]


def test_widths_are_those_of_the_format():
    assert (module.WIDEST, module.WIDEST_TABLE) == (MAX_WIDTH, MAX_TABLE_WIDTH)


def test_it_goes_to_json_and_back():
    for config in (CompressConfig(), CompressConfig(**EVERYTHING)):
        values = json.loads(json.dumps(config.to_json()))
        assert CompressConfig.from_json(values) == config
    assert CompressConfig.from_json({}) == CompressConfig()


def test_what_stands_for_a_default_is_filled_in():
    now = CompressConfig(recipe="fast").resolved()
    assert (now.bits, now.sparsity, now.rank, now.adapter_bits) == (3.2, "none", 0.0, None)
    assert (now.samples, now.seq_len) == (40, 512)
    now = CompressConfig(method="slim", recipe="fast", samples=9).resolved()
    assert (now.bits, now.sparsity, now.rank, now.adapter_bits) == (4.0, "2:4", 0.1, 4)
    assert (now.samples, now.seq_len) == (9, 512) and now.resolved() == now
    assert CompressConfig(size=10**6).resolved().bits is None
    assert CompressConfig(index_bits=3).resolved().bits is None
    changed = dataclasses.replace(CompressConfig(method="slim"), method="skim")
    assert changed == CompressConfig()  # a default is not kept as if it had been given


def test_numbers_of_the_recipe_and_the_layers_follow():
    config = CompressConfig(method="slim", recipe="fast", samples=9, bits=3, sparsity="0.5", rank=0)
    assert config.settings == dataclasses.replace(METHODS["slim"].recipes["fast"], samples=9)
    assert config.options == Options(3, Sparsity(ratio=0.5), 0.0, 4, None, rounds=2)
    assert CompressConfig(method="slim", recipe="paper").options.group == 0
    assert CompressConfig().options is None
    assert CompressConfig(rank=0.2).options == Options(3, None, 0.2, 4, None, rounds=3)
    assert CompressConfig(size=5).target == Target(3.2, 5, None)
    assert CompressConfig(method="slim").target == Target(4.0, None, None)


def test_paths_and_sizes_may_be_given_as_people_write_them():
    config = CompressConfig(
        text=Path("a") / "b", size="1.2GB", max_memory="8 gb", include="*up", sparsity=0.5
    )
    assert (config.text, config.size, config.max_memory) == ("a/b", 1_200_000_000, 8_000_000_000)
    assert (config.include, config.sparsity) == (("*up",), "0.5")
    assert CompressConfig(sparsity="0.50") == CompressConfig(sparsity=0.5)
    assert CompressConfig(include=["a", "b"]).include == ("a", "b")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(method="slimmer"), "method must be skim or slim, got 'slimmer'"),
        (dict(recipe=3), "recipe must be paper, fast or best, got 3"),
        (dict(bits=9), "bits must be 1.5 to 8, got 9"),
        (dict(bits=True), "bits must be 1.5 to 8, got True"),
        (dict(bits="3"), "bits must be 1.5 to 8, got '3'"),
        (dict(bits=float("nan")), "bits must be 1.5 to 8, got nan"),
        (dict(size="80MiB"), "size must be at least 1, got '80MiB'"),
        (dict(size=0), "size must be at least 1, got 0"),
        (dict(size=1.5), "size must be at least 1, got 1.5"),
        (dict(index_bits=9), "index-bits must be 1 to 8, got 9"),
        (dict(sparsity="5:4"), "sparsity must be none, N:M such as 2:4"),
        (dict(rank=1.5), "rank must be 0 to 1, got 1.5"),
        (dict(adapter_bits=8), "adapter-bits must be 16 or 4, got 8"),
        (dict(embed_bits=5), "embed-bits must be 16, 8 or 4, got 5"),
        (dict(samples=0), "samples must be at least 1, got 0"),
        (dict(samples=1), "samples must be at least 2 with recipe best"),
        (dict(seq_len=1), "seq-len must be at least 2, got 1"),
        (dict(seed=-1), "seed must be at least 0, got -1"),
        (dict(force="yes"), "force must be true or false, got 'yes'"),
        (dict(text="a\0b"), r"text must be text, got 'a\x00b'"),
        (dict(include=[3]), "include must be text, got 3"),
        (dict(bits=3, size=5), "give one of --bits, --size and --index-bits"),
        (dict(workers=1, ray="auto"), "give one of --workers and --ray"),
        (dict(recipe="paper", rank=0.1), "recipe paper is SKIM as published"),
        (dict(sparsity="2:4", index_bits=6), "index-bits must be 1 to 5, got 6"),
        (dict(method="slim", size=10**6), "method slim has one width"),
        (dict(method="slim", bits=3.2), "with method slim bits are the width"),
        (dict(method="slim", bits=6), "2 to 5 with recipe best, got 6"),
    ],
)
def test_what_is_not_allowed_is_one_line(values, message):
    with pytest.raises(SkimError) as caught:
        CompressConfig(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_is_one_line():
    with pytest.raises(SkimError, match="^no option 'bitz': allowed are method, recipe"):
        CompressConfig.from_json({"bitz": 3})
    with pytest.raises(SkimError, match="a map of names"):
        CompressConfig.from_json([3])


def folder(place: Path, provenance: object) -> Path:
    config = {"quantization_config": {"provenance": provenance}}
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_what_determines_the_result_comes_back_from_a_folder(tmp_path):
    config = CompressConfig(**EVERYTHING)
    back = CompressConfig.from_folder(folder(tmp_path, {"config": config.provenance()}))
    changes = {name: DEFAULTS[name] for name, option in OPTIONS.items() if not option.result}
    assert back == dataclasses.replace(config, text="words.jsonl", **changes)
    assert set(changes) == {
        *("cache_dir", "force", "resume", "max_memory", "workers", "ray"),
        *("allow_partial", "dry_run"),
    }
    plain = CompressConfig(method="slim")
    back = CompressConfig.from_folder(folder(tmp_path, {"config": plain.provenance()}))
    assert back == plain.resolved()


def test_a_folder_that_does_not_say_is_one_line(tmp_path):
    with pytest.raises(SkimError, match="config.json: cannot be read: "):
        CompressConfig.from_folder(tmp_path)
    for provenance in ({"recipe": "best"}, [], None):
        with pytest.raises(SkimError, match="does not say what the folder was made with"):
            CompressConfig.from_folder(folder(tmp_path, provenance))
    for bad in ({"bits": 99}, {"x": 1}, [1], {"embed_bits": {}}):
        with pytest.raises(SkimError, match="config.json: .*(must be|no option|a map)"):
            CompressConfig.from_folder(folder(tmp_path, {"config": bad}))


def test_defaults_are_told_by_method():
    assert default_text("bits") == "3.2; slim: 4"
    assert default_text("sparsity") == "none; slim: 2:4"
    assert default_text("rank") == "0; slim: 0.1"
    assert default_text("adapter_bits") == "4"
    assert (default_text("seed"), default_text("recipe"), default_text("text")) == ("0", "best", "")


def test_reading_a_config_imports_no_torch():
    code = (
        "import sys, importlib.util as u\n"
        "sys.modules['skimlm'] = u.module_from_spec(u.find_spec('skimlm'))\n"  # its __init__ aside
        "from skimlm.pipeline.config import CompressConfig\n"
        "CompressConfig(bits=3).to_json()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
