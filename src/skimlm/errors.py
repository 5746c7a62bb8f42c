"""The two errors that reach a user: both print as one line, `error: ...`, and exit with 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


class SkimError(ValueError):
    """A user's mistake or an impossible request, told in one line."""


class FormatError(SkimError):
    """A file that is not what it should be; names the file and the tensor where they are known."""

    def __init__(
        self, reason: str, *, file: str | PathLike[str] | None = None, tensor: str | None = None
    ) -> None:
        self.reason, self.file, self.tensor = reason, file, tensor
        super().__init__(": ".join(str(part) for part in (file, tensor, reason) if part))

    def at(self, file: str | PathLike[str] | None) -> FormatError:
        """The same complaint with the file filled in, for readers that only now know it."""
        return FormatError(self.reason, file=file, tensor=self.tensor)


@contextmanager
def one_line(path: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises about a file into one line; our own errors pass."""
    try:
        yield
    except (SkimError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise SkimError(f"{path}: {what}: {first_line(error)}") from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the path in front of an error that does not know it."""
    try:
        yield
    except FormatError as error:
        raise error.at(path) from error
    except SkimError as error:
        raise SkimError(f"{path}: {error}") from error


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
