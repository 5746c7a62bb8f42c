"""Native products with sparse rows, grids and adapters, against the stored bytes."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from conftest import at_once, random_quantized
from layer_sample import (
    TRELLIS_WIDTHS,
    big_windows,
    inputs,
    options,
    trellis_codes,
    with_options,
)
from skimlm import native
from skimlm.errors import FormatError
from skimlm.format import Layer, pack
from skimlm.runtime import cpu, ops
from skimlm.runtime.linear import CompressedLinear

SHAPES = [(1, 4), (3, 12), (5, 140), (65, 396)]
ADAPTED = (300, 68)  # whole blocks of 128 rows of B, and a part of one
SPARSE = {"dense": None, "2:4": "2:4", "bitmap": "bitmap"}
SCALES = [None, 7, 64, 128, 256, 9999]
ADAPTERS = [(0, 0), (1, 4), (5, 4), (3, 16)]
DTYPES = (torch.float32, torch.bfloat16)
PAIRS = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3], [2, 3], [2, 3]])


def layer_of(
    rows, cols, sparsity=None, group=None, adapter=(0, 0), widths=None, scaled=False
) -> Layer:
    kept = {None: 0, "2:4": cols // 2, "bitmap": max(1, cols // 3)}[sparsity]
    q = random_quantized(rows, cols, widths=widths, in_scale=scaled)
    return pack(with_options(q, sparsity, kept, group, *adapter))


def widths_of(group):
    """Widths of rows of every kind that a layer may have."""
    return [*([b] for b in range(1, 9)), None, *([] if group else TRELLIS_WIDTHS)]


def changed(layer, **tensors) -> Layer:
    """The layer with other tensors; None: without one."""
    found = layer.tensors | tensors
    return Layer(layer.spec, {name: t for name, t in found.items() if t is not None})


def numbers(stored, name, shape=None):
    tensor = stored[name]
    values = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    return values if shape is None else values.reshape(shape)


def fields(row, width, count):
    """`count` numbers of `width` bits from the bytes of a row."""
    bits = np.unpackbits(row, bitorder="little")[: count * width].reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width))


def oracle(layer):
    """Levels int64 [r, c], scales [r, groups] and columns per scale, by the letter of FORMAT.md."""
    stored, spec, rows, cols = layer.tensors, layer.spec, layer.spec.rows, layer.spec.cols
    widths = numbers(stored, "widths")
    order = np.argsort(widths, kind="stable")
    span = min(spec.group or cols, cols)
    scale = numbers(stored, "row_scale", (rows, -1)).astype(np.float64)
    level, scales = np.zeros((rows, cols), np.int64), np.zeros_like(scale)
    count = spec.kept if spec.sparsity else cols
    at = table = zero = 0
    trellises = sorted({int(b) for b in widths if b > 16})
    for place, i in enumerate(order):
        b, columns = int(widths[i]) % 16, np.arange(cols)
        if spec.sparsity:
            packed = numbers(stored, "positions", (rows, -1))[place]
            if spec.sparsity == "2:4":
                pairs = PAIRS[fields(packed, 3, cols // 4)]
                columns = (pairs + 4 * np.arange(cols // 4)[:, None]).ravel()
            else:
                columns = np.flatnonzero(fields(packed, 1, cols))
        trellis = widths[i] > 16
        size = (count + 7) // 8 * b if trellis else (count * b + 7) // 8
        row = numbers(stored, "weight")[at : at + size]
        code = fields(row, b, count) if not trellis else None
        at += size
        if spec.group:
            value = code - (1 << (b - 1))
        elif trellis:
            window = big_windows(torch.tensor([trellis_codes(row.tolist(), b, count)]), b)[
                0
            ].numpy()
            value = stored["trellis"][trellises.index(widths[i])].numpy().astype(np.int64)[window]
        elif b <= 5:
            value = numbers(stored, "codebook")[table : table + 2**b].astype(np.int64)[code]
            table += 2**b
        else:
            value = code - int(numbers(stored, "row_zero")[zero])
            zero += 1
        level[i, columns], scales[i] = value, scale[place]
    return level, scales, span


def factors(layer):
    """A [rank, c] and B [rank, r]."""
    found, stored, spec = [], layer.tensors, layer.spec
    for name, n in (("lora_a", spec.cols), ("lora_b", spec.rows)):
        values = numbers(stored, name, (spec.rank, -1))
        if spec.adapter_bits == 4:
            nibbles = np.stack([values & 15, values >> 4], 2).reshape(spec.rank, -1)[:, :n]
            scale = numbers(stored, f"{name}_scale", (spec.rank, -1)).repeat(128, 1)[:, :n]
            values = (nibbles.astype(np.int64) - 8) * scale.astype(np.float64)
        found.append(values.astype(np.float64))
    return found


def whole(x, limit=8355711):
    """A token as integers, and their unit: product.h."""
    unit = 2.0**-60
    while np.abs(x).max() / unit > limit:
        unit *= 2
    scaled = x.astype(np.float64) / unit
    return (np.floor(np.abs(scaled) + 0.5) * np.sign(scaled)).astype(np.int64), unit


def sparse_exactly(x, layer):
    """W x of one token: integers by scale, then doubles in order, one rounding to float."""
    level, scale, span = oracle(layer)
    stored, rows, cols = layer.tensors, layer.spec.rows, layer.spec.cols
    x = x.float().numpy()
    if "in_scale" in stored:
        x = x * numbers(stored, "in_scale")
    x, unit = whole(x)
    total = np.zeros(rows)
    for s, begin in enumerate(range(0, cols, span)):
        part = level[:, begin : begin + span] @ x[begin : begin + span]
        total = total + part.astype(np.float64) * scale[:, s]
    return (total * unit).astype(np.float32)


def multiply(x, layer, bias=None):
    """The native product, whatever the number of tokens; None if it is refused."""
    out = torch.empty(len(x), layer.spec.rows, dtype=x.dtype)
    return out if native.layer_matmul(x, [layer], [bias], out, True) else None


@pytest.mark.parametrize("group", SCALES)
@pytest.mark.parametrize("sparsity", SPARSE)
def test_products_are_what_the_stored_bytes_say(isa, sparsity, group):
    turns = itertools.cycle([(a, s, b) for a in ADAPTERS for s in (False, True) for b in (0, 1)])
    widths = itertools.product(SHAPES, widths_of(group))
    for (rows, cols), width in [*widths, (ADAPTED, [4])]:
        adapter, scaled, shift = ((5, 4), True, 1) if rows == ADAPTED[0] else next(turns)
        layer = layer_of(rows, cols, SPARSE[sparsity], group, adapter, width, scaled)
        level, scale, span = oracle(layer)
        weight = level * scale.repeat(span, 1)[:, :cols]
        weight = weight * numbers(layer.tensors, "in_scale") if scaled else weight
        size = np.abs(weight)
        if layer.spec.rank:
            a, b = factors(layer)
            weight, size = weight + b.T @ a, size + np.abs(b).T @ np.abs(a)
        bias = torch.randn(rows) if shift else None
        few = ((1, torch.float32), (2, torch.bfloat16), (5, torch.float32))
        for count, dtype in (*few, (7, torch.bfloat16), (33, torch.bfloat16), (12, torch.float32)):
            x = inputs(count, cols, dtype)
            got = multiply(x, layer, bias).double().numpy()
            x = x.double().numpy()
            want = x @ weight.T + (bias.numpy() if shift else 0)
            # rounding in float, and x to 2^-23 of its largest entry times in_scale
            steps = np.abs(x).max(1, keepdims=True) * 2**-21
            bound = 2e-6 * (np.abs(x) @ size.T + 1) + steps * size.sum(1)
            bound = bound + np.abs(want) * (2**-8 if dtype == torch.bfloat16 else 0)
            assert (np.abs(got - want) <= bound).all(), (rows, cols, width, adapter, count)


@pytest.mark.parametrize("group", SCALES)
@pytest.mark.parametrize("sparsity", SPARSE)
def test_the_sparse_part_is_exact_to_the_bit_everywhere(isa, sparsity, group):
    for rows, cols in [*SHAPES, (6, 1284)]:
        for widths in widths_of(group):
            layer = layer_of(rows, cols, SPARSE[sparsity], group, (0, 0), widths, rows == 5)
            for dtype in (torch.float32, torch.bfloat16):
                x = inputs(1, cols, dtype)
                want = torch.from_numpy(sparse_exactly(x[0], layer)).to(dtype)
                assert torch.equal(multiply(x, layer)[0], want), (rows, cols, widths)


@pytest.mark.parametrize("group", [None, 128, 1152])
def test_several_tokens_and_rows_longer_than_what_is_kept_in_cache(isa, group):
    rows, cols = 37, 4300
    for sparsity, count in itertools.product(SPARSE.values(), (5, 100)):
        widths = None if group else [*range(1, 9), *range(17, 21)]
        layer = layer_of(rows, cols, sparsity, group, (3, 4), widths)
        level, scale, span = oracle(layer)
        a, b = factors(layer)
        weight = level * scale.repeat(span, 1)[:, :cols] + b.T @ a
        x = inputs(count, cols, torch.bfloat16)
        want = x.double().numpy() @ weight.T
        error = np.linalg.norm(multiply(x, layer).double().numpy() - want)
        assert error < 3e-3 * np.linalg.norm(want)
        x = x.float()
        error = np.linalg.norm(multiply(x, layer).double().numpy() - want)
        assert error < 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("group", [None, 64, 128])
def test_sums_at_their_limits(isa, group):
    """Every level, and every entry of x, as large as it gets."""
    rows, cols = 5, 1024
    for b, code, sign in itertools.product(range(1, 9), (0, 255), (-1, 1)):
        layer = layer_of(rows, cols, "2:4", group, widths=[b])
        layer.tensors["weight"].fill_(code)
        if b <= 5 and group is None:
            layer.tensors["codebook"].fill_(-128 if code else 127)
        x = torch.full((1, cols), sign * 8355711 / 2**23)
        want = torch.from_numpy(sparse_exactly(x[0], layer))
        assert torch.equal(multiply(x, layer)[0], want), (b, code, sign)


def test_every_instruction_set_gives_the_same_bits(monkeypatch):
    have = native._open("portable").skimlm_best_isa() + 1
    libraries = [native._open(isa) for isa in native.ISAS[:have]]
    for sparsity, group, adapter in itertools.product(SPARSE.values(), (None, 128), ADAPTERS):
        widths = None if group else [*range(1, 9), *range(17, 21)]
        layer = layer_of(301, 396, sparsity, group, adapter, widths, scaled=adapter[0] == 5)
        count = 1 if layer.spec.plain else 3  # more are multiplied as they are in bfloat16
        x, results = inputs(count, 396, torch.float32), []
        for library in libraries:
            monkeypatch.setattr(native, "library", lambda library=library: library)
            results.append(multiply(x, layer))
        assert all(torch.equal(results[0], other) for other in results), (sparsity, group, adapter)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_gives_no_finite_output(isa, bad):
    layer = layer_of(6, 140, "2:4", 64, (2, 4))
    for count in (1, 3, 6, 40):
        x = torch.randn(count, 140)
        x[0, 65] = bad
        out = multiply(x, layer)
        assert not out[0].isfinite().any() and out[1:].isfinite().all()


def test_patterns_6_and_7_are_read_as_5(isa):
    layer = layer_of(9, 264, "2:4", widths=[4])
    shape = layer.tensors["positions"].shape
    layer = changed(layer, positions=torch.randint(0, 256, shape, dtype=torch.uint8))
    x = inputs(1, 264, torch.float32)
    want = torch.from_numpy(sparse_exactly(x[0], layer))
    assert torch.equal(multiply(x, layer)[0], want)


@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize("pool", ["torch's threads", "own threads"])
def test_threads_do_not_change_a_bit(isa, pool, count):
    own = (None, None)
    native.library().skimlm_use_openmp(*(native._openmp() if "torch" in pool else own))
    layer, x, wrong = layer_of(900, 600, "2:4", 128, (60, 4)), torch.randn(count, 600), []
    one = multiply(x, layer)

    def call():
        wrong.extend(1 for _ in range(5) if not torch.equal(multiply(x, layer), one))

    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        call()
    at_once(3, call)
    torch.set_num_threads(1)
    native.library().skimlm_use_openmp(*native._openmp())
    assert not wrong


def test_what_does_not_fit_is_refused(isa):
    cases = [
        ("2:4", None, (2, 4)),
        ("bitmap", 64, (2, 16)),
        (None, 64, (3, 4)),
        ("2:4", 64, (0, 0)),
    ]
    refused = 0
    for sparsity, group, adapter in cases:
        widths = None if group else [2, 7, 19, 18]
        layer = layer_of(12, 140, sparsity, group, adapter, widths, scaled=True)
        x = torch.randn(2, 140)
        assert multiply(x, layer) is not None
        for name, tensor in layer.tensors.items():
            flat = tensor.flatten()
            spoiled = [
                flat[:-1],
                torch.cat([flat, flat[:1]]),
                flat[:0],
                tensor.double(),
                flat.repeat_interleave(2)[::2],
                None,
            ]
            for wrong in spoiled:
                if wrong is None and name == "in_scale":
                    continue
                assert multiply(x, changed(layer, **{name: wrong})) is None, name
                refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": "bitmap"},
        {"sparsity": None},
        {"sparsity": "4:8"},
        {"kept": 69},
        {"kept": 0},
        {"kept": -2},
        {"group": None},
        {"group": 40},
        {"group": -64},
        {"group": 2**62},
        {"rank": 3},
        {"rank": 0},
        {"rank": -2},
        {"adapter_bits": 16},
        {"adapter_bits": 8},
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(isa, change):
    layer, x = layer_of(12, 140, "2:4", 64, (2, 4)), torch.randn(1, 140)
    assert multiply(x, layer) is not None
    assert multiply(x, Layer(dataclasses.replace(layer.spec, **change), layer.tensors)) is None


# ---- unpacking


def unpack(layer, dtype=torch.float32, begin=0, end=None, room=None):
    """Natively unpacked rows in front of sevens; None if that is refused."""
    spec = layer.spec
    out = torch.full((room or spec.rows, spec.cols), 7, dtype=dtype)
    return out if native.layer_unpack(out, layer, begin, end) else None


def bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", SCALES)
@pytest.mark.parametrize("sparsity", SPARSE)
def test_unpacked_weights_are_those_of_torch_to_the_bit(isa, sparsity, group, dtype):
    turns = itertools.cycle(itertools.product(ADAPTERS, (False, True)))
    for (rows, cols), widths in itertools.product(SHAPES, widths_of(group)):
        adapter, scaled = next(turns)
        layer = layer_of(rows, cols, SPARSE[sparsity], group, adapter, widths, scaled)
        got, want = unpack(layer, dtype), ops.dequantize_reference(layer, dtype)
        assert torch.equal(bits(got), bits(want)), (rows, cols, widths, adapter, scaled)
        assert torch.equal(ops.dequantize(layer, dtype), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_tiny_or_negative_zero_are_those_of_torch(isa, dtype):
    for sparsity, group in itertools.product(SPARSE.values(), (None, 64)):
        layer = layer_of(9, 140, sparsity, group, scaled=True)
        layer = changed(layer, row_scale=-layer.tensors["row_scale"] * 2.0**-120)
        got, want = unpack(layer, dtype), ops.dequantize_reference(layer, dtype)
        assert torch.equal(bits(got), bits(want))
        assert ((want == 0) & want.signbit()).any() and ((want != 0) & (want.abs() < 1e-38)).any()


def test_a_range_of_stored_rows_is_unpacked_on_its_own(isa):
    for sparsity, group in itertools.product(SPARSE.values(), (None, 64)):
        layer = layer_of(40, 140, sparsity, group, (3, 4))
        want = ops.dequantize_reference(layer)
        order = torch.argsort(layer.tensors["widths"], stable=True)
        for begin, end in ((0, 40), (0, 1), (7, 29), (39, 40), (5, 5)):
            got = unpack(layer, torch.float32, begin, end)
            assert torch.equal(got[: end - begin], want[order[begin:end]])
            assert (got[end - begin :] == 7).all()
        for begin, end in ((-1, 3), (4, 2), (0, 41), (2**62, 2**62 + 1), (-(2**62), 2**62)):
            assert unpack(layer, torch.float32, begin, end) is None


def test_what_does_not_fit_is_not_unpacked(isa):
    refused = 0
    for sparsity, group in (("2:4", None), ("bitmap", 64), (None, 64), ("2:4", 64)):
        widths = None if group else [2, 7, 19, 18]
        layer = layer_of(12, 140, sparsity, group, widths=widths, scaled=True)
        for name, tensor in layer.tensors.items():
            flat = tensor.flatten()
            longer = torch.cat([flat, flat[:1]])
            for wrong in (
                flat[:-1],
                longer,
                flat[:0],
                tensor.double(),
                flat.repeat_interleave(2)[::2],
            ):
                spoiled = changed(layer, **{name: wrong})
                assert unpack(spoiled) is None
                with pytest.raises(ValueError, match="must|missing|belong"):
                    ops.dequantize(spoiled)
                refused += 1
        assert unpack(layer, room=11) is None
    assert refused > 80


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [(0, 0), (5, 4), (3, 16)], ids=str)
def test_many_tokens_are_multiplied_a_tile_of_rows_at_a_time(isa, monkeypatch, adapter, dtype):
    monkeypatch.setattr(cpu, "TILE", 64 * 140)
    monkeypatch.setattr(cpu, "FEW_SPARSE", 40)
    layer = layer_of(150, 140, "2:4", None, adapter, scaled=True)
    x, bias = torch.randn(2, 33, 140).to(dtype), torch.randn(150).to(dtype)
    want = ops.matmul_reference(x, layer, bias)
    seen, real = [], cpu._unpack
    monkeypatch.setattr(cpu, "_unpack", lambda out, *a: seen.append(out.shape) or real(out, *a))
    got = ops.matmul(x, layer, bias)
    assert [shape[0] for shape in seen] == [64, 64, 22]
    error = (got - want).float().norm() / want.float().norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_layer_whose_tensors_do_not_fit_says_which():
    q = with_options(random_quantized(20, 140), **options("2:4", 70, 64, 2, 4))
    layer = CompressedLinear.from_quantized(q)
    layer.positions = layer.positions[1:]
    with pytest.raises(FormatError, match="positions"):
        layer(torch.randn(2, 140))


@pytest.mark.parametrize("bad", [0, 9, 16, 21, 255])
def test_widths_out_of_range_are_refused(isa, bad):
    layer = layer_of(12, 140, "2:4")
    layer.tensors["widths"][3] = bad
    assert multiply(torch.randn(1, 140), layer) is None


def test_rows_longer_than_sums_of_bytes_in_32_bits():
    layer, x = layer_of(3, 70_000, "2:4", 128), torch.full((1, 70_000), 3.0)
    want = torch.from_numpy(sparse_exactly(x[0], layer))
    assert torch.equal(multiply(x, layer)[0], want)


def test_rows_with_more_bits_than_codes_leave_no_buffer(isa):
    """A file with such rows is refused at load; `make fuzz` watches what native code reads."""
    layer = layer_of(9, 140, "bitmap")
    layer.tensors["positions"].fill_(255)
    assert multiply(torch.randn(1, 140), layer).shape == (1, 9)
