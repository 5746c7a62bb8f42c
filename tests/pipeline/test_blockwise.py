"""The walk over blocks against the model itself, run whole."""

import pytest
import torch
from torch import nn

from conftest import FAMILIES, tiny_model
from skimlm.models.blocks import decoder_linears
from skimlm.pipeline.blockwise import Gram, entry, walk

IDS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))


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


def halved(name, w, gram):
    return w * 0.9 if "layers.0" in name or ".h.0" in name else w * 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_model_gives_the_gram_matrices_of_its_own_inputs(family):
    model, grams = tiny_model(family), {}

    def fit(name, w, gram):
        grams[name] = gram
        return w

    before = {n: p.clone() for n, p in model.state_dict().items()}
    walk(model, decoder_linears(model), IDS, fit, batch=2)
    for name, x in inputs_of(model, IDS).items():
        torch.testing.assert_close(grams[name].h, x.T @ x, rtol=1e-3, atol=1e-2)
        assert grams[name].tokens == IDS.numel()
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("staged", [False, True], ids=["whole blocks", "staged"])
def test_later_blocks_see_what_the_compressed_ones_before_give(staged):
    model, grams = tiny_model("llama"), {}

    def fit(name, w, gram):
        grams[name] = gram.h.clone()
        return halved(name, w, gram)

    walk(model, decoder_linears(model), IDS, fit, staged=staged)
    half = tiny_model("llama")  # the first block compressed, the second as it was
    for name, linear in decoder_linears(half).items():
        if "layers.0." in name:
            linear.weight.data *= 0.9
    second = inputs_of(half, IDS)
    done = inputs_of(model, IDS)
    original = inputs_of(tiny_model("llama"), IDS)
    for name, h in grams.items():
        first_block = "layers.0." in name
        source = done if staged else (original if first_block else second)
        x = source[name]
        torch.testing.assert_close(h, x.T @ x, rtol=1e-3, atol=1e-2)


def test_the_cross_matrix_is_of_the_original_inputs_with_those_at_hand():
    model, grams = tiny_model("llama"), {}

    def fit(name, w, gram):
        grams[name] = gram
        return halved(name, w, gram)

    walk(model, decoder_linears(model), IDS, fit, staged=True, matched=True, batch=2)
    original, done = inputs_of(tiny_model("llama"), IDS), inputs_of(model, IDS)
    for name, gram in grams.items():
        want = original[name].T @ done[name]
        torch.testing.assert_close(gram.cross, want, rtol=1e-3, atol=1e-2)


def test_the_matched_target_is_least_squares_on_the_outputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=g)
    seen = x + 0.3 * torch.randn(400, 12, generator=g)
    w = torch.randn(5, 12, generator=g)
    gram = Gram(seen.T @ seen, x.T @ seen, 400)
    want = torch.linalg.lstsq(seen.double(), (x @ w.T).double()).solution.T
    torch.testing.assert_close(
        gram.target(w, damp=1e-9, share=1.0).double(), want, rtol=1e-3, atol=1e-4
    )
    half = gram.target(w, damp=1e-9)
    torch.testing.assert_close(half.double(), (want + w) / 2, rtol=1e-3, atol=1e-4)
    assert torch.equal(Gram(gram.h, None, 400).target(w), w)


def test_rms_is_of_the_inputs():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    gram = Gram(x.T @ x, None, 50)
    torch.testing.assert_close(gram.rms, x.square().mean(0).sqrt())


def test_states_on_entry_are_the_embeddings_and_every_window_comes_once():
    model = tiny_model("llama")
    states, options, _ = entry(model, IDS, 2)
    torch.testing.assert_close(torch.cat(states), model.get_input_embeddings()(IDS))
    assert len(options) == 2 and all("position_embeddings" in kwargs for kwargs in options)


def test_only_the_linears_given_change():
    model = tiny_model("llama")
    chosen = {n: m for n, m in decoder_linears(model).items() if "mlp" in n}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    walk(model, chosen, IDS, lambda name, w, gram: w * 0.5)
    for name, p in model.state_dict().items():
        changed = name.removesuffix(".weight") in chosen
        assert torch.equal(p, before[name] * 0.5 if changed else before[name])
    assert all(isinstance(m, nn.Linear) for m in chosen.values())
