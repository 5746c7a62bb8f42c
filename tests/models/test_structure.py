"""Matrices that families keep in other ways: found by a run without numbers, taken apart, put back.

The oracle is transformers' own model: apart or together, the logits are the same.
"""

import copy
import inspect

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F

from conftest import CONFIGS, GATED, random_quantized, tiny_model
from skimlm.models.blocks import decoder_linears
from skimlm.models.coverage import coverage
from skimlm.models.probe import structure_of
from skimlm.models.source import BlockSource
from skimlm.models.structure import join, separate, stacks
from skimlm.runtime import experts
from skimlm.runtime.experts import Matrix, Stack
from skimlm.runtime.linear import CompressedLinear

# parameter -> is it transposed, in one block
KEPT = {
    "mixtral": {"mlp.experts.gate_up_proj": False, "mlp.experts.down_proj": False},
    "gpt_oss": {"mlp.experts.gate_up_proj": True, "mlp.experts.down_proj": True},
    "llama4": {"feed_forward.experts.gate_up_proj": True, "feed_forward.experts.down_proj": True},
    "jetmoe": {
        "self_attention.experts.input_linear.weight": False,
        "self_attention.experts.output_linear.weight": False,
        "mlp.input_linear.weight": False,
        "mlp.output_linear.weight": False,
    },
    "gpt2": {f"{n}.weight": True for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    "falcon": {
        f"{n}.weight": False
        for n in (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    },
    "llama": {},
}
IDS = torch.arange(24)[None]


def eager(model):
    """Experts as the family's own code runs them: how they are added up changes roundings."""
    if any(hasattr(m, "has_gate") for m in model.modules()):
        model.config._experts_implementation = "eager"
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shell(model):
    with init_empty_weights(include_buffers=False):
        return type(model)(copy.deepcopy(model.config))


@pytest.mark.parametrize("family", KEPT)
def test_what_is_kept_otherwise_is_found_without_numbers(family):
    model = tiny_model(family)
    empty = shell(model)
    before = {name: id(p) for name, p in empty.named_parameters()}
    found = structure_of(empty)
    assert not found.failed and not found.by_hand
    blocks = {name.split(".", 3)[3] for name in found.layout if ".1." in name}
    assert {n: found.layout[name] for name in found.layout for n in blocks if name.endswith(n)} == {
        n: KEPT[family][n] for n in blocks
    }
    assert blocks == KEPT[family].keys()
    # and it is left as it was
    assert {name: id(p) for name, p in empty.named_parameters()} == before
    assert not any("forward" in vars(module) for module in empty.modules())


@pytest.mark.parametrize("family", KEPT)
def test_taken_apart_a_model_computes_what_it_did(family):
    model = eager(tiny_model(family))
    want, layout = logits(model), structure_of(shell(model)).layout
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    origins = separate(model, layout)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)

    linears = decoder_linears(model)
    assert {f"{n}.weight" for n in linears} >= origins.keys()
    for name, origin in origins.items():
        assert torch.equal(model.get_parameter(name), origin.take(state[origin.name])), name

    join(model, layout, shell(model))
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("family", KEPT)
def test_without_numbers_it_comes_apart_alike(family):
    model = tiny_model(family)
    empty, layout = shell(model), structure_of(shell(model)).layout
    assert separate(empty, layout) == separate(model, layout)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes


def test_a_router_stays_as_it_is():
    model = tiny_model("jetmoe")
    found = structure_of(shell(model))
    assert {n.split(".", 3)[3] for n in found.routers} == {
        "self_attention.experts.router.layer",
        "mlp.router.layer",
    }
    separate(model, found.layout)
    chosen = decoder_linears(model, dense=found.dense)
    assert not any("router" in name for name in chosen)
    assert {len(names) for names in stacks(model, chosen)} == {4}


def test_a_weight_that_its_parent_multiplies_is_noted():
    class Mine(nn.Linear):
        """A linear in another way."""

        def forward(self, x):
            return x @ self.weight.T

    class Scaled(nn.Linear):
        """No linear."""

        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.up_proj.__class__ = Mine
    second.up_proj.__class__ = Scaled
    kept = second.down_proj

    def by_hand(x):
        return F.linear(second.act_fn(second.gate_proj(x)) * second.up_proj(x), kept.weight)

    second.forward = by_hand
    found = structure_of(model)
    assert found.layout == {"model.layers.0.mlp.up_proj.weight": False}
    assert found.by_hand == {"model.layers.1.mlp.down_proj"}


def test_a_run_that_fails_says_why():
    model = tiny_model()
    model.model.layers[1].forward = lambda *_, **__: 1 / 0
    found = structure_of(model)
    assert found.failed == "division by zero" and not found.layout


def test_tables_whose_dtype_is_cast_to_stay_as_they_are():
    model = tiny_model()
    assert not structure_of(model).tables
    usual = model.model.forward

    def cast(*args, **kwargs):
        out = usual(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state.to(model.lm_head.weight.dtype)
        return out

    model.model.forward = cast
    assert structure_of(model).tables == "lm_head is looked at by other code"


def test_a_linear_that_is_written_into_stays_dense():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    usual = mlp.forward

    def halved(x):
        mlp.down_proj.weight.div_(2)
        return usual(x)

    mlp.forward = halved
    before = mlp.down_proj.weight.detach().clone()
    assert structure_of(model).by_hand == {"model.layers.0.mlp.down_proj"}
    assert torch.equal(mlp.down_proj.weight, before)


def test_blocks_that_need_each_other_are_known():
    model = tiny_model()
    first, second = model.model.layers
    usual, later, kept = first.forward, second.forward, []
    model.model.embed_tokens.register_forward_hook(lambda *_: kept.clear())

    def gives(*args, **kwargs):
        kept.append(1)
        return usual(*args, **kwargs)

    def takes(*args, **kwargs):
        kept.pop()
        return later(*args, **kwargs)

    first.forward, second.forward = gives, takes
    found = structure_of(model)
    assert not found.failed and found.joined == "model.layers.1: pop from empty list"
    assert structure_of(tiny_model()).returns == {"model.layers.0": 0, "model.layers.1": 0}


@pytest.mark.parametrize("way", ["no gradient", "detached", "an index"])
def test_a_linear_that_only_chooses_stays_as_it_is(way):
    model = tiny_model()
    mlp, attention = model.model.layers[1].mlp, model.model.layers[0].self_attn
    mlp.index = nn.Linear(64, 5, bias=False)
    usual = mlp.forward

    def forward(x):
        if way == "no gradient":
            with torch.no_grad():
                scores = mlp.index(x)
        else:
            scores = mlp.index(x)
        if way == "an index":
            return usual(x) * (1 + scores.argmax(-1, keepdim=True))
        return usual(x) * scores.detach().mean(-1, keepdim=True)

    mlp.forward = forward
    found = structure_of(model)
    assert found.dense == found.routers == {"model.layers.1.mlp.index"}
    assert f"model.layers.0.self_attn.{next(iter(attention._modules))}" not in found.dense
    names = {name for name in decoder_linears(model, dense=found.dense)}
    assert names == decoder_linears(tiny_model()).keys()


def test_a_block_that_text_does_not_reach_stays_as_it_is():
    model = tiny_model(num_hidden_layers=3)
    body, usual = model.model, type(model.model).forward

    def forward(*args, **kwargs):  # as a family's does that looks at an image there
        every, body.layers = body.layers, nn.ModuleList([body.layers[0], body.layers[2]])
        try:
            return usual(body, *args, **kwargs)
        finally:
            body.layers = every

    body.forward = forward
    found = structure_of(model)
    assert found.unreached == {n for n in decoder_linears(model) if ".layers.1." in n}
    assert not found.joined and len(found.unreached) == 7
    whole = coverage(model, decoder_linears(model, dense=found.dense), [], found, 8)
    assert {why for _, why in whole.dense.values()} == {"is not reached by text"}
    source, state = BlockSource(model, None, found), None
    with torch.no_grad():
        for i in range(3):
            state, final = source.run(range(i, i + 1), IDS, state)
        assert torch.equal(final, body(input_ids=IDS, use_cache=False).last_hidden_state)


# ---- experts


@pytest.fixture(params=[False, True], ids=["rows", "transposed"])
def stack(request):
    torch.manual_seed(0)
    return Stack([nn.Linear(4, 6, bias=False) for _ in range(3)], request.param)


def test_a_stack_is_what_it_stands_for(stack):
    whole = stack.dense(torch.float32)
    assert stack.shape == whole.shape == torch.Size([3, 4, 6] if stack.transposed else [3, 6, 4])
    assert (len(stack), stack.size(1), stack.dtype) == (3, whole.shape[1], whole.dtype)
    for index in (0, torch.tensor(2), -1):
        assert isinstance(stack[index], Matrix)
        assert torch.equal(stack[index].dense(torch.float32), whole[int(index)])
        assert stack[index].shape == whole[int(index)].shape


def test_products_run_the_linear_of_the_expert(stack):
    ran = []
    for i, linear in enumerate(stack.children()):
        linear.register_forward_hook(lambda *_, i=i: ran.append(i))
    x, bias, whole = torch.randn(5, 4), torch.randn(6), stack.dense(torch.float32)
    if stack.transposed:
        pairs = [(x @ stack[1], x @ whole[1]), (torch.matmul(x, stack[1]), x @ whole[1])]
        pairs += [(F.linear(x, stack[1].T), x @ whole[1])]
        many = torch.randn(3, 5, 4)
        got, expected = torch.bmm(many, stack), torch.bmm(many, whole)
        torch.testing.assert_close(got, expected)
        assert ran == [1, 1, 1, 0, 1, 2]
    else:
        pairs = [(F.linear(x, stack[1]), F.linear(x, whole[1]))]
        pairs += [(F.linear(x, stack[1], bias), F.linear(x, whole[1], bias))]
        pairs += [(x @ stack[1].T, x @ whole[1].T), (x @ stack[1].t(), x @ whole[1].T)]
        assert ran == [1, 1, 1, 1]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)


def test_other_functions_get_the_numbers(stack):
    whole = stack.dense(torch.float32)
    assert torch.equal(torch.sum(stack), whole.sum())
    assert torch.equal(torch.square(stack[2]), whole[2].square())
    other = torch.randn(2, whole.shape[1])
    torch.testing.assert_close(other @ stack[0], other @ whole[0])


def test_every_family_here_is_in_the_table():
    assert KEPT.keys() <= CONFIGS.keys()


# ---- one token


def compressed(family, **changes):
    """A model whose experts are compressed, all else as it is."""
    model = tiny_model(family, dtype=torch.bfloat16, **changes)
    layout = structure_of(model).layout
    separate(model, {n: t for n, t in layout.items() if model.get_parameter(n).ndim == 3})
    for name, module in list(model.named_modules()):
        if isinstance(module, Stack):
            for i, linear in enumerate(module._modules.values()):
                q = random_quantized(*linear.weight.shape, seed=i)
                model.set_submodule(f"{name}.{i}", CompressedLinear.from_quantized(q))
    return model.eval()


def experts_of(model):
    return [m for m in model.modules() if hasattr(m, "has_gate")]


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16
)
GROUPED = dict(n_group=1, topk_group=1, n_routed_experts=4, first_k_dense_replace=0)
MIXTURES = {
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),  # experts in every block
    "olmoe": ("OlmoeConfig", EXPERTS),
    "glm4_moe": ("Glm4MoeConfig", EXPERTS | GROUPED),
    "deepseek_v3": ("DeepseekV3Config", EXPERTS | GROUPED | LATENT),
    "granitemoehybrid": ("GraniteMoeHybridConfig", EXPERTS | dict(layer_types=["attention"] * 2)),
}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", *MIXTURES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_token_gives_what_the_family_s_own_code_gives(family, dtype, monkeypatch):
    if family in MIXTURES:
        name, options = MIXTURES[family]
        monkeypatch.setitem(CONFIGS, family, (name, GATED | options))
    model = compressed(family).to(dtype)
    taken = []
    usual = experts.one_token
    monkeypatch.setattr(experts, "one_token", lambda *a: taken.append(1) or usual(*a))
    token = IDS[:, :1]
    with torch.inference_mode():
        model(input_ids=token)  # compared with the family's own code
        got = model(input_ids=token).logits
        for module in experts_of(model):
            module.config._experts_implementation = "eager"
        want = model(input_ids=token).logits
    assert len(taken) == 2 * len(experts_of(model)) > 0
    assert torch.equal(got, want)


