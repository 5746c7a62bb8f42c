"""Kept keys and values, against whole texts read under masks and against least squares by torch."""

import dataclasses
import itertools
import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import tiny_model
from skill_sample import TEXT, chat_tokenizer, skill_model
from skimlm import generate
from skimlm.errors import FormatError, SkimError
from skimlm.runtime import prefix as runtime_prefix
from skimlm.runtime.prefix import Group
from skimlm.skills import compression, front, gate, kv, kv_file, kv_search, rollout, splice, store
from skimlm.skills.document import parse
from skimlm.skills.gate import Settings

DOCUMENT = parse(TEXT)
IDS = torch.arange(40, 90)
ROWS = [torch.arange(60, 70), torch.arange(100, 103), torch.arange(33, 39)]
QUICK = Settings(train=6, dev=4, answer=6)
FAMILIES = ("llama", "qwen3", "phi3")


def read(model, ids=IDS):
    with torch.no_grad():
        return rollout.read(model, [ids])


def places(seed, heads=2):
    """For every head some positions, more for the one than for the other."""
    chance = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(len(IDS), generator=chance)[: 9 + 7 * h].sort().values for h in range(heads)
    ]


def pack_of(prefix, kept, bias=0.0, first=0):
    """A pack of exactly these positions, in every layer alike, nothing fitted."""
    parts = []
    for layer in prefix.cache.layers:
        for h, mine in enumerate(kept):
            keys, steps = kv.key_codes(layer.keys[0, h, mine])
            values, scale = kv.value_codes(layer.values[0, h, mine])
            logits = torch.full((len(mine),), bias)
            parts.append((keys, values, steps[None], scale, logits.half(), mine.int()))
    keys, values, steps, scale, logits, found = map(torch.cat, zip(*parts, strict=True))
    counts = torch.tensor([[len(mine) for mine in kept]] * len(prefix.cache.layers)).int()
    steps = steps.view(*counts.shape, *steps.shape[1:])
    return kv.Pack(keys, values, steps, scale, logits, found, counts, prefix.length, first)


def exact(prefix, kept, bias):
    """The same, its keys and values as they are in the cache."""
    layers = []
    for layer in prefix.cache.layers:
        groups = [
            kv.Group(layer.keys[0, h : h + 1, mine], layer.values[0, h : h + 1, mine],
                     torch.full((1, len(mine)), bias))
            for h, mine in enumerate(kept)
        ]  # fmt: skip
        layers.append(groups)
    return rollout.Prefix(rollout.PrefixCache(layers, prefix.length), prefix.length)


