"""One token in one native call, against transformers' own forward of the de-quantized model."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from conftest import at_once, quantized_linears, tiny_model
from layer_sample import options, with_options
from skimlm import native
from skimlm.format import effective
from skimlm.models.probe import structure_of
from skimlm.models.structure import join, separate
from skimlm.models.write import save
from skimlm.runtime import decode, plan
from skimlm.runtime.prefix import Group, PrefixCache, attending

PROMPT = torch.tensor([[72, 101, 108, 108, 111, 7, 33]])
KINDS = {  # of a linear with so many columns
    "2:4": lambda c: options("2:4", c // 2),
    "2:4, grid, 4-bit adapter": lambda c: options("2:4", c // 2, 32, 5, 4),
    "bitmap, 16-bit adapter": lambda c: options("bitmap", c // 3, None, 3, 16),
    "grid": lambda c: options(group=64),
    "4-bit adapter": lambda c: options(rank=7, adapter_bits=4),
    "plain": lambda c: options(),
}
FUSED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"]


@pytest.fixture
def pair(tmp_path):
    """Makes (compressed model, dense model of the same numbers)."""

    def make(
        family="llama",
        dtype=torch.float32,
        in_scale=False,
        kinds=("plain",),
        widths=None,
        **changes,
    ):
        changes = {"sliding_window": None} | changes if family == "mistral" else changes
        dense = tiny_model(family, dtype, **changes)
        layout = structure_of(dense).layout
        separate(dense, layout)
        quantized = quantized_linears(dense, in_scale=in_scale, widths=widths)
        for i, (name, q) in enumerate(quantized.items()):
            quantized[name] = with_options(q, **KINDS[kinds[i % len(kinds)]](q.shape[1]))
        save(tmp_path / "out", dense, None, quantized, embed_bits=16, bits=3.2, layout=layout)
        for name, q in quantized.items():
            weight = dense.get_submodule(name).weight
            weight.data = effective(q).to(dtype)
        join(dense, layout, type(dense)(dense.config))
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype), dense

    return make


@pytest.fixture
def calls(monkeypatch):
    """Counts the tokens that took the native way."""
    seen, call = [], decode._call
    monkeypatch.setattr(decode, "_call", lambda *a: seen.append(1) or call(*a))
    return seen


@torch.no_grad()
def follow(model, steps=6, ids=PROMPT, cache=None, **kwargs):
    """Logits (of a body: states) of every step after the prompt, for fixed tokens."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(input_ids=ids, past_key_values=cache)
    out = []
    for step in range(steps):
        made = model(input_ids=torch.tensor([[40 + step]]), past_key_values=cache, **kwargs)
        out.append(made.logits if "logits" in made else made.last_hidden_state)
    return (torch.cat(out, 1) if out else None), cache


def distance(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


def close(got, want):
    return distance(got, want) < (3e-2 if got.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_logits_are_those_of_the_dense_model(pair, calls, isa, family, dtype):
    model, dense = pair(family, dtype)
    got, want = follow(model)[0], follow(dense)[0]
    assert len(calls) == 6
    if family == "mixtral" and dtype == torch.bfloat16:  # a rounding sends a token to other experts
        decode.unfuse(model)
        want = follow(model)[0]
        exact = follow(dense.float())[0]
        assert distance(got, exact) <= distance(want, exact)
    assert close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_trellis_rows_take_the_native_way(pair, calls, isa, family, dtype):
    model, dense = pair(family, dtype, widths=[19, 3, 18, 20, 7, 17])
    assert close(follow(model)[0], follow(dense)[0]) and len(calls) == 6


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_key_value_heads=1),
        dict(num_key_value_heads=4),
        dict(attention_bias=True, mlp_bias=True),
        dict(head_dim=24),
        dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=80),
        dict(rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
                              "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 64}),
    ],
    ids=str,
)  # fmt: skip
def test_shapes_biases_and_rotations(pair, calls, changes):
    model, dense = pair("llama", **changes)
    assert close(follow(model)[0], follow(dense)[0])
    assert calls


