"""Commands that use a model as it is: eval, generate, inspect."""

import sys
from pathlib import Path
from typing import Any

import click

from skimlm.cli.options import (
    DEVICE,
    FILE,
    JSON,
    POSITIVE,
    REVISION,
    THREADS,
    json_text,
    show,
)
from skimlm.errors import SkimError


@click.command("eval")
@click.argument("model")
@click.option("--text", type=FILE, help="Text, its characters as they are; default: built in.")
@click.option("--seq-len", type=POSITIVE, default=2048, show_default=True)
@click.option("--limit", type=POSITIVE, metavar="WINDOWS", help="Only the first windows.")
@click.option("--tasks", help="Multiple-choice tasks, comma separated; without --text only these.")
@click.option("--task-dir", type=click.Path(file_okay=False), help="Folder of TASK.jsonl files.")
@REVISION
@DEVICE
@THREADS
@JSON
def evaluate(
    model: str,
    text: str | None,
    seq_len: int,
    limit: int | None,
    tasks: str | None,
    task_dir: str | None,
    revision: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL on a text, or its accuracy on tasks."""
    if (tasks is None) != (task_dir is None):
        raise click.UsageError("give --tasks and --task-dir together")
    from skimlm import load
    from skimlm.evaluate import evaluation_text, held_out_text, read_text
    from skimlm.integrations import accuracy, read_task
    from skimlm.progress import peak_rss_bytes, progress_bars

    rows = {name: read_task(task_dir or "", name) for name in (tasks or "").split(",") if name}
    scored = text is not None or not rows
    if scored:
        words, name = held_out_text() if text is None else (read_text(text), text)
    loaded = load(model, device, revision=revision)
    facts: dict[str, Any] = {"model": model}
    if scored:
        with progress_bars() as progress:
            result = loaded.perplexity(words, seq_len=seq_len, limit=limit, progress=progress)
        facts |= {"text": name, **result.to_json()}
    if rows:
        facts["tasks"] = accuracy(loaded.model, loaded.tokenizer, rows)
    show(facts | {"peak_rss_bytes": peak_rss_bytes()}, evaluation_text, as_json)


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", type=POSITIVE, default=128, show_default=True)
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is: no chat template.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 is greedy: always the likeliest token.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--skill", "skills", multiple=True, type=FILE, help="A .skim or a SKILL.md; may be repeated."
)
@REVISION
@DEVICE
@THREADS
@JSON
def generate(
    model: str,
    prompt: str,
    skills: tuple[str, ...],
    revision: str | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT with MODEL, streamed; `-` reads the prompt from stdin."""
    from skimlm import load

    prompt = _stdin() if prompt == "-" else prompt
    write = None if as_json else lambda piece: click.echo(piece, nl=False)
    loaded = load(model, device, revision=revision)
    loaded.notice = lambda line: click.echo(f"warning: {line}", err=True)
    for skill in skills:
        loaded.add_skill(Path(skill), skill)
    result = loaded.generate(prompt, skills=skills, write=write, **options)
    if as_json:
        click.echo(json_text({"model": model, **result.to_json()}))
        return
    click.echo()
    click.echo(result.summary(), err=True)


def _stdin() -> str:
    """The text on stdin; nothing where it is closed."""
    try:
        text = sys.stdin.read() if sys.stdin else ""
        text.encode()  # some locales let bytes that are no text through
        return text
    except UnicodeError as error:
        raise SkimError(f"stdin is not UTF-8 text: {error}") from None


@click.command()
@click.argument("path", type=click.Path(exists=True))
@click.option("--text", is_flag=True, help="Print a .skim for engines that take text alone.")
@JSON
def inspect(path: str, text: bool, as_json: bool) -> None:
    """Show what is in a compressed folder or a .skim: sizes, measurements, provenance.

    --text prints the shortened text of a .skim of kind text, of another kind the full one.
    """
    from skimlm import inspect
    from skimlm.evaluate import inspect_text
    from skimlm.skills import store

    packed = Path(path).suffix == store.SUFFIX
    if text:
        if not packed or as_json:
            raise click.UsageError("--text prints a .skim, as nothing but text")
        click.echo(store.as_text(store.read(path)))
        return
    show(inspect(path), store.inspect_text if packed else inspect_text, as_json)
