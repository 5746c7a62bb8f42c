"""A model larger than memory: one decoder block at a time, every step on disk, to be resumed.

    analyse    inputs of every block, first to last; the loss; then backwards, last block first:
               each is run again with gradients, its linears analysed, the gradient passed on
    fit        block after block: codebooks and codes of its linears, (trained,) packed
    write      all of it into the files of OUT

What the blocks are given is exactly what `calibrate.statistics` gives them inside the whole model,
in the same batches: the results are the same, bit for bit. In `work` (journal.py) lie, each whole:
    inputs-I      hidden states before block I [n, t, d], deleted once block I is analysed
    gradient-I    d loss / d inputs-I: the analysis of block I and all after it is kept
    packed-I      what OUT holds of block I
    original-I, given-I   hidden states before block I, where blocks are trained (recipe best)
A block is loaded, used and dropped. The analysis of a linear goes to the cache (sensitivity.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from skimlm.errors import SkimError, first_line
from skimlm.format.pack import dequantize, pack
from skimlm.models.blocks import decoder_blocks
from skimlm.models.checkpoint import Checkpoint
from skimlm.models.hooks import frozen
from skimlm.models.source import loaded_block
from skimlm.pipeline import blockwise, sensitivity
from skimlm.pipeline.calibrate import BATCH, Sums, observed
from skimlm.pipeline.recipes import Recipe, fit_linear, packed_linear, settled
from skimlm.pipeline.workers import Submit, here
from skimlm.storage.safetensors import write_file
from skimlm.train.codebooks import norm_parameters, train_block
from skimlm.train.losses import backward, cross_entropy, next_tokens

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Streamed:
    """A model of which blocks are loaded when their turn comes."""

    source: Checkpoint
    model: Any  # blocks on the meta device
    linears: dict[str, nn.Linear]  # those to compress
    work: Path

    @cached_property
    def blocks(self) -> list[str]:
        """Names of the blocks, in order."""
        return [name for name, _ in decoder_blocks(self.model)]

    def inside(self, prefix: str) -> dict[str, nn.Linear]:
        """The linears of a block that are to be compressed."""
        return {n: m for n, m in self.linears.items() if n.startswith(prefix + ".")}

    def file(self, kind: str, i: int) -> Path:
        """Where something about block `i` lies."""
        return self.work / f"{kind}-{i:04}.safetensors"


# ---- analysis


def analyse(
    s: Streamed,
    stored: sensitivity.Stored,
    ids: Tensor,
    plan: Recipe,
    submit: Submit,
    progress: Progress,
) -> bool:
    """Fill `stored`; whether it was all there already."""
    missing = set(stored.missing())
    if not missing:
        return True
    count = len(s.blocks)
    at = min((i for i in range(count + 1) if s.file("gradient", i).exists()), default=None)
    if at is not None and any(n in missing for p in s.blocks[at:] for n in s.inside(p)):
        at = None  # the cache was deleted since: begin anew
        for i in range(count + 1):
            s.file("gradient", i).unlink(missing_ok=True)
    with torch.no_grad(), frozen(s.model):
        with loaded_block(s.source, s.model, s.blocks[0]):
            states, options, tupled = blockwise.entry(s.model, ids, BATCH)
        _forward(s, torch.cat(states), options, count if at is None else at - 1, progress)
        del states
        if at is None:
            at, gradient = count, _loss_gradient(s, ids, tupled)
            _keep(s.file("gradient", count), gradient)
        _backward(s, stored, options, at, plan, submit, progress)
    return False


def _forward(
    s: Streamed, first: Tensor, options: list[dict[str, Any]], last: int, progress: Progress
) -> None:
    """Keep the inputs of blocks 0 to `last`; those that are there already stay."""
    have = next((i for i in range(last + 1) if not s.file("inputs", i).exists()), last + 1)
    if have == 0:
        _keep(s.file("inputs", 0), first)
        have = 1
    for i in range(have, last + 1):
        before = _read(s.file("inputs", i - 1))
        with loaded_block(s.source, s.model, s.blocks[i - 1]) as block:
            parts = [blockwise.run(block, options[i - 1], x) for x in before.split(BATCH)]
        _keep(s.file("inputs", i), torch.cat(parts))
        progress("forward", i, last)


def _loss_gradient(s: Streamed, ids: Tensor, tupled: bool) -> Tensor:
    """d loss / d output of the last block [n, t, d]."""
    gradients = []
    final = _read(s.file("inputs", len(s.blocks)))
    for x, part in zip(final.split(BATCH), ids.split(BATCH), strict=True):
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            hidden = blockwise.remainder(s.model, part, x, tupled)
            backward(cross_entropy(s.model, next_tokens(part)), hidden)
        assert x.grad is not None
        gradients.append(x.grad)
    return torch.cat(gradients)


def _backward(
    s: Streamed,
    stored: sensitivity.Stored,
    options: list[dict[str, Any]],
    at: int,
    plan: Recipe,
    submit: Submit,
    progress: Progress,
) -> None:
    """Blocks at - 1 to 0: statistics, then the analysis of each linear, while the next is run."""
    count = len(s.blocks)
    gradient = _read(s.file("gradient", at))
    results: dict[str, Callable[[], sensitivity.Analysis]] = {}

    def settle(i: int, gradient: Tensor) -> None:
        """Block `i` and all after it are analysed once this has returned."""
        for name in list(results):
            stored.keep(name, results.pop(name)())
        _keep(s.file("gradient", i), gradient)
        s.file("gradient", i + 1).unlink(missing_ok=True)
        s.file("inputs", i + 1).unlink(missing_ok=True)
        s.file("inputs", i).unlink(missing_ok=True)
        progress("calibrate", count - i, count)

    for i in reversed(range(at)):
        with loaded_block(s.source, s.model, s.blocks[i]) as block:
            linears = s.inside(s.blocks[i])
            sums = Sums(linears, not plan.end_loss, plan.fisher_windows)
            inputs = _read(s.file("inputs", i))
            passed = _through(block, options[i], linears, sums, inputs, gradient)
            if results:
                settle(i + 1, gradient)
            gradient = passed
            collected = sums.finished(s.model.dtype)
            for name in linears:
                weight = s.model.get_submodule(name).weight.detach()
                results[name] = submit(sensitivity.of, weight, collected.pop(name), plan.end_loss)
        if submit is here:
            settle(i, gradient)
    if results:
        settle(0, gradient)


def _through(
    block: nn.Module,
    options: dict[str, Any],
    linears: Mapping[str, nn.Linear],
    sums: Sums,
    inputs: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Run a block again with gradients: its sums are taken; d loss / d inputs is returned."""
    passed = []
    with observed(linears, sums.observe):
        pairs = zip(inputs.split(BATCH), gradient.split(BATCH), strict=True)
        for number, (x, after) in enumerate(pairs):
            x = x.clone().requires_grad_()
            sums.begin(number * BATCH, len(x))
            with torch.enable_grad():
                blockwise.run(block, options, x).backward(after)
            assert x.grad is not None
            passed.append(x.grad)
    return torch.cat(passed)


