"""Products with packed weights, against float64 gather and matmul, on every instruction set."""

import dataclasses
import itertools
import random
import subprocess
import sys

import pytest
import torch

from conftest import at_once, random_quantized
from layer_sample import (
    OPTIONS,
    TRELLIS_WIDTHS,
    inputs,
    levels_of,
    options,
    options_id,
    with_options,
)
from skimlm import native
from skimlm.errors import FormatError
from skimlm.format import Layer, dequantize, effective, pack, table_values
from skimlm.quantize.table import quantize_table
from skimlm.runtime import cpu, ops
from skimlm.runtime.linear import CompressedLinear
from skimlm.runtime.tables import CompressedHead

SHAPES = [(1, 1), (3, 7), (5, 64), (9, 65), (37, 100), (66, 131), (12, 576)]
MIXED = [[b] for b in range(1, 9)] + [None, *TRELLIS_WIDTHS]


@pytest.fixture(params=["torch's threads", "own threads"])
def pool(request, isa):
    """Both ways work is split, with two threads."""
    own = (None, None)
    native.library().skimlm_use_openmp(*(native._openmp() if "torch" in request.param else own))
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
    native.library().skimlm_use_openmp(*native._openmp())


@pytest.mark.parametrize("chosen", OPTIONS[::5], ids=options_id)
def test_the_reference_multiplies_by_everything_a_layer_has(chosen):
    q = with_options(random_quantized(9, 140, in_scale=True), **chosen)
    x, bias = inputs(5, 140, torch.float32), torch.linspace(-1, 1, 9)
    weight = effective(q).double()
    got = ops.matmul_reference(x, pack(q), bias).double()
    size = x.double().abs() @ weight.abs().T + 1
    assert ((got - x.double() @ weight.T - bias).abs() <= 1e-6 * size).all()
    many = x.expand(cpu.FEW_SPARSE, 5, 140)
    got = ops.matmul(many, pack(q), bias).double()  # on torch, too
    assert ((got - x.double() @ weight.T - bias).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("chosen", OPTIONS[::5], ids=options_id)
def test_rows_of_version_2_cut_into_chunks_give_the_same_weight(monkeypatch, chosen):
    q = with_options(random_quantized(33, 140, in_scale=True), **chosen)
    monkeypatch.setattr(ops, "CHUNK", 300)
    assert torch.equal(ops.dequantize_reference(pack(q)), dequantize(q))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("widths", MIXED, ids=str)
def test_exact_products_are_exact(isa, widths, scaled):
    for rows, cols in [*SHAPES, (7, 1152)]:  # the last longer than what is made at once
        q = random_quantized(rows, cols, widths=widths, in_scale=scaled)
        weight = dequantize(q).double()
        for count in (1, 2, 5, 15, 33, 70):
            for dtype in (torch.float32, torch.bfloat16):
                x = inputs(count, cols, dtype)
                bias = torch.randn(rows).to(dtype) if count % 2 else None
                got = ops.matmul(x, pack(q), bias)
                assert got.dtype == dtype and got.shape == (count, rows)
                want, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T + 0.1
                want = want if bias is None else want + bias.double()
                rounding = want.abs() * 2**-8 if dtype == torch.bfloat16 else 0
                bound = 1e-6 * size + half_steps(x, q) @ unscaled(q).abs().T
                if count >= cpu.FEW_TOKENS and not native.many(dtype):
                    bound += 2**-8 * size  # torch's product with the weight in the dtype of x
                assert ((got.double() - want).abs() <= bound + rounding).all()


def unscaled(q):
    """The weight without its input scale, which goes to x."""
    return dequantize(dataclasses.replace(q, in_scale=None)).double()


def half_steps(x, q):
    """What rounding a token to integers below 2^23 may change: half a step, the same everywhere."""
    x = x.double() if q.in_scale is None else x.double() * q.in_scale.double()
    return (x.abs().amax(1, keepdim=True) * 2**-23).expand_as(x)


def exact_product(x, q, limit=8355711):
    """One token in integers, as product.h says: x in units of a power of two, everything exact."""
    x = x.float() if q.in_scale is None else x.float() * q.in_scale.float()
    unit = 2.0**-40
    while (x.abs().max().double() / unit) > limit:
        unit *= 2
    scaled = x.double() / unit
    whole = (scaled.abs() + 0.5).floor() * scaled.sign()
    return (whole @ levels_of(q).T * (q.row_scale.double() * unit)).float()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("widths", MIXED, ids=str)
def test_one_token_is_exact_to_the_bit_everywhere(isa, widths, scaled):
    for rows, cols in [*SHAPES, (5, 1300)]:
        q = random_quantized(rows, cols, widths=widths, in_scale=scaled)
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(1, cols, dtype)
            got = ops.matmul(x, pack(q))
            assert torch.equal(got, exact_product(x, q).to(dtype)), (rows, cols, dtype)


def test_trellis_rows_of_every_length_end_where_their_stream_does(isa):
    for cols in (*range(8, 400, 8), *range(1, 300, 23)):
        q = random_quantized(20, cols, seed=cols, widths=[17, 18, 19, 20])
        layer, x = pack(q), inputs(3, cols, torch.bfloat16)
        for row in x:
            want = exact_product(row[None], q).bfloat16()
            assert torch.equal(ops.matmul(row[None], layer), want), cols
        weight = dequantize(q)
        assert torch.equal(ops.dequantize(layer, torch.bfloat16), weight.bfloat16()), cols
        assert torch.equal(ops.dequantize(layer, torch.float32), weight), cols
        close = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        assert ((ops.matmul(x, layer).double() - close).abs() <= 2**-7 * size).all(), cols


def test_a_product_for_each_of_several_layers_is_that_of_each_alone(pool):
    kinds = [dict(), dict(), *OPTIONS[::7], dict()]
    widths = {0: [19, 3, 18], len(kinds) - 1: [20, 7, 17, 19, 18]}
    scaled = [False, True, *[bool(i % 2) for i in range(len(kinds) - 3)], False]
    qs = [
        with_options(random_quantized(70, 140, seed=i, in_scale=s, widths=widths.get(i)), **kind)
        for i, (kind, s) in enumerate(zip(kinds, scaled, strict=True))
    ]
    layers = [pack(q) for q in qs]
    for dtype in (torch.float32, torch.bfloat16):
        for x in (inputs(len(layers), 140, dtype), inputs(1, 140, dtype)):
            got = ops.matmul_each(x, layers)
            rows = x.expand(len(layers), -1)
            assert got.dtype == dtype
            for row, q, layer, y in zip(rows, qs, layers, got, strict=True):
                assert torch.equal(y, ops.matmul(row, layer))
                want, size = row.double() @ effective(q).double().T, row.double().abs().sum()
                assert ((y.double() - want).abs() <= 2**-7 * want.abs() + 1e-5 * size).all()
    assert torch.equal(got, ops.matmul_each_reference(x, layers))


def test_layers_side_by_side_are_those_one_after_the_other(pool):
    kinds = [dict(), *OPTIONS[::9], dict(), dict()]
    scaled = [False, *[bool(i % 2) for i in range(len(kinds) - 2)], False]
    qs = [
        with_options(random_quantized(30 + 9 * i, 192, seed=i, in_scale=s), **kind)
        for i, (kind, s) in enumerate(zip(kinds, scaled, strict=True))
    ]
    layers, rows = [pack(q) for q in qs], [len(q.widths) for q in qs]
    for dtype, count in itertools.product((torch.float32, torch.bfloat16), (1, 5, 6, 40, 300)):
        x, bias = inputs(count, 192, dtype), torch.randn(sum(rows)).to(dtype)
        for shift in (bias, None):
            got = ops.matmul_beside(x, layers, shift)
            shifts = [None] * len(rows) if shift is None else shift.split(rows)
            for part, layer, some in zip(got.split(rows, 1), layers, shifts, strict=True):
                assert torch.equal(part, ops.matmul(x, layer, some))
    assert torch.equal(got, ops.matmul_beside_reference(x, layers, None))


def test_layers_that_cannot_go_together_are_refused(isa):
    a, b, c = (pack(random_quantized(*shape)) for shape in ((6, 70), (6, 71), (7, 70)))
    x = torch.randn(2, 70)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 71\]"):
        ops.matmul_beside(x, [a, b])
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 71\]"):
        ops.matmul_each(x, [a, b])
    with pytest.raises(RuntimeError, match="equal size"):
        ops.matmul_each(x, [a, c])
    short = Layer(a.spec, a.tensors | {"row_scale": a.tensors["row_scale"][:5]})
    with pytest.raises(FormatError, match="row_scale"):
        ops.matmul_each(x, [a, short])
    with pytest.raises(RuntimeError, match="expanded size"):
        ops.matmul_each(torch.randn(3, 70), [a, a])


