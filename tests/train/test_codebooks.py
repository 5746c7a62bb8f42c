"""End-loss training: gradients against autograd through dense weights, the guard, resuming."""

import copy

import pytest
import torch

from conftest import statistics_of, tiny_model
from skimlm.format.layer import Layer
from skimlm.format.pack import dequantize, effective, pack, unpack
from skimlm.models.blocks import decoder_blocks, decoder_linears
from skimlm.models.head import final_hidden
from skimlm.quantize import slim
from skimlm.quantize.fit import finish, start
from skimlm.quantize.kmeans import kmeans_rows
from skimlm.quantize.mask import Sparsity
from skimlm.train import codebooks as T
from skimlm.train import loop
from skimlm.train.loop import passes
from skimlm.train.packed import moving, stored
from skimlm.train.student import Student


def tokens(n: int = 12, t: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (n, t), generator=torch.Generator().manual_seed(0))


def coarse(model, ids, widths=(2, 3)) -> dict[str, Layer]:
    """Every linear by k-means, rows of the given widths in turn."""
    layers = {}
    for name, s in statistics_of(model, ids).items():
        w = decoder_linears(model)[name].weight.detach().float()
        width = torch.tensor(widths)[torch.arange(len(w)) % len(widths)].to(torch.uint8)
        fit = start(w, s.fisher, width, kmeans_rows(w, s.fisher, 5)[0])
        layers[name] = pack(finish(w, None, fit))
    return layers