def test_one_token_takes_the_usual_way_where_anything_differs(monkeypatch):
    model = compressed("mixtral")
    token = IDS[:, :1]
    with torch.inference_mode():
        want = [model(input_ids=token).logits for _ in range(2)][1]
    monkeypatch.setattr(experts, "one_token", lambda *a: pytest.fail("not the usual way"))
    own = experts_of(model)[0].gate_up_proj

    def same():
        with torch.inference_mode():
            return torch.equal(model(input_ids=token).logits, want)

    seen = []
    for expert in own._modules.values():
        expert.register_forward_hook(lambda *_: seen.append(1))
    for module in experts_of(model)[1:]:
        module._is_expert_parallel = True
    assert same() and len(seen) == 2
    for expert in own._modules.values():
        expert._forward_hooks.clear()
        expert.forward = expert.forward
    assert same()
    for expert in own._modules.values():
        del expert.forward
        expert.train()
    assert same()
    for expert in own._modules.values():
        expert.eval()
    with torch.inference_mode(), pytest.raises(pytest.fail.Exception):
        model(input_ids=token)
    x = torch.randn(1, 64, dtype=torch.bfloat16, requires_grad=True)
    index, weights = torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bfloat16)
    experts_of(model)[0](x, index, weights).sum().backward()
    assert x.grad is not None


def test_a_family_that_does_more_than_its_interface_says_keeps_its_own_way():
    model = compressed("mixtral")
    module = experts_of(model)[0]
    module.act_fn = nn.Tanh()
    module._apply_gate = lambda x: x.chunk(2, dim=-1)[1]  # not what its forward does
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    index, weights = torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bfloat16)
    want = inspect.unwrap(type(module).forward)(module, x, index, weights)
    for _ in range(3):
        assert torch.equal(module(x, index, weights), want)
