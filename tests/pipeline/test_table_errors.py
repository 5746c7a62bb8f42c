"""What embedding and head lose, against the definitions, a token and a row at a time."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from conftest import statistics_of, tiny_model, walk_of
from skimlm.format import LayerSpec
from skimlm.models.checkpoint import open_checkpoint
from skimlm.models.head import behind_head, final_hidden, head_logits
from skimlm.models.source import open_source
from skimlm.models.write import write_packed
from skimlm.pipeline import RECIPES, StateStore, budget, sensitivity, tables
from skimlm.pipeline.recipes import packed_linear
from skimlm.pipeline.tables import (
    TableSums,
    analysis,
    grown,
    observed_tables,
    packed_table,
    slices,
    uses,
)
from skimlm.pipeline.walk import Walk, analyse
from skimlm.quantize.fit import GRIDS, WIDTHS, start
from skimlm.quantize.refine import damped

IDS = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(0))
PLAN = RECIPES["fast"]
CAPPED = {"final_logit_softcapping": 3.0}


def sums_of(model, ids=IDS):
    sums = TableSums.of(model)
    with observed_tables(model, sums):
        statistics_of(model, ids)
    return sums


def random_sums(rows=40, cols=24, tokens=100):
    """Sums of made-up inputs and gradients."""
    g = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(tokens, cols, generator=g) / 4 for _ in range(2))
    p = (3 * torch.randn(tokens, rows, generator=g)).softmax(-1)
    sums = TableSums(*(torch.zeros(n) for n in ((cols, cols), rows, rows, (cols, cols))))
    sums.see_states(x, p * (1 - p), p)
    sums.see_gradients(gradient)
    return sums, torch.randn(rows, cols, generator=g), (x, p * (1 - p), p, gradient)


@pytest.mark.parametrize("family, changes", [("llama", {}), ("gemma3", CAPPED), ("opt", {})])
def test_sums_of_a_head_are_those_of_its_expected_gradients(family, changes):
    """The square of d loss / d z, its mean over targets drawn from the model's predictions."""
    model = tiny_model(family, **changes)
    sums = sums_of(model)
    head, seen = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda _m, x, z: seen.append((x[0], z)))
    hidden = final_hidden(model, IDS)
    hessian, weight, expected = 0.0, 0.0, 0.0
    for state in hidden.flatten(0, 1).detach():
        seen.clear()
        logits = head_logits(model, state[None])
        (x, z), p = seen[0], logits.softmax(-1)[0].detach()
        squares = torch.stack(
            [
                torch.autograd.grad(-logits.log_softmax(-1)[0, y], z, retain_graph=True)[0]
                .flatten()
                .square()
                for y in range(len(p))
            ]
        )
        s = (p[:, None] * squares).sum(0)
        x = x.flatten().detach()
        hessian, weight, expected = hessian + s.mean() * x[:, None] * x, weight + s, expected + p
    handle.remove()
    assert sums.tokens == IDS.numel()
    torch.testing.assert_close(sums.head_weight, weight, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sums.expected, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums.head_hessian, hessian, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sums_of_an_embedding_are_those_of_the_gradients_of_its_rows(family):
    """Every token has a row of its own: gemma3 multiplies rows within the module."""
    model = tiny_model(family)
    sums = sums_of(model)
    table = model.get_input_embeddings()
    scale = float(getattr(table, "scalar_embed_scale", 1.0))
    want = 0.0
    for window in IDS:
        rows = table.weight[window].detach().requires_grad_()
        hidden = model.model(inputs_embeds=(rows * scale)[None]).last_hidden_state[0]
        logits = head_logits(model, hidden[:-1])
        F.cross_entropy(logits, window[1:], reduction="sum").backward()
        want = want + rows.grad.T @ rows.grad
    torch.testing.assert_close(sums.embedding_gram, want, rtol=1e-3, atol=1e-4 * float(want.max()))


def test_sums_are_the_same_when_a_model_is_streamed(llama_folder, tokenizer):
    found = []
    for streamed in (False, True):
        source = open_source(open_checkpoint(llama_folder), streamed, tokenizer)
        walk = walk_of(source.model)
        place = llama_folder.parent / f"analysis-{streamed}"
        walk = Walk(source, walk.linears, IDS, StateStore(None))
        sums = TableSums.of(source.model)
        with observed_tables(source.model, sums):
            analyse(walk, sensitivity.Stored(place, walk.linears), PLAN)
        found.append(sums)
    assert found[0].tokens == found[1].tokens == IDS.numel()
    for name in ("head_hessian", "head_weight", "expected", "embedding_gram"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
        assert getattr(found[0], name).any()


def test_nothing_is_left_behind_on_a_model():
    model = tiny_model("llama")
    before = model(IDS).logits
    sums_of(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert not table._forward_hooks and "forward" not in head.__dict__
    assert torch.equal(model(IDS).logits, before)


def test_what_stands_behind_a_head_is_the_models_own():
    model, z = tiny_model("gemma3", **CAPPED), torch.randn(5, 259)
    torch.testing.assert_close(behind_head(model, z), 3 * torch.tanh(z / 3))
    assert torch.equal(behind_head(tiny_model("llama"), z), z)


def test_a_logit_that_is_off_costs_what_its_probability_grows_by():
    """The mean over a normal error e of 2 (exp(e) - 1 - e), by quadrature."""
    e = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for variance in (1e-4, 0.3, 2.0, 9.0):
        density = torch.exp(-e.square() / (2 * variance))
        mean = (density * 2 * (torch.expm1(e) - e)).sum() / density.sum()
        got = grown(torch.tensor([variance], dtype=torch.float64))
        torch.testing.assert_close(got[0], mean, rtol=1e-5, atol=0)
    assert grown(torch.tensor([1e9], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("use", ["head", "embedding", "tied"])
def test_errors_are_those_of_the_definitions(use, monkeypatch):
    """The sums over tokens written out, with matrices as they are: neither shrunk nor damped."""
    monkeypatch.setattr(tables, "damped", lambda h: h)
    monkeypatch.setattr(tables, "ROWS", 15)
    sums, w, (x, s, p, g) = random_sums()
    known = analysis(w, sums, use)
    for b in (2, 5):
        off = start(w, known.fisher.float(), same(b), known.centroids).dense() - w
        variance = (s.mean(1)[:, None] * (x @ off.T).square()).sum(0) / s.sum(0).mean()
        head = 2 * s.sum(0) * torch.expm1(variance / 2)
        often = p.sum(0).sqrt()
        embedding = often / often.sum() * (g @ off.T).square().sum(0)
        want = {"head": head, "embedding": embedding, "tied": head + embedding}[use]
        torch.testing.assert_close(known.errors[:, b - 1].float(), want, rtol=0.03, atol=1e-6)


def test_the_matrix_of_a_tied_table_is_the_mean_over_its_rows():
    sums, w, (x, s, p, g) = random_sums()
    known = analysis(w, sums, "tied")
    often = p.sum(0).sqrt()
    of_rows = [
        a * (x.T @ (x * s.mean(1, keepdim=True))) / s.sum(0).mean() + k * g.T @ g
        for a, k in zip(s.sum(0), often / often.sum(), strict=True)
    ]
    mean = torch.stack(of_rows).mean(0)
    torch.testing.assert_close(known.hessian, damped(mean))
    weight = torch.stack([m.trace() for m in of_rows])
    torch.testing.assert_close(known.row_weight, weight / weight.mean())
    diagonal = mean.diagonal().expand(40, 24)
    torch.testing.assert_close(known.fisher.float(), diagonal, rtol=0.01, atol=0)
    assert known.tokens == 100


def test_the_matrix_of_the_errors_is_damped():
    sums, w, _ = random_sums()
    known, often = analysis(w, sums, "embedding"), sums.expected.sqrt()
    off = start(w, known.fisher.float(), same(3), known.centroids).dense() - w
    want = often / often.sum() * ((off @ damped(sums.embedding_gram)) * off).sum(1)
    torch.testing.assert_close(known.errors[:, 2].float(), want, rtol=0.02, atol=1e-9)


def test_a_table_fitted_in_parts_is_the_table_fitted_at_once(monkeypatch):
    sums, w, _ = random_sums()
    known, widths = analysis(w, sums, "tied"), torch.arange(40).remainder(8).add(1).to(torch.uint8)
    want = packed_linear(w, known, widths, PLAN)
    monkeypatch.setattr(tables, "ROWS", 15)
    again = analysis(w, sums, "tied")
    grids = slice(len(GRIDS))  # trellises are learnt on as many rows as go together
    assert torch.equal(again.errors[:, grids], known.errors[:, grids])
    assert all(map(torch.equal, again.centroids, known.centroids))
    assert [len(range(40)[some]) for some in slices(40)] == [15, 15, 10]
    got = packed_table(w, known, widths, PLAN)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_the_tables_of_a_model_are_named_with_what_they_are_used_as():
    assert uses(tiny_model("llama")) == {"model.embed_tokens": "tied"}
    apart = {"model.embed_tokens": "embedding", "lm_head": "head"}
    assert uses(tiny_model("llama", tie_word_embeddings=False)) == apart
    assert uses(tiny_model("llama").model) == {"embed_tokens": "embedding"}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_linears_and_tables_share_one_budget_and_make_a_folder(tmp_path, tied):
    """From the windows to a model that loads: what is spent is what was allowed."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    walk, sums = walk_of(model, IDS), TableSums.of(model)
    stored = sensitivity.Stored(tmp_path / "analysis", walk.linears)
    with observed_tables(model, sums):
        analyse(walk, stored, PLAN)
    known = {name: stored[name] for name in walk.linears}
    weights = {name: model.get_submodule(name).weight.detach() for name in (*known, *uses(model))}
    known |= {name: analysis(weights[name], sums, use) for name, use in uses(model).items()}
    specs = {name: LayerSpec(*weight.shape) for name, weight in weights.items()}
    price = budget.prices(specs, WIDTHS)
    widths = budget.for_bits({n: k.errors for n, k in known.items()}, price, 5.0, True)
    assert 4.9 < price.bits(widths) / price.total <= 5.0
    parts = {
        f"{name}.{part}": tensor
        for name, weight in weights.items()
        for part, tensor in packed_table(weight, known[name], widths[name], PLAN).items()
    }
    assert 8 * sum(tensor.nbytes for tensor in parts.values()) == price.bits(widths)
    (tmp_path / "out").mkdir()
    specs = {name: spec.with_widths(widths[name]) for name, spec in specs.items()}
    write_packed(tmp_path / "out", model, None, specs, parts.get, embed_bits=16, bits=5.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        off, got = (m(IDS).logits.log_softmax(-1) for m in (loaded, model))
    assert F.kl_div(off, got, reduction="batchmean", log_target=True) / IDS.shape[1] < 0.5


def same(width, rows=40):
    return torch.full((rows,), width, dtype=torch.uint8)
