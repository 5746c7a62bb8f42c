"""Whatever is done to a model, its fused body makes of a token what the ordinary body does."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from test_decode import close, pair  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama import modeling_llama as llama

from skimlm.runtime import decode
from skimlm.runtime.decode import OneToken, unfuse

PROMPT = torch.tensor([[72, 101, 108, 108, 111, 7, 33]])


def ordinary(model):
    """A copy that runs as transformers made it."""
    other = copy.deepcopy(model)
    unfuse(other)
    assert "forward" not in other.model.__dict__
    return other


@torch.no_grad()
def tokens(model, change=None, cache=None, steps=3, **given):
    """Logits of tokens behind a prompt; `change` is made to the model after the first of them."""
    cache = DynamicCache() if cache is None else cache
    model(PROMPT, past_key_values=cache)
    out = []
    for step in range(steps):
        if step == 1 and change is not None:
            change(model)
        out.append(model(torch.tensor([[40 + step]]), past_key_values=cache, **given).logits)
    return torch.cat(out, 1)


def scaled(module):
    """Replace a module's forward."""
    old = module.forward
    module.forward = lambda *args, **kwargs: shrink(old(*args, **kwargs))


def shrink(y):
    if y is None or isinstance(y, torch.Tensor):
        return y if y is None else y * 0.5
    if isinstance(y, tuple):
        return tuple(map(shrink, y))
    y.last_hidden_state = y.last_hidden_state * 0.5
    return y


def after(module):
    module.register_forward_hook(lambda m, given, y: shrink(y))


def after_with_kwargs(module):
    module.register_forward_hook(lambda m, args, kwargs, y: shrink(y), with_kwargs=True)


def before(module):
    def hook(m, args, kwargs):
        for name in ("hidden_states", "inputs_embeds"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs = kwargs | {name: kwargs[name] * 0.5}
        floats = (isinstance(a, torch.Tensor) and a.is_floating_point() for a in args)
        return tuple(a * 0.5 if f else a for a, f in zip(args, floats, strict=True)), kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)


def replaced(name):
    def change(module):
        setattr(module, name, getattr(module, name).clone().zero_())

    return change


def storage(name):
    def change(module):
        getattr(module, name).data = getattr(module, name).data * 0

    return change


def in_place(name):
    def change(module):
        getattr(module, name).data.mul_(0)

    return change


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class OtherNorm(llama.LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 2


class OtherSilu(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def at(where, change):
    return lambda model: change(model.get_submodule(where))


def layers(change):
    def apply(model):
        body = model.model
        body.layers = change(body.layers)
        model.config.num_hidden_layers = len(body.layers)

    return apply


BLOCK = "model.layers.0"
PLACES = [
    *("model", "model.norm", "model.rotary_emb", "model.embed_tokens", BLOCK, f"{BLOCK}.mlp"),
    *(f"{BLOCK}.self_attn", f"{BLOCK}.mlp.act_fn", f"{BLOCK}.self_attn.q_proj"),
    *(f"{BLOCK}.mlp.down_proj", f"{BLOCK}.input_layernorm"),
]
CHANGES = {
    f"{name} {where}": at(where, change)
    for name, change in {
        "forward of": scaled,
        "hook on": after,
        "hook with kwargs on": after_with_kwargs,
        "hook before": before,
    }.items()
    for where in PLACES
}
DOWN, NORM = f"{BLOCK}.mlp.down_proj", f"{BLOCK}.post_attention_layernorm"
CHANGES |= {
    f"{how.__name__} {name}": at(DOWN, how(name))
    for how in (replaced, storage, in_place)
    for name in ("weight", "codebook", "row_scale", "bias")
    if (how, name) != (replaced, "bias")
}
CHANGES |= {
    "storage of a norm": at(NORM, storage("weight")),
    "values of a norm": at(NORM, in_place("weight")),
    "weight of a norm": at(NORM, lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2))),
    "bias": at(DOWN, lambda m: setattr(m, "bias", nn.Parameter(m.bias * 2))),
    "no bias": at(DOWN, lambda m: setattr(m, "bias", None)),
    "parametrization": at(
        NORM, lambda m: parametrize.register_parametrization(m, "weight", Doubled())
    ),
    "class of a norm": at(NORM, lambda m: setattr(m, "__class__", OtherNorm)),
    "norm": at(BLOCK, lambda m: setattr(m, "input_layernorm", nn.Identity())),
    "activation": at(f"{BLOCK}.mlp", lambda m: setattr(m, "act_fn", OtherSilu())),
    "linear": at(f"{BLOCK}.mlp", lambda m: setattr(m, "up_proj", m.up_proj.dense(torch.float32))),
    "linear by its private name": at(
        f"{BLOCK}.mlp", lambda m: m._modules.update(up_proj=m.up_proj.dense(torch.float32))
    ),
    "dequantized": lambda model: model.dequantize(),
    "first layer only": layers(lambda all: all[:1]),
    "a layer twice": lambda model: model.model.layers.__setitem__(1, model.model.layers[0]),
    "layers deleted": lambda model: model.model.layers.__delitem__(1),
}
MISSED_BETWEEN_TOKENS = {"class of a norm"}  # said in `Plan.may_hold`


