"""Choosing tokens against what the definitions say."""

import pytest
import torch

from skimlm.serve.sampling import Sampler, Sampling

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.9])


def often(how, said=(), n=4000):
    """How often each token is drawn."""
    sampler = Sampler(how)
    counts = torch.zeros(len(LOGITS))
    for _ in range(n):
        counts[sampler.choose(LOGITS, said)] += 1
    return counts / n


def test_greedy_is_the_likeliest():
    assert Sampler(Sampling()).choose(LOGITS, []) == 1 and Sampling().plain


@pytest.mark.parametrize(
    ("how", "said", "want"),
    [
        (Sampling(bias={2: 1.5}), [], 2),
        (Sampling(presence=0.5), [1, 1], 4),
        (Sampling(frequency=0.06), [1, 1], 4),
        (Sampling(frequency=0.04), [1, 1], 1),
        (Sampling(bias={1: -100.0, 4: -100.0}), [], 2),
    ],
    ids=str,
)
def test_biases_and_penalties_move_logits(how, said, want):
    before = LOGITS.clone()
    assert Sampler(how).choose(LOGITS, said) == want and not how.plain
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_as_likely_as_the_softmax_says(temperature):
    want = (LOGITS / temperature).softmax(0)
    assert (often(Sampling(temperature)) - want).abs().max() < 0.03


def test_top_p_and_top_k_leave_the_likeliest_in_their_shares():
    chances = LOGITS.softmax(0)
    order = chances.argsort(descending=True).tolist()
    for top_p, count in ((0.01, 1), (0.4, 1), (0.6, 2), (0.9, 3), (0.97, 4), (0.999, 5)):
        before = chances[order].cumsum(0) - chances[order]
        assert int((before < top_p).sum()) == count  # what the definition says of these numbers
        got = often(Sampling(1.0, top_p=top_p), n=1500)
        assert set(got.nonzero().flatten().tolist()) == set(order[:count])
        share = chances[order[:count]] / chances[order[:count]].sum()
        assert (got[order[:count]] - share).abs().max() < 0.05
    got = often(Sampling(1.0, top_k=2), n=1500)
    assert set(got.nonzero().flatten().tolist()) == set(order[:2])


def test_the_likeliest_stays_however_little_is_asked_for():
    assert Sampler(Sampling(1.0, top_p=5e-324)).choose(LOGITS, []) == 1
    assert Sampler(Sampling(5e-324)).choose(LOGITS, []) == 1


def test_the_same_seed_gives_the_same_tokens():
    def draw(seed):
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.choose(LOGITS, []) for _ in range(30)]

    assert draw(3) == draw(3) != draw(4)
