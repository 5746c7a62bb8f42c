"""Packing against an oracle in Python integers, every width, and every way a file can be wrong."""

import dataclasses

import pytest
import torch

import skimlm.format as P
from conftest import random_quantized
from layer_sample import (
    OPTIONS,
    TRELLIS_WIDTHS,
    big_windows,
    equal,
    options,
    options_id,
    oracle_pack,
    oracle_read,
    oracle_value,
    oracle_window,
    raw,
    spoil,
    with_options,
)
from skimlm.errors import FormatError, SkimError
from skimlm.format.codes import pack_codes
from skimlm.format.pack import pack_positions, unpack_positions
from skimlm.format.row_codes import ROW_CODES
from skimlm.runtime import ops


@pytest.mark.parametrize("chosen", OPTIONS, ids=options_id)
def test_every_combination_of_options_is_stored_as_format_md_says(chosen):
    scaled = OPTIONS.index(chosen) % 2 == 0
    q = with_options(random_quantized(9, 140, seed=1, in_scale=scaled), **chosen)
    layer, weight = P.pack(q), P.dequantize(q)
    want, *factors = oracle_read(layer.tensors, 9, 140, layer.spec.entry())
    assert torch.equal(weight, want)
    assert not factors or all(map(torch.equal, factors, q.adapter.values()))
    whole = want.double() + (factors[1].T.double() @ factors[0].double() if factors else 0)
    torch.testing.assert_close(P.effective(q).double(), whole, rtol=1e-6, atol=1e-5)
    assert torch.equal(ops.dequantize_reference(layer), want)
    assert equal(P.unpack(layer), q) and q.shape == (9, 140)


@pytest.mark.parametrize("widths", TRELLIS_WIDTHS, ids=str)
@pytest.mark.parametrize("chosen", [c for c in OPTIONS if not c["group"]], ids=options_id)
def test_trellis_rows_are_stored_as_format_md_says_whatever_a_layer_has(chosen, widths):
    q = with_options(random_quantized(9, 140, seed=1, in_scale=True, widths=widths), **chosen)
    layer = P.pack(q)
    want, *_ = oracle_read(layer.tensors, 9, 140, layer.spec.entry())
    assert torch.equal(P.dequantize(q), want)
    assert torch.equal(ops.dequantize_reference(layer), want)
    assert equal(P.unpack(layer), q) and layer.spec.version == 3
    assert 8 * layer.nbytes == P.shared_bits(layer.spec) + sum(
        P.row_bits(layer.spec, w) for w in q.widths.tolist()
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("cols", [1, 2, 7, 8, 9, 40, 75])
def test_windows_are_codes_and_the_taps_behind_them(bits, cols):
    codes = torch.randint(0, 2**bits, (5, cols), dtype=torch.uint8)
    want = [[oracle_window(row, bits, j) for j in range(cols)] for row in codes.tolist()]
    assert P.windows(codes, bits).tolist() == want == big_windows(codes, bits).tolist()


def test_each_trellis_width_in_use_costs_its_table_once():
    plain = P.shared_bits(P.LayerSpec(7, 20, {2: 7}, in_scale=True))
    for widths, tables in (({18: 7}, 1), ({18: 3, 20: 4}, 2), ({2: 3, 19: 4}, 1)):
        spec = P.LayerSpec(7, 20, widths, in_scale=True)
        assert P.shared_bits(spec) == plain + 1024 * tables


@pytest.mark.parametrize("chosen", OPTIONS, ids=options_id)
def test_layout_and_cost_follow_from_the_entry_for_every_combination(chosen):
    q = with_options(random_quantized(9, 140, seed=2, in_scale=True), **chosen)
    layer = P.pack(q)
    spec = P.LayerSpec.read(layer.spec.entry(), 9, 140)
    assert spec == q.spec == layer.spec
    assert spec == P.LayerSpec(9, 140, P.histogram(q.widths), True, **chosen)
    want = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.tensors.items()}
    assert P.layout(spec) == want
    planned = P.LayerSpec(9, 140, in_scale=True, **chosen)  # before widths are chosen
    cost = sum(P.row_bits(planned, b) for b in q.widths.tolist()) + P.shared_bits(planned)
    assert cost == 8 * layer.nbytes


