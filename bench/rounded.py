"""What rounding activations to 8 bits, as the 8-bit path of the kernels does, costs in perplexity.

    python bench/rounded.py COMPRESSED --text wikitext2/test.txt [--windows 16]

Every compressed linear's input is rounded as `ops.matmul(..., exact=False)` rounds it (int8 with
one scale per token and 128 columns), and multiplied exactly; both perplexities are on the same
windows, so their difference is paired.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
from torch.nn import functional as F

from provenance import provenance
from skimlm import Model
from skimlm.evaluate import wikitext
from skimlm.models import forwards_replaced, load
from skimlm.runtime import CompressedLinear

GROUP = 128


def rounded(x):
    """x as the 8-bit path sees it."""
    cols = x.shape[-1]
    parts = F.pad(x.float(), (0, -cols % GROUP)).unflatten(-1, (-1, GROUP))
    step = parts.abs().amax(-1, keepdim=True) / 127
    whole = (parts / torch.where(step > 0, step, 1.0)).round()
    return (whole * step).flatten(-2)[..., :cols].to(x.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2 raw test")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    text = wikitext(args.text)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}

    def measure():
        return Model(model, tokenizer).perplexity(text, limit=args.windows)

    exact = measure()
    with forwards_replaced(layers, lambda _, m: lambda x: type(m).forward(m, rounded(x))):
        eight = measure()
    delta = [a - b for a, b in zip(eight.nll, exact.nll, strict=True)]
    change = math.expm1(statistics.fmean(delta))
    error = statistics.stdev(delta) / math.sqrt(len(delta))
    print(f"exact {exact.perplexity:.3f}, activations in 8 bits {eight.perplexity:.3f}:", end=" ")
    print(f"{change:+.3%} ± {error:.3%} (paired, {args.windows} windows of 2048)")
    print(provenance())


if __name__ == "__main__":
    main()
