"""Commands that use a model as it is: eval, generate, inspect."""

import json
import sys
from typing import Any

import click

from skimlm.cli.options import (
    DEVICE,
    FILE,
    JSON,
    POSITIVE,
    REVISION,
    THREADS,
    load_on,
    show,
)


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
    from skimlm.evaluate.perplexity import held_out_text, perplexity, read_text
    from skimlm.evaluate.report import evaluation_text
    from skimlm.integrations.lm_eval import accuracy, read_task
    from skimlm.progress import peak_rss_bytes, progress_bars

    rows = {name: read_task(task_dir or "", name) for name in (tasks or "").split(",") if name}
    scored = text is not None or not rows
    if scored:
        words, name = held_out_text() if text is None else (read_text(text), text)
    loaded, tokenizer = load_on(model, device, revision)
    facts: dict[str, Any] = {"model": model}
    if scored:
        with progress_bars() as progress:
            result = perplexity(loaded, tokenizer, words, seq_len, limit, progress)
        facts |= {"text": name, **result.to_json()}
    if rows:
        facts["tasks"] = accuracy(loaded, tokenizer, rows)
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
    from skimlm.generate import generate
    from skimlm.skills.store import served

    prompt = sys.stdin.read() if prompt == "-" else prompt
    write = None if as_json else lambda piece: click.echo(piece, nl=False)
    loaded, tokenizer = load_on(model, device, revision)
    pieces = []
    for skill in skills:
        found, warning = served(skill, loaded, tokenizer)
        pieces.append(found)
        if warning:
            click.echo(f"warning: {warning}", err=True)
    result = generate(loaded, tokenizer, prompt, skills=pieces, write=write, **options)
    if as_json:
        click.echo(json.dumps({"model": model, **result.to_json()}, ensure_ascii=False))
        return
    click.echo()
    click.echo(result.summary(), err=True)


@click.command()
@click.argument("path", type=click.Path(exists=True))
@JSON
def inspect(path: str, as_json: bool) -> None:
    """Show what is in a compressed folder or a .skim: sizes, measurements, provenance."""
    if path.endswith(".skim"):
        from skimlm.skills.store import inspect, inspect_text
    else:
        from skimlm.evaluate.report import inspect, inspect_text

    show(inspect(path), inspect_text, as_json)
