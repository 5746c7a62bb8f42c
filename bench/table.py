"""The table of README: perplexity against all-in bits, RTN, Fisher k-means, SKIM paper, skimlm.

    python bench/table.py --data DIR --out results

DIR holds calib/c4_1480docs.jsonl (calibration) and wikitext2/test.txt (WikiText-2 raw test,
customary text). Every cell is measured in this process on the same windows: the linears take the
de-quantized weights, norms the trained ones, everything else stays as it is (embeddings in bfloat16
in every row). Results are written to OUT.json after every cell, and to OUT.md; cells that
are there already are not run again.

Bits count everything stored of the linears: for RTN two float16 per row, for Fisher k-means (the
dense method of SqueezeLLM) float16 codebooks, for skimlm what FORMAT.md says. A method of fixed
width takes the widest that fits a budget, and its true bits are printed.
"""

import argparse
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
from skimlm.format import Layer, dequantize, layout, unpack
from skimlm.models import BlockSource, decoder_linears, load, open_checkpoint
from skimlm.pipeline import (
    RECIPES,
    StateStore,
    Walk,
    analyse,
    budget,
    each,
    packed,
    packed_linear,
    read_documents,
    sensitivity,
    specs_of,
    train_packed,
    widths_of,
    windows,
)
from skimlm.progress import Clock, peak_rss_bytes
from skimlm.quantize import dense
from skimlm.quantize import fit as fitting

BITS = (3.19, 3.0, 2.5, 4.0, 3.5, 2.25, 3.2)
METHODS = ("RTN", "Fisher k-means", "paper", "fast", "best")
WIDTHS = (4, 3, 2, 1)


