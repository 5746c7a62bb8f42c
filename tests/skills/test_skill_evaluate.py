"""The numbers of `skill eval` and the choice of k, recounted from whole prompts."""

import dataclasses
import json
import random

import pytest
import torch

from conftest import sentencepiece
from skill_sample import CHAT, TEXT, chat_tokenizer, skill_model
from skimlm.errors import SkimError
from skimlm.skills import compressor as compressing
from skimlm.skills import evaluate, recall, rollout, select, soft, splice, store
from skimlm.skills.distill import Distilled
from skimlm.skills.document import body_start, literals, parse
from skimlm.skills.soft import UNTRAINED, Settings, choose, compress, rows_of
from skimlm.skills.splice import Pin

DOCUMENT = parse(TEXT)
QUICK = Settings(train=8, dev=4, answer=6, steps=4, rows=4)
KEYS = {"name", "text_tokens", "tokens", "closure", "kl", "kl_no_skill", "literal_recall"}


@pytest.fixture(scope="module")
def world():
    return skill_model(), chat_tokenizer()


@pytest.fixture(scope="module")
def made(world):
    return compress(*world, dataclasses.replace(DOCUMENT, source="SKILL.md"), settings=QUICK)


# ---- statistics


def test_a_closure_is_of_sums_not_a_mean_of_closures():
    assert evaluate.closure([1.0, 0.0], [2.0, 8.0]) == pytest.approx(0.9)
    assert evaluate.closure([0.0], [0.0]) == 0.0


def test_the_bootstrap_is_paired_and_covers():
    none = [random.Random(i).uniform(0.5, 3) for i in range(200)]
    low, high = evaluate.bootstrap([0.2 * value for value in none], none)
    assert low == pytest.approx(0.8) and high == pytest.approx(0.8)  # one draw for both sums
    kl = [0.2 + 0.1 * random.Random(-i).random() for i in range(200)]
    low, high = evaluate.bootstrap(kl, none)
    chance, drawn = random.Random(1), []
    for _ in range(4000):
        picks = [chance.randrange(200) for _ in range(200)]
        drawn.append(1 - sum(kl[i] for i in picks) / sum(none[i] for i in picks))
    drawn.sort()
    assert (low, high) == pytest.approx((drawn[100], drawn[3900]), abs=0.003)


def test_a_difference_of_two_methods_is_paired():
    none, better = [2.0, 4.0, 1.0, 3.0] * 20, [0.2, 0.4, 0.1, 0.3] * 20
    worse = [value + 0.1 * nothing for value, nothing in zip(better, none, strict=True)]
    gap, low, high = evaluate.difference(better, worse, none)
    assert (gap, low, high) == pytest.approx((0.1, 0.1, 0.1))


def test_weak_skills_are_in_no_mean():
    rows = [
        dict(name="a", closure=0.9, tokens=50, text_tokens=100, weak=False),
        dict(name="b", closure=1.0, tokens=100, text_tokens=100, weak=False),
        dict(name="c", closure=-9.0, tokens=1, text_tokens=100, weak=True),
    ]
    found = evaluate.summary(rows)
    assert found["mean_closure"] == pytest.approx(0.95)
    assert found["mean_ratio"] == pytest.approx(0.75) and found["weak"] == ["c"]
    assert evaluate.summary(rows[2:])["mean_closure"] is None


# ---- measuring


