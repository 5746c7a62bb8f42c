"""Fine-tuning of a compressed folder: its adapters A, B are trained on a text, nothing else moves.

    compressed folder + text -> windows -> steps on A, B through their rounding -> the same folder

SLiM's recipe (2410.09615): codes, masks, scales, norms, embedding and head are frozen. A step runs
with the adapters as they would be stored,

    y = x W^T + bias + (x R(A)^T) R(B)     R rounds to bfloat16, or to 4 bits at the stored scales

and the gradient passes R as if it were not there (straight-through). Loss: cross entropy, or with a
teacher KL(teacher || model) over all tokens. Some windows are held out; the state of least loss on
them is kept, the start included. Parameters are relative: A = theta * rms of its component.

The loop is train/loop.py's, with its optimiser and state file: adapters need neither PEFT,
which does not know these linears nor 4-bit adapters, nor more of accelerate than one device has.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import skimlm
from skimlm.errors import SkimError
from skimlm.format.pack import (
    Adapter,
    pack_adapter,
)
from skimlm.integrations.swap import aliases
from skimlm.models.architecture import check_positions
from skimlm.models.checkpoint import Checkpoint, load, load_tokenizer, open_compressed
from skimlm.models.tokenizer import check_ids
from skimlm.models.write import rewrite
from skimlm.pipeline import sensitivity
from skimlm.pipeline.text import read_documents, windows
from skimlm.progress import peak_rss_bytes
from skimlm.storage.folder import check_apart, check_out, folder_bytes, whole_folder
from skimlm.storage.safetensors import read_json
from skimlm.train.adapters import HELD_OUT, adapted, next_token_loss, teacher_loss, train
from skimlm.train.loop import passes

Progress = Callable[[str, int, int], None]


@dataclass
class Report:
    """What a run did and what it cost."""

    out: str
    adapters: int
    numbers: int  # trained
    text: str
    seq_len: int
    windows: int  # trained on, each pass over the text counted
    tokens: int  # windows * seq_len: what of the budget was used
    passes: float  # over the windows that were not held out
    held_out_tokens: int
    loss: str  # "cross entropy" or "KL", in nats per token
    held_out: list[float]  # before, and at every check
    held_out_before: float
    held_out_after: float  # of what was stored
    improved: bool  # if not, the adapters are stored unchanged
    bytes: int  # of the whole folder
    seconds: dict[str, float]
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Settings:
    """How much is trained: at most `tokens` tokens, in windows of `seq_len`, `batch` at a step.

    The budget is used up to the last whole window; a shorter text is read again. `lr` is relative
    to the size of an adapter's component. SkimError for what cannot be.
    """

    tokens: int = 300_000
    seq_len: int = 512
    batch: int = 4
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seq_len < 2 or self.batch < 1:
            raise SkimError(
                f"seq-len must be at least 2 and batch 1, got {self.seq_len} and {self.batch}"
            )
        if not self.windows:
            raise SkimError(
                f"{self.tokens} tokens are less than one window of {self.seq_len}: give more"
            )

    @property
    def windows(self) -> int:
        """Windows to train on."""
        return self.tokens // self.seq_len


def finetune(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    teacher: str | os.PathLike[str] | None = None,
    text_key: str | None = None,
    force: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Train the adapters of a compressed folder on `text`, or on what `teacher` says, into OUT.

    A run that was interrupted goes on where it was. SkimError for what a user can get wrong.
    """
    start, settings = time.perf_counter(), settings or Settings()
    opened = _opened(path, out, force)
    check_positions(opened.config, settings.seq_len)
    tokenizer = load_tokenizer(opened)
    documents = read_documents(text, text_key, tokenizer)
    model, _ = load(opened, tokenizer=tokenizer)
    ids, unseen = _windows(documents, model, tokenizer, settings, str(text))
    loss_of = next_token_loss(model)
    if teacher is not None:
        loss_of = teacher_loss(model, _teacher(teacher, tokenizer, documents[0]))
    order = passes(len(ids), settings.windows, settings.batch, settings.seed)
    key = _key(opened, teacher, ids, unseen, [order, settings.lr])
    state_file = sensitivity.folder(cache_dir) / f"{key}.state"
    loaded = time.perf_counter()
    tell = progress or (lambda *_: None)
    adapters, losses = train(
        model, adapted(model), ids, unseen, order, loss_of, settings.lr, state_file, tell
    )
    trained = time.perf_counter()
    report = Report(
        out=str(out),
        adapters=len(adapters),
        numbers=sum(a.a.numel() + a.b.numel() for a in adapters.values()),
        text=Path(text).name,
        seq_len=settings.seq_len,
        windows=settings.windows,
        tokens=settings.windows * settings.seq_len,
        passes=round(settings.windows / len(ids), 3),
        held_out_tokens=unseen.numel(),
        loss="cross entropy" if teacher is None else "KL",
        held_out=losses,
        held_out_before=losses[0],
        held_out_after=min(losses) if min(losses) < losses[0] else losses[0],
        improved=min(losses) < losses[0],
        bytes=0,
        seconds={},
        peak_rss_bytes=0,
    )
    _write(Path(out), opened, model, adapters, report)
    state_file.unlink(missing_ok=True)
    report.bytes = folder_bytes(out)
    report.seconds = _seconds(start, loaded, trained, time.perf_counter())
    report.peak_rss_bytes = peak_rss_bytes()
    return report


