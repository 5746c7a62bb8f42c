"""FORMAT.md and the golden files: what a version wrote is read for ever, and written the same."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pack import equal, oracle_pack, oracle_read, raw, with_parts

from conftest import random_quantized
from skimlm.format.pack import (
    Parts,
    dequantize,
    effective,
    histogram,
    layout,
    pack,
    row_bits,
    shared_bits,
    unpack,
)
from skimlm.runtime.linear import CompressedLinear, quantize_table, table_values

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "data" / "golden-v1.safetensors"
GOLDEN_2 = GOLDEN.with_name("golden-v2.safetensors")
DTYPES = {
    "weight": torch.uint8,
    "widths": torch.uint8,
    "codebook": torch.int8,
    "row_scale": torch.bfloat16,
    "row_zero": torch.int16,
    "in_scale": torch.float16,
}
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
GOLDEN_PARTS = {
    "half": Parts("2:4", 6, 5, 2, 4),
    "few": Parts("bitmap", 3, None, 1, 16),
    "grid": Parts(group=12),
}
GOLDEN_SUMS = {"half": 0.11932080145925283, "few": 4.403397656977177, "grid": -0.9829018684104085}
GOLDEN_TABLE = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 2.0, 0.1]])


def golden_tensors() -> dict[str, torch.Tensor]:
    """The tensors of the golden file, made again; run this file to write it."""
    q = random_quantized(9, 11, seed=7, in_scale=True)
    tensors = {f"proj.{name}": tensor for name, tensor in pack(q).items()}
    for bits in (8, 4):
        weight, scale = quantize_table(GOLDEN_TABLE, bits)
        tensors |= {f"table{bits}.weight": weight, f"table{bits}.scale": scale}
    return tensors


def golden_linears() -> dict[str, torch.Tensor]:
    """The same for version 2."""
    q = random_quantized(9, 12, seed=7, in_scale=True)
    return {
        f"{name}.{tensor}": stored
        for name, parts in GOLDEN_PARTS.items()
        for tensor, stored in pack(with_parts(q, parts, seed=7)).items()
    }


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def test_the_golden_file_reads_as_it_was_written():
    stored = part(load_file(GOLDEN), "proj.")
    q = unpack(stored, 9, 11)
    assert q.widths.tolist() == GOLDEN_WIDTHS
    assert q.codes[0].tolist() == GOLDEN_CODES
    assert torch.equal(dequantize(q).flatten()[:4], torch.tensor(GOLDEN_VALUES))
    assert oracle_pack(q) == {name: raw(tensor) for name, tensor in stored.items()}


def test_writing_again_gives_the_golden_bytes():
    stored = part(load_file(GOLDEN), "proj.")
    again = pack(unpack(stored, 9, 11))
    assert {k: raw(v) for k, v in again.items()} == {k: raw(v) for k, v in stored.items()}


@pytest.mark.parametrize("name", GOLDEN_PARTS)
def test_the_golden_file_of_version_2_reads_as_it_was_written(name):
    stored, parts = part(load_file(GOLDEN_2), f"{name}."), GOLDEN_PARTS[name]
    q = unpack(stored, 9, 12, parts)
    weight, *factors = oracle_read(stored, 9, 12, parts.entry())
    assert torch.equal(dequantize(q), weight)
    assert not factors or all(map(torch.equal, factors, q.adapter.values()))
    assert float(weight.double().sum()) == GOLDEN_SUMS[name]
    assert {k: raw(v) for k, v in pack(q).items()} == {k: raw(v) for k, v in stored.items()}


@pytest.mark.parametrize("bits, step", [(8, 1 / 127), (4, 1 / 7)])
def test_golden_tables_stand_for_their_table(bits, step):
    stored = part(load_file(GOLDEN), f"table{bits}.")
    values = table_values(stored["weight"], stored["scale"], 3, torch.float32)
    error = (values - GOLDEN_TABLE).abs().amax(1)
    assert (error <= GOLDEN_TABLE.abs().amax(1) * step).all()


def test_the_worked_example_of_format_md_is_true():
    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8").split("## A worked example")[1]
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    stored = {}
    for line in blocks[0].splitlines():
        name, *data = line.split()
        name = name.removeprefix("proj.")
        raw_bytes = torch.tensor([int(byte, 16) for byte in data], dtype=torch.uint8)
        stored[name] = raw_bytes.view(DTYPES[name])
    want = torch.tensor([[float(v) for v in line.split()] for line in blocks[1].splitlines()])
    q = unpack(stored, 3, 3)
    assert histogram(q.widths) == {2: 2, 6: 1}
    assert torch.equal(dequantize(q), want)
    assert torch.equal(CompressedLinear.from_quantized(q).dequantize(), want)
    assert equal(unpack(pack(q), 3, 3), q)


def test_the_second_worked_example_of_format_md_is_true():
    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8").split("## A second worked")[1]
    text = text.split("\n## ")[0]
    entry, stored_text, *matrices = re.findall(r"```\n(.*?)```", text, re.S)
    entry = json.loads(f"{{{entry}}}")["proj"]
    parts = Parts.read(entry, 8)
    shapes = layout({int(b): n for b, n in entry["widths"].items()}, 8, False, parts)
    stored = {}
    for line in stored_text.splitlines():
        name, *data = line.removeprefix("proj.").split()
        raw_bytes = torch.tensor([int(byte, 16) for byte in data], dtype=torch.uint8)
        dtype, shape = shapes[name]
        stored[name] = raw_bytes.view(dtype).view(shape)
    weight, whole = (
        torch.tensor([[float(v) for v in line.split()] for line in matrix.splitlines()])
        for matrix in matrices
    )
    q = unpack(stored, 2, 8, parts)
    assert torch.equal(dequantize(q), weight) and torch.equal(effective(q), whole)
    layer = CompressedLinear.from_quantized(q)
    assert torch.equal(layer.dequantize(), whole)
    assert torch.equal(layer(torch.eye(8)), whole.T)
    assert {k: raw(v) for k, v in pack(q).items()} == {k: raw(v) for k, v in stored.items()}


def formula(before: str, after: str, **values: int) -> int:
    """What a formula of FORMAT.md between these words comes to."""
    text = " ".join((ROOT / "FORMAT.md").read_text(encoding="utf-8").split())
    python = text.split(before)[1].split(after)[0].replace("^", "**")
    return eval(python, {"ceil": math.ceil, **values})


def test_format_md_states_the_cost_of_a_row_as_the_code_counts_it():
    for b in range(1, 9):
        assert formula("One row costs ", " bits;", b=b, c=577) == row_bits(b, 577)
        parts = Parts("bitmap", 99, 128)
        cost = formula("One row then costs ", " bits on a grid", b=b, c=577, n=99, p=73, g=128)
        assert cost == row_bits(b, 577, parts)
        sparse = formula("One row costs ", " bits;", b=b, c=99) + 8 * 73
        assert sparse == row_bits(b, 577, Parts("bitmap", 99))


def test_format_md_states_the_cost_of_an_adapter_as_the_code_counts_it():
    sizes = dict(k=7, c=577, r=129)
    cost = formula("The adapter adds ", " bits at 16", **sizes)
    assert cost == shared_bits(129, 577, Parts(rank=7, adapter_bits=16))
    cost = formula(" bits at 16, or ", " at 4.", **sizes)
    assert cost == shared_bits(129, 577, Parts(rank=7, adapter_bits=4))


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file(golden_tensors(), GOLDEN)
    save_file(golden_linears(), GOLDEN_2)
