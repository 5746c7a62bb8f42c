"""Fine-tuning: only adapters move, through their rounding, on an exact budget, not for worse."""

import dataclasses
import itertools
import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from conftest import quantized_linears, tiny_model
from skimlm.cli import main
from skimlm.errors import SkimError
from skimlm.format.pack import effective
from skimlm.models.blocks import decoder_linears
from skimlm.models.checkpoint import load
from skimlm.models.write import save
from skimlm.pipeline import finetune
from skimlm.pipeline.text import read_documents, windows
from skimlm.quantize import slim
from skimlm.quantize.mask import Sparsity
from skimlm.runtime.linear import CompressedLinear
from skimlm.storage.folder import folder_bytes
from skimlm.train import adapters as adapters_module
from skimlm.train import loop
from skimlm.train.adapters import (
    CHECKS,
    HELD_OUT,
    _placed,
    adapted,
    next_token_loss,
    stored_adapter,
    train,
)
from skimlm.train.straight_through import rounded_factor

KINDS = [  # of linears, in turn
    slim.Options(4, Sparsity(2, 4), 0.2, 4, group=16),
    slim.Options(3, Sparsity(ratio=0.5), 0.2, 16),
    slim.Options(3, None, 0.0),
    slim.Options(2, None, 0.2, 4),
]
RUN = dict(tokens=1000, seq_len=32, batch=4, lr=0.1)


def bundled(options):
    """Settings together, as `finetune` takes them."""
    names = {field.name for field in dataclasses.fields(finetune.Settings)}
    settings = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return rest | {"settings": finetune.Settings(**settings)}


