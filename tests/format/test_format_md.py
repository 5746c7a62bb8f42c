"""FORMAT.md and the golden files: what a version wrote is read for ever, and written the same."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import random_quantized
from layer_sample import equal, options, oracle_pack, oracle_read, raw, with_options
from skimlm.format import (
    Layer,
    LayerSpec,
    dequantize,
    effective,
    layout,
    pack,
    row_bits,
    shared_bits,
    table_values,
    unpack,
    windows,
)
from skimlm.quantize.table import quantize_table
from skimlm.runtime.linear import CompressedLinear

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "data" / "golden-v1.safetensors"
GOLDEN_2 = GOLDEN.with_name("golden-v2.safetensors")
GOLDEN_3 = GOLDEN.with_name("golden-v3.safetensors")
# what the golden file holds: widths, codes and first values of the first row, and a table
GOLDEN_WIDTHS = [8, 5, 2, 7, 4, 4, 8, 8, 5]
GOLDEN_CODES = [217, 218, 141, 73, 52, 113, 91, 184, 18, 248, 27]
GOLDEN_VALUES = [
    0.11125589907169342,
    0.0784754753112793,
    -0.15693403780460358,
    -0.43421292304992676,
]
# the linears of version 2's golden file, all [9, 12], and the sums of their weights
GOLDEN_OPTIONS = {
    "half": options("2:4", 6, 5, 2, 4),
    "few": options("bitmap", 3, None, 1, 16),
    "grid": options(group=12),
}
GOLDEN_SUMS = {"half": 0.11932080145925283, "few": 4.403397656977177, "grid": -0.9829018684104085}
# the same of version 3, with rows of these widths
GOLDEN_WIDTHS_3 = [19, 2, 17, 20, 18, 7, 18]
GOLDEN_OPTIONS_3 = {"whole": options(), "half": options("2:4", 6, None, 2, 4)}
GOLDEN_SUMS_3 = {"whole": 4.339591056108475, "half": 3.2835026159882545}
GOLDEN_TABLE = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 2.0, 0.1]])


def golden_tensors() -> dict[str, torch.Tensor]:
    """The tensors of the golden file, made again; run this file to write it."""
    q = random_quantized(9, 11, seed=7, in_scale=True)
    tensors = {f"proj.{name}": tensor for name, tensor in pack(q).tensors.items()}
    for bits in (8, 4):
        weight, scale = quantize_table(GOLDEN_TABLE, bits)
        tensors |= {f"table{bits}.weight": weight, f"table{bits}.scale": scale}
    return tensors


def golden_linears(widths=None, kinds=GOLDEN_OPTIONS) -> dict[str, torch.Tensor]:
    """The same for version 2, or with these widths for version 3."""
    q = random_quantized(9, 12, seed=7, in_scale=True, widths=widths)
    return {
        f"{name}.{tensor}": stored
        for name, chosen in kinds.items()
        for tensor, stored in pack(with_options(q, **chosen, seed=7)).tensors.items()
    }


def raws(layer: Layer) -> dict[str, bytes]:
    """The tensors of a layer as bytes."""
    return {name: raw(tensor) for name, tensor in layer.tensors.items()}


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def golden_layer() -> Layer:
    stored = part(load_file(GOLDEN), "proj.")
    spec = LayerSpec(9, 11, in_scale=True).with_widths(torch.tensor(GOLDEN_WIDTHS))
    return Layer(spec, stored)


def test_the_golden_file_reads_as_it_was_written():
    layer = golden_layer()
    q = unpack(layer)
    assert q.widths.tolist() == GOLDEN_WIDTHS
    assert q.codes[0].tolist() == GOLDEN_CODES
    assert torch.equal(dequantize(q).flatten()[:4], torch.tensor(GOLDEN_VALUES))
    assert oracle_pack(q) == raws(layer)


def test_writing_again_gives_the_golden_bytes():
    layer = golden_layer()
    assert raws(pack(unpack(layer))) == raws(layer)


@pytest.mark.parametrize(
    "version, file, name, chosen, total",
    [(2, GOLDEN_2, n, chosen, GOLDEN_SUMS[n]) for n, chosen in GOLDEN_OPTIONS.items()]
    + [(3, GOLDEN_3, n, chosen, GOLDEN_SUMS_3[n]) for n, chosen in GOLDEN_OPTIONS_3.items()],
)
def test_golden_files_of_later_versions_read_as_they_were_written(
    version, file, name, chosen, total
):
    stored = part(load_file(file), f"{name}.")
    spec = LayerSpec(9, 12, in_scale=True, **chosen).with_widths(stored["widths"])
    layer = Layer(spec, stored)
    assert spec.version == version
    q = unpack(layer)
    weight, *factors = oracle_read(stored, 9, 12, spec.entry())
    assert torch.equal(dequantize(q), weight)
    assert not factors or all(map(torch.equal, factors, q.adapter.values()))
    assert float(weight.double().sum()) == total
    assert raws(pack(q)) == raws(layer)


@pytest.mark.parametrize("bits, step", [(8, 1 / 127), (4, 1 / 7)])
def test_golden_tables_stand_for_their_table(bits, step):
    stored = part(load_file(GOLDEN), f"table{bits}.")
    values = table_values(stored["weight"], stored["scale"], 3, torch.float32)
    error = (values - GOLDEN_TABLE).abs().amax(1)
    assert (error <= GOLDEN_TABLE.abs().amax(1) * step).all()


def stored_example(text: str, spec: LayerSpec) -> Layer:
    """The tensors of a worked example, `proj.NAME` and bytes in hex a line."""
    shapes, stored = layout(spec), {}
    for line in text.splitlines():
        name, *data = line.removeprefix("proj.").split()
        raw_bytes = torch.tensor([int(byte, 16) for byte in data], dtype=torch.uint8)
        dtype, shape = shapes[name]
        stored[name] = raw_bytes.view(dtype).view(shape)
    return Layer(spec, stored)


def matrix(text: str) -> torch.Tensor:
    return torch.tensor([[float(v) for v in line.split()] for line in text.splitlines()])


def test_the_worked_example_of_format_md_is_true():
    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8").split("## A worked example")[1]
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    q = unpack(stored_example(blocks[0], LayerSpec(3, 3, {2: 2, 6: 1}, in_scale=True)))
    want = matrix(blocks[1])
    assert torch.equal(dequantize(q), want)
    assert torch.equal(CompressedLinear.from_quantized(q).dequantize(), want)
    assert equal(unpack(pack(q)), q)


def test_the_second_worked_example_of_format_md_is_true():
    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8").split("## A second worked")[1]
    text = text.split("\n## ")[0]
    entry, stored_text, *matrices = re.findall(r"```\n(.*?)```", text, re.S)
    spec = LayerSpec.read(json.loads(f"{{{entry}}}")["proj"], 2, 8)
    stored = stored_example(stored_text, spec)
    weight, whole = map(matrix, matrices)
    q = unpack(stored)
    assert torch.equal(dequantize(q), weight) and torch.equal(effective(q), whole)
    layer = CompressedLinear.from_quantized(q)
    assert torch.equal(layer.dequantize(), whole)
    assert torch.equal(layer(torch.eye(8)), whole.T)
    assert raws(pack(q)) == raws(stored)


def test_the_third_worked_example_of_format_md_is_true():
    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8").split("## A third worked")[1]
    stored_text, weight = re.findall(r"```\n(.*?)```", text, re.S)[:2]
    layer = stored_example(stored_text, LayerSpec(3, 10, {2: 1, 18: 1, 19: 1}))
    k = torch.arange(128)
    trellis = torch.stack((k - 64, 63 - k)).to(torch.int8)
    q = unpack(Layer(layer.spec, layer.tensors | {"trellis": trellis}))
    rows = "1235407634", "3210213012", "0123120321"
    assert q.codes.tolist() == [[int(code) for code in row] for row in rows]
    for row, bits in ((0, 3), (2, 2)):
        found = " ".join(map(str, windows(q.codes[row : row + 1], bits)[0].tolist()))
        assert re.search(f"windows (are )?{found}, levels", " ".join(text.split()))
    assert torch.equal(dequantize(q), matrix(weight))
    assert torch.equal(CompressedLinear.from_quantized(q)(torch.eye(10)), matrix(weight).T)
    assert equal(unpack(pack(q)), q)


def formula(before: str, after: str, **values: int) -> int:
    """What a formula of FORMAT.md between these words comes to."""
    text = " ".join((ROOT / "FORMAT.md").read_text(encoding="utf-8").split())
    python = text.split(before)[1].split(after)[0].replace("^", "**")
    return eval(python, {"ceil": math.ceil, **values})


def test_format_md_states_the_cost_of_a_row_as_the_code_counts_it():
    for b in range(1, 9):
        assert formula("One row costs ", " bits;", b=b, c=577) == row_bits(LayerSpec(1, 577), b)
        spec = LayerSpec(1, 577, sparsity="bitmap", kept=99, group=128)
        cost = formula("One row then costs ", " bits on a grid", b=b, c=577, n=99, p=73, g=128)
        assert cost == row_bits(spec, b)
        sparse = formula("One row costs ", " bits;", b=b, c=99) + 8 * 73
        assert sparse == row_bits(LayerSpec(1, 577, sparsity="bitmap", kept=99), b)


def test_format_md_states_the_cost_of_a_trellis_row_as_the_code_counts_it():
    for b in range(1, 5):
        for kept, places in ((0, 0), (99, 73)):
            sparsity = "bitmap" if kept else None
            spec = LayerSpec(1, 577, {16 + b: 1}, sparsity=sparsity, kept=kept)
            cost = formula("One trellis row costs ", " bits; every", b=b, n=kept or 577, p=places)
            assert cost == row_bits(spec, 16 + b)
            assert shared_bits(spec) == formula("width in use adds ", " bits to the linear")


def test_format_md_states_the_cost_of_an_adapter_as_the_code_counts_it():
    sizes = dict(k=7, c=577, r=129)
    cost = formula("The adapter adds ", " bits at 16", **sizes)
    assert cost == shared_bits(LayerSpec(129, 577, rank=7, adapter_bits=16))
    cost = formula(" bits at 16, or ", " at 4.", **sizes)
    assert cost == shared_bits(LayerSpec(129, 577, rank=7, adapter_bits=4))


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file(golden_tensors(), GOLDEN)
    save_file(golden_linears(), GOLDEN_2)
    save_file(golden_linears(GOLDEN_WIDTHS_3, GOLDEN_OPTIONS_3), GOLDEN_3)
