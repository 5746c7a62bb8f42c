"""Fine-tuning of a compressed folder: its adapters A, B are trained on a text, nothing else moves.

    compressed folder + text -> windows -> steps on A, B through their rounding -> the same folder

SLiM's recipe (2410.09615): codes, masks, scales, norms, embedding and head are frozen. A step runs
with the adapters as they would be stored,

    y = x W^T + bias + (x R(A)^T) R(B)     R rounds to bfloat16, or to 4 bits at the stored scales

and the gradient passes R as if it were not there (straight-through). Loss: cross entropy, or with a
teacher KL(teacher || model) over all tokens. Some windows are held out; the state of least loss on
them is kept, the start included. Parameters are relative: A = theta * rms of its component.

The loop is optimize.py's, with its optimiser and state file: adapters need neither PEFT,
which does not know these linears nor 4-bit adapters, nor more of accelerate than one device has.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import skimlm
from skimlm import analysis, checkpoint, shards
from skimlm.calibrate import backward_from_loss, read_documents, windows
from skimlm.errors import SkimError
from skimlm.head import final_hidden, head_logits
from skimlm.hooks import frozen
from skimlm.integrations.transformers import aliases
from skimlm.linear import CompressedLinear
from skimlm.optimize import descend
from skimlm.report import peak_rss_bytes
from skimlm.weights.pack import (
    ADAPTER_GROUP,
    Adapter,
    factor_values,
    pack_adapter,
    spread,
    unpack_adapter,
)

HELD_OUT = 16  # windows, at most an eighth of all
CHECKS = 5  # times the held-out loss is measured along the way
CHUNK = 512  # tokens whose logits stand at once
Progress = Callable[[str, int, int], None]
Values: TypeAlias = Mapping[str, Tensor]  # a.NAME [k, c] and b.NAME [k, r] of every adapter
# of windows: the sum of the losses of a part of their tokens by final hidden states, and how many
Objective = Callable[[Tensor], tuple[Callable[[Tensor, slice], Tensor], int]]


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


def finetune(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    tokens: int = 300_000,
    seq_len: int = 512,
    batch: int = 4,
    lr: float = 1e-2,
    seed: int = 0,
    teacher: str | os.PathLike[str] | None = None,
    text_key: str | None = None,
    force: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Train the adapters of a compressed folder on at most `tokens` tokens of `text`, into OUT.

    The budget is used up to the last whole window of `seq_len` tokens; a shorter text is read
    again. `batch` windows make a step, `lr` is relative to the size of an adapter's component. A
    run that was interrupted goes on where it was. Raises SkimError for what a user can get wrong.
    """
    start = time.perf_counter()
    count = tokens // seq_len
    if seq_len < 2 or batch < 1:
        raise SkimError(f"seq-len must be at least 2 and batch 1, got {seq_len} and {batch}")
    if count < 1:
        raise SkimError(f"{tokens} tokens are less than one window of {seq_len}: give more")
    opened = _opened(path, out, force)
    documents = read_documents(text, text_key)
    model, tokenizer = checkpoint.load(opened)
    reach = getattr(model.config, "max_position_embeddings", None)
    if reach and seq_len > reach:
        raise SkimError(f"seq-len must be at most {reach} for this model, got {seq_len}")
    ids = windows(documents, tokenizer, count + HELD_OUT, seq_len, seed, str(text))
    if len(ids) < 2:
        raise SkimError(f"{text}: one window of {seq_len} is too little, one is held out")
    held = min(HELD_OUT, max(1, len(ids) // 8))
    ids, unseen = ids[held:], ids[:held]
    objective = cross_entropy(model)
    if teacher is not None:
        objective = divergence(model, _teacher(teacher, tokenizer, documents[0]))
    order = _order(len(ids), count, batch, seed)
    key = _key(opened, teacher, ids, unseen, [order, lr])
    state_file = analysis.folder(cache_dir) / f"{key}.state"
    loaded = time.perf_counter()
    layers = adapted(model)
    adapters, losses = train(
        model, layers, ids, unseen, order, objective, lr, state_file, progress or (lambda *_: None)
    )
    trained = time.perf_counter()
    report = Report(
        out=str(out),
        adapters=len(layers),
        numbers=sum(a.a.numel() + a.b.numel() for a in adapters.values()),
        text=Path(text).name,
        seq_len=seq_len,
        windows=count,
        tokens=count * seq_len,
        passes=round(count / len(ids), 3),
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
    report.bytes = checkpoint.folder_bytes(out)
    ends = (start, loaded, trained, time.perf_counter())
    phases = zip(("load", "train", "write"), ends, ends[1:], strict=False)
    report.seconds = {phase: round(b - a, 3) for phase, a, b in phases}
    report.peak_rss_bytes = peak_rss_bytes()
    return report


def _opened(
    path: str | os.PathLike[str], out: str | os.PathLike[str], force: bool
) -> checkpoint.Checkpoint:
    """The compressed folder, refused if it has no adapters or OUT cannot be written."""
    if Path(path).exists() and Path(path).resolve() == Path(out).resolve():
        raise SkimError(f"{out}: is the model itself; name another folder")
    checkpoint.check_out(out, force)
    opened = checkpoint.open_compressed(path)
    if not any(name.endswith(".lora_a") for name in opened.files):
        raise SkimError(f"{path}: has no adapters to train; compress with --rank 0.1")
    return opened


def _teacher(teacher: str | os.PathLike[str], tokenizer: Any, text: str) -> Any:
    """The model to learn from; SkimError unless it reads a text as the same tokens."""
    model, other = checkpoint.load(teacher)
    sample = text[:10_000]
    if other(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise SkimError(f"{teacher}: reads the text as other tokens, so it cannot teach this model")
    return model


def _order(count: int, total: int, batch: int, seed: int) -> list[list[int]]:
    """Which windows each step sees, `total` in all: one shuffled pass after the other."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while len(queue) < total:
        queue += torch.randperm(count, generator=generator).tolist()
    return [queue[i : min(i + batch, total)] for i in range(0, total, batch)]


def _key(
    opened: checkpoint.Checkpoint,
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
    opened: checkpoint.Checkpoint,
    model: Any,
    adapters: Mapping[str, Adapter],
    report: Report,
) -> None:
    """The folder again, with these adapters and what was done to them in its provenance."""
    changed: dict[str, Tensor | None] = {}
    for name, adapter in adapters.items():
        stored = next(n for n in aliases(model, name) if f"{n}.lora_a" in opened.files)
        changed |= {f"{stored}.{part}": t for part, t in pack_adapter(adapter).items()}
    config = shards.read_json(opened.path / "config.json")
    facts = ("text", "seq_len", "tokens", "loss", "held_out_before", "held_out_after")
    provenance = config["quantization_config"].setdefault("provenance", {})
    provenance["finetune"] = {fact: getattr(report, fact) for fact in facts}
    with shards.whole_folder(out) as folder:
        checkpoint.rewrite(opened, folder, changed, config)


# ---- training


def adapted(model: nn.Module) -> dict[str, CompressedLinear]:
    """The linears that have an adapter, by name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    return {name: layer for name, layer in layers.items() if layer.parts.rank}


def stored_adapter(layer: CompressedLinear) -> Adapter:
    """The adapter of a linear that has one, as it is stored."""
    adapter = unpack_adapter(layer.tensors(), layer.out_features, layer.in_features, layer.parts)
    assert adapter is not None
    return adapter


def train(
    model: Any,
    layers: Mapping[str, CompressedLinear],
    ids: Tensor,
    unseen: Tensor,
    order: list[list[int]],
    objective: Objective,
    lr: float,
    state_file: Path | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[dict[str, Adapter], list[float]]:
    """The best adapters seen, and the losses on `unseen` [m, t] at the start and at each check.

    Step i reads the windows `ids[order[i]]`. `model` is left as it was.
    """
    before = {name: stored_adapter(layer) for name, layer in layers.items()}
    scales = {f"{f}.{n}": getattr(q, f"{f}_scale") for n, q in before.items() for f in "ab"}
    exact = {f"{f}.{n}": x for n, q in before.items() for f, x in _named(q).items()}
    units = {n: x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12) for n, x in exact.items()}
    steps, total = len(order), sum(map(len, order))
    done = list(itertools.accumulate(map(len, order)))

    def factor(name: str, theta: Tensor) -> Tensor:
        return _Rounded.apply(theta * units[name], scales[name])

    with frozen(model):
        tests = [(part, *objective(part)) for part in unseen.split(len(order[0]))]

        def held_out(values: dict[str, Tensor]) -> float:
            with torch.no_grad(), _placed(layers, {n: factor(n, v) for n, v in values.items()}):
                total = sum(_loss_sum(model, part, loss) for part, loss, _ in tests)
            return total / sum(count for *_, count in tests)

        def gradients(values: dict[str, Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
            part = ids[order[step]]
            loss, _ = objective(part)
            leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
            with _placed(layers, {n: factor(n, v) for n, v in leaves.items()}):
                backward_from_loss(final_hidden(model, part), _gradient(loss), CHUNK)
            return {n: (leaf.grad, lr) for n, leaf in leaves.items() if leaf.grad is not None}

        state = descend(
            {n: x / units[n] for n, x in exact.items()},
            steps,
            gradients,
            held_out,
            checks=CHECKS,
            file=state_file,
            progress=lambda step: progress("finetune", done[step - 1], total),
        )
    best = {n: rounded(v * units[n], scales[n]) for n, v in state.best.items()}
    adapters = {
        n: dataclasses.replace(q, a=best[f"a.{n}"], b=best[f"b.{n}"]) for n, q in before.items()
    }
    return (adapters if min(state.losses) < state.losses[0] else before), state.losses


def _named(adapter: Adapter) -> dict[str, Tensor]:
    return dict(zip("ab", adapter.values(), strict=True))


@contextmanager
def _placed(layers: Mapping[str, CompressedLinear], values: Values) -> Iterator[None]:
    """Within the block the linears compute with these factors of their adapters."""
    try:
        for name, layer in layers.items():
            layer.adapter = values[f"a.{name}"], values[f"b.{name}"]
        yield
    finally:
        for layer in layers.values():
            layer.adapter = None


def rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """A factor [k, n] as it is stored: bfloat16, or int8 codes -8..7 to the scales it has."""
    if scale is None:
        return x.bfloat16()
    step = spread(scale, ADAPTER_GROUP, x.shape[1])
    return (x / torch.where(step == 0, 1.0, step)).round_().clamp_(-8, 7).to(torch.int8)


class _Rounded(torch.autograd.Function):
    """The value of a factor as it is stored, with the gradient of one that is not rounded."""

    @staticmethod
    def forward(ctx, x, scale):
        return factor_values(rounded(x, scale), scale)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


# ---- losses


def cross_entropy(model: Any) -> Objective:
    """-log p(next token), summed; the last token of a window predicts none."""

    def objective(ids: Tensor) -> tuple[Callable[[Tensor, slice], Tensor], int]:
        targets = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1).flatten()

        def loss(hidden: Tensor, part: slice) -> Tensor:
            logits = head_logits(model, hidden).float()
            return nn.functional.cross_entropy(
                logits, targets[part], ignore_index=-1, reduction="sum"
            )

        return loss, ids.numel() - len(ids)

    return objective


def divergence(model: Any, teacher: Any) -> Objective:
    """KL(teacher || model), summed over all tokens."""

    def objective(ids: Tensor) -> tuple[Callable[[Tensor, slice], Tensor], int]:
        with torch.no_grad():
            known = final_hidden(teacher, ids).flatten(0, 1)

        def loss(hidden: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                target = head_logits(teacher, known[part]).float().log_softmax(-1)
            logits = head_logits(model, hidden).float().log_softmax(-1)
            return nn.functional.kl_div(logits, target, reduction="sum", log_target=True)

        return loss, ids.numel()

    return objective


def _loss_sum(model: Any, ids: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> float:
    hidden = final_hidden(model, ids).flatten(0, 1)
    parts = [slice(i, i + CHUNK) for i in range(0, len(hidden), CHUNK)]
    return sum(loss(hidden[part], part).item() for part in parts)


def _gradient(loss: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor, slice], Tensor]:
    """d loss / d hidden for `backward_from_loss`."""

    def gradient(hidden: Tensor, part: slice) -> Tensor:
        hidden = hidden.requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(loss(hidden, part), hidden)[0]

    return gradient