def under_a_mask(model, row, kept, bias):
    """Final states of `row` behind IDS, read in one piece; `row` sees what its heads kept."""
    heads, n, t = model.config.num_attention_heads, len(row), len(IDS)
    mask = torch.full((1, heads, t + n, t + n), -torch.inf).triu(1)
    behind = torch.full((heads, t), -torch.inf)
    for h in range(heads):
        behind[h, kept[h // (heads // len(kept))]] = bias
    mask[0, :, t:, :t] = behind[:, None]
    ids = torch.cat([IDS, row])[None]
    with torch.no_grad():
        return model.get_decoder()(ids, attention_mask=mask).last_hidden_state[0, t:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_rows_see_what_each_head_kept(family, bias):
    model = tiny_model(family)
    prefix, kept = read(model), places(3, model.config.num_key_value_heads)
    behind = exact(prefix, kept, bias)
    answers = [torch.arange(70, 74)] * len(ROWS)
    got = rollout.score_all(model, behind, ROWS, answers)
    for states, row, answer in zip(got, ROWS, answers, strict=True):
        want = under_a_mask(model, torch.cat([row, answer[:-1]]), kept, bias)[len(row) - 1 :]
        torch.testing.assert_close(states, want, atol=3e-5, rtol=1e-4)


def test_a_pack_is_its_positions_rounded_to_eight_bits():
    model = tiny_model()
    prefix, kept = read(model), places(4)
    pack = pack_of(prefix, kept)
    assert pack.counts.tolist() == [[9, 16]] * 2 and pack.tokens == round(12.5)
    for layer, groups in zip(prefix.cache.layers, kv.groups(pack, torch.float32), strict=True):
        for h, (group, mine) in enumerate(zip(groups, kept, strict=True)):
            for got, want in ((group.keys, layer.keys), (group.values, layer.values)):
                want = want[0, h, mine]
                step = want.abs().amax(1, keepdim=True) / 127
                assert ((got[0] - want).abs() <= 0.51 * step + want.abs().max() / 256).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_queries_look_at_is_transformers_own_attention(family):
    model = tiny_model(family)
    prefix = read(model)
    watched = kv.watch(model, prefix, [(1, ROWS[:2]), (2, ROWS[2:])])
    model.set_attn_implementation("eager")
    rows, weights = sorted(ROWS, key=len), []
    for row in rows:
        share = 1 / 13 / 3 if any(row is r for r in ROWS[:2]) else 2 / 6 / 3
        weights += [share] * len(row)
    for i, seen in enumerate(watched):
        parts, outs = [], []
        for row in rows:
            with torch.no_grad():
                made = model(torch.cat([IDS, row])[None], output_attentions=True)
            parts.append(made.attentions[i][0, :, len(IDS) :, : len(IDS)])
            values = prefix.cache.layers[i].values[0].repeat_interleave(2, 0)
            outs.append(parts[-1] @ values)
        a, out, w = torch.cat(parts, 1), torch.cat(outs, 1), torch.tensor(weights)
        score = (a.square() * w[None, :, None]).sum(1).view(2, 2, -1).mean(1)
        torch.testing.assert_close(seen.score, score, atol=1e-6, rtol=1e-3)
        order = a.sum(-1).view(2, 2, -1).transpose(1, 2).reshape(2, -1)
        torch.testing.assert_close(seen.mass, order, atol=1e-5, rtol=1e-4)
        out = out.view(2, 2, len(w), -1).transpose(1, 2).reshape(2, 2 * len(w), -1)
        torch.testing.assert_close(seen.out, out, atol=1e-5, rtol=1e-4)
        assert float(seen.weights.sum()) == pytest.approx(1)


def test_of_many_tokens_some_are_looked_at_by_chance(monkeypatch):
    model = tiny_model()
    prefix, kinds = read(model), [(1, ROWS[:2]), (2, ROWS[2:])]
    everything = kv.watch(model, prefix, kinds)
    monkeypatch.setattr(kv, "QUERIES", 7)
    monkeypatch.setattr(rollout, "BATCH", 2)
    some, others = (kv.watch(model, prefix, kinds, seed) for seed in (0, 1))
    for layer, whole in zip(some, everything, strict=True):
        assert layer.queries.shape[1] == 14  # of both query heads
        found = (layer.queries[0][:, None] - whole.queries[0]).abs().amax(-1).argmin(1)
        assert found.tolist() == sorted({*found.tolist()})
        ratio = layer.weights / whole.weights[found]
        torch.testing.assert_close(ratio, ratio[:1].expand(14))
        assert float(layer.weights.sum()) == pytest.approx(1)
        torch.testing.assert_close(layer.mass[0], whole.mass[0, found], atol=1e-5, rtol=1e-4)
    assert not torch.equal(some[0].queries, others[0].queries)


def scored(score):
    layers = [kv.Watched(*[torch.zeros(0)] * 4, layer, torch.zeros(0)) for layer in score]
    return layers


@pytest.mark.parametrize("kept", [30, 25, 16, 5, 60])
def test_the_positions_that_count_most_are_kept_whatever_their_head(kept):
    torch.manual_seed(2)
    score = torch.rand(3, 2, 50)
    score[1] *= 0.01  # a layer that hardly looks
    keep = kv.choose(scored(score), kept, 6)
    assert int(keep.sum()) == min(kept, 50) * 6
    if kept >= 25:
        assert keep[..., :6].all() and keep[..., -kv.LAST :].all()
        least = 6 + kv.LAST + kv.LEAST
        assert int(keep.sum(-1).min()) >= least
        free = keep.clone()  # beyond what every head keeps, the best of all
        for i, j in itertools.product(range(3), range(2)):
            inner = score[i, j, 6 : -kv.LAST].topk(kv.LEAST).indices + 6
            free[i, j, inner] = False
            assert keep[i, j, inner].all()
        free[..., :6] = free[..., -kv.LAST :] = False
        out = ~keep
        assert not (free.any() and out.any()) or score[free].min() >= score[out].max()
    else:
        assert (keep.sum(-1) == kept).all()


def watched_of(keys, values, seed=0, count=200):
    """What queries drawn at random look at behind keys and values [T, d], and with one own key."""
    chance = torch.Generator().manual_seed(seed)
    queries = torch.randn(count, keys.shape[1], generator=chance)
    logits = queries @ keys.T
    own = torch.randn(count, generator=chance)
    total = torch.logaddexp(logits.logsumexp(1), own)
    a = (logits - total[:, None]).exp()
    weights = torch.full((count,), 1 / count)
    return kv.Watched(
        queries[None], total[None], a.sum(1)[None], (a @ values)[None], torch.zeros(1), weights
    )


def test_of_twins_one_is_kept_and_counts_twice():
    """What is dropped is exactly what a kept one can stand for."""
    torch.manual_seed(1)
    keys, values = torch.randn(6, 8).repeat(2, 1), torch.randn(6, 8).repeat(2, 1)
    bias, fitted = kv._refit(watched_of(keys, values), 0, keys[:6], values[:6], 0)
    torch.testing.assert_close(bias, torch.full((6,), 2.0).log(), atol=0.02, rtol=0)
    torch.testing.assert_close(fitted, values[:6], atol=0.02, rtol=0)


def test_where_nobody_looks_everything_stays():
    torch.manual_seed(1)
    keys, values = torch.randn(9, 8), torch.randn(9, 8)
    seen = watched_of(keys, values)
    unseen = dataclasses.replace(seen, total=seen.total + 500, mass=seen.mass * 0, out=seen.out * 0)
    bias, fitted = kv._refit(unseen, 0, keys, values, 2)
    assert torch.equal(bias, torch.zeros(9)) and torch.equal(fitted, values)


def test_values_are_those_of_ridge_regression():
    torch.manual_seed(5)
    keys, values = torch.randn(20, 4), torch.randn(20, 4)
    seen = watched_of(keys, values)
    bias, fitted = kv._refit(seen, 0, keys[:7], values[:7], 0)
    a = (seen.queries[0] @ keys[:7].T + bias - seen.total[0][:, None]).exp().double()
    a /= (a.sum(1) + 1 - seen.mass[0])[:, None]
    ridge = kv.RIDGE * (a.square() / len(a)).sum(0).mean()
    stacked = torch.cat([a * len(a) ** -0.5, ridge.sqrt() * torch.eye(7, dtype=torch.float64)])
    aim = torch.cat([seen.out[0] * len(a) ** -0.5, ridge.sqrt() * values[:7]])
    want = torch.linalg.lstsq(stacked, aim.double()).solution
    torch.testing.assert_close(fitted.double(), want, atol=1e-3, rtol=1e-3)


def test_how_often_a_position_counts_is_the_least_of_squares_within_bounds():
    torch.manual_seed(6)
    a, aim = torch.rand(40, 5), torch.rand(40) * 9
    gram, right = a.T @ a, a.T @ aim
    w = kv._counts(gram, right).double()
    pull = kv.PULL * gram.diagonal().mean()
    slope = gram.double() @ w - right + pull * (w - 1)
    inside = (w > kv.FEW + 1e-6) & (w < kv.MANY - 1e-6)
    scale = right.abs().max()
    assert (slope[inside].abs() < 2e-2 * scale).all()
    assert (slope[w <= kv.FEW + 1e-6] > -1e-3 * scale).all()
    assert (slope[w >= kv.MANY - 1e-6] < 1e-3 * scale).all()


# ---- a skill


@pytest.fixture(scope="module")
def world():
    return skill_model(), chat_tokenizer()


@pytest.fixture(scope="module")
def made(world):
    return compression.compress(
        *world, DOCUMENT, tokens=120, settings=dict(train=6, dev=4, answer=6)
    )


def test_a_size_is_kept_to_the_position(world, made):
    ids = splice.token_ids(world[1], TEXT.rstrip())
    first = sum(map(len, splice.opening(world[1], [[]])))
    assert made.kind == "kv" and made.k == 120 == made.content.tokens
    assert len(made.content.places) == (120 + first) * 4
    assert made.content.length == first + len(ids)
    assert made.evidence["candidates"][0]["closure"] > 0.5


def test_fitting_does_better_than_the_same_positions_as_they_are(world, made):
    model, tokenizer = world
    first = made.content.first
    ids = splice.token_ids(tokenizer, DOCUMENT.text)
    task = kv_search.examine(model, tokenizer, DOCUMENT, ids, QUICK, 0.95, 0.9, None)
    plain = made.content
    text = [layer for layer in task.text.cache.layers]
    values, at = [], 0
    for layer, counts in zip(text, plain.counts.tolist(), strict=True):
        for h, count in enumerate(counts):
            mine = plain.places[at : at + count].long()
            values.append(kv.value_codes(layer.values[0, h, mine]))
            at += count
    numbers, steps = map(torch.cat, zip(*values, strict=True))
    none = torch.zeros_like(plain.bias)
    plain = dataclasses.replace(plain, values=numbers, value_steps=steps, bias=none)
    assert first == plain.first
    kl = [
        sum(
            kv_search.measured(task, "kv", 120, 120, front.side_by_side(model, [p]))["kl"]
            for _ in "1"
        )
        for p in (made.content, plain)
    ]
    assert kl[0] < 0.8 * kl[1]


def test_the_same_inputs_give_the_same_file(world, made, tmp_path):
    again = compression.compress(
        *world, DOCUMENT, tokens=120, settings=dict(train=6, dev=4, answer=6)
    )
    store.write(tmp_path / "a.skim", made)
    store.write(tmp_path / "b.skim", again)
    assert (tmp_path / "a.skim").read_bytes() == (tmp_path / "b.skim").read_bytes()
    read_back = store.read(tmp_path / "a.skim")
    for name in kv_file.TENSORS:
        assert torch.equal(getattr(read_back.content, name), getattr(made.content, name))
    assert (read_back.k, read_back.kind, read_back.evidence) == (120, "kv", made.evidence)


def row(method, k, *_):
    return {"method": method, "k": k, "tokens": k, "kl": 1.0, "literal_recall": 1.0}


@pytest.mark.parametrize("needed", [0, 60, 97, 10**6])
def test_the_fewest_that_pass_are_served_else_the_text(world, monkeypatch, needed):
    tried = []

    def measured(gate, method, k, *_):
        tried.append(k)
        return row(method, k) | {"closure": 0.96 if k >= needed else 0.9}

    monkeypatch.setattr(kv_search, "measured", measured)
    made = compression.compress(*world, DOCUMENT, settings=dict(train=6, dev=4, answer=6))
    sizes = kv_search.resolutions(len(DOCUMENT.text))
    good = [size for size in sizes if size >= needed]
    assert made.k == (good[0] if good else None)
    assert made.content.tokens == (good[0] if good else sizes[-1])
    assert len(tried) <= 5 and sorted(tried) == [r["k"] for r in made.evidence["candidates"]]


@pytest.mark.parametrize("usual", [0, 3, 8])
@pytest.mark.parametrize("needed", range(10))
def test_few_sizes_are_tried_and_the_smallest_that_passes_is_found(usual, needed):
    tried = []

    def attempt(size):
        tried.append(size)
        return size, row("kv", size) | {"closure": 0.96 if size >= needed else 0.9}

    fields = {field.name: None for field in dataclasses.fields(gate.Gate)}
    asked = gate.Gate(**fields | dict(target=0.95, floor=0.9, enough=0.0))
    found, passed, rows = gate.fewest(asked, range(9), attempt, usual)
    assert (found, passed) == (min(needed, 8), needed < 9)
    assert tried[0] == usual and len(tried) == len({*tried}) <= 5
    assert [r["k"] for r in rows] == sorted(tried)
    if needed in (usual, usual + 1):
        assert len(tried) <= 3 if needed == usual else len(tried) <= 4


def test_sizes_go_down_by_quarters():
    assert kv_search.resolutions(1000) == [50, 66, 88, 118, 158, 211, 281, 375, 500]
    assert kv_search.resolutions(3) == [1]


@pytest.mark.parametrize("family", ["gemma3", "falcon"])
def test_another_attention_is_refused_with_what_to_do(family):
    model, tokenizer = skill_model(family), chat_tokenizer()
    with pytest.raises(SkimError, match=f"^{family}.*--kind soft"):
        compression.compress(model, tokenizer, DOCUMENT)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(kind="magic"), "kind must be one of kv, soft, text, got 'magic'"),
        (dict(kind="kv", pin=True), "pin: of soft tokens alone"),
        (dict(tokens=10**6), "give 1 to"),
    ],
)
def test_what_cannot_be_is_refused(world, options, line):
    with pytest.raises(SkimError, match=line):
        compression.compress(*world, DOCUMENT, **options)


