"""What is kept from block to block, by kind and number: in memory, or as files of a run.

    store.keep("inputs", 3, {"x": hidden})     whole or not at all
    store.read("inputs", 3)["x"]

Files are what an unfinished run goes on from (storage/journal.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from skimlm.errors import SkimError, first_line
from skimlm.storage.safetensors import write_file


class StateStore:
    """Tensors under (kind, number); `place` is a folder, or None for memory."""

    def __init__(self, place: Path | None) -> None:
        self.place = place
        self.held: dict[tuple[str, int], dict[str, Tensor]] = {}

    def has(self, kind: str, i: int) -> bool:
        """Whether something is kept under this kind and number."""
        return (kind, i) in self.held if self.place is None else self._file(kind, i).exists()

    def keep(self, kind: str, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, which are not to be changed afterwards."""
        if self.place is None:
            self.held[kind, i] = dict(tensors)
        else:
            write_file(self._file(kind, i), {n: t.contiguous() for n, t in tensors.items()}, {})

    def read(self, kind: str, i: int) -> dict[str, Tensor]:
        """What was kept; SkimError if its file is damaged or gone."""
        if self.place is None:
            return self.held[kind, i]
        with self._open(kind, i) as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}

    def read_one(self, kind: str, i: int, name: str) -> Tensor:
        """One of the tensors that were kept."""
        if self.place is None:
            return self.held[kind, i][name]
        with self._open(kind, i) as stream:
            return stream.get_tensor(name)

    def read_rows(self, kind: str, i: int, rows: slice) -> dict[str, Tensor]:
        """Copies of some rows of the tensors that were kept; no more than they is in memory."""
        if self.place is None:
            return {name: tensor[rows].clone() for name, tensor in self.held[kind, i].items()}
        with self._open(kind, i) as stream:
            return {name: stream.get_slice(name)[rows].clone() for name in stream.keys()}

    def names(self, kind: str, i: int) -> list[str]:
        """Names of the tensors that were kept."""
        if self.place is None:
            return list(self.held[kind, i])
        with self._open(kind, i) as stream:
            return list(stream.keys())

    def drop(self, kind: str, i: int) -> None:
        """Keep it no longer, if it is kept."""
        self.held.pop((kind, i), None)
        if self.place is not None:
            self._file(kind, i).unlink(missing_ok=True)

    def drop_all(self, kind: str) -> None:
        """Keep nothing more under this kind."""
        self.held = {key: tensors for key, tensors in self.held.items() if key[0] != kind}
        if self.place is not None:
            for file in self.place.glob(f"{kind}-*.safetensors"):
                file.unlink()

    def _file(self, kind: str, i: int) -> Path:
        assert self.place is not None
        return self.place / f"{kind}-{i:04}.safetensors"

    @contextmanager
    def _open(self, kind: str, i: int) -> Iterator[Any]:
        file = self._file(kind, i)
        try:
            with safe_open(file, framework="pt") as stream:
                yield stream
        except (OSError, SafetensorError) as error:
            raise SkimError(
                f"{file}: cannot be read ({first_line(error)}); --force begins anew"
            ) from error