# seven linears or four in a block, six kinds: each kind comes to stand at every place
@pytest.mark.parametrize("kinds", [*([k] for k in KINDS), list(KINDS)], ids=" and ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_of_version_2_in_any_mix(pair, calls, isa, kinds, dtype):
    family, changes = ("phi3", {}) if kinds == ["grid"] else ("llama", dict(attention_bias=True))
    model, dense = pair(family, dtype, kinds=kinds, **changes)
    assert close(follow(model)[0], follow(dense)[0])
    assert len(calls) == 6


def test_partial_rotation(pair, calls):
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    model, dense = pair("phi3", rope_parameters=rope)
    assert close(follow(model)[0], follow(dense)[0])
    assert calls


@pytest.mark.parametrize("kinds", [["plain"], list(KINDS)], ids=["plain", "mixed"])
def test_threads_do_not_change_a_bit(pair, calls, kinds):
    whole, _ = pair(kinds=kinds)
    model = whole.model  # the head is torch's here, and its sums are split by threads
    want = follow(model)[0]
    assert len(calls) == 6
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert torch.equal(follow(model)[0], want)
        native.library().skimlm_use_openmp(None, None)
        assert torch.equal(follow(model)[0], want)
    finally:
        torch.set_num_threads(1)
        native.library().skimlm_use_openmp(*native._openmp())


@pytest.mark.parametrize("kinds", [["plain"], list(KINDS)], ids=["plain", "mixed"])
def test_several_threads_decode_at_once(pair, kinds):
    model, _ = pair(kinds=kinds)
    want, wrong = follow(model, 20)[0], []

    def call():
        for _ in range(5):
            if not torch.equal(follow(model, 20)[0], want):
                wrong.append(1)

    at_once(3, call)
    assert not wrong


def test_generate_gives_the_text_of_the_dense_model(pair, calls):
    model, dense = pair()
    how = dict(max_new_tokens=30, min_new_tokens=30, do_sample=False)
    assert torch.equal(model.generate(PROMPT, **how), dense.generate(PROMPT, **how))
    assert len(calls) == 29


# ---- the cache


def test_the_cache_is_what_transformers_would_have(pair, calls):
    model, dense = pair()
    ours, theirs = follow(model)[1], follow(dense)[1]
    assert ours.get_seq_length() == theirs.get_seq_length() == 13
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert type(a) is type(b) and a.keys.shape == b.keys.shape
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-4)


def test_it_grows_past_its_room(pair, calls, monkeypatch):
    monkeypatch.setattr(decode, "ROOM", 2)
    model, dense = pair()
    assert close(follow(model, 40)[0], follow(dense, 40)[0])
    assert len(calls) == 40


