"""Calibration statistics against plain autograd, one window at a time; text to token windows."""

import concurrent.futures
import json
import unittest

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import FAMILIES, VOCAB, bos_tokenizer, byte_tokenizer, tiny_model
from skimlm.errors import SkimError
from skimlm.models.blocks import decoder_linears
from skimlm.models.head import final_hidden, head_logits
from skimlm.models.tokenizer import prefix_ids
from skimlm.pipeline.calibrate import default_text, read_documents, statistics, windows

EOS = 258


def tokens(n: int = 3, t: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, t), generator=torch.Generator().manual_seed(seed))


def oracle(model, ids: torch.Tensor, fisher_windows: int):
    """Sums over windows in float64, from hooks and the gradients of autograd."""
    chosen, seen, result = decoder_linears(model), {}, {}

    def keep(name):
        def hook(_module, args, out):
            out.retain_grad()
            seen[name] = (args[0], out)

        return hook

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    handles = [linear.register_forward_hook(keep(name)) for name, linear in chosen.items()]
    for index, window in enumerate(ids):
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0].float()
        torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        for name, (x, z) in seen.items():
            x, g = x.detach().flatten(0, -2).double(), z.grad.flatten(0, -2).double()
            r = result.setdefault(name, dict.fromkeys(("h", "end", "fisher", "rho"), 0))
            r["h"] = r["h"] + x.T @ x
            r["end"] = r["end"] + x.T @ (x * g.square().mean(1, keepdim=True))
            r["rho"] = r["rho"] + g.square().sum(0)
            if index < fisher_windows:
                r["fisher"] = r["fisher"] + chosen[name].weight.grad.double() ** 2
    for handle in handles:
        handle.remove()
    return result


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to a part in ten thousand of the largest number."""
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("batch, fisher_windows", [(2, 64), (1, 2), (3, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_autograds(family, batch, fisher_windows):
    ids = tokens()
    got = statistics(
        model := tiny_model(family),
        decoder_linears(model),
        ids,
        layerwise=True,
        batch=batch,
        fisher_windows=fisher_windows,
    )
    want = oracle(tiny_model(family), ids, fisher_windows)
    assert list(got) == list(decoder_linears(model))
    for name, s in got.items():
        close(s.hessian, want[name]["h"])
        close(s.end_hessian, want[name]["end"])
        close(s.fisher, want[name]["fisher"])
        close(s.row_weight, want[name]["rho"] / want[name]["rho"].mean())
        assert s.tokens == ids.numel()
        close(s.input_rms, (want[name]["h"].diagonal() / ids.numel()).sqrt())


def test_bfloat16_statistics_are_near_the_float32_ones():
    ids, model, rough = tokens(), tiny_model(), tiny_model(dtype=torch.bfloat16)
    want = statistics(model, decoder_linears(model), ids)
    got = statistics(rough, decoder_linears(rough), ids)
    for name, s in got.items():
        assert s.end_hessian.dtype == s.fisher.dtype == torch.float32
        difference = (s.end_hessian - want[name].end_hessian).norm()
        assert difference < 0.1 * want[name].end_hessian.norm()


def test_only_the_named_linears_are_observed_and_progress_is_told():
    model, seen = tiny_model(), []
    chosen = {n: m for n, m in decoder_linears(model).items() if n.endswith("up_proj")}
    got = statistics(model, chosen, tokens(), batch=2, progress=lambda *a: seen.append(a))
    assert list(got) == list(chosen) and seen == [(2, 3), (3, 3)]
    whole = statistics(model, decoder_linears(model), tokens(), batch=2)
    for name, s in got.items():
        assert torch.equal(s.end_hessian, whole[name].end_hessian)
        assert s.hessian is None
    with pytest.raises(ValueError, match="was not collected"):
        got[name].input_rms  # noqa: B018


def state(model) -> dict:
    """Everything calibration could leave behind on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "forwards": [n for n, m in model.named_modules() if "forward" in m.__dict__],
        "training": model.training,
    }


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken):
    model = tiny_model()
    names = [n for n, _ in model.named_parameters()]
    model.get_parameter(names[1]).requires_grad_(False)
    before, numbers = state(model), {n: p.clone() for n, p in model.named_parameters()}
    assert True in before["flags"] and False in before["flags"]

    def stop(done, total):
        raise KeyboardInterrupt

    if broken:
        with pytest.raises(KeyboardInterrupt):
            statistics(model, decoder_linears(model), tokens(), progress=stop)
    else:
        statistics(model, decoder_linears(model), tokens())
    assert state(model) == before
    assert all(torch.equal(p, numbers[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_make_the_models_logits(family):
    model, ids = tiny_model(family), tokens(2, 9)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        got = head_logits(model, final_hidden(model, ids))
    assert torch.equal(got, want)
    assert state(model)["hooks"] == state(tiny_model(family))["hooks"]


def test_soft_caps_bind_in_the_test_above():
    model = tiny_model("gemma3", final_logit_softcapping=3.0)
    ids = tokens(1, 9)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert want.abs().max() <= 3 and want.abs().max() > 2
        assert torch.equal(head_logits(model, final_hidden(model, ids)), want)


def test_overflow_is_an_error_that_names_the_linear():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(SkimError, match=r"layers\.\d.*: calibration overflowed"):
        statistics(model, decoder_linears(model), tokens())


# ---- text to windows


def decode(ids) -> str:
    return byte_tokenizer().decode([i for i in ids if i < 256])


def test_documents_are_shuffled_joined_by_eos_and_cut():
    documents = [chr(ord("a") + i) * (5 + i) for i in range(12)]
    cut = windows(documents, byte_tokenizer(), 100, 8, seed=0)
    flat = cut.flatten().tolist()
    text = "".join("|" if i == EOS else decode([i]) for i in flat)
    runs = text.split("|")
    assert sorted(runs[:-1]) != runs[:-1]  # shuffled
    assert set(runs[:-1]) <= set(documents) and documents[0] in runs
    total = sum(len(d) + 1 for d in documents)
    assert cut.shape == (total // 8, 8) and cut.dtype == torch.int64


def test_windows_depend_on_the_seed_alone():
    documents = [f"document {i} " * 9 for i in range(30)]
    first = windows(documents, byte_tokenizer(), 6, 16, seed=3)
    assert torch.equal(windows(list(documents), byte_tokenizer(), 6, 16, seed=3), first)
    assert not torch.equal(windows(documents, byte_tokenizer(), 6, 16, seed=4), first)
    more = windows(documents, byte_tokenizer(), 60, 16, seed=3)
    assert torch.equal(more[:6], first) and len(more) == 60


def test_one_document_is_cut_first_and_then_shuffled():
    text = "".join(chr(ord("a") + i) * 8 for i in range(20)) + "end"
    cut = windows([text], byte_tokenizer(), 100, 8, seed=0)
    rows = [decode(row.tolist()) for row in cut]
    assert sorted(rows) == [chr(ord("a") + i) * 8 for i in range(20)] and rows != sorted(rows)
    few = windows([text], byte_tokenizer(), 5, 8, seed=0)
    assert torch.equal(few, cut[:5])
    assert not torch.equal(windows([text], byte_tokenizer(), 100, 8, seed=1), cut)


@pytest.mark.parametrize("documents, have", [([], 0), ([""], 1), (["seven c"], 8), (["a", "b"], 4)])
def test_too_little_text_is_an_error_with_the_numbers(documents, have):
    with pytest.raises(
        SkimError, match=f"^notes.txt: {have} tokens are fewer than one window of 9"
    ):
        windows(documents, byte_tokenizer(), 4, 9, 0, origin="notes.txt")


def test_a_tokenizer_without_eos_joins_without_it():
    plain = byte_tokenizer()
    plain.eos_token = None
    cut = windows(["aaaa", "bbbb"], plain, 9, 8, 0)
    assert cut.shape == (1, 8) and cut.max() < 256


@pytest.mark.parametrize("documents", [["x" * 90], ["aaaa" * 9, "bbbb" * 9, "cccc" * 9]])
def test_every_window_begins_as_the_tokenizer_begins_a_text(documents):
    tokenizer = bos_tokenizer()
    cut = windows(documents, tokenizer, 9, 8, 0)
    assert cut.shape == (9, 8) and (cut[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(cut[:, 1:], windows(documents, byte_tokenizer(), 9, 7, 0))
    with pytest.raises(SkimError, match="seq-len must be more than the 1 tokens"):
        windows(documents, tokenizer, 9, 1, 0)


def test_all_tokens_that_a_tokenizer_puts_before_a_text_are_found():
    tokenizer = byte_tokenizer()
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=special
    )
    assert prefix_ids(tokenizer) == [tokenizer.bos_token_id] * 2
    assert prefix_ids(byte_tokenizer()) == []


def rows(path, *lines) -> str:
    path.write_text("\n".join(json.dumps(x) if isinstance(x, dict) else x for x in lines) + "\n")
    return str(path)


def test_rows_of_a_jsonl_are_documents(tmp_path):
    file = rows(tmp_path / "a.jsonl", {"text": "one", "id": 3}, "", {"id": 4, "text": "two\nlines"})
    assert read_documents(file) == ["one", "two\nlines"]


def test_the_parts_of_a_text_are_found_or_named(tmp_path):
    parts = {"prefix": "begin ", "gold_completion": "end", "distractor": "x"}
    file = rows(tmp_path / "a.jsonl", parts, parts)
    assert read_documents(file) == ["begin end"] * 2
    assert read_documents(file, "distractor,prefix") == ["xbegin "] * 2
    both = rows(tmp_path / "b.jsonl", parts | {"text": "whole"})
    assert read_documents(both) == ["whole"]


def test_line_breaks_inside_a_json_string_do_not_end_its_line(tmp_path):
    """JSON allows these unescaped; str.splitlines would cut there."""
    text = "a\u2028b\u2029c\x85d"
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8", newline=""
    )
    assert read_documents(file) == [text]


@pytest.mark.parametrize(
    "line, key, match",
    [
        ("{", None, r"a.jsonl, line 2: not JSON"),
        ("[1]", None, r"a.jsonl, line 2: expected an object, got list"),
        (
            '{"body": "x"}',
            None,
            r"a.jsonl, line 2: no text under 'text'; it has body: .* --text-key",
        ),
        ('{"text": 7}', None, r"a.jsonl, line 2: no text under 'text'"),
        ('{"text": "x"}', "title", r"a.jsonl, line 1: no text under 'title'; it has text"),
        ('{"text": "x"}', "text,b", r"a.jsonl, line 1: no text under 'text,b'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, key, match):
    file = rows(tmp_path / "a.jsonl", {"text": "good"}, line)
    with pytest.raises(SkimError, match=match):
        read_documents(file, key)


def test_a_text_file_is_one_document_as_it_is(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("first\r\n\r\n é {\n".encode())
    assert read_documents(file) == ["first\r\n\r\n é {\n"]


def test_files_that_cannot_be_read_are_one_line_errors(tmp_path):
    with pytest.raises(SkimError, match="none.txt: no such file"):
        read_documents(tmp_path / "none.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(SkimError, match=r"latin.txt: not UTF-8 \(byte 3\)"):
        read_documents(latin)
    with pytest.raises(SkimError, match="is a directory"):
        read_documents(tmp_path)


def test_the_built_in_text_is_enough_and_always_the_same(monkeypatch):
    lazy = {concurrent.futures: "ProcessPoolExecutor", unittest: "IsolatedAsyncioTestCase"}
    for module, name in lazy.items():
        monkeypatch.delitem(vars(module), name, raising=False)
    text = default_text()
    assert len(text) > 20 and sum(map(len, text)) > 200_000
    for module, name in lazy.items():
        getattr(module, name)  # imported on first use, then in the module's namespace
    assert default_text() == text
    assert VOCAB == 259 and len(windows(text, byte_tokenizer(), 16, 512, 0)) == 16
