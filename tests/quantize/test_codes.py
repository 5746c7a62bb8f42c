"""Packed rows as numbers, against the row as one big integer."""

import pytest
import torch

from layer_sample import oracle_bytes, oracle_planes, oracle_window
from skimlm import native
from skimlm.quantize.codes import unpack_codes, unpack_windows
from skimlm.quantize.kmeans import lookup

SHAPES = [(1, 1), (3, 7), (70, 8), (5, 9), (4, 65), (3, 48), (2, 577)]


def packed_rows(n, cols, bits, as_bytes=oracle_bytes):
    """Random codes, and their rows."""
    codes = torch.randint(0, 2**bits, (n, cols), dtype=torch.uint8)
    rows = [list(as_bytes(row, bits)) for row in codes.tolist()]
    return codes, torch.tensor(rows, dtype=torch.uint8)


@pytest.fixture(params=["native", "torch"])
def either(request, isa, monkeypatch):
    """Native code on every instruction set, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "missing", lambda: "none")


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_codes_come_back(either, rows, cols):
    for bits in range(1, 9):
        codes, packed = packed_rows(rows, cols, bits)
        assert torch.equal(unpack_codes(packed, bits, cols), codes)


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_windows_are_codes_and_the_taps_behind_them(either, rows, cols):
    for bits in range(1, 5):
        codes, packed = packed_rows(rows, cols, bits, oracle_planes)
        want = [[oracle_window(row, bits, j) for j in range(cols)] for row in codes.tolist()]
        assert unpack_windows(packed, bits, cols).tolist() == want


@pytest.mark.parametrize("entries", [2, 32, 128, 256])
@pytest.mark.parametrize("rows, cols", [(1, 1), (70, 9), (5, 577)])
def test_looking_up_and_summing_by_code_take_as_many_entries_as_a_byte_has(
    isa, rows, cols, entries
):
    codes = torch.randint(0, entries, (rows, cols), dtype=torch.uint8)
    table, gradient = torch.randn(rows, entries), torch.randn(rows, cols).bfloat16()
    assert torch.equal(lookup(codes, table), table.gather(1, codes.long()).bfloat16())
    sums = torch.full((rows, entries), 7.0)
    native.call("reduce_bf16", codes, gradient, sums, rows, cols, entries)
    want = torch.zeros(rows, entries, dtype=torch.float64)
    want.scatter_add_(1, codes.long(), gradient.double())
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_nothing(isa):
    codes, packed = packed_rows(300, 129, 3)
    torch.set_num_threads(2)
    found = unpack_codes(packed, 3, 129)
    torch.set_num_threads(1)
    assert torch.equal(found, codes)


def test_rows_of_another_length_and_bits_that_there_are_not_are_refused(isa):
    _, packed = packed_rows(3, 9, 3)
    with pytest.raises(ValueError, match=r"packed must be torch.uint8 \(3, 5\)"):
        unpack_codes(packed, 4, 9)
    with pytest.raises(ValueError, match=r"packed must be torch.uint8 \(3, 6\)"):
        unpack_windows(packed, 3, 9)
    with pytest.raises(ValueError, match="unpack_windows: sizes do not fit each other"):
        unpack_windows(torch.zeros(3, 10, dtype=torch.uint8), 5, 9)
    with pytest.raises(ValueError, match="unpack_codes: sizes do not fit each other"):
        unpack_codes(torch.zeros(3, 11, dtype=torch.uint8), 9, 9)