@pytest.fixture
def model(pair):  # noqa: F811
    return pair(attention_bias=True, mlp_bias=True)[0]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_decodes_as_the_ordinary_one(model, change):
    plain = ordinary(model)
    tokens(model)
    change(model), change(plain)
    assert close(tokens(model), tokens(plain))


@pytest.mark.parametrize("name", [n for n in CHANGES if n not in MISSED_BETWEEN_TOKENS])
def test_a_change_between_two_tokens_acts_on_the_next(model, name):
    plain = ordinary(model)
    assert close(tokens(model, CHANGES[name]), tokens(plain, CHANGES[name]))


@pytest.mark.parametrize(
    "owner, name",
    [
        (llama.LlamaMLP, "forward"),
        (llama.LlamaAttention, "forward"),
        (llama.LlamaDecoderLayer, "forward"),
        (llama.LlamaDecoderLayer, "__call__"),
        (llama.LlamaRMSNorm, "forward"),
        (llama.LlamaModel, "forward"),
        (llama, "apply_rotary_pos_emb"),
        (torch.nn.functional, "scaled_dot_product_attention"),
        (torch.nn.functional, "silu"),
        (llama.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "functions"),
)
@pytest.mark.parametrize("when", ["before the first", "afterwards", "between tokens"])
def test_code_that_was_replaced_acts(model, monkeypatch, owner, name, when):
    plain = ordinary(model)

    def patch(_=None):
        old = owner[name] if isinstance(owner, dict) else getattr(owner, name)

        def new(*args, **kwargs):
            out = old(*args, **kwargs)
            if isinstance(out, tuple):  # attention's weights, that nobody reads, stay
                return (shrink(out[0]), out[1])
            return shrink(out)

        set_ = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
        set_(owner, name, new)

    if when == "between tokens":
        got = tokens(model, patch)
        monkeypatch.undo()
        assert close(got, tokens(plain, patch))
        return
    if when == "afterwards":
        tokens(model)
    patch()
    assert close(tokens(model), tokens(plain))


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook"])
def test_hooks_on_all_modules_are_called(model, register):
    plain = ordinary(model)
    tokens(model)
    seen = []

    def hook(module, *args):
        seen.append(type(module).__name__)

    handle = getattr(nn.modules.module, f"register_module_{register}")(hook)
    try:
        tokens(model)
        here, seen[:] = list(seen), []
        tokens(plain)
    finally:
        handle.remove()
    assert here == seen and "LlamaMLP" in seen


def test_a_backward_hook_is_left_to_torch(model):
    plain = ordinary(model)
    model.model.layers[0].mlp.register_full_backward_hook(lambda *a: None)
    assert close(tokens(model), tokens(plain))


# ---- caches


def filled(heads=2, dtype=torch.float32, size=16, batch=1, length=7, layers=2):
    cache = DynamicCache()
    g = torch.Generator().manual_seed(0)
    for i in range(layers):
        keys, values = torch.randn(2, batch, heads, length, size, generator=g).to(dtype)
        cache.update(keys, values, i)
    return cache


@torch.no_grad()
def outcome(model, cache, **given):
    """Logits of one token behind a cache, or the kind of error."""
    try:
        return model(torch.tensor([[5]]), past_key_values=cache, **given).logits
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(heads=1),
        dict(heads=4),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.float64),
        dict(size=8),
        dict(size=32),
        dict(batch=2),
        dict(layers=1),
        dict(layers=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_of_any_kind_gives_what_it_gives_the_ordinary_model(pair, dtype, change):  # noqa: F811
    model = pair(dtype=dtype)[0]
    plain = ordinary(model)
    tokens(model)
    got, want = outcome(model, filled(**change)), outcome(plain, filled(**change))
    assert got is want if isinstance(want, type) else close(got, want)


def longer(cache):
    layer = cache.layers[1]
    layer.keys = torch.cat([layer.keys, layer.keys], 2)
    layer.values = torch.cat([layer.values, layer.values], 2)


def shorter_values(cache):
    cache.layers[0].values = cache.layers[0].values[:, :, :-1]


def patched(cache):
    update = cache.update
    cache.update = lambda k, v, *a, **kw: update(k, 0 * v, *a, **kw)


def patched_layer(cache):
    update = cache.layers[1].update
    cache.layers[1].update = lambda k, v, *a, **kw: update(k, 0 * v, *a, **kw)


def strided(cache):
    for layer in cache.layers:
        layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("change", [longer, shorter_values, patched, patched_layer, strided])
def test_a_cache_that_was_tampered_with(model, change):
    plain, results = ordinary(model), []
    tokens(model)
    for m in (model, plain):
        cache = filled()
        change(cache)
        results.append(outcome(m, cache))
    got, want = results
    assert got is want if isinstance(want, type) else close(got, want)


@torch.no_grad()
def test_tensors_taken_from_a_cache_do_not_change_when_it_goes_on_from_an_earlier_point(model):
    cache = filled()
    for token in (1, 2, 3):
        model(torch.tensor([[token]]), past_key_values=cache)
    held = cache.layers[0].keys
    copied = held.clone()
    cache.crop(-3)
    model(torch.tensor([[9]]), past_key_values=cache)
    assert torch.equal(held, copied)


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2"])
@pytest.mark.parametrize("window", [4, 8, 9, 10])
def test_a_window_hides_what_is_behind_it_in_a_plain_cache(pair, family, window):  # noqa: F811
    more = dict(use_sliding_window=True, max_window_layers=1) if family == "qwen2" else {}
    model = pair(family, sliding_window=window, **more)[0]
    assert close(tokens(model), tokens(ordinary(model)))


# ---- what comes with a token


@pytest.mark.parametrize(
    "given",
    [
        dict(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])),
        dict(attention_mask=torch.ones(1, 8)),
        dict(attention_mask=torch.ones(1, 1, 1, 8, dtype=torch.bool).tril(3)),
        dict(attention_mask=torch.full((1, 1, 1, 8), -1.0)),
        dict(position_ids=torch.tensor([[3]])),
        dict(use_cache=False),
        dict(output_attentions=True),
        dict(output_hidden_states=True),
        dict(return_dict=False),
        dict(is_causal=False),
    ],
    ids=str,
)
def test_whatever_comes_with_a_token_acts(model, given):
    plain = ordinary(model)
    for m in (model, plain):
        m.set_attn_implementation("eager")
    tokens(model)
    with torch.no_grad():
        got, want = (
            m(torch.tensor([[5]]), past_key_values=filled(), **given) for m in (model, plain)
        )
    assert type(got) is type(want) and len(got) == len(want)
    assert close(got[0], want[0])