# ---- fit and write


def fit(
    s: Streamed,
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    submit: Submit,
    progress: Progress,
) -> None:
    """Keep what OUT will hold of every block; a plan with training is for `fit_trained`."""
    pending: list[tuple[int, dict[str, Tensor], dict[str, Callable[[], dict[str, Tensor]]]]] = []

    def settle() -> None:
        i, others, results = pending.pop()
        tensors = dict(others)
        for name, result in results.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in result().items()}
        write_file(s.file("packed", i), tensors, {})
        progress("fit", i + 1, len(s.blocks))

    for i, prefix in enumerate(s.blocks):
        if s.file("packed", i).exists():
            continue
        with loaded_block(s.source, s.model, prefix) as block:
            weights, others = _apart(s, prefix, block)
            results = {
                name: submit(packed_linear, weight, stored[name], widths[name], plan)
                for name, weight in weights.items()
            }
        if pending:
            settle()
        pending.append((i, others, results))
        if submit is here:
            settle()
    if pending:
        settle()


def fit_trained(
    s: Streamed,
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    ids: Tensor,
    plan: Recipe,
    submit: Submit,
    progress: Progress,
) -> None:
    """The same, every block being trained to make of the compressed ones' output the original's.

    Hidden states go through the original and the compressed blocks side by side: original-I and
    given-I are those before block I, kept until the block is packed.
    """
    with torch.no_grad(), frozen(s.model):
        with loaded_block(s.source, s.model, s.blocks[0]):
            first, options, _ = blockwise.entry(s.model, ids, BATCH)
        if not s.file("given", 0).exists() and not s.file("packed", 0).exists():
            _keep(s.file("original", 0), torch.cat(first))
            _keep(s.file("given", 0), torch.cat(first))
        del first
        for i, prefix in enumerate(s.blocks):
            if not s.file("packed", i).exists():
                with loaded_block(s.source, s.model, prefix) as block:
                    _fit_and_train(s, i, block, options[i], stored, widths, plan, submit)
            s.file("given", i).unlink(missing_ok=True)
            s.file("original", i).unlink(missing_ok=True)
            progress("fit", i + 1, len(s.blocks))