# ---- at work


def whole_pack(model, tokenizer, text=DOCUMENT.text):
    """Every position of a text, as it is."""
    ids = splice.token_ids(tokenizer, text)
    with torch.no_grad():
        prefix = rollout.read(model, splice.opening(tokenizer, [[ids]]))
    first = sum(map(len, splice.opening(tokenizer, [[]])))
    everything = torch.arange(prefix.length)
    return prefix, pack_of(prefix, [everything] * 2, first=first)


@pytest.mark.parametrize("static", [False, True])
def test_a_pack_goes_into_transformers_generate(world, static):
    model, tokenizer = world
    prefix, pack = whole_pack(model, tokenizer)
    ids = torch.cat([*splice.opening(tokenizer, [[splice.token_ids(tokenizer, DOCUMENT.text)]]),
                     splice.closing(tokenizer, "Where?", True)])[None]  # fmt: skip
    how = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    want = model.generate(ids, **how)
    layers = exact(prefix, [torch.arange(prefix.length)] * 2, 0.0).cache.layers
    groups = [layer.groups for layer in layers]
    cache = rollout.PrefixCache(groups, pack.length, 64 if static else None)
    with rollout.attending(model):
        got = model.generate(ids, **how, **{rollout.CACHE: cache})
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)


def test_generate_answers_behind_a_pack_and_counts_it(world):
    model, tokenizer = world
    _, pack = whole_pack(model, tokenizer)
    text = [splice.token_ids(tokenizer, DOCUMENT.text)]
    want = generate.generate(model, tokenizer, "Where?", 6, skills=[text])
    got = generate.generate(model, tokenizer, "Where?", 6, skills=[pack])
    assert got.prompt_tokens == want.prompt_tokens and got.skill_tokens == want.skill_tokens
    assert got.text == want.text and model.config._attn_implementation != "skimlm_prefix"