@torch.no_grad()
def test_several_tokens_in_between_and_cropping(pair, calls):
    model, dense = pair()
    out = {}
    for name, m in (("ours", model), ("theirs", dense)):
        _, cache = follow(m)
        parts = [m(torch.tensor([[1, 2, 3]]), past_key_values=cache).logits]
        parts.append(m(torch.tensor([[4]]), past_key_values=cache).logits)
        cache.crop(-4)
        parts.append(m(torch.tensor([[5]]), past_key_values=cache).logits)
        parts.append(m(torch.tensor([[6]]), past_key_values=cache).logits)
        out[name] = torch.cat(parts, 1)
    assert close(out["ours"], out["theirs"])
    assert len(calls) == 9


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copied_cache_goes_its_own_way(pair, copied):
    model, _ = pair()
    _, first = follow(model)
    second = copied(first)
    second.layers = [copied(layer) for layer in second.layers]
    for cache, token in ((first, 9), (second, 10), (first, 11), (second, 12)):
        model(torch.tensor([[token]]), past_key_values=cache)
    for cache, tokens in ((first, [9, 11]), (second, [10, 12])):
        _, alone = follow(model)
        for token in tokens:
            model(torch.tensor([[token]]), past_key_values=alone)
        for a, b in zip(cache.layers, alone.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_what_is_remembered_of_a_cache_and_a_model_goes_with_them(pair):
    model, _ = pair()
    _, cache = follow(model)
    assert cache in decode._rooms
    rooms, plan = len(decode._rooms), weakref.ref(model.model.forward.plan)
    del cache, model
    gc.collect()
    assert len(decode._rooms) < rooms and plan() is None


# ---- the model


def test_a_copied_model_points_into_its_own_weights(pair, calls):
    model, _ = pair()
    want = follow(model)[0]
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.mlp.down_proj.row_scale.zero_()
    assert not torch.equal(follow(other)[0], want)
    assert torch.equal(follow(model)[0], want)
    assert len(calls) == 18


def test_weights_that_moved_are_found_again(pair, calls):
    model, _ = pair()
    want = follow(model)[0]
    for layer in model.model.layers:
        norm = layer.input_layernorm
        norm.weight = torch.nn.Parameter(norm.weight.clone() * 2)
    got = follow(model)[0]
    assert not close(got, want) and close(got, follow(copy.deepcopy(model))[0])
    assert len(calls) == 18


def test_an_adapter_that_was_replaced_is_found_again(pair, calls):
    model, _ = pair(kinds=["2:4, grid, 4-bit adapter"])
    want = follow(model)[0]
    for layer in model.model.layers:
        layer.mlp.down_proj.lora_b = layer.mlp.down_proj.lora_b.flip(1)
    got = follow(model)[0]
    assert not close(got, want) and close(got, follow(copy.deepcopy(model))[0])
    assert len(calls) == 18


def test_an_adapter_in_training_is_used(pair, calls):
    model, _ = pair(kinds=["2:4, grid, 4-bit adapter"])
    want = follow(model)[0]
    linear = model.model.layers[1].mlp.down_proj
    a, b = linear.adapter_values()
    linear.adapter = a, -b
    assert not close(follow(model)[0], want)
    linear.adapter = a, b
    assert close(follow(model)[0], want)
    assert len(calls) == 6
    linear.adapter = None
    assert torch.equal(follow(model)[0], want)
    assert len(calls) == 12


def test_a_saved_model_names_its_own_class(pair, tmp_path):
    model, _ = pair()
    want = follow(model)[0]
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(follow(again)[0], want)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert type(model.model).__name__ == "LlamaModel"


def test_a_dequantized_model_runs_as_usual(pair, calls):
    model, dense = pair()
    assert close(follow(model.dequantize())[0], follow(dense)[0])
    assert not calls


# ---- everything else is left to transformers


@pytest.mark.parametrize("family", ["gemma3", "opt", "gpt_neox"])
def test_other_families_are_left_alone(pair, calls, family):
    model, dense = pair(family)
    assert close(follow(model, 3)[0], follow(dense, 3)[0])
    assert not calls


@pytest.mark.parametrize("change", [dict(in_scale=True), dict(hidden_act="gelu")], ids=str)
def test_scaled_linears_and_other_activations(pair, calls, change):
    model, dense = pair("llama", **change)
    assert close(follow(model, 3)[0], follow(dense, 3)[0])
    assert not calls


def test_sliding_windows(pair, calls):
    model, dense = pair("mistral", sliding_window=5)
    assert close(follow(model)[0], follow(dense)[0])
    assert not calls


def test_rows_in_a_code_that_native_code_does_not_know(pair, calls, monkeypatch):
    monkeypatch.setattr(plan, "KNOWN_ROW_CODES", {"table", "grid"})
    model, dense = pair()
    assert close(follow(model)[0], follow(dense)[0])
    assert not calls


def test_another_cache(pair, calls):
    model, dense = pair()
    caches = [StaticCache(config=m.config, max_cache_len=32) for m in (model, dense)]
    got, want = (follow(m, cache=c)[0] for m, c in zip((model, dense), caches, strict=True))
    assert close(got, want)
    assert not calls


def test_hidden_states_and_attention_weights_come_when_asked_for(pair, calls):
    model, dense = pair(attn_implementation="eager")
    with torch.no_grad():
        outputs = []
        for m in (model, dense):
            m.set_attn_implementation("eager")
            _, cache = follow(m, 1)
            outputs.append(
                m(
                    torch.tensor([[7]]),
                    past_key_values=cache,
                    output_hidden_states=True,
                    output_attentions=True,
                )
            )
    before = len(calls)
    assert len(outputs[0].hidden_states) == 3 and len(outputs[0].attentions) == 2
    for a, b in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        assert close(a, b)
    assert before == 1  # the step of `follow`


@pytest.mark.parametrize("where", ["layers.0", "layers.1.mlp", "layers.0.self_attn.q_proj", "norm"])
def test_hooks_are_called(pair, calls, where):
    model, _ = pair()
    seen = []
    module = model.model.get_submodule(where)
    handle = module.register_forward_hook(lambda *a: seen.append(1))
    follow(model, 2)
    assert len(seen) == 3 and not calls
    handle.remove()
    follow(model, 2)
    assert len(calls) == 2


@torch.no_grad()
def test_padding_and_batches(pair, calls):
    model, dense = pair()
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for batch in (slice(0, 2), slice(0, 1)):
        want = dense.generate(ids[batch], attention_mask=mask[batch], **how)
        assert torch.equal(model.generate(ids[batch], attention_mask=mask[batch], **how), want)
    assert not calls


def test_gradients(pair, calls):
    model, _ = pair()
    _, cache = follow(model, 0)
    embeds = torch.randn(1, 1, 64, requires_grad=True)
    model(inputs_embeds=embeds, past_key_values=cache).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0 and not calls


@torch.no_grad()
def test_embeddings_in_place_of_a_token(pair, calls):
    model, dense = pair()
    embeds = torch.randn(1, 1, 64)
    got, want = (
        m(inputs_embeds=embeds, past_key_values=follow(m, 0)[1]).logits for m in (model, dense)
    )
    assert close(got, want)
    assert len(calls) == 1


def test_buffers_that_do_not_fit_are_an_error_not_a_crash(pair):
    model, _ = pair()
    _, cache = follow(model, 0)
    model.model.layers[1].mlp.up_proj.codebook = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(ValueError, match="codebook|positions|row_scale|lora_"), torch.no_grad():
        model(torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("positions", torch.zeros(3, dtype=torch.uint8)),
        ("row_scale", torch.zeros(3, dtype=torch.bfloat16)),
        ("lora_b", torch.zeros(5, 3, dtype=torch.uint8)),
        ("lora_a_scale", torch.zeros(5, 3)),
    ],
)
def test_parts_that_do_not_fit_are_an_error_not_a_crash(pair, name, wrong):
    model, _ = pair(kinds=["2:4, grid, 4-bit adapter"])
    _, cache = follow(model, 0)
    setattr(model.model.layers[1].mlp.up_proj, name, wrong)
    with pytest.raises(ValueError, match="codebook|positions|row_scale|lora_"), torch.no_grad():
        model(torch.tensor([[7]]), past_key_values=cache)


