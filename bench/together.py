"""Skills in front of the model together: what each keeps of its own text alone, by texts and packs.

    python bench/together.py FILES.skim --model MODEL --out OUT.json

FILES, of kind kv, are taken in their order in groups of 1, 2, 4 and 8. Of every skill of a group
--questions test questions are asked; closure is to its own full text alone. "texts": the full texts
one after the other; "packs": keys and values side by side (skills/front.py). OUT.json has every
skill's closure.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import torch

from provenance import provenance
from skimlm.models import load
from skimlm.skills import distill, evaluate, front, gate, rollout, splice, store


def prepared(model, tokenizer, file, args):
    """A skill, its text's ids, and what the model says to questions behind the text alone."""
    skill = store.read(file)
    ids = splice.token_ids(tokenizer, skill.document.text)
    with torch.no_grad():
        text = rollout.read(model, splice.opening(tokenizer, [[ids]]))
    seed = evaluate.SEED
    test = distill.study(
        model, tokenizer, skill.document, text, "test", args.questions, args.answer, seed
    )
    return skill, ids, test, sum(gate.without(model, tokenizer, test))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--answer", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, tokenizer = load(args.model)
    skills = [prepared(model, tokenizer, file, args) for file in args.files]
    found = {"provenance": provenance(), "skills": [skill.name for skill, *_ in skills]}
    for count in (1, 2, 4, 8):
        for begin in range(0, len(skills) - count + 1, count):
            some = skills[begin : begin + count]
            stands = {
                "texts": [[ids] for _, ids, _, _ in some],
                "packs": [store.standing(skill, tokenizer) for skill, *_ in some],
            }
            for name, each in stands.items():
                prefix = front.before(model, tokenizer, each)
                closures = [
                    1 - sum(distill.divergences(model, prefix, test)) / none
                    for _, _, test, none in some
                ]
                found.setdefault(f"{name} {count}", []).extend(closures)
        for name in ("texts", "packs"):
            values = found.get(f"{name} {count}")
            if values:
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                print(f"{count} {name}: {statistics.fmean(values):.3f} +- {error:.3f}", flush=True)
        args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
