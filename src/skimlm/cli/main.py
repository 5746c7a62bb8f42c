"""The command line: a subcommand per verb, each parses, calls one function and prints.

Data goes to stdout, progress to stderr; `--json` prints exactly one JSON object. Exit 0: done,
1: one line `error: ...` and nothing half-written, 2: usage.
"""

import dataclasses
import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from skimlm import __version__
from skimlm.errors import SkimError

MIN_BITS, MAX_BITS = 1.5, 8.0
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class OneLine(click.ClickException):
    """An error a user can act on."""

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Commands(click.Group):
    """The subcommands, with what a user or a machine can get wrong told in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SkimError as error:
            raise OneLine(_line(error)) from error
        except KeyboardInterrupt as error:
            raise OneLine("interrupted; a streamed run goes on with --resume") from error
        except MemoryError as error:
            raise OneLine("out of memory") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head`: click ends quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise OneLine(where + (error.strerror or _line(error))) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # how torch says it
                raise OneLine("out of memory") from error
            raise


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


class Bits(click.ParamType):
    """Bits per weight, fractions welcome."""

    name = "bits"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            bits = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not MIN_BITS <= bits <= MAX_BITS:
            raise OneLine(f"bits must be {MIN_BITS:g} to {MAX_BITS:g}, got {value}")
        return bits


class Size(click.ParamType):
    """Bytes, as 80MB, 80_000_000 or 1.2GB; MB = 10^6."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        if not match or match[2].upper() not in UNITS:
            self.fail(f"{value!r} is not a size such as 80MB, 80_000_000 or 1.2GB", param, ctx)
        nbytes = round(float(match[1].replace("_", "")) * UNITS[match[2].upper()])
        if nbytes < 1:
            self.fail("a size must be at least one byte", param, ctx)
        return nbytes


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skimlm")
def main() -> None:
    """Compress a language model to any bit width or file size, on this machine."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _threads(ctx: click.Context, param: Any, value: int | None) -> None:
    if value:
        import torch

        torch.set_num_threads(value)


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
POSITIVE = click.IntRange(min=1)
FILE = click.Path(dir_okay=False)
THREADS = click.option(
    "--threads",
    type=POSITIVE,
    callback=_threads,
    expose_value=False,
    help="CPU threads to use; default: what torch finds.",
)
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
CACHE_DIR = click.option(
    "--cache-dir", type=click.Path(file_okay=False), help="Where analyses are kept."
)
FORCE = click.option("--force", is_flag=True, help="Replace OUT if it exists.")
SKILL_SEED = click.option("--seed", type=click.IntRange(min=0), help="[default: 0]")
REVISION = click.option("--revision", help="Branch, tag or commit of a hub model.")


def _print(facts: dict[str, Any], text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else text(facts))


def _load(model: str, device: str, revision: str | None) -> tuple[Any, Any]:
    """Load a model for use on `device`."""
    import torch

    from skimlm.models.checkpoint import load

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SkimError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    loaded, tokenizer = load(model, revision=revision)
    return loaded.to(device), tokenizer


@main.command()
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
    _print(report.to_json(), facts_text, as_json)


@main.command("eval")
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
    loaded, tokenizer = _load(model, device, revision)
    facts: dict[str, Any] = {"model": model}
    if scored:
        with progress_bars() as progress:
            result = perplexity(loaded, tokenizer, words, seq_len, limit, progress)
        facts |= {"text": name, **result.to_json()}
    if rows:
        facts["tasks"] = accuracy(loaded, tokenizer, rows)
    _print(facts | {"peak_rss_bytes": peak_rss_bytes()}, evaluation_text, as_json)


@main.command()
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
    loaded, tokenizer = _load(model, device, revision)
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


@main.command()
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
    _print(report.to_json(), facts_text, as_json)
    if not report.improved:
        click.echo("the held-out loss did not fall: the adapters are stored unchanged", err=True)


@main.command()
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
    _print(report.to_json(), facts_text, as_json)


@main.command()
@click.argument("path", type=click.Path(exists=True))
@JSON
def inspect(path: str, as_json: bool) -> None:
    """Show what is in a compressed folder or a .skim: sizes, measurements, provenance."""
    if path.endswith(".skim"):
        from skimlm.skills.store import inspect, inspect_text
    else:
        from skimlm.evaluate.report import inspect, inspect_text

    _print(inspect(path), inspect_text, as_json)


@main.group(cls=Commands)
def skill() -> None:
    """Skills (SKILL.md) as soft tokens: compress them and measure what is kept."""


@skill.command("compress")
@click.argument("path", metavar="SKILL.md", type=FILE)
@click.argument("out", metavar="OUT.skim", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="Folder, hub id or .gguf the skill is for.")
@click.option(
    "--method",
    type=click.Choice(
        ["adaptive", "distill", "head", "leads", "selfinfo", "sections", "amortised"]
    ),
    default="adaptive",
    show_default=True,
    help="adaptive: the fewest soft tokens that measure up; or one method at one size.",
)
@click.option("--tokens", type=POSITIVE, metavar="N", help="So many soft tokens.")
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="R",
    help="This share of the text's tokens: 0.25 keeps a quarter.",
)
@click.option(
    "--target",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Closure to the full text that adaptive asks for.",
)
@click.option(
    "--recall",
    "floor",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of literals (commands, paths ...) that adaptive asks for.",
)
@click.option("--compressor", type=FILE, help="What skill train has made, to be used.")
@click.option("--pin", is_flag=True, help="Keep code, commands, numbers and prohibitions as text.")
@click.option("--train", type=POSITIVE, help="Questions to train on.  [default: 96]")
@click.option("--steps", type=POSITIVE, help="Training steps, at most.  [default: 60]")
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
    """Compress a SKILL.md into OUT.skim for one model."""
    if options["tokens"] is not None and options["ratio"] is not None:
        raise click.UsageError("give one of --ratio and --tokens")
    from skimlm.progress import progress_bars
    from skimlm.skills import compression, document, store

    store.check_out(out, force)
    read = document.read(path)
    given = {"train": train, "steps": steps, "seed": seed}
    settings = compression.Settings(**{k: v for k, v in given.items() if v is not None})
    loaded, tokenizer = _load(model, device, revision)
    with progress_bars() as progress:
        made = compression.compress(
            loaded,
            tokenizer,
            read,
            settings=settings,
            progress=progress,
            **options,
        )
    store.write(out, made)
    _print(store.inspect(out), store.inspect_text, as_json)


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
    from skimlm.evaluate.report import facts_text
    from skimlm.progress import progress_bars
    from skimlm.skills import compressor as compressing
    from skimlm.skills import document, train_compressor

    if out.exists() and not force:
        raise SkimError(f"{out}: exists, use --force to replace it")
    paths = document.find(skills)
    usual = train_compressor.Settings()
    settings = dataclasses.replace(
        usual,
        steps=usual.steps if steps is None else steps,
        seed=usual.seed if seed is None else seed,
    )
    start = compressing.read(compressor) if compressor else None
    loaded, tokenizer = _load(model, device, revision)
    work = out.with_name(out.name + ".partial")
    with progress_bars() as progress:
        made = train_compressor.train(
            loaded, tokenizer, paths, work, settings=settings, start=start, progress=progress
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
    _print(facts, facts_text, as_json)


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
    from skimlm.progress import progress_bars
    from skimlm.skills import evaluate

    if plot:
        evaluate.check_plot(plot)
    loaded, tokenizer = _load(model, device, revision)
    with progress_bars() as progress:
        facts = evaluate.evaluate(
            loaded,
            tokenizer,
            files,
            count=questions,
            answer=answer,
            everything=plot is not None,
            progress=progress,
        )
    if plot:
        evaluate.plot(facts, plot)
    _print({"model": model, **facts}, evaluate.text, as_json)


@main.command()
@click.option("--out", type=click.Path(file_okay=False), help="Keep the compressed model here.")
@click.option("--bits", type=Bits(), default=3.2, show_default=True)
@FORCE
@THREADS
@JSON
def demo(as_json: bool, **options: Any) -> None:
    """Compress an embedded small model and show what it cost, in a few minutes."""
    from skimlm.cli import demo as demonstration
    from skimlm.progress import progress_bars

    with progress_bars() as progress:
        facts = demonstration.run(progress=progress, **options)
    _print(facts, demonstration.text, as_json)


@main.command()
@THREADS
@JSON
def bench(as_json: bool) -> None:
    """Time the kernels on this machine, against torch and against its memory."""
    from skimlm import bench
    from skimlm.progress import progress_bars

    with progress_bars() as progress:
        facts = bench.run(progress=progress)
    _print(facts, bench.text, as_json)


@main.command()
@JSON
def info(as_json: bool) -> None:
    """Show versions, threads and which native code runs."""
    from skimlm.evaluate.report import environment, facts_text

    _print(environment(), facts_text, as_json)


@main.command()
@click.option("--prune", is_flag=True, help="Delete every kept analysis.")
@CACHE_DIR
@JSON
def cache(prune: bool, cache_dir: str | None, as_json: bool) -> None:
    """List the analyses kept for further budgets of the same model, or delete them."""
    from skimlm.evaluate.report import cache_facts, cache_text
    from skimlm.pipeline import sensitivity

    place = sensitivity.folder(cache_dir)
    freed = sensitivity.prune(place) if prune else 0
    _print(cache_facts(place, sensitivity.entries(place), freed), cache_text, as_json)