@pytest.mark.parametrize("name", ["output_hidden_states", "use_cache"])
def test_a_config_that_was_changed_acts(model, name):
    plain = ordinary(model)
    tokens(model)
    for m in (model, plain):
        setattr(m.config, name, not getattr(m.config, name))
    with torch.no_grad():
        got, want = (m(torch.tensor([[5]]), past_key_values=filled()) for m in (model, plain))
    assert len(got) == len(want) and close(got.logits, want.logits)


class Counting(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += "attention" in str(function) or "mm" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [
        Counting,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.overrides.BaseTorchFunctionMode,
        torch.enable_grad,
    ],
)
def test_modes_of_torch_see_every_operation(model, monkeypatch, mode):
    plain = ordinary(model)
    tokens(model)
    monkeypatch.setattr(decode, "_call", lambda *a: pytest.fail("went the native way"))
    got = []
    for m in (model, plain):
        with torch.no_grad(), mode() as on:
            got.append(m(torch.tensor([[5]]), past_key_values=filled()).logits)
            got.append(getattr(on, "products", None))
    assert close(got[0], got[2]) and got[1] == got[3]


def test_training_mode(model):
    for name in ("model", f"{BLOCK}.self_attn"):
        changed = copy.deepcopy(model)
        tokens(changed)
        changed.get_submodule(name).train()
        changed.model.layers[0].self_attn.attention_dropout = 0.999
        assert not close(tokens(changed), tokens(ordinary(model)))