def test_text_behind_a_pack_is_read(world):
    model, tokenizer = world
    _, pack = whole_pack(model, tokenizer)
    more = [splice.token_ids(tokenizer, "And read this.")]
    text = [splice.token_ids(tokenizer, DOCUMENT.text)]
    want = generate.generate(model, tokenizer, "What is it?", 6, skills=[text, more])
    got = generate.generate(model, tokenizer, "What is it?", 6, skills=[more, pack])
    assert (got.text, got.prompt_tokens) == (want.text, want.prompt_tokens)


def test_packs_side_by_side_are_seen_as_they_are_alone(world):
    """A question sees both behind one beginning, each position at its place: a softmax by hand."""
    model, tokenizer = world
    texts = (TEXT.rstrip(), "Read this first.")
    packs = [whole_pack(model, tokenizer, text)[1] for text in texts]
    both = front.side_by_side(model, packs)
    first = packs[0].first
    assert both.length == max(pack.length for pack in packs)
    apart = [kv.groups(pack, model.dtype) for pack in packs]
    for layer, *alone in zip(both.cache.layers, *apart, strict=True):
        for h, group in enumerate(layer.groups):
            one, other = (groups[h] for groups in alone)
            assert torch.equal(group.keys, torch.cat([one.keys, other.keys[:, first:]], 1))
            assert torch.equal(group.values, torch.cat([one.values, other.values[:, first:]], 1))
            weight = group.bias.exp()
            assert torch.equal(weight[:, :first], torch.ones(1, first))
            torch.testing.assert_close(
                weight[:, first:], torch.full_like(weight[:, first:], 0.5**0.5)
            )