# ---- experts


@pytest.mark.parametrize(
    "changes",
    [dict(norm_topk_prob=False), dict(mlp_only_layers=[]), dict(num_experts_per_tok=8)],
    ids=str,
)
def test_experts_of_other_counts_and_shares(pair, calls, isa, changes):
    model, dense = pair("qwen3_moe", **changes)
    assert close(follow(model)[0], follow(dense)[0])
    assert len(calls) == 6


def test_threads_do_not_change_a_bit_of_experts(pair, calls):
    whole, _ = pair("qwen3_moe")
    model = whole.model
    want = follow(model)[0]
    assert len(calls) == 6
    try:
        torch.set_num_threads(3)
        for _ in range(5):
            assert torch.equal(follow(model)[0], want)
    finally:
        torch.set_num_threads(1)


def test_sparse_experts_are_left_to_transformers(pair, calls):
    model, dense = pair("mixtral", kinds=["2:4"])
    assert close(follow(model)[0], follow(dense)[0])
    assert not calls


def test_what_is_asked_of_the_router_is_given(pair, calls):
    model, _ = pair("mixtral")
    follow(model, 1)
    assert calls
    calls.clear()
    with torch.no_grad():
        made = model(PROMPT, output_router_logits=True)
        one = model(PROMPT[:, :1], past_key_values=made.past_key_values, output_router_logits=True)
    assert len(one.router_logits) == 2 and not calls


