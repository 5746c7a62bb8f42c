"""What `import skimlm` gives: a model in, a smaller one out, and both put to work.

    compress(model, out, bits=3.2)    -> Report       a folder that transformers loads
    load(path)                        -> Model        generate, stream, perplexity, skills
    Skill.compress("SKILL.md", model) -> Skill        a skill in fewer tokens: save, load, evaluate
    inspect, export, finetune                         of a compressed folder

Nothing is computed here: every function checks what it was given and calls the one that does it.
A user's mistake is a SkimError, told in one line. docs/api.md shows all of it at work.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from skimlm.errors import SkimError, first_line
from skimlm.evaluate import held_out_text, read_text
from skimlm.evaluate.perplexity import Perplexity
from skimlm.evaluate.perplexity import perplexity as measure_perplexity
from skimlm.generate import Generation
from skimlm.generate import generate as generate_text
from skimlm.models.checkpoint import load as load_checkpoint
from skimlm.pipeline.config import CompressConfig
from skimlm.skills import store
from skimlm.skills.document import read as read_document
from skimlm.skills.front import Standing
from skimlm.skills.splice import token_ids

if TYPE_CHECKING:
    from skimlm.pipeline.compress import Report
    from skimlm.pipeline.export import Report as ExportReport
    from skimlm.pipeline.finetune import Report as FinetuneReport

PathLike = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]  # (phase, done, total)
Notice = Callable[[str], None]  # one line for the user
Made = TypeVar("Made")


def compress(
    model: PathLike,
    out: PathLike,
    config: CompressConfig | None = None,
    *,
    progress: Progress | None = None,
    notice: Notice | None = None,
    **options: Any,
) -> Report:
    """Compress a model (folder, hub id or .gguf) into the folder `out`.

    What is wanted is given as options (`bits=3.2`, `recipe="fast"`, ...: the fields of
    CompressConfig), as a `config`, or as a config with some options replaced. `out` is whole or
    absent. Raises SkimError for whatever a user can get wrong.
    """
    from skimlm.pipeline.compress import compress as run_compress

    values = ({} if config is None else config.to_json()) | options
    chosen = CompressConfig.from_json(values)
    return run_compress(model, out, chosen, progress=progress, notice=notice)


def load(
    path: PathLike,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> Model:
    """Load a model, compressed or not, with its tokenizer: a folder, a hub id or a .gguf.

    `revision` is a hub model's branch, tag or commit. Raises SkimError for a damaged file, a device
    that is not there or a dtype that is none.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise SkimError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SkimError(f"device {str(device)!r} cannot be used: {first_line(error)}") from None
    loaded, tokenizer = load_checkpoint(path, kind, revision=revision)
    return Model(loaded.to(device), tokenizer)


def inspect(path: PathLike) -> dict[str, Any]:
    """Describe a compressed folder or a .skim file: sizes, bits, provenance, as plain values."""
    from skimlm.evaluate.report import inspect as inspect_folder

    return store.inspect(path) if Path(path).suffix == store.SUFFIX else inspect_folder(path)


def export(
    path: PathLike,
    out: PathLike,
    to: str = "dense",
    *,
    dtype: str | torch.dtype | None = None,
    dense_base: bool = False,
    force: bool = False,
) -> ExportReport:
    """Write a compressed folder for tools that do not know skimlm.

    `to`: "dense", an ordinary Hugging Face folder, or "peft", a base in out/base and its adapters
    in out/adapter; with `dense_base` that base is ordinary too. `dtype` is that of an ordinary
    folder, by default the model's.
    """
    from skimlm.pipeline.export import export as write_export

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(kind, torch.dtype):
        raise SkimError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    return write_export(path, out, to, dtype=kind, dense_base=dense_base, force=force)


