"""SLiM's table: perplexity and accuracy of pruned, rounded and adapted weights, all bits counted.

    python bench/slim.py --data DIR --out results [--rows 2:4,none] [--methods slim,best]

DIR holds calib/c4_1480docs.jsonl, wikitext2/test.txt (customary text) and tasks/*.jsonl. Every row
is made and measured in this process: calibration windows, evaluation windows and task rows are the
same for all. Results are written to OUT.json after every row, and to OUT.md; rows that are there
already are not run again, and two processes may fill one table (each writes its own --out).

All methods go block by block, inputs coming from the compressed blocks before. Embeddings stay
bfloat16 while measured; `bytes` is what the whole folder takes with 8-bit embeddings. The
reference model's linears were 4-bit numbers in groups of 32 once: grids of 4 bits are flattered.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import torch

from provenance import provenance
from skimlm import blockwise, checkpoint, demo, evaluate
from skimlm.calibrate import read_documents, windows
from skimlm.compress import SLIM_RECIPES
from skimlm.integrations.lm_eval import accuracy, read_task
from skimlm.weights.mask import Sparsity
from skimlm.weights.pack import Parts, effective, histogram, row_bits, shared_bits
from skimlm.weights.slim import Options, fit, fit_paper

TASKS = ("piqa", "arc_easy", "winogrande", "openbookqa")
PAPER = Options(bits=4, group=0, quantizer="slim")
GROUPED = dataclasses.replace(PAPER, group=128, quantizer="absmax", rank=0)
METHODS = {
    "Wanda + group AbsMax": GROUPED,
    "SparseGPT + GPTQ": dataclasses.replace(GROUPED, mask="sparsegpt"),
    "Naive-LoRA": dataclasses.replace(PAPER, adapter="naive", adapter_bits=16),
    "SLiM-LoRA": dataclasses.replace(PAPER, adapter_bits=16),
    "SLiM-LoRA^Q": PAPER,
    "full Gram, one pass": dataclasses.replace(PAPER, adapter="gram", group=128, quantizer="error"),
    "joint, int4 grid g128": Options(bits=4, group=128, rounds=3),
    "joint, codebook": Options(bits=4, rounds=3),
    "joint, codebook 3 bit": Options(bits=3, rounds=3),
}
JOINT = [name for name in METHODS if name.startswith("joint")]


class Bench:
    """The model, its text and tasks, and the rows measured so far."""

    def __init__(self, args):
        self.args = args
        self.source = checkpoint.open_checkpoint(args.model or demo.model_file())
        data = args.data
        self.text = evaluate.wikitext(data / "wikitext2/test.txt")
        self.documents = read_documents(data / "calib/c4_1480docs.jsonl")
        self.tasks = {t: read_task(data / "tasks", t)[: args.task_rows] for t in TASKS}
        self.out = args.out.with_suffix(".json")
        self.rows = json.loads(self.out.read_text()) if self.out.exists() else {}

    def load(self):
        model, tokenizer = checkpoint.load(self.source)
        return model, tokenizer, checkpoint.linears(model)

    def measure(self, key, model, tokenizer, **facts):
        """Perplexity and accuracy of `model` as it is now."""
        result = evaluate.perplexity(model, tokenizer, self.text, 2048, self.args.windows)
        scores = accuracy(model, tokenizer, self.tasks) if self.args.task_rows else {}
        first = math.exp(sum(result.nll[:5]) / 5)
        facts |= {
            "perplexity": result.perplexity,
            "stderr": result.perplexity_stderr,
            "first_five": first,
            "nll": result.nll,
            "tasks": scores,
            "provenance": provenance(),
        }
        self.rows[key] = facts
        self.out.write_text(json.dumps(self.rows, indent=1))
        print(key, {k: v for k, v in facts.items() if k not in ("tasks", "nll")}, flush=True)

    def row(self, method, sparsity):
        """Compress by one method at one sparsity, and measure."""
        key = f"{sparsity} | {method}"
        if key in self.rows:
            return
        model, tokenizer, linears = self.load()
        options = dataclasses.replace(METHODS[method], sparsity=Sparsity.parse(sparsity))
        ids = windows(self.documents, tokenizer, self.args.samples, self.args.seq_len, 0)
        stored, weights = 0.0, 0
        counts, parts, fits = {}, {}, {}

        def one(name, w, gram):
            nonlocal stored, weights
            if method in JOINT:
                q = fit(w, gram.h, options, gram.target(w))
            else:
                q = fit_paper(w, gram.h, options)
            own = Parts.of(q)
            stored += sum(row_bits(b, q.shape[1], own) for b in q.widths.tolist())
            stored += shared_bits(*q.shape, own)
            weights += w.numel()
            counts[name], parts[name], fits[name] = histogram(q.widths), own, q
            return effective(q)

        started = time.perf_counter()
        best = SLIM_RECIPES["best"]
        staged = {"staged": best.staged, "matched": best.matched} if method in JOINT else {}
        blockwise.walk(model, linears, ids, one, **staged)
        seconds = time.perf_counter() - started
        if self.args.save:
            folder = self.args.save / key.replace(" | ", "-").replace(" ", "-").replace(":", "")
            checkpoint.save(
                folder, model, tokenizer, fits, embed_bits=8, bits=stored / weights, force=True
            )
        others = checkpoint.plan_bytes(model, tokenizer, 8, counts, parts=parts, in_scale=False)
        self.measure(
            key,
            model,
            tokenizer,
            bits=stored / weights,
            bytes=others + round(stored / 8),
            seconds=seconds,
        )

    def dense(self):
        if "dense" not in self.rows:
            model, tokenizer, linears = self.load()
            size = sum(p.nbytes for p in model.parameters())
            self.measure("dense", model, tokenizer, bits=16.0, bytes=size, seconds=0.0)


def table(rows, args):
    """The rows as markdown, dense first."""
    names = " | ".join(TASKS)
    lines = [
        f"SmolLM2-135M, WikiText-2 (customary text), first {args.windows} windows of 2048;"
        f" calibration {args.samples} windows of {args.seq_len} of C4; accuracy on the first"
        f" {args.task_rows} rows of each task. Errors are paired with dense.",
        rows["dense"]["provenance"],
        "",
        f"| | bits | MB | perplexity | first 5 windows | {names} |",
        "|---|---|---|---|---|" + "---|" * len(TASKS),
    ]
    full = rows["dense"]["nll"]
    for key, row in rows.items():
        paired = [a - b for a, b in zip(row["nll"], full, strict=True)]
        error = row["perplexity"] * statistics.stdev(paired) / math.sqrt(len(paired))
        scores = [row["tasks"].get(t) for t in TASKS]
        cells = [f"{s['acc']:.3f} ± {s['stderr']:.3f}" if s else "-" for s in scores]
        lines.append(
            f"| {key.replace('|', '·')} | {row['bits']:.3f} | {row['bytes'] / 1e6:.1f} |"
            f" {row['perplexity']:.2f} ± {error or row['stderr']:.2f} | {row['first_five']:.2f} |"
            f" {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--save", type=Path, help="also write every row as a folder here")
    parser.add_argument("--rows", default="2:4,0.5,none")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--task-rows", type=int, default=300)
    args = parser.parse_args()
    bench = Bench(args)
    bench.dense()
    for sparsity in args.rows.split(","):
        for method in args.methods.split(";"):
            bench.row(method, sparsity)
    text = table(bench.rows, args)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