def test_the_facts_are_those_of_whole_prompts(world, made, tmp_path):
    model, tokenizer = world
    path = tmp_path / "a.skim"
    store.write(path, made)
    facts = evaluate.evaluate(model, tokenizer, [path], count=5, answer=6)
    row = facts["skills"][0]
    assert set(row) >= KEYS and row["questions"] == 5
    json.dumps(facts)
    ids = splice.token_ids(tokenizer, DOCUMENT.text)
    with torch.no_grad():
        text = rollout.read(model, splice.opening(tokenizer, [[ids]]))
    test = evaluate.study(model, tokenizer, DOCUMENT, text, "test", 5, 6, evaluate.SEED)
    sums = {"skill": 0.0, "none": 0.0, "nll": 0.0, "agree": 0.0}
    table, count = model.get_input_embeddings(), 0
    for asked, said in zip(test.questions, test.answers, strict=True):

        def log_p(skills, asked=asked, said=said):
            pieces = [*splice.frame(tokenizer, skills, asked), said[:-1]]
            with torch.no_grad():
                logits = model(inputs_embeds=splice.embed(model, pieces)).logits
            return logits[0, -len(said) :].double().log_softmax(-1)

        p, q, none = log_p([[ids]]), log_p([store.standing(made, tokenizer)]), log_p([])
        sums["skill"] += float((p.exp() * (p - q)).sum())
        sums["none"] += float((p.exp() * (p - none)).sum())
        sums["nll"] += -float(q[range(len(said)), said].sum())
        sums["agree"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(said)
    assert table is model.get_input_embeddings()
    assert row["kl"] == pytest.approx(sums["skill"] / count, rel=1e-3, abs=1e-5)
    assert row["kl_no_skill"] == pytest.approx(sums["none"] / count, rel=1e-3)
    assert row["closure"] == pytest.approx(1 - sums["skill"] / sums["none"], abs=1e-3)
    assert row["nll"] == pytest.approx(sums["nll"] / count, rel=1e-3)
    assert row["top1"] == pytest.approx(sums["agree"] / count)
    assert row["tokens"] == store.tokens(store.standing(made, tokenizer), tokenizer)


def test_the_full_text_scores_itself_perfectly(world, tmp_path):
    path = tmp_path / "SKILL.md"
    path.write_text(TEXT)
    row = evaluate.evaluate(*world, [path], count=3, answer=5)["skills"][0]
    assert (row["method"], row["closure"], row["kl"], row["top1"]) == ("full text", 1.0, 0.0, 1.0)
    assert row["tokens"] == row["text_tokens"] and row["literal_recall"] in (None, 1.0)


def test_everything_has_all_resolutions_and_baselines(world, made, tmp_path):
    path = tmp_path / "a.skim"
    store.write(path, made)
    facts = evaluate.evaluate(*world, [path], count=2, answer=4, everything=True)
    got = {(row["method"], row["k"]) for row in facts["skills"][0]["all"]}
    methods = {made.method, *select.METHODS}
    assert got == {(method, k) for method in methods for k in made.content.ladder}
    assert "closure" in evaluate.text(facts)


def test_a_stale_skill_is_not_evaluated(world, made, tmp_path):
    path = tmp_path / "a.skim"
    store.write(path, made)
    other = chat_tokenizer()
    other.chat_template += " "
    with pytest.raises(SkimError, match="made for another chat_template: compress the skill again"):
        evaluate.evaluate(world[0], other, [path], count=2)


def test_literals_are_asked_with_the_words_before_them(world):
    model, tokenizer = world
    asked = recall.cloze(tokenizer, DOCUMENT, 100)
    begin = body_start(DOCUMENT.text)
    short = [(p, v) for p, v in literals(DOCUMENT.text) if len(v) <= recall.LONGEST]
    assert [value for _, value in asked] == [value for _, value in short]
    for (question, _), (place, _) in zip(asked, short, strict=True):
        said = tokenizer.decode(question).split(recall.ASK + ">")[1]
        before = DOCUMENT.text[begin:place]
        assert before.rstrip().endswith(said) and said


def test_no_space_of_sentencepiece_stands_before_the_beginning_of_an_answer():
    tokenizer = sentencepiece("bpe")
    tokenizer.chat_template = CHAT
    for (question, _), (place, _) in zip(
        recall.cloze(tokenizer, DOCUMENT, 3), literals(DOCUMENT.text), strict=False
    ):
        said = tokenizer.decode(question).split(recall.ASK + ">")[1]
        assert DOCUMENT.text[:place].rstrip().endswith(said) and "\u2581" not in said
        assert not said.startswith(" ")


def test_recall_counts_what_the_full_text_lets_the_model_say(world, monkeypatch):
    model, tokenizer = world
    asked = [(torch.tensor([i]), word) for i, word in enumerate(["aa", "bb", "cc", "dd"])]
    says = {"text": "xaax bb cc", "soft": "aa cc dd"}
    monkeypatch.setattr(recall, "cloze", lambda *args: asked)
    monkeypatch.setattr(
        rollout,
        "sample",
        lambda model, tok, questions, *a, **kw: (
            [splice.token_ids(tokenizer, says[tok])] * len(questions)
        ),
    )
    asked = recall.known(model, tokenizer, DOCUMENT, "text")
    found = [recall.share(model, tokenizer, prefix, asked) for prefix in ("soft", "text")]
    assert found == [pytest.approx(2 / 3), 1.0]
    says["text"] = "nothing"
    asked = recall.known(model, tokenizer, DOCUMENT, "text")
    assert recall.share(model, tokenizer, "soft", asked) is None


# ---- the choice


def row(method, k, closure, recall=1.0, kl=1.0):
    return dict(method=method, k=k, tokens=k + 3, closure=closure, literal_recall=recall, kl=kl)


def test_the_smallest_that_is_good_enough_is_chosen():
    rows = [row("distill", 32, 0.8), row("distill", 64, 0.95), row("distill", 128, 0.99)]
    assert choose(rows, 0.9, 0) is rows[1]
    assert choose(rows, 0.97, 0) is rows[2]
    assert choose(rows, 0.995, 0) is None
    rows.append(row("head", 64, 0.91))
    assert choose(rows, 0.9, 0) is rows[3]  # plain words where they do
    rows[3]["literal_recall"] = 0.2
    assert choose(rows, 0.9, 0.5) is rows[1]
    assert choose([row("distill", 32, -1.0, kl=0.04)], 0.9, 0)["k"] == 32
    assert choose([row("distill", 32, 0.95, recall=None)], 0.9, 0.9)["k"] == 32


def test_the_ladder_ends_at_half_of_the_text():
    assert soft.resolutions(811) == [40, 54, 72, 96, 128, 171, 228, 304, 405]
    assert soft.resolutions(40) == [20] and soft.resolutions(1) == [1]
    half = soft.resolutions(811, 6)[-1]
    assert (half + 6) / (811 + 6) <= 0.5 < (half + 7) / (811 + 6)


def test_adaptive_compression_is_deterministic_and_keeps_its_evidence(world, made, tmp_path):
    again = compress(*world, dataclasses.replace(DOCUMENT, source="SKILL.md"), settings=QUICK)
    for name, skill in (("a.skim", made), ("b.skim", again)):
        store.write(tmp_path / name, skill)
    assert (tmp_path / "a.skim").read_bytes() == (tmp_path / "b.skim").read_bytes()
    rungs = made.evidence["candidates"]
    n = len(DOCUMENT.text)
    ladder = soft.resolutions(n, splice.wrapper_tokens(world[1]))
    tried = {m: [r["k"] for r in rungs if r["method"] == m] for m in (*UNTRAINED, "distill")}
    assert (
        tried["head"]
        == tried["leads"]
        == tried["sections"]
        == ladder[: -len(tried["head"]) - 1 : -1]
    )
    trained = ladder[: len(ladder) - len(tried["head"]) + 1]
    assert tried["distill"] == trained[: -len(tried["distill"]) - 1 : -1]
    chosen = choose(rungs, 0.9, 0.0)
    assert made.k == (chosen["k"] if chosen else None)


@pytest.fixture
def pretended(world, monkeypatch):
    """Made-up training adds 1 and closes 0.95 at the three largest sizes; of words leads are best.

    Returns the ladder, what was asked for (sizes, start, how), and a place for other closures.
    """
    asked, others = [], {}
    ladder = soft.resolutions(len(DOCUMENT.text), splice.wrapper_tokens(world[1]))

    def distill(model, tokenizer, start, pins, sizes, train, dev, training, **_):
        asked.append((sizes, start.clone(), training))
        return Distilled(start + 1, 7, [{"step": 7}])

    def measured(task, method, k, tokens, prefix):
        usual = {"head": 0.5, "leads": 0.6, "sections": 0.4, "amortised": 0.1}
        usual["distill"] = 0.95 if k >= ladder[-3] else 0.5
        none = task.none / task.dev.tokens
        # the fifth training is the one after the sizes
        recall = 0.0 if "floor" in others and len(asked) % 5 == 0 and asked else 1.0
        return row(method, k, others.get((method, k), usual[method]), recall) | {"none": none}

    monkeypatch.setattr(soft, "distill", distill)
    monkeypatch.setattr(soft, "measured", measured)
    return ladder, asked, others


def kept(world, method, k):
    return soft.select.keep(*world, DOCUMENT, k, method)


def test_sizes_are_tried_from_the_largest_down_as_long_as_it_goes_well(world, pretended):
    ladder, asked, _ = pretended
    made = compress(*world, DOCUMENT, settings=QUICK)
    assert [sizes for sizes, *_ in asked[:-1]] == [[k] for k in ladder[:-5:-1]]
    none = made.evidence["candidates"][0]["none"]
    goal = pytest.approx(max(0.1 * none, soft.ENOUGH))
    assert [(how.steps, how.goal) for *_, how in asked] == [
        (4, goal),
        *3 * [(2, goal)],
        (2, 0),
    ]
    assert (made.k, made.content.ladder, made.method) == (ladder[-3], (ladder[-3],), "distill")


def test_what_will_be_served_is_trained_on(world, pretended):
    ladder, asked, others = pretended
    made = compress(*world, DOCUMENT, settings=QUICK)
    sizes, start, _ = asked[-1]
    assert sizes == [ladder[-3]] and torch.equal(start, (asked[2][1] + 1).bfloat16().float())
    assert torch.equal(made.content.vectors, (start + 1).bfloat16())
    assert made.evidence["candidates"][-1]["k"] == made.k
    others["floor"] = 1.0  # unless it loses literals that it had
    made = compress(*world, DOCUMENT, floor=0.5, settings=QUICK)
    assert torch.equal(made.content.vectors, start.bfloat16()) and made.k == ladder[-3]


def test_training_starts_from_the_best_words_and_then_from_what_was_trained(world, pretended):
    ladder, asked, _ = pretended
    compress(*world, DOCUMENT, settings=QUICK)
    ids = splice.token_ids(world[1], DOCUMENT.text)
    places = [kept(world, "leads", k).tolist() for k in ladder[:-5:-1]]
    assert torch.equal(asked[0][1], rows_of(world[0], ids[places[0]]).float())
    for larger, smaller in ((0, 1), (1, 2), (2, 3)):
        vectors = (asked[larger][1] + 1).bfloat16().float()
        trained = dict(zip(places[larger], vectors, strict=True))
        want = torch.stack([trained[place] for place in places[smaller]])
        assert torch.equal(asked[smaller][1], want)


def test_what_words_do_already_needs_no_training(world, pretended):
    ladder, asked, others = pretended
    others["head", ladder[-1]] = others["sections", ladder[-2]] = others["head", ladder[-3]] = 0.92
    made = compress(*world, DOCUMENT, settings=QUICK)
    assert [sizes for sizes, *_ in asked] == [[ladder[-4]]]  # and is not trained on
    assert (made.k, made.content.ladder, made.method) == (ladder[-3], (ladder[-3],), "head")
    assert torch.equal(
        made.content.vectors, rows_of(world[0], splice.token_ids(world[1], DOCUMENT.text))[: made.k]
    )


@pytest.fixture
def compressor(world, tmp_path):
    """A file with a compressor of which every number does something."""
    made = compressing.begin(*world, slots=16, rank=2, hidden=16)
    g = torch.Generator().manual_seed(1)
    values = {n: 0.1 * torch.randn(v.shape, generator=g) for n, v in made.values.items()}
    compressing.write(tmp_path / "c.safetensors", dataclasses.replace(made, values=values))
    return tmp_path / "c.safetensors"


def test_a_compressor_is_tried_before_training_and_may_be_its_start(world, pretended, compressor):
    ladder, asked, others = pretended
    few = [k for k in ladder if k <= 4 * 16]  # of four sections
    want = {k: compress(*world, DOCUMENT, method="amortised", tokens=k, compressor=compressor)
            for k in few[-2:]}  # fmt: skip
    others.update({("amortised", k): 0.7 for k in ladder})
    others.update({("head", k): 0.95 for k in ladder if k > few[-1]})
    made = compress(*world, DOCUMENT, settings=QUICK, compressor=compressor)
    assert [row["k"] for row in made.evidence["candidates"] if row["method"] == "amortised"] == [
        few[-1]
    ]
    assert torch.equal(asked[0][1].bfloat16(), want[few[-1]].content.vectors)
    assert made.evidence["trainings"][0]["start"] == "amortised"
    asked.clear()
    others["amortised", few[-1]] = 0.93
    others["amortised", few[-2]] = 0.92
    made = compress(*world, DOCUMENT, settings=QUICK, compressor=compressor)
    assert (made.method, made.k, made.content.pins) == ("amortised", few[-2], ())
    assert torch.equal(made.content.vectors, want[few[-2]].content.vectors)


def test_pins_are_kept_whatever_plain_words_would_do(world, pretended):
    ladder, _, others = pretended
    others.update({(method, k): 0.99 for method in UNTRAINED for k in range(1, 300)})
    made = compress(*world, DOCUMENT, pin=True, settings=QUICK)
    assert made.method == "distill" and "`notes scan --all`" in [
        pin.text for pin in made.content.pins
    ]
    assert {row["method"] for row in made.evidence["candidates"]} == {"distill"}
    prose = soft.layout(*world, DOCUMENT, None, True)[0]  # half of it, beside the pins
    assert made.evidence["candidates"][0]["k"] == (len(prose) + 18) // 2 - 18


def test_a_size_starts_from_its_best_words_too(world, pretended):
    _, asked, others = pretended
    others["sections", 150] = 0.7
    compress(*world, DOCUMENT, tokens=150, settings=QUICK)
    [(sizes, start, how)] = asked
    ids = splice.token_ids(world[1], DOCUMENT.text)
    assert torch.equal(start, rows_of(world[0], ids[kept(world, "sections", 150)]).float())
    assert sizes == [32, 64, 128, 150] and how.goal == 0
    compress(*world, DOCUMENT, method="distill", settings=QUICK)
    half = soft.resolutions(len(DOCUMENT.text), splice.wrapper_tokens(world[1]))[-1]
    assert asked[1][0] == [32, 64, 128, half]


def test_where_nothing_is_good_enough_the_full_text_is_served(world, monkeypatch):
    monkeypatch.setattr(soft, "measured", lambda task, method, k, *_: row(method, k, 0.5))
    made = compress(*world, DOCUMENT, settings=QUICK)
    n = len(DOCUMENT.text)
    assert made.k is None
    assert made.content.ladder == (soft.resolutions(n, splice.wrapper_tokens(world[1]))[-1],)
    assert len(made.evidence["trainings"]) == 1  # the largest size was enough to know


@pytest.mark.parametrize("method", ["head", "leads", "selfinfo", "sections"])
def test_untrained_methods_give_the_embeddings_of_kept_words(world, method):
    model, tokenizer = world
    made = compress(model, tokenizer, DOCUMENT, method=method, tokens=40)
    kept = soft.select.keep(model, tokenizer, DOCUMENT, 40, method)
    ids = splice.token_ids(tokenizer, DOCUMENT.text)[kept]
    assert torch.equal(made.content.vectors, model.get_input_embeddings()(ids).detach().bfloat16())
    assert (made.k, made.content.ladder, made.method) == (40, (40,), method)


def test_a_size_is_kept_to_and_nested(world):
    made = compress(*world, DOCUMENT, ratio=0.25, settings=QUICK)
    k = round(0.25 * len(DOCUMENT.text))
    assert (made.k, made.method) == (k, "distill")
    assert made.content.ladder == tuple(sorted({r for r in soft.NESTED if r < 0.9 * k} | {k}))


def test_pinned_spans_stay_text_and_the_rest_is_the_start(world):
    model, tokenizer = world
    start, pins = soft.layout(model, tokenizer, DOCUMENT, None, True)
    pieces = splice.pieces_of(tokenizer, start, pins, len(start))
    # all of it together is the text again
    table = model.get_input_embeddings().weight.detach().bfloat16().float()
    text = "".join(
        tokenizer.decode(p if p.ndim == 1 else torch.cdist(p, table).argmin(1)) for p in pieces
    )
    assert text == DOCUMENT.text
    assert pins[0] == Pin(DOCUMENT.text.index("`notes scan"), "`notes scan --all`")
    made = compress(model, tokenizer, DOCUMENT, tokens=20, pin=True, settings=QUICK)
    assert all(pin.at <= 20 for pin in made.content.pins) and len(made.content.pins) == len(pins)
    assert store.tokens(store.standing(made, tokenizer), tokenizer) > 20 + sum(
        len(pin.text) for pin in pins
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(tokens=10_000), "10,000 soft tokens for a text of"),
        (dict(ratio=1e-6), "0 soft tokens for a text of"),
        (dict(method="head"), "--method head needs a size"),
    ],
)
def test_sizes_that_cannot_be_are_refused(world, options, complaint):
    with pytest.raises(SkimError, match=complaint):
        compress(*world, DOCUMENT, **options)


