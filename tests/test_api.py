"""The public API: its pieces work together, and a user's mistake is a SkimError."""

import warnings
from pathlib import Path

import pytest
import torch

import skimlm
from skill_sample import TEXT, chat_tokenizer, skill_model
from skimlm.errors import SkimError
from skimlm.skills import store

QUICK = dict(recipe="fast", bits=4, samples=4, seq_len=64)
SHORT = dict(tokens=8, train=4, dev=4, answer=4, steps=2, rows=2)  # of a skill


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text and a SKILL.md."""
    folder = tmp_path_factory.mktemp("api")
    skill_model(dtype=torch.bfloat16).save_pretrained(folder / "model")
    chat_tokenizer().save_pretrained(folder / "model")
    (folder / "notes.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    (folder / "SKILL.md").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def small(place):
    out = place / "small"
    skimlm.compress(
        place / "model", out, text=place / "notes.txt", cache_dir=place / "cache", **QUICK
    )
    return out


@pytest.fixture
def model(small):
    return skimlm.load(small)


@pytest.fixture(scope="module")
def skill(place, small):
    return skimlm.Skill.compress(place / "SKILL.md", skimlm.load(small), **SHORT)


def test_compress_takes_options_a_config_or_both(place, tmp_path):
    config = skimlm.CompressConfig(text=place / "notes.txt", cache_dir=place / "cache", **QUICK)
    told, seen = [], []
    report = skimlm.compress(
        place / "model",
        tmp_path / "out",
        config,
        bits=3.5,
        notice=told.append,
        progress=lambda *done: seen.append(done),
    )
    assert isinstance(report, skimlm.Report) and report.recipe == "fast"
    assert 3 < report.bits_per_weight <= 3.5 and told and seen
    assert skimlm.CompressConfig.from_folder(tmp_path / "out").bits == 3.5


def test_what_comes_out_loads_and_answers_the_same_way_twice(model):
    first, second = (model.generate("Where do I start?", 8) for _ in range(2))
    assert isinstance(first, skimlm.Generation) and first.text == second.text
    assert first.chat_template and not model.generate("Start", 2, raw=True).chat_template


def test_the_pieces_of_a_stream_are_the_text(model):
    pieces = list(model.stream("Where do I start?", 12, raw=True))
    assert "" not in pieces
    assert "".join(pieces) == model.generate("Where do I start?", 12, raw=True).text


def test_a_stream_that_is_left_ends_its_generation(model, monkeypatch):
    from skimlm import api

    written, plain = [], api.generate_text

    def counting(*args, write, **options):
        def count(piece):
            written.append(piece)
            write(piece)

        return plain(*args, write=count, **options)

    monkeypatch.setattr(api, "generate_text", counting)
    pieces = model.stream("a", 1500, raw=True)
    next(pieces)
    pieces.close()
    after = len(written)
    assert after < 1500 and len(written) == after


def test_an_error_in_a_stream_comes_out_of_it(model):
    with pytest.raises(SkimError, match="empty"):
        next(model.stream("", raw=True))


def test_perplexity_takes_a_text_or_a_file_of_it(model, place):
    notes = place / "notes.txt"
    of_text = model.perplexity(notes.read_text(), seq_len=64, limit=3)
    of_file = model.perplexity(Path(notes), seq_len=64, limit=3)
    assert isinstance(of_text, skimlm.Perplexity)
    assert of_text.nll == of_file.nll and of_text.windows == 3
    assert model.perplexity(seq_len=64, limit=1).tokens > 10_000  # the built-in one


def test_dtype_and_device_are_what_was_given(small):
    assert skimlm.load(small, dtype="float32").model.dtype == torch.float32
    assert skimlm.load(small, dtype=torch.float16).model.dtype == torch.float16
    for wrong in ("int8", "double!", "nn", torch.int8, 32):
        with pytest.raises(SkimError, match="dtype must be"):
            skimlm.load(small, dtype=wrong)
    with pytest.raises(SkimError, match="device 'nothing' cannot be used"):
        skimlm.load(small, device="nothing")


def test_skills_are_known_by_name_by_file_and_as_they_are(model, place, skill, tmp_path):
    file = tmp_path / "tidy.skim"
    skill.save(file)
    assert model.add_skill(place / "SKILL.md", "whole") == "whole"
    assert model.add_skill(file) == "tidy-notes" == skill.name
    assert model.skills == ("whole", "tidy-notes")
    whole = model.generate("Where?", 4, skills=["whole"])
    counts = {
        model.generate("Where?", 4, skills=[one]).skill_tokens
        for one in ("tidy-notes", skill, file, str(file))
    }
    assert counts == {8} and whole.skill_tokens > 300
    both = model.generate("Where?", 4, skills=["tidy-notes", skill])
    assert both.skill_tokens == 16


def test_a_skill_comes_back_as_it_was_saved(skill, tmp_path):
    skill.save(tmp_path / "tidy.skim")
    again = skimlm.Skill.load(tmp_path / "tidy.skim")
    assert again.text == skill.text == TEXT.strip()
    assert torch.equal(again.stored.content.values, skill.stored.content.values)
    assert skimlm.inspect(tmp_path / "tidy.skim")["name"] == "tidy-notes"
    with pytest.raises(SkimError, match="exists"):
        skill.save(tmp_path / "tidy.skim")
    skill.save(tmp_path / "tidy.skim", force=True)


def test_a_skill_is_measured_as_the_command_does(skill, model, tmp_path):
    from skimlm.skills.evaluate import evaluate

    skill.save(tmp_path / "tidy.skim")
    (want,) = evaluate(model.model, model.tokenizer, [tmp_path / "tidy.skim"], count=2, answer=4)[
        "skills"
    ]
    got = skimlm.Skill.load(tmp_path / "tidy.skim").evaluate(model, questions=2, answer=4)
    assert {**got, "seconds": None} == {**want, "seconds": None}


def test_a_skill_for_another_model_is_its_full_text_with_a_warning_or_refused(skill, place):
    other = skimlm.load(place / "model")
    with pytest.warns(UserWarning, match="made for another model: its full text is used"):
        other.add_skill(skill)
    told = []
    other.notice = told.append
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = other.generate("Where?", 2, skills=[skill]).skill_tokens
    assert taken == len(store.token_ids(other.tokenizer, skill.text)) and len(told) == 1
    with pytest.raises(SkimError, match="made for another model: compress the skill again"):
        skill.evaluate(other, questions=2, answer=4)


def test_inspect_and_export_say_what_the_command_line_says(small, tmp_path):
    facts = skimlm.inspect(small)
    assert facts["bits_per_weight"] <= 4 and facts["provenance"]["config"]["bits"] == 4
    report = skimlm.export(small, tmp_path / "dense", dtype="float32")
    assert isinstance(report, skimlm.ExportReport) and report.dtype == "float32"
    assert skimlm.load(tmp_path / "dense").generate("a", 2, raw=True).tokens == 2


def test_adapters_are_finetuned(place, tmp_path):
    options = QUICK | dict(rank=0.2, text=place / "notes.txt", cache_dir=place / "cache")
    skimlm.compress(place / "model", tmp_path / "out", **options)
    report = skimlm.finetune(
        tmp_path / "out",
        tmp_path / "tuned",
        place / "notes.txt",
        tokens=256,
        seq_len=32,
        cache_dir=place / "cache",
    )
    assert isinstance(report, skimlm.FinetuneReport) and report.tokens == 256


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda m, p: skimlm.compress(p / "model", p / "x", bitz=3), "no option 'bitz': allowed"),
        (lambda m, p: skimlm.compress(p / "model", p / "x", bits=99), "bits must be 1.5 to 8"),
        (lambda m, p: skimlm.compress(p / "nowhere", p / "x"), "nowhere"),
        (lambda m, p: skimlm.load(p / "nowhere"), "no such"),
        (lambda m, p: skimlm.inspect(p / "model"), "not a compressed folder"),
        (lambda m, p: skimlm.export(p / "model", p / "x"), "not a compressed folder"),
        (lambda m, p: skimlm.export(p / "small", p / "x", dtype="byte!"), "dtype must be"),
        (lambda m, p: skimlm.finetune(p / "small", p / "x", p, tokenz=1), "no option 'tokenz'"),
        (lambda m, p: m.generate("a", skills=["b"]), "no skill 'b': added are none"),
        (lambda m, p: m.perplexity("too short"), "text too short"),
        (lambda m, p: skimlm.Skill.load(p / "notes.txt"), "notes.txt"),
        (lambda m, p: skimlm.Skill.compress(p / "notes.txt", m), "front matter"),
        (lambda m, p: skimlm.Skill.compress(p / "SKILL.md", m, stepz=1), "no option 'stepz'"),
        (lambda m, p: skimlm.Skill.compress(p / "SKILL.md", m, method="x"), "method"),
        (
            lambda m, p: skimlm.Skill.compress(p / "SKILL.md", m, ratio=0.5, tokens=4),
            "give one of ratio and tokens",
        ),
    ],
)
def test_a_mistake_is_a_skim_error_in_one_line(call, told, model, place):
    with pytest.raises(SkimError) as caught:
        call(model, place)
    assert told in str(caught.value) and "\n" not in str(caught.value)
