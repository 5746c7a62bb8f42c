"""Predictions held against measurement: divergences by hand, and what is made of them."""

import copy

import pytest
import torch

from conftest import tiny_model, walk_of
from skimlm.models.blocks import decoder_linears
from skimlm.pipeline import measure as M
from skimlm.pipeline.measure import APART, CORRECTED, POOLED, Trial, divergences, tried_widths
from skimlm.quantize.fit import WIDTHS

IDS = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(0))
COLUMNS = {width: column for column, width in enumerate(WIDTHS)}


def noisy(size):
    """A weight with noise that depends on its name alone."""

    def weight(name, w):
        g = torch.Generator().manual_seed(len(name))
        return w + size * torch.randn(w.shape, generator=g)

    return weight


def by_hand(model, names, weight) -> float:
    """KL(model || changed) per token from whole logits of two models."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            linear = changed.get_submodule(name)
            linear.weight.copy_(weight(name, linear.weight))
        p, q = (m(input_ids=IDS).logits.double().log_softmax(-1) for m in (model, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "opt", "gemma4"])
def test_divergences_are_those_of_models_with_the_other_weights(family):
    model = tiny_model(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    every = list(decoder_linears(model))
    chosen = {
        "all": frozenset(every),
        "last block": frozenset(n for n in every if ".1." in n),
        "one": frozenset([every[2]]),
        "none": frozenset(),
    }
    trials = {name: Trial(names, noisy(0.02)) for name, names in chosen.items()}
    found = divergences(walk_of(model, IDS), trials)
    for name, names in chosen.items():
        assert found[name] == pytest.approx(by_hand(model, names, noisy(0.02)), rel=1e-3, abs=1e-9)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())


def spender(log):
    """Stands for a budget: all rows get the width 3, and what was asked for is noted."""

    def spend(errors, pooled):
        log.append(({n: e.clone() for n, e in errors.items()}, pooled))
        return {n: torch.full((len(e),), 3, dtype=torch.uint8) for n, e in errors.items()}

    return spend


def ready(monkeypatch, measured):
    """A walk, made-up curves, and divergences that are made up too."""
    model = tiny_model("llama")
    walk = walk_of(model, IDS)
    errors = {
        n: torch.full((m.out_features, len(WIDTHS)), 0.5, dtype=torch.float64)
        for n, m in walk.linears.items()
    }

    def made_up(_walk, trials, *_part):
        return {name: measured[name] for name in trials}

    monkeypatch.setattr(M, "divergences", made_up)
    monkeypatch.setattr(M, "rounded_linear", lambda w, *_: w)
    return walk, errors


def test_the_way_that_is_measured_best_is_taken(monkeypatch):
    measured = {POOLED: 0.3, APART: 0.2, M.ALIKE: 0.4, CORRECTED: 0.25, "group 0": 1, "group 1": 1}
    walk, errors = ready(monkeypatch, measured)
    log = []
    widths, tried = tried_widths(walk, {}, errors, spender(log), COLUMNS)
    assert tried == {n: measured[n] for n in (POOLED, APART, M.ALIKE, CORRECTED)}
    assert [pooled for _, pooled in log] == [True, False, True, True]
    assert all((w == 3).all() for w in widths.values())


def test_errors_are_corrected_by_what_groups_of_blocks_diverge_more_than_foretold(monkeypatch):
    """Both blocks are foretold to lose the same; the first one diverges nine times as much."""
    measured = {POOLED: 1, APART: 1, M.ALIKE: 1, CORRECTED: 1, "group 0": 0.9, "group 1": 0.1}
    walk, errors = ready(monkeypatch, measured)
    log = []
    tried_widths(walk, {}, errors, spender(log), COLUMNS)
    bent = log[-1][0]
    for name, e in errors.items():
        factor = 3.0 if ".0." in name else 1 / 3
        torch.testing.assert_close(bent[name], e * factor)


def test_a_correction_has_its_limits(monkeypatch):
    measured = {POOLED: 1, APART: 1, M.ALIKE: 1, CORRECTED: 1, "group 0": 1e6, "group 1": 0.0}
    walk, errors = ready(monkeypatch, measured)
    log = []
    tried_widths(walk, {}, errors, spender(log), COLUMNS)
    name = next(iter(errors))
    torch.testing.assert_close(log[-1][0][name], errors[name] * M.FAR)
