"""Everything that can be asked of a compression: one frozen, checked value.

Each field of `CompressConfig` states its help text, type, limits and default once; the command
line, its error messages and the documentation are made from them. Nothing here imports torch.

    CompressConfig      what the user gives; a None stands for the method's or the recipe's default
    .settings           the recipe's numbers with the user's in them (Recipe)
    .options, .target   what a linear has besides codes; the bits, bytes or width to reach
    .to_json, .from_json, .provenance, .from_folder       the same as plain values
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skimlm.errors import SkimError, first_line

if TYPE_CHECKING:
    from skimlm.pipeline.budget import Target
    from skimlm.quantize.slim import Options

TABLE_BITS = 8  # of an embedding and a head, unless they are in the pool
WIDEST, WIDEST_TABLE = 8, 5  # index bits of a row, of a row with a codebook (format/)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Recipe:
    """What is done, and how much of it; windows are for the statistics, steps for the training."""

    samples: int = 128
    seq_len: int = 512
    fisher_windows: int = 64  # of the samples
    end_loss: bool = True  # H~ and one pool over the model; False: H and a pool per linear
    scale: bool = False  # after refinement it gained 0.3 % of the error, less than its bits cost
    rounds: int = 2
    sweeps: int = 3
    steps: int = 0
    rate: float = 1e-3  # of a step; 6e-3 diverges where half of the weights are pruned
    iterations: int = 3  # of mask, codes and adapter, where there is more than codes
    staged: bool = False  # slim: linears of a block see what the earlier ones made of the inputs
    matched: bool = False  # slim: the target is the original model's output


RECIPES = {
    "paper": Recipe(end_loss=False, scale=True, rounds=0, sweeps=0),
    "fast": Recipe(samples=40, fisher_windows=16),
    "best": Recipe(steps=64),
}
SLIM_RECIPES = {
    "paper": Recipe(),
    "fast": Recipe(samples=64, iterations=2),
    "best": Recipe(staged=True, matched=True, iterations=4, steps=64, rate=2e-3),
}


@dataclass(frozen=True)
class Method:
    """The defaults of a method."""

    bits: float
    sparsity: str
    rank: float
    recipes: Mapping[str, Recipe]
    adapter_bits: int = 4


METHODS = {
    "skim": Method(3.2, "none", 0.0, RECIPES),
    "slim": Method(4.0, "2:4", 0.1, SLIM_RECIPES),
}
# of each of these at most one can be given
EXCLUSIVE = (("bits", "size", "index_bits"), ("workers", "ray"))


def flag(name: str) -> str:
    """A field as an option of the command line: `--seq-len`."""
    return "--" + name.replace("_", "-")


def one_of(names: tuple[str, ...]) -> str:
    """How to say that these exclude each other."""
    flags = [flag(name) for name in names]
    return f"give one of {', '.join(flags[:-1])} and {flags[-1]}"


def parse_bytes(text: str) -> int:
    """Bytes from `80MB`, `80_000_000` or `1.2GB` (MB = 10^6); ValueError for anything else."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    if not match or match[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is not a size such as 80MB, 80_000_000 or 1.2GB")
    return round(float(match[1].replace("_", "")) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class Option:
    """What a field may be, and what it is for."""

    help: str
    kind: type = str  # int, float, bool or str (paths too)
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    metavar: str | None = None
    in_bytes: bool = False  # an int, or text such as 80MB
    many: bool = False  # a tuple of them
    result: bool = True  # whether it can change the bytes of OUT

    @property
    def allowed(self) -> str:
        """The values that are allowed, in words."""
        if self.choices:
            *most, last = (str(choice) for choice in self.choices)
            return f"{', '.join(most)} or {last}"
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return {bool: "true or false", str: "text"}.get(self.kind, "a number")

    def checked(self, name: str, value: Any) -> Any:
        """The value as the field holds it; SkimError if it is not allowed."""
        if self.many and not isinstance(value, str):
            return tuple(dataclasses.replace(self, many=False).checked(name, v) for v in value)
        try:
            converted = self._converted(value)
        except (TypeError, ValueError):
            converted = None
        bad = converted is None or (self.choices and converted not in self.choices)
        if not bad and self.kind in (int, float):
            low = -math.inf if self.low is None else self.low
            high = math.inf if self.high is None else self.high
            bad = not low <= converted <= high
        if bad:
            shown = repr(value) if isinstance(value, str) else str(value).removesuffix(".0")
            raise SkimError(f"{flag(name)[2:]} must be {self.allowed}, got {shown}")
        return (converted,) if self.many else converted

    def _converted(self, value: Any) -> Any:
        if self.kind is str:
            text = os.fspath(value) if isinstance(value, os.PathLike) else value
            return text if isinstance(text, str) and "\0" not in text else None
        if self.kind is bool or isinstance(value, bool):
            return value if self.kind is bool and isinstance(value, bool) else None
        if self.in_bytes and isinstance(value, str):
            return parse_bytes(value)
        if isinstance(value, str):
            return None
        return float(value) if self.kind is float else operator.index(value)


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(help, **more)})


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What a compression is asked to do; SkimError for what is not allowed.

    A None stands for the default of the method or the recipe; `resolved` fills it in.
    """

    method: str = _option(
        "skim",
        "skim: bits where they count; slim: one width, 2:4 sparsity and adapters, block by block.",
        choices=tuple(METHODS),
    )
    recipe: str = _option(
        "best",
        "paper: the method as published; fast: minutes; best: everything.",
        choices=tuple(RECIPES),
    )
    bits: float | None = _option(
        None,
        "All-in bits per weight, 1.5 to 8; slim: width of the weights that stay.",
        kind=float,
        low=1.5,
        high=8.0,
    )
    size: int | None = _option(
        None,
        "Bytes of the whole folder: 80MB, 1.2GB (MB = 10^6).",
        kind=int,
        low=1,
        in_bytes=True,
    )
    index_bits: int | None = _option(
        None, "The same index width for every row.", kind=int, low=1, high=WIDEST
    )
    sparsity: str | None = _option(
        None, "Weights to prune: N:M, or a share of every row.", metavar="none|2:4|0.5"
    )
    rank: float | None = _option(
        None,
        "Rank of low-rank adapters, a share of a linear's smaller side; 0: none.",
        kind=float,
        low=0,
        high=1,
    )
    adapter_bits: int | None = _option(None, "Bits of the adapters.", kind=int, choices=(16, 4))
    embed_bits: int | None = _option(
        None,
        "Bits of the embedding and the head.  [default: 8; with --size out of the same bytes]",
        kind=int,
        choices=(16, 8, 4),
    )
    text: str | None = _option(
        None, "Calibration text or .jsonl; default: built in.", metavar="FILE"
    )
    text_key: str | None = _option(None, "Key or keys,joined of a .jsonl row.")
    samples: int | None = _option(
        None, "Calibration windows; default: the recipe's.", kind=int, low=1
    )
    seq_len: int | None = _option(
        None, "Tokens per window; default: the recipe's.", kind=int, low=2
    )
    seed: int = _option(0, "Seed of whatever is drawn.", kind=int, low=0)
    include: tuple[str, ...] = _option(
        (), "Compress only these linears.", many=True, metavar="PATTERN"
    )
    exclude: tuple[str, ...] = _option(
        (), "Leave these linears as they are.", many=True, metavar="PATTERN"
    )
    revision: str | None = _option(None, "Branch, tag or commit of a hub model.")
    cache_dir: str | None = _option(
        None, "Where analyses are kept.", metavar="DIRECTORY", result=False
    )
    force: bool = _option(False, "Replace OUT if it exists; begin anew.", kind=bool, result=False)
    resume: bool = _option(False, "Go on with a run that was stopped.", kind=bool, result=False)
    max_memory: int | None = _option(
        None,
        "Memory to use: 8GB. A model that needs more is streamed.  [default: what is free]",
        kind=int,
        low=1,
        in_bytes=True,
        result=False,
    )
    workers: int | None = _option(
        None,
        "Processes that share the work on a streamed model.",
        kind=int,
        low=1,
        metavar="N",
        result=False,
    )
    ray: str | None = _option(
        None,
        "Ray cluster that shares it: auto, or HOST:PORT.",
        metavar="ADDRESS",
        result=False,
    )
    allow_partial: bool = _option(
        False,
        "Also where less than half of a model can be compressed.",
        kind=bool,
        result=False,
    )
    dry_run: bool = _option(
        False, "Say what would be done, write nothing.", kind=bool, result=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, float):
            object.__setattr__(self, "sparsity", f"{self.sparsity:g}")
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is not None or DEFAULTS[name] is not None:
                object.__setattr__(self, name, option.checked(name, value))
        for names in EXCLUSIVE:
            if sum(getattr(self, name) is not None for name in names) > 1:
                raise SkimError(one_of(names))
        if self.sparsity is not None:
            from skimlm.quantize.mask import Sparsity

            object.__setattr__(self, "sparsity", str(Sparsity.parse(self.sparsity) or "none"))
        if self.samples == 1 and METHODS[self.method].recipes[self.recipe].steps:
            raise SkimError(
                f"samples must be at least 2 with recipe {self.recipe}: one is held out, got 1"
            )
        self._check_method()

    def _check_method(self) -> None:
        """Refuse what the method cannot do."""
        now = self.resolved()
        composed = now.sparsity != "none" or bool(now.rank)
        if self.method == "skim":
            if composed and self.settings.scale:
                raise SkimError(
                    "recipe paper is SKIM as published: it has no sparsity and no adapters"
                )
            if composed and self.index_bits is not None and self.index_bits > WIDEST_TABLE:
                raise SkimError(
                    f"with sparsity or adapters index-bits must be 1 to {WIDEST_TABLE}, "
                    f"got {self.index_bits}"
                )
            return
        if now.bits is None:
            raise SkimError(
                "method slim has one width for all: give --bits, not a size or index bits"
            )
        most = WIDEST if self.recipe == "paper" else WIDEST_TABLE
        if now.bits != round(now.bits) or not 2 <= now.bits <= most:
            raise SkimError(
                f"with method slim bits are the width of the weights that stay, 2 to {most} with "
                f"recipe {self.recipe}, got {now.bits:g}"
            )

    # ---- what follows from it

    @property
    def settings(self) -> Recipe:
        """The recipe with the user's numbers in it."""
        known = METHODS[self.method].recipes[self.recipe]
        return dataclasses.replace(
            known, samples=self.samples or known.samples, seq_len=self.seq_len or known.seq_len
        )

    @property
    def options(self) -> Options | None:
        """What a linear has besides codes; None if nothing."""
        from skimlm.quantize.mask import Sparsity
        from skimlm.quantize.slim import Options

        now = self.resolved()
        pattern, rank = Sparsity.parse(now.sparsity or "none"), now.rank or 0.0
        if self.method == "skim" and pattern is None and not rank:
            return None
        made = Options(
            bits=3,
            sparsity=pattern,
            rank=rank,
            adapter_bits=now.adapter_bits or METHODS[self.method].adapter_bits,
            rounds=self.settings.iterations,
        )
        if self.method == "skim" or now.bits is None:
            return made
        group = 0 if self.recipe == "paper" else None
        return dataclasses.replace(made, bits=round(now.bits), group=group)

    @property
    def pools_tables(self) -> bool:
        """Whether embedding and head share one budget with the linears."""
        plain = self.method == "skim" and self.sparsity in (None, "none") and not self.rank
        asked = self.size is not None and self.embed_bits is None
        return plain and asked and self.settings.end_loss

    @property
    def target(self) -> Target:
        """The bits per weight, bytes or width to reach."""
        from skimlm.pipeline.budget import Target

        bits = self.bits if self.bits is not None else METHODS[self.method].bits
        return Target(bits, self.size, self.index_bits)

    def resolved(self) -> CompressConfig:
        """The same, every None that has a default replaced by it."""
        usual, settings = METHODS[self.method], self.settings
        rank = usual.rank if self.rank is None else self.rank
        targeted = self.size is not None or self.index_bits is not None
        filled = {
            "bits": None if targeted else usual.bits,
            "sparsity": usual.sparsity,
            "rank": usual.rank,
            "adapter_bits": usual.adapter_bits if rank else None,
            "embed_bits": None if self.pools_tables else TABLE_BITS,
            "samples": settings.samples,
            "seq_len": settings.seq_len,
        }
        new = object.__new__(CompressConfig)  # checked already
        for name in OPTIONS:
            value = getattr(self, name)
            object.__setattr__(new, name, filled.get(name) if value is None else value)
        return new

    # ---- as plain values

    def to_json(self) -> dict[str, Any]:
        """Every field as a plain value."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CompressConfig:
        """The config again; fields that are missing have their defaults."""
        if not isinstance(values, Mapping):
            raise SkimError(f"a config is a map of names to values, got {values!r:.60}")
        unknown = [str(name) for name in values if name not in OPTIONS]
        if unknown:
            raise SkimError(f"no option {unknown[0]!r:.60}: allowed are {', '.join(OPTIONS)}")
        return cls(**values)

    def provenance(self) -> dict[str, Any]:
        """What determines the result, for the folder's config.json: defaults filled in, no None.

        Of the text only the file's name: the same folder comes out wherever the text lies.
        """
        values = self.resolved().to_json()
        kept = {n: v for n, v in values.items() if OPTIONS[n].result and v not in (None, [])}
        return kept | ({"text": Path(kept["text"]).name} if "text" in kept else {})

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> CompressConfig:
        """The config a compressed folder was made with, read from its config.json.

        `text` is the bare name of the file; how the run went (memory, workers, cache) is not kept.
        """
        file = Path(path) / "config.json"
        try:
            known = json.loads(file.read_text("utf-8"))["quantization_config"]["provenance"]
            values = known["config"]
        except (OSError, ValueError) as error:
            raise SkimError(f"{file}: cannot be read: {first_line(error)}") from error
        except (KeyError, TypeError):
            raise SkimError(
                f"{file}: does not say what the folder was made with; only folders that this "
                "version of skimlm compressed do"
            ) from None
        try:
            return cls.from_json(values)
        except SkimError as error:
            raise SkimError(f"{file}: {error}") from None


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(CompressConfig)}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(CompressConfig)}


def default_text(name: str) -> str:
    """The default of a field as its help text says it; empty if there is nothing to say."""
    if DEFAULTS[name] not in (None, ()) and DEFAULTS[name] is not False:
        return str(DEFAULTS[name])
    values = {method: getattr(usual, name, None) for method, usual in METHODS.items()}
    if None in values.values():
        return ""
    texts = {m: f"{v:g}" if isinstance(v, float) else str(v) for m, v in values.items()}
    (_, first), *others = texts.items()
    return "; ".join([first, *(f"{m}: {text}" for m, text in others if text != first)])