def divergence(model, student, ids) -> float:
    """Mean KL(model || student) per token, from whole logits."""
    with torch.no_grad():
        p = model(input_ids=ids).logits.double().log_softmax(-1)
        q = student(input_ids=ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def dense(model, layers, norms=()):
    """A dense copy with the weights of the layers and the trained norms."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in layers.items():
            made.get_submodule(name).weight.copy_(dequantize(unpack(layer)))
        for name, weight in dict(norms).items():
            made.get_parameter(name).copy_(weight)
    return made


def train(model, layers, ids, recomputed=(), rate=1e-3, **options) -> T.Trained:
    with torch.no_grad():
        known = final_hidden(model, ids)
    student = Student(model, decoder_linears(model), layers, {}, recomputed)
    return T.train(student, ids, known, rate=rate, **options)


@pytest.fixture(scope="module")
def case():
    model, ids = tiny_model(), tokens()
    return model, ids, coarse(model, ids)


@pytest.mark.parametrize(
    "family, widths, rate", [("llama", (2, 3), 3e-3), ("opt", (2, 3, 6, 8), 1e-2)]
)
def test_training_lowers_the_loss_on_windows_it_does_not_see(family, widths, rate):
    model, ids = tiny_model(family), tokens()
    layers = coarse(model, ids, widths)
    first = divergence(model, dense(model, layers), ids[-6:])
    made = train(model, layers, ids, steps=24, rate=rate)
    assert len(made.losses) == 1 + T.CHECKS
    assert made.losses[0] == pytest.approx(first, rel=1e-4)
    last = divergence(model, dense(model, made.layers, made.norms), ids[-6:])
    assert last == pytest.approx(min(made.losses), rel=1e-4)  # what is kept was measured
    assert last < first * (0.8 if family == "opt" else 0.995)


@pytest.mark.parametrize("bits", [16, 4])
def test_of_layers_on_a_grid_adapters_move(bits):
    model, ids = tiny_model(), tokens()
    options = slim.Options(3, Sparsity(2, 4), 0.2, bits, group=16, rounds=1, sweeps=1)
    layers = {
        name: pack(slim.fit(linear.weight.detach().float(), torch.eye(linear.in_features), options))
        for name, linear in decoder_linears(model).items()
    }
    made = train(model, layers, ids, steps=24, rate=1e-2)
    assert min(made.losses) < made.losses[0] * (0.99 if bits == 16 else 1)
    for name, layer in made.layers.items():
        changed = {
            t for t, x in layer.tensors.items() if not torch.equal(x, layers[name].tensors[t])
        }
        assert changed <= {"lora_a", "lora_b"}
    assert any(
        not torch.equal(m.tensors["lora_b"], layers[n].tensors["lora_b"])
        for n, m in made.layers.items()
    )
    weights = {n: effective(unpack(layer)) for n, layer in made.layers.items()}
    student = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            student.get_submodule(name).weight.copy_(weight)
        for name, weight in made.norms.items():
            student.get_parameter(name).copy_(weight)
    assert divergence(model, student, ids[-6:]) == pytest.approx(min(made.losses), rel=1e-4)


def test_the_first_step_goes_down_the_gradient_of_the_divergence(case):
    """Adam's first step is the rate times the sign of the gradient, here that of dense weights."""
    model, ids, layers = case
    codes = {n: unpack(layer) for n, layer in layers.items()}
    rows, rate = passes(6, 2, 2)[0], 1e-2
    books = {
        (n, own): t.clone().requires_grad_()
        for n, layer in layers.items()
        for own, t in moving(layer).items()
    }
    weights = {}
    for name, q in codes.items():
        place, lines = dict.fromkeys((2, 3), 0), []
        for i, b in enumerate(q.widths.tolist()):
            levels = books[name, f"codebook.{b}"][place[b]]
            lines.append(levels[q.codes[i].long()] * books[name, f"row_scale.{b}"][place[b]])
            place[b] += 1
        weights[f"{name}.weight"] = torch.stack(lines)
    norms = {n: p.detach().clone().requires_grad_() for n, p in T.norm_parameters(model).items()}
    q = torch.func.functional_call(model, weights | norms, (ids[rows],)).logits.log_softmax(-1)
    with torch.no_grad():
        p = model(ids[rows]).logits.log_softmax(-1)
    loss = (p.exp() * (p - q)).sum(-1).mean()
    grads = torch.autograd.grad(loss, [*books.values(), *norms.values()])
    seen = {}

    def watch(state, name, gradient, *rest):
        seen[name] = gradient.clone()

    usual, loop.adam = loop.adam, watch
    try:
        train(model, layers, ids, steps=1, rate=rate)
    finally:
        loop.adam = usual
    for ((name, own), book), grad in zip(books.items(), grads, strict=False):
        scales = own.startswith("row_scale")
        spread = book.detach() if scales else book.detach().std(1, keepdim=True, correction=0)
        torch.testing.assert_close(seen[f"{name}:{own}"], grad * spread, rtol=1e-3, atol=1e-7)
    for (name, weight), grad in zip(norms.items(), grads[len(books) :], strict=True):
        torch.testing.assert_close(seen[name], grad * weight.detach(), rtol=1e-3, atol=1e-7)


def equal(a: T.Trained, b: T.Trained) -> bool:
    pairs = [(a.norms, b.norms)]
    pairs += [(a.layers[n].tensors, b.layers[n].tensors) for n in a.layers]
    same = all(torch.equal(one[n], other[n]) for one, other in pairs for n in one)
    return same and a.losses == b.losses


def test_blocks_whose_activations_are_made_again_give_the_same_numbers(case):
    model, ids, layers = case
    every = [name for name, _ in decoder_blocks(model)]
    kept, anew = (train(model, layers, ids, names, steps=3, rate=1e-2) for names in ((), every))
    assert equal(kept, anew)


def test_activations_of_one_block_are_there_at_a_time(case):
    """Inside blocks that are made again no more tensors are saved than their inputs."""
    model, ids, layers = case
    every = [name for name, _ in decoder_blocks(model)]
    counts = {}
    for names in ((), every):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, n=numbers: (n.append(t.numel()), t)[1], lambda t: t
        ):
            train(model, layers, ids, names, steps=1)
        counts[bool(names)] = sum(numbers)
    assert counts[True] < counts[False]