def finetune(
    path: PathLike,
    out: PathLike,
    text: PathLike,
    *,
    teacher: PathLike | None = None,
    text_key: str | None = None,
    force: bool = False,
    cache_dir: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> FinetuneReport:
    """Train the adapters of a compressed folder on a text file, into the folder `out`.

    With a `teacher` its output is learned, not the text. `settings`: tokens (300_000), seq_len
    (512), batch (4), lr (0.01), seed (0). Raises SkimError for what a user can get wrong.
    """
    from skimlm.pipeline.finetune import Settings
    from skimlm.pipeline.finetune import finetune as run_finetune

    chosen = _settings(Settings, settings)
    return run_finetune(
        path,
        out,
        text,
        chosen,
        teacher=teacher,
        text_key=text_key,
        force=force,
        cache_dir=cache_dir,
        progress=progress,
    )


def _settings(kind: Callable[..., Made], values: Mapping[str, Any]) -> Made:
    """A dataclass of settings; SkimError for a name it does not have."""
    allowed = [known.name for known in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in allowed:
            raise SkimError(f"no option {name!r:.60}: allowed are {', '.join(allowed)}")
    return kind(**values)


@dataclass(frozen=True)
class Skill:
    """A SKILL.md made shorter for one model; its full text stays inside."""

    stored: store.Skill = field(repr=False)
    where: str = ""  # the file it was read from

    @classmethod
    def compress(
        cls,
        path: PathLike,
        model: Model,
        *,
        kind: str | None = None,
        method: str | None = None,
        tokens: int | None = None,
        ratio: float | None = None,
        target: float | None = None,
        recall: float | None = None,
        compressor: PathLike | None = None,
        pin: bool = False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Skill:
        """Compress a SKILL.md for a model: seconds on a CPU, of kind "soft" minutes.

        A folder of skills is its catalogue: all names and descriptions.

        By default ("kv") it keeps the keys and values that matter, as few as measure up: a closure
        of `target` (0.95) to the full text (1: answers as with it, 0: as without) and a share
        `recall` (0.9) of its literals. Else `tokens`, or a share `ratio` of the text's, fixes the
        size. `settings`: train, dev, answer, steps, seed and the others of skills/gate.py. For
        soft tokens alone: `method`, `compressor`, and `pin`, which keeps code, commands, numbers
        and prohibitions as text.
        """
        from skimlm.skills import compression, gate

        if tokens is not None and ratio is not None:
            raise SkimError("give one of ratio and tokens")
        _settings(gate.Settings, settings)
        made = compression.compress(
            model.model,
            model.tokenizer,
            read_document(path),
            kind=kind,
            method=method,
            tokens=tokens,
            ratio=ratio,
            target=compression.TARGET if target is None else target,
            floor=compression.FLOOR if recall is None else recall,
            pin=pin,
            compressor=compressor,
            settings=settings,
            progress=progress,
        )
        return cls(made, str(path))

    @classmethod
    def load(cls, path: PathLike) -> Skill:
        """Read a .skim file, all of it checked; FormatError if it is damaged.

        Refused too where the SKILL.md beside it, which it was made from, has changed since.
        """
        stored = store.read(path)
        store.check_source(path, stored)
        return cls(stored, str(path))

    @property
    def name(self) -> str:
        """Its name, from the front matter of the SKILL.md."""
        return self.stored.name

    @property
    def text(self) -> str:
        """The full text."""
        return self.stored.document.text

    @property
    def short(self) -> str:
        """What stands for it where nothing but text can: fewer lines, if of kind "text"."""
        return store.as_text(self.stored)

    def save(self, path: PathLike, *, force: bool = False) -> None:
        """Write it as a .skim file, whole or not at all; `force` replaces one that is there."""
        store.check_out(Path(path), force)
        store.write(path, self.stored)

    def evaluate(self, model: Model, *, questions: int = 64, answer: int = 48) -> dict[str, Any]:
        """Measure what it keeps of its full text, on questions that it was not trained on.

        Gives closure, kl, literal_recall, tokens and text_tokens among others. SkimError if it was
        made for another model.
        """
        from skimlm.skills.evaluate import measure as measure_skill

        store.check_fresh(self.stored, model.model, model.tokenizer, self._title)
        return measure_skill(
            model.model,
            model.tokenizer,
            self.stored.document,
            self.stored,
            questions,
            answer,
            False,
            self._title,
        )

    @property
    def _title(self) -> str:
        return self.where or self.name


@dataclass
class Model:
    """A loaded model and its tokenizer; whatever transformers does with them works as usual."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any
    notice: Notice = field(default=lambda line: warnings.warn(line, stacklevel=4), repr=False)
    _skills: dict[str, Standing] = field(default_factory=dict, init=False, repr=False)

    @property
    def skills(self) -> tuple[str, ...]:
        """Names of the skills that were added."""
        return tuple(self._skills)

    def add_skill(self, skill: Skill | PathLike, name: str | None = None) -> str:
        """Make a skill (a Skill, a .skim file or a SKILL.md) known by its name, or by `name`.

        Returns the name. One that was made for another model is used as its full text; `notice`
        (by default a warning) is told so.
        """
        own, stands = self._standing(skill)
        self._skills[name or own] = stands
        return name or own

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        skills: Sequence[str | Skill | os.PathLike[str]] = (),
        raw: bool = False,
        temperature: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        write: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer `prompt`, or with `raw` continue it as it is; the text is in `.text`.

        `skills` stand before it: names of added ones, Skills or files. A `temperature` of 0 is
        greedy; a `repetition_penalty` above 1 makes tokens that were said before less likely.
        `write` receives each piece of text as soon as it is whole.
        """
        return generate_text(
            self.model,
            self.tokenizer,
            prompt,
            max_new_tokens,
            skills=[self._named(skill) for skill in skills],
            raw=raw,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            write=write,
        )

    def stream(self, prompt: str, max_new_tokens: int = 128, **options: Any) -> Iterator[str]:
        """Give the pieces of an answer as they come; `options` are those of `generate`.

        Leaving the loop ends the generation. Errors are raised where the pieces are taken.
        """
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        failed: list[BaseException] = []
        left = threading.Event()

        def write(piece: str) -> None:
            if left.is_set():
                raise _Left
            if piece:
                pieces.put(piece)

        def work() -> None:
            try:
                self.generate(prompt, max_new_tokens, **options, write=write)
            except BaseException as error:
                failed.append(error)
            pieces.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            left.set()
            thread.join()
        if failed:
            raise failed[0]

    def perplexity(
        self,
        text: str | os.PathLike[str] | None = None,
        *,
        seq_len: int = 2048,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Perplexity:
        """Measure the perplexity on a text, in windows of `seq_len` tokens.

        A str is the text itself, a Path a file of it, None a text that every Python carries. With a
        `limit` only so many windows are read.
        """
        if text is None:
            text, _ = held_out_text()
        words = text if isinstance(text, str) else read_text(Path(text))
        return measure_perplexity(self.model, self.tokenizer, words, seq_len, limit, progress)

    def _named(self, skill: str | Skill | os.PathLike[str]) -> Standing:
        """What stands in a prompt for a skill."""
        if isinstance(skill, str) and skill in self._skills:
            return self._skills[skill]
        if isinstance(skill, str) and not Path(skill).is_file():
            known = ", ".join(self._skills) or "none"
            raise SkimError(f"no skill {skill!r}: added are {known}; or give a .skim or a SKILL.md")
        return self._standing(skill)[1]

    def _standing(self, skill: Skill | PathLike) -> tuple[str, Standing]:
        """The name of a skill and what stands in a prompt for it."""
        if not isinstance(skill, Skill) and Path(skill).suffix != store.SUFFIX:
            document = read_document(skill)
            return document.name, [token_ids(self.tokenizer, document.text)]
        made = skill if isinstance(skill, Skill) else Skill.load(skill)
        stands, warning = store.fitting(made.stored, self.model, self.tokenizer, made._title)
        if warning:
            self.notice(warning)
        return made.name, stands


class _Left(Exception):
    """Nobody takes the pieces any more."""