def decompose(model):
    """Sparse, grid and adapted linears of a model, one kind after the other."""
    layers = decoder_linears(model)
    return {
        name: slim.fit(layer.weight.detach().float(), torch.eye(layer.in_features), options)
        for (name, layer), options in zip(layers.items(), itertools.cycle(KINDS), strict=False)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    out = tmp_path_factory.mktemp("finetune") / "small"
    model = tiny_model(dtype=torch.bfloat16)
    save(out, model, tokenizer, decompose(model), embed_bits=8, bits=4)
    return out


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "toy.txt"
    path.write_text("All work and no play makes Jack a dull boy. " * 200)
    return path


@pytest.fixture
def run(folder, tmp_path, text):
    """Fine-tune the folder with some options; OUT is the first argument."""

    def go(out="out", **options):
        options = RUN | dict(text=text, cache_dir=tmp_path / "cache") | options
        return finetune.finetune(folder, tmp_path / out, **bundled(options))

    return go


def stored(path):
    return load_file(path / "model.safetensors")


def mean_loss(model, ids):
    """Cross entropy of the next tokens in nats, from whole logits."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_only_adapters_change(run, folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = run()
    old, new = stored(folder), stored(tmp_path / "out")
    assert list(old) == list(new)
    changed = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"lora_a", "lora_b"}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    for name in before.keys() - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    old, new = (json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "out"))
    facts = new["quantization_config"]["provenance"].pop("finetune")
    assert old == new
    assert facts["tokens"] == report.tokens == 992 and facts["text"] == "toy.txt"


def test_the_loss_falls_on_windows_it_does_not_see_and_is_that_of_the_folder(
    run, folder, tmp_path, text
):
    report = run()
    assert report.improved and report.held_out_after < 0.8 * report.held_out_before
    assert report.held_out_after == min(report.held_out)
    assert len(report.held_out) == 1 + CHECKS
    before, tokenizer = load(folder)
    after, _ = load(tmp_path / "out")
    ids = windows(read_documents(text), tokenizer, 31 + HELD_OUT, 32, 0)
    unseen = ids[: len(ids) // 8]
    assert report.held_out_tokens == unseen.numel()
    assert mean_loss(before, unseen) == pytest.approx(report.held_out_before, rel=2e-3)
    assert mean_loss(after, unseen) == pytest.approx(report.held_out_after, rel=2e-3)


@pytest.mark.parametrize("made_up", [None, [9, 8, 5, 6, 4, 7]], ids=["measured", "made up"])
def test_what_is_stored_is_what_was_evaluated_best(folder, text, monkeypatch, made_up):
    model, tokenizer = load(folder, torch.float32)
    layers = adapted(model)
    ids = windows(read_documents(text), tokenizer, 12, 32, 0)
    placed, seen = _placed, []  # at every measurement of the held-out loss

    def recording(layers_, values):
        if not any(v.requires_grad for v in values.values()):
            seen.append({n: v.clone() for n, v in values.items()})
        return placed(layers_, values)

    monkeypatch.setattr(adapters_module, "_placed", recording)
    if made_up:
        rest = list(made_up)
        monkeypatch.setattr(adapters_module, "loss_sum", lambda *_: rest.pop(0))
    adapters, losses = train(
        model, layers, ids[4:], ids[:4], [[0, 1, 2, 3]] * 5, next_token_loss(model), 0.1
    )
    best = losses.index(min(losses))
    assert len(seen) == len(losses) == 6 and best == (4 if made_up else 5)
    for name, adapter in adapters.items():
        for factor, value in zip("ab", adapter.values(), strict=True):
            assert torch.equal(seen[best][f"{factor}.{name}"], value)
    for name, layer in layers.items():  # the first one is what was stored
        assert layer.adapter is None
        for factor, value in zip("ab", layer.adapter_values(), strict=True):
            assert torch.equal(seen[0][f"{factor}.{name}"], value)


@pytest.mark.parametrize("kind", [0, 1, 3], ids=["2:4 grid, 4 bit", "bitmap, 16 bit", "4 bit"])
def test_gradients_are_those_of_a_layer_of_the_stored_numbers(kind):
    g = torch.Generator().manual_seed(kind)
    w = torch.randn(40, 160, generator=g) / 12
    q = slim.fit(w, torch.eye(160), KINDS[kind])
    layer = CompressedLinear.from_quantized(q, torch.randn(40, generator=g))
    adapter = stored_adapter(layer)
    x = torch.randn(2, 5, 160, generator=g, requires_grad=True)
    probe = torch.randn(2, 5, 40, generator=g)
    moved = [v + 0.1 * v.std() * torch.randn(v.shape, generator=g) for v in adapter.values()]
    leaves = [v.clone().requires_grad_() for v in moved]
    scales = adapter.a_scale, adapter.b_scale
    values = [rounded_factor(v, s) for v, s in zip(leaves, scales, strict=True)]
    layer.adapter = values[0], values[1]
    out = layer(x)
    out.backward(probe)

    a, b = (v.detach().double().requires_grad_() for v in values)
    x64 = x.detach().double().requires_grad_()
    dense = (effective(q) - adapter.values()[1].T @ adapter.values()[0]).double() + b.T @ a
    want = x64 @ dense.T + layer.bias.double()
    want.backward(probe.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(values[0], moved[0])  # rounding took place
    for leaf, oracle in zip([*leaves, x], [a, b, x64], strict=True):
        torch.testing.assert_close(leaf.grad.double(), oracle.grad, rtol=1e-4, atol=1e-4)


def test_no_dense_weight_is_kept_for_the_backward_pass():
    q = slim.fit(torch.randn(40, 160), torch.eye(160), KINDS[0])
    layer = CompressedLinear.from_quantized(q)
    layer.adapter = tuple(v.requires_grad_() for v in layer.adapter_values())
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 160, requires_grad=True)).sum().backward()
    assert kept and max(kept) < 40 * 160


def test_a_bias_of_a_compressed_linear_can_be_trained():
    layer = CompressedLinear.from_quantized(
        slim.fit(torch.randn(40, 160), torch.eye(160), KINDS[0]), torch.zeros(40)
    )
    layer.bias.requires_grad_()
    layer(torch.randn(2, 3, 160, requires_grad=True)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 6.0))


@pytest.mark.parametrize("tokens, batch, want", [(200, 4, [4, 2]), (32, 4, [1]), (1000, 16, None)])
def test_the_budget_is_used_to_the_last_whole_window(run, text, monkeypatch, tokens, batch, want):
    read, original = [], adapters_module.backward

    def backward(loss, hidden):
        read.append(hidden.shape[:2])
        return original(loss, hidden)

    monkeypatch.setattr(adapters_module, "backward", backward)
    text.write_text("To be, or not to be, that is the question. " * 8)  # 10 windows, 9 to train on
    report = run(tokens=tokens, batch=batch)
    assert report.tokens == sum(n * t for n, t in read) == tokens // 32 * 32
    assert report.windows == tokens // 32 and report.passes == pytest.approx(tokens // 32 / 9, 1e-3)
    assert want is None or [n for n, _ in read] == want


def test_windows_are_read_equally_often():
    order = sum(loop.passes(7, 17, 4, 3), [])
    assert len(order) == 17
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and loop.passes(7, 17, 4, 4) != loop.passes(7, 17, 4, 3)


def test_the_folder_is_the_same_at_every_run_and_after_an_interruption(run, tmp_path, monkeypatch):
    first = run("first")
    write, count = loop.write_state, []

    def interrupted(path, state):
        write(path, state)
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("second")
    assert not (tmp_path / "second").exists()
    assert len(list((tmp_path / "cache").glob("*.state"))) == 1
    steps, original = [], adapters_module.backward
    monkeypatch.setattr(
        adapters_module, "backward", lambda *args: (steps.append(1), original(*args))
    )
    second = run("second")
    assert len(steps) == 8 - 3  # of 8 steps, those behind the second check
    assert second.held_out == first.held_out
    for name in ("model.safetensors", "config.json"):
        files = [(tmp_path / out / name).read_bytes() for out in ("first", "second")]
        assert files[0] == files[1]
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("damage", ["cut", "other tensors"])
def test_a_damaged_state_is_named(run, tmp_path, monkeypatch, damage):
    write = loop.write_state

    def interrupted(path, state):
        write(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(loop, "write_state", write)
    (state,) = (tmp_path / "cache").glob("*.state")
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    else:
        tensors = {name: tensor[:1] for name, tensor in load_file(state).items()}
        save_file(tensors, state, metadata={"step": "1", "losses": "[1.0]"})
    with pytest.raises(SkimError, match=rf"^{re.escape(str(state))}: damaged state of a training"):
        run()


CHANGES = [dict(lr=0.2), dict(seed=1), dict(batch=2), dict(tokens=500), dict(text="other.txt")]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_training_has_another_state(run, text, change, monkeypatch):
    monkeypatch.chdir(text.parent)
    (text.parent / "other.txt").write_text(text.read_text().replace("boy", "man"))
    paths = []

    def train(*args):
        paths.append(args[-2])
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", train)
    for options in ({}, {}, change):
        with pytest.raises(KeyboardInterrupt):
            run(**options)
    assert paths[0] == paths[1] != paths[2]


@pytest.fixture
def uphill(monkeypatch):
    """Every step goes the wrong way."""
    adam = loop.adam
    monkeypatch.setattr(loop, "adam", lambda s, name, grad, *rest: adam(s, name, -grad, *rest))


def test_the_adapters_stay_where_training_makes_them_worse(run, folder, tmp_path, uphill):
    report = run()
    assert not report.improved
    assert report.held_out_after == report.held_out_before < min(report.held_out[1:])
    old, new = stored(folder), stored(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_teacher_is_approached(run, tmp_path, llama_folder, folder, text):
    report = run(teacher=llama_folder, lr=0.02)
    assert report.loss == "KL" and report.improved
    model, tokenizer = load(tmp_path / "out")
    before, teacher = load(folder)[0], load(llama_folder)[0]
    ids = windows(read_documents(text), tokenizer, 31 + HELD_OUT, 32, 0)

    def divergence(student):
        unseen = ids[: len(ids) // 8]
        with torch.no_grad():
            p = teacher(input_ids=unseen).logits.double().log_softmax(-1)
            q = student(input_ids=unseen).logits.double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(before) == pytest.approx(report.held_out_before, rel=5e-3)
    assert divergence(model) == pytest.approx(report.held_out_after, rel=5e-3)


def test_a_teacher_that_reads_other_tokens_is_refused(run, llama_folder, tmp_path):
    other = shutil.copytree(llama_folder, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(SkimError, match="other: reads the text as other tokens"):
        run(teacher=other)


def test_what_a_user_can_get_wrong_is_one_line(run, folder, llama_folder, tmp_path, text):
    plain = tmp_path / "plain"
    model = tiny_model(dtype=torch.bfloat16)
    _, tokenizer = load(folder)
    save(plain, model, tokenizer, quantized_linears(model), embed_bits=8, bits=4.5)
    short = tmp_path / "short.txt"
    short.write_text("Hello.")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()

    def refused(path, out, words, **options):
        with pytest.raises(SkimError, match=words) as caught:
            finetune.finetune(path, tmp_path / out, **bundled(RUN | dict(text=text) | options))
        assert "\n" not in str(caught.value)

    refused(plain, "out", "plain: has no adapters to train")
    refused(llama_folder, "out", "not a compressed folder: make one with `skimlm compress`")
    refused(tmp_path / "none", "out", "no such file or folder")
    refused(folder, "there", "there: exists, use --force to replace it")
    refused(folder, folder, "is the model itself; name another folder")
    refused(folder, folder, "is the model itself; name another folder", force=True)
    refused(folder, "out", "none.txt: no such file", text=tmp_path / "none.txt")
    refused(folder, "out", "7 tokens are fewer than one window of 32", text=short)
    refused(folder, "out", "one window of 6 is too little", text=short, seq_len=6)
    refused(folder, "out", "31 tokens are less than one window of 32", tokens=31)
    refused(folder, "out", "seq-len must be 2 to 256", seq_len=300)
    refused(folder, "out", "seq-len must be at least 2", seq_len=1)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_report(folder, tmp_path, text):
    options = "--tokens 300 --seq-len 32 --batch 2 --lr 0.05 --json --cache-dir".split()
    args = ["finetune", folder, tmp_path / "out", "--text", text, *options, tmp_path / "cache"]
    result = CliRunner().invoke(main.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["tokens"] == 288 and facts["windows"] == 9
    assert facts["bytes"] == folder_bytes(tmp_path / "out")
    assert facts["peak_rss_bytes"] > 0 and list(facts["seconds"]) == ["load", "train", "write"]


def test_the_command_says_when_nothing_was_gained(folder, tmp_path, text, uphill):
    options = "--tokens 300 --seq-len 32 --lr 0.1 --cache-dir".split()
    args = ["finetune", folder, tmp_path / "out", "--text", text, *options, tmp_path / "cache"]
    result = CliRunner().invoke(main.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    assert "tokens             288\n" in result.stdout
    assert "the adapters are stored unchanged" in result.stderr
