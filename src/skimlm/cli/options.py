"""What the commands share: types, options and printing."""

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from skimlm.pipeline import OPTIONS, default_text, parse_bytes

Command = TypeVar("Command", bound=Callable[..., Any])
MAX_THREADS = 1024  # far more than that and OpenMP ends the process


class Size(click.ParamType):
    """Bytes, as 80MB, 80_000_000 or 1.2GB; MB = 10^6."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            nbytes = parse_bytes(str(value))
        except (ValueError, OverflowError) as error:
            self.fail(str(error), param, ctx)
        if nbytes < 1:
            self.fail("a size must be at least one byte", param, ctx)
        return nbytes


class Number(click.ParamType):
    """A number whose limits CompressConfig checks: `bits must be 1.5 to 8, got 9`."""

    name = "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)


def _threads(ctx: click.Context, param: Any, value: int | None) -> None:
    if value:
        import torch

        torch.set_num_threads(value)


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
POSITIVE = click.IntRange(min=1)
FILE = click.Path(dir_okay=False)
THREADS = click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    callback=_threads,
    expose_value=False,
    help="CPU threads to use; default: what torch finds.",
)
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
FORCE = click.option("--force", is_flag=True, help="Replace OUT if it exists.")
SKILL_SEED = click.option("--seed", type=click.IntRange(min=0), help="[default: 0]")


def of_config(name: str, **more: Any) -> Callable[[Command], Command]:
    """The option of the command line for a field of CompressConfig."""
    known = OPTIONS[name]
    texts = [known.help, f"[default: {text}]" if (text := default_text(name)) else ""]
    values: dict[str, Any] = {"help": "  ".join(filter(None, texts)), "multiple": known.many}
    if known.kind is bool:
        values |= {"is_flag": True}
    else:
        values |= {"type": _type(known), "default": () if known.many else None}
        values |= {"metavar": known.metavar}
    if known.choices and known.kind is int:
        values |= {"callback": lambda ctx, param, value: value and int(value)}
    return click.option("--" + name.replace("_", "-"), name, **values | more)


def _type(known: Any) -> Any:
    """What click checks of a field: wrong usage there, the rest CompressConfig says."""
    if known.choices:
        return click.Choice([str(choice) for choice in known.choices])
    if known.in_bytes:
        return Size()
    if known.kind is int:
        return click.IntRange(known.low, known.high)
    paths = {"FILE": FILE, "DIRECTORY": click.Path(file_okay=False)}
    return Number() if known.kind is float else paths.get(known.metavar or "", str)


REVISION, CACHE_DIR = of_config("revision"), of_config("cache_dir")


def config_options(command: Command) -> Command:
    """An option for each field of CompressConfig, in its order; what was not given is absent."""
    for name in reversed(OPTIONS):
        command = of_config(name)(command)
    return command


def show(facts: dict[str, Any], text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Print what a command found."""
    click.echo(json_text(facts) if as_json else text(facts))


def json_text(facts: dict[str, Any]) -> str:
    """One JSON object, in what stdout can write."""
    text = json.dumps(facts, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(facts)
    return text
