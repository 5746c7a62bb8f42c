"""Random malformed calls into the native code, under a sanitizer: `make fuzz`.

    python tests/fuzz.py FOLDER [CALLS]

FOLDER holds native libraries built with -fsanitize=address,undefined. Each call takes the buffers
of a valid layer or of a table and spoils something: a type, a length, a
layout, a value of `widths` or `positions`, an option, a missing buffer. It must give a result of
the right shape or a Python error that names a shape; the sanitizer ends the process at the first
access out of bounds.
"""

import dataclasses
import random
import re
import sys
from pathlib import Path

import torch

from conftest import random_quantized
from layer_sample import with_options
from skimlm import native
from skimlm.format import Layer, pack
from skimlm.quantize.table import quantize_table
from skimlm.runtime import ops

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int64, torch.float32, torch.bfloat16)


def spoil(tensor, choose):
    """One way to make a tensor wrong, or right by luck."""
    if tensor is None:
        return torch.zeros(choose.randrange(3), dtype=choose.choice(DTYPES))
    ways = [
        lambda t: None,
        lambda t: t[: choose.randrange(len(t) + 1)],
        lambda t: torch.cat([t, t[: choose.randrange(1, len(t) + 1)]]) if len(t) else t,
        lambda t: t.to(choose.choice(DTYPES)),
        lambda t: t.repeat_interleave(2)[::2],
        lambda t: t[None],
        lambda t: t.new_empty(0),
        lambda t: t.reshape(-1)[torch.randperm(t.numel())] if t.dim() == 1 else t.T,
        lambda t: torch.randint(0, 256, t.shape).to(t.dtype),
        lambda t: t.to("meta"),
    ]
    return choose.choice(ways)(tensor)


OPTIONS = ("sparsity", "kept", "group", "rank", "adapter_bits")
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 4, 64, 2**16, 2**31, 2**62, 2**63 - 1)


def layer_call(choose):
    rows = choose.choice([choose.randint(1, 70), 128, 257])  # whole blocks of B, too
    cols = choose.choice([4, 7, 12, 64, 65, 68, 127, 128, 129, 132, 300])
    sparse = [(None, 0), ("bitmap", choose.randint(1, cols)), ("2:4", cols // 2)]
    sparsity, kept = choose.choice(sparse[: 2 if cols % 4 else 3])
    group, adapter = (
        choose.choice([None, 1, 33, 64, 1000]),
        choose.choice([(1, 4), (5, 4), (3, 16)]),
    )
    if choose.random() < 0.5:  # version 1
        sparsity, kept, group, adapter = None, 0, None, (0, 0)
    widths = None
    if group is None and choose.random() < 0.5:
        widths = choose.sample([*range(1, 9), *range(17, 21)], choose.randint(1, 12))
    q = random_quantized(rows, cols, choose.randrange(9), choose.random() < 0.3, widths)
    layer = pack(with_options(q, sparsity, kept, group, *adapter))
    stored, spec = dict(layer.tensors), layer.spec
    x = torch.randn(choose.choice([1, 1, 2, 5, 33, 40]), cols)
    x = x.to(choose.choice([torch.float32, torch.bfloat16]))
    bias = torch.randn(rows).to(x.dtype) if choose.random() < 0.3 else None
    for _ in range(choose.choice([0, 1, 1, 2])):
        name = choose.choice([*stored, "positions", "trellis", "option", "x", "bias"])
        if name == "option":
            option = choose.choice(OPTIONS)
            values = (None, "2:4", "bitmap") if option == "sparsity" else NUMBERS
            spec = dataclasses.replace(spec, **{option: choose.choice(values)})
        elif name == "bias":
            bias = spoil(bias, choose)
        elif name == "x":
            x = spoil(x, choose)
        else:
            stored[name] = spoil(stored.get(name), choose)
    layer = Layer(spec, {n: t for n, t in stored.items() if t is not None})
    if choose.random() < 0.2:
        return ops.dequantize(layer, x.dtype).shape == (rows, cols)
    if choose.random() < 0.2:
        ids = torch.randint(0, rows + choose.choice([0, 0, 0, 1]), (choose.randrange(40),))
        return ops.rows(layer, ids, choose.choice(DTYPES[-2:])).shape == (len(ids), cols)
    if x is not None and x.dim() == 2 and choose.random() < 0.2:
        layers = [
            choose.choice([layer, layer, pack(q)]) for _ in range(choose.choice([1, 2, len(x)]))
        ]
        return len(ops.matmul_each(x, layers)) == len(layers)
    out = ops.matmul(x, layer, bias, exact=choose.random() < 0.7)
    return out.shape[:-1] == x.shape[:-1]


def table_call(choose):
    rows, cols, bits = (
        choose.randint(1, 50),
        choose.choice([1, 7, 64, 65, 130]),
        choose.choice([4, 8]),
    )
    codes, scale = quantize_table(torch.randn(rows, cols), bits)
    x = torch.randn(choose.choice([1, 3]), cols).to(choose.choice([torch.float32, torch.bfloat16]))
    spoiled = [x, codes, scale]
    at = choose.randrange(4)
    if at < 3:
        spoiled[at] = spoil(spoiled[at], choose)
    return ops.table_matmul(*spoiled, bits).shape[-1] == len(spoiled[2])


CALLS = [table_call, layer_call, layer_call, layer_call, layer_call]


def main():
    folder, calls = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    native.FOLDER = folder
    torch.set_num_threads(2)
    done = {"right": 0, "refused": 0}
    for isa in native.ISAS[: native._open("portable").skimlm_best_isa() + 1]:
        library = native._open(isa)
        native.library = lambda library=library: library
        choose = random.Random(0)
        torch.manual_seed(0)
        for i in range(calls):
            try:
                right = CALLS[i % 5](choose)
                assert right, f"call {i} with {isa}: a result of the wrong shape"
                done["right"] += 1
            except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
                text = str(error)
                assert re.search(r"\d|missing|belong|together|None|range", text), (
                    f"call {i}: {text}"
                )
                done["refused"] += 1
    print(f"{calls} calls for each of {', '.join(native.ISAS)}: {done}")


if __name__ == "__main__":
    main()
