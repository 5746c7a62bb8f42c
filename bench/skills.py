"""Skills as soft tokens: every method at every size, on questions nothing was trained on.

    python bench/skills.py --skills DIR --names a,b --out OUT.json --save DIR [--compressor FILE]

DIR holds files *NAME.md. A skill is distilled once, nested, up to half of its text; the .skim is
kept under --save. All of its resolutions and the untrained methods at the same sizes are then
scored on --questions test questions; what `adaptive` would have served follows from the dev
questions in the artefact. OUT.json has a row per skill and is written after each: what is there is
not run again, so names may be given a few at a time. OUT.md is the table of all of them.

Seconds are those of this process's CPU, since the machine may be shared; prefill is wall time,
median of five, with the load average beside it. Intervals: 95 %, bootstrap over skills, and over
questions within them.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

import torch

from provenance import provenance
from skimlm import checkpoint, demo
from skimlm.report import peak_rss_bytes
from skimlm.skills import adaptive, document, evaluate, select, store

SIZES = (32, 64, 128, 256)
METHODS = ("head", "sections", "selfinfo", "amortised", "distill")


def measure(model, tokenizer, file, args):
    """One skill: distilled, stored, all resolutions and baselines scored."""
    read = document.read(file)
    path = args.save / f"{file.stem}.skim"
    settings = adaptive.Settings(
        train=args.train, dev=args.dev, steps=args.steps, rows=args.rows, lr=args.lr
    )
    ids = adaptive.token_ids(tokenizer, read.text)
    started = time.process_time()
    if not path.exists():
        half = max(1, int(len(ids) * adaptive.MOST))
        made = adaptive.compress(
            model, tokenizer, read, method="distill", tokens=half, settings=settings,
            progress=lambda phase, done, total: print(read.name, phase, done, total, flush=True)
            if done % 10 == 0 else None,
        )  # fmt: skip
        made.evidence["cpu_seconds"] = time.process_time() - started
        store.write(path, made)
    skill = store.read(path)
    others, seconds = [], timed(model, tokenizer, read, ids)
    if args.compressor:
        started = time.process_time()
        most = min(SIZES[-1], len(ids) // 2)
        others = [
            adaptive.compress(
                model,
                tokenizer,
                read,
                method="amortised",
                tokens=most,
                compressor=args.compressor,
            )
        ]
        seconds["amortised"] = time.process_time() - started
    row = evaluate.measure(
        model, tokenizer, read, skill, args.questions, args.answer, True, file.name, others
    )
    row["method_seconds"] = seconds
    row["compress_cpu_seconds"] = skill.evidence["cpu_seconds"]
    row["dev"] = skill.evidence["rungs"]
    row["history"] = skill.evidence["history"]
    row["settings"] = skill.evidence["settings"]
    row["load_average"] = os.getloadavg()[0]
    row["peak_rss_bytes"] = peak_rss_bytes()
    row["provenance"] = provenance()
    return row


def timed(model, tokenizer, read, ids):
    """CPU seconds of the untrained methods at half of the text."""
    found = {}
    for method in select.METHODS:
        started = time.process_time()
        select.keep(model, tokenizer, read, len(ids) // 2, method)
        found[method] = time.process_time() - started
    return found


def served(row, target=0.9, floor=0.0):
    """What `adaptive` serves, chosen on dev questions, with its scores on the test questions."""
    chosen = adaptive.choose(row["dev"], target, floor)
    if chosen is None:
        full = {"method": "full text", "closure": 1.0, "tokens": row["text_tokens"]}
        return full | {"kl_sums": [0.0] * row["questions"], "literal_recall": 1.0, "k": None}
    return next(one for one in row["all"] if all(one[n] == chosen[n] for n in ("method", "k")))


def interval(rows, score, draws=2000):
    """95 % interval of the mean over skills of score(row, picks): skills and questions drawn."""
    chance, found = random.Random(0), []
    for _ in range(draws):
        some = [rows[chance.randrange(len(rows))] for _ in rows]
        values = []
        for row in some:
            count = len(row["kl_no_skill_sums"])
            values.append(score(row, [chance.randrange(count) for _ in range(count)]))
        found.append(statistics.fmean(values))
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def closing(one):
    """score(row, picks) for the entry that `one(row)` picks out."""

    def score(row, picks):
        kl, none = one(row)["kl_sums"], row["kl_no_skill_sums"]
        return 1 - sum(kl[i] for i in picks) / sum(none[i] for i in picks)

    return score


def table(rows):
    """Markdown of all rows."""
    strong = [row for row in rows if not row["weak"]]
    lines = [
        "| method | k | skills | tokens | closure | over head | recall | CPU s to compress |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def entry(method, k):
        return lambda row: next(
            o for o in row["all"] if o["method"] == method and (o["k"] == k if k else half(row, o))
        )

    for method in METHODS:
        for k in (*SIZES, None):
            have = [
                r
                for r in strong
                if any(o["method"] == method and k in (None, o["k"]) for o in r["all"])
            ]
            if not have or (method, k) == ("amortised", None):
                continue
            one, head = entry(method, k), entry("head", k)
            low, high = interval(have, closing(one))

            def gap(row, picks, one=one, head=head):
                return closing(one)(row, picks) - closing(head)(row, picks)

            less, more = interval(have, gap)
            recall = [one(r)["literal_recall"] for r in have]
            recall = [value for value in recall if value is not None]
            seconds = statistics.fmean(
                r["compress_cpu_seconds"] if method == "distill" else r["method_seconds"][method]
                for r in have
                if method != "head"
            ) if method != "head" else 0.0  # fmt: skip
            share = statistics.fmean(one(r)["tokens"] / r["text_tokens"] for r in have)
            mean = statistics.fmean(one(r)["closure"] for r in have)
            over = "" if method == "head" else f"{less:+.3f} to {more:+.3f}"
            lines.append(
                f"| {method} | {k or 'half'} | {len(have)} | {share:.0%} | {mean:.3f}"
                f" ({low:.3f} to {high:.3f}) | {over} |"
                f" {statistics.fmean(recall) if recall else float('nan'):.2f} | {seconds:.1f} |"
            )
    lines += ["", "What `adaptive` serves, chosen on dev questions, scored on test questions:", ""]
    lines += [
        "| skill | text | served | tokens | share | closure (test) | literal recall | KL no skill"
        " | prefill s cold: full, skill, none | warm: full, skill |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, s = served(row), row["seconds"]
        said = "-" if one["literal_recall"] is None else f"{one['literal_recall']:.2f}"
        lines.append(
            f"| {row['name']}{' (weak)' if row['weak'] else ''} | {row['text_tokens']}"
            f" | {one['method']} {one['k'] or ''} | {one['tokens']}"
            f" | {one['tokens'] / row['text_tokens']:.0%} | {one['closure']:.3f} | {said}"
            f" | {row['kl_no_skill']:.3f}"
            f" | {s['full_cold']:.2f}, {s['skill_cold']:.2f}, {s['none_cold']:.2f}"
            f" | {s['full_warm']:.3f}, {s['skill_warm']:.3f} |"
        )
    if strong:
        mean = statistics.fmean(served(row)["closure"] for row in strong)
        low, high = interval(strong, closing(served))
        share = statistics.fmean(served(r)["tokens"] / r["text_tokens"] for r in strong)
        packed = sum(served(row)["k"] is not None for row in strong)
        lines += [
            "",
            f"Mean closure {mean:.3f} ({low:.3f} to {high:.3f}) at {share:.0%} of the tokens;"
            f" {packed} of {len(strong)} skills compressed, the others count as full text.",
        ]
    return "\n".join(lines) + "\n"


def half(row, one):
    """Whether an entry is the largest of its method: half of the text."""
    return one["k"] == max(o["k"] for o in row["all"] if o["method"] == one["method"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--skills", type=Path, required=True)
    parser.add_argument("--names", required=True, help="comma separated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--compressor", help="what skill train made: its column is added")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--dev", type=int, default=24)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    args.save.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    wanted = [name for name in args.names.split(",") if name and name not in rows]
    model = tokenizer = None
    for name in wanted:
        file = next(iter(sorted(args.skills.glob(f"*{name}.md"))), None)
        if file is None:
            raise SystemExit(f"{args.skills}: no file *{name}.md")
        if model is None:
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            model, tokenizer = checkpoint.load(args.model or demo.model_file())
        rows[name] = measure(model, tokenizer, file, args)
        args.out.write_text(json.dumps(rows, indent=1))
    args.out.with_suffix(".md").write_text(table(list(rows.values())))
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