def rtn(w, b):
    """Round to nearest on an asymmetric grid per row, the range of the row."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**b - 1)).half().float().clamp(min=1e-7)
    zero = (-low / scale).round()
    return (((w / scale).round() + zero).clamp(0, 2**b - 1) - zero) * scale


def fixed(method, w, b, known):
    """De-quantized weight of a method that has one width for every row."""
    if method == "RTN":
        return rtn(w, b)
    sizes = torch.full((len(w),), 2**b, dtype=torch.int32)
    table = known.centroids[b - 1].half().float()
    return dense(fitting.nearest(w, table.contiguous(), sizes), table)


class Bench:
    """The model, its text and the cells measured so far: {"METHOD BITS": facts}."""

    def __init__(self, args):
        self.args = args
        self.source = open_checkpoint(args.model or demo.model_file())
        self.model, self.tokenizer = load(self.source)
        self.linears = decoder_linears(self.model)
        self.weights = sum(m.weight.numel() for m in self.linears.values())
        self.original = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.text = wikitext(args.data / "wikitext2/test.txt")
        self.documents = read_documents(args.data / "calib/c4_1480docs.jsonl")
        self.out = args.out.with_suffix(".json")
        self.cells = json.loads(self.out.read_text()) if self.out.exists() else {}

    def measure(self, key, bits, weights, **facts):
        """Perplexity with these weights in the linears; then the model is as it was."""
        full = key == "dense" or float(key.rsplit(" ", 1)[1]) in self.args.full
        with torch.no_grad():
            for name, weight in weights.items():
                self.linears[name].weight.copy_(weight)
            judged = Model(self.model, self.tokenizer)
            result = judged.perplexity(self.text, limit=None if full else self.args.windows)
            for name, p in self.model.named_parameters():
                p.copy_(self.original[name])
        self.keep(key, {"bits": bits, "nll": result.nll, "commit": provenance(), **facts})
        print(key, f"{bits:.4f} bits, perplexity {result.perplexity:.3f}", flush=True)

    def keep(self, key, cell):
        self.cells[key] = cell
        self.out.write_text(json.dumps(self.cells))
        self.args.out.with_suffix(".md").write_text(markdown(self.cells, self.args.windows))

    def analysed(self, recipe):
        """(recipe, token windows, analysis, facts to note)."""
        plan = RECIPES[recipe]
        ids = windows(self.documents, self.tokenizer, plan.samples, plan.seq_len, 0)
        key = sensitivity.key(self.source.path, ids, plan, sorted(self.linears))
        cache = sensitivity.folder(self.args.cache_dir)
        start = time.perf_counter()
        known = sensitivity.stored(cache, key, self.linears)
        kept = analyse(self.walk(ids), known, plan)
        note = "kept" if kept else f"computed in {time.perf_counter() - start:.0f} s"
        print(recipe, "analysis", note, flush=True)
        return plan, ids, known, note

    def walk(self, ids):
        return Walk(BlockSource(self.model), self.linears, ids, StateStore(None))

    def fixed_widths(self, method, targets):
        """One width for every row: the widest that fits each target."""
        _, _, known, note = self.analysed("best")
        for target in targets:
            # 3.19 is 3 bits and their codebooks, rounded
            b = next(b for b in WIDTHS if self.fixed_bits(method, b) <= target + 5e-3)
            bits = self.fixed_bits(method, b)
            same = (c for k, c in self.cells.items() if k.startswith(method) and c["bits"] == bits)
            twin = max(same, key=lambda c: len(c["nll"]), default=None)
            if twin and (target not in self.args.full or len(twin["nll"]) > self.args.windows):
                self.keep(f"{method} {target}", twin)
                continue
            parts = {
                n: fixed(method, m.weight.detach().float(), b, known[n])
                for n, m in self.linears.items()
            }
            self.measure(f"{method} {target}", bits, parts, analysis=note)

    def fixed_bits(self, method, b):
        """All-in bits per weight of a fixed width: two float16 per row, or a float16 codebook."""
        extra = 32 if method == "RTN" else 16 * 2**b
        rows = sum(m.out_features for m in self.linears.values())
        return b + extra * rows / self.weights

    def recipe(self, method, targets):
        """What `skimlm compress --recipe METHOD --bits TARGET` does, in memory."""
        plan, ids, known, note = self.analysed(method)
        price = budget.prices(specs_of(self.linears, None, plan.scale), widths_of(plan, None))
        errors = {n: known[n].errors for n in self.linears}
        for target in targets:
            widths = budget.for_bits(errors, price, target, plan.end_loss)
            bits = price.bits(widths) / self.weights
            parts, facts = self.compressed(plan, ids, known, widths)
            self.measure(f"{method} {target}", bits, parts, analysis=note, **facts)

    def compressed(self, plan, ids, known, widths):
        """De-quantized weights at these widths; facts to note. Trained norms are in the model."""
        clock, losses = Clock(), []
        walk, specs = self.walk(ids), specs_of(self.linears, None, plan.scale)
        specs = {n: specs[n].with_widths(w) for n, w in widths.items()}
        with clock("fit"):
            each(walk, "fit", "packed", packed_linear, lambda n: (known[n], widths[n], plan))
        if plan.steps:
            with clock("train"):
                losses = train_packed(walk, specs, plan.steps, plan.rate)
        read = packed(walk)
        layers = {n: Layer(s, {k: read(f"{n}.{k}") for k in layout(s)}) for n, s in specs.items()}
        weights = {n: dequantize(unpack(layer)) for n, layer in layers.items()}
        return weights, {"seconds": clock.seconds, "held_out_kl": losses}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="of 2048 tokens; 148 are all")
    numbers = {"type": lambda s: [float(b) for b in s.split(",")]}
    parser.add_argument("--bits", default=BITS, **numbers)
    parser.add_argument("--full", default=[3.19], help="columns with all windows", **numbers)
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()

    bench = Bench(args)
    if "dense" not in bench.cells:
        bench.measure("dense", 16.0, {})
    for method in args.methods.split(","):
        targets = [b for b in args.bits if f"{method} {b}" not in bench.cells]
        if targets:
            run = bench.recipe if method in RECIPES else bench.fixed_widths
            run(method, targets)


def exp_mean(nll):
    return math.exp(statistics.fmean(nll))


def with_error(cell, dense, windows):
    """Perplexity on the first windows, and its standard error paired with full precision."""
    nll, full = cell["nll"][:windows], dense["nll"][:windows]
    delta = [a - b for a, b in zip(nll, full, strict=True)]
    value = exp_mean(nll)
    return f"{value:.2f} ± {value * statistics.stdev(delta) / math.sqrt(len(delta)):.2f}"


def markdown(cells, windows):
    """The table, with perplexity, true bits and the share of the gap that is closed."""
    columns = sorted({float(k.rsplit(" ", 1)[1]) for k in cells if " " in k})
    lines = ["| | " + " | ".join(f"{c:g}" for c in columns) + " |", "|---|" + "---|" * len(columns)]
    for method in METHODS:
        row = []
        for c in columns:
            cell = cells.get(f"{method} {c}")
            if cell is None:
                row.append("")
                continue
            exact = "" if abs(cell["bits"] - c) < 0.005 else f" ({cell['bits']:.2f} bits)"
            row.append(with_error(cell, cells["dense"], windows) + exact)
        if any(row):
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    for count in sorted({windows, len(cells["dense"]["nll"])}):
        full = cells["dense"]["nll"][:count]
        spread = exp_mean(full) * statistics.stdev(full) / math.sqrt(len(full))
        lines += [
            "",
            f"First {count} windows: full precision {exp_mean(full):.2f} ± {spread:.2f}",
        ]
        have = {m: cells.get(f"{m} 3.19") for m in METHODS}
        have = {m: c for m, c in have.items() if c and len(c["nll"]) >= count}
        if "Fisher k-means" not in have:
            continue
        worst = exp_mean(have["Fisher k-means"]["nll"][:count])
        for method in have:
            value = exp_mean(have[method]["nll"][:count])
            closed = (worst - value) / (worst - exp_mean(full))
            lines.append(
                f"- {method} at {have[method]['bits']:.4f} bits: "
                f"{with_error(have[method], cells['dense'], count)}, closes {closed:.1%} of the gap"
            )
    lines += [
        "",
        f"WikiText-2 raw test, customary text, the table on the first {windows} windows of 2048, "
        "no BOS; ± of the rows: paired with full precision. Calibration on C4 (1480 documents) in "
        "windows of 512. The model's linears went through Q4_1 (groups of 32) before they came to "
        "us.",
        f"{provenance()}; peak RSS {peak_rss_bytes() / 1e9:.1f} GB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
