"""End-loss training: gradients against autograd through dense weights, the guard, resuming."""

import copy

import pytest
import torch

from conftest import statistics_of, tiny_model
from skimlm.models.blocks import decoder_linears
from skimlm.models.hooks import frozen
from skimlm.quantize.fit import Fit, start
from skimlm.quantize.kmeans import kmeans_rows
from skimlm.train import codebooks as T
from skimlm.train.loop import passes


def codes_and_books(seed: int = 0, r: int = 7, c: int = 21, k: int = 6):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, k, (r, c), generator=g).to(torch.uint8)
    return codes, torch.randn(r, k, generator=g), torch.randn(2, 5, c, generator=g)


FIXED = torch.tensor([False, True, False, False, True, False, False])


@pytest.mark.parametrize("wide", [False, True])
def test_lookup_gradients_are_autograds_through_the_dense_matrix(wide):
    codes, book, x = codes_and_books()
    fixed = (
        (FIXED, torch.randn(2, 21, generator=torch.Generator().manual_seed(9))) if wide else None
    )
    dense_book, dense_x = book.clone().requires_grad_(), x.clone().requires_grad_()
    w = dense_book.gather(1, codes.long())
    if wide:
        w = w.index_put((FIXED,), fixed[1])
    want = dense_x @ w.T
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    want.backward(probe)

    book.requires_grad_(), x.requires_grad_()
    got = T._Lookup.apply(x, book, codes, fixed)
    got.backward(probe)
    assert torch.equal(got, want)
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(book.grad, dense_book.grad, rtol=1e-5, atol=1e-5)
    assert not wide or (book.grad[FIXED] == 0).all()


@pytest.mark.parametrize("k", [2, 6, 32])
def test_the_native_bfloat16_path_is_the_torch_one(isa, k):
    codes, book, x = codes_and_books(2, r=70, c=33, k=k)
    x = x.bfloat16().requires_grad_()
    book.requires_grad_()
    got = T._Lookup.apply(x, book, codes, None)
    w = book.detach().bfloat16().gather(1, codes.long())
    assert torch.equal(got, x.detach() @ w.T)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got.backward(probe)
    assert torch.equal(x.grad, probe @ w)
    full = probe.flatten(0, 1).T @ x.detach().flatten(0, 1)
    want = torch.zeros(book.shape, dtype=torch.float64).scatter_add_(1, codes.long(), full.double())
    torch.testing.assert_close(book.grad.double(), want, rtol=1e-5, atol=1e-4)


def tokens(n: int = 12, t: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (n, t), generator=torch.Generator().manual_seed(0))


def coarse(model, ids, widths=(2, 3)) -> dict[str, Fit]:
    """A k-means fit of every linear, rows of the given widths in turn."""
    fits = {}
    for name, s in statistics_of(model, ids).items():
        w = decoder_linears(model)[name].weight.detach().float()
        width = torch.tensor(widths)[torch.arange(len(w)) % len(widths)].to(torch.uint8)
        fits[name] = start(w, s.fisher, width, kmeans_rows(w, s.fisher, 5)[0])
    return fits