@pytest.mark.parametrize("cols", [4, 8, 12, 576])
def test_patterns_and_bitmaps_come_back(cols):
    for sparsity, kept in (("2:4", cols // 2), ("bitmap", 3), ("bitmap", cols - 1)):
        q = with_options(random_quantized(40, cols, widths=[4]), sparsity, kept, seed=cols)
        packed = pack_positions(q.mask, sparsity)
        assert torch.equal(unpack_positions(packed, sparsity, cols), q.mask)


def test_patterns_6_and_7_are_read_as_5():
    packed = pack_codes(torch.tensor([[5, 6, 7]], dtype=torch.uint8), 3)
    assert unpack_positions(packed, "2:4", 12).tolist() == [[False, False, True, True] * 3]


CASES = [(5, 7, [b], scaled) for b in range(1, 9) for scaled in (False, True)]
CASES += [(33, cols, None, True) for cols in (1, 3, 8, 64, 65)]
CASES += [(5, cols, widths, True) for widths in TRELLIS_WIDTHS for cols in (1, 7, 129)]


@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_packed_bytes_are_the_oracles(rows, cols, widths, scaled):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    assert {name: raw(tensor) for name, tensor in P.pack(q).tensors.items()} == oracle_pack(q)


@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_unpack_inverts_pack(rows, cols, widths, scaled):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    assert equal(P.unpack(P.pack(q)), q)


@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_dequantizing_in_torch_gives_the_oracles_values(rows, cols, widths, scaled):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    want = torch.tensor([[oracle_value(q, i, j) for j in range(cols)] for i in range(rows)])
    assert torch.equal(P.dequantize(q), want)
    assert torch.equal(ops.dequantize_reference(P.pack(q)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols, widths, scaled", CASES)
def test_dequantizing_natively_gives_the_same_bits(isa, rows, cols, widths, scaled, dtype):
    q = random_quantized(rows, cols, seed=cols, in_scale=scaled, widths=widths)
    want = P.dequantize(q).to(dtype)
    assert torch.equal(ops.dequantize(P.pack(q), dtype), want)


def test_rows_cut_into_chunks_give_the_same_weight(monkeypatch):
    q = random_quantized(33, 9, in_scale=True)
    monkeypatch.setattr("skimlm.runtime.ops.CHUNK", 20)
    assert torch.equal(ops.dequantize_reference(P.pack(q)), P.dequantize(q))


@pytest.mark.parametrize("width", [*range(1, 9), *range(17, 21)])
@pytest.mark.parametrize("cols", [1, 5, 576])
def test_row_bits_counts_every_stored_bit(width, cols):
    layer = P.pack(random_quantized(4, cols, widths=[width]))
    shared = 1024 if width > 16 else 0
    assert 8 * layer.nbytes == 4 * P.row_bits(P.LayerSpec(4, cols), width) + shared


def test_layout_predicts_every_tensor_from_the_histogram():
    q = random_quantized(40, 13, in_scale=True)
    stored = P.pack(q).tensors.items()
    want = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored}
    assert P.layout(P.LayerSpec(40, 13, P.histogram(q.widths), in_scale=True)) == want


def test_rows_of_equal_width_keep_their_order():
    q = random_quantized(6, 4, widths=[3, 2])
    scale = P.pack(q).tensors["row_scale"]
    assert torch.equal(scale, q.row_scale[[1, 3, 5, 0, 2, 4]])


def test_packed_tensors_share_no_memory_with_their_source():
    q = random_quantized(6, 4, in_scale=True)
    mine = [q.codes, q.widths, q.codebook, q.row_scale, q.row_zero, q.in_scale]
    pointers = {t.untyped_storage().data_ptr() for t in mine}
    assert not pointers & {t.untyped_storage().data_ptr() for t in P.pack(q).tensors.values()}


TAMPERED = {
    "weight too short": (dict(weight=lambda t: t[:-1]), "weight: must be uint8 .*, got uint8"),
    "weight too long": (dict(weight=lambda t: torch.cat((t, t[:1]))), "weight: must be uint8"),
    "weight of floats": (dict(weight=lambda t: t.float()), "weight: must be uint8 .*float32"),
    "too few widths": (dict(widths=lambda t: t[1:]), r"widths: must be uint8 \[12\], got"),
    "other widths": (dict(widths=lambda t: t % 8 + 1), "rows by width .* are not config.json's"),
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
    layer = P.pack(random_quantized(12, 5, in_scale=True, widths=[2, 7, 4]))
    stored = dict(layer.tensors)
    for name, change in changes.items():
        old = stored.pop(name, None)
        if change:
            stored[name] = change(old)
    with pytest.raises(FormatError, match=message) as caught:
        P.unpack(P.Layer(layer.spec, stored), name="layer")
    assert str(caught.value).startswith("layer.") and "\n" not in str(caught.value)


TAMPERED_TRELLIS = {
    "no trellis": ("trellis", None, "is missing"),
    "one table of two": ("trellis", lambda t: t[:1], r"must be int8 \[2, 128\], got int8 \[1, "),
    "a flat table": ("trellis", lambda t: t.flatten(), "must be int8"),
    "half a table": ("trellis", lambda t: t[:, :64], "must be int8"),
    "levels without sign": ("trellis", lambda t: t.byte(), "must be int8 .*, got uint8"),
    "a codebook too many": ("codebook", lambda t: torch.cat((t, t)), "must be int8"),
    "a zero point": ("row_zero", lambda _: torch.zeros(1).short(), "does not belong here"),
    "other widths": ("widths", lambda t: t.clamp(max=18), "rows by width .* are not config"),
    "width 16": ("widths", lambda t: t.clamp(min=16), r"row widths must be .*, got 16"),
    "width 21": ("widths", lambda t: t + 2, r"row widths must be 1..8 or 17..20, got 21"),
    "short codes": ("weight", lambda t: t[1:], "must be uint8"),
}


@pytest.mark.parametrize("case", TAMPERED_TRELLIS)
def test_tampered_tensors_of_trellis_rows_are_named(case):
    tensor, change, message = TAMPERED_TRELLIS[case]
    layer = P.pack(random_quantized(12, 5, widths=[2, 19, 18]))
    stored = dict(layer.tensors)
    old = stored.pop(tensor, None)
    if change:
        stored[tensor] = change(old)
    for check in (P.unpack, P.check_stored):
        with pytest.raises(FormatError, match=message) as caught:
            check(P.Layer(layer.spec, stored), name="layer")
        assert str(caught.value).startswith(f"layer.{tensor}:")


def test_a_grid_has_no_trellis_rows():
    layer = P.pack(random_quantized(12, 5, widths=[2, 19]))
    entry = layer.spec.entry() | {"group": 5}
    with pytest.raises(FormatError, match=r"widths: row widths must be 1\.\.8, got 19"):
        spec = P.LayerSpec.read(entry, 12, 5)
        scale = layer.tensors["row_scale"].view(12, 1)
        stored = {n: t for n, t in layer.tensors.items() if n in P.layout(spec)}
        stored |= {"row_scale": scale, "weight": torch.zeros(12 * 2).byte()}
        P.check_stored(P.Layer(spec, stored))


FULL = options("2:4", 14, 9, 3, 4)  # of 28 columns
BITMAP = options("bitmap", 5, None, 2, 16)


def nan(tensor):
    return tensor * float("nan")


TAMPERED_OPTIONS = {
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


@pytest.mark.parametrize("case", TAMPERED_OPTIONS)
def test_tampered_tensors_of_version_2_are_named(case):
    chosen, tensor, change, message = TAMPERED_OPTIONS[case]
    layer = P.pack(with_options(random_quantized(11, 28, widths=[3, 6]), **chosen))
    stored = dict(layer.tensors)
    old = stored.pop(tensor, None)
    if change:
        stored[tensor] = change(old)
    with pytest.raises(FormatError, match=message) as caught:
        P.unpack(P.Layer(layer.spec, stored), name="layer")
    assert str(caught.value).startswith(f"layer.{tensor}:")
    if "pattern" not in message and "nibble" not in case:  # what `unpack` alone looks at
        with pytest.raises(FormatError, match=message):
            P.check_stored(P.Layer(layer.spec, stored))


def test_options_the_config_does_not_name_are_refused():
    for chosen in (options("2:4", 14), options(rank=2, adapter_bits=16), options(group=7)):
        layer = P.pack(with_options(random_quantized(11, 28, widths=[3, 6]), **chosen))
        plain = P.LayerSpec(11, 28, layer.spec.counts)
        with pytest.raises(FormatError):
            P.unpack(P.Layer(plain, layer.tensors))


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
        P.LayerSpec.read({"widths": {"3": 9}} | entry, 9, 28)


def test_two_four_needs_a_multiple_of_four_columns():
    with pytest.raises(FormatError, match="2:4 keeps half of a multiple of 4, not 13 of 26"):
        P.LayerSpec.read({"widths": {"3": 9}, "sparsity": "2:4", "kept": 13}, 9, 26)


HISTOGRAMS = [
    None,
    [3, 9],
    {"3": -9},
    {"9": 9},
    {"16": 9},
    {"21": 9},
    {"x": 9},
    {"3": "9"},
    {"3": True},
    {},
]


@pytest.mark.parametrize("widths", HISTOGRAMS, ids=str)
def test_histograms_that_cannot_be_are_refused(widths):
    with pytest.raises(FormatError, match="has no valid width histogram"):
        P.LayerSpec.read({"widths": widths}, 9, 28)
    with pytest.raises(FormatError, match="widths of 9 rows, the model has 10"):
        P.LayerSpec.read({"widths": {"3": 9}}, 10, 28)


def test_a_group_beyond_every_number_of_columns_is_one_scale_per_row():
    q = with_options(random_quantized(3, 28), group=10**30)
    layer = P.pack(q)
    assert layer.tensors["row_scale"].shape == (3, 1) and equal(P.unpack(layer), q)
    assert torch.equal(ops.dequantize_reference(layer), P.dequantize(q))
    want = oracle_read(layer.tensors, 3, 28, layer.spec.entry())[0]
    assert torch.equal(P.dequantize(q), want)


INVALID_OPTIONS = {
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


@pytest.mark.parametrize("case", INVALID_OPTIONS)
def test_pack_refuses_options_that_would_not_come_back(case):
    chosen, changes, message = INVALID_OPTIONS[case]
    q = with_options(random_quantized(11, 28, widths=[3, 6]), **chosen)
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
    q = with_options(random_quantized(11, 28, widths=[3, 6]), **FULL)
    changed = {name: change(getattr(q.adapter, name)) for name, change in changes.items()}
    wrong = dataclasses.replace(q, adapter=dataclasses.replace(q.adapter, **changed))
    with pytest.raises(FormatError, match=message):
        P.pack(wrong)


def test_packed_tensors_of_version_2_share_no_memory_with_their_source():
    for chosen in (FULL, BITMAP):
        q = with_options(random_quantized(11, 28, widths=[3, 6]), **chosen)
        mine = [q.mask, q.row_scale, q.adapter.a, q.adapter.b]
        mine += [t for t in (q.adapter.a_scale, q.adapter.b_scale) if t is not None]
        pointers = {t.untyped_storage().data_ptr() for t in mine}
        assert not pointers & {t.untyped_storage().data_ptr() for t in P.pack(q).tensors.values()}


def test_padding_bits_must_be_zero():
    layer = P.pack(random_quantized(3, 5, widths=[3]))  # 15 bits: the last one is spare
    layer.tensors["weight"][1] |= 128
    with pytest.raises(FormatError, match="weight: padding bits are not zero"):
        P.unpack(layer)


INVALID = {
    "a code beyond its width": (dict(codes=255), "codes: a code does not fit"),
    "a zero point on a codebook row": (dict(row_zero=1), "row_zero: only rows wider"),
    "a NaN scale": (dict(row_scale=float("nan")), "row_scale: holds NaN or Inf"),
    "an infinite input scale": (dict(in_scale=float("inf")), "in_scale: holds NaN or Inf"),
}
INVALID_TRELLIS = {
    "a codebook": (dict(codebook=lambda t: t + 1), "codebook: trellis rows have none"),
    "a zero point": (dict(row_zero=lambda t: t + 1), "row_zero: only rows wider"),
    "a code too large": (dict(codes=lambda t: t + 8), "codes: a code does not fit"),
    "no table": (dict(trellis=lambda t: t[1:]), r"trellis: must be int8 \[1, 128\], got int8 \[0"),
    "two tables": (dict(trellis=lambda t: t.repeat(2, 1)), "trellis: must be int8"),
    "a table nobody uses": (dict(widths=lambda t: t % 16), r"trellis: must be int8 \[0, 128\]"),
}


@pytest.mark.parametrize("case", INVALID_TRELLIS)
def test_pack_refuses_trellis_rows_that_would_not_come_back(case):
    changes, message = INVALID_TRELLIS[case]
    q = random_quantized(4, 5, widths=[19])
    changed = {name: change(getattr(q, name)) for name, change in changes.items()}
    with pytest.raises(FormatError, match=message):
        P.pack(dataclasses.replace(q, **changed))


@pytest.mark.parametrize("case", INVALID)
def test_pack_refuses_what_would_not_come_back(case):
    changes, message = INVALID[case]
    q = random_quantized(4, 5, in_scale=True, widths=[3])
    changed = {name: torch.full_like(getattr(q, name), v) for name, v in changes.items()}
    with pytest.raises(FormatError, match=message):
        P.pack(dataclasses.replace(q, **changed))


def test_widths_that_have_no_row_code_are_refused():
    allowed = {b for code in ROW_CODES for b in code.widths}
    assert set(range(1, 9)) <= allowed
    for width in set(range(256)) - allowed:
        layer = P.pack(random_quantized(4, 5, widths=[3]))
        wrong = torch.full_like(layer.tensors["widths"], width)
        known = rf"1\.\.8 or 17\.\.20, got {width}$"
        with pytest.raises(FormatError, match=f"widths: row widths must be {known}"):
            P.unpack(P.Layer(layer.spec, layer.tensors | {"widths": wrong}))
        q = dataclasses.replace(random_quantized(4, 5, widths=[3]), widths=wrong)
        with pytest.raises(FormatError, match=f"widths: row widths must be {known}"):
            P.pack(q)
        with pytest.raises(FormatError, match="histogram"):
            P.LayerSpec.read({"widths": {str(width): 9}}, 9, 28)


def test_pack_refuses_wrong_shapes_and_dtypes():
    q = random_quantized(4, 5)
    with pytest.raises(FormatError, match=r"row_scale: must be bfloat16 \[4\], got float32"):
        P.pack(dataclasses.replace(q, row_scale=q.row_scale.float()))
    with pytest.raises(FormatError, match=r"codebook: must be int8 \[4, 32\], got int8 \[4, 31\]"):
        P.pack(dataclasses.replace(q, codebook=q.codebook[:, 1:]))


def test_format_errors_are_one_line_skim_errors():
    error = FormatError("is missing", tensor="a.weight").at("model.safetensors")
    assert isinstance(error, SkimError) and str(error) == "model.safetensors: a.weight: is missing"


def test_native_dequantizing_refuses_tensors_that_do_not_fit_together():
    q = random_quantized(6, 9, seed=3)
    layer = P.pack(q)

    def run(**changed):
        return ops.dequantize(P.Layer(layer.spec, layer.tensors | changed))

    assert torch.equal(run(), P.dequantize(q))
    for name in ("weight", "codebook", "row_scale"):
        with pytest.raises(ValueError, match=name):
            run(**{name: layer.tensors[name][:-1]})
    for width in (0, 9, 200):
        with pytest.raises(ValueError, match="widths|weight"):
            run(widths=torch.full_like(layer.tensors["widths"], width))


@pytest.mark.parametrize("chosen", OPTIONS, ids=options_id)
def test_rows_that_are_cut_off_are_the_same_rows(chosen):
    plain = not chosen["sparsity"] and not chosen["group"]
    q = random_quantized(300, 140, in_scale=True, widths=[19, 3, 18, 20, 7, 17] if plain else None)
    q = with_options(q, **chosen)
    for begin, end in ((0, 128), (128, 256), (128, 300), (256, 257)):
        got = P.unpack(P.cut(P.pack(q), begin, end))
        assert torch.equal(P.effective(got), P.effective(q)[begin:end])


def test_a_scale_of_an_adapter_cannot_be_cut_in_two():
    q = with_options(random_quantized(300, 140), "2:4", 70, 64, 3, 4)
    with pytest.raises(ValueError, match="cannot be cut at row 150"):
        P.cut(P.pack(q), 150, 300)