def _fit_and_train(
    s: Streamed,
    i: int,
    block: nn.Module,
    options: dict[str, Any],
    stored: Mapping[str, sensitivity.Analysis],
    widths: Mapping[str, Tensor],
    plan: Recipe,
    submit: Submit,
) -> None:
    """Keep block `i` as OUT will hold it, and the hidden states after it."""
    prefix, linears = s.blocks[i], s.inside(s.blocks[i])
    original, given = _read(s.file("original", i)), _read(s.file("given", i))
    weights, tensors = _apart(s, prefix, block)
    results = {
        name: submit(fit_linear, weight.float(), stored[name], widths[name], plan)
        for name, weight in weights.items()
    }

    def advance(states: Tensor) -> None:
        for part in states.split(BATCH):
            part.copy_(blockwise.run(block, options, part))

    advance(original)
    fits = {name: result() for name, result in results.items()}
    norms = {f"{prefix}.{n}": p for n, p in norm_parameters(block).items()}
    trained, _ = train_block(
        lambda x: blockwise.run(block, options, x),
        linears,
        fits,
        norms,
        given,
        original,
        _weight(linears, stored, given.shape[-1]),
        steps=plan.steps,
    )
    tensors |= trained
    for name, weight in trained.items():
        norms[name].copy_(weight)
    for name, linear in linears.items():
        q = settled(weights[name].float(), stored[name], fits.pop(name), plan)
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack(q).tensors.items()}
        linear.weight.copy_(dequantize(q))
    advance(given)
    _keep(s.file("original", i + 1), original)
    _keep(s.file("given", i + 1), given)
    write_file(s.file("packed", i), tensors, {})


def _weight(
    linears: Mapping[str, nn.Linear], stored: Mapping[str, sensitivity.Analysis], width: int
) -> Tensor:
    """What each number of a block's output counts in the end [d]: the gradient it gets.

    That is the gradient of the last linear that writes to the residual stream; a norm behind it,
    as in gemma, scales it.
    """
    names = [name for name, linear in linears.items() if linear.out_features == width]
    return stored[names[-1]].row_weight if names else torch.ones(width)


def _apart(
    s: Streamed, prefix: str, block: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a block that are compressed, and all its other tensors, by their names."""
    others = {f"{prefix}.{name}": t.detach() for name, t in block.state_dict().items()}
    return {name: others.pop(f"{name}.weight") for name in s.inside(prefix)}, others


def packed(s: Streamed) -> Callable[[str], Tensor]:
    """A function that reads what `fit` has kept, by the tensor's name."""
    where: dict[str, Path] = {}
    for i in range(len(s.blocks)):
        with safe_open(s.file("packed", i), framework="pt") as stream:
            where |= dict.fromkeys(stream.keys(), s.file("packed", i))

    def read(name: str) -> Tensor:
        with safe_open(where[name], framework="pt") as stream:
            return stream.get_tensor(name)

    return read


def _keep(file: Path, tensor: Tensor) -> None:
    write_file(file, {"x": tensor}, {})


def _read(file: Path) -> Tensor:
    try:
        with safe_open(file, framework="pt") as stream:
            return stream.get_tensor("x")
    except Exception as error:
        raise SkimError(
            f"{file}: cannot be read ({first_line(error)}); --force begins anew"
        ) from error
