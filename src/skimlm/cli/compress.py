"""Commands that make folders: compress, finetune, export."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from skimlm.cli.options import (
    CACHE_DIR,
    FILE,
    FORCE,
    JSON,
    POSITIVE,
    THREADS,
    config_options,
    show,
)
from skimlm.pipeline import EXCLUSIVE, CompressConfig, one_of


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@config_options
@THREADS
@JSON
def compress(model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Compress MODEL (folder, hub id or .gguf) into the folder OUT."""
    for names in EXCLUSIVE:
        if sum(options[name] is not None for name in names) > 1:
            raise click.UsageError(one_of(names))
    from skimlm import compress
    from skimlm.evaluate import facts_text
    from skimlm.progress import progress_bars

    given = {name: value for name, value in options.items() if value is not None}
    config = CompressConfig(**given)
    with progress_bars() as progress:
        notice = partial(click.echo, err=True)
        report = compress(model, out, config, progress=progress, notice=notice)
    show(report.to_json(), facts_text, as_json)


@click.command()
@click.argument("path")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--text", type=FILE, required=True, help="Text or .jsonl to train on.")
@click.option("--text-key", help="Key or keys,joined of a .jsonl row.")
@click.option(
    "--teacher", metavar="MODEL", help="Learn its output, not the text: the original model."
)
@click.option(
    "--tokens", type=POSITIVE, default=300_000, show_default=True, help="Tokens to train on."
)
@click.option("--seq-len", type=POSITIVE, default=512, show_default=True)
@click.option("--batch", type=POSITIVE, default=4, show_default=True, help="Windows per step.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-2,
    show_default=True,
    help="Step size, relative to the size of an adapter's component.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@CACHE_DIR
@FORCE
@THREADS
@JSON
def finetune(path: str, out: Path, text: str, as_json: bool, **options: Any) -> None:
    """Train the adapters of the compressed folder PATH on a text, into the folder OUT."""
    from skimlm import finetune
    from skimlm.evaluate import facts_text
    from skimlm.progress import progress_bars

    with progress_bars() as progress:
        report = finetune(path, out, text, progress=progress, **options)
    show(report.to_json(), facts_text, as_json)
    if not report.improved:
        click.echo("the held-out loss did not fall: the adapters are stored unchanged", err=True)


@click.command()
@click.argument("path")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["dense", "peft"]),
    default="dense",
    show_default=True,
    help="dense: an ordinary folder; peft: OUT/base without adapters and OUT/adapter for PEFT.",
)
@click.option("--dense-base", is_flag=True, help="With peft: an ordinary base, as PEFT needs it.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of an ordinary folder; default: the model's.",
)
@FORCE
@JSON
def export(path: str, out: Path, as_json: bool, **options: Any) -> None:
    """Write the compressed folder PATH for tools that do not know skimlm."""
    from skimlm import export
    from skimlm.evaluate import facts_text

    report = export(path, out, **options)
    show(report.to_json(), facts_text, as_json)
