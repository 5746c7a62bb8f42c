"""The two errors that reach a user: both print as one line, `error: ...`, and exit with 1."""

from __future__ import annotations

from os import PathLike


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
