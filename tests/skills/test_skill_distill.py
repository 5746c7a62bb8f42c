"""Distillation on tiny random models: what is trained, what is kept, and that it helps."""

import copy

import pytest
import torch

from skill_sample import TEXT, chat_tokenizer, skill_model
from skimlm.skills import distill as distilling
from skimlm.skills import rollout, splice
from skimlm.skills.distill import Training, distill, divergences, nested, study
from skimlm.skills.document import parse
from skimlm.skills.gate import without
from skimlm.skills.soft import rows_of
from skimlm.skills.splice import Pin

DOCUMENT = parse(TEXT)
PINS = (Pin(3, "notes"), Pin(9, "`b`"), Pin(9, "c"))


@pytest.fixture(scope="module")
def world():
    """A model, tokenizer, ids of the text, its prefix, and studies."""
    model, tokenizer = skill_model(), chat_tokenizer()
    ids = splice.token_ids(tokenizer, DOCUMENT.text)
    with torch.no_grad():
        text = rollout.read(model, splice.opening(tokenizer, [[ids]]))
    train = study(model, tokenizer, DOCUMENT, text, "train", 12, 8, seed=0)
    dev = study(model, tokenizer, DOCUMENT, text, "dev", 6, 8, seed=100)
    return model, tokenizer, ids, text, train, dev


def test_the_full_text_has_no_divergence_from_itself(world):
    model, _, _, text, _, dev = world
    assert divergences(model, text, dev) == [0.0] * 6


