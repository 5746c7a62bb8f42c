"""A model of LLaMA-2-7B's shapes through `skimlm compress`, streamed, and then loaded again.

    python bench/stream_7b.py --data DIR --scratch DIR --out results [--blocks K] [--bits 3]

DIR holds calib/c4_1480docs.jsonl. The weights are random but not plain: heavy-tailed (a normal
times a log-normal), input channels of unequal size, embeddings in few directions, so that
activations are correlated. They take 13.5 GB on --scratch, in bfloat16 shards; the folder is made
once and stays there. `--blocks` makes fewer decoder blocks and says what 32 would take. Perplexity
means nothing on such a model: memory, disk and time are what is measured. Memory is the most the
processes of a command held together, read five times a second.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from provenance import provenance

BLOCKS, WIDTH, INNER, VOCABULARY = 32, 4096, 11008, 32000
SHAPES = {
    **{f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qkvo"},
    **{f"mlp.{n}_proj": (INNER, WIDTH) for n in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}


def tokenizer():
    """A token per byte: the text only has to be text."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab | {"</s>": 256}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def weight(rows, cols, depth, g):
    """Heavy-tailed [rows, cols], of unequal columns; the residual stream keeps its size."""
    w = torch.randn(rows, cols, generator=g)
    w *= torch.randn(rows, cols, generator=g).mul_(0.4).exp_()
    w *= torch.randn(cols, generator=g).mul_(0.3).exp_()
    return (w * (0.8 / cols**0.5 / (2 * depth) ** 0.25)).bfloat16()


def make(folder, depth):
    """Write the checkpoint, a shard per block; done once."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    where = {}

    def shard(number, tensors):
        name = f"model-{number:05}-of-{depth + 1:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    few = torch.randn(VOCABULARY, 256, generator=g) @ torch.randn(256, WIDTH, generator=g) / 16
    table = (few + 0.3 * torch.randn(VOCABULARY, WIDTH, generator=g)).bfloat16()
    head = (0.02 * torch.randn(VOCABULARY, WIDTH, generator=g)).bfloat16()
    outside = {"model.embed_tokens.weight": table, "lm_head.weight": head}
    shard(1, outside | {"model.norm.weight": torch.ones(WIDTH).bfloat16()})
    for i in range(depth):
        at = f"model.layers.{i}"
        block = {f"{at}.{n}.weight": weight(r, c, depth, g) for n, (r, c) in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"{at}.{norm}.weight"] = torch.ones(WIDTH).bfloat16()
        shard(i + 2, block)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer().save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=depth,
        num_attention_heads=32,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


def measured(command, log):
    """Run a skimlm command; its JSON, seconds, and the most memory it and its children held."""
    most, started = 0, time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "skimlm", *map(str, command), "--json"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        answer = []
        reader = threading.Thread(target=lambda: answer.append(process.stdout.read()))
        reader.start()
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                family = [root, *root.children(recursive=True)]
                most = max(most, sum(p.memory_info().rss for p in family))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.2)
        reader.join()
    if process.returncode:
        sys.exit(f"{command[0]} failed: {log.read_text()[-2000:]}")
    return json.loads(answer[0]), time.perf_counter() - started, most


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="some 75 GB for all blocks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--bits", default="3")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-memory", default="8GB")
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()
    folder = args.scratch / f"shape7b-{args.blocks}"
    out = args.scratch / f"shape7b-{args.blocks}-{args.recipe}-{args.bits}bits"
    make(folder, args.blocks)
    facts = {"provenance": provenance(), "blocks": args.blocks, "bits": args.bits}
    report, seconds, peak = measured(
        [
            *("compress", folder, out, "--recipe", args.recipe, "--bits", args.bits, "--resume"),
            *("--text", args.data / "calib/c4_1480docs.jsonl", "--samples", args.samples),
            *("--seq-len", args.seq_len, "--max-memory", args.max_memory),
            *("--cache-dir", args.scratch / "cache"),
        ],
        args.out.with_suffix(".log"),
    )
    facts |= {"compress": report, "seconds": seconds, "peak_rss_bytes": peak}
    answer, seconds, peak = measured(
        ("generate", out, "The weather in", "--raw", "--max-new-tokens", args.new_tokens),
        args.out.with_suffix(".generate.log"),
    )
    facts["generate"] = answer | {"seconds": seconds, "peak_rss_bytes": peak}
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    print(table(facts, args))


def table(facts, args):
    """What was measured, and for fewer blocks what 32 would take."""
    report, share = facts["compress"], BLOCKS / args.blocks
    lines = [
        f"{args.blocks} blocks of LLaMA-2-7B's shapes, {args.recipe},"
        f" {report['bits_per_weight']:.3f} bits,"
        f" calibration {args.samples} x {args.seq_len} tokens",
        facts["provenance"],
        f"planned: {report['planned']['memory'] / 1e9:.2f} GB of memory,"
        f" {report['planned']['scratch'] / 1e9:.1f} GB of scratch,"
        f" {report['planned']['seconds'] / 3600:.2f} h",
        f"compress: peak RSS {facts['peak_rss_bytes'] / 1e9:.2f} GB, {facts['seconds']:.0f} s: "
        + ", ".join(f"{k} {v:.0f}" for k, v in report["seconds"].items()),
        f"{report['bytes'] / 1e9:.2f} GB written",
        f"generate: peak RSS {facts['generate']['peak_rss_bytes'] / 1e9:.2f} GB,"
        f" {facts['generate']['tokens_per_second']:.2f} tokens/s",
    ]
    if share != 1:
        lines.append(
            f"extrapolated to {BLOCKS} blocks, time in proportion: {facts['seconds'] * share:.0f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
