"""Commands about this machine: demo, bench, info, cache."""

from typing import Any

import click

from skimlm.cli.options import (
    CACHE_DIR,
    FORCE,
    JSON,
    THREADS,
    of_config,
    show,
)


@click.command()
@click.option("--out", type=click.Path(file_okay=False), help="Keep the compressed model here.")
@of_config("bits", default=3.2, help="All-in bits per weight, 1.5 to 8.", show_default=True)
@FORCE
@THREADS
@JSON
def demo(as_json: bool, **options: Any) -> None:
    """Compress an embedded small model and show what it cost, in a few minutes."""
    from skimlm.cli import demo as demonstration
    from skimlm.progress import progress_bars

    with progress_bars() as progress:
        facts = demonstration.run(progress=progress, **options)
    show(facts, demonstration.text, as_json)


@click.command()
@THREADS
@JSON
def bench(as_json: bool) -> None:
    """Time the kernels on this machine, against torch and against its memory."""
    from skimlm import bench
    from skimlm.progress import progress_bars

    with progress_bars() as progress:
        facts = bench.run(progress=progress)
    show(facts, bench.text, as_json)


@click.command()
@JSON
def info(as_json: bool) -> None:
    """Show versions, threads and which native code runs."""
    from skimlm.evaluate import environment, facts_text

    show(environment(), facts_text, as_json)


@click.command()
@click.option("--prune", is_flag=True, help="Delete every kept analysis.")
@CACHE_DIR
@JSON
def cache(prune: bool, cache_dir: str | None, as_json: bool) -> None:
    """List the analyses kept for further budgets of the same model, or delete them."""
    from skimlm.evaluate import cache_facts, cache_text
    from skimlm.pipeline import sensitivity

    place = sensitivity.folder(cache_dir)
    freed = sensitivity.prune(place) if prune else 0
    show(cache_facts(place, sensitivity.entries(place), freed), cache_text, as_json)
