"""Embedding and head that are layers, against the matrices they stand for."""

import copy

import pytest
import torch
from torch import nn

from conftest import random_quantized
from layer_sample import OPTIONS, options, options_id, with_options
from skimlm.errors import FormatError
from skimlm.format import Layer, dequantize, pack
from skimlm.runtime import ops
from skimlm.runtime.tables import PackedEmbedding, PackedHead

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tied_pair(rows=50, cols=9, dtype=torch.float32, **choices):
    """An embedding, a head that is tied to it, and the matrix of both."""
    q = random_quantized(rows, cols)
    embedding = PackedEmbedding.from_quantized(q, dtype=dtype, **choices)
    head = PackedHead(q.spec, tied=True)
    head.tie(embedding)
    return embedding, head, dequantize(q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 7, 64, 131])
def test_rows_are_those_of_the_whole_bit_for_bit(isa_or_none, cols, dtype):
    q = random_quantized(90, cols, in_scale=cols == 7)
    layer, whole = pack(q), dequantize(q).to(dtype)
    every = torch.arange(90).flip(0)
    for ids in (every, torch.tensor([[3, 3], [89, 0]]), torch.tensor(5), torch.empty(0, 2).long()):
        got = ops.rows(layer, ids, dtype)
        assert got.shape == (*ids.shape, cols) and got.dtype == dtype
        assert torch.equal(got, whole[ids])


@pytest.mark.parametrize("chosen", OPTIONS[::3], ids=options_id)
def test_rows_of_sparse_layers_and_grids_are_those_of_the_whole(isa_or_none, chosen):
    q = with_options(random_quantized(40, 140, in_scale=True), **chosen)
    ids = torch.randint(0, 40, (70,))
    assert torch.equal(ops.rows(pack(q), ids), dequantize(q)[ids])


def test_rows_do_not_depend_on_threads():
    layer, ids = pack(random_quantized(300, 65)), torch.randint(0, 300, (500,))
    want = ops.rows(layer, ids)
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.rows(layer, ids), want)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_a_row_that_is_not_there_is_an_index_error(isa_or_none, bad):
    with pytest.raises(IndexError):
        ops.rows(pack(random_quantized(9, 5)), torch.tensor([0, bad]))


@pytest.mark.parametrize("known", [False, True], ids=["new", "order known"])
@pytest.mark.parametrize("name", ["weight", "codebook", "row_scale", "widths"])
def test_rows_of_malformed_layers_are_refused(isa_or_none, name, known):
    layer = pack(random_quantized(9, 17))
    if known:
        ops.rows(layer, torch.tensor([1]))
    for wrong in (layer.tensors[name][:-1], layer.tensors[name].double(), None):
        stored = {n: wrong if n == name else t for n, t in layer.tensors.items()}
        broken = Layer(layer.spec, {n: t for n, t in stored.items() if t is not None})
        with pytest.raises((FormatError, ValueError), match=name):
            ops.rows(broken, torch.tensor([1]))


def test_widths_that_change_count_at_once(isa_or_none):
    old, new = random_quantized(9, 17, widths=[2, 3, 6]), random_quantized(9, 17, widths=[3, 6, 2])
    embedding, ids = PackedEmbedding.from_quantized(old), torch.arange(9)
    assert torch.equal(embedding(ids), dequantize(old))
    embedding.load_state_dict(dict(pack(new).tensors))
    assert torch.equal(embedding(ids), dequantize(new))
    layer = pack(old)
    embedding.weight.data, embedding.widths.data = layer.tensors["weight"], layer.tensors["widths"]
    embedding.codebook.data, embedding.row_scale = (
        layer.tensors["codebook"],
        layer.tensors["row_scale"],
    )
    embedding.row_zero = layer.tensors["row_zero"]
    assert torch.equal(embedding(ids), dequantize(old))


def test_the_order_of_rows_is_found_once():
    layer = pack(random_quantized(9, 17))
    assert ops.stored_order(layer) is ops.stored_order(Layer(layer.spec, dict(layer.tensors)))
    with torch.inference_mode():
        twin = Layer(layer.spec, {n: t.clone() for n, t in layer.tensors.items()})
        assert torch.equal(ops.rows(twin, torch.tensor([4])), ops.rows(layer, torch.tensor([4])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_head_are_the_dense_ones(dtype):
    embedding, head, table = tied_pair(dtype=dtype)
    ids = torch.tensor([[0, 3, 49], [7, 7, 1]])
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, table.to(dtype)))
    x = torch.randn(2, 9, dtype=dtype)
    want, eps = x.double() @ table.double().T, torch.finfo(dtype).eps
    torch.testing.assert_close(head(x).double(), want, rtol=2 * eps, atol=40 * eps)
    many = x[:1].expand(50, 9)
    torch.testing.assert_close(head(many), many @ table.to(dtype).T, rtol=2 * eps, atol=40 * eps)
    for dense in (embedding.dense(dtype), head.dense(dtype)):
        assert torch.equal(dense.weight, table.to(dtype))


def test_gradients_flow_through_a_head_to_its_input():
    _, head, table = tied_pair()
    x = torch.randn(3, 9, requires_grad=True)
    out = head(x)
    (out * out.detach()).sum().backward()
    torch.testing.assert_close(x.grad, out.detach() @ table)


