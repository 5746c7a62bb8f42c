"""Skills on unseen questions: what `skill compress` serves, or all methods of soft tokens.

    python bench/skills.py --skills DIR --names a,b --out OUT.json --save DIR [--kind soft]
    python bench/skills.py --methods [--fast] ...

DIR holds files *NAME.md. A skill is compressed as `skimlm skill compress` does by default; with
--methods it is instead distilled nested up to 256 tokens, or half of its text (with --fast it is
not), and compared with all other methods at all sizes. The .skim files are kept under --save. All
is scored on --questions test questions. OUT.json has a row per skill and is written after each:
what is there is not run again, so names may be given a few at a time. OUT.md is the table of all,
OUT.svg a plot of all methods.

Seconds are those of this process's CPU, one thread, since the machine may be shared; prefill is the
median of five. Intervals: 95 %, bootstrap over skills, and over questions within them.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import time
from pathlib import Path

import torch

from provenance import provenance
from skimlm.cli import demo
from skimlm.models import load
from skimlm.progress import peak_rss_bytes
from skimlm.skills import compression, document, evaluate, select, soft, splice, store

SIZES = (32, 64, 128, 256)
METHODS = ("head", "leads", "sections", "selfinfo", "amortised", "nested")


def measure(model, tokenizer, file, args):
    """One skill as the default command serves it."""
    read = document.read(file)
    path = args.save / f"{file.stem}{'.pin' if args.pin else ''}.skim"
    served = made(model, tokenizer, read, path, kind=args.kind, pin=args.pin)
    evidence = served.evidence
    return scored(model, tokenizer, read, served, (), path, args) | {
        "served": served.k,
        "cpu_seconds": evidence["cpu_seconds"],
        "dev": evidence["candidates"],
        "trainings": evidence.get("trainings"),
        "settings": evidence["settings"],
    }


def compare(model, tokenizer, file, args):
    """One skill by all methods at all sizes."""
    read = document.read(file)
    ids = soft.token_ids(tokenizer, read.text)
    half = soft.resolutions(len(ids), splice.wrapper_tokens(tokenizer))[-1]
    most = min(SIZES[-1], half)
    seconds = timed(model, tokenizer, read, ids)
    others, trainings, ladder = [], [], soft.nest(most)
    started = time.process_time()
    for k in ladder:
        how = {"method": "amortised", "compressor": args.compressor, "tokens": k}
        others.append(soft.compress(model, tokenizer, read, **how))
    seconds["amortised"] = (time.process_time() - started) / len(ladder)
    if not args.fast:
        path = args.save / f"{file.stem}.nested.skim"
        nested = made(model, tokenizer, read, path, method="distill", tokens=most)
        others.append(dataclasses.replace(nested, method="nested"))
        seconds["nested"] = nested.evidence["cpu_seconds"]
        trainings = nested.evidence["trainings"]
    row = scored(model, tokenizer, read, None, others, file, args)
    return row | {"method_seconds": seconds, "trainings": trainings}


def scored(model, tokenizer, read, skill, others, file, args):
    """What `skimlm skill eval` measures, in CPU seconds, with where it was measured."""
    row = evaluate.measure(
        model,
        tokenizer,
        read,
        skill,
        args.questions,
        args.answer,
        bool(others),
        str(file),
        others,
        time.process_time,
    )
    row["file"] = Path(row["file"]).name
    return row | {"peak_rss_bytes": peak_rss_bytes(), "provenance": provenance()}


def rounded(what):
    """Floats to seven digits: rows are kept in the repository."""
    if isinstance(what, float):
        return float(f"{what:.7g}")
    if isinstance(what, dict):
        return {key: rounded(value) for key, value in what.items()}
    return [rounded(value) for value in what] if isinstance(what, (list, tuple)) else what


def made(model, tokenizer, read, path, **how):
    """A .skim under --save, compressed if it is not there."""
    if not path.exists():
        started = time.process_time()
        skill = compression.compress(model, tokenizer, read, progress=tell(read.name), **how)
        skill.evidence["cpu_seconds"] = time.process_time() - started
        store.write(path, skill)
    return store.read(path)


def tell(name):
    def progress(phase, done, total):
        if done % 10 == 0:
            print(name, phase, done, total, flush=True)

    return progress


def timed(model, tokenizer, read, ids):
    """CPU seconds of the untrained methods at half of the text."""
    found = {}
    for method in select.METHODS:
        started = time.process_time()
        select.keep(model, tokenizer, read, len(ids) // 2, method)
        found[method] = time.process_time() - started
    return found


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


def table_of_methods(rows):
    """Markdown of all methods and sizes: means over skills that have the size."""
    lines = [
        "| method | k | skills | tokens | closure | over head | recall | CPU s to compress |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for k in SIZES:
            if have := having(rows, method, k):
                lines.append(line(have, method, k))
    return "\n".join(lines) + "\n"


def having(rows, method, k):
    """Rows that have a method at a size, and a skill that does something."""
    return [r for r in rows if not r["weak"] and any(fits(o, method, k) for o in r["all"])]


def entry(method, k):
    """row -> its entry of a method at a size."""
    return lambda row: next(o for o in row["all"] if fits(o, method, k))


def draw(rows, file):
    """Mean closure with its interval against k, a line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in METHODS:
        points = []
        for k in SIZES:
            if have := having(rows, method, k):
                one = entry(method, k)
                mean = statistics.fmean(one(row)["closure"] for row in have)
                points.append((k, mean, *interval(have, closing(one))))
        if points:
            x, mean, low, high = zip(*points, strict=True)
            axes.plot(x, mean, "o-", label=method)
            axes.fill_between(x, low, high, alpha=0.12)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, SIZES)
    axes.set(xlabel="tokens in place of the text", ylabel="closure on unseen questions")
    axes.legend()
    figure.savefig(file)


