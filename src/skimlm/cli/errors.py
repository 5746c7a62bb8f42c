"""What a user or a machine can get wrong, told in one line; exit status 1."""

import errno
from typing import Any

import click

from skimlm.errors import SkimError


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
