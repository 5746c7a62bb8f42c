"""Untrained methods: which tokens they keep, against plain recounts."""

import itertools
import math
from collections import Counter

import pytest
import torch

from skill_sample import TEXT, chat_tokenizer, skill_model
from skimlm.skills import select
from skimlm.skills.document import parse, sections, spans
from skimlm.skills.splice import token_ids

DOCUMENT = parse(TEXT)


@pytest.fixture(scope="module")
def world():
    return skill_model(), chat_tokenizer()


@pytest.mark.parametrize("method", select.METHODS)
@pytest.mark.parametrize("k", [1, 50, 200, 10_000])
def test_every_method_keeps_k_places_ascending(world, method, k):
    kept = select.keep(*world, DOCUMENT, k, method).tolist()
    assert len(kept) == min(k, len(DOCUMENT.text)) and kept == sorted(set(kept))
    assert 0 <= kept[0] and kept[-1] < len(DOCUMENT.text)


def test_head_keeps_the_beginning(world):
    assert select.keep(*world, DOCUMENT, 7, "head").tolist() == list(range(7))


@pytest.mark.parametrize("method", select.METHODS)
def test_a_smaller_size_keeps_some_of_what_a_larger_one_keeps(world, method):
    kept = [set(select.keep(*world, DOCUMENT, k, method).tolist()) for k in range(1, 160)]
    assert all(some < more for some, more in itertools.pairwise(kept))


def test_leads_are_dealt_like_cards(world):
    """Half of k, and not fewer than 32, from the text's head; then one token to every section in
    turn, which the head's count for, until all k are dealt.
    """
    parts = [part.text for part in sections(DOCUMENT.text)]
    owner = [i for i, part in enumerate(parts) for _ in part]
    for k in range(1, len(owner) + 1):
        taken, turn = Counter(owner[: min(k, max(k // 2, 32))]), 0
        while taken.total() < k:
            i, round_ = turn % len(parts), turn // len(parts)
            taken[i] += taken[i] == round_ < len(parts[i])
            turn += 1
        begins = [sum(map(len, parts[:i])) for i in range(len(parts))]
        want = [begin + j for i, begin in enumerate(begins) for j in range(taken[i])]
        assert select.keep(*world, DOCUMENT, k, "leads").tolist() == want


def test_self_information_is_that_of_the_model_and_spans_come_first(world):
    model, tokenizer = world
    ids = torch.tensor([tokenizer(DOCUMENT.text).input_ids])
    with torch.no_grad():
        logp = model(ids).logits[0].double().log_softmax(-1)
    nll = [math.inf] + [-float(logp[i - 1, ids[0, i]]) for i in range(1, ids.shape[1])]
    bonus = 2 * sorted(nll[1:])[(len(nll) - 2) // 2]  # torch's median is the lower one
    fixed = {i for begin, end in spans(DOCUMENT.text) for i in range(begin, end)}
    score = [value + bonus * (i in fixed) for i, value in enumerate(nll)]
    for k in (20, 150):
        want = sorted(sorted(range(len(score)), key=lambda i: -score[i])[:k])
        got = select.keep(model, tokenizer, DOCUMENT, k, "selfinfo").tolist()
        assert len(set(want) & set(got)) >= k - 1  # float32 may swap neighbours


def test_sections_are_kept_whole_by_rank(world):
    parts = sections(DOCUMENT.text)
    sizes = [len(part.text) for part in parts]
    ranks = select.bm25([part.text for part in parts], "tidy-notes " + DOCUMENT.description)
    best = max(range(1, len(parts)), key=lambda i: ranks[i])
    k = sizes[0] + sizes[best]
    begin = sum(sizes[:best])
    want = [*range(sizes[0]), *range(begin, begin + sizes[best])]
    assert select.keep(*world, DOCUMENT, k, "sections").tolist() == want


def test_bm25_is_okapis_formula():
    texts = ["red red fish", "one fish", "blue whale and one red boat", ""]
    bags = [Counter(text.split()) for text in texts]
    mean = sum(len(text.split()) for text in texts) / 4
    for query in ("red", "fish one", "green"):
        want = []
        for bag in bags:
            total = 0.0
            for word in query.split():
                n = sum(word in other for other in bags)
                idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
                norm = 1.5 * (0.25 + 0.75 * sum(bag.values()) / mean)
                total += idf * bag[word] * 2.5 / (bag[word] + norm)
            want.append(total)
        assert select.bm25(texts, query) == pytest.approx(want)


def test_special_tokens_in_a_text_are_text_for_selection_too():
    tokenizer, text = chat_tokenizer(), TEXT + "Then </s>."
    ids, places = select.tokens(tokenizer, text)
    assert ids.tolist() == token_ids(tokenizer, text).tolist() and 258 not in ids
    assert len(places) == len(ids) and places[-1] == (len(text) - 1, len(text))