@pytest.mark.parametrize("rate", [1e3, float("nan")])
def test_the_start_is_kept_when_training_makes_it_worse(case, rate):
    model, ids, layers = case
    made = train(model, layers, ids, steps=3, rate=rate)
    assert not any(loss < made.losses[0] for loss in made.losses[1:])
    for name, layer in layers.items():
        assert all(torch.equal(t, made.layers[name].tensors[n]) for n, t in layer.tensors.items())
    for name, weight in made.norms.items():
        assert torch.equal(weight, model.get_parameter(name))


def test_the_best_state_seen_is_kept_not_the_last(case, monkeypatch):
    """Held-out losses are made up so that the second of three checks wins."""
    model, ids, layers = case
    seen, calls, product = [], [], T.product
    first = next(iter(layers))

    def recording(x, layer, own):
        if layer is layers[first] and not torch.is_grad_enabled():
            seen.append({n: t.clone() for n, t in own.items()})
        return product(x, layer, own)

    def made_up(*_):
        calls.append(1)
        check, part = divmod(len(calls) - 1, 3)  # six windows held out, two at a time
        return 0.0 if part else [9.0, 5.0, 1.0, 7.0][check] * 6 * 24

    monkeypatch.setattr(T, "product", recording)
    monkeypatch.setattr(T, "loss_sum", made_up)
    made = train(model, layers, ids, steps=6, rate=1e-2)
    assert made.losses == pytest.approx([9, 5, 1, 7])
    want = stored(layers[first], seen[2 * 3])
    assert all(torch.equal(t, want.tensors[n]) for n, t in made.layers[first].tensors.items())
    for other in (1, 3):
        worse = stored(layers[first], seen[other * 3])
        assert not torch.equal(worse.tensors["codebook"], want.tensors["codebook"])


def state(model) -> dict:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "forwards": [n for n, m in model.named_modules() if "forward" in m.__dict__],
    }


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_and_the_layers_are_left_as_they_were(case, broken):
    model, ids, layers = case
    before, numbers = state(model), {n: p.clone() for n, p in model.named_parameters()}
    kept = {(n, k): t.clone() for n, layer in layers.items() for k, t in layer.tensors.items()}

    def stop(step, _total):
        if broken and step == 2:
            raise KeyboardInterrupt

    run = dict(steps=3, progress=stop)
    if broken:
        with pytest.raises(KeyboardInterrupt):
            train(model, layers, ids, **run)
    else:
        train(model, layers, ids, **run)
    assert state(model) == before
    assert all(torch.equal(p, numbers[n]) for n, p in model.named_parameters())
    assert all(torch.equal(t, layers[n].tensors[k]) for (n, k), t in kept.items())


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("stop_at", [3, 5, 6])
def test_an_interrupted_run_goes_on_to_the_same_result(case, tmp_path, stop_at, every, monkeypatch):
    """`every`: the state is kept after every step, as it is after some minutes of work."""
    model, ids, layers = case
    want = train(model, layers, ids, steps=6, rate=1e-2)
    file, steps = tmp_path / "run.state", []
    if every:
        monkeypatch.setattr(loop, "KEEP", -1.0)

    def stop(step, _total):
        steps.append(step)
        if step == stop_at and len(steps) == stop_at:
            raise KeyboardInterrupt

    run = dict(steps=6, rate=1e-2, state_file=file, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        train(model, layers, ids, **run)
    assert [f.name for f in tmp_path.iterdir()] == ["run.state"]
    before = len(steps)
    assert equal(train(model, layers, ids, **run), want)
    # checks at 2, 4 and 6; what is kept of a step is kept after `progress` was told
    assert len(steps) - before == 6 - (stop_at - 1 if every else (stop_at - 1) // 2 * 2)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_windows_still_train_and_guard(case, count):
    model, ids, layers = case
    losses = train(model, layers, ids[:count], steps=2).losses
    assert all(loss == loss and loss > 0 for loss in losses)
