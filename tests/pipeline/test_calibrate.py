"""Calibration statistics against plain autograd, one window at a time."""

import pytest
import torch

from conftest import FAMILIES, statistics_of, tiny_model
from skimlm.errors import SkimError
from skimlm.models.blocks import decoder_linears
from skimlm.models.head import final_hidden, head_logits
from skimlm.pipeline import calibrate


def tokens(n: int = 3, t: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, t), generator=torch.Generator().manual_seed(seed))


def oracle(model, ids: torch.Tensor, fisher_windows: int):
    """Sums over windows in float64, from hooks and the gradients of autograd."""
    chosen, seen, result = decoder_linears(model), {}, {}

    def keep(name):
        def hook(_module, args, out):
            out.retain_grad()
            seen[name] = (args[0], out)

        return hook

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    handles = [linear.register_forward_hook(keep(name)) for name, linear in chosen.items()]
    for index, window in enumerate(ids):
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0].float()
        torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        for name, (x, z) in seen.items():
            x, g = x.detach().flatten(0, -2).double(), z.grad.flatten(0, -2).double()
            r = result.setdefault(name, dict.fromkeys(("h", "end", "fisher", "rho"), 0))
            r["h"] = r["h"] + x.T @ x
            r["end"] = r["end"] + x.T @ (x * g.square().mean(1, keepdim=True))
            r["rho"] = r["rho"] + g.square().sum(0)
            if index < fisher_windows:
                r["fisher"] = r["fisher"] + chosen[name].weight.grad.double() ** 2
    for handle in handles:
        handle.remove()
    return result


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to a part in ten thousand of the largest number."""
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("batch, fisher_windows", [(2, 64), (1, 2), (3, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_autograds(family, batch, fisher_windows):
    ids = tokens()
    got = statistics_of(
        model := tiny_model(family),
        ids,
        layerwise=True,
        batch=batch,
        fisher_windows=fisher_windows,
    )
    want = oracle(tiny_model(family), ids, fisher_windows)
    assert list(got) == list(decoder_linears(model))
    for name, s in got.items():
        close(s.hessian, want[name]["h"])
        close(s.end_hessian, want[name]["end"])
        close(s.fisher, want[name]["fisher"])
        close(s.row_weight, want[name]["rho"] / want[name]["rho"].mean())
        assert s.tokens == ids.numel()
        close(s.input_rms, (want[name]["h"].diagonal() / ids.numel()).sqrt())


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_squares_summed_by_tiles_are_whole_and_symmetric(tile, monkeypatch):
    want = statistics_of(tiny_model(), tokens(), layerwise=True)
    monkeypatch.setattr(calibrate, "TILE", tile)
    for name, s in statistics_of(tiny_model(), tokens(), layerwise=True).items():
        for got, whole in (
            (s.hessian, want[name].hessian),
            (s.end_hessian, want[name].end_hessian),
        ):
            close(got, whole.double())
            assert tile > 1 or torch.equal(got, got.T)


def test_bfloat16_statistics_are_near_the_float32_ones():
    ids, model, rough = tokens(), tiny_model(), tiny_model(dtype=torch.bfloat16)
    want = statistics_of(model, ids)
    got = statistics_of(rough, ids)
    for name, s in got.items():
        assert s.end_hessian.dtype == s.fisher.dtype == torch.float32
        difference = (s.end_hessian - want[name].end_hessian).norm()
        assert difference < 0.1 * want[name].end_hessian.norm()


def test_only_the_named_linears_are_observed_and_progress_is_told():
    model, seen = tiny_model(), []
    chosen = {n: m for n, m in decoder_linears(model).items() if n.endswith("up_proj")}
    got = statistics_of(model, tokens(), chosen, batch=2, progress=lambda *a: seen.append(a))
    assert list(got) == list(chosen) and seen == [("calibrate", 2, 3), ("calibrate", 3, 3)]
    whole = statistics_of(model, tokens(), batch=2)
    for name, s in got.items():
        assert torch.equal(s.end_hessian, whole[name].end_hessian)
        assert s.hessian is None
    with pytest.raises(ValueError, match="was not collected"):
        got[name].input_rms  # noqa: B018


def state(model) -> dict:
    """Everything calibration could leave behind on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "forwards": [n for n, m in model.named_modules() if "forward" in m.__dict__],
        "training": model.training,
    }


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken):
    model = tiny_model()
    names = [n for n, _ in model.named_parameters()]
    model.get_parameter(names[1]).requires_grad_(False)
    before, numbers = state(model), {n: p.clone() for n, p in model.named_parameters()}
    assert True in before["flags"] and False in before["flags"]

    def stop(phase, done, total):
        raise KeyboardInterrupt

    if broken:
        with pytest.raises(KeyboardInterrupt):
            statistics_of(model, tokens(), progress=stop)
    else:
        statistics_of(model, tokens())
    assert state(model) == before
    assert all(torch.equal(p, numbers[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_make_the_models_logits(family):
    model, ids = tiny_model(family), tokens(2, 9)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        got = head_logits(model, final_hidden(model, ids))
    assert torch.equal(got, want)
    assert state(model)["hooks"] == state(tiny_model(family))["hooks"]


def test_soft_caps_bind_in_the_test_above():
    model = tiny_model("gemma3", final_logit_softcapping=3.0)
    ids = tokens(1, 9)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert want.abs().max() <= 3 and want.abs().max() > 2
        assert torch.equal(head_logits(model, final_hidden(model, ids)), want)


def test_overflow_is_an_error_that_names_the_linear():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(SkimError, match=r"layers\.\d.*: calibration overflowed"):
        statistics_of(model, tokens())


def test_a_linear_that_no_token_reaches_is_refused_not_taken_for_idle():
    model = tiny_model()
    model.model.layers[1].mlp.extra = torch.nn.Linear(64, 64, bias=False)
    with pytest.raises(SkimError, match=r"layers.1.mlp.extra: no token .* reaches it; .*") as e:
        statistics_of(model, torch.randint(0, 256, (2, 24)))
    assert str(e.value).endswith("--exclude 'model.layers.*.mlp.extra'")