def test_a_tied_head_stores_nothing_of_its_own():
    embedding, head, _ = tied_pair()
    assert head.weight is embedding.weight and head.layer is embedding.layer
    assert set(head.state_dict()) == {"weight"}
    assert len(list(head.buffers())) == 0 and len(list(head.modules())) == 1


def test_a_tied_head_goes_where_its_embedding_goes():
    embedding, head, _ = tied_pair()
    nn.ModuleList([embedding, head]).to(torch.bfloat16)
    assert head.weight is embedding.weight and head.layer is embedding.layer
    assert embedding.row_scale.dtype == torch.bfloat16 and embedding.widths.dtype == torch.uint8


def test_a_copied_or_pickled_pair_stays_tied_and_apart_from_the_first(tmp_path):
    embedding, head, table = tied_pair()
    ids, x = torch.tensor([4, 0, 31]), torch.randn(2, 9)
    want = head(x)
    embedding(ids)
    pair = nn.ModuleList([embedding, head])
    torch.save(pair, tmp_path / "pair.pt")
    for twin in (
        copy.deepcopy(pair),
        torch.load(tmp_path / "pair.pt", weights_only=False),
    ):
        assert twin[1].weight is twin[0].weight and twin[1].embedding is twin[0]
        embedding.row_scale.zero_()
        assert torch.equal(twin[0](ids), table[ids]) and torch.equal(twin[1](x), want)
        twin[0].row_scale.zero_()
        assert not twin[0](ids).any() and not twin[1](x).any()
        embedding.row_scale.copy_(pack(random_quantized(50, 9)).tensors["row_scale"])
    assert torch.equal(head(x), want)


def test_an_embedding_answers_in_the_dtype_it_was_cast_to():
    embedding, _, table = tied_pair()
    embedding.to(torch.bfloat16)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16
    embedding.to(torch.float32)
    assert torch.equal(embedding(torch.tensor([1]))[0], table[1])


def test_a_multiplier_is_applied_in_the_models_dtype():
    embedding, _, table = tied_pair(dtype=torch.bfloat16, multiplier=7.77)
    want = table.bfloat16()[3] * torch.tensor(7.77).bfloat16()
    assert torch.equal(embedding(torch.tensor(3)), want)


def test_an_untied_head_has_its_own_tensors_and_a_bias():
    q = random_quantized(50, 9)
    head = PackedHead.from_quantized(q, bias=True)
    head.bias.data.copy_(torch.arange(50))
    x = torch.randn(2, 9)
    torch.testing.assert_close(head(x), x @ dequantize(q).T + torch.arange(50))
    assert set(head.state_dict()) == {*pack(q).tensors, "bias"}
    assert head.nbytes == pack(q).nbytes


def test_the_bias_of_a_tied_head_has_a_number_for_every_row():
    """transformers lengthens it to the length of the tied `weight`, which is in bytes here."""
    embedding, _, table = tied_pair()
    head = PackedHead(embedding.spec, tied=True, bias=True)
    head.bias.data = nn.functional.pad(torch.arange(50.0), (0, len(embedding.weight) - 50))
    head.tie(embedding)
    x = torch.randn(2, 9)
    torch.testing.assert_close(head(x), x @ table.T + torch.arange(50.0))


@pytest.mark.parametrize("chosen", [options(), options("2:4", 70, 64)], ids=options_id)
def test_the_operator_of_rows_is_well_formed(chosen):
    layer = pack(with_options(random_quantized(9, 140, in_scale=True), **chosen))
    ids, args = torch.tensor([[1, 8], [3, 3]]), ops.arguments(layer.tensors, layer.spec)
    torch.library.opcheck(torch.ops.skimlm.rows.default, (ids, torch.bfloat16, *args))
    got = ops.compiled_rows(layer.tensors, layer.spec, ids, torch.bfloat16)
    assert torch.equal(got, ops.rows(layer, ids, torch.bfloat16))


def test_torch_compile_traces_embedding_and_head_as_one_operator_each():
    embedding, head, _ = tied_pair()
    traced = []

    def backend(graph, _):
        traced.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    for module, x in ((embedding, torch.tensor([[1, 2]])), (head, torch.randn(2, 9))):
        with torch.no_grad():
            assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(x), module(x))
    assert traced == [torch.ops.skimlm.rows, torch.ops.skimlm.matmul]


def test_a_table_says_what_it_is_made_of():
    embedding = PackedEmbedding.from_quantized(random_quantized(6, 9, widths=[3, 4]))
    assert repr(embedding) == "PackedEmbedding(6, 9, rows by width {3: 3, 4: 3})"


def test_rows_can_be_registered_for_a_device(monkeypatch):
    layer = pack(random_quantized(9, 5))
    monkeypatch.setitem(ops.OPERATIONS, "rows", {"cpu": lambda *given: given})
    assert ops.rows(layer, torch.tensor(1)) == (layer, torch.tensor(1), torch.float32)


def test_rows_of_a_code_that_native_code_does_not_know_are_made_in_torch(monkeypatch):
    monkeypatch.setattr("skimlm.runtime.cpu.KNOWN_ROW_CODES", set())
    monkeypatch.setattr("skimlm.native.layer_rows", None)
    q = random_quantized(9, 5)
    assert torch.equal(ops.rows(pack(q), torch.tensor([8, 2])), dequantize(q)[[8, 2]])
