"""docs/api.md does not lie: its examples run, in order, and it names all there is."""

import re
from pathlib import Path

import torch

import skimlm
from skill_sample import TEXT, chat_tokenizer, skill_model

DOCUMENT = (Path(__file__).parents[1] / "docs/api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.M | re.S)


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    skill_model(dtype=torch.bfloat16).save_pretrained("my-model")
    chat_tokenizer().save_pretrained("my-model")
    Path("notes.txt").write_text("Read every note before moving one. " * 300)
    Path("SKILL.md").write_text(TEXT)
    names = {"__name__": "__main__"}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"docs/api.md, example {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("bits must be 1.5 to 8, got 99")


def test_every_public_name_is_in_it():
    missing = [n for n in skimlm.__all__ if n not in DOCUMENT and n != "__version__"]
    assert missing == []
    methods = [n for kind in (skimlm.Model, skimlm.Skill) for n in vars(kind) if n[0] != "_"]
    assert [
        n for n in methods if f"`{n}`" not in DOCUMENT and n not in ("notice", "stored", "where")
    ] == []
