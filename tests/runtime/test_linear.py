"""The compressed layers against the dense ones they stand for."""

import copy

import pytest
import torch
from torch import nn

from conftest import random_quantized
from layer_sample import OPTIONS, equal, options, options_id, with_options
from skimlm.format import (
    LayerSpec,
    dequantize,
    effective,
    pack,
    row_bits,
    shared_bits,
    table_values,
)
from skimlm.quantize.table import quantize_table
from skimlm.runtime.linear import CompressedLinear
from skimlm.runtime.ops import matmul_reference
from skimlm.runtime.tables import CompressedEmbedding, CompressedHead


def table_layers(rows=50, cols=9, bits=8, dtype=torch.float32, **options):
    """An embedding, a tied head, and the table they should hold."""
    torch.manual_seed(0)
    weight, scale = quantize_table(torch.randn(rows, cols), bits)
    embedding = CompressedEmbedding(rows, cols, bits, dtype=dtype, **options)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    embedding.scale = scale
    head = CompressedHead(rows, cols, bits, tied=True)
    head.tie(embedding)
    return embedding, head, table_values(weight, scale, cols, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", [None, [19, 3, 18, 20, 17]], ids=str)
def test_forward_is_the_dense_layers(dtype, scaled, biased, widths):
    torch.manual_seed(0)
    q = random_quantized(31, 17, in_scale=scaled, widths=widths)
    bias = torch.randn(31, dtype=dtype) if biased else None
    x = torch.randn(2, 3, 17, dtype=dtype)
    layer = CompressedLinear.from_quantized(q, bias)
    want = x.double() @ dequantize(q).double().T + (0 if bias is None else bias.double())
    close = dict(rtol=2 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    torch.testing.assert_close(layer(x).double(), want, **close)
    dense = nn.functional.linear(x, dequantize(q).to(dtype), bias)
    assert torch.equal(layer.dense(dtype)(x), dense)
    assert (layer.in_features, layer.out_features) == (17, 31)
    many = x[:1].expand(50, 3, 17)  # enough tokens to de-quantize for
    torch.testing.assert_close(layer(many).double(), want[:1].expand(50, 3, 31), **close)


@pytest.mark.parametrize("widths", [None, [19, 3, 18, 20, 17]], ids=str)
def test_gradients_flow_through_to_the_input(widths):
    q = random_quantized(31, 17, in_scale=True, widths=widths)
    x = torch.randn(3, 17, requires_grad=True)
    CompressedLinear.from_quantized(q)(x).sum().backward()
    torch.testing.assert_close(x.grad, dequantize(q).sum(0).expand(3, 17))


SOME = [*OPTIONS[::7], OPTIONS[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", SOME, ids=options_id)
def test_forward_of_version_2_is_the_dense_layers(chosen, dtype):
    torch.manual_seed(0)
    q = with_options(random_quantized(9, 140, in_scale=True), **chosen)
    bias, x = torch.randn(9, dtype=dtype), torch.randn(2, 3, 140, dtype=dtype)
    layer = CompressedLinear.from_quantized(q, bias)
    assert not layer.spec.rank or layer.adapter_product(x).shape == (2, 3, 9)
    want = x.double() @ effective(q).double().T + bias.double()
    size = x.double().abs() @ effective(q).double().abs().T
    for got in (layer(x), matmul_reference(x, pack(q), bias), layer.dense(dtype)(x)):
        assert got.dtype == dtype and got.shape == (2, 3, 9)
        error = (got.double() - want).abs() / (size.mean() + want.abs())
        assert error.max() < 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.dequantize(), effective(q))
    assert (layer.in_features, layer.out_features) == (140, 9)


def test_gradients_flow_through_weight_and_adapter():
    q = with_options(random_quantized(9, 140, in_scale=True), "2:4", 70, 33, 3, 4)
    x = torch.randn(3, 140, requires_grad=True)
    CompressedLinear.from_quantized(q)(x).sum().backward()
    torch.testing.assert_close(x.grad, effective(q).sum(0).expand(3, 140), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparse", [{}, dict(sparsity="2:4", kept=70), dict(group=33)])
def test_an_adapter_can_be_trained_in_place_of_the_stored_one(sparse):
    q = with_options(random_quantized(9, 140), **sparse, rank=3, adapter_bits=4)
    layer, x = CompressedLinear.from_quantized(q), torch.randn(5, 140)
    a, b = torch.randn(3, 140, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    layer.adapter = a, b
    out = layer(x)
    torch.testing.assert_close(out, x @ (dequantize(q) + b.T @ a).T, rtol=1e-4, atol=1e-4)
    (out * out.detach()).sum().backward()
    torch.testing.assert_close(b.grad, (x @ a.T).T @ out.detach())
    torch.testing.assert_close(a.grad, (out.detach() @ b.T).T @ x, rtol=1e-4, atol=1e-3)
    assert not [p for p in layer.parameters() if p.requires_grad]
    assert set(layer.state_dict()) == set(pack(q).tensors)


@pytest.mark.parametrize("chosen", SOME, ids=options_id)
def test_stored_tensors_are_counted_kept_unrounded_and_come_back(chosen):
    q = with_options(random_quantized(9, 140, in_scale=True), **chosen)
    full = CompressedLinear.from_quantized(q).to(torch.float16)
    stored = pack(q).tensors
    assert full.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert all(torch.equal(full.get_buffer(name), t) for name, t in stored.items())
    assert set(full.state_dict()) == set(stored)
    empty = CompressedLinear(full.spec)
    empty.load_state_dict(full.state_dict())
    assert equal(empty.dequantize(), full.dequantize())


def test_a_layer_says_what_it_is_made_of():
    q = with_options(random_quantized(9, 140, widths=[4]), "2:4", 70, 33, 3, 4)
    assert repr(CompressedLinear.from_quantized(q)) == (
        "CompressedLinear(140, 9, rows by width {4: 9}, sparsity=2:4, kept=70, group=33, rank=3, "
        "adapter_bits=4)"
    )


def test_a_replaced_buffer_counts_at_once():
    q, x = random_quantized(9, 17, widths=[3]), torch.randn(1, 17)
    layer, half = CompressedLinear.from_quantized(q), torch.full((9,), 0.5).bfloat16()
    before = layer(x)
    assert layer.layer is layer.layer
    layer.row_scale = layer.row_scale * half
    torch.testing.assert_close(layer(x), before / 2)
    layer.row_scale.mul_(half)
    torch.testing.assert_close(layer(x), before / 4)
    layer.row_scale.data = layer.row_scale * half
    torch.testing.assert_close(layer(x), before / 8)
    layer.load_state_dict(CompressedLinear.from_quantized(q).state_dict())
    torch.testing.assert_close(layer(x), before)


def test_a_layer_that_has_run_is_copied_and_pickled(tmp_path):
    layer, x = CompressedLinear.from_quantized(random_quantized(9, 17)), torch.randn(1, 17)
    want = layer(x)
    twin = copy.deepcopy(layer)
    torch.save(layer, tmp_path / "layer.pt")
    read = torch.load(tmp_path / "layer.pt", weights_only=False)
    layer.row_scale.zero_()
    assert torch.equal(twin(x), want) and torch.equal(read(x), want)
    assert not layer(x).any()


def test_a_dropped_adapter_is_gone():
    q = with_options(random_quantized(9, 140), **options(rank=3, adapter_bits=4))
    layer, x = CompressedLinear.from_quantized(q), torch.randn(1, 140)
    layer(x)
    layer.drop_adapter()
    torch.testing.assert_close(layer(x), x @ dequantize(q).T, rtol=1e-4, atol=1e-4)
    assert set(layer.state_dict()) == {"weight", "widths", "codebook", "row_scale", "row_zero"}


@pytest.mark.parametrize("widths", [[1], [8], [2, 7]])
def test_a_layer_with_few_widths_has_only_the_buffers_it_needs(widths):
    q = random_quantized(4, 6, widths=widths)
    layer = CompressedLinear.from_quantized(q)
    assert set(layer.state_dict()) == set(pack(q).tensors)
    assert torch.equal(layer.dequantize(), dequantize(q))


def test_nbytes_is_the_sum_of_the_rows():
    q = random_quantized(12, 17, in_scale=True)
    spec = LayerSpec(12, 17, in_scale=True)
    want = (sum(row_bits(spec, b) for b in q.widths.tolist()) + shared_bits(spec)) // 8
    assert CompressedLinear.from_quantized(q).nbytes == want


def test_state_dict_round_trip_through_an_empty_layer():
    q = random_quantized(12, 17, in_scale=True)
    full = CompressedLinear.from_quantized(q, torch.randn(12))
    empty = CompressedLinear(full.spec, bias=True)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty.dequantize(), dequantize(q)) and torch.equal(empty.bias, full.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_does_not_round_the_stored_numbers(dtype):
    q = random_quantized(12, 17, in_scale=True)
    layer = CompressedLinear.from_quantized(q, torch.randn(12)).to(dtype)
    assert torch.equal(layer.in_scale, q.in_scale) and layer.row_scale.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), dequantize(q))
    assert layer.bias.dtype == dtype


def test_nothing_stored_is_trainable():
    layer = CompressedLinear.from_quantized(random_quantized(4, 6), torch.randn(4))
    assert not [name for name, p in layer.named_parameters() if p.requires_grad]


def test_layers_move_to_another_device():
    layer = CompressedLinear.from_quantized(random_quantized(4, 6, in_scale=True)).to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer.in_scale.dtype == torch.float16


@pytest.mark.parametrize("cols", [1, 8, 9])
@pytest.mark.parametrize("bits", [8, 4])
def test_table_codes_are_read_as_format_md_says(bits, cols):
    torch.manual_seed(cols)
    weight, scale = quantize_table(torch.randn(6, cols), bits)
    got = table_values(weight, scale, cols, torch.float32)
    for i in range(6):
        for j in range(cols):
            code = (
                int(weight[i, j]) if bits == 8 else (int(weight[i, j // 2]) >> j % 2 * 4) % 16 - 8
            )
            assert float(got[i, j]) == code * float(scale[i])


def test_the_spare_nibble_of_an_odd_row_is_zero():
    weight, _ = quantize_table(torch.randn(6, 5), 4)
    assert weight.shape == (6, 3) and not (weight[:, 2] >> 4).any()


@pytest.mark.parametrize("bits, bound", [(8, 0.0085), (4, 0.125)])
def test_tables_are_close_to_what_they_replace(bits, bound):
    torch.manual_seed(0)
    table = torch.randn(5000, 64)  # more rows than are quantized at a time
    weight, scale = quantize_table(table, bits)
    error = table_values(weight, scale, 64, torch.float32) - table
    assert (error.norm() / table.norm()) < bound


def test_four_bit_scales_beat_the_full_range():
    torch.manual_seed(0)
    table = torch.randn(64, 256)
    weight, scale = quantize_table(table, 4)
    error = table_values(weight, scale, 256, torch.float32) - table
    step = table.abs().amax(1, keepdim=True) / 7
    full = (table / step).round().clamp(-7, 7) * step - table
    assert (error.square().sum(1) <= full.square().sum(1)).all()
    assert error.square().sum() < 0.7 * full.square().sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zeros(bits):
    weight, scale = quantize_table(torch.zeros(3, 5), bits)
    assert torch.equal(table_values(weight, scale, 5, torch.float32), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_and_head_are_the_dense_ones(bits, dtype):
    embedding, head, table = table_layers(bits=bits, dtype=dtype)
    ids = torch.tensor([[0, 3, 49], [7, 7, 1]])
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, table.to(dtype)))
    x = torch.randn(2, 9, dtype=dtype)
    want, eps = x.double() @ table.double().T, torch.finfo(dtype).eps
    torch.testing.assert_close(head(x).double(), want, rtol=2 * eps, atol=40 * eps)
    many = x[:1].expand(50, 9)
    close = dict(rtol=2 * eps, atol=40 * eps)
    torch.testing.assert_close(head(many).double(), want[:1].expand(50, *want.shape[1:]), **close)


def test_a_tied_head_stores_nothing():
    embedding, head, _ = table_layers()
    assert head.weight is embedding.weight and head.scale is embedding.scale
    assert set(head.state_dict()) == {"weight"}


def test_a_copied_pair_stays_tied():
    embedding, head, _ = table_layers()
    pair = copy.deepcopy(nn.ModuleList([embedding, head]))
    assert pair[1].weight is pair[0].weight


def test_an_embedding_answers_in_the_dtype_it_was_cast_to():
    embedding, _, table = table_layers(dtype=torch.float32)
    embedding.to(torch.bfloat16)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16
    assert embedding.scale.dtype == torch.bfloat16 and embedding.weight.dtype == torch.int8
    embedding.to(torch.float32)
    assert torch.equal(embedding(torch.tensor([1]))[0], table[1])


def test_a_multiplier_is_applied_in_the_models_dtype():
    embedding, _, table = table_layers(dtype=torch.bfloat16, multiplier=7.77)
    want = table.bfloat16()[3] * torch.tensor(7.77).bfloat16()
    assert torch.equal(embedding(torch.tensor(3)), want)
