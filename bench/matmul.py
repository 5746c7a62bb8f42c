"""Products with packed weights against torch, the memory's bandwidth and llama.cpp's ggml.

    python bench/matmul.py [--ggml DIR] [--out results.json]

DIR holds llama.cpp's shared libraries (libggml*.so of any build). Its weights are put into the
layout its processor backend prefers, as llama.cpp does, and into the plain one; the faster counts.
Both sides run on the same number of threads over copies of the weights that exceed the caches, one
shape after the other: ggml in a process of its own, since two sets of threads would hinder each
other.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from provenance import provenance
from skimlm import bench

SHAPES = bench.SHAPES
TYPES = {"q4_0": (2, 4.5), "q3_K": (11, 3.4375), "iq4_nl": (20, 4.5)}  # number, bits per weight
# ours at no more bits than theirs: 4 bits against q4_0 and iq4_nl, and a mixture of 3.44 bits
AGAINST = {"q4_0": {4: 1.0}, "iq4_nl": {4: 1.0}, "q3_K": {3: 0.66, 4: 0.34}}


class InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """llama.cpp's libraries, their functions declared as they are called."""

    def __init__(self, folder, threads):
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
        self.libraries = ctypes.CDLL(str(folder / "libggml.so"), ctypes.RTLD_GLOBAL), cpu
        self.backend = self("backend_cpu_init", pointer)()
        self("backend_cpu_set_n_threads", None, pointer, integer)(self.backend, threads)
        self.plain = self("backend_cpu_buffer_type", pointer)()

    def __call__(self, name, result, *arguments):
        library = next(lib for lib in self.libraries if hasattr(lib, f"ggml_{name}"))
        found = getattr(library, f"ggml_{name}")
        found.restype, found.argtypes = result, arguments
        return found

    def repacked(self):
        """The kind of buffer whose layout the processor backend prefers; None if it has none."""
        pointer = ctypes.c_void_p
        device = self("backend_get_device", pointer, pointer)(self.backend)
        reg = self("backend_dev_backend_reg", pointer, pointer)(device)
        look = self("backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        extra = look(reg, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(extra)(device)
        name = self("backend_buft_name", ctypes.c_char_p, pointer)
        found = [t for t in iter_until_null(types) if b"REPACK" in name(t).upper()]
        return found[0] if found else None

    def place(self, kind, tensors):
        """Give tensors memory of a kind of buffer; whether they fit."""
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        nbytes = self("nbytes", size, pointer)
        allocate = self("backend_tensor_alloc", ctypes.c_int, pointer, pointer, pointer)
        room = self("backend_buft_alloc_buffer", pointer, pointer, size)
        base = self("backend_buffer_get_base", pointer, pointer)
        step = (max(nbytes(t) for t in tensors) + 4096 + 63) // 64 * 64
        buffer = room(kind, step * len(tensors))
        return not any(allocate(buffer, t, base(buffer) + i * step) for i, t in enumerate(tensors))


def ggml_seconds(folder, kind, rows, cols, threads, repack, seconds=1.0):
    """Median seconds of one product with a [rows, cols] weight of a ggml type, batch 1."""
    pointer, c_int64, c_int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    ggml = Ggml(folder, threads)
    own = ggml.repacked() if repack else ggml.plain
    if own is None:
        return None
    new_2d = ggml("new_tensor_2d", pointer, pointer, c_int, c_int64, c_int64)
    mul_mat = ggml("mul_mat", pointer, pointer, pointer, pointer)
    expand = ggml("build_forward_expand", None, pointer, pointer)
    put = ggml("backend_tensor_set", None, pointer, pointer, *[ctypes.c_size_t] * 2)
    compute = ggml("backend_graph_compute", c_int, pointer, pointer)
    quantize = ggml(
        "quantize_chunk", ctypes.c_size_t, c_int, pointer, pointer, *[c_int64] * 3, pointer
    )
    context = ggml("init", pointer, InitParams)(InitParams(2**24, None, True))
    weight = torch.randn(rows, cols)
    number = TYPES[kind][0]
    one = new_2d(context, number, cols, rows)
    packed = ctypes.create_string_buffer(ggml("nbytes", ctypes.c_size_t, pointer)(one))
    quantize(number, weight.data_ptr(), packed, 0, rows, cols, None)
    copies = max(2, -(-bench.FOOTPRINT // len(packed)))
    x = new_2d(context, 0, cols, 1)
    weights = [new_2d(context, number, cols, rows) for _ in range(copies)]
    outs = [mul_mat(context, w, x) for w in weights]
    graph = ggml("new_graph", pointer, pointer)(context)
    for out in outs:
        expand(graph, out)
    if not (ggml.place(own, weights) and ggml.place(ggml.plain, [x, *outs])):
        return None
    for w in weights:
        put(w, ctypes.cast(packed, pointer), 0, len(packed))
    values = torch.randn(cols)
    put(x, values.data_ptr(), 0, values.nbytes)
    times = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        compute(ggml.backend, graph)
        times.append((time.perf_counter() - start) / copies)
    return statistics.median(times)


def iter_until_null(items):
    at = 0
    while items[at]:
        yield items[at]
        at += 1


def child(arguments):
    """Measure one case in a fresh process; None where ggml cannot do it."""
    command = [sys.executable, __file__, "--case", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def ours(rows, cols, mixture, threads):
    """(seconds, seconds with x in 8 bits, bits) of one product, batch 1.

    Rows have the widths of `mixture` {bits: share}.
    """
    torch.set_num_threads(threads)
    before, bench.MIXED = bench.MIXED, mixture
    layer = bench.random_layer(rows, cols, None)
    bench.MIXED = before
    size = layer.nbytes
    copies = bench.copies_of(layer, max(2, -(-bench.FOOTPRINT // size)))
    x = torch.randn(1, cols).bfloat16()
    exact, eight = (
        bench.median_seconds(partial(bench.product, x, kind), copies, 1.0) for kind in (True, False)
    )
    return exact, eight, 8 * size / rows / cols


def compare(folder, threads):
    rows = []
    for r, c in SHAPES:
        for kind, (_, bits) in TYPES.items():
            took, eight, own_bits = ours(r, c, AGAINST[kind], threads)
            cases = [child([str(folder), kind, r, c, threads, repack]) for repack in (True, False)]
            theirs = min((t for t in cases if t), default=None)
            rows.append(
                {
                    "rows": r,
                    "cols": c,
                    "type": kind,
                    "ggml_bits": bits,
                    "ggml_seconds": theirs,
                    "bits": own_bits,
                    "seconds": took,
                    "eight_seconds": eight,
                }
            )
            print(f"{r}x{c}  {kind} {bits:.2f} bits:", end=" ")
            print("not possible" if theirs is None else f"{theirs * 1e6:,.0f} us", end="; ")
            print(f"skimlm {own_bits:.2f} bits: {took * 1e6:,.0f} us exact", end="")
            print("" if theirs is None else f" ({theirs / took:.2f}x)", end=", ")
            print(f"{eight * 1e6:,.0f} us with x in 8 bits as ggml has it", end="")
            print("" if theirs is None else f" ({theirs / eight:.2f}x)", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ggml", type=Path, help="folder with libggml-base.so, -cpu.so and .so")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        folder, *rest = json.loads(args.case)
        print(json.dumps(ggml_seconds(Path(folder), *rest)))
        return
    facts = bench.run()
    print(bench.text(facts), end="\n\n", flush=True)
    if args.ggml:
        facts["ggml"] = compare(args.ggml, args.threads)
    print(f"\n{provenance()}")
    if args.out:
        args.out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
