"""FORMAT.md and the golden file: what version 1 wrote is read for ever, and written the same."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import random_quantized
from skimlm.linear import CompressedLinear, quantize_table, table_values
from skimlm.weights.pack import dequantize, histogram, pack, unpack
from test_pack import equal, oracle_pack, raw

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "data" / "golden-v1.safetensors"
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
GOLDEN_TABLE = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 2.0, 0.1]])


def golden_tensors() -> dict[str, torch.Tensor]:
    """The tensors of the golden file, made again; `python tests/test_format.py` writes the file."""
    q = random_quantized(9, 11, seed=7, in_scale=True)
    tensors = {f"proj.{name}": tensor for name, tensor in pack(q).items()}
    for bits in (8, 4):
        weight, scale = quantize_table(GOLDEN_TABLE, bits)
        tensors |= {f"table{bits}.weight": weight, f"table{bits}.scale": scale}
    return tensors


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


def test_format_md_states_the_cost_of_a_row_as_the_code_counts_it():
    from skimlm.weights.pack import row_bits

    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8")
    formula = re.search(r"One row costs (.*?) bits;", text)[1]
    python = formula.replace("^", "**").replace("8*ceil(c*b/8)", "8 * -(-c * b // 8)")
    for b in range(1, 9):
        assert eval(python, {"b": b, "c": 577}) == row_bits(b, 577)


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file(golden_tensors(), GOLDEN)