@pytest.mark.parametrize("widths", [None, [17, 18, 19, 20]], ids=str)
def test_rows_longer_than_sums_of_bytes_in_32_bits(isa, widths):
    q = random_quantized(5, 70_000, widths=widths)
    x = torch.full((1, 70_000), 3.0)
    assert torch.equal(ops.matmul(x, pack(q)), exact_product(x, q))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_gives_no_finite_output(isa, bad):
    layer = pack(random_quantized(6, 70))
    for count in (1, 3, 40):
        x = torch.randn(count, 70)
        x[0, 65] = bad
        out = ops.matmul(x, layer)
        assert not out[0].isfinite().any() and out[1:].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 1e36])
def test_inputs_of_any_size(isa, size):
    q = random_quantized(6, 70, widths=[2, 3, 4])
    q.row_scale.fill_(2**-10)
    x = torch.randn(1, 70).clamp(-1, 1) * size
    got = ops.matmul(x, pack(q)).double()
    want = x.double() @ dequantize(q).double().T
    assert ((got - want).abs() <= 1e-5 * want.abs().max() + 2**-126).all()


@pytest.mark.parametrize("widths", MIXED, ids=str)
def test_rounded_products_stay_within_half_a_step_of_every_input(isa, widths):
    for rows, cols in SHAPES:
        q = random_quantized(rows, cols, widths=widths)
        weight = dequantize(q).double()
        for count in (1, 5):
            x = inputs(count, cols, torch.float32)
            got = ops.matmul(x, pack(q), exact=False).double()
            padded = torch.nn.functional.pad(x, (0, -cols % 128)).view(count, -1, 128).double()
            step = padded.abs().amax(2, keepdim=True).expand_as(padded).reshape(count, -1) / 127
            bound = step[:, :cols] / 2 @ weight.abs().T
            size = x.double().abs() @ weight.abs().T + step[:, :cols] * 128 @ weight.abs().T
            assert ((got - x.double() @ weight.T).abs() <= bound * 1.0001 + 1e-6 * size).all()


