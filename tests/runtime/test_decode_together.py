"""Several sequences, one token each in one native call: to the bit what each gives alone."""

import contextlib

import pytest
import torch
from test_decode import FUSED, KINDS, PROMPT, calls, close, distance, pair, prefix_of
from transformers import DynamicCache, StaticCache

from skimlm import native
from skimlm.runtime import decode, ops
from skimlm.runtime.prefix import Group, PrefixCache, attending

__all__ = ["calls", "pair"]
PROMPTS = [
    PROMPT[:, :1],
    PROMPT,
    PROMPT[:, 2:5],
    PROMPT.repeat(1, 5),
    PROMPT[:, :2],
    PROMPT.flip(1),
]


@torch.no_grad()
def begun(model, ids, layers=None):
    """A cache with `ids` in it, behind a prefix where there are `layers` of one."""
    if layers is None:
        cache = DynamicCache(config=model.config)
        model(ids, **{decode.CACHE: cache})
        return cache
    cache = PrefixCache(layers, 40)
    with attending(model):
        model(ids, **{decode.CACHE: cache})
    return cache


@torch.no_grad()
def run(model, caches, steps=4):
    """Logits [sequences, steps, vocabulary] of fixed tokens, other ones for every sequence."""
    found = []
    for step in range(steps):
        ids = [torch.tensor([30 + 7 * i + step]) for i in range(len(caches))]
        found.append(decode.together(model, ids, caches))
    return torch.stack(found, 1)


@torch.no_grad()
def one_by_one(model, prompts, steps=4, prefixes=None):
    """The same by the model's own forward."""
    out = []
    for i, ids in enumerate(prompts):
        layers = None if prefixes is None else prefixes[i]
        cache, rows = begun(model, ids, layers), []
        for step in range(steps):
            token = torch.tensor([[30 + 7 * i + step]])
            if layers is None:
                rows.append(model(token, **{decode.CACHE: cache}).logits[0, 0])
            else:
                with attending(model):
                    rows.append(model(token, **{decode.CACHE: cache}).logits[0, 0])
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_each_gets_what_it_gets_alone(pair, calls, isa, family, dtype):
    model, dense = pair(family, dtype)
    got = run(model, [begun(model, ids) for ids in PROMPTS])
    assert len(calls) == 4
    assert torch.equal(got, one_by_one(model, PROMPTS)) and len(calls) == 4 + 4 * len(PROMPTS)
    if family != "mixtral":  # a rounding sends a token to other experts
        assert close(got, one_by_one(dense, PROMPTS))


@pytest.mark.parametrize("kinds", [*([k] for k in KINDS), list(KINDS)], ids=" and ".join)
def test_linears_of_version_2_in_any_mix(pair, calls, isa, kinds):
    model, _ = pair(kinds=kinds)
    got = run(model, [begun(model, ids) for ids in PROMPTS])
    assert len(calls) == 4
    assert torch.equal(got, one_by_one(model, PROMPTS))


@pytest.mark.parametrize("widths", [[19, 3, 18, 20, 7, 17], [1, 2, 4, 5, 6, 8]], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 17])
def test_any_number_of_sequences_of_rows_of_any_width(pair, calls, isa, widths, count):
    model, _ = pair(widths=widths)
    prompts = (PROMPTS * 3)[:count]
    got = run(model, [begun(model, ids) for ids in prompts], 2)
    assert len(calls) == 2
    assert torch.equal(got, one_by_one(model, prompts, 2))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kinds", [["plain"], ["4-bit adapter", "plain", "2:4"]], ids=" and ".join)
def test_threads_do_not_change_a_bit(pair, calls, family, kinds):
    model, _ = pair(family, kinds=kinds) if family == "llama" else pair(family)
    want = run(model, [begun(model, ids) for ids in PROMPTS])
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert torch.equal(run(model, [begun(model, ids) for ids in PROMPTS]), want)
        native.library().skimlm_use_openmp(None, None)
        assert torch.equal(run(model, [begun(model, ids) for ids in PROMPTS]), want)
    finally:
        torch.set_num_threads(1)
        native.library().skimlm_use_openmp(*native._openmp())


def test_some_behind_a_prefix_and_some_not(pair, calls):
    model, _ = pair()
    prefixes = [prefix_of(model), None, prefix_of(model, 1), None, prefix_of(model, bias=False)]
    prompts = PROMPTS[: len(prefixes)]
    caches = [begun(model, ids, p) for ids, p in zip(prompts, prefixes, strict=True)]
    got = run(model, caches)
    assert len(calls) == 4
    assert torch.equal(got, one_by_one(model, prompts, prefixes=prefixes))
    other = run(model, [begun(model, ids, prefix_of(model, 2)) for ids in prompts])
    assert distance(other[0], got[0]) > 0.05  # a prefix is looked at


def test_caches_grow_past_their_room_and_sequences_come_and_go(pair, calls, monkeypatch):
    monkeypatch.setattr(decode, "ROOM", 2)
    model, _ = pair()
    want = one_by_one(model, PROMPTS[:3], 8)
    caches = [begun(model, ids) for ids in PROMPTS[:3]]
    there, found = [0, 2], [[], [], []]
    with torch.no_grad():
        for turn in range(12):
            if turn == 4:
                there = [2, 1]  # the first stops, the second begins
            ids = [torch.tensor([30 + 7 * i + len(found[i])]) for i in there]
            rows = decode.together(model, ids, [caches[i] for i in there])
            for i, row in zip(there, rows, strict=True):
                found[i].append(row)
    assert [len(rows) for rows in found] == [4, 8, 12]
    assert torch.equal(torch.stack(found[0]), want[0, :4])
    assert torch.equal(torch.stack(found[1]), want[1])
    assert torch.equal(torch.stack(found[2][:8]), want[2])
    assert caches[1].get_seq_length() == PROMPTS[1].shape[1] + 8


