"""Packing against an oracle in Python integers, every width, and every way a file can be wrong."""

import dataclasses

import pytest
import torch

from conftest import random_quantized
from skimlm.errors import FormatError, SkimError
from skimlm.kernels import dequantize_packed, dequantize_reference
from skimlm.weights import pack as P


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


def equal(a: P.QuantizedWeight, b: P.QuantizedWeight) -> bool:
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)


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
    monkeypatch.setattr("skimlm.kernels.CHUNK", 20)
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