def test_rounding_the_input_is_what_the_reference_does(isa):
    q = random_quantized(37, 200)
    x = inputs(3, 200, torch.float32)
    chunks = torch.nn.functional.pad(x, (0, 56)).view(3, 2, 128)
    step = chunks.abs().amax(2, keepdim=True) / 127
    rounded = ((chunks / step).round() * step).view(3, 256)[:, :200]
    got = ops.matmul(x, pack(q), exact=False)
    want = rounded.double() @ dequantize(q).double().T
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_the_reference_is_gather_and_matmul():
    q = random_quantized(20, 33, in_scale=True)
    x, bias = torch.randn(4, 33), torch.randn(20)
    want = x.double() @ dequantize(q).double().T + bias.double()
    got = ops.matmul_reference(x, pack(q), bias)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_extreme_zero_points_and_scales(isa):
    q = random_quantized(6, 70, widths=[6, 7, 8])
    q.row_zero.copy_(torch.tensor([-32768, 32767, 0, 255, -1, 31], dtype=torch.int16))
    q.row_scale[0] = -q.row_scale[0]
    x = torch.randn(2, 70)
    weight = dequantize(q).double()
    error = (ops.matmul(x, pack(q)).double() - x.double() @ weight.T).abs()
    assert (error <= 1e-6 * (x.double().abs() @ weight.abs().T)).all()


@pytest.mark.parametrize("widths", [None, [19, 3, 18]], ids=str)
def test_threads_do_not_change_a_bit(pool, widths):
    layer = pack(random_quantized(2000, 600, widths=widths))
    x = torch.randn(3, 600)
    torch.set_num_threads(1)
    one = ops.matmul(x, layer)
    for threads in (2, 3, 8, 1):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(ops.matmul(x, layer), one)