# ---- copies


def through_pickle(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


@pytest.mark.parametrize(
    "copied", [through_pickle, through_a_file, lambda model, _: copy.deepcopy(model)]
)
def test_a_copy_plans_anew(model, tmp_path, copied, monkeypatch):
    want = tokens(model)
    other = copied(model, tmp_path)
    forward = other.model.forward
    assert type(forward) is OneToken and forward.body is other.model and forward.plan is None
    for layer in model.model.layers:
        layer.mlp.down_proj.row_scale.zero_()
    seen, call = [], decode._call
    monkeypatch.setattr(decode, "_call", lambda *a: seen.append(1) or call(*a))
    assert close(tokens(other), want) and len(seen) == 3
    assert type(other.model) is llama.LlamaModel


def _child(model, queue):
    torch.set_num_threads(1)
    queue.put(tokens(model).numpy())


def test_a_model_goes_to_a_spawned_process(model):
    want = tokens(model)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(model, queue))
    process.start()
    got = torch.from_numpy(queue.get())
    process.join()
    assert close(got, want)


def test_accelerate_can_hook_a_model_and_let_it_go(model, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks")

    class Half(hooks.ModelHook):
        def post_forward(self, module, output):
            return shrink(output)

    plain = ordinary(model)
    want = tokens(model)
    for where in ("model", f"{BLOCK}.mlp"):
        for m in (model, plain):
            hooks.add_hook_to_module(m.get_submodule(where), Half())
        assert close(tokens(model), tokens(plain))
        for m in (model, plain):
            hooks.remove_hook_from_module(m.get_submodule(where))
        assert close(tokens(model), want)


def test_dequantize_leaves_nothing_behind(model):
    tokens(model)
    dense = model.dequantize()
    assert "forward" not in dense.model.__dict__ and type(dense.model) is llama.LlamaModel


def test_a_compiled_model_is_the_same(model):
    want = tokens(model)
    assert close(tokens(torch.compile(model, backend="eager")), want)


def test_a_folder_written_from_a_fused_model_names_its_class(model, tmp_path):
    tokens(model)
    model.model.save_pretrained(tmp_path / "body")
    assert '"LlamaModel"' in (tmp_path / "body" / "config.json").read_text()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert close(tokens(again), tokens(model))
