"""The README does not lie: its commands parse, its Python runs, its first screen is in place."""

import re
import shlex
from pathlib import Path

import click
import pytest
import torch

from conftest import quantized_linears, tiny_model
from skimlm.cli import main
from skimlm.models.write import save

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INLINE = re.findall(r"`(skimlm [^`]*)`", README)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


SHELL = [
    line.partition(" #")[0].strip()
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("skimlm ")
]


@pytest.fixture
def small(tmp_path, monkeypatch, tokenizer):
    """A working directory with a compressed tiny model called `small`."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(dtype=torch.bfloat16)
    quantized = quantized_linears(model)
    save("small", model, tokenizer, quantized, embed_bits=8, bits=4.5)
    return tmp_path


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `skimlm WORDS` runs, and its arguments."""
    command, args = main.main, words
    while isinstance(command, click.Group):
        command, args = command.commands[args[0]], args[1:]
    return command, args


def every_command(group: click.Group = main.main) -> list[click.Command]:
    """All commands, those of groups too."""
    found = []
    for command in group.commands.values():
        found += every_command(command) if isinstance(command, click.Group) else [command]
    return found


@pytest.mark.parametrize("line", SHELL)
def test_a_shell_command_parses(line, small):
    command, args = find(shlex.split(line)[1:])
    assert command.make_context(command.name, args).params


@pytest.mark.parametrize("line", INLINE)
def test_a_command_in_the_text_exists_with_its_options(line):
    command, args = find(line.split()[1:])
    options = {flag for param in command.params for flag in param.opts}
    assert {arg for arg in args if arg.startswith("--")} <= options


def test_every_option_in_the_text_exists():
    known = {
        flag
        for command in every_command()
        for param in command.params
        if isinstance(param, click.Option)
        for flag in param.opts
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_every_command_is_listed():
    listed = [find(line.split()[1:])[0] for line in INLINE]
    assert {id(command) for command in every_command()} == {id(command) for command in listed}


def test_the_python_runs(small, capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The sky is")


def test_the_quickstart_begins_by_line_15_and_the_whole_is_short():
    lines = README.splitlines()
    assert lines.index("```sh") <= 15
    assert len(lines) <= 150


def test_the_files_it_names_exist():
    names = set(re.findall(r"\b[\w/]+\.(?:md|py)\b", README)) | {"LICENSE", "Makefile"}
    names -= {"SKILL.md", "other/SKILL.md"}  # the user's
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_make_knows_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make (\w+)`?", README))
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
