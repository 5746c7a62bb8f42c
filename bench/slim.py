"""SLiM's table: perplexity and accuracy of pruned, rounded and adapted weights, all bits counted.

    python bench/slim.py --data DIR --out results --save DIR [--rows 2:4,none] [--methods "a;b"]

DIR holds calib/c4_1480docs.jsonl, wikitext2/test.txt (customary text) and tasks/*.jsonl. Every row
is compressed into a folder under --save with 8-bit embeddings, and what is measured is that folder,
its weights de-quantized, with the original's embeddings: rows then differ in their linears alone.
Calibration windows, evaluation windows and task rows are the same for all. Rows "not rounded" are
in no folder: their weights stay in bfloat16. Results are written to OUT.json after every
measurement, and to OUT.md; what is there already is not run again, so --task-rows can be added
later, and two processes may fill one table (each writes its own --out).

All methods go block by block, inputs coming from the compressed blocks before. The reference
model's linears were 4-bit numbers in groups of 32 once: grids of 4 bits are flattered.
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
from skimlm import Model
from skimlm.cli import demo
from skimlm.evaluate import wikitext
from skimlm.format import effective, pack
from skimlm.integrations import accuracy, read_task
from skimlm.models import BlockSource, decoder_linears, load, open_checkpoint, save
from skimlm.pipeline import (
    SLIM_RECIPES,
    StateStore,
    Walk,
    fit_to_inputs,
    read_documents,
    windows,
)
from skimlm.quantize import Options, Sparsity, damped, fit_paper, lowrank, slim, wanda
from skimlm.storage import folder_bytes, read_json

TASKS = ("piqa", "arc_easy", "winogrande", "openbookqa")
PAPER = Options(bits=4, group=0, quantizer="slim")
GROUPED = dataclasses.replace(PAPER, group=128, quantizer="absmax", rank=0)
METHODS = {
    "Wanda + group AbsMax": GROUPED,
    "SparseGPT + GPTQ": dataclasses.replace(GROUPED, mask="sparsegpt"),
    "Naive-LoRA": dataclasses.replace(PAPER, adapter="naive", adapter_bits=16),
    "Naive-LoRA, grid g128": dataclasses.replace(
        GROUPED, rank=0.1, adapter="naive", adapter_bits=16
    ),
    "SLiM-LoRA": dataclasses.replace(PAPER, adapter_bits=16),
    "SLiM-LoRA, grid g128": dataclasses.replace(GROUPED, rank=0.1, adapter_bits=16),
    "SLiM-LoRA^Q": PAPER,
    "full Gram, one pass": dataclasses.replace(PAPER, adapter="gram", group=128, quantizer="error"),
    "joint, int4 grid g128": Options(bits=4, group=128, rounds=3),
    "joint, codebook": Options(bits=4, rounds=3),
    "joint, codebook 3 bit": Options(bits=3, rounds=3),
}
JOINT = [name for name in METHODS if name.startswith("joint")]
# an adapter of 16 bits over pruned weights of 16 bits
UNROUNDED = {"Wanda": None, "Naive-LoRA": "naive", "SLiM-LoRA": "diag"}
MARK = ", not rounded"


class Bench:
    """The model, its text and tasks, and the rows measured so far."""

    def __init__(self, args):
        self.args = args
        self.source = open_checkpoint(args.model or demo.model_file())
        data = args.data
        self.text = wikitext(data / "wikitext2/test.txt")
        self.documents = read_documents(data / "calib/c4_1480docs.jsonl")
        self.tasks = {t: read_task(data / "tasks", t)[: args.task_rows] for t in TASKS}
        self.out = args.out.with_suffix(".json")
        self.rows = json.loads(self.out.read_text()) if self.out.exists() else {}

    def load(self):
        model, tokenizer = load(self.source)
        return model, tokenizer, decoder_linears(model)

    def missing(self, key):
        """Whether something of a row is yet to be measured."""
        done = self.rows.get(key, {})
        return "nll" not in done or (self.args.task_rows and not done.get("tasks"))

    def measure(self, key, model, tokenizer, **facts):
        """Perplexity and accuracy of `model`, what of them is missing."""
        row = self.rows.setdefault(key, {}) | facts
        if "nll" not in row:
            result = Model(model, tokenizer).perplexity(self.text, limit=self.args.windows)
            row |= {
                "perplexity": result.perplexity,
                "stderr": result.perplexity_stderr,
                "first_five": math.exp(sum(result.nll[:5]) / 5),
                "nll": result.nll,
                "provenance": provenance(),
            }
        if self.args.task_rows and not row.get("tasks"):
            row["tasks"] = accuracy(model, tokenizer, self.tasks)
        self.rows[key] = row
        self.out.write_text(json.dumps(self.rows, indent=1))
        print(key, {k: v for k, v in row.items() if k != "nll"}, flush=True)

    def windows(self, tokenizer):
        return windows(self.documents, tokenizer, self.args.samples, self.args.seq_len, 0)

    def walk(self, model, tokenizer, linears, one, staged=False, matched=False):
        """Replace every linear by what `one(name, w, inputs)` makes of it."""
        walk = Walk(BlockSource(model), linears, self.windows(tokenizer), StateStore(None))

        def fit(name, w, inputs):
            made = one(name, w.float(), inputs)
            return lambda: (made, {})

        fit_to_inputs(walk, fit, staged=staged, matched=matched)

    def row(self, method, sparsity):
        """Compress by one method at one sparsity, and measure what came of it."""
        key = f"{sparsity} | {method}"
        if not self.missing(key):
            return
        if method.endswith(MARK):
            return self.unrounded(key, method.removesuffix(MARK), Sparsity.parse(sparsity))
        folder = self.args.save / key.replace(" | ", "-").replace(" ", "-").replace(":", "")
        if not folder.exists():
            self.compress(folder, method, Sparsity.parse(sparsity))
        model, tokenizer, linears = self.load()
        stored, _ = load(folder)
        dense = decoder_linears(stored.dequantize(model.dtype))
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(dense[name].weight)
        config = read_json(folder / "config.json")["quantization_config"]
        facts = {"bits": config["bits"], "bytes": folder_bytes(folder)}
        self.measure(key, model, tokenizer, **facts, made=config["provenance"])

    def compress(self, folder, method, sparsity):
        model, tokenizer, linears = self.load()
        options = dataclasses.replace(METHODS[method], sparsity=sparsity)
        fits = {}

        def one(name, w, gram):
            if method in JOINT:
                fits[name] = slim.fit(w, damped(gram.h, shrink=0.0), options, gram.target(w))
            else:
                fits[name] = fit_paper(w, gram.h, options)
            return effective(fits[name])

        started = time.perf_counter()
        best = SLIM_RECIPES["best"]
        staged = {"staged": best.staged, "matched": best.matched} if method in JOINT else {}
        self.walk(model, tokenizer, linears, one, **staged)
        seconds = round(time.perf_counter() - started, 1)
        bits = (
            8
            * sum(pack(q).nbytes for q in fits.values())
            / sum(q.shape[0] * q.shape[1] for q in fits.values())
        )
        made = {"method": method, "sparsity": str(sparsity), "seconds": seconds}
        save(folder, model, tokenizer, fits, embed_bits=8, bits=bits, provenance=made)

    def unrounded(self, key, method, sparsity):
        """Pruned by Wanda, kept weights as they are, with an adapter or none."""
        model, tokenizer, linears = self.load()
        weights = stored = 0

        def one(name, w, gram):
            nonlocal weights, stored
            squares = gram.h.diagonal().clamp(min=0)
            squares = squares + squares[squares > 0].min()
            kept = w * wanda(w, squares.sqrt(), sparsity)
            weights += w.numel()
            mask = 0.75 if str(sparsity) == "2:4" else 1
            stored += (16 * sparsity.kept(w.shape[1]) / w.shape[1] + mask) * w.numel()
            if UNROUNDED[method] is None:
                return kept
            rank = lowrank.rank_of(PAPER.rank, *w.shape)
            weighting = {"naive": None, "diag": squares}[UNROUNDED[method]]
            a, b = lowrank.low_rank(w - kept, rank, weighting)
            stored += 16 * (a.numel() + b.numel())
            return kept + b.bfloat16().float().T @ a.bfloat16().float()

        started = time.perf_counter()
        self.walk(model, tokenizer, linears, one)
        made = {"seconds": round(time.perf_counter() - started, 1)}
        self.measure(key, model, tokenizer, bits=stored / weights, bytes=None, made=made)

    def dense(self):
        if self.missing("dense"):
            model, tokenizer, _ = self.load()
            size = sum(p.nbytes for p in model.parameters())
            self.measure("dense", model, tokenizer, bits=16.0, bytes=size)


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
        scores = [row.get("tasks", {}).get(t) for t in TASKS]
        cells = [f"{s['acc']:.3f} ± {s['stderr']:.3f}" if s else "" for s in scores]
        size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""
        lines.append(
            f"| {key.replace('|', '·')} | {row['bits']:.3f} | {size} |"
            f" {row['perplexity']:.2f} ± {error or row['stderr']:.2f} | {row['first_five']:.2f} |"
            f" {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--save", type=Path, required=True, help="folders of the rows")
    parser.add_argument("--rows", default="2:4,0.5,none")
    parser.add_argument("--methods", default=";".join(METHODS), help=f"by ;, Wanda{MARK}")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--task-rows", type=int, default=0)
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
