"""The amortised compressor: what it starts from, what training does, its file, its command."""

import copy
import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from skill_sample import CHAT, TEXT, chat_tokenizer, skill_model
from skimlm.cli import main
from skimlm.errors import FormatError, SkimError
from skimlm.runtime.decode import CACHE
from skimlm.skills import compressor, rollout, select, soft, splice, store, train_compressor
from skimlm.skills.document import parse
from skimlm.skills.soft import rows_of

SMALL = train_compressor.Settings(
    steps=12,
    rows=3,
    questions=6,
    answer=6,
    ladder=(4, 12),
    rank=2,
    hidden=16,
    lr=3e-3,
    held=1,
    checks=3,
)


@pytest.fixture(scope="module")
def world():
    """A model, a tokenizer and the ids of a text."""
    tokenizer = chat_tokenizer()
    return skill_model(), tokenizer, splice.token_ids(tokenizer, TEXT)


def trained(model, tokenizer, seed=1):
    """A compressor in which every number does something."""
    made = compressor.begin(model, tokenizer, slots=16, rank=2, hidden=16)
    g = torch.Generator().manual_seed(seed)
    values = {n: 0.3 * torch.randn(v.shape, generator=g) for n, v in made.values.items()}
    return dataclasses.replace(made, values=values)


def leads(tokenizer, k, most=16):
    document = parse(TEXT)
    return select.section_leads(document, select.tokens(tokenizer, document.text)[1], k, most)


def test_untrained_it_is_the_beginnings_of_all_sections(world):
    model, tokenizer, ids = world
    made = compressor.begin(model, tokenizer, slots=40, rank=2, hidden=16)
    got = compressor.soft_tokens(made, model, tokenizer, ids, leads(tokenizer, 40, 40))
    kept = ids[select.keep(model, tokenizer, parse(TEXT), 40, "leads")]
    assert torch.equal(got, model.get_input_embeddings()(kept))
    assert torch.equal(got.bfloat16(), rows_of(model, kept))


def test_its_soft_tokens_are_those_of_a_model_with_the_adapters_merged(world):
    """Section by section: the text by the model as it is, the slots by the adapted one."""
    model, tokenizer, ids = world
    made = trained(model, tokenizer)
    merged = copy.deepcopy(model)
    parts = leads(tokenizer, 40)
    assert len(parts) == 4 and len(set(map(len, parts))) > 1
    want = []
    with torch.no_grad():
        for name, module in merged.get_decoder().named_modules():
            if f"{name}.a" in made.values:
                ab = made.values[f"{name}.b"] @ made.values[f"{name}.a"]
                module.weight += compressor.SCALE * ab
        table = merged.get_input_embeddings().weight
        chat = splice.token_ids(tokenizer, "<user>Relevant Skill:\n")
        for part in parts:
            text = model(input_ids=torch.cat([chat, ids])[None], use_cache=True).past_key_values
            words = table[ids[part]]
            slots = words + made.values["offset"][: len(part)]
            hidden = merged.get_decoder()(inputs_embeds=slots[None], **{CACHE: text})[0][0]
            unit = hidden / (hidden.square().mean(-1, keepdim=True) + compressor.EPSILON).sqrt()
            inner = unit @ made.values["in.weight"].T + made.values["in.bias"]
            moved = torch.nn.functional.gelu(inner) @ made.values["out.weight"].T / 4  # sqrt(16)
            want.append(words + moved)
        before = model(input_ids=ids[None]).logits
        got = compressor.soft_tokens(made, model, tokenizer, ids, parts)
        torch.testing.assert_close(got, torch.cat(want), atol=1e-4, rtol=1e-3)
        assert torch.equal(model(input_ids=ids[None]).logits, before)  # adapters are off again


def test_a_sections_first_are_what_fewer_would_be_and_all_see_the_whole_text(world):
    model, tokenizer, ids = world
    made = trained(model, tokenizer)
    many, few = leads(tokenizer, 50), leads(tokenizer, 38)
    with torch.no_grad():
        whole = compressor.soft_tokens(made, model, tokenizer, ids, many)
        some = compressor.soft_tokens(made, model, tokenizer, ids, few)
        places = torch.tensor(sum(many, []))
        same = whole[torch.isin(places, torch.tensor(sum(few, [])))]
        torch.testing.assert_close(same, some, atol=1e-5, rtol=1e-4)
        ids = ids.clone()
        ids[-1] = 65
        other = compressor.soft_tokens(made, model, tokenizer, ids, few)
    assert ((other - some).abs().amax(1) > 1e-5).all()