def test_one_pack_stands_as_it_is_and_others_beginnings_are_refused(world, made):
    alone = front.side_by_side(world[0], [made.content])
    for layer, groups in zip(
        alone.cache.layers, kv.groups(made.content, world[0].dtype), strict=True
    ):
        for one, other in zip(layer.groups, groups, strict=True):
            assert all(map(torch.equal, one, other))
    stranger = dataclasses.replace(made.content, first=made.content.first - 1)
    with pytest.raises(SkimError, match="different beginnings"):
        front.side_by_side(world[0], [made.content, stranger])


def test_a_pack_for_another_model_is_its_text_with_a_warning(world, made, tmp_path):
    path = tmp_path / "a.skim"
    store.write(path, made)
    other = skill_model()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    stands, warning = store.served(path, other, world[1])
    assert "made for another model: its full text is used" in warning
    assert torch.equal(stands[0], splice.token_ids(world[1], DOCUMENT.text))
    stands, warning = store.served(path, *world)
    assert warning is None and torch.equal(stands.values, made.content.values)


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        (dict(num_hidden_layers=3), "kept of 2 layers, the model has 3"),
        (dict(num_key_value_heads=4), "kept of 2 heads of 16, the model has 4 of 16"),
        (dict(head_dim=24), "kept of 2 heads of 16, the model has 2 of 24"),
    ],
)
def test_a_pack_of_other_sizes_is_refused_whatever_its_hash_says(world, made, sizes, line):
    with pytest.raises(SkimError, match=line):
        generate.generate(skill_model(**sizes), world[1], "Where?", 4, skills=[made.content])


