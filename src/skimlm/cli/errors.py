"""What a user or a machine can get wrong, told in one line; exit status 1."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from skimlm.errors import SkimError


class OneLine(click.ClickException):
    """An error a user can act on."""

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Commands(click.Group):
    """The subcommands, with what a user or a machine can get wrong told in one line."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError:  # even the line that says what is wrong could not be written
            _drop_output()
            sys.exit(1)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _one_line():
            return super().make_context(*args, **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any("\0" in arg for arg in args):
            raise click.UsageError("an argument holds a NUL byte: no text and no path may", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what is no bug of ours into a line."""
    try:
        yield
    except SkimError as error:
        raise OneLine(_line(error)) from error
    except KeyboardInterrupt as error:
        raise OneLine("interrupted; a streamed run goes on with --resume") from error
    except MemoryError as error:
        raise OneLine("out of memory") from error
    except OverflowError as error:
        raise OneLine(f"a number is too large: {_line(error)}") from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # `| head`: click ends quietly
            raise
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        raise OneLine(where + (error.strerror or _line(error))) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # how torch says it
            raise OneLine("out of memory") from error
        if "Overflow when unpacking" in str(error):
            raise OneLine("a number is too large: it must fit 64 bits") from error
        raise


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _drop_output() -> None:
    """Forget what a full disk does not take, or Python tries again as it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_streams() -> None:
    """Keep files from the numbers of streams that are closed; write any name that a file has."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
