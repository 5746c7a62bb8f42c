"""Mixtures of experts of known shapes: compressed streamed, then decoded.

    python bench/experts.py --data DIR --scratch DIR --out results [--model qwen3] [--layers 2]

`--model qwen3` is Qwen3-30B-A3B, `gpt_oss` is gpt-oss-20b. DIR holds calib/c4_1480docs.jsonl. The
weights are random as in stream_7b.py, the checkpoint is made once. Memory, seconds a layer and
tokens a second are measured; the whole model is extrapolated by its number of layers. Decoding is
against transformers in bfloat16 on the same checkpoint, each in a process of its own, alternating.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, Qwen3MoeConfig

from provenance import provenance
from stream_7b import measured, tokenizer, weight

CONFIGS = {
    "qwen3": (
        48,
        Qwen3MoeConfig,
        dict(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            norm_topk_prob=True,
        ),
    ),
    "gpt_oss": (
        24,
        GptOssConfig,
        dict(
            hidden_size=2880,
            intermediate_size=2880,
            num_local_experts=32,
            num_experts_per_tok=4,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=201088,
        ),
    ),
}
TOKENS = 64  # decoded in a run, after the first


def make(folder, kind, layers):
    """Write the checkpoint, a shard per layer, under the names of the model's own class."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    depth, config_class, options = CONFIGS[kind]
    config = config_class(
        **options, num_hidden_layers=layers, bos_token_id=None, eos_token_id=256, dtype="bfloat16"
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    g, where, shards = torch.Generator().manual_seed(0), {}, {}
    for name, empty in model.state_dict().items():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(
            (name, empty.shape)
        )
    for number, (_, inside) in enumerate(shards.items(), 1):
        tensors = revert_weight_conversion(model, {n: random(n, s, depth, g) for n, s in inside})
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / file)
        where |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def random(name, shape, depth, g):
    """Numbers of a tensor: matrices as `weight` makes them, norms one, biases none."""
    if len(shape) == 1:
        return (torch.ones if "norm" in name else torch.zeros)(shape).bfloat16()
    if len(shape) == 2:
        scale = 0.02 if name.endswith("bias") or "embed" in name or "head" in name else None
        if scale:
            return (scale * torch.randn(shape, generator=g)).bfloat16()
        return weight(*shape, depth, g)
    return torch.stack([weight(*shape[1:], depth, g) for _ in range(shape[0])])


def decode(path, compressed, depth):
    """Tokens a second after the first, and what `depth` layers would give; prints a JSON object."""
    from transformers import AutoModelForCausalLM

    if compressed:
        import skimlm  # noqa: F401
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.flatten()[::1024].clone()  # files are mapped: the first run would read them
    ids, body, inside = torch.arange(32)[None] % 250, model.model, []
    usual = body.forward

    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = usual(*args, **kwargs)
        inside.append(time.perf_counter() - began)
        return out

    body.forward = timed

    def seconds(count):
        started = time.perf_counter()
        how = dict(do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        return time.perf_counter() - started

    found = []
    for _ in range(3):
        first = seconds(1)
        inside.clear()
        token = (seconds(TOKENS + 1) - first) / TOKENS
        layers = statistics.median(inside[1:])
        whole = token + layers * (depth / len(body.layers) - 1)
        found.append((1 / token, 1 / whole, 1000 * layers / len(body.layers), first))
    names = "tokens_per_second", "of_the_whole", "milliseconds_a_layer", "seconds_to_first"
    print(
        json.dumps(dict(zip(names, map(statistics.median, zip(*found, strict=True)), strict=True)))
    )


def child(path, compressed, depth):
    command = [sys.executable, __file__, "--decode", path, "--depth", depth]
    command = [str(part) for part in (*command, "--compressed", int(compressed))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", choices=CONFIGS, default="qwen3")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--decode", type=Path)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--compressed", type=int, default=0)
    args = parser.parse_args()
    if args.decode:
        return decode(args.decode, args.compressed, args.depth)
    source, out = args.scratch / f"{args.model}-{args.layers}", args.scratch / f"{args.model}-out"
    make(source, args.model, args.layers)
    command = ["compress", source, out, "--recipe", "fast", "--bits", 3.2, "--force"]
    command += ["--samples", args.samples, "--seq-len", args.seq_len, "--max-memory", "16GB"]
    command += ["--text", args.data / "calib/c4_1480docs.jsonl", "--workers", 1]
    command += ["--cache-dir", args.scratch / "cache"]
    facts, seconds, most = measured(command, args.scratch / "experts.log")
    depth = CONFIGS[args.model][0]
    by_phase = facts["seconds"]
    layered = sum(v for k, v in by_phase.items() if k != "load") / args.layers
    decoded = {"compressed": [], "bfloat16": []}
    for _ in range(args.repeats):
        decoded["bfloat16"].append(child(source, False, depth))
        decoded["compressed"].append(child(out, True, depth))

    def ratio(name):
        a, b = (statistics.median(r[name] for r in runs) for runs in decoded.values())
        return a / b

    result = {
        "model": args.model,
        "layers": args.layers,
        "of": depth,
        "peak_rss_bytes": most,
        "planned": facts["planned"],
        "bits_per_weight": facts["bits_per_weight"],
        "weights": facts["weights"],
        "bytes": facts["bytes"],
        "seconds": seconds,
        "phases": by_phase,
        "seconds_a_layer": layered,
        "hours_for_the_whole": (layered * depth + by_phase["load"]) / 3600,
        "decode": decoded,
        "ratio": ratio("tokens_per_second"),
        "ratio_of_the_whole": ratio("of_the_whole"),
        "provenance": provenance(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"experts-{args.model}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
