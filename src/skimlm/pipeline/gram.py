"""What the linears of a block are given: Gram matrices of their inputs, shared where inputs are.

With X the inputs in the model as it was and X^ those that the compressed blocks before give:
    h        X^^T X^; of an expert, each token times its gate
    cross    X^T X^, for a target that moves towards the original model's output: min over W^ of
             ||X W^T - X^ W^^T|| is W C H^-1 (GPTAQ 2504.02692). Half of the way is best
             (docs/log.md): the whole of it also fits what is noise in the tokens
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from skimlm.errors import SkimError
from skimlm.models.carried import State
from skimlm.models.hooks import forwards_replaced
from skimlm.models.structure import routed, stacks
from skimlm.pipeline.calibrate import check_seen, share
from skimlm.pipeline.walk import Walk, batches
from skimlm.storage.safetensors import finite


@dataclass
class Gram:
    """Sums over tokens of a linear's inputs, which are in columns."""

    h: Tensor  # X^^T X^ [c, c] float32
    cross: Tensor | None  # X^T X^: of the original's inputs with those at hand
    tokens: int

    @property
    def sums(self) -> list[Tensor]:
        """What is summed."""
        return [self.h]

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


def grams(
    walk: Walk,
    i: int,
    linears: Mapping[str, nn.Linear],
    state: State | None,
    batch: int,
    crossed: bool,
) -> dict[str, Gram]:
    """Gram matrices of some linears of block `i`, which gets `state`; one for each input.

    `crossed`: also with the original's inputs, which `advance_original` has kept.
    """
    found: dict[str, Gram] = {}
    shared: dict[str, str] = {}  # linear -> the one whose matrix it shares
    latest: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    experts = stacks(walk.source.model, linears)
    of_stacks = routed(walk.source.model, linears)
    routings: dict[str, Routing] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in shared:
            shared[name] = next((n for n, old in latest.items() if old is x), name)
            latest[name] = x
        if shared[name] != name:
            return
        # float32: rounded to bfloat16, as in calibrate, the sums are not positive definite
        flat = x.reshape(-1, x.shape[-1]).float()
        if name in of_stacks:
            owner, _, number = name.rsplit(".", 2)
            gates = routings[owner].gates(int(number), x) if owner in routings else None
            flat = flat if gates is None else flat * gates.float()[:, None]
        gram = found.setdefault(name, _empty(linears[name], crossed and name not in of_stacks))
        gram.h += flat.T @ flat
        gram.tokens += len(flat)
        if gram.cross is not None:
            gram.cross += before[name].reshape(flat.shape).float().T @ flat

    with watched(linears, see), _routed_by(walk, of_stacks, routings):
        for number, rows in enumerate(batches(len(walk.ids), batch)):
            before = walk.store.read(INPUTS, number) if crossed else {}
            walk.run(range(i, i + 1), rows, state)
            latest.clear()
    for name, gram in found.items():
        if not finite(gram.h):
            raise SkimError(f"{name}: calibration overflowed (not finite); use other text")
    for name in of_stacks - found.keys():
        found[name] = _empty(linears[name], False)
    for names in experts:
        share([found[name] for name in names])
    of = {n: found.get(shared.get(n, n)) or _empty(m, crossed) for n, m in linears.items()}
    check_seen(of, experts)
    return of


@dataclass
class Routing:
    """Tokens on their way through the experts of a layer."""

    hidden: Tensor  # [n, d]
    index: Tensor  # [n, k], the experts of each
    weights: Tensor  # [n, k]
    begun: dict[int, Tensor] = field(default_factory=dict)  # gates of the experts that began

    def gates(self, expert: int, x: Tensor) -> Tensor | None:
        """How much what `expert` makes of the rows of x [n, d] counts, [n]; None if unknown.

        That is known where a module takes an expert's tokens in the order of their places, as
        those of transformers do: first seen to be so for its first matrix.
        """
        if expert not in self.begun:
            place, token = torch.where(self.index.T == expert)
            if not torch.equal(self.hidden[token], x):
                return None
            self.begun[expert] = self.weights[token, place]
        gates = self.begun[expert]
        return gates if len(gates) == len(x) else None


@contextmanager
def _routed_by(walk: Walk, experts: set[str], routings: dict[str, Routing]) -> Iterator[None]:
    """Within the block `routings` has what the modules of these experts were given last."""
    owners = {name.rsplit(".", 2)[0] for name in experts}

    def note(name: str, module: nn.Module) -> Callable[..., Tensor]:
        usual = module.forward

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            routings.pop(name, None)
            given = (*args, *kwargs.values())
            if len(given) == 3 and given[1].ndim == 2 and given[1].shape == given[2].shape:
                routings[name] = Routing(*given)
            return usual(*args, **kwargs)

        return forward

    modules = {name: walk.source.model.get_submodule(name) for name in owners}
    with forwards_replaced(modules, note):
        yield


INPUTS = "linear-inputs"  # of the original's linears, while their block is fitted


def advance_original(walk: Walk, i: int, state: State | None, batch: int) -> State:
    """The state behind block `i` as it was; what its linears read is kept, batch by batch."""
    seen: dict[str, Tensor] = {}

    linears = walk.inside(range(i, i + 1))
    of_stacks = routed(walk.source.model, linears)

    def see(name: str, x: Tensor) -> None:
        # compressed, other tokens go to an expert; what is shared is kept once
        if name not in of_stacks and not any(x is old for old in seen.values()):
            seen[name] = x

    def keep(number: int) -> None:
        walk.store.keep(INPUTS, number, seen)
        seen.clear()

    with watched(linears, see):
        return walk.advance(range(i, i + 1), state, batch, after=keep)


def stages(
    walk: Walk, i: int, linears: Mapping[str, nn.Linear], state: State | None
) -> list[list[str]]:
    """Linears of block `i` in the order they run; together: one input, or experts of one stack."""
    found: list[list[str]] = []
    inputs: list[Tensor] = []  # kept, so that no address is used twice
    experts = stacks(walk.source.model, linears)
    together = {name: names for names in experts for name in names}

    def see(name: str, x: Tensor) -> None:
        if any(name in stage for stage in found):
            return
        if not any(x is old for old in inputs):
            inputs.append(x)
            found.append([])
        stage = found[next(i for i, old in enumerate(inputs) if x is old)]
        stage += together.get(name, [name])

    with watched(linears, see):
        walk.run(range(i, i + 1), slice(0, 1), state)
    missing = [n for n in linears if not any(n in stage for stage in found)]
    return found + ([missing] if missing else [])


@contextmanager
def watched(linears: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block `see(name, x)` is called with what a linear is given."""

    def watch(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            see(name, x)
            return nn.functional.linear(x, linear.weight, linear.bias)

        return forward

    with forwards_replaced(linears, watch):
        yield


def _empty(linear: nn.Linear, crossed: bool) -> Gram:
    c = linear.in_features
    return Gram(torch.zeros(c, c), torch.zeros(c, c) if crossed else None, 0)