def test_an_example_is_trained_at_every_resolution(world):
    model, tokenizer, ids = world
    made = trained(model, tokenizer)
    text = parse(TEXT)
    ids = splice.token_ids(tokenizer, text.text)
    what = train_compressor.Example(text, ids, None, None)
    with torch.no_grad():
        prefixes = train_compressor._prefixes(model, tokenizer, made, what, [4, 12])
        assert list(prefixes) == [4, 12]
        for k, prefix in prefixes.items():
            soft = compressor.soft_tokens(made, model, tokenizer, ids, leads(tokenizer, k))
            alone = rollout.read(model, splice.opening(tokenizer, [[soft]]))
            assert prefix.length == alone.length
            keys = [p.cache.layers[1].keys for p in (prefix, alone)]
            torch.testing.assert_close(*keys, atol=1e-4, rtol=1e-3)


def test_steps_take_the_resolutions_in_turn(world, skills, tmp_path, monkeypatch):
    model, tokenizer, _ = world
    trained_at, real = [], train_compressor.distill.backward_divergence

    def recording(model, prefixes, *rest):
        trained_at.append(list(prefixes))
        return real(model, prefixes, *rest)

    monkeypatch.setattr(train_compressor.distill, "backward_divergence", recording)
    train_compressor.train(model, tokenizer, skills, tmp_path, settings=SMALL)
    assert trained_at == [[4], [12]] * (SMALL.steps // 2)


def test_training_goes_on_from_another_compressor(world, skills, tmp_path):
    model, tokenizer, _ = world
    first = train_compressor.train(model, tokenizer, skills, tmp_path, settings=SMALL)
    more = train_compressor.train(model, tokenizer, skills, tmp_path, settings=SMALL, start=first)
    assert more.facts["held_out_kl"][0] == pytest.approx(min(first.facts["held_out_kl"]), rel=1e-4)
    assert min(more.facts["held_out_kl"]) <= min(first.facts["held_out_kl"])
    assert more.facts["start"] == first.facts and first.facts["start"] is None
    other = dataclasses.replace(first, made_for=first.made_for | {"model": "0" * 64})
    with pytest.raises(SkimError, match="was trained for another model"):
        train_compressor.train(model, tokenizer, skills, tmp_path, settings=SMALL, start=other)


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    """Four skills in a folder."""
    folder = tmp_path_factory.mktemp("skills")
    for i, word in enumerate(("notes", "plants", "letters", "tools")):
        (folder / f"{word}.md").write_text(
            TEXT.replace("notes", word) + f"\n## More\n\nThere are {i + 3} kinds of {word}.\n"
        )
    return sorted(folder.iterdir())


def test_training_lowers_the_divergence_on_skills_it_does_not_see(world, skills, tmp_path):
    model, tokenizer, _ = world
    before = copy.deepcopy(model.state_dict())
    settings = dataclasses.replace(SMALL, steps=40, lr=1e-2)
    made = train_compressor.train(model, tokenizer, skills, tmp_path, settings=settings)
    losses = made.facts["held_out_kl"]
    assert len(losses) == 4 and min(losses) < 0.97 * losses[0]
    assert len(made.facts["skills"]) == 3 and len(made.facts["held_out"]) == 1
    assert not set(made.facts["skills"]) & set(made.facts["held_out"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    # what is kept is what measured least
    text = train_compressor.texts(skills, tokenizer, 1)[1]
    examples = [train_compressor.make_example(model, tokenizer, t, settings) for t in text]
    again = train_compressor._measure(model, tokenizer, made, made.values, examples, settings)
    assert again == pytest.approx(min(losses), rel=1e-4)


def test_a_stopped_training_goes_on_to_the_same_result(world, skills, tmp_path):
    model, tokenizer, _ = world
    whole = train_compressor.train(model, tokenizer, skills, tmp_path / "a", settings=SMALL)

    class Stop(Exception):
        pass

    for phase, at in (("study", 2), ("train", 6), ("train", 11)):

        def stop(now, done, _total, phase=phase, at=at):
            if (now, done) == (phase, at):
                raise Stop

        with pytest.raises(Stop):
            train_compressor.train(
                model, tokenizer, skills, tmp_path / "b", settings=SMALL, progress=stop
            )
    again = train_compressor.train(model, tokenizer, skills, tmp_path / "b", settings=SMALL)
    assert again.facts == whole.facts
    assert all(torch.equal(again.values[n], v) for n, v in whole.values.items())


def test_examples_are_made_once_for_all_trainings(world, skills, tmp_path, monkeypatch):
    model, tokenizer, _ = world
    train_compressor.train(model, tokenizer, skills[1:], tmp_path, settings=SMALL)
    asked, real = [], train_compressor.make_example

    def recording(model, tokenizer, text, settings):
        asked.append(text.sha256)
        return real(model, tokenizer, text, settings)

    monkeypatch.setattr(train_compressor, "make_example", recording)
    more = dataclasses.replace(SMALL, steps=1, lr=1e-2)
    made = train_compressor.train(model, tokenizer, skills, tmp_path, settings=more)
    new = train_compressor.texts(skills[:1], tokenizer, 0)[0]
    assert asked == [text.sha256 for text in new]
    alone = train_compressor.train(model, tokenizer, skills, tmp_path / "alone", settings=more)
    assert all(torch.equal(made.values[n], v) for n, v in alone.values.items())
    train_compressor.train(
        model, tokenizer, skills, tmp_path, settings=dataclasses.replace(more, seed=1)
    )
    assert len(asked) > 2 * len(new) + len(skills)


def test_long_skills_become_chunks_and_nothing_of_them_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(train_compressor, "LONGEST", 200)
    tokenizer = chat_tokenizer()
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.md")
        more = "".join(f"\n## Part {j} of {i}\n\n" + "word " * 30 for j in range(5))
        more += "\n## One line\n\n" + "long " * 300
        files[-1].write_text(TEXT + more)
    learned, held = train_compressor.texts(files, tokenizer, 1)
    for parts in (learned, held):
        assert len(parts) > 3
        sizes = [len(splice.token_ids(tokenizer, p.text)) for p in parts]
        # a line of more than two chunks is cut in half, and again
        assert max(sizes) <= 400 and sum(size > 200 for size in sizes) >= 2
        assert "".join(p.text for p in parts).strip() in [f.read_text().strip() for f in files]
    with pytest.raises(SkimError, match="2 skills to train on: more than 4 are needed"):
        train_compressor.texts(files, tokenizer, 4)


def test_the_file_keeps_what_it_is_given(world, tmp_path):
    model, tokenizer, ids = world
    made = dataclasses.replace(trained(model, tokenizer), facts={"held_out_kl": [1.0]})
    compressor.write(tmp_path / "c.safetensors", made)
    back = compressor.read(tmp_path / "c.safetensors")
    assert back.facts == made.facts and back.made_for == made.made_for
    assert all(torch.equal(back.values[n], v.bfloat16().float()) for n, v in made.values.items())
    compressor.check_fits(back, model, tokenizer, "c")
    with pytest.raises(SkimError, match="c: was trained for another model: train one with"):
        compressor.check_fits(back, skill_model("qwen3"), tokenizer, "c")


def nan(tensors):
    tensors["offset"][0, 0] = float("nan")


DAMAGE = {
    "is missing": lambda t: t.pop("in.bias"),
    "offset: is not all finite": nan,
    "does not belong": lambda t: t.update(other=torch.zeros(2, 2)),
    r"out.weight: shape \[16, 64\], should be": lambda t: t.update(
        {"out.weight": t["out.weight"].T.contiguous()}
    ),
}


@pytest.mark.parametrize("match", DAMAGE)
def test_damaged_files_are_refused(world, tmp_path, match):
    model, tokenizer, _ = world
    file = tmp_path / "c.safetensors"
    compressor.write(file, trained(model, tokenizer))
    tensors = load_file(file)
    meta = {
        compressor.KEY: json.dumps(
            {"format_version": 1, "made_for": store.fingerprints(*world[:2])}
        )
    }
    DAMAGE[match](tensors)
    save_file(tensors, file, meta)
    with pytest.raises(FormatError, match=match):
        compressor.read(file)


def test_files_of_another_kind_are_refused(tmp_path):
    file = tmp_path / "c.safetensors"
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(FormatError, match="is not a compressor"):
        compressor.read(file)
    save_file({"x": torch.zeros(2)}, file, {compressor.KEY: "{"})
    with pytest.raises(FormatError, match="damaged metadata"):
        compressor.read(file)
    file.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="no readable file"):
        compressor.read(file)


def run(*args: object):
    return CliRunner().invoke(main.main, [str(arg) for arg in args], prog_name="skimlm")


def test_the_command_trains_and_compress_uses_it(skills, tokenizer, tmp_path, monkeypatch):
    folder, out = tmp_path / "model", tmp_path / "c.safetensors"
    skill_model(dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    monkeypatch.setattr(train_compressor, "Settings", lambda: SMALL)
    made = run("skill", "train", out, "--model", folder, "--skills", skills[0].parent, "--json")
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert facts["skills"] == 3 and facts["bytes"] == out.stat().st_size
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c.safetensors", "model"]
    again = run("skill", "train", out, "--model", folder, "--skills", skills[0].parent)
    assert again.exit_code == 1 and "exists, use --force" in again.stderr
    weights = folder / "model.safetensors"  # of the model: skimlm did not write that
    before = weights.read_bytes()
    again = run("skill", "train", weights, "--model", folder, "--skills", skills[0], "--force")
    assert again.exit_code == 1 and "was not written by skimlm" in again.stderr
    assert weights.read_bytes() == before
    train = ("skill", "train", tmp_path / "d.safetensors", "--model", folder)
    more = run(*train, "--skills", skills[0].parent, "--compressor", out)
    assert more.exit_code == 0, more.output
    begun = compressor.read(tmp_path / "d.safetensors").facts["start"]
    assert begun == compressor.read(out).facts
    compress = ("skill", "compress", skills[0], tmp_path / "a.skim", "--model", folder)
    without = run(*compress, "--method", "amortised")
    line = "error: no compressor comes with skimlm for this model: train one (skimlm skill train)"
    assert without.exit_code == 1 and without.stderr.splitlines()[-1].startswith(line)
    done = run(*compress, "--method", "amortised", "--compressor", out, "--tokens", 8, "--json")
    assert done.exit_code == 0, done.output
    skill = store.read(tmp_path / "a.skim")
    assert (skill.method, skill.k, len(skill.content.vectors)) == ("amortised", 8, 8)
    many = run(*compress, "--method", "amortised", "--compressor", out, "--tokens", 400, "--force")
    assert many.exit_code == 1 and "makes at most 60 of this skill" in many.stderr
    said = run("generate", folder, "Sort?", "--skill", tmp_path / "a.skim", "--max-new-tokens", 3)
    assert said.exit_code == 0, said.output


def test_one_that_comes_with_the_package_needs_no_file(world, tmp_path, monkeypatch):
    model, tokenizer, ids = world
    other = skill_model("qwen3")
    compressor.write(tmp_path / "a.safetensors", trained(other, tokenizer))
    made = trained(model, tokenizer)
    compressor.write(tmp_path / "b.safetensors", made)
    monkeypatch.setattr(compressor, "SHIPPED", tmp_path)
    skill = soft.compress(model, tokenizer, parse(TEXT), method="amortised", tokens=8)
    with torch.no_grad():
        made = compressor.read(tmp_path / "b.safetensors")
        ids = splice.token_ids(tokenizer, parse(TEXT).text)
        want = compressor.soft_tokens(made, model, tokenizer, ids, leads(tokenizer, 8)).bfloat16()
    assert torch.equal(skill.content.vectors, want)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(SkimError, match="no compressor comes with skimlm for this model"):
        soft.compress(model, tokenizer, parse(TEXT), method="amortised", tokens=8)


@pytest.mark.parametrize("file", sorted(compressor.SHIPPED.glob("*.safetensors")), ids=str)
def test_what_comes_with_the_package_is_small_whole_and_described(file):
    assert file.stat().st_size <= 10_000_000
    made = compressor.read(file)
    assert min(made.facts["held_out_kl"]) < made.facts["held_out_kl"][0]
    card = file.with_suffix(".md").read_text()
    assert card.startswith(f"# {file.name}\n")
    for number in (made.facts["held_out_kl"][0], min(made.facts["held_out_kl"])):
        assert f"{number:.4f}" in card
    assert f"{made.facts['lessons']} chunks of {len(made.facts['skills'])} SKILL.md" in card