def _windows(
    documents: list[str], model: Any, tokenizer: Any, settings: Settings, where: str
) -> tuple[Tensor, Tensor]:
    """Windows [n, t] to train on and those that are held out."""
    length = settings.seq_len
    count = settings.windows + HELD_OUT
    ids = windows(documents, tokenizer, count, length, settings.seed, where)
    check_ids(model, ids, tokenizer)
    if len(ids) < 2:
        raise SkimError(f"{where}: one window of {length} is too little, one is held out")
    held = min(HELD_OUT, max(1, len(ids) // 8))
    return ids[held:], ids[:held]


def _seconds(*ends: float) -> dict[str, float]:
    phases = zip(("load", "train", "write"), ends, ends[1:], strict=False)
    return {phase: round(b - a, 3) for phase, a, b in phases}


def _opened(path: str | os.PathLike[str], out: str | os.PathLike[str], force: bool) -> Checkpoint:
    """The compressed folder, refused if it has no adapters or OUT cannot be written."""
    check_apart(out, path)
    check_out(out, force)
    opened = open_compressed(path)
    if not any(name.endswith(".lora_a") for name in opened.files):
        raise SkimError(f"{path}: has no adapters to train; compress with --rank 0.1")
    return opened


def _teacher(teacher: str | os.PathLike[str], tokenizer: Any, text: str) -> Any:
    """The model to learn from; SkimError unless it reads a text as the same tokens."""
    model, other = load(teacher)
    sample = text[:10_000]
    if other(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise SkimError(f"{teacher}: reads the text as other tokens, so it cannot teach this model")
    return model


def _key(
    opened: Checkpoint,
    teacher: str | os.PathLike[str] | None,
    ids: Tensor,
    unseen: Tensor,
    options: list[Any],
) -> str:
    """Name of a training: changes with the folder's content, teacher, windows, options, version."""
    digest = hashlib.sha256(json.dumps([skimlm.__version__, str(teacher), *options]).encode())
    for file in sorted({*opened.files.values(), opened.path / "config.json"}):
        with file.open("rb") as stream:
            while piece := stream.read(2**24):
                digest.update(piece)
    for tokens in (ids, unseen):
        digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(
    out: Path,
    opened: Checkpoint,
    model: Any,
    adapters: Mapping[str, Adapter],
    report: Report,
) -> None:
    """The folder again, with these adapters and what was done to them in its provenance."""
    changed: dict[str, Tensor | None] = {}
    for name, adapter in adapters.items():
        stored = next(n for n in aliases(model, name) if f"{n}.lora_a" in opened.files)
        changed |= {f"{stored}.{part}": t for part, t in pack_adapter(adapter).items()}
    config = read_json(opened.path / "config.json")
    facts = ("text", "seq_len", "tokens", "loss", "held_out_before", "held_out_after")
    provenance = config["quantization_config"].setdefault("provenance", {})
    provenance["finetune"] = {fact: getattr(report, fact) for fact in facts}
    with whole_folder(out) as folder:
        rewrite(opened, folder, changed, config)
