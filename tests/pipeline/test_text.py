"""Calibration text: what a file holds, and the windows made of it."""

import concurrent.futures
import json
import unittest

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import VOCAB, bos_tokenizer, byte_tokenizer
from skimlm.errors import SkimError
from skimlm.models.tokenizer import prefix_ids
from skimlm.pipeline.text import default_text, read_documents, windows

EOS = 258


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


LINES = [json.dumps({"text": f"document {i}"}) for i in range(3)]
WANT = [f"document {i}" for i in range(3)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Json"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_json_are_rows_under_every_name(tmp_path, name, mark, end):
    (tmp_path / name).write_bytes(mark + end.join(LINES).encode())
    assert read_documents(tmp_path / name) == WANT


def test_a_json_array_has_a_row_in_each_of_its_items(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(f"[{','.join(LINES)}]")
    assert read_documents(file) == WANT
    file.write_text(json.dumps(WANT, indent=2))
    assert read_documents(file) == WANT
    file.write_text(LINES[0])
    assert read_documents(file) == WANT[:1]
    file.write_text('[{"text": "x"}, 7]')
    with pytest.raises(SkimError, match="a.json, row 2: expected an object, got int"):
        read_documents(file)
    file.write_text('{"data": []}')
    with pytest.raises(SkimError, match="a.json, row 1: no text under 'text'; it has data"):
        read_documents(file)
    file.write_text('[{"text": "x"},')
    with pytest.raises(SkimError, match="a.json, line 1: not JSON"):
        read_documents(file)


def test_deep_json_is_an_error_of_its_line(tmp_path):
    file = rows(tmp_path / "a.jsonl", "[" * 100_000)
    with pytest.raises(SkimError, match="a.jsonl, line 1: not JSON"):
        read_documents(file)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def chatty():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"id": 1, "conversations": SHARED}])
def test_a_chat_goes_through_the_chat_template(tmp_path, row):
    file = rows(tmp_path / "a.jsonl", row)
    assert read_documents(file, None, chatty()) == ["<user>hi<assistant>yes?"]
    for tokenizer in (None, byte_tokenizer()):
        with pytest.raises(SkimError, match="a.jsonl, line 1: a chat, but .* no chat template"):
            read_documents(file, None, tokenizer)


def test_a_chat_under_another_key_is_named_and_text_wins(tmp_path):
    assert read_documents(rows(tmp_path / "a.jsonl", {"talk": CHAT}), "talk", chatty()) == [
        "<user>hi<assistant>yes?"
    ]
    assert read_documents(rows(tmp_path / "b.jsonl", {"text": "x", "messages": CHAT})) == ["x"]


@pytest.mark.parametrize(
    "messages",
    [["hi"], [{"role": "user"}], [{"content": "hi"}], [{"role": "user", "content": [1]}]],
)
def test_a_chat_of_another_kind_is_refused_by_its_line(tmp_path, messages):
    file = rows(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": messages})
    with pytest.raises(SkimError, match="a.jsonl, line 2: a message is a role and a text"):
        read_documents(file, None, chatty())


def test_what_a_template_raises_is_one_line(tmp_path):
    tokenizer = chatty()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SkimError, match="line 1: the chat template refuses .*: roles must alt"):
        read_documents(rows(tmp_path / "a.jsonl", {"messages": CHAT}), None, tokenizer)


def test_half_of_a_surrogate_pair_is_replaced(tmp_path):
    file = rows(tmp_path / "a.jsonl", '{"text": "a \\ud83d b \\ude00 c \\ud83d\\ude00"}')
    documents = read_documents(file)
    assert documents == ["a \ufffd b \ufffd c \U0001f600"]
    assert len(windows(documents, byte_tokenizer(), 1, 8, 0)) == 1


@pytest.mark.parametrize("text", ["<s> a </s> <pad>", "a \0 b", "", "\x1b[0m"])
def test_special_tokens_and_control_characters_are_text_that_can_be_read(tmp_path, text):
    documents = read_documents(rows(tmp_path / "a.jsonl", {"text": text}, {"text": "b" * 9}))
    assert documents[0] == text
    assert len(windows(documents, byte_tokenizer(), 1, 8, 0)) == 1


@pytest.mark.parametrize(
    "name, data, kind",
    [
        ("a.parquet", b"PAR1\xff", "a table"),
        ("a.txt", b"PAR1\xff", "parquet"),
        ("a.csv", b"text\nhello\n", "a table"),
        ("a.txt", "hello".encode("utf-16"), "UTF-16"),
        ("a.jsonl", LINES[0].encode("utf-16-be"), "not JSON"),
        ("a.jsonl", b"\xfe\xff" + LINES[0].encode("utf-16-be"), "UTF-16"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "gzip"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_what_is_no_text_is_refused_by_its_kind(tmp_path, name, data, kind):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SkimError, match=f"{name}.*{kind}"):
        read_documents(tmp_path / name)


def test_the_short_path_gives_the_same_functions():
    from skimlm import calibrate

    assert calibrate.read_documents is read_documents and calibrate.windows is windows


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
