"""How fast the kernels are on this machine: against torch, and against what its memory allows.

At batch 1 a product is bound by reading the weights, so every timing walks over copies of them that
together exceed the caches (`FOOTPRINT`), as a model does that decodes one token after the other.
Bandwidth is the best of plain reads in the same process, on as many threads, between the timings.
Times are medians.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skimlm import native
from skimlm.errors import SkimError
from skimlm.format.layer import Layer, LayerSpec, layout
from skimlm.runtime.ops import matmul

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (1536, 576), (576, 1536))
# the widths of rows in a model of 3.2 bits all-in, as allocation gives them
MIXED = {2: 0.16, 3: 0.54, 4: 0.28, 5: 0.02}
WIDTHS: tuple[int | None, ...] = (None, 2, 3, 4)  # None: mixed
BATCHES = (1, 4, 16, 64, 512)
FOOTPRINT = 200_000_000  # bytes
READ = 1_000_000_000  # bytes
Progress = Callable[[str, int, int], None]


def run(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    widths: Sequence[int | None] = WIDTHS,
    batches: Sequence[int] = BATCHES,
    *,
    seconds: float = 0.3,
    exact: bool = True,
    footprint: int = FOOTPRINT,
    read: int = READ,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time every shape, width and batch for `seconds` each; plain values as DESIGN's `bench`."""
    if why := native.missing():
        raise SkimError(f"there is nothing to time: {why}")
    found: list[dict[str, Any]] = []
    total, done = len(shapes) * len(batches) * (len(widths) + 2), 0
    memory = torch.ones(read // 8, dtype=torch.int64)
    reads = [read_bandwidth(memory)]

    def walk(call: Callable[[Any], Any], stored: Sequence[Any]) -> float:
        nonlocal done
        done += 1
        if progress:
            progress("time", done, total)
        return median_seconds(call, stored, seconds)

    def dense(rows: int, cols: int, dtype: torch.dtype) -> dict[int, float]:
        weight = torch.randn(rows, cols).to(dtype)
        copies = [weight.clone() for _ in range(_copies(weight.nbytes, footprint))]
        xs = {batch: torch.randn(batch, cols).to(dtype) for batch in batches}
        return {b: walk(partial(torch.nn.functional.linear, x), copies) for b, x in xs.items()}

    for rows, cols in shapes:
        torch.manual_seed(0)
        bf16 = dense(rows, cols, torch.bfloat16)
        fp32 = dense(rows, cols, torch.float32)
        for width in widths:
            layer = random_layer(rows, cols, width)
            copies = copies_of(layer, _copies(layer.nbytes, footprint))
            for batch in batches:
                took = walk(partial(product, torch.randn(batch, cols).bfloat16(), exact), copies)
                sizes = {"rows": rows, "cols": cols, "bits": 8 * layer.nbytes / (rows * cols)}
                times = {"torch_bf16_seconds": bf16[batch], "torch_fp32_seconds": fp32[batch]}
                found.append(sizes | {"width": width, "batch": batch, "seconds": took} | times)
            reads.append(read_bandwidth(memory))
    _compare(found, max(reads))
    return {
        "bandwidth_bytes_per_second": max(reads),
        "threads": torch.get_num_threads(),
        "kernels": native.path(),
        "rows": found,
    }


def _compare(found: Sequence[dict[str, Any]], bandwidth: float) -> None:
    """Enter what share of the memory's bandwidth every product reaches."""
    for row in found:
        weights = row["rows"] * row["cols"]
        row["of_bandwidth"] = weights * row["bits"] / 8 / row["seconds"] / bandwidth
        # against dense bf16 if it ran at the full bandwidth, which it never does
        row["of_bf16_bound"] = 2 * weights / bandwidth / row["seconds"]


def random_layer(rows: int, cols: int, width: int | None, **options: Any) -> Layer:
    """A layer of random codes, rows of one width or `MIXED` and shuffled; `options` of its spec."""
    if width is not None:
        widths = torch.full((rows,), width, dtype=torch.uint8)
    else:
        ends = torch.tensor(list(MIXED.values())).cumsum(0)[:-1] * rows
        widths = torch.tensor(list(MIXED), dtype=torch.uint8)[
            torch.bucketize(torch.randperm(rows), ends, right=True)
        ]
    spec = LayerSpec(rows, cols, **options).with_widths(widths)
    stored: dict[str, Tensor] = {}
    for name, (dtype, shape) in layout(spec).items():
        if dtype.is_floating_point:
            stored[name] = torch.rand(shape).to(dtype)
        else:
            info = torch.iinfo(dtype)
            stored[name] = torch.randint(info.min, info.max + 1, shape, dtype=dtype)
    return Layer(spec, stored | {"widths": widths})


def copies_of(layer: Layer, count: int) -> list[Layer]:
    """The layer so many times, each in memory of its own."""
    tensors = layer.tensors.items()
    return [Layer(layer.spec, {n: t.clone() for n, t in tensors}) for _ in range(count)]


def read_bandwidth(data: Tensor, repeats: int = 3) -> float:
    """Bytes per second that plain reads of `data` reach on torch's threads, the best of some."""
    out = torch.zeros(1, dtype=torch.int64)

    def seconds() -> float:
        start = time.perf_counter()
        native.call("read", data, data.nbytes, out)
        return time.perf_counter() - start

    return data.nbytes / min(seconds() for _ in range(repeats))


def median_seconds(call: Callable[[Any], Any], copies: Sequence[Any], seconds: float) -> float:
    """Median time of call(copy), walking over the copies, for about `seconds`."""
    call(copies[0])
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        copy = copies[len(times) % len(copies)]
        start = time.perf_counter()
        call(copy)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def product(x: Tensor, exact: bool, layer: Layer) -> Tensor:
    return matmul(x, layer, exact=exact)


def _copies(nbytes: int, footprint: int) -> int:
    return max(1, -(-footprint // nbytes))


def text(facts: dict[str, Any]) -> str:
    """Lay out what `run` returns."""
    from skimlm.evaluate.report import table

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield f"{row['rows']}x{row['cols']}"
        yield f"{row['bits']:.2f}"
        yield str(row["batch"])
        yield f"{row['seconds'] * 1e6:,.0f}"
        yield f"{row['torch_bf16_seconds'] / row['seconds']:.2f}"
        yield f"{row['torch_fp32_seconds'] / row['seconds']:.2f}"
        yield f"{row['of_bf16_bound']:.2f}"
        yield f"{100 * row['of_bandwidth']:.0f}"

    header = ["weight", "bits", "batch", "us", "x bf16", "x fp32", "x bf16 bound", "% bandwidth"]
    return "\n".join(
        [
            f"kernels {facts['kernels']}, {facts['threads']} threads, memory read at "
            f"{facts['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s",
            "",
            table([header, *(list(cells(row)) for row in facts["rows"])]),
            "",
            "x bf16, x fp32   times as fast as torch's product with the dense weight",
            "x bf16 bound     times as fast as dense bf16 could be at this memory bandwidth",
            "% bandwidth      bytes of the compressed weight per second, of the same bandwidth",
        ]
    )