def divergence(model, student, ids) -> float:
    """Mean KL(model || student) per token, from whole logits."""
    with torch.no_grad():
        p = model(input_ids=ids).logits.double().log_softmax(-1)
        q = student(input_ids=ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def student(model, fits, norms):
    """A dense copy with the fitted weights and the trained norms."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, fit in fits.items():
            made.get_submodule(name).weight.copy_(fit.dense())
        for name, weight in norms.items():
            made.get_parameter(name).copy_(weight)
    return made


@pytest.fixture(scope="module")
def case():
    model, ids = tiny_model(), tokens()
    return model, ids, coarse(model, ids)


def copied(fits):
    return copy.deepcopy(fits)


@pytest.mark.parametrize(
    "family, widths, rate", [("llama", (2, 3), 3e-3), ("opt", (2, 3, 6, 8), 1e-2)]
)
def test_training_lowers_the_loss_on_windows_it_does_not_see(family, widths, rate):
    model, ids = tiny_model(family), tokens()
    fits = coarse(model, ids, widths)
    first = divergence(model, student(model, fits, {}), ids[-6:])
    norms, losses = T.train(
        model, decoder_linears(model), fits, ids, steps=24, lr=rate, norm_lr=rate / 2
    )
    assert len(losses) == 1 + T.CHECKS
    assert losses[0] == pytest.approx(first, rel=1e-4)
    last = divergence(model, student(model, fits, norms), ids[-6:])
    assert last == pytest.approx(min(losses), rel=1e-4)  # what is kept is what was measured
    assert last < first * (0.8 if family == "opt" else 0.995)
    for fit in fits.values():
        assert all(
            (fit.codebook[i, :n].diff() >= 0).all() for i, n in enumerate(fit.sizes.tolist())
        )


def arguments_of(model, ids):
    """What the first block of llama is called with, besides hidden states."""
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(ids[:1], use_cache=False)  # a window: positions are the same for all
    hook.remove()
    return seen[0]


def test_a_block_moves_down_the_gradient_of_its_own_error(case):
    """Adam's first step is the rate times the sign of the gradient, here that of dense weights."""
    model, ids, start_fits = case
    block = model.model.layers[0]
    with torch.no_grad(), frozen(model):
        states = model.get_input_embeddings()(ids)
        given = states + 0.05 * torch.randn(states.shape, generator=torch.manual_seed(1))
        options = arguments_of(model, ids)
        wanted = block(states, **options)
    inside = {n: m for n, m in decoder_linears(model).items() if n.startswith("model.layers.0.")}
    fits = {n: copy.deepcopy(start_fits[n]) for n in inside}
    first = {n: f.codebook[:, : int(f.sizes.max())].clone() for n, f in fits.items()}
    codes = {n: f.codes.clone().long() for n, f in fits.items()}
    norms = T.norm_parameters(block)
    before = {n: p.detach().clone() for n, p in norms.items()}
    rows = passes(6, 2, 2)[0]

    each = torch.rand(given.shape[-1], generator=torch.manual_seed(2)) + 0.5

    def error(books, weights, rows):
        own = {
            f"{n.removeprefix('model.layers.0.')}.weight": b.gather(1, codes[n]) for n, b in books
        }
        out = torch.func.functional_call(block, own | weights, (given[rows],), options)
        out = out[0] if isinstance(out, tuple) else out
        off = ((out - wanted[rows]).square() * each).sum(-1)
        return (off / (wanted[rows].square() * each).sum(-1)).mean()

    books = {n: b.clone().requires_grad_() for n, b in first.items()}
    weights = {n: p.clone().requires_grad_() for n, p in before.items()}
    grads = torch.autograd.grad(
        error(books.items(), weights, rows), [*books.values(), *weights.values()]
    )
    rate = 1e-3
    with frozen(model):
        trained, losses = T.train_block(
            lambda rows: block(given[rows], **options),
            inside,
            fits,
            norms,
            wanted,
            each,
            steps=1,
            lr=rate,
            norm_lr=rate,
        )
    with torch.no_grad():
        unseen = list(range(6, 12))
        assert losses[0] == pytest.approx(float(error(first.items(), before, unseen)), rel=1e-4)
        assert losses[1] < losses[0]
    for (name, book), grad in zip(first.items(), grads, strict=False):
        spread = book.std(1, keepdim=True, correction=0)
        want = book - rate * spread * grad.sign() * (grad != 0)
        clear = (grad * spread).abs() > 1e-6  # far above what keeps Adam from dividing by 0
        got = fits[name].codebook[:, : book.shape[1]]
        close = (got - want).abs() <= 1e-4 * spread
        assert clear.any() and close[clear].all()
    for (name, weight), grad in zip(before.items(), grads[len(first) :], strict=True):
        want = weight * (1 - rate * grad.sign())
        torch.testing.assert_close(trained[name], want, rtol=1e-5, atol=1e-6)
        assert torch.equal(norms[name], weight)  # the model is left as it was


@pytest.mark.parametrize("rate", [1e3, float("nan")])
def test_the_start_is_kept_when_training_makes_it_worse(case, rate):
    model, ids, start_fits = case
    fits = copied(start_fits)
    norms, losses = T.train(
        model, decoder_linears(model), fits, ids, steps=3, lr=rate, norm_lr=rate
    )
    assert not any(loss < losses[0] for loss in losses[1:])
    for name, fit in fits.items():
        assert torch.equal(fit.codebook, start_fits[name].codebook)
        assert torch.equal(fit.codes, start_fits[name].codes)
    for name, weight in norms.items():
        assert torch.equal(weight, model.get_parameter(name))


def test_the_best_state_seen_is_kept_not_the_last(case, monkeypatch):
    """Held-out losses are made up so that the second of three checks wins."""
    model, ids, start_fits = case
    seen, calls, fitted = [], [], T.fitted

    def recording(linears_, fits_, codebooks):
        if not any(b.requires_grad for b in codebooks.values()):  # a held-out measurement
            seen.append({n: b.clone() for n, b in codebooks.items()})
        return fitted(linears_, fits_, codebooks)

    def made_up(*_):
        calls.append(1)
        first_of_three = len(calls) % 3 == 1  # six windows held out, two at a time
        return [9.0, 5.0, 1.0, 7.0][len(seen) - 1] * 6 * 24 if first_of_three else 0.0

    monkeypatch.setattr(T, "fitted", recording)
    monkeypatch.setattr(T, "loss_sum", made_up)
    fits = copied(start_fits)
    losses = T.train(model, decoder_linears(model), fits, ids, steps=6, lr=1e-2)[1]
    assert losses == pytest.approx([9, 5, 1, 7])
    for name, fit in fits.items():
        books = [book[name].gather(1, start_fits[name].codes.long()) for book in seen]
        assert torch.equal(fit.dense(), books[2])
        assert not torch.equal(books[2], books[1]) and not torch.equal(books[2], books[3])


def state(model) -> dict:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "forwards": [n for n, m in model.named_modules() if "forward" in m.__dict__],
    }


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(case, broken):
    model, ids, fits = case
    before, numbers = state(model), {n: p.clone() for n, p in model.named_parameters()}

    def stop(step, _total, _loss):
        if broken and step == 2:
            raise KeyboardInterrupt

    run = dict(steps=3, progress=stop)
    if broken:
        with pytest.raises(KeyboardInterrupt):
            T.train(model, decoder_linears(model), copied(fits), ids, **run)
    else:
        T.train(model, decoder_linears(model), copied(fits), ids, **run)
    assert state(model) == before
    assert all(torch.equal(p, numbers[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("stop_at", [3, 5, 6])
def test_an_interrupted_run_goes_on_to_the_same_result(case, tmp_path, stop_at):
    model, ids, start_fits = case
    whole = copied(start_fits)
    want = T.train(model, decoder_linears(model), whole, ids, steps=6, lr=1e-2)
    file, steps = tmp_path / "run.state", []

    def stop(step, _total, _loss):
        steps.append(step)
        if step == stop_at and len(steps) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        T.train(
            model,
            decoder_linears(model),
            copied(start_fits),
            ids,
            steps=6,
            lr=1e-2,
            state_file=file,
            progress=stop,
        )
    assert [f.name for f in tmp_path.iterdir()] == ["run.state"]
    fits, before = copied(start_fits), len(steps)
    norms, losses = T.train(
        model, decoder_linears(model), fits, ids, steps=6, lr=1e-2, state_file=file, progress=stop
    )
    assert len(steps) - before == 6 - (stop_at - 1) // 2 * 2  # checks at 2, 4 and 6
    assert losses == want[1]
    for name, fit in fits.items():
        assert torch.equal(fit.codebook, whole[name].codebook)
        assert torch.equal(fit.codes, whole[name].codes)
    assert all(torch.equal(w, want[0][n]) for n, w in norms.items())


def test_a_shared_teacher_changes_nothing(case):
    model, ids, start_fits = case
    teacher: dict = {}
    alone, shared, again = (copied(start_fits) for _ in range(3))
    want = T.train(model, decoder_linears(model), alone, ids, steps=3)[1]
    for fits in (shared, again):
        assert (
            T.train(model, decoder_linears(model), fits, ids, steps=3, teacher=teacher)[1] == want
        )
    assert teacher
    name = next(iter(alone))
    assert torch.equal(alone[name].codebook, again[name].codebook)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_windows_still_train_and_guard(case, count):
    model, ids, start_fits = case
    _, losses = T.train(model, decoder_linears(model), copied(start_fits), ids[:count], steps=2)
    assert all(loss == loss and loss > 0 for loss in losses)


def test_sorting_entries_changes_no_weight():
    g = torch.Generator().manual_seed(0)
    w, f = torch.randn(16, 30, generator=g), torch.ones(16, 30)
    widths = torch.arange(16).remainder(8).add(1).to(torch.uint8)
    fit = start(w, f, widths, kmeans_rows(w, f, 5)[0])
    for i, n in enumerate(fit.sizes.tolist()):
        order = torch.randperm(n, generator=g)
        fit.codebook[i, :n] = fit.codebook[i, order]
        fit.codes[i] = order.argsort()[fit.codes[i].long()].to(torch.uint8)
    before = fit.dense()
    T.sort_entries(fit)
    assert torch.equal(fit.dense(), before) and fit.codes.dtype == torch.uint8
    for i, n in enumerate(fit.sizes.tolist()):
        assert (fit.codebook[i].diff() >= 0).all()
        assert (fit.codebook[i, n:] == fit.codebook[i, n - 1]).all()
        assert fit.codes[i].max() < n