def table(rows):
    """Markdown of what the default command serves, chosen on dev questions, on test questions."""
    strong = [row for row in rows if not row["weak"]]
    lines = [
        "| skill | text | served | tokens | share | closure, 95 % | literal recall | KL no skill"
        " | answers as with the text: the same, their literals | bytes"
        " | CPU s to compress | first token, CPU s, cold: full, skill, none | warm: full, skill |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        s, (low, high) = row["seconds"], row["closure_95"]
        keys = ("literal_recall", "answers_equal", "answers_literals")
        said, same, words = ("-" if row[k] is None else f"{row[k]:.2f}" for k in keys)
        lines.append(
            f"| {row['name']}{' (weak)' if row['weak'] else ''} | {row['text_tokens']}"
            f" | {row['method']} {row['served'] or ''} | {row['tokens']}"
            f" | {row['tokens'] / row['text_tokens']:.0%}"
            f" | {row['closure']:.3f} ({low:.3f} to {high:.3f}) | {said}"
            f" | {row['kl_no_skill']:.3f} | {same}, {words} | {row['bytes']:,}"
            f" | {row['cpu_seconds']:.0f}"
            f" | {s['full_cold']:.2f}, {s['skill_cold']:.2f}, {s['none_cold']:.2f}"
            f" | {s['full_warm']:.3f}, {s['skill_warm']:.3f} |"
        )
    packed = [row for row in strong if row["served"]]
    lines.append("")
    for name, some in (("compressed", packed), ("all, full text counted as it is", strong)):
        if some:
            low, high = interval(some, closing(lambda row: row))
            lines.append(
                f"{len(some)} of {len(strong)} skills, {name}: mean closure"
                f" {statistics.fmean(row['closure'] for row in some):.3f} ({low:.3f} to {high:.3f})"
                f" at {statistics.fmean(r['tokens'] / r['text_tokens'] for r in some):.0%} of the"
                " tokens, median"
                f" {statistics.median(r['cpu_seconds'] for r in some):.0f} CPU s to compress."
            )
    return "\n".join(lines) + "\n"


def fits(one, method, k):
    """Whether an entry is of a method and a size."""
    return one["method"] == method and one["k"] == k


def line(rows, method, k):
    """A method at one size: means over skills."""
    one, head = entry(method, k), entry("head", k)

    def gap(row, picks):
        return closing(one)(row, picks) - closing(head)(row, picks)

    low, high = interval(rows, closing(one))
    less, more = interval(rows, gap)
    recall = [one(r)["literal_recall"] for r in rows if one(r)["literal_recall"] is not None]
    seconds = statistics.fmean(row["method_seconds"][method] for row in rows)
    share = statistics.fmean(one(row)["tokens"] / row["text_tokens"] for row in rows)
    mean = statistics.fmean(one(row)["closure"] for row in rows)
    return (
        f"| {method} | {k} | {len(rows)} | {share:.0%} | {mean:.3f}"
        f" ({low:.3f} to {high:.3f}) | {less:+.3f} to {more:+.3f} |"
        f" {statistics.fmean(recall) if recall else float('nan'):.2f} | {seconds:.1f} |"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--skills", type=Path, required=True)
    parser.add_argument("--names", required=True, help="comma separated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--compressor", help="what skill train made, not the one in the package")
    parser.add_argument("--kind", default="kv", choices=compression.KINDS)
    parser.add_argument("--pin", action="store_true", help="as skill compress --pin does")
    parser.add_argument("--fast", action="store_true", help="with --methods: nothing is trained")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--methods", action="store_true", help="not the default: all methods")
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
            model, tokenizer = load(args.model or demo.model_file())
        rows[name] = (compare if args.methods else measure)(model, tokenizer, file, args)
        lines = (f"{json.dumps(key)}: {json.dumps(rounded(row))}" for key, row in rows.items())
        args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    shown = (table_of_methods if args.methods else table)(list(rows.values()))
    args.out.with_suffix(".md").write_text(shown)
    if args.methods:
        draw(list(rows.values()), args.out.with_suffix(".svg"))
    print(shown)


if __name__ == "__main__":
    main()
