"""Products with sparse and grid weights, one linear at a time, against dense ones and the memory.

    python bench/sparse.py [--shapes 4096x4096] [--batches 1 4 16] [--repeats 5] [--out FILE]

The shapes are LLaMA-2-7B's. Every kind is timed over copies of it that together exceed the caches;
the kinds take turns, `--repeats` times, and the best turn of each counts: other work on the machine
makes a turn slower, never faster. Bandwidth is the best of plain reads between the turns.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from provenance import provenance
from skimlm import bench, native
from skimlm.runtime import matmul

SHAPES = ("4096x4096", "11008x4096", "4096x11008")
KINDS = {  # bits, sparsity, group, rank as a share of the smaller side
    "2:4, 4-bit grid g128, rank 0.1 in 4 bits": (4, "2:4", 128, 0.1),
    "2:4, 4-bit grid g128": (4, "2:4", 128, 0.0),
    "2:4, 4-bit codebooks": (4, "2:4", None, 0.0),
    "2:4, 3-bit codebooks": (3, "2:4", None, 0.0),
    "dense 4-bit grid g128": (4, None, 128, 0.0),
    "dense 4-bit codebooks": (4, None, None, 0.0),
}
# SLiM (ICML 2025), as the paper reports it: times as fast as dense fp16, LLaMA-2-7B, batch 16,
# 2:4 in 4 bits with 4-bit adapters, on GPUs and their kernels: up, attention, down projection
PAPER = {"RTX 3060": (3.57, 2.96, 4.31), "A100": (1.09, 0.32, 0.97)}


def candidates(rows, cols):
    """(name, bytes, copies, call(x, copy)) of everything that is timed for a shape."""
    for name, (bits, sparsity, group, share) in KINDS.items():
        rank = int(share * min(rows, cols))
        options = dict(sparsity=sparsity, kept=cols // 2 if sparsity else 0, group=group)
        options |= dict(rank=rank, adapter_bits=4 if rank else 0)
        layer = bench.random_layer(rows, cols, bits, **options)  # any bytes are valid patterns
        count = max(2, -(-bench.FOOTPRINT // layer.nbytes))
        yield name, layer.nbytes, bench.copies_of(layer, count), matmul
    dense = torch.randn(rows, cols).bfloat16()
    count = max(2, -(-bench.FOOTPRINT // dense.nbytes))
    copies = [dense.clone() for _ in range(count)]
    yield "torch bf16", dense.nbytes, copies, torch.nn.functional.linear


def turn(call, x, copies, seconds):
    """Median time of a call over the copies, once around at least."""
    times = []
    begin = time.perf_counter()
    while len(times) < len(copies) or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call(x, copies[len(times) % len(copies)])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(shapes, batches, repeats, seconds):
    memory = torch.ones(bench.READ // 8, dtype=torch.int64)
    reads, found = [], []
    for shape in shapes:
        rows, cols = (int(n) for n in shape.split("x"))
        kinds = list(candidates(rows, cols))
        best = {}
        for _ in range(repeats):
            reads.append(bench.read_bandwidth(memory))
            for batch in batches:
                x = torch.randn(batch, cols).bfloat16()
                for name, _, copies, call in kinds:
                    took = turn(call, x, copies, seconds)
                    best[name, batch] = min(took, best.get((name, batch), took))
        for name, size, _, _ in kinds:
            for batch in batches:
                row = {"shape": shape, "kind": name, "bytes": size, "batch": batch}
                row |= {"seconds": best[name, batch]}
                row |= {"of_bf16": best["torch bf16", batch] / best[name, batch]}
                found.append(row)
    bandwidth = max(reads)
    for row in found:
        row["of_bandwidth"] = row["bytes"] / row["seconds"] / bandwidth
    return {"bandwidth": bandwidth, "rows": found}


def text(facts):
    lines = [
        f"kernels {native.path()}, {torch.get_num_threads()} threads, memory read at "
        f"{facts['bandwidth'] / 1e9:.1f} GB/s",
        "",
        f"{'weight':12}{'kind':42}{'MB':>7}{'batch':>6}{'us':>9}{'x bf16':>8}{'% bandwidth':>12}",
    ]
    for row in facts["rows"]:
        lines.append(
            f"{row['shape']:12}{row['kind']:42}{row['bytes'] / 1e6:>7.2f}{row['batch']:>6}"
            f"{row['seconds'] * 1e6:>9,.0f}{row['of_bf16']:>8.2f}{100 * row['of_bandwidth']:>12.0f}"
        )
    lines += ["", "SLiM, batch 16, up / attention / down projections over dense fp16:"]
    lines += [f"  {gpu}: " + " / ".join(f"{v}x" for v in times) for gpu, times in PAPER.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4, 16))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn, at least")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = run(args.shapes, args.batches, args.repeats, args.seconds)
    print(text(facts))
    print(f"\n{' '.join(['python', *sys.argv])}\n{provenance()}")
    if args.out:
        args.out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
