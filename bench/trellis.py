"""Rows of a trellis against rows of codebooks at equal bits: CPU time of one thread, one token.

    python bench/trellis.py [--rounds 12] [--footprint 100000000]

Both kinds in turn, the least of all rounds each, over copies of a layer that together have
`footprint` bytes: beyond the caches, as a model's weights are, or 0 for one copy, within them.
"""

import argparse
import time

import torch

from provenance import provenance
from skimlm import bench, native
from skimlm.format import TRELLIS
from skimlm.runtime import matmul

SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))
CALLS = 100_000_000  # weights that a round multiplies at least


def seconds(x, layers, exact):
    """CPU time of one product with each of the layers, as often as it takes to be measured."""
    turns = max(1, CALLS // (len(layers) * layers[0].spec.rows * layers[0].spec.cols))
    start = time.process_time()
    for _ in range(turns):
        for layer in layers:
            matmul(x, layer, exact=exact)
    return (time.process_time() - start) / (turns * len(layers))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--footprint", type=int, default=100_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(provenance(), native.path())
    for (rows, cols), bits, exact in [
        (shape, bits, exact) for shape in SHAPES for bits in (1, 2, 3, 4) for exact in (True, False)
    ]:
        x, kinds = torch.randn(1, cols).bfloat16(), []
        for width in (bits, TRELLIS + bits):
            layer = bench.random_layer(rows, cols, width)
            kinds.append(bench.copies_of(layer, max(1, args.footprint // layer.nbytes)))
        times = [[seconds(x, kind, exact) for kind in kinds] for _ in range(args.rounds + 1)]
        table, trellis = (min(column[1:]) for column in zip(*times, strict=True))
        print(
            f"{rows}x{cols} {bits} bit{'' if exact else ', x rounded to 8'}: "
            f"codebooks {table * 1e6:.1f} us, trellis {trellis * 1e6:.1f} us, "
            f"{table / trellis:.3f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