def test_a_text_beyond_the_model_is_refused_not_cut(world):
    long = parse(TEXT + "word " * 1000)
    with pytest.raises(SkimError, match=r"tidy-notes: 5,\d+ tokens, with a question .* 3,792 of a"):
        compress(*world, long)


def test_a_plot_needs_matplotlib_and_a_known_suffix(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SkimError, match=r"--plot needs matplotlib: pip install 'skimlm\[plot\]'"):
        evaluate.check_plot("a.png")


def test_the_plot_has_a_line_per_skill_and_method_through_the_measured_points(tmp_path):
    def skill(name, text_tokens, rows):
        keys = ("method", "tokens", "closure")
        return {
            "name": name,
            "text_tokens": text_tokens,
            "all": [dict(zip(keys, row, strict=True)) for row in rows],
        }

    long = skill("long", 100, [("distill", 50, 0.9), ("distill", 25, 0.7), ("head", 50, 0.6)])
    facts = {"skills": [long, skill("short", 40, [("head", 10, -0.2), ("head", 20, 0.5)])]}
    axes = evaluate.figure(facts).axes[0]
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [line.get_xydata().tolist() for line in lines] == [
        [[0.25, 0.7], [0.5, 0.9]],
        [[0.5, 0.6]],
        [[0.25, -0.2], [0.5, 0.5]],
    ]
    assert lines[1].get_color() == lines[2].get_color() != lines[0].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["distill", "head"]
    evaluate.plot(facts, tmp_path / "plot.svg")
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()
    with pytest.raises(SkimError, match=r"plot.xyz: cannot be drawn: give a .png, .svg or .pdf"):
        evaluate.check_plot(tmp_path / "plot.xyz")
