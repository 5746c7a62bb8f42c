"""The file .skim: exact round trips, and every way to be wrong told in one line."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from skill_sample import TEXT, chat_tokenizer, skill_model
from skimlm.errors import FormatError, SkimError
from skimlm.skills import splice, store
from skimlm.skills.document import parse
from skimlm.skills.soft_file import Soft
from skimlm.skills.splice import Pin
from skimlm.skills.store import Skill

DOCUMENT = parse(TEXT)
GOLDEN = Path(__file__).parents[1] / "golden" / "tidy-notes.skim"


@pytest.fixture(scope="module")
def model():
    return skill_model(dtype=torch.bfloat16)


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


def skill(model, tokenizer, **changes):
    torch.manual_seed(3)
    made = Skill(
        DOCUMENT,
        Soft(
            torch.randn(32, 64).bfloat16(),
            (Pin(4, "`notes scan --all`"), Pin(30, "Never delete a note.")),
            (8, 16, 32),
        ),
        16,
        "distill",
        store.fingerprints(model, tokenizer),
        {"text_tokens": 410, "candidates": []},
        "SKILL.md",
    )
    return replace(made, **changes)


def rewrite(path, tensors=None, **facts):
    """Change a .skim: its tensors, or what its metadata says."""
    with safe_open(path, framework="pt") as stream:
        held = {name: stream.get_tensor(name) for name in stream.keys()}
        old = json.loads(stream.metadata()["skim"])
    held |= tensors or {}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    new = {key: value for key, value in (old | facts).items() if value != "absent"}
    save_file(held, path, {"skim": json.dumps(new)})


def test_what_is_written_is_read_bit_for_bit(tmp_path, model, tokenizer):
    made, path = skill(model, tokenizer), tmp_path / "a.skim"
    store.write(path, made)
    again = store.read(path)
    assert torch.equal(
        again.content.vectors.view(torch.int16), made.content.vectors.view(torch.int16)
    )
    assert again.content.vectors.dtype == torch.bfloat16
    content = replace(again.content, vectors=made.content.vectors)
    assert replace(again, content=content) == made
    first = path.read_bytes()
    store.write(path, again)
    assert path.read_bytes() == first  # the same skill is the same file


def test_the_format_is_that_of_the_golden_file():
    found = store.read(GOLDEN)
    assert found.document == DOCUMENT
    assert found.content.vectors.float().tolist() == [[0.5, -1.0, 2.0], [1.5, 0.0, -0.25]]
    assert found.content.pins == (Pin(1, "`notes scan --all`"),)
    assert (found.content.ladder, found.k, found.method, found.source) == (
        (1, 2),
        2,
        "distill",
        "SKILL.md",
    )
    assert found.made_for["model"] == "0" * 64 and found.evidence == {"closure": 0.9}


def test_format_md_shows_the_metadata_of_the_golden_file():
    text = (Path(__file__).parents[2] / "FORMAT.md").read_text()
    block = text.split("## A worked example of a skill")[1].split("```")[1]
    with safe_open(GOLDEN, framework="pt") as stream:
        assert json.loads(block) == json.loads(stream.metadata()["skim"])


def test_it_is_stale_for_whatever_it_depends_on(model, tokenizer):
    made = skill(model, tokenizer)
    assert store.stale(made, model, tokenizer) == []
    assert store.stale(made, model.float(), tokenizer) == []  # the same numbers in another dtype
    other = skill_model(dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert store.stale(made, other, tokenizer) == ["model"]
    tokenizer.chat_template += " "
    assert store.stale(made, model, tokenizer) == ["chat_template"]
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<new>"])
    assert store.stale(made, model, tokenizer) == ["tokenizer"]


CALLS = (
    dict(padding="max_length", max_length=9, truncation=True),
    dict(padding=True, pad_to_multiple_of=4, return_tensors="pt"),
    dict(truncation=True, max_length=1, stride=0),
    dict(split_special_tokens=True),
)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_fingerprint_is_that_of_the_tokenizer_whatever_was_called_before(model, call):
    fresh, used = chat_tokenizer(), chat_tokenizer()
    used("a text", **call)
    assert store.fingerprints(model, used) == store.fingerprints(model, fresh)
    known = hashlib.sha256(fresh.backend_tokenizer.to_str().encode()).hexdigest()
    assert store.fingerprints(model, used)["tokenizer"] == known  # so older files still fit


@pytest.mark.parametrize("what", ["model", "tokenizer", "chat_template"])
def test_the_full_text_stands_in_where_it_is_stale_and_says_so(tmp_path, model, tokenizer, what):
    made = skill(model, tokenizer)
    path = tmp_path / "a.skim"
    store.write(path, replace(made, made_for={**made.made_for, what: "f" * 64}))
    pieces, warning = store.served(path, model, tokenizer)
    assert [p.tolist() for p in pieces] == [splice.token_ids(tokenizer, DOCUMENT.text).tolist()]
    assert warning == f"{path}: made for another {what}: its full text is used"


def test_a_neighbours_file_of_the_same_name_is_not_taken_for_the_source(tmp_path, model, tokenizer):
    path = tmp_path / "a.skim"
    store.write(path, replace(skill(model, tokenizer), source="SKILL.md"))
    other = "---\nname: plant-trees\ndescription: For gardens.\n---\nDig.\n"
    (tmp_path / "SKILL.md").write_text(other)
    assert store.served(path, model, tokenizer)[1] is None
    for edited in (
        TEXT.replace("Read every", "Skip no"),
        TEXT.replace("tidy-notes", "notes"),
        TEXT.replace("Sort loose", "Put loose"),
    ):
        (tmp_path / "SKILL.md").write_text(edited)
        with pytest.raises(SkimError, match="has been edited since"):
            store.served(path, model, tokenizer)


def test_it_is_served_at_its_resolution(tmp_path, model, tokenizer):
    path = tmp_path / "a.skim"
    store.write(path, skill(model, tokenizer))
    pieces, warning = store.served(path, model, tokenizer)
    assert warning is None and [len(p) for p in pieces if p.ndim == 2] == [4, 12]
    store.write(path, skill(model, tokenizer, k=None))
    pieces, warning = store.served(path, model, tokenizer)
    assert warning is None and [p.ndim for p in pieces] == [1]
    with pytest.raises(SkimError, match="no resolution 7: it has 8, 16, 32"):
        store.standing(store.read(path), tokenizer, 7)


def test_tokens_count_wrapper_and_pins(model, tokenizer):
    made = skill(model, tokenizer)
    pinned = len("`notes scan --all`Never delete a note.")
    assert store.tokens(store.standing(made, tokenizer), tokenizer) == 16 + pinned + len(
        "Relevant Skill:\n"
    ) + len("\n\n")


def test_an_edited_text_beside_it_is_refused(tmp_path, model, tokenizer):
    path = tmp_path / "a.skim"
    store.write(path, skill(model, tokenizer))
    (tmp_path / "SKILL.md").write_text(TEXT)
    assert store.served(path, model, tokenizer)[1] is None
    (tmp_path / "SKILL.md").write_text(TEXT.replace("Never", "Always"))
    with pytest.raises(SkimError, match="SKILL.md beside it has been edited since: run"):
        store.served(path, model, tokenizer)


SOFT = torch.ones(32, 64, dtype=torch.bfloat16)
NAN = SOFT.clone()
NAN[3, 5] = float("nan")
DAMAGE = {
    "NaN": (dict(tensors={"soft": NAN}), "soft: holds NaN or Inf"),
    "tampered": (dict(tensors={"soft": SOFT}), "soft: has been changed"),
    "float32": (dict(tensors={"soft": SOFT.float()}), r"F32 \[32, 64\], must be BF16"),
    "flat": (dict(tensors={"soft": SOFT[0]}), r"BF16 \[64\], must be BF16 \[k, d\]"),
    "no rows": (dict(tensors={"soft": SOFT[:0]}), "at most 16,384 soft tokens"),
    "too many": (
        dict(tensors={"soft": torch.zeros(16_385, 1, dtype=torch.bfloat16)}),
        "at most 16,384 soft tokens",
    ),
    "surplus": (dict(tensors={"more": SOFT}), "holds more, soft, text, one of kind soft"),
    "missing": (dict(tensors={"text": None}), "holds soft, one of"),
    "edited text": (
        dict(tensors={"text": torch.tensor(list(TEXT.rstrip().replace("Never", "Ever").encode()))
                      .to(torch.uint8)}),
        "text: has been changed",
    ),
    "not text": (dict(tensors={"text": torch.full((9,), 255, dtype=torch.uint8)}), "not UTF-8"),
    "version": (dict(format_version=4), "format 4, this skimlm reads 1, 2, 3"),
    "kind": (dict(format_version=2), "format 2 has no kind 'soft'"),
    "unknown kind": (dict(kind="magic"), "format 1 has no kind 'magic'"),
    "no k": (dict(k="absent"), "k is missing"),
    "k": (dict(k=7), "k 7 is none of its resolutions"),
    "ladder": (dict(resolutions=[8, 64]), "resolutions must be 1 to 32"),
    "order": (dict(resolutions=[16, 8, 32]), "must ascend to 32"),
    "bool": (dict(resolutions=[True, 32]), "resolutions must be 1 to 32"),
    "pins": (dict(pins=[[40, "Never"]]), "pins must be"),
    "pin order": (dict(pins=[[9, "Never"], [4, "Never"]]), "pins must be"),
    "foreign pin": (dict(pins=[[1, "rm -rf /"]]), "pins text that is not the skill's"),
    "method": (dict(method="magic"), "unknown method 'magic'"),
    "wrapper": (dict(wrapper=["a", "b", "c"]), "made for another wrapper"),
    "hashes": (dict(made_for={"model": "x"}), "made_for has no"),
    "path": (dict(source="../../etc/passwd"), "is not a plain file name"),
    "hidden": (dict(source=".bashrc"), "is not a plain file name"),
    "name": (dict(name="../up"), "named '../up', its text 'tidy-notes'"),
    "list": (dict(evidence=[]), "evidence is missing or of a wrong kind"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, model, tokenizer, damage):
    path = tmp_path / "a.skim"
    store.write(path, skill(model, tokenizer))
    changes, complaint = DAMAGE[damage]
    rewrite(path, **changes)
    with pytest.raises(FormatError, match=complaint) as error:
        store.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04pickle", struct.pack("<Q", 2**60) + b"{}", b"\x02\0\0\0\0\0\0\0{}", b"PK" * 99],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.skim"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="a.skim"):
        store.read(path)


def test_a_file_cut_short_is_refused(tmp_path, model, tokenizer):
    path = tmp_path / "a.skim"
    store.write(path, skill(model, tokenizer))
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            store.read(path)


def test_safetensors_without_our_metadata_is_refused(tmp_path):
    path = tmp_path / "a.skim"
    save_file({"soft": SOFT, "text": torch.ones(4, dtype=torch.uint8)}, path)
    with pytest.raises(FormatError, match="not a compressed skill: no `skim` in its metadata"):
        store.read(path)


def test_vectors_of_another_width_are_refused_by_the_model(tmp_path, model, tokenizer):
    made = skill(model, tokenizer, content=Soft(torch.zeros(32, 8).bfloat16(), (), (16, 32)))
    path = tmp_path / "a.skim"
    store.write(path, made)
    pieces, _ = store.served(path, model, tokenizer)
    with pytest.raises(SkimError, match="8 wide, the model takes 64"):
        splice.embed(model, pieces)


def test_inspect_shows_what_is_inside(tmp_path, model, tokenizer):
    path = tmp_path / "a.skim"
    row = {"method": "head", "k": 8, "tokens": 26, "closure": 0.51, "kl": 0.2}
    store.write(path, skill(model, tokenizer, evidence={"rungs": [row], "kl_no_skill": 0.4}))
    older = store.inspect(path)
    store.write(path, skill(model, tokenizer, evidence={"candidates": [row], "kl_no_skill": 0.4}))
    facts = store.inspect(path)
    assert facts["candidates"] == older["candidates"] == [row]
    json.dumps(facts)
    assert (facts["name"], facts["k"], facts["resolutions"]) == ("tidy-notes", 16, [8, 16, 32])
    lines = store.inspect_text(facts).splitlines()
    assert lines[-1].split() == ["head", "8", "26", "0.510", "0.200", "-"]
    store.write(path, skill(model, tokenizer, k=None))
    assert "none is good enough: the full text is served" in store.inspect_text(store.inspect(path))
