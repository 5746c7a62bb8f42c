"""Losses of hidden states in chunks against autograd through the logits of all tokens at once."""

import pytest
import torch
from torch.nn import functional as F

from conftest import tiny_model
from skimlm.models.hooks import frozen
from skimlm.train import losses as L


@pytest.fixture(scope="module")
def case():
    """A model, final states [2, 7, d], a teacher and its states [14, d], ids [2, 7]."""
    g = torch.Generator().manual_seed(0)
    hidden, known = (torch.randn(shape, generator=g) for shape in ((2, 7, 64), (14, 64)))
    model, teacher = tiny_model(), tiny_model("qwen3")
    with frozen(model), frozen(teacher):
        yield model, hidden, teacher, known, torch.randint(0, 259, (2, 7), generator=g)


def kl_terms(p, q):
    return p.exp() * (p - q)


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("kind", ["cross entropy", "own teacher", "other teacher"])
def test_sum_and_gradient_are_those_of_all_logits_at_once(case, kind, chunk):
    model, hidden, teacher, known, ids = case
    h = hidden.clone().requires_grad_()
    log_q = model.lm_head(h).log_softmax(-1)
    if kind == "cross entropy":
        loss = L.cross_entropy(model, L.next_tokens(ids))
        want = F.nll_loss(log_q[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        assert loss.tokens == 12
    else:
        other = teacher if kind == "other teacher" else None
        loss = L.kl_divergence(model, known, other, scale=0.25)
        log_p = (other or model).lm_head(known).log_softmax(-1)
        want = 0.25 * kl_terms(log_p, log_q.flatten(0, 1)).sum()
        assert loss.tokens == 14
    want.backward()
    value, gradient = L.loss_gradient(loss, hidden, chunk)
    assert value == pytest.approx(want.item(), rel=1e-5)
    assert L.loss_sum(loss, hidden, chunk) == value
    torch.testing.assert_close(gradient, h.grad, atol=1e-5, rtol=1e-4)
    y = (hidden / 2).requires_grad_()
    assert L.backward(loss, y * 2, chunk) == value
    torch.testing.assert_close(y.grad, 2 * gradient)


@pytest.mark.parametrize("chunk", [3, 512])
def test_what_is_measured_of_tokens_is_over_the_whole_vocabulary(case, chunk):
    model, hidden, _, known, ids = case
    student, targets = hidden.flatten(0, 1), ids.flatten()
    p, q = (model.lm_head(h).log_softmax(-1).double() for h in (known, student))
    found = L.token_scores(model, known, student, targets, chunk)
    torch.testing.assert_close(found["kl"].double(), kl_terms(p, q).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["nll"].double(), -q[range(14), targets], atol=1e-4, rtol=1e-4)
    assert found["agree"].tolist() == (p.argmax(-1) == q.argmax(-1)).float().tolist()
    alone = L.token_scores(model, known, student, chunk=chunk)
    assert list(alone) == ["kl"] and torch.equal(alone["kl"], found["kl"])
    assert float(L.token_scores(model, known, known)["kl"].abs().max()) == 0


def test_logits_of_more_tokens_than_a_chunk_never_stand(case, monkeypatch):
    model, hidden, _, known, _ = case
    most, head = [], L.head_logits

    def watched(model, states):
        most.append(len(states))
        return head(model, states)

    monkeypatch.setattr(L, "head_logits", watched)
    L.loss_gradient(L.kl_divergence(model, known), hidden, chunk=5)
    L.token_scores(model, known, hidden.flatten(0, 1), chunk=5)
    assert max(most) == 5
