"""What a folder of skills costs, counted by hand."""

import json

import pytest
import torch
from click.testing import CliRunner

from skill_sample import TEXT, chat_tokenizer, skill_model
from skimlm.cli import main
from skimlm.errors import SkimError
from skimlm.skills import compression, cost, store
from skimlm.skills.document import parse

OTHER = "---\nname: other\ndescription: Does less.\n---\nDo it.\n"


@pytest.fixture
def folder(tmp_path):
    for name, text in (("tidy", TEXT), ("other", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "SKILL.md").write_text(text)
    return tmp_path


def test_tokens_are_those_of_the_tokenizer(folder):
    found = cost.cost([folder], chat_tokenizer(), requests=100, used=0.5)
    lines = [  # a byte is a token
        "- **tidy-notes**: Sort loose notes into files. Use when: a folder of notes is a mess.\n",
        "- **other**: Does less.\n",
    ]
    assert found["catalogue"] == sum(map(len, lines)) and not found["estimated"]
    assert found["text"] == len(TEXT.rstrip()) + len(OTHER.rstrip())
    mean = found["text"] / 2
    assert found["request"] == found["catalogue"] + round(mean / 2)
    assert found["month"]["catalogue"] == 100 * found["catalogue"]
    assert found["month"]["text"] == round(50 * mean)
    assert found["month"]["kv"] == round(cost.SHARES["kv"] * round(50 * mean))


def test_without_a_model_tokens_are_estimated_and_said_to_be(folder):
    found = cost.cost([folder])
    assert found["estimated"]
    assert found["skills"][0]["text"] == -(-len(OTHER.rstrip()) // cost.BYTES)
    assert "estimated by bytes: --model counts them" in cost.text(found)


def test_what_is_compressed_beside_a_skill_is_looked_at(folder):
    model, tokenizer = skill_model(dtype=torch.bfloat16), chat_tokenizer()
    made = compression.compress(
        model, tokenizer, parse(TEXT), tokens=30, settings=dict(train=4, dev=2, answer=4)
    )
    store.write(folder / "tidy" / "a.skim", made)
    (folder / "other" / "b.skim").write_bytes(b"broken")
    rows = {row["name"]: row for row in cost.cost([folder])["skills"]}
    assert rows["other"]["compressed"] is None
    found = rows["tidy-notes"]["compressed"]
    assert (found["kind"], found["tokens"]) == ("kv", 30)
    assert found["bytes"] == (folder / "tidy" / "a.skim").stat().st_size


def test_a_file_that_is_no_skill_is_named_not_counted(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "SKILL.md").write_text("no front matter")
    found = cost.cost([folder])
    assert len(found["skills"]) == 2 and "no front matter" in found["unread"][0]
    with pytest.raises(SkimError, match="no front matter"):
        cost.cost([folder / "bad"])
    with pytest.raises(SkimError, match="no skills"):
        (folder / "empty").mkdir()
        cost.cost([folder / "empty"])


def test_the_command_prints_a_table_or_one_object(folder):
    def run(*more):
        return CliRunner().invoke(main.main, ["skill", "cost", str(folder), *more])

    result = run()
    assert result.exit_code == 0 and "names and descriptions" in result.stdout
    facts = json.loads(run("--json", "--requests", "7").stdout)
    assert facts["requests"] == 7 and len(facts["skills"]) == 2
