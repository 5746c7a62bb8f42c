"""Skills: skill compress, train, eval."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import click

from skimlm.cli.errors import Commands
from skimlm.cli.options import (
    DEVICE,
    FILE,
    FORCE,
    JSON,
    POSITIVE,
    REVISION,
    SKILL_SEED,
    THREADS,
    show,
)


@click.group(cls=Commands)
def skill() -> None:
    """Skills (SKILL.md) made cheaper: compress them and measure what is kept."""


@skill.command("compress")
@click.argument("path", metavar="SKILL.md", type=click.Path())
@click.argument("out", metavar="OUT.skim", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="Folder, hub id or .gguf the skill is for.")
@click.option(
    "--kind",
    type=click.Choice(["kv", "soft", "text"]),
    help="kv: keys and values; soft: trained vectors; text: fewer lines.  [default: kv]",
)
@click.option("--tokens", type=POSITIVE, metavar="N", help="Take the room of so many tokens.")
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="R",
    help="This share of the text's tokens: 0.25 keeps a quarter.",
)
@click.option(
    "--target",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    help="Closure to the full text that is asked for.",
)
@click.option(
    "--recall",
    "floor",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Share of literals (commands, paths ...) that is asked for.",
)
@click.option(
    "--method",
    type=click.Choice(
        ["adaptive", "distill", "head", "leads", "selfinfo", "sections", "amortised"]
    ),
    help="Of soft tokens: adaptive (the fewest that measure up), or one method at one size.",
)
@click.option("--compressor", type=FILE, help="Of soft tokens: what skill train has made.")
@click.option(
    "--pin",
    is_flag=True,
    help="With soft tokens: commands, numbers, code stay text.",
)
@click.option("--train", type=POSITIVE, help="Questions to study.  [default: 12; soft: 96]")
@click.option("--steps", type=POSITIVE, help="Steps, at most, for soft tokens.  [default: 60]")
@SKILL_SEED
@FORCE
@REVISION
@DEVICE
@THREADS
@JSON
def skill_compress(
    path: str,
    out: Path,
    model: str,
    train: int | None,
    steps: int | None,
    seed: int | None,
    force: bool,
    revision: str | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress a SKILL.md into OUT.skim for one model.

    A folder is the SKILL.md in it, or else the catalogue of its skills: all names and descriptions.
    """
    if options["tokens"] is not None and options["ratio"] is not None:
        raise click.UsageError("give one of --ratio and --tokens")
    from skimlm import load
    from skimlm.progress import progress_bars
    from skimlm.skills import compression, document, store

    store.check_out(out, force)
    read = document.read(path)
    given = {"train": train, "steps": steps, "seed": seed}
    settings = {name: value for name, value in given.items() if value is not None}
    loaded = load(model, device, revision=revision)
    with progress_bars() as progress:
        made = compression.compress(
            loaded.model,
            loaded.tokenizer,
            read,
            settings=settings,
            progress=progress,
            **options,
        )
    store.write(out, made)
    show(store.inspect(out), store.inspect_text, as_json)


@skill.command("train")
@click.argument("out", metavar="OUT.safetensors", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="Folder, hub id or .gguf it is to compress for.")
@click.option(
    "--skills",
    required=True,
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A SKILL.md, or a folder of them; may be repeated.",
)
@click.option("--steps", type=POSITIVE, help="[default: 600]")
@click.option("--compressor", type=FILE, help="Go on from this one in place of a new one.")
@SKILL_SEED
@FORCE
@REVISION
@DEVICE
@THREADS
@JSON
def skill_train(
    out: Path,
    model: str,
    skills: tuple[Path, ...],
    steps: int | None,
    compressor: str | None,
    seed: int | None,
    force: bool,
    revision: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Train a compressor on many skills: a new one then takes a single pass.

    What a stopped run has done lies in OUT.partial: the same command goes on.
    """
    from skimlm import load
    from skimlm.evaluate import facts_text
    from skimlm.progress import progress_bars
    from skimlm.skills import compressor as compressing
    from skimlm.skills import document, train_compressor

    compressing.check_out(out, force)
    paths = document.find(skills)
    usual = train_compressor.Settings()
    settings = dataclasses.replace(
        usual,
        steps=usual.steps if steps is None else steps,
        seed=usual.seed if seed is None else seed,
    )
    start = compressing.read(compressor) if compressor else None
    loaded = load(model, device, revision=revision)
    work = out.with_name(out.name + ".partial")
    with progress_bars() as progress:
        made = train_compressor.train(
            loaded.model,
            loaded.tokenizer,
            paths,
            work,
            settings=settings,
            start=start,
            progress=progress,
        )
    compressing.write(out, made)
    shutil.rmtree(work)
    losses = made.facts["held_out_kl"]
    facts = {
        "out": str(out),
        "bytes": out.stat().st_size,
        "skills": len(made.facts["skills"]),
        "held_out_kl": losses if as_json else f"{losses[0]:.4f} (before) to {min(losses):.4f}",
    }
    show(facts, facts_text, as_json)


@skill.command("eval")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--model", required=True, help="Folder, hub id or .gguf to measure with.")
@click.option("--questions", type=POSITIVE, default=64, show_default=True, help="Per skill.")
@click.option("--answer", type=POSITIVE, default=48, show_default=True, help="Tokens per answer.")
@click.option("--plot", type=FILE, help="Draw closure against tokens, all methods and resolutions.")
@REVISION
@DEVICE
@THREADS
@JSON
def skill_eval(
    files: tuple[str, ...],
    model: str,
    questions: int,
    answer: int,
    plot: str | None,
    revision: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure what compressed skills keep of their full text, on questions never trained on."""
    from skimlm import load
    from skimlm.progress import progress_bars
    from skimlm.skills import evaluate

    if plot:
        evaluate.check_plot(plot)
    loaded = load(model, device, revision=revision)
    with progress_bars() as progress:
        facts = evaluate.evaluate(
            loaded.model,
            loaded.tokenizer,
            files,
            count=questions,
            answer=answer,
            everything=plot is not None,
            progress=progress,
        )
    if plot:
        evaluate.plot(facts, plot)
    show({"model": model, **facts}, evaluate.text, as_json)


@skill.command("cost")
@click.argument("places", metavar="DIR...", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--model", help="Folder, hub id or .gguf that counts tokens.  [default: an estimate]")
@click.option("--requests", type=POSITIVE, default=10_000, show_default=True, help="In a month.")
@click.option(
    "--used",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of the requests that read a skill.",
)
@REVISION
@JSON
def skill_cost(
    places: tuple[str, ...],
    model: str | None,
    requests: int,
    used: float,
    revision: str | None,
    as_json: bool,
) -> None:
    """Say what the skills in a folder cost: tokens of a request, and of a month."""
    from skimlm.models import load_tokenizer, open_checkpoint
    from skimlm.skills import cost

    tokenizer = None
    if model:
        tokenizer = load_tokenizer(open_checkpoint(model, revision=revision))
    show(cost.cost(places, tokenizer, requests, used), cost.text, as_json)