def test_the_teachers_answers_are_scored_as_in_one_piece(world):
    model, tokenizer, ids, _, train, _ = world
    pieces = splice.frame(tokenizer, [[ids]], train.questions[0])
    whole = torch.cat([*pieces, train.answers[0][:-1]])[None]
    with torch.no_grad():
        want = model.get_decoder()(input_ids=whole).last_hidden_state[0, -len(train.answers[0]) :]
    torch.testing.assert_close(train.teacher[0], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pins", [(), PINS])
def test_a_prefix_of_the_soft_tokens_is_the_smaller_resolution(world, pins):
    model, tokenizer, ids, *_, dev = world
    soft = rows_of(model, ids[:16]).float()
    with torch.no_grad():
        prefixes = nested(model, tokenizer, soft, pins, [4, 9, 16])
        for k, prefix in prefixes.items():
            pieces = splice.pieces_of(tokenizer, soft[:k], pins, k)
            alone = rollout.read(model, splice.opening(tokenizer, [pieces]))
            assert alone.length == prefix.length
            got, want = divergences(model, prefix, dev), divergences(model, alone, dev)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_only_soft_tokens_get_gradients(world):
    model, tokenizer, ids, _, train, _ = world
    model = copy.deepcopy(model)
    soft = rows_of(model, ids[:12]).float().requires_grad_()
    with distilling.frozen(model):
        prefixes = nested(model, tokenizer, soft, (), [4, 12])
        distilling.backward_divergence(model, prefixes, train, [0, 1, 2], 1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert (soft.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("at_once", [1, 100])
def test_the_loss_is_the_mean_divergence_per_token_of_its_rows_at_their_resolutions(
    world, at_once, monkeypatch
):
    model, tokenizer, ids, _, train, _ = world
    monkeypatch.setattr(rollout, "chunk", lambda _: at_once)
    soft = rows_of(model, ids[:12]).float().requires_grad_()
    prefixes = nested(model, tokenizer, soft, (), [4, 12])
    got = distilling.backward_divergence(model, prefixes, train, [5, 1, 7], 2)
    gradient, soft.grad = soft.grad, None
    total, tokens = 0.0, 0
    assert distilling.assign(2, 3, 2) == [1, 1, 0]
    for row, k in ((5, 12), (1, 12), (7, 4)):
        pieces = splice.frame(tokenizer, [[soft[:k]]], train.questions[row])
        tail = model.get_input_embeddings()(train.answers[row][:-1])
        whole = torch.cat([splice.embed(model, pieces)[0], tail])[None]
        logits = model(inputs_embeds=whole).logits[0, -len(train.answers[row]) :]
        p = model.lm_head(train.teacher[row]).log_softmax(-1)
        total += (p.exp() * (p - logits.log_softmax(-1))).sum()
        tokens += len(train.answers[row])
    (total / tokens).backward()
    assert got == pytest.approx(total.item() / tokens, rel=1e-4)
    torch.testing.assert_close(gradient, soft.grad, atol=1e-6, rtol=1e-3)


def test_rows_are_read_at_larger_resolutions_more_often():
    numbers = [number for step in range(10) for number in distilling.assign(4, 7, step)]
    assert [numbers.count(i) for i in range(4)] == [7, 14, 21, 28]
    assert distilling.assign(4, 7, 0) == [3, 3, 3, 3, 2, 2, 2]


def test_thirty_steps_reduce_the_divergence_they_train_on(world):
    model, tokenizer, ids, _, train, _ = world
    start = rows_of(model, ids[:16]).float()
    training = Training(steps=30, rows=6, lr=1e-2, check=15)
    done = distill(model, tokenizer, start, (), [8, 16], train, train, training)
    assert done.step > 0
    first = done.history[0]["dev_kl"]
    last = min(done.history[1:], key=lambda entry: sum(entry["dev_kl"].values()))["dev_kl"]
    assert all(last[k] < 0.8 * first[k] for k in (8, 16))
    with torch.no_grad():
        for k, prefix in nested(model, tokenizer, done.soft, (), [8, 16]).items():
            kl = sum(divergences(model, prefix, train)) / train.tokens
            assert kl == pytest.approx(last[k], rel=1e-3)


def test_training_that_does_not_help_leaves_the_start(world):
    model, tokenizer, ids, _, train, dev = world
    start = model.get_input_embeddings()(ids).detach()  # all of the text: it cannot be beaten
    training = Training(steps=40, rows=1, lr=1.0, check=4, patience=2)
    done = distill(model, tokenizer, start, (), [len(start)], train, dev, training)
    assert done.step == 0 and torch.equal(done.soft, start)
    assert [entry["step"] for entry in done.history] == [0, 4, 8]  # and ends early


def test_training_ends_at_its_goal_or_where_the_goal_is_out_of_reach(world):
    model, tokenizer, ids, _, train, _ = world
    start = rows_of(model, ids[:16]).float()

    def run(lr, goal=0.0):
        training = Training(steps=25, rows=6, lr=lr, check=5, goal=goal)
        done = distill(model, tokenizer, start, (), [16], train, train, training)
        return [entry["step"] for entry in done.history], [e["dev_kl"][16] for e in done.history]

    steps, kl = run(1e-2)
    assert steps == [0, 5, 10, 15, 20, 25] and kl == sorted(kl, reverse=True)
    assert run(1e-2, (kl[1] + kl[2]) / 2) == (steps[:3], kl[:3])
    # slow: at this pace the 20 steps that are left would not bring it there
    steps, kl = run(1e-5)
    pace = kl[0] - kl[1]
    assert run(1e-5, kl[1] - 4.5 * pace)[0] == [0, 5]
    assert len(run(1e-5, kl[1] - 3.5 * pace)[0]) > 2


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma's embeddings come out scaled
def test_no_vector_becomes_longer_than_any_words(world, family):
    _, tokenizer, ids, *_ = world
    model = skill_model(family)
    with torch.no_grad():
        text = rollout.read(model, splice.opening(tokenizer, [[ids]]))
    train = study(model, tokenizer, DOCUMENT, text, "train", 4, 4)
    start = model.get_input_embeddings()(ids[:8]).detach()
    seen = []

    def watch(model, tokenizer, soft, pins, ladder):
        seen.append(float(soft.detach().norm(dim=1).max()))
        return nested(model, tokenizer, soft, pins, ladder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling, "nested", watch)
        distill(model, tokenizer, start, (), [8], train, train, Training(6, 2, 3.0, 6))
    scale = 8.0 if family == "gemma3" else 1.0  # the root of a width of 64
    limit = scale * float(model.get_input_embeddings().weight.detach().norm(dim=1).max())
    assert max(seen) <= limit * 1.001 and max(seen) > 0.99 * limit


def test_the_same_seed_trains_the_same_vectors(world):
    model, tokenizer, ids, _, train, dev = world
    start = rows_of(model, ids[:8]).float()
    made = [
        distill(model, tokenizer, start, (), [8], train, dev, Training(4, 3, check=4, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(made[0].soft, made[1].soft) and made[0].history == made[1].history
    assert made[0].history != made[2].history


def test_a_stopped_training_goes_on_to_the_same_vectors(world, tmp_path):
    model, tokenizer, ids, _, train, dev = world
    what = (model, tokenizer, rows_of(model, ids[:8]).float(), (), [4, 8], train, dev)
    training = Training(steps=9, rows=3, check=2)
    whole = distill(*what, training)

    def stop(_phase, step, _steps):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(*what, training, tmp_path / "state", stop)
    steps = []
    again = distill(*what, training, tmp_path / "state", lambda *how: steps.append(how[1]))
    assert steps == [5, 6, 7, 8, 9]  # from the check at step 4 on
    assert torch.equal(again.soft, whole.soft)
    assert (again.step, again.history) == (whole.step, whole.history)


def test_without_a_skill_the_question_stands_alone(world):
    model, tokenizer, *_, dev = world
    total = 0.0
    for asked, answer, teacher in zip(dev.questions, dev.answers, dev.teacher, strict=True):
        ids = torch.cat([*splice.frame(tokenizer, [], asked), answer[:-1]])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, -len(answer) :].log_softmax(-1)
            p = model.lm_head(teacher).log_softmax(-1)
        total += float((p.exp() * (p - logits)).sum())
    assert sum(without(model, tokenizer, dev)) == pytest.approx(total, rel=1e-4)
