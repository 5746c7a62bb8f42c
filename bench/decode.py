"""Decoding a whole model, one token at a time: compressed against bfloat16 and llama.cpp.

    python bench/decode.py COMPRESSED [--dense MODEL] [--llama-bench FILE --gguf FILE ...]

Each model runs in a process of its own, through transformers' `generate`, greedy, the median of
`--repeats` runs of 128 new tokens after a prompt of 32. "above imports": most memory held at once
less what the imports and the tokenizer took, over the bytes of the model's safetensors. Then where
a token's time goes, and how long torch takes for the same products with bfloat16 weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from provenance import provenance

TOKENS, PROMPT = 128, 32


def report(**facts):
    print(json.dumps(facts))


def rss():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def run(model, repeats, parts):
    """Decode in this process; prints one JSON object."""
    import torch
    import transformers.generation  # noqa: F401  so that it counts as an import
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import skimlm  # noqa: F401
    from skimlm import native
    from skimlm.models import load

    if Path(model).is_dir():
        AutoTokenizer.from_pretrained(model)
    before = rss()
    if Path(model).is_dir():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    else:
        loaded, _ = load(model)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.flatten()[::1024].clone()  # files are mapped: pages not read would not count
    with_weights = rss() - before
    torch.manual_seed(0)
    ids = torch.randint(0, loaded.config.vocab_size, (1, PROMPT))
    how = {"min_new_tokens": None, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(count):
        start = time.perf_counter()
        loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **how)
        return time.perf_counter() - start

    generate(TOKENS)
    first = statistics.median(generate(1) for _ in range(repeats))
    rates = [(TOKENS - 1) / (generate(TOKENS) - first) for _ in range(repeats)]
    facts = {"rates": rates, "first": first, "loaded": with_weights, "decoded": rss() - before}
    if parts:
        facts["parts"] = parts_of_a_token(lambda: generate(TOKENS) - first)
    else:
        facts["products"] = products_of_a_token(loaded)
    facts["threads"], facts["kernels"] = torch.get_num_threads(), native.path()
    report(**facts)


def parts_of_a_token(decode_seconds):
    """{part: seconds per token} of what `decode_seconds` times."""
    from skimlm.runtime import decode, tables

    spent = {}

    def timed(module, name, key):
        function = getattr(module, name)

        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - start
            return result

        setattr(module, name, call)

    timed(decode.OneToken, "_one_token", "blocks, native")
    for head in (tables.CompressedHead, tables.PackedHead):
        timed(head, "forward", "head, native")
    total = decode_seconds()
    found = {k: v / (TOKENS - 1) for k, v in spent.items()}
    found["the rest: Python"] = total / (TOKENS - 1) - sum(found.values())
    return found


def products_of_a_token(model):
    """Median seconds of all products of one token with dense weights, torch alone."""
    import torch

    from skimlm.models import decoder_linears

    weights = [m.weight for m in decoder_linears(model).values()]
    weights.append(model.get_output_embeddings().weight)
    xs = {w.shape[1]: torch.randn(1, w.shape[1]).bfloat16() for w in weights}

    def products():
        start = time.perf_counter()
        for w in weights:
            torch.nn.functional.linear(xs[w.shape[1]], w)
        return time.perf_counter() - start

    with torch.inference_mode():
        return statistics.median(products() for _ in range(20))


def child(model, repeats, parts=False):
    command = [sys.executable, __file__, "--one", str(model), "--repeats", str(repeats)]
    done = subprocess.run(command + ["--parts"] * parts, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def line(name, facts, nbytes=None):
    rates = sorted(facts["rates"])
    text = (
        f"{name:<28} {statistics.median(rates):6.1f} tokens/s ({rates[0]:.1f} to {rates[-1]:.1f})"
    )
    text += f", first token after {facts['first'] * 1e3:.0f} ms"
    if nbytes:
        loaded, after = facts["loaded"], facts["decoded"]
        text += f"\n{'memory above imports':<28} {loaded / 1e6:.1f} MB loaded and read, "
        text += f"{loaded / nbytes:.2f} x its files; {after / 1e6:.1f} MB after decoding"
    print(text, flush=True)
    return statistics.median(rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dense", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run(args.one, args.repeats, args.parts)
    from skimlm.cli import demo

    small = child(args.model, args.repeats, parts=True)
    dense = child(args.dense or demo.model_file(), args.repeats)
    print(f"kernels {small['kernels']}, {small['threads']} threads\n")
    nbytes = sum(f.stat().st_size for f in Path(args.model).glob("*.safetensors"))
    rate = line("compressed", small, nbytes)
    base = line("bfloat16, transformers", dense)
    for file in args.gguf:
        command = [args.llama_bench, "-m", file, "-t", str(small["threads"]), "-o", "json"]
        command += ["-p", "0", "-n", str(TOKENS), "-r", str(args.repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)[0]
        print(
            f"llama-bench {file.stem:<16} {found['avg_ts']:6.1f} ± {found['stddev_ts']:.1f} "
            f"tokens/s, {found['model_size'] / 1e6:.1f} MB: compressed is "
            f"{rate / found['avg_ts']:.2f} x"
        )
    print(f"\ncompressed is {rate / base:.2f} x bfloat16 in transformers. A token, in ms:")
    for name, seconds in small["parts"].items():
        print(f"  {name:<28} {seconds * 1e3:.2f}")
    same = sum(small["parts"].values())
    print(f"  {'all':<28} {same * 1e3:.2f}")
    products = dense["products"]
    rest = small["parts"]["the rest: Python"]
    print(
        f"the same products with bfloat16 weights, torch alone: {products * 1e3:.2f} ms; with them"
        f" in place of the native parts a token would take {(products + rest) * 1e3:.2f} ms or "
        f"more, {(products + rest) / same:.2f} x as long"
    )
    print(f"\n{provenance()}")


if __name__ == "__main__":
    main()