@torch.no_grad()
def fed(model, parts, layers=None):
    """Logits after the last of `parts`, given one after the other to an empty cache."""
    empty = DynamicCache(config=model.config) if layers is None else PrefixCache(layers, 40)
    rows = [decode.together(model, [part], [empty])[0] for part in parts]
    return rows[-1], empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("behind", [False, True], ids=["alone", "behind a prefix"])
def test_prompts_are_read_natively_however_they_are_cut(pair, calls, isa, family, dtype, behind):
    model, dense = pair(family, dtype)
    layers = prefix_of(model) if behind and family in ("llama", "qwen3", "phi3") else None
    ids = torch.arange(40) * 7 % 90 + 3
    want, cache = fed(model, ids.split(1), layers)
    for size in (40, 17, 3):
        got, other = fed(model, ids.split(size), layers)
        assert torch.equal(got, want)
        for a, b in zip(cache.layers, other.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            assert (b.is_initialized, b.keys.dtype, b.keys.shape[2]) == (True, dtype, 40)
    assert len(calls) == 40 + 1 + 3 + 14
    if family == "mixtral":  # a rounding sends a token to other experts
        return

    def body(own, layers):
        cache = begun(own, ids[None, :39], layers)
        with torch.no_grad(), attending(own) if layers else contextlib.nullcontext():
            return own(ids[None, 39:], **{decode.CACHE: cache}).logits[0, 0]

    usual = body(dense, layers)
    if dtype == torch.float32:
        assert close(want, usual) and close(want, body(model, layers))
        return
    whole = layers and [
        [Group(g.keys.float(), g.values.float(), g.bias) for g in layer] for layer in layers
    ]
    exact = body(dense.float(), whole)
    assert distance(want, exact) <= max(distance(usual, exact), 1e-2)


def test_prompts_and_single_tokens_go_together(pair, calls):
    model, _ = pair()
    going = begun(model, PROMPT)
    want = one_by_one(model, [PROMPT], 1)[0, 0]
    alone, _ = fed(model, [PROMPT[0]])
    with torch.no_grad():
        new = DynamicCache(config=model.config)
        both = decode.together(model, [torch.tensor([30]), PROMPT[0]], [going, new])
    assert torch.equal(both[0], want) and torch.equal(both[1], alone)
    assert (going.get_seq_length(), new.get_seq_length()) == (8, 7)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
         "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotations_that_look_at_the_longest_sequence(pair, calls, rope):
    model, _ = pair(rope_parameters=rope, max_position_embeddings=16)
    prompts = [PROMPT[:, :2], PROMPT.repeat(1, 5), PROMPT[:, :3]]
    got = run(model, [begun(model, ids) for ids in prompts])
    want = [run(model, [begun(model, ids)], 4) for ids in prompts]
    assert torch.equal(got[:1], want[0])  # the fixed tokens of the first
    assert len(calls) == 16


def test_heads_of_every_kind_give_each_row_what_it_gives_alone(pair, isa_or_none):
    from conftest import quantized_linears, tiny_model
    from skimlm.runtime.tables import CompressedHead, PackedHead

    torch.manual_seed(0)
    states = torch.randn(40, 64)
    q = next(iter(quantized_linears(tiny_model()).values()))
    assert q.shape[1] == 64
    heads = [PackedHead.from_quantized(q)]
    for bits in (8, 4):
        head = CompressedHead(30, 64, bits)
        head.weight.data = torch.randint(0, 127, head.weight.shape).to(head.weight.dtype)
        head.scale = torch.rand(30).bfloat16()
        heads.append(head)
    for head in heads:
        for dtype in (torch.float32, torch.bfloat16):
            x = states.to(dtype)
            want = torch.cat([head(row[None]) for row in x])
            assert torch.equal(head.alone(x), want)
    layer = heads[0].layer
    assert torch.equal(ops.matmul_alone(states[:0], layer), torch.empty(0, layer.spec.rows))


def spoil_hook(model):
    model.lm_head.register_forward_hook(lambda *a: None)


def spoil_forward(model):
    model.forward = lambda *a, **k: None


def spoil_training(model):
    model.train()


def spoil_body(model):
    decode.unfuse(model)


@pytest.mark.parametrize("spoil", [spoil_hook, spoil_forward, spoil_training, spoil_body])
def test_a_model_that_is_changed_is_left_to_its_own_code(pair, calls, spoil):
    model, _ = pair()
    caches = [begun(model, ids) for ids in PROMPTS[:2]]
    spoil(model)
    assert decode.together(model, torch.tensor([3, 4]).split(1), caches) is None and not calls
    assert [cache.get_seq_length() for cache in caches] == [1, 7]


def test_a_family_that_is_not_known_is_left_alone(pair, calls):
    model, _ = pair("gemma3")
    cache = begun(model, PROMPT)
    assert decode.together(model, [PROMPT[0, :1]], [cache]) is None and not calls


def test_what_cannot_be_done_together_is_left_alone(pair, calls):
    model, _ = pair()
    ids = torch.tensor([3, 4]).split(1)
    some = begun(model, PROMPT)
    with torch.no_grad():
        static = StaticCache(config=model.config, max_cache_len=20)
        assert decode.together(model, ids, [some, static]) is None
        assert decode.together(model, ids, [some, DynamicCache()]) is None
        assert decode.together(model, [], []) is None
        assert decode.together(model, [PROMPT[0, :0], ids[0]], [some, some]) is None
    assert decode.together(model, ids[:1], [some]) is None  # gradients are followed
    assert not calls and some.get_seq_length() == 7