def test_calls_from_several_threads_at_once(pool):
    layer = pack(random_quantized(2000, 600))
    x, wrong = torch.randn(3, 600), []
    want = ops.matmul(x, layer)

    def call():
        for _ in range(50):
            if not torch.equal(ops.matmul(x, layer), want):
                wrong.append(1)

    at_once(4, call)
    assert not wrong


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_still_computes():
    code = """
import os, torch
from skimlm.runtime.ops import matmul
from skimlm.format import QuantizedWeight, pack
torch.set_num_threads(2)
q = QuantizedWeight(torch.zeros(9999, 999, dtype=torch.uint8), torch.full((9999,), 3).byte(),
                    torch.ones(9999, 32, dtype=torch.int8) * (torch.arange(32) < 8),
                    torch.ones(9999).bfloat16(), torch.zeros(9999, dtype=torch.int16))
p = pack(q)
run = lambda: matmul(torch.ones(1, 999), p)
assert (run() == 999).all()
child = os.fork()
if child == 0:
    os._exit(0 if (run() == 999).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cols", [1, 9, 64, 131])
def test_table_products(isa, bits, cols):
    torch.manual_seed(0)
    codes, scale = quantize_table(torch.randn(300, cols), bits)
    table = table_values(codes, scale, cols, torch.float32).double()
    for dtype, count in itertools.product((torch.float32, torch.bfloat16), (1, 3, 20)):
        x = torch.randn(2, count, cols).to(dtype)
        got, want = ops.table_matmul(x, codes, scale, bits), x.double() @ table.T
        size = x.double().abs() @ table.abs().T
        rounding = want.abs() * 2**-8 if dtype == torch.bfloat16 else 0
        if 2 * count >= cpu.FEW_TOKENS and not native.many(dtype):
            rounding = rounding + 2**-8 * size  # torch's product with the table in the dtype of x
        assert got.shape == (2, count, 300)
        # at 4 bits 8 times the sum of x is taken off a sum of up to twice its size
        assert ((got.double() - want).abs() <= 5e-6 * size + rounding + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_times_a_table_are_what_each_is_alone(isa, dtype):
    codes, scale = quantize_table(torch.randn(3000, 1000), 8)  # many: bfloat16 hides most sums
    x = torch.randn(40, 1000).to(dtype)
    alone = torch.cat([ops.table_matmul(row, codes, scale, 8) for row in x.split(1)])
    assert torch.equal(ops.table_matmul_alone(x, codes, scale, 8), alone)


@pytest.mark.parametrize("chosen", [options(), options("2:4", 70, 64, 2, 4)], ids=options_id)
def test_operators_are_well_formed(chosen):
    x, bias = torch.randn(2, 140), torch.randn(9)
    layer = pack(with_options(random_quantized(9, 140, in_scale=True), **chosen))
    args = ops.arguments(layer.tensors, layer.spec)
    torch.library.opcheck(torch.ops.skimlm.matmul.default, (x, bias, True, *args))
    torch.library.opcheck(torch.ops.skimlm.dequantize.default, (torch.bfloat16, *args))
    codes, scale = quantize_table(torch.randn(50, 140), 8)
    torch.library.opcheck(torch.ops.skimlm.table_matmul.default, (x, codes, scale, 8, None))


def test_operators_do_what_the_operations_do():
    q = with_options(random_quantized(9, 140, in_scale=True), **options("bitmap", 50, 33, 3, 16))
    x, bias, layer = torch.randn(2, 3, 140), torch.randn(9), pack(q)
    got = ops.compiled_matmul(x, layer.tensors, layer.spec, bias)
    assert torch.equal(got, ops.matmul(x, layer, bias))
    args = ops.arguments(layer.tensors, layer.spec)
    got = torch.ops.skimlm.dequantize(torch.bfloat16, *args)
    assert torch.equal(got, ops.dequantize(layer, torch.bfloat16))


def test_an_implementation_can_be_registered_for_a_device(monkeypatch):
    layer, seen = pack(random_quantized(9, 17)), []

    def implementation(x, layer, bias, exact):
        seen.append(x.dtype)
        return x.new_zeros(len(x), 9) if x.dtype == torch.float32 else NotImplemented

    table = {name: dict(devices) for name, devices in ops.OPERATIONS.items()}
    monkeypatch.setattr(ops, "OPERATIONS", table)
    ops.register("matmul", "cpu", implementation)
    x = torch.randn(2, 17)
    assert not ops.matmul(x, layer).any()
    want = ops.matmul_reference(x.double(), layer)
    assert torch.equal(ops.matmul(x.double(), layer), want)
    assert seen == [torch.float32, torch.float64]
    with pytest.raises(KeyError):
        ops.register("product", "cpu", implementation)


def test_a_layer_without_its_widths_and_no_layer_at_all_are_refused():
    layer = pack(random_quantized(9, 17))
    rest = {name: t for name, t in layer.tensors.items() if name != "widths"}
    with pytest.raises(FormatError, match="widths: is missing"):
        ops.dequantize(Layer(layer.spec, rest))
    with pytest.raises(ValueError, match="at least 1 is needed, got 0"):
        ops.matmul_each(torch.randn(1, 17), [])


def test_a_row_code_that_native_code_does_not_know_is_left_to_torch(monkeypatch):
    layer, x = pack(random_quantized(9, 17, widths=[3, 7])), torch.randn(2, 17)
    monkeypatch.setattr(cpu, "KNOWN_ROW_CODES", {"table"})
    monkeypatch.setattr(native, "call", None)
    monkeypatch.setattr(native, "layer_matmul", None)
    monkeypatch.setattr(native, "layer_unpack", None)
    assert torch.equal(ops.matmul(x, layer), ops.matmul_reference(x, layer))
    assert torch.equal(ops.dequantize(layer), ops.dequantize_reference(layer))


@pytest.mark.parametrize("widths", [None, [19, 3, 18]], ids=str)
def test_malformed_calls_are_errors_not_crashes(isa, widths):
    """Random damage to any argument: an exception with a reason, or the right answer."""
    rng = random.Random(0)
    layer = pack(random_quantized(12, 40, in_scale=True, widths=widths))
    x = torch.randn(2, 40)
    good, want = layer.tensors, ops.matmul(x, layer)

    def damage(tensor):
        kind = rng.randrange(6)
        if kind == 0:
            return tensor[: rng.randrange(len(tensor))]
        if kind == 1:
            return torch.cat([tensor, tensor[: rng.randrange(1, 9)]])
        if kind == 2:
            return tensor.to(rng.choice([torch.float32, torch.int64, torch.int8, torch.uint8]))
        if kind == 3:
            return tensor.repeat_interleave(2)[::2]
        if kind == 4:
            return tensor[None]
        return None

    refused = 0
    for _ in range(2000):
        name = rng.choice(list(good))
        wrong = damage(good[name])
        tensors = {n: wrong if n == name else t for n, t in good.items()}
        tensors = {n: t for n, t in tensors.items() if t is not None}
        value = x if rng.random() < 0.8 else x[:, : rng.randrange(1, 40)]
        try:
            got = ops.matmul(value, Layer(layer.spec, tensors))
        except (FormatError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            assert str(error)
            refused += 1
            continue
        assert wrong is not None and torch.equal(wrong, good[name]) and value is x
        assert torch.equal(got, want)
    assert refused > 1000


def test_widths_out_of_range_are_refused(isa):
    q = random_quantized(12, 40)
    for bad in (0, 9, 16, 21, 255):
        layer = pack(q)
        layer.tensors["widths"][3] = bad
        with pytest.raises(FormatError, match="width"):
            ops.matmul(torch.randn(1, 40), layer)


@pytest.mark.parametrize("tile", [30, 300, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_are_multiplied_by_the_dequantized_weight(isa, monkeypatch, tile, dtype):
    monkeypatch.setattr(cpu, "TILE", tile)
    q = random_quantized(200, 30)
    x, bias = torch.randn(2, cpu.FEW_TOKENS, 30).to(dtype), torch.randn(200).to(dtype)
    want = torch.nn.functional.linear(x.double(), dequantize(q).to(dtype).double(), bias.double())
    eps = torch.finfo(dtype).eps
    got = ops.matmul(x, pack(q), bias)
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=16 * eps)


def test_info_says_which_path_runs():
    assert native.path() in ("avx512 vbmi", "avx512", "avx2", "portable")


def traced_of(model, x):
    """The functions that torch.compile sees; what is compiled must give the same."""
    traced = []

    def backend(graph, _):
        traced.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    return traced


@pytest.mark.parametrize("chosen", [options(), options("2:4", 70, 64, 2, 4)], ids=options_id)
def test_torch_compile_traces_a_compressed_layer_as_one_operator(chosen):
    q = with_options(random_quantized(20, 140, in_scale=True), **chosen)
    layer = CompressedLinear.from_quantized(q, torch.randn(20))
    assert traced_of(layer, torch.randn(2, 140)) == [torch.ops.skimlm.matmul]


def test_torch_compile_traces_a_head_as_one_operator():
    head = CompressedHead(50, 9, 8)
    codes, head.scale = quantize_table(torch.randn(50, 9), 8)
    head.weight = torch.nn.Parameter(codes, requires_grad=False)
    assert traced_of(head, torch.randn(2, 9)) == [torch.ops.skimlm.table_matmul]