def test_experts_that_are_changed_are_seen(pair, calls):
    model, _ = pair("mixtral")
    want = follow(model)[0]
    assert len(calls) == 6
    experts = model.model.layers[1].mlp.experts
    seen = []
    for expert in experts.gate_up_proj._modules.values():
        expert.register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    assert close(follow(model)[0], want) and not calls and seen
    for expert in experts.gate_up_proj._modules.values():
        expert._forward_hooks.clear()
    follow(model)
    assert len(calls) == 6
    mine = []

    def forward(self, x, index, weights):
        mine.append(1)
        return torch.zeros_like(x)

    ALL_EXPERTS_FUNCTIONS.register("mine", forward)
    try:
        model.config._experts_implementation = "mine"
        calls.clear()
        follow(model)
        assert mine and not calls
        model.config._experts_implementation = "skimlm"
        assert close(follow(model)[0], want) and len(calls) == 6
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["mine"]
    for block in model.model.layers:
        block.mlp.gate.top_k = 1
    got = follow(model)[0]
    decode.unfuse(model)
    assert len(calls) == 12 and close(got, follow(model)[0]) and not close(got, want)


def test_a_config_that_asks_for_the_router_is_heeded(pair, calls):
    model, _ = pair("mixtral")
    model.config.output_router_logits = True
    follow(model, 1)
    assert not calls


# ---- behind a prefix


def prefix_of(model, seed=0, bias=True, dtype=None):
    """Keys and values for every head, each its own number of them."""
    torch.manual_seed(seed)
    config, dtype = model.config, dtype or model.dtype
    size = model.model.layers[0].self_attn.head_dim
    made = []
    for i in range(config.num_hidden_layers):
        groups = []
        for h in range(config.num_key_value_heads):
            n = 3 + 5 * h + i
            keys, values = torch.randn(2, 1, n, size).to(dtype)
            groups.append(Group(keys, values, torch.randn(1, n) if bias else None))
        made.append(groups)
    return made


@torch.no_grad()
def follow_behind(model, layers, length=40, steps=6):
    cache = PrefixCache(layers, length)
    out = []
    with attending(model):
        model(PROMPT, **{decode.CACHE: cache})
        for step in range(steps):
            out.append(model(torch.tensor([[40 + step]]), **{decode.CACHE: cache}).logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_tokens_behind_a_prefix_take_the_native_way(pair, calls, isa, family, dtype):
    model, dense = pair(family, dtype)
    layers = prefix_of(model)
    got, cache = follow_behind(model, layers)
    assert len(calls) == 6
    want, other = follow_behind(dense, layers)
    assert close(got, want) and cache.get_seq_length() == other.get_seq_length() == 53
    bare = follow_behind(model, prefix_of(model, 1))[0]
    assert distance(bare, got) > 0.05  # it is looked at


def test_one_group_of_all_heads_and_no_bias_is_the_same(pair, calls):
    model, dense = pair()
    layers = [[Group(torch.randn(2, 9, 16), torch.randn(2, 9, 16))] for _ in range(2)]
    assert close(follow_behind(model, layers)[0], follow_behind(dense, layers)[0])
    assert len(calls) == 6


def test_a_prefix_that_does_not_fit_takes_transformers_own_way(pair, calls):
    model, dense = pair()
    layers = prefix_of(model)
    apart = [[Group(g.keys.mT.contiguous().mT, g.values, g.bias) for g in n] for n in layers]
    assert not apart[0][0].keys.is_contiguous()
    assert close(follow_behind(model, apart)[0], follow_behind(dense, layers)[0]) and not calls


def test_a_prefix_that_is_replaced_is_looked_at_again(pair, calls):
    model, dense = pair()
    one, other = prefix_of(model), prefix_of(model, 1)
    got = []
    for body in (model, dense):
        _, cache = follow_behind(body, one, steps=3)
        for layer, groups in zip(cache.layers, other, strict=True):
            layer.groups = groups
        with torch.no_grad(), attending(body):
            got.append(body(torch.tensor([[70]]), **{decode.CACHE: cache}).logits)
    assert close(*got) and len(calls) == 4
