"""What the commands share: types and options, loading for use, printing."""

import json
import re
from collections.abc import Callable
from typing import Any

import click

from skimlm.cli.errors import OneLine
from skimlm.errors import SkimError

MIN_BITS, MAX_BITS = 1.5, 8.0
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


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


def show(facts: dict[str, Any], text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else text(facts))


def load_on(model: str, device: str, revision: str | None) -> tuple[Any, Any]:
    """Load a model for use on `device`."""
    import torch

    from skimlm.models.checkpoint import load

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SkimError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    loaded, tokenizer = load(model, revision=revision)
    return loaded.to(device), tokenizer
