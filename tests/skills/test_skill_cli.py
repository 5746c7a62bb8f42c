"""`skim skill ...`, `generate --skill` and `inspect` in process: exit codes and exact lines."""

import functools
import json

import pytest
import torch
from click.testing import CliRunner

from conftest import quantized_linears
from skill_sample import CHAT, TEXT, skill_model
from skimlm.cli import main
from skimlm.errors import SkimError
from skimlm.models.checkpoint import load
from skimlm.models.write import save
from skimlm.skills import compression, evaluate, store


def run(*args: object):
    return CliRunner().invoke(main.main, [str(arg) for arg in args], prog_name="skimlm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny llama with a chat template, as a folder."""
    out = tmp_path_factory.mktemp("model")
    skill_model(dtype=torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").write_text(CHAT)
    return out


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "SKILL.md"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The same skill compressed to 24 tokens, alone in its folder."""
    place = tmp_path_factory.mktemp("packed")
    (place / "SKILL.md").write_text(TEXT)
    out = place / "a.skim"
    result = run("skill", "compress", place / "SKILL.md", out, "--model", folder, "--tokens", 24,
                 "--method", "head", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    (place / "SKILL.md").unlink()
    return out


@pytest.fixture
def quick(monkeypatch):
    """Settings that take a second."""
    some = functools.partial(compression.Settings, dev=4, answer=6, rows=3)
    monkeypatch.setattr(compression, "Settings", some)


def fails(result, line, code=1):
    """Check for one line on stderr and nothing on stdout."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.splitlines()[-1].startswith(line), result.stderr


def test_soft_tokens_are_as_few_as_do_and_print_their_evidence(folder, source, quick, monkeypatch):
    monkeypatch.setattr("skimlm.progress.EVERY", 0.0)  # every step gets a line
    out = source.with_name("a.skim")
    options = "--kind soft --train 6 --steps 2 --json".split()
    result = run("skill", "compress", source, out, "--model", folder, *options)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    tried = {row["method"] for row in facts["candidates"]}
    assert tried == {"distill", "head", "leads", "sections"}
    assert facts["evidence"]["questions"] == {"train": 6, "dev": 4}
    assert facts["source"] == "SKILL.md" and "distill" in result.stderr
    assert store.read(out).document.text == TEXT.rstrip()


def test_inspect_shows_a_skill(packed):
    result = run("inspect", packed)
    assert result.exit_code == 0 and "name               tidy-notes" in result.stdout
    facts = json.loads(run("inspect", packed, "--json").stdout)
    assert (facts["k"], facts["method"], facts["bytes"]) == (24, "head", packed.stat().st_size)


def test_inspect_prints_the_text_for_engines_that_take_nothing_else(folder, packed, source):
    assert run("inspect", packed, "--text").stdout == TEXT.rstrip() + "\n"
    fails(run("inspect", packed, "--text", "--json"), "Error: --text prints", 2)
    fails(run("inspect", folder, "--text"), "Error: --text prints", 2)
    short = source.with_name("short.skim")
    options = "--kind text --ratio 0.6 --train 4 --json".split()
    result = run("skill", "compress", source, short, "--model", folder, *options)
    assert result.exit_code == 0, result.output
    text = run("inspect", short, "--text").stdout
    assert text == store.read(short).content.text + "\n" and len(text) <= 0.6 * len(TEXT)


def test_a_folder_of_skills_is_compressed_as_their_catalogue(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "SKILL.md").write_text(TEXT.replace("tidy-notes", name))
    options = "--tokens 40 --train 4 --json".split()
    result = run("skill", "compress", tmp_path, tmp_path / "a.skim", "--model", folder, *options)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["name"], facts["kind"], facts["k"]) == ("skills", "kv", 40)


def test_eval_prints_one_object_with_the_agreed_keys(folder, packed):
    result = run(
        "skill", "eval", packed, "--model", folder, "--questions", 3, "--answer", 4, "--json"
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert {"mean_closure", "mean_ratio", "skills"} <= set(facts)
    keys = {"name", "text_tokens", "tokens", "closure", "kl", "kl_no_skill", "literal_recall"}
    assert keys | {"questions", "seconds"} <= set(facts["skills"][0])
    result = run("skill", "eval", packed, "--model", folder, "--questions", 2, "--answer", 4)
    assert result.stdout.startswith("skill") and "tidy-notes" in result.stdout


def test_generate_takes_compressed_and_plain_skills(folder, packed, source):
    prompt = ["generate", folder, "What now?", "--max-new-tokens", 6, "--json"]
    plain = json.loads(run(*prompt).stdout)
    both = json.loads(run(*prompt, "--skill", packed, "--skill", source).stdout)
    assert both["skill_tokens"] == 24 + len(TEXT.rstrip())
    wrapper = len("Relevant Skill:\n") + len("\n---\n") + len("\n\n")
    assert both["prompt_tokens"] == plain["prompt_tokens"] + both["skill_tokens"] + wrapper
    written = f"Relevant Skill:\n{TEXT.rstrip()}\n\nWhat now?"
    same = json.loads(run("generate", folder, written, *prompt[3:]).stdout)
    assert json.loads(run(*prompt, "--skill", source).stdout)["text"] == same["text"]


def test_generate_says_when_it_falls_back_to_the_full_text(packed, tmp_path, tokenizer):
    other = tmp_path / "other"
    model = skill_model(dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight += 0.5
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    result = run("generate", other, "Hi", "--skill", packed, "--max-new-tokens", 2, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["skill_tokens"] == len(TEXT.rstrip())
    line = f"warning: {packed}: made for another chat_template and model: its full text is used"
    assert line in result.stderr.splitlines()
    fails(run("skill", "eval", packed, "--model", other), f"error: {packed}: made for another")


def test_a_compressed_model_takes_skills(folder, tmp_path, tokenizer, source, quick):
    small, out = tmp_path / "small", tmp_path / "b.skim"
    model, _ = load(folder)
    save(small, model, tokenizer, quantized_linears(model), embed_bits=8, bits=4.5)
    options = ["--model", small, "--tokens", 16, "--train", 4, "--steps", 2]
    result = run("skill", "compress", source, out, *options)
    assert result.exit_code == 0, result.output
    result = run("generate", small, "Hi", "--skill", out, "--max-new-tokens", 3, "--json")
    assert json.loads(result.stdout)["skill_tokens"] == 16 and "warning" not in result.stderr


def test_mistakes_are_one_line(folder, source, packed, tmp_path):
    def compress(path, out, *more):
        return run("skill", "compress", path, out, "--model", folder, *more)

    out = tmp_path / "x.skim"
    fails(compress(tmp_path / "none.md", out), f"error: {tmp_path / 'none.md'}: No such file")
    fails(compress(source, tmp_path / "x.bin"), f"error: {tmp_path / 'x.bin'}: a compressed skill")
    fails(compress(source, packed), f"error: {packed}: exists, use --force to replace it")
    out.write_text("notes of mine")
    fails(compress(source, out), f"error: {out}: exists, use --force to replace it")
    fails(compress(source, out, "--force"), f"error: {out}: was not written by skimlm")
    assert out.read_text() == "notes of mine"
    out.unlink()
    fails(compress(source, out, "--method", "head"), "error: --method head needs a size")
    fails(compress(source, out, "--tokens", 9999), "error: 9,999 soft tokens for a text of")
    fails(compress(source, out, "--tokens", 4, "--ratio", 0.5), "Error: give one of --ratio", 2)
    fails(compress(source, out, "--ratio", 1.5), "Error: Invalid value for '--ratio'", 2)
    fails(run("skill", "compress", source, out), "Error: Missing option '--model'", 2)
    fails(run("skill", "eval", "--model", folder), "Error: Missing argument 'FILES...'", 2)
    source.write_bytes(b"---\xff")
    fails(compress(source, out), f"error: {source}: not UTF-8 text (byte 3)")
    source.write_text("no front matter")
    fails(compress(source, out), f"error: {source}: no front matter")
    source.write_text(TEXT + "many words " * 10_000)
    fails(compress(source, out), "error: tidy-notes: 110,4")
    fails(run("generate", folder, "Hi", "--skill", source), "error: prompt has 110,4")
    broken = tmp_path / "broken.skim"
    broken.write_bytes(packed.read_bytes()[:-9])
    fails(run("inspect", broken), f"error: {broken}: ")
    fails(run("generate", folder, "Hi", "--skill", broken), f"error: {broken}: ")
    assert not out.exists()


def test_a_plot_is_checked_before_the_work(folder, packed, monkeypatch, tmp_path):
    def stop(file):
        raise SkimError(f"{file}: no plot")

    monkeypatch.setattr(evaluate, "check_plot", stop)
    fails(
        run("skill", "eval", packed, "--model", folder, "--plot", "a.xyz"), "error: a.xyz: no plot"
    )
