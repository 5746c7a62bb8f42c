"""Packing against an oracle in Python integers, every width, and every way a file can be wrong."""

import dataclasses

import pytest
import torch

from conftest import random_quantized
from skimlm.errors import FormatError, SkimError
from skimlm.format import pack as P
from skimlm.runtime.ops import dequantize_packed, dequantize_reference, dequantize_stored


def oracle_bytes(codes: list[int], width: int) -> bytes:
    """One row's bytes, from the row as one big integer."""
    stream = sum(code << (j * width) for j, code in enumerate(codes))
    return stream.to_bytes((len(codes) * width + 7) // 8, "little")


def oracle_pack(q: P.QuantizedWeight) -> dict[str, bytes]:
    """Every stored tensor as bytes, row by row, by the letter of FORMAT.md."""
    order = sorted(range(len(q.widths)), key=lambda i: (int(q.widths[i]), i))
    out = {"weight": b"", "codebook": b"", "row_scale": b"", "row_zero": b""}
    out["widths"] = bytes(q.widths.tolist())
    for i in order:
        b = int(q.widths[i])
        out["weight"] += oracle_bytes(q.codes[i].tolist(), b)
        out["row_scale"] += raw(q.row_scale[i])
        if b <= 5:
            out["codebook"] += bytes(v & 255 for v in q.codebook[i, : 2**b].tolist())
        else:
            out["row_zero"] += int(q.row_zero[i]).to_bytes(2, "little", signed=True)
    if q.in_scale is not None:
        out["in_scale"] = raw(q.in_scale)
    return {name: data for name, data in out.items() if data}


def oracle_value(q: P.QuantizedWeight, i: int, j: int) -> float:
    """One weight, in doubles: the three factors have few enough bits to multiply exactly."""
    code, b = int(q.codes[i, j]), int(q.widths[i])
    level = int(q.codebook[i, code]) if b <= 5 else code - int(q.row_zero[i])
    return level * float(q.row_scale[i]) * (1.0 if q.in_scale is None else float(q.in_scale[j]))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def equal(a, b) -> bool:
    """Whether two of the dataclasses of pack.py hold the same numbers."""
    if not isinstance(a, (P.QuantizedWeight, P.Adapter)):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    names = [field.name for field in dataclasses.fields(a)]
    return type(a) is type(b) and all(equal(getattr(a, n), getattr(b, n)) for n in names)


def with_parts(q, parts: P.Parts, seed: int = 0) -> P.QuantizedWeight:
    """A dense random weight made sparse, put on a grid and given an adapter."""
    (rows, cols), g = q.shape, torch.Generator().manual_seed(seed)
    codes, mask, adapter, row_scale = q.codes, None, None, q.row_scale
    if parts.sparsity:
        size, kept = (4, 2) if parts.sparsity == "2:4" else (cols, parts.kept)
        chosen = torch.rand(rows, cols // size, size, generator=g).topk(kept).indices
        mask = torch.zeros(rows, cols // size, size, dtype=torch.bool).scatter_(2, chosen, True)
        mask = mask.view(rows, cols)
        codes = codes[mask].view(rows, -1)
    on_grid = parts.group is not None
    if on_grid:
        spread = torch.randn(rows, -(-cols // parts.group), generator=g) / cols**0.5
        row_scale = (spread / 2 ** q.widths.float().unsqueeze(1)).bfloat16()

    def factor(n):
        if parts.adapter_bits == 16:
            return (torch.randn(parts.rank, n, generator=g) / 8).bfloat16(), None
        codes = torch.randint(-8, 8, (parts.rank, n), dtype=torch.int8, generator=g)
        return codes, (torch.randn(parts.rank, -(-n // 128), generator=g) / 64).bfloat16()

    if parts.rank:
        (a, a_scale), (b, b_scale) = factor(cols), factor(rows)
        adapter = P.Adapter(a, b, a_scale, b_scale)
    return P.QuantizedWeight(
        codes,
        q.widths,
        torch.zeros_like(q.codebook) if on_grid else q.codebook,
        row_scale,
        torch.zeros_like(q.row_zero) if on_grid else q.row_zero,
        q.in_scale,
        mask,
        parts.sparsity,
        parts.group,
        adapter,
    )


def bits(data: bytes, start: int, count: int) -> int:
    """`count` bits of a stream from bit `start` on, the first one lowest."""
    return sum((data[k // 8] >> k % 8 & 1) << (k - start) for k in range(start, start + count))


def oracle_read(stored: dict[str, torch.Tensor], rows: int, cols: int, entry: dict):
    """W, and A and B if there are any, a number at a time by the letter of FORMAT.md."""
    data = {name: raw(tensor) for name, tensor in stored.items()}

    def number(name, i, kind, size):
        piece = bytearray(data[name][size * i : size * i + size])
        return float(torch.frombuffer(piece, dtype=kind)[0])

    n, g, sparsity = entry.get("kept", cols), entry.get("group"), entry.get("sparsity")
    pairs = ["01", "02", "03", "12", "13", "23"]
    at = table = zero = places = 0
    weight = [[0.0] * cols for _ in range(rows)]
    widths = list(data["widths"])
    for place, i in enumerate(sorted(range(rows), key=lambda i: (widths[i], i))):
        b, columns = widths[i], range(cols)
        if sparsity == "bitmap":
            columns = [j for j in range(cols) if bits(data["positions"][places:], j, 1)]
            places += (cols + 7) // 8
        elif sparsity:
            found = [bits(data["positions"][places:], 3 * q, 3) for q in range(cols // 4)]
            columns = [4 * q + int(c) for q, code in enumerate(found) for c in pairs[code]]
            places += (3 * (cols // 4) + 7) // 8
        assert len(columns) == n
        for k, j in enumerate(columns):
            code = bits(data["weight"][at:], k * b, b)
            if g:
                level = code - 2 ** (b - 1)
            elif b <= 5:
                level = int.from_bytes(data["codebook"][table + code :][:1], "little", signed=True)
            else:
                level = code - number("row_zero", zero, torch.int16, 2)
            groups = -(-cols // g) if g else 1
            scale = number("row_scale", place * groups + (j // g if g else 0), torch.bfloat16, 2)
            shift = number("in_scale", j, torch.float16, 2) if "in_scale" in data else 1.0
            weight[i][j] = level * scale * shift
        at += (n * b + 7) // 8
        table, zero = table + (2**b if b <= 5 else 0), zero + (b > 5)

    def factor(name, n):
        if entry["adapter_bits"] == 16:
            kind = torch.bfloat16
            return [[number(name, k * n + j, kind, 2) for j in range(n)] for k in range(rank)]
        row, scales = (n + 1) // 2, -(-n // 128)
        return [
            [
                ((data[name][k * row + j // 2] >> 4 * (j % 2)) % 16 - 8)
                * number(f"{name}_scale", k * scales + j // 128, torch.bfloat16, 2)
                for j in range(n)
            ]
            for k in range(rank)
        ]

    rank = entry.get("rank", 0)
    sides = (("lora_a", cols), ("lora_b", rows)) if rank else ()
    return torch.tensor(weight), *(torch.tensor(factor(name, n)) for name, n in sides)


SPARSE = [(None, 0), ("2:4", 70), ("bitmap", 1), ("bitmap", 50), ("bitmap", 140)]
ADAPTERS = [(0, 0), (1, 4), (3, 4), (3, 16)]
PARTS = [
    P.Parts(*sparse, group, *adapter)
    for sparse in SPARSE
    for group in (None, 33, 1000)
    for adapter in ADAPTERS
][1:]


def parts_id(parts: P.Parts) -> str:
    return " ".join(f"{key} {value}" for key, value in parts.entry().items())


@pytest.mark.parametrize("parts", PARTS, ids=parts_id)
def test_every_combination_of_parts_is_stored_as_format_md_says(parts):
    scaled = PARTS.index(parts) % 2 == 0
    q = with_parts(random_quantized(9, 140, seed=1, in_scale=scaled), parts)
    stored, weight = P.pack(q), P.dequantize(q)
    want, *factors = oracle_read(stored, 9, 140, parts.entry())
    assert torch.equal(weight, want)
    assert not factors or all(map(torch.equal, factors, q.adapter.values()))
    whole = want.double() + (factors[1].T.double() @ factors[0].double() if factors else 0)
    torch.testing.assert_close(P.effective(q).double(), whole, rtol=1e-6, atol=1e-5)
    assert torch.equal(dequantize_stored(stored, 140, parts), want)
    assert equal(P.unpack(stored, 9, 140, parts), q) and q.shape == (9, 140)


@pytest.mark.parametrize("parts", PARTS, ids=parts_id)
def test_layout_and_cost_follow_from_the_entry_for_every_combination(parts):
    q = with_parts(random_quantized(9, 140, seed=2, in_scale=True), parts)
    assert P.Parts.of(q) == parts == P.Parts.read(parts.entry(), 140)
    stored = P.pack(q)
    want = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    assert P.layout(P.histogram(q.widths), 140, True, parts) == want
    cost = sum(P.row_bits(b, 140, parts) for b in q.widths.tolist())
    cost += P.shared_bits(9, 140, parts, in_scale=True)
    assert cost == sum(8 * tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("cols", [4, 8, 12, 576])
def test_patterns_and_bitmaps_come_back(cols):
    for sparsity, kept in (("2:4", cols // 2), ("bitmap", 3), ("bitmap", cols - 1)):
        q = with_parts(random_quantized(40, cols, widths=[4]), P.Parts(sparsity, kept), seed=cols)
        packed = P.pack_positions(q.mask, sparsity)
        assert torch.equal(P.unpack_positions(packed, sparsity, cols), q.mask)


def test_patterns_6_and_7_are_read_as_5():
    packed = P.pack_codes(torch.tensor([[5, 6, 7]], dtype=torch.uint8), 3)
    assert P.unpack_positions(packed, "2:4", 12).tolist() == [[False, False, True, True] * 3]


CASES = [(5, 7, [b], scaled) for b in range(1, 9) for scaled in (False, True)]
CASES += [(33, cols, None, True) for cols in (1, 3, 8, 64, 65)]


@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_packed_bytes_are_the_oracles(rows, cols, widths, scaled):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    assert {name: raw(tensor) for name, tensor in P.pack(q).items()} == oracle_pack(q)


@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_unpack_inverts_pack(rows, cols, widths, scaled):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    assert equal(P.unpack(P.pack(q), rows, cols), q)


def stored_arguments(q: P.QuantizedWeight) -> tuple:
    """The stored tensors in the order the kernels take them."""
    stored = P.pack(q)
    names = ("weight", "widths", "codebook", "row_scale", "row_zero", "in_scale")
    return *(stored.get(name) for name in names), q.codes.shape[1]


@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_dequantizing_in_torch_gives_the_oracles_values(rows, cols, widths, scaled):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    want = torch.tensor([[oracle_value(q, i, j) for j in range(cols)] for i in range(rows)])
    assert torch.equal(P.dequantize(q), want)
    assert torch.equal(dequantize_reference(*stored_arguments(q)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_dequantizing_natively_gives_the_same_bits(isa, rows, cols, widths, scaled, dtype):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    want = P.dequantize(q).to(dtype)
    assert torch.equal(dequantize_packed(*stored_arguments(q), dtype), want)


def test_rows_cut_into_chunks_give_the_same_weight(monkeypatch):
    q = random_quantized(33, 9, in_scale=True)
    monkeypatch.setattr("skimlm.runtime.ops.CHUNK", 20)
    assert torch.equal(dequantize_reference(*stored_arguments(q)), P.dequantize(q))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("cols", [1, 5, 576])
def test_row_bits_counts_every_stored_bit(width, cols):
    q = random_quantized(4, cols, widths=[width])
    stored = sum(8 * tensor.nbytes for tensor in P.pack(q).values())
    assert stored == 4 * P.row_bits(width, cols)


def test_layout_predicts_every_tensor_from_the_histogram():
    q = random_quantized(40, 13, in_scale=True)
    want = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in P.pack(q).items()}
    assert P.layout(P.histogram(q.widths), 13, True) == want


def test_rows_of_equal_width_keep_their_order():
    q = random_quantized(6, 4, widths=[3, 2])
    scale = P.pack(q)["row_scale"]
    assert torch.equal(scale, q.row_scale[[1, 3, 5, 0, 2, 4]])


def test_packed_tensors_share_no_memory_with_their_source():
    q = random_quantized(6, 4, in_scale=True)
    mine = [q.codes, q.widths, q.codebook, q.row_scale, q.row_zero, q.in_scale]
    pointers = {t.untyped_storage().data_ptr() for t in mine}
    assert not pointers & {t.untyped_storage().data_ptr() for t in P.pack(q).values()}


TAMPERED = {
    "weight too short": (dict(weight=lambda t: t[:-1]), "weight: must be uint8 .*, got uint8"),
    "weight too long": (dict(weight=lambda t: torch.cat((t, t[:1]))), "weight: must be uint8"),
    "weight of floats": (dict(weight=lambda t: t.float()), "weight: must be uint8 .*float32"),
    "width 0": (dict(widths=lambda t: t * 0), "widths: row widths must be 1..8, got 0"),
    "width 9": (dict(widths=lambda t: t * 0 + 9), "widths: row widths must be 1..8, got 9"),
    "too few widths": (dict(widths=lambda t: t[1:]), r"widths: must be uint8 \[12\], got"),
    "other widths": (dict(widths=lambda t: t % 8 + 1), "must be .* got"),
    "no widths": (dict(widths=None), "widths: is missing"),
    "no codebook": (dict(codebook=None), "codebook: is missing"),
    "no zero points": (dict(row_zero=None), "row_zero: is missing"),
    "NaN scale": (dict(row_scale=lambda t: t * float("nan")), "row_scale: holds NaN or Inf"),
    "Inf scale": (dict(in_scale=lambda t: t / 0), "in_scale: holds NaN or Inf"),
    "in_scale too short": (dict(in_scale=lambda t: t[1:]), r"in_scale: must be float16 \[5\]"),
    "scale of another dtype": (dict(row_scale=lambda t: t.half()), "row_scale: must be bfloat16"),
    "surplus tensor": (dict(mask=lambda t: torch.zeros(1)), "mask: does not belong here"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_tensors_are_named(case):
    changes, message = TAMPERED[case]
    stored = P.pack(random_quantized(12, 5, in_scale=True, widths=[2, 7, 4]))
    for name, change in changes.items():
        old = stored.pop(name, None)
        if change:
            stored[name] = change(old)
    with pytest.raises(FormatError, match=message) as caught:
        P.unpack(stored, 12, 5, name="layer")
    assert str(caught.value).startswith("layer.") and "\n" not in str(caught.value)


FULL = P.Parts("2:4", 14, 9, 3, 4)  # of 28 columns
BITMAP = P.Parts("bitmap", 5, None, 2, 16)


def nan(tensor):
    return tensor * float("nan")


def spoil(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


TAMPERED_PARTS = {
    "no positions": (FULL, "positions", None, "is missing"),
    "short positions": (FULL, "positions", lambda t: t[1:], r"must be uint8 \[33\], got uint8"),
    "spare bits of patterns": (FULL, "positions", spoil(2, 128), "padding bits are not zero"),
    "pattern 6": (FULL, "positions", spoil(3, 6), "holds a pattern above 5"),
    "pattern 7": (FULL, "positions", spoil(3, 7), "holds a pattern above 5"),
    "a row too full": (BITMAP, "positions", spoil(0, 255), "every row must keep 5 columns, got "),
    "a row too empty": (BITMAP, "positions", lambda t: t * 0, "must keep 5 columns, got 0"),
    "spare bits of a bitmap": (BITMAP, "positions", spoil(3, 16), "padding bits are not zero"),
    "a scale per row": (FULL, "row_scale", lambda t: t[:, 0], r"must be bfloat16 \[11, 4\]"),
    "a NaN on the grid": (FULL, "row_scale", nan, "holds NaN or Inf"),
    "a codebook on a grid": (FULL, "codebook", lambda _: torch.zeros(8).char(), "does not belong"),
    "all codes of a row": (FULL, "weight", lambda t: torch.cat((t, t)), "must be uint8"),
    "no A": (FULL, "lora_a", None, "is missing"),
    "another rank": (
        FULL,
        "lora_b",
        lambda t: t[1:],
        r"must be uint8 \[3, 6\], got uint8 \[2, 6\]",
    ),
    "A as floats": (FULL, "lora_a", lambda t: t.bfloat16(), "must be uint8"),
    "a spare nibble": (FULL, "lora_b", spoil((0, 5), 255), "padding bits are not zero"),
    "no scales of A": (FULL, "lora_a_scale", None, "is missing"),
    "Inf in a scale of B": (FULL, "lora_b_scale", lambda t: t / 0, "holds NaN or Inf"),
    "NaN in A": (BITMAP, "lora_a", nan, "holds NaN or Inf"),
    "Inf in B": (BITMAP, "lora_b", spoil((1, 10), float("inf")), "holds NaN or Inf"),
    "scales of 16 bits": (BITMAP, "lora_a_scale", lambda _: torch.ones(2, 1), "does not belong"),
}


@pytest.mark.parametrize("case", TAMPERED_PARTS)
def test_tampered_parts_are_named(case):
    parts, tensor, change, message = TAMPERED_PARTS[case]
    stored = P.pack(with_parts(random_quantized(11, 28, widths=[3, 6]), parts))
    old = stored.pop(tensor, None)
    if change:
        stored[tensor] = change(old)
    with pytest.raises(FormatError, match=message) as caught:
        P.unpack(stored, 11, 28, parts, name="layer")
    assert str(caught.value).startswith(f"layer.{tensor}:")
    if "pattern" not in message and "nibble" not in case:  # what `unpack` alone looks at
        with pytest.raises(FormatError, match=message):
            P.check_stored(stored, 11, 28, parts)


def test_parts_the_config_does_not_name_are_refused():
    for parts in (P.Parts("2:4", 14), P.Parts(rank=2, adapter_bits=16), P.Parts(group=7)):
        stored = P.pack(with_parts(random_quantized(11, 28, widths=[3, 6]), parts))
        with pytest.raises(FormatError):
            P.unpack(stored, 11, 28)


ENTRIES = {
    "another sparsity": (dict(sparsity="4:8", kept=14), "sparsity must be '2:4' or 'bitmap', got"),
    "no sparsity": (dict(sparsity=None), "sparsity must be '2:4' or 'bitmap', got None"),
    "kept alone": (dict(kept=14), "sparsity and kept come together"),
    "sparsity alone": (dict(sparsity="2:4"), "sparsity and kept come together"),
    "2:4 of another count": (dict(sparsity="2:4", kept=13), "2:4 keeps half .* not 13 of 28"),
    "too many kept": (dict(sparsity="bitmap", kept=29), r"kept must be 1\.\.28, got 29"),
    "none kept": (dict(sparsity="bitmap", kept=0), "kept must be a positive integer, got 0"),
    "kept as text": (dict(sparsity="bitmap", kept="9"), "kept must be a positive integer, got '9'"),
    "group 0": (dict(group=0), "group must be a positive integer, got 0"),
    "a broken group": (dict(group=2.5), "group must be a positive integer, got 2.5"),
    "rank true": (dict(rank=True, adapter_bits=4), "rank must be a positive integer, got True"),
    "rank alone": (dict(rank=3), "rank and adapter_bits come together"),
    "bits alone": (dict(adapter_bits=4), "rank and adapter_bits come together"),
    "8 bits": (dict(rank=3, adapter_bits=8), "adapter_bits must be 4 or 16, got 8"),
    "an endless rank": (dict(rank=2**62, adapter_bits=4), r"rank must be 1\.\.65536, got"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_invalid_config_entries_are_refused(case):
    entry, message = ENTRIES[case]
    with pytest.raises(FormatError, match=message):
        P.Parts.read({"widths": {"3": 9}} | entry, 28)


def test_two_four_needs_a_multiple_of_four_columns():
    with pytest.raises(FormatError, match="2:4 keeps half of a multiple of 4, not 13 of 26"):
        P.Parts.read({"sparsity": "2:4", "kept": 13}, 26)


def test_a_group_beyond_every_number_of_columns_is_one_scale_per_row():
    q = with_parts(random_quantized(3, 28), P.Parts(group=10**30))
    stored, parts = P.pack(q), P.Parts.of(q)
    assert stored["row_scale"].shape == (3, 1) and equal(P.unpack(stored, 3, 28, parts), q)
    assert torch.equal(dequantize_stored(stored, 28, parts), P.dequantize(q))
    assert torch.equal(P.dequantize(q), oracle_read(stored, 3, 28, parts.entry())[0])


INVALID_PARTS = {
    "a row that keeps more": (BITMAP, dict(mask=spoil((0, slice(None)), True)), "mask: every row"),
    "three of four": (
        FULL,
        dict(mask=spoil((0, slice(8)), torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).bool())),
        "mask: 2:4 keeps two of every four",
    ),
    "a mask of bytes": (FULL, dict(mask=lambda t: t.to(torch.uint8)), "mask: must be bool"),
    "a mask without its kind": (FULL, dict(sparsity=lambda _: None), "sparsity and kept"),
    "a kind without a mask": (FULL, dict(mask=lambda _: None), "sparsity and kept"),
    "levels on a grid": (FULL, dict(codebook=lambda t: t + 1), "codebook: a grid has none"),
    "a zero point on a grid": (FULL, dict(row_zero=spoil(1, 3)), "row_zero: a grid has none"),
    "a scale per row": (FULL, dict(row_scale=lambda t: t[:, 0]), r"row_scale: must be .*\[11, 4\]"),
    "group 0": (FULL, dict(group=lambda _: 0), "group must be positive"),
}


@pytest.mark.parametrize("case", INVALID_PARTS)
def test_pack_refuses_parts_that_would_not_come_back(case):
    parts, changes, message = INVALID_PARTS[case]
    q = with_parts(random_quantized(11, 28, widths=[3, 6]), parts)
    changed = {name: change(getattr(q, name)) for name, change in changes.items()}
    with pytest.raises(FormatError, match=message):
        P.pack(dataclasses.replace(q, **changed))


INVALID_ADAPTERS = {
    "code 8": (dict(a=spoil((1, 5), 8)), "lora_a: codes must be -8..7"),
    "code -9": (dict(b=spoil((1, 5), -9)), "lora_b: codes must be -8..7"),
    "another rank": (dict(b=lambda t: t[1:]), r"lora_b: must be int8 \[3, 11\]"),
    "one scale": (dict(b_scale=lambda _: None), "lora_b_scale: both factors have scales"),
    "float32 scales": (dict(a_scale=lambda t: t.float()), "lora_a_scale: must be bfloat16"),
    "NaN": (dict(a_scale=nan), "lora_a_scale: holds NaN or Inf"),
}


@pytest.mark.parametrize("case", INVALID_ADAPTERS)
def test_pack_refuses_adapters_that_would_not_come_back(case):
    changes, message = INVALID_ADAPTERS[case]
    q = with_parts(random_quantized(11, 28, widths=[3, 6]), FULL)
    changed = {name: change(getattr(q.adapter, name)) for name, change in changes.items()}
    wrong = dataclasses.replace(q, adapter=dataclasses.replace(q.adapter, **changed))
    with pytest.raises(FormatError, match=message):
        P.pack(wrong)


def test_packed_parts_share_no_memory_with_their_source():
    for parts in (FULL, BITMAP):
        q = with_parts(random_quantized(11, 28, widths=[3, 6]), parts)
        mine = [q.mask, q.row_scale, q.adapter.a, q.adapter.b]
        mine += [t for t in (q.adapter.a_scale, q.adapter.b_scale) if t is not None]
        pointers = {t.untyped_storage().data_ptr() for t in mine}
        assert not pointers & {t.untyped_storage().data_ptr() for t in P.pack(q).values()}


def test_padding_bits_must_be_zero():
    stored = P.pack(random_quantized(3, 5, widths=[3]))  # 15 bits: the last one is spare
    stored["weight"][1] |= 128
    with pytest.raises(FormatError, match="weight: padding bits are not zero"):
        P.unpack(stored, 3, 5)


INVALID = {
    "a code beyond its width": (dict(codes=255), "codes: a code does not fit"),
    "width 0": (dict(widths=0), "widths: row widths must be 1..8"),
    "width 9": (dict(widths=9), "widths: row widths must be 1..8"),
    "a zero point on a codebook row": (dict(row_zero=1), "row_zero: only rows wider"),
    "a NaN scale": (dict(row_scale=float("nan")), "row_scale: holds NaN or Inf"),
    "an infinite input scale": (dict(in_scale=float("inf")), "in_scale: holds NaN or Inf"),
}


@pytest.mark.parametrize("case", INVALID)
def test_pack_refuses_what_would_not_come_back(case):
    changes, message = INVALID[case]
    q = random_quantized(4, 5, in_scale=True, widths=[3])
    changed = {name: torch.full_like(getattr(q, name), v) for name, v in changes.items()}
    with pytest.raises(FormatError, match=message):
        P.pack(dataclasses.replace(q, **changed))


def test_pack_refuses_wrong_shapes_and_dtypes():
    q = random_quantized(4, 5)
    with pytest.raises(FormatError, match=r"row_scale: must be bfloat16 \[4\], got float32"):
        P.pack(dataclasses.replace(q, row_scale=q.row_scale.float()))
    with pytest.raises(FormatError, match=r"codebook: must be int8 \[4, 32\], got int8 \[4, 31\]"):
        P.pack(dataclasses.replace(q, codebook=q.codebook[:, 1:]))


def test_format_errors_are_one_line_skim_errors():
    error = FormatError("is missing", tensor="a.weight").at("model.safetensors")
    assert isinstance(error, SkimError) and str(error) == "model.safetensors: a.weight: is missing"


def test_native_dequantizing_refuses_buffers_that_do_not_fit_together():
    q = random_quantized(6, 9, seed=3)
    stored = P.pack(q)
    names = ("weight", "widths", "codebook", "row_scale", "row_zero", "in_scale")

    def run(**changed):
        return dequantize_packed(*((stored | changed).get(name) for name in names), 9)

    assert torch.equal(run(), P.dequantize(q))
    for name in ("weight", "codebook", "row_scale"):
        with pytest.raises(ValueError, match=name):
            run(**{name: stored[name][:-1]})
    for width in (0, 9, 200):
        with pytest.raises(ValueError, match="widths|weight"):
            run(widths=torch.full_like(stored["widths"], width))