# ---- the file


def rewritten(path, tensors=None, again=True, **facts):
    """Change a .skim; with `again` its hash is made anew."""
    with safe_open(path, framework="pt") as stream:
        held = {name: stream.get_tensor(name) for name in stream.keys()}
        old = json.loads(stream.metadata()["skim"])
    held |= tensors or {}
    if again and all(isinstance(held[name], torch.Tensor) for name in kv_file.TENSORS):
        old["kv_sha256"] = kv_file.kv_sha256(held)
    new = old | facts
    new["facts_sha256"] = store._facts_sha256(new)
    save_file(held, path, {"skim": json.dumps(new)})


def changed(pack, name, change):
    tensor = getattr(pack, name).clone()
    change(tensor)
    return {name: tensor}


def put(*place, value):
    def change(tensor):
        tensor[place] = value

    return change


def move(counts):
    """Entries of the last head to the one before."""
    counts[-1, 0] += counts[-1, 1] - 1
    counts[-1, 1] = 1


ENTRIES = ("keys", "values", "value_steps", "bias", "places")
DAMAGE = {
    "tampered": (lambda p: (changed(p, "values", put(0, 0, value=99)), dict(again=False)),
                 "have been changed"),
    "NaN": (lambda p: (changed(p, "value_steps", put(1, value=torch.nan)), {}),
            "value_steps: holds NaN"),
    "NaN keys": (lambda p: (changed(p, "key_steps", put(1, 1, 0, 2, value=torch.nan)), {}),
                 "key_steps: holds NaN"),
    "infinite": (lambda p: (changed(p, "bias", put(2, value=torch.inf)), {}), "bias: holds NaN"),
    "counts": (lambda p: (changed(p, "counts", put(0, 0, value=int(p.counts[0, 0]) + 1)), {}),
               "counts: do not add up"),
    "few": (lambda p: (changed(p, "counts", put(0, 0, value=-5)), {}), "counts: do not add up"),
    "hardly": (lambda p: (changed(p, "counts", move), {}), "counts: do not add up"),
    "order": (lambda p: (changed(p, "places", put(40, value=3)), {}), "places: must ascend"),
    "far": (lambda p: (changed(p, "places", put(int(p.counts[0, 0]) - 1, value=10**6)), {}),
            "places: must ascend"),
    "opening": (lambda p: (changed(p, "places", put(0, value=-1)), {}), "places"),
    "first": (lambda p: ({}, dict(first=p.first + 1)), "every head keeps|do not add up"),
    "length": (lambda p: ({}, dict(length=2**40)), "metadata: length"),
    "short": (lambda p: ({}, dict(length=p.first + 3)), "places: must ascend"),
    "k": (lambda p: ({}, dict(k=7)), "k 7 is not the 120"),
    "dtype": (lambda p: ({"keys": p.keys.short()}, {}), r"keys: I16 \[.*must be I8"),
    "flat": (lambda p: ({"values": p.values.flatten()}, {}), "values: I8"),
    "fewer": (lambda p: ({"bias": p.bias[:-1].clone()}, {}), "bias: F16"),
    "none": (lambda p: ({n: getattr(p, n)[:0] for n in ENTRIES}, {}), "0 entries"),
    "surplus": (lambda p: ({"more": p.bias.clone()}, {}),
                "holds bias, counts, key_steps, keys, more"),
    "soft": (lambda p: ({}, dict(kind="soft")), "format 3 has no kind 'soft'"),
    "old": (lambda p: ({}, dict(format_version=2)), "no kind 'kv': compress the skill again"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(made, tmp_path, damage):
    path = tmp_path / "a.skim"
    store.write(path, made)
    make, complaint = DAMAGE[damage]
    tensors, more = make(made.content)
    rewritten(path, tensors, **more)
    with pytest.raises(FormatError, match=complaint) as error:
        store.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_what_was_measured_cannot_be_changed_unnoticed(made, tmp_path):
    path = tmp_path / "a.skim"
    store.write(path, made)
    whole = path.read_bytes()
    there = b'closure\\": 0.'  # JSON within JSON
    assert whole.count(there) == 1
    path.write_bytes(whole.replace(there, there.replace(b"0.", b"1.")))
    with pytest.raises(FormatError, match="metadata has been changed"):
        store.read(path)


def test_no_damage_goes_unnoticed(made, tmp_path):
    """Bytes changed, cut out and put in at random: an error of one line, or the very same skill."""
    path, chance = tmp_path / "a.skim", random.Random(0)
    store.write(path, made)
    whole = path.read_bytes()
    unharmed = 0
    for _ in range(int(os.environ.get("SKIMLM_DAMAGED", "300"))):
        held = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 9])):
            at = chance.randrange(chance.choice([len(held), 8, 4000]))
            kind = chance.randrange(4)
            if kind == 0:
                held[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del held[at : at + chance.choice([1, 7, 4096])]
            elif kind == 2:
                held[at:at] = chance.randbytes(chance.choice([1, 8, 99]))
            else:
                held[at : at + 4] = chance.randbytes(4)
        path.write_bytes(held)
        try:
            found = store.read(path)
        except (FormatError, SkimError) as error:
            assert "\n" not in str(error) and str(path) in str(error)
            continue
        unharmed += 1
        assert (found.document, found.k) == (made.document, made.k)
        assert (found.evidence, found.made_for) == (made.evidence, made.made_for)
        for name in kv_file.TENSORS:
            assert torch.equal(getattr(found.content, name), getattr(made.content, name))
    assert unharmed < 60


def test_numbers_of_keys_that_are_far_from_the_others_do_not_cost_the_others():
    """As biases make them: hundreds in one number of all keys of a head, one in the rest."""
    torch.manual_seed(8)
    keys = torch.randn(40, 16)
    keys[:, 3] += 358
    codes, steps = kv.key_codes(keys)
    assert codes.dtype == torch.int8 and steps.shape == (2, 16)
    step = (keys.amax(0) - keys.amin(0)) / 254
    error = (kv.key_values(codes, steps) - keys).abs()
    assert (error <= 0.6 * step + 358 * 2**-9 * (torch.arange(16) == 3) + 1e-6).all()


def test_logits_are_not_rounded_to_bfloat16():
    """Logits of about 1,000 that differ by some: bfloat16 would have steps of 4."""
    torch.manual_seed(9)
    middle = 60 * torch.ones(16)
    query, value = torch.randn(1, 1, 3, 16) / 4 + 1, torch.randn(1, 1, 3, 16)
    key, far, given = (torch.randn(1, n, 16) / 2 for n in (3, 12, 12))
    query, value, key, far, given = (
        part.bfloat16() for part in (query, value, (key + middle)[None], far + middle, given)
    )
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    out, _ = runtime_prefix._attend(query, (key, value), Group(far, given), mask)
    keys, values = torch.cat([far[None], key], 2), torch.cat([given[None], value], 2)
    logits = query.double() @ keys.double().transpose(2, 3)
    want = logits.softmax(-1) @ values.double()
    assert logits.min() > 500 and logits.softmax(-1).max() < 0.9
    assert ((out.double() - want).abs() <= 2**-6 * values.abs().max()).all()
