"""Commands that make folders: compress, finetune, export."""

import dataclasses
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
    REVISION,
    THREADS,
    Bits,
    Size,
    show,
)


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--method",
    type=click.Choice(["skim", "slim"]),
    default="skim",
    show_default=True,
    help="skim: bits where they count; slim: one width, 2:4 sparsity and adapters, block by block.",
)
@click.option(
    "--recipe",
    type=click.Choice(["paper", "fast", "best"]),
    default="best",
    show_default=True,
    help="paper: the method as published; fast: minutes; best: everything.",
)
@click.option(
    "--bits",
    type=Bits(),
    help="All-in bits per weight, 1.5 to 8; slim: width of the weights that stay.  "
    "[default: 3.2; slim: 4]",
)
@click.option("--size", type=Size(), help="Bytes of the whole folder: 80MB, 1.2GB (MB = 10^6).")
@click.option("--index-bits", type=click.IntRange(1, 8), help="The same index width for every row.")
@click.option(
    "--sparsity",
    metavar="none|2:4|0.5",
    help="Weights to prune: N:M, or a share of every row.  [default: none; slim: 2:4]",
)
@click.option(
    "--rank",
    type=float,
    help="Rank of low-rank adapters, a share of a linear's smaller side; 0: none.  "
    "[default: 0; slim: 0.1]",
)
@click.option(
    "--adapter-bits",
    type=click.Choice(["16", "4"]),
    callback=lambda ctx, param, value: value and int(value),
    help="Bits of the adapters.  [default: 4]",
)
@click.option(
    "--embed-bits",
    type=click.Choice(["16", "8", "4"]),
    default="8",
    show_default=True,
    callback=lambda ctx, param, value: int(value),
    help="Bits of the embedding and the head.",
)
@click.option("--text", type=FILE, help="Calibration text or .jsonl; default: built in.")
@click.option("--text-key", help="Key or keys,joined of a .jsonl row.")
@click.option("--samples", type=POSITIVE, help="Calibration windows; default: the recipe's.")
@click.option("--seq-len", type=POSITIVE, help="Tokens per window; default: the recipe's.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--include", multiple=True, metavar="PATTERN", help="Compress only these linears.")
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave these linears as they are."
)
@CACHE_DIR
@click.option("--force", is_flag=True, help="Replace OUT if it exists; begin anew.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option(
    "--max-memory",
    type=Size(),
    help="Memory to use: 8GB. A model that needs more is streamed.  [default: what is free]",
)
@click.option(
    "--workers",
    type=POSITIVE,
    metavar="N",
    help="Processes that share the work on a streamed model.",
)
@click.option("--ray", metavar="ADDRESS", help="Ray cluster that shares it: auto, or HOST:PORT.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, write nothing.")
@REVISION
@THREADS
@JSON
def compress(model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Compress MODEL (folder, hub id or .gguf) into the folder OUT."""
    if options["workers"] and options["ray"]:
        raise click.UsageError("give one of --workers and --ray")
    if sum(options[name] is not None for name in ("bits", "size", "index_bits")) > 1:
        raise click.UsageError("give one of --bits, --size and --index-bits")
    from skimlm.evaluate.report import facts_text
    from skimlm.pipeline.compress import compress
    from skimlm.pipeline.config import CompressConfig
    from skimlm.progress import progress_bars

    config = CompressConfig(**options)
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
    from skimlm.evaluate.report import facts_text
    from skimlm.pipeline.finetune import Settings, finetune
    from skimlm.progress import progress_bars

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: options.pop(name) for name in names})
    with progress_bars() as progress:
        report = finetune(path, out, text, settings, progress=progress, **options)
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
def export(
    path: str, out: Path, to: str, dtype: str | None, as_json: bool, **options: bool
) -> None:
    """Write the compressed folder PATH for tools that do not know skimlm."""
    import torch

    from skimlm.evaluate.report import facts_text
    from skimlm.pipeline.export import export

    kind = None if dtype is None else getattr(torch, dtype)
    report = export(path, out, to, dtype=kind, **options)
    show(report.to_json(), facts_text, as_json)
