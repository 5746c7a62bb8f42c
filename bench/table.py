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
import datetime
import json
import math
import platform
import resource
import statistics
import subprocess
import time
from pathlib import Path

import torch

from skimlm import analysis, budget, checkpoint, demo, evaluate
from skimlm.calibrate import read_documents, windows
from skimlm.compress import RECIPES, Clock, quantize
from skimlm.weights import fit as fitting
from skimlm.weights.pack import dequantize
from skimlm.weights.refine import dense

BITS = (3.19, 3.0, 2.5, 4.0, 3.5, 2.25, 3.2)


def rtn(w, b):
    """Round to nearest on an asymmetric grid per row, the range of the row."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**b - 1)).half().float().clamp(min=1e-7)
    zero = (-low / scale).round()
    return (((w / scale).round() + zero).clamp(0, 2**b - 1) - zero) * scale


def fixed(name, w, b, known):
    """(de-quantized weight, stored bits) of a method that has one width for every row."""
    r, c = w.shape
    if name == "RTN":
        return rtn(w, b), r * (b * c + 32)
    sizes = torch.full((r,), 2**b, dtype=torch.int32)
    table = known.centroids[b - 1].half().float()
    return dense(fitting.nearest(w, table.contiguous(), sizes), table), r * (b * c + 16 * 2**b)


def machine():
    """Where and on what this ran."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    commit = subprocess.run(git, capture_output=True, text=True, cwd=here).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((ln.split(":")[1].strip() for ln in lines if "model name" in ln), "")
    return f"{cpu or platform.machine()}, {datetime.date.today()}, commit {commit}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="of 2048 tokens; 148 are all")
    parser.add_argument("--bits", type=lambda s: [float(b) for b in s.split(",")], default=BITS)
    parser.add_argument("--methods", default="RTN,Fisher k-means,paper,fast,best")
    args = parser.parse_args()

    source = checkpoint.open_checkpoint(args.model or demo.model_file())
    model, tokenizer = checkpoint.load(source)
    linears = checkpoint.linears(model)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    text = evaluate.wikitext(args.data / "wikitext2/test.txt")
    total = sum(m.weight.numel() for m in linears.values())
    documents = read_documents(args.data / "calib/c4_1480docs.jsonl")
    out = args.out.with_suffix(".json")
    cells = json.loads(out.read_text()) if out.exists() else {}

    def restore():
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(original[name])

    def measure(key, bits, seconds=None, **facts):
        result = evaluate.perplexity(model, tokenizer, text, 2048, args.windows)
        cells[key] = {"bits": bits, "nll": result.nll, "seconds": seconds, **facts}
        out.write_text(json.dumps(cells))
        args.out.with_suffix(".md").write_text(markdown(cells, args, model))
        print(
            key,
            f"{bits:.4f} bits",
            f"perplexity {math.exp(statistics.fmean(result.nll)):.3f}",
            flush=True,
        )

    if "dense" not in cells:
        measure("dense", 16.0)

    def analyses(recipe):
        plan = RECIPES[recipe]
        ids = windows(documents, tokenizer, plan.samples, plan.seq_len, 0)
        key = analysis.key(source.path, ids, plan, sorted(linears))
        cache = analysis.folder(args.cache_dir)
        start = time.perf_counter()
        known, kept = analysis.get(cache, key, model, linears, ids, plan, lambda *_: None)
        print(
            recipe,
            "analysis",
            f"{time.perf_counter() - start:.0f} s",
            "kept" if kept else "computed",
            flush=True,
        )
        return plan, ids, known

    for method in args.methods.split(","):
        todo = [b for b in args.bits if f"{method} {b}" not in cells]
        if not todo:
            continue
        if method in ("RTN", "Fisher k-means"):
            _, _, known = analyses("best")
            for target in todo:
                for b in (4, 3, 2, 1):
                    parts = {
                        n: fixed(method, m.weight.detach().float(), b, known[n])
                        for n, m in linears.items()
                    }
                    bits = sum(p[1] for p in parts.values()) / total
                    if bits <= target + 5e-3:  # 3.19 is 3 bits and their codebooks, rounded
                        break
                done = next(
                    (c for k, c in cells.items() if k.startswith(method) and c["bits"] == bits),
                    None,
                )
                if done:
                    cells[f"{method} {target}"] = done
                    continue
                with torch.no_grad():
                    for n, m in linears.items():
                        m.weight.copy_(parts[n][0])
                measure(f"{method} {target}", bits)
                restore()
            continue
        plan, ids, known = analyses(method)
        teacher = {}
        price = budget.prices(linears, plan.scale)
        for target in todo:
            clock = Clock()
            with clock("allocate"):
                errors = {n: known[n].errors for n in linears}
                widths = budget.for_bits(errors, price, target, plan.end_loss)
            quantized, losses = quantize(
                model, linears, known, widths, plan, ids, lambda *_: None, clock, teacher=teacher
            )
            with torch.no_grad():
                for n, m in linears.items():
                    m.weight.copy_(dequantize(quantized[n]))
            measure(
                f"{method} {target}", price.bits(widths) / total, clock.seconds, held_out_kl=losses
            )
            restore()
            del quantized


def markdown(cells, args, model):
    """The table, with perplexity, true bits and the share of the gap that is closed."""
    columns = sorted({float(k.rsplit(" ", 1)[1]) for k in cells if " " in k})
    value = {k: math.exp(statistics.fmean(c["nll"])) for k, c in cells.items()}
    full = cells["dense"]["nll"]
    lines = ["| | " + " | ".join(f"{c:g}" for c in columns) + " |", "|---|" + "---|" * len(columns)]
    for method in ("RTN", "Fisher k-means", "paper", "fast", "best"):
        row = []
        for c in columns:
            cell = cells.get(f"{method} {c}")
            if cell is None:
                row.append("")
                continue
            delta = [a - b for a, b in zip(cell["nll"], full, strict=True)]
            error = value[f"{method} {c}"] * statistics.stdev(delta) / math.sqrt(len(delta))
            exact = "" if abs(cell["bits"] - c) < 0.005 else f" ({cell['bits']:.2f} bits)"
            row.append(f"{value[f'{method} {c}']:.2f} ± {error:.2f}{exact}")
        if any(row):
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    spread = value["dense"] * statistics.stdev(full) / math.sqrt(len(full))
    dense = f"{value['dense']:.2f} ± {spread:.2f}"
    lines += ["", f"Full precision (bf16): {dense}. ± of the rows: paired with it."]
    if "Fisher k-means 3.19" in cells:
        gap = value["Fisher k-means 3.19"] - value["dense"]
        for method in ("paper", "fast", "best"):
            if f"{method} 3.19" in cells:
                closed = (value["Fisher k-means 3.19"] - value[f"{method} 3.19"]) / gap
                lines.append(
                    f"- {method} at 3.19 bits closes {closed:.1%} of the gap "
                    f"{value['Fisher k-means 3.19']:.2f} - {value['dense']:.2f}: "
                    f"{value[f'{method} 3.19']:.2f}"
                )
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    lines += [
        "",
        f"WikiText-2 raw test, customary text, first {args.windows} windows of 2048, no BOS; "
        "calibration on C4 (1480 documents) in windows of 512. "
        "The model's linears went through Q4_1 (groups of 32) before they came to us.",
        f"{machine()}; {torch.get_num_threads()} threads, peak RSS {rss:.1f} GB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
