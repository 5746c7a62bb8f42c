"""What linears are given while blocks are compressed in order, against the model run whole."""

import pytest
import torch
from torch import nn

from conftest import FAMILIES, tiny_model, walk_of
from skimlm.models.blocks import decoder_linears
from skimlm.models.probe import structure_of
from skimlm.models.structure import separate
from skimlm.pipeline import calibrate, gram, steps
from skimlm.pipeline.gram import Gram
from skimlm.pipeline.states import StateStore

IDS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _two_windows_at_a_time(monkeypatch):
    monkeypatch.setattr(steps, "WINDOWS", 2)


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    """Both ways of keeping what is between blocks."""
    return StateStore(None if request.param == "memory" else tmp_path)


def inputs_of(model, ids):
    """Inputs of every linear while the model runs on `ids`, by hooks on the whole model."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _, args, n=n: seen.__setitem__(n, args[0].flatten(0, -2))
        )
        for n, m in decoder_linears(model).items()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def compressed(model, change, linears=None, store=None, staged=False, matched=False):
    """Replace linears by `change(name, w)`, block after block; the inputs each of them had."""
    seen = {}

    def fit(name, w, inputs):
        seen[name] = inputs
        return lambda: (change(name, w), {})

    walk = walk_of(model, IDS, linears, store)
    steps.fit_to_inputs(walk, fit, staged=staged, matched=matched)
    return seen


def halved(name, w):
    return w * 0.9 if "layers.0" in name or ".h.0" in name else w * 0.8


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_an_expert_s_tokens_count_by_their_gates(family, monkeypatch):
    monkeypatch.setattr(calibrate, "FEW", 8)
    whole, model, given = tiny_model(family), tiny_model(family), {}
    for path, module in whole.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: given.update(
                    {path: (m, *args, *kwargs.values())}
                ),
                with_kwargs=True,
            )
    with torch.no_grad():
        whole(IDS)
    separate(model, structure_of(model).layout)
    seen = compressed(model, lambda _, w: w)
    for path, (module, hidden, index, weights) in given.items():
        for e in range(4):
            token, place = torch.where(index == e)
            x, gate = hidden[token], weights[token, place, None]
            w = module.gate_up_proj[e].detach()
            up = x @ (w if module.is_transposed else w.T)
            if module.has_bias:
                up = up + module.gate_up_proj_bias[e].detach()
            inner = module._apply_gate(up)
            for kind, rows in ("gate_up_proj", x), ("down_proj", inner):
                got, rows = seen[f"{path}.{kind}.{e}"], rows * gate
                assert got.tokens == len(token) >= 8
                torch.testing.assert_close(got.h, rows.T @ rows, rtol=1e-3, atol=1e-4)


def test_gates_are_not_guessed():
    hidden, index = torch.randn(5, 64), torch.tensor([[0, 1], [1, 0], [2, 1], [0, 3], [3, 2]])
    weights = torch.rand(5, 2)
    routing = gram.Routing(hidden, index, weights)
    assert routing.gates(0, torch.ones(3, 64)) is None
    assert routing.gates(0, hidden[[0, 1, 3]]) is None  # not in the order of their places
    got = routing.gates(0, hidden[[0, 3, 1]])
    assert torch.equal(got, torch.stack([weights[0, 0], weights[3, 0], weights[1, 1]]))
    assert routing.gates(0, torch.ones(2, 8)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_model_gives_the_gram_matrices_of_its_own_inputs(family, store):
    model = tiny_model(family)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    grams = compressed(model, lambda name, w: w, store=store)
    for name, x in inputs_of(model, IDS).items():
        torch.testing.assert_close(grams[name].h, x.T @ x, rtol=1e-3, atol=1e-2)
        assert grams[name].tokens == IDS.numel()
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("staged", [False, True], ids=["whole blocks", "staged"])
def test_later_blocks_see_what_the_compressed_ones_before_give(staged, store):
    model = tiny_model("llama")
    grams = compressed(model, halved, staged=staged, store=store)
    half = tiny_model("llama")  # the first block compressed, the second as it was
    for name, linear in decoder_linears(half).items():
        if "layers.0." in name:
            linear.weight.data *= 0.9
    second = inputs_of(half, IDS)
    done = inputs_of(model, IDS)
    original = inputs_of(tiny_model("llama"), IDS)
    for name, known in grams.items():
        first_block = "layers.0." in name
        source = done if staged else (original if first_block else second)
        x = source[name]
        torch.testing.assert_close(known.h, x.T @ x, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_cross_matrix_is_of_the_original_inputs_with_those_at_hand(store, family):
    model = tiny_model(family)
    grams = compressed(model, halved, staged=True, matched=True, store=store)
    original, done = inputs_of(tiny_model(family), IDS), inputs_of(model, IDS)
    for name, known in grams.items():
        want = original[name].T @ done[name]
        torch.testing.assert_close(known.cross, want, rtol=1e-3, atol=1e-2)


def test_linears_that_read_the_same_input_are_one_stage():
    walk = walk_of(tiny_model("llama"), IDS)
    with torch.no_grad(), walk.source.loaded(range(1)):
        stages = gram.stages(walk, 0, walk.inside(range(1)), None)
    found = [[name.split(".")[-1] for name in stage] for stage in stages]
    assert found == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_the_matched_target_is_least_squares_on_the_outputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=g)
    seen = x + 0.3 * torch.randn(400, 12, generator=g)
    w = torch.randn(5, 12, generator=g)
    known = Gram(seen.T @ seen, x.T @ seen, 400)
    want = torch.linalg.lstsq(seen.double(), (x @ w.T).double()).solution.T
    torch.testing.assert_close(
        known.target(w, damp=1e-9, share=1.0).double(), want, rtol=1e-3, atol=1e-4
    )
    half = known.target(w, damp=1e-9)
    torch.testing.assert_close(half.double(), (want + w) / 2, rtol=1e-3, atol=1e-4)
    assert torch.equal(Gram(known.h, None, 400).target(w), w)


def test_some_rows_of_what_is_kept_are_read_as_copies(store):
    x = torch.arange(24.0).view(6, 4).bfloat16()
    store.keep("inputs", 1, {"x": x, "y": x.float()})
    got = store.read_rows("inputs", 1, slice(2, 4))
    assert torch.equal(got["x"], x[2:4]) and torch.equal(got["y"], x[2:4].float())
    got["x"].zero_()
    assert torch.equal(store.read("inputs", 1)["x"], x)


def test_rms_is_of_the_inputs():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    known = Gram(x.T @ x, None, 50)
    torch.testing.assert_close(known.rms, x.square().mean(0).sqrt())


def test_only_the_linears_given_change():
    model = tiny_model("llama")
    chosen = {n: m for n, m in decoder_linears(model).items() if "mlp" in n}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    compressed(model, lambda name, w: w * 0.5, chosen)
    for name, p in model.state_dict().items():
        changed = name.removesuffix(".weight") in chosen
        assert torch.equal(p, before[name] * 0.5 if changed else before[name])
    assert all(isinstance(m, nn.Linear) for m in chosen.values())
