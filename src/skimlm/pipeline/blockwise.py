"""Block after block: each is fitted to the inputs that the compressed blocks before it give it.

    walk(model, linears, ids, fit)      fit(name, W, Gram) -> the weight that replaces W

Errors of early blocks are then seen, and partly undone, by later ones (GPTQ, SLiM). What flows are
the hidden states of the calibration windows, before and after a block; `final_hidden` of the whole
model is never needed. Two things go beyond the published walk, both optional:
    staged    the linears of a block that read the same input are one stage; later stages are fitted
              to inputs that already went through the compressed earlier ones
    matched   the target moves towards the original model's output on its own inputs X, away from W
              on the disturbed ones X^: min ||X W^T - X^ W^^T|| has the solution W C H^-1, with
              H = X^^T X^ and C = X^T X^ (GPTAQ 2504.02692). Half of the way is best
              (docs/log.md): the whole of it also fits what is noise in the tokens
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skimlm.errors import SkimError
from skimlm.models.blocks import decoder_blocks
from skimlm.models.head import final_hidden
from skimlm.models.hooks import forwards_replaced, frozen
from skimlm.storage.safetensors import finite


@dataclass
class Gram:
    """What a linear was given: sums over tokens, inputs in columns."""

    h: Tensor  # X^^T X^ [c, c] float32
    cross: Tensor | None  # X^T X^: of the original's inputs with those at hand
    tokens: int

    @property
    def rms(self) -> Tensor:
        """Root mean square of each input [c]."""
        return (self.h.diagonal() / max(self.tokens, 1)).clamp(min=0).sqrt()

    def target(self, w: Tensor, damp: float = 0.01, share: float = 0.5) -> Tensor:
        """W moved by `share` to what on the inputs at hand comes nearest to the original output."""
        if self.cross is None:
            return w
        h = self.h.double()
        h.diagonal().add_(damp * h.diagonal().mean())
        moved = torch.linalg.solve(h, (self.cross - self.h).double().T)
        return w + share * (w.double() @ moved.T).float()


Fit = Callable[[str, Tensor, Gram], Tensor]
Progress = Callable[[int, int], None]


def walk(
    model: Any,
    linears: dict[str, nn.Linear],
    ids: Tensor,
    fit: Fit,
    *,
    staged: bool = False,
    matched: bool = False,
    batch: int = 4,
    progress: Progress | None = None,
) -> None:
    """Replace the weights of `linears`, block after block, by what `fit` returns for them.

    `ids` [n, t] are the calibration windows. The model is left compressed: its linears hold the new
    weights in the model's dtype.
    """
    with torch.no_grad(), frozen(model):
        states, options, _ = entry(model, ids, batch)
        original = list(states) if matched else None
        done = 0
        for (prefix, block), kwargs in zip(decoder_blocks(model), options, strict=True):
            inside = {n: m for n, m in linears.items() if n.startswith(prefix + ".")}
            before = None
            if original is not None:
                before = _inputs(block, kwargs, original, inside)
                _advance(block, kwargs, original)
            stages = _stages(block, kwargs, states, inside) if staged else [list(inside)]
            for names in stages:
                part = {n: inside[n] for n in names}
                grams = _gather(block, kwargs, states, part, before)
                for name in names:
                    weight = part[name].weight
                    weight.copy_(fit(name, weight.float(), grams[name]))
                    done += 1
                    if progress:
                        progress(done, len(linears))
            _advance(block, kwargs, states)


def entry(model: Any, ids: Tensor, batch: int) -> tuple[list[Tensor], list[dict[str, Any]], bool]:
    """Hidden states on entry of the first block, per batch; each block's other arguments; whether
    blocks return tuples.

    Of the blocks only the first one is run.
    """
    blocks = dict(decoder_blocks(model))
    first = next(iter(blocks))
    options: dict[str, dict[str, Any]] = {}
    states: list[Tensor] = []
    tuples: list[bool] = []

    def record(name: str, block: Any) -> Callable[..., Any]:
        usual = block.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise SkimError(f"{type(block).__name__} takes unnamed arguments: not supported")
            options.setdefault(name, kwargs)  # those of the first batch
            if name == first:
                states.append(hidden)
                if not tuples:
                    tuples.append(isinstance(usual(hidden, **kwargs), tuple))
            return (hidden,) if tuples[0] else hidden

        return forward

    body = model.get_decoder()
    with forwards_replaced(blocks, record):
        for part in ids.split(batch):
            body(input_ids=part, use_cache=False)
    return states, [options[name] for name in blocks], tuples[0]


def remainder(model: Any, ids: Tensor, hidden: Tensor, tupled: bool) -> Tensor:
    """What the body makes of the last block's output: its norm, and what else may follow."""

    def give(_name: str, _block: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: (hidden,) if tupled else hidden

    with forwards_replaced(dict(decoder_blocks(model)), give):
        return final_hidden(model, ids)


def run(block: nn.Module, kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
    """A block's output; arguments that are as long as the first batch are cut for a shorter one."""
    n = len(hidden)
    fitting = {k: _cut(v, n) for k, v in kwargs.items()}
    out = block(hidden, **fitting)
    return out[0] if isinstance(out, tuple) else out


def _cut(value: Any, n: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) > n:
        return value[:n]
    return tuple(_cut(v, n) for v in value) if isinstance(value, tuple) else value


def _advance(block: nn.Module, kwargs: dict[str, Any], states: list[Tensor]) -> None:
    for i, hidden in enumerate(states):
        states[i] = run(block, kwargs, hidden)


@contextmanager
def _watched(linears: dict[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def watch(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            see(name, x)
            return nn.functional.linear(x, linear.weight, linear.bias)

        return forward

    with forwards_replaced(linears, watch):
        yield


def _stages(
    block: nn.Module, kwargs: dict[str, Any], states: list[Tensor], linears: dict[str, nn.Linear]
) -> list[list[str]]:
    """Linears in the order they run, those that read the same input together."""
    stages: list[list[str]] = []
    inputs: list[Tensor] = []  # kept, so that no address is used twice

    def see(name: str, x: Tensor) -> None:
        if inputs and any(x is old for old in inputs):
            stages[next(i for i, old in enumerate(inputs) if x is old)].append(name)
        else:
            inputs.append(x)
            stages.append([name])

    with _watched(linears, see):
        run(block, kwargs, states[0][:1])
    missing = [n for n in linears if not any(n in s for s in stages)]
    return stages + ([missing] if missing else [])


def _inputs(
    block: nn.Module, kwargs: dict[str, Any], states: list[Tensor], linears: dict[str, nn.Linear]
) -> list[dict[str, Tensor]]:
    """Inputs of every linear, per batch."""
    seen: list[dict[str, Tensor]] = []
    for hidden in states:
        seen.append({})
        with _watched(linears, lambda name, x: seen[-1].__setitem__(name, x)):
            run(block, kwargs, hidden)
    return seen


def _gather(
    block: nn.Module,
    kwargs: dict[str, Any],
    states: list[Tensor],
    linears: dict[str, nn.Linear],
    before: list[dict[str, Tensor]] | None,
) -> dict[str, Gram]:
    """Gram matrices of the inputs of `linears`; linears that read the same input share one."""
    grams: dict[str, Gram] = {}
    for name, linear in linears.items():
        c = linear.in_features
        grams[name] = Gram(torch.zeros(c, c), None if before is None else torch.zeros(c, c), 0)
    shared: dict[str, str] = {}  # linear -> the one whose matrix it shares
    latest: dict[str, Tensor] = {}
    number = 0

    def see(name: str, x: Tensor) -> None:
        if number == 0:
            same = next((n for n, old in latest.items() if old is x), name)
            shared[name] = same
            latest[name] = x
        if shared[name] != name:
            return
        # float32: rounded to bfloat16, as in calibrate, the sums are not positive definite
        flat = x.reshape(-1, x.shape[-1]).float()
        gram = grams[name]
        gram.h += flat.T @ flat
        gram.tokens += len(flat)
        if before is not None and gram.cross is not None:
            gram.cross += before[number][name].reshape(flat.shape).float().T @ flat

    with _watched(linears, see):
        for number, hidden in enumerate(states):  # noqa: B007
            run(block, kwargs, hidden)
            latest.clear()
    for name, gram in grams.items():
        if not finite(gram.h):
            raise SkimError(f"{name}: calibration overflowed (not finite); use other text")
    return {name: grams[shared.get(name, name)] for name in linears}
