"""Accuracy on multiple-choice tasks: lm-eval scores, this hands it the rows of a .jsonl file.

A row is {query, choices, gold}: the choice whose text is likeliest after the query wins; or
{sentence, option1, option2, gold} with a gap `_` (Winogrande): the option that makes what follows
the gap likeliest wins. `gold` counts from 0. No task definitions and no data are downloaded.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skimlm.errors import SkimError


def read_task(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """Read and check the rows of `folder/name.jsonl`."""
    path = Path(folder) / f"{name}.jsonl"
    if not path.is_file():
        known = sorted(file.stem for file in Path(folder).glob("*.jsonl"))
        raise SkimError(f"{path}: no such task; this folder has {', '.join(known) or 'none'}")
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if "sentence" in row:
                choices = [row["option1"], row["option2"]]
                good = row["sentence"].count("_") == 1
            else:
                choices = row["choices"]
                good = isinstance(row["query"], str)
            good = good and 0 <= row["gold"] < len(choices) and all(map(str.strip, choices))
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise SkimError(
                f"{path}, line {number}: a row needs query, choices and gold, or sentence with one "
                "_, option1, option2 and gold"
            )
        keys = ("query", "choices", "gold", "sentence", "option1", "option2")
        rows.append({key: row[key] for key in keys if key in row})
    if not rows:
        raise SkimError(f"{path}: is empty")
    return rows


def accuracy(
    model: Any, tokenizer: Any, tasks: dict[str, list[dict[str, Any]]], batch: int = 8
) -> dict[str, dict[str, float]]:
    """Accuracy, its standard error and the number of rows of every task, {name: rows}."""
    try:
        import datasets
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SkimError(f"tasks need lm-eval ({error}): run `pip install lm-eval`") from None

    def config(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        gap = "sentence" in rows[0]
        return {
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(list(rows))},
            "test_split": "test",
            "output_type": "multiple_choice",
            # an index as text: the choices are contexts, and the target what follows all of them
            "doc_to_text": (lambda d: d["gold"]) if gap else (lambda d: d["query"]),
            "doc_to_choice": _openings if gap else (lambda d: d["choices"]),
            "doc_to_target": _rest if gap else (lambda d: d["gold"]),
            "metric_list": [{"metric": "acc"}],
        }

    device = str(next(model.parameters()).device)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=device),
        tasks=[config(name, rows) for name, rows in tasks.items()],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    result = {}
    for name, rows in tasks.items():
        acc = float(found["results"][name]["acc,none"])
        stderr = (acc * (1 - acc) / max(len(rows) - 1, 1)) ** 0.5  # of a mean of zeros and ones
        result[name] = {"acc": acc, "stderr": stderr, "n": len(rows)}
    return result


def _openings(row: dict[str, Any]) -> list[str]:
    before = row["sentence"].partition("_")[0]
    return [before + row["option1"], before + row["option2"]]


def _rest(row: dict[str, Any]) -> str:
    return row["sentence"].partition("_")[2].strip()
