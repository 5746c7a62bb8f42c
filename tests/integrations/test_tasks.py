"""Accuracy on tasks: lm-eval's answers against log-likelihoods added up by hand."""

import json

import pytest
import torch
from click.testing import CliRunner

from conftest import byte_tokenizer, quantized_linears, tiny_model
from skimlm.cli.main import main
from skimlm.errors import SkimError
from skimlm.integrations.lm_eval import accuracy, read_task
from skimlm.models.checkpoint import load
from skimlm.models.write import save

pytest.importorskip("lm_eval")
QA = [
    {"query": f"Question {i}?", "choices": [f"word {i * k % 7}{k}" for k in range(2 + i % 3)]}
    for i in range(9)
]
GAPS = [
    {"sentence": f"The fox {i} saw _ in the wood {i}.", "option1": "a hen", "option2": f"dog {i}"}
    for i in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("qa", QA), ("gaps", GAPS)):
        lines = [json.dumps(row | {"gold": i % 2}) for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    dense = tiny_model(dtype=torch.float32)
    quantized = quantized_linears(dense)
    save(folder / "small", dense, byte_tokenizer(), quantized, embed_bits=8, bits=4.5)
    return folder


@torch.no_grad()
def log_likelihood(model, tokenizer, context, text):
    """log p(text | context), token by token."""
    ids = tokenizer(context + text, add_special_tokens=False).input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logp[at - 1, ids[at]] for at in range(start, len(ids))))


def test_the_likeliest_choice_is_the_answer(folder):
    model, tokenizer = load(folder / "small", torch.float32)
    tasks = {name: read_task(folder, name) for name in ("qa", "gaps")}
    found = accuracy(model, tokenizer, tasks, batch=2)
    right = {"qa": 0, "gaps": 0}
    for row in tasks["qa"]:
        scores = [log_likelihood(model, tokenizer, row["query"], " " + c) for c in row["choices"]]
        right["qa"] += scores.index(max(scores)) == row["gold"]
    for row in tasks["gaps"]:
        before, _, after = row["sentence"].partition("_")
        scores = [
            log_likelihood(model, tokenizer, before + row[option], " " + after.strip())
            for option in ("option1", "option2")
        ]
        right["gaps"] += scores.index(max(scores)) == row["gold"]
    assert 0 < right["qa"] < len(QA)  # else the test could not tell
    for name, rows in tasks.items():
        acc = right[name] / len(rows)
        assert found[name]["acc"] == pytest.approx(acc) and found[name]["n"] == len(rows)
        assert found[name]["stderr"] == pytest.approx((acc * (1 - acc) / (len(rows) - 1)) ** 0.5)


def test_the_command_prints_accuracies_alone_or_with_perplexity(folder):
    command = ["eval", str(folder / "small"), "--tasks", "qa", "--task-dir", str(folder), "--json"]
    facts = json.loads(CliRunner().invoke(main, command).stdout)
    assert set(facts["tasks"]["qa"]) == {"acc", "stderr", "n"} and "perplexity" not in facts
    (folder / "text.txt").write_text("abc " * 200)
    command += ["--text", str(folder / "text.txt"), "--seq-len", "64", "--limit", "2"]
    facts = json.loads(CliRunner().invoke(main, command).stdout)
    assert facts["tasks"]["qa"]["n"] == 9 and facts["windows"] == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"query": "a", "choices": ["b"], "gold": 1}', "line 1: a row needs query"),
        ('{"query": "a", "choices": ["b", " "], "gold": 0}', "line 1: a row needs query"),
        ('{"sentence": "a _ b _", "option1": "c", "option2": "d", "gold": 0}', "with one _"),
        ("not json", "line 1"),
        ("", "is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, error):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(SkimError, match=error):
        read_task(tmp_path, "bad")


def test_an_unknown_task_is_named_with_those_there_are(folder):
    with pytest.raises(SkimError, match="no such task; this folder has gaps, qa"):
        read_task(folder, "quiz")
