"""A stored layer that is trained: products and gradients are those of its dense weight."""

import dataclasses

import pytest
import torch

import skimlm.format as P
from layer_sample import OPTIONS, options, options_id, oracle_window, with_options
from skimlm.format.layer import Layer
from skimlm.format.pack import dequantize, pack, unpack
from skimlm.train import packed as K

ROWS, COLS = 23, 140
DENSE = options()


def weight(widths, in_scale=False, seed=0) -> P.QuantizedWeight:
    g = torch.Generator().manual_seed(seed)
    widths = torch.tensor(widths)[torch.arange(ROWS) % len(widths)].to(torch.uint8)
    entries = 1 << (widths % 16).int()[:, None]
    levels = torch.randint(-127, 128, (ROWS, 32), generator=g).to(torch.int8)
    table, affine = widths <= 5, (widths > 5) & (widths < 16)
    used = torch.arange(32) < entries
    return P.QuantizedWeight(
        (torch.rand(ROWS, COLS, generator=g) * entries).to(torch.uint8),
        widths,
        torch.where(used & table[:, None], levels, 0),
        (torch.rand(ROWS, generator=g) / 500 + 1e-3).bfloat16(),
        torch.where(affine, torch.randint(0, 60, (ROWS,), generator=g), 0).to(torch.int16),
        torch.rand(COLS, generator=g).add(0.5).half() if in_scale else None,
        trellis=torch.randint(
            -127, 128, (sum(w > 16 for w in widths.unique()), 128), generator=g
        ).to(torch.int8),
    )


TABLES, TRELLISES = (1, 2, 3, 4, 5), (17, 18, 19, 20)


def layer_of(chosen, in_scale=False) -> Layer:
    grids = () if any(chosen.values()) else (6, 8)
    trellises = () if chosen["group"] else TRELLISES
    q = weight((*TABLES, *grids, *trellises), in_scale)
    return pack(with_options(q, **chosen) if any(chosen.values()) else q)


def dense(layer: Layer, tensors) -> torch.Tensor:
    """W from the codes of `unpack`, a row at a time, differentiable in the codebooks."""
    q, place = unpack(layer), dict.fromkeys(layer.spec.counts, 0)
    rows = []
    for i, b in enumerate(q.widths.tolist()):
        codes = q.codes[i].long()
        if b > 16:
            window = [oracle_window(codes.tolist(), b - 16, j) for j in range(len(codes))]
            row = tensors[f"trellis.{b}"][window]
        elif b <= 5:
            row = tensors[f"codebook.{b}"][place[b]][codes]
        else:
            row = (codes - int(q.row_zero[i])).float()
        row = row * tensors[f"row_scale.{b}"][place[b]]
        place[b] += 1
        if q.mask is not None:
            row = row.new_zeros(COLS).masked_scatter(q.mask[i], row)
        rows.append(row if q.in_scale is None else row * q.in_scale.float())
    w = torch.stack(rows)
    return w if q.adapter is None else w + tensors["lora_b"].T @ tensors["lora_a"]


def changed(tensors, seed=3) -> dict[str, torch.Tensor]:
    """The same, each moved by a tenth of its size and not rounded."""
    g = torch.Generator().manual_seed(seed)
    size = {n: t.square().mean().sqrt() / 10 for n, t in tensors.items()}
    return {n: t + torch.randn(t.shape, generator=g) * size[n] for n, t in tensors.items()}


def rounded(layer, tensors) -> dict[str, torch.Tensor]:
    """Levels as integers, scales as bfloat16, factors to the scales that the layer has."""
    return {n: stored_values(layer, n, t) for n, t in tensors.items()}


def stored_values(layer, name, t) -> torch.Tensor:
    """The values of one tensor, number by number for a factor of an adapter."""
    if name.startswith("row_scale") or (name.startswith("lora") and layer.spec.adapter_bits == 16):
        return t.bfloat16().float()
    if not name.startswith("lora"):
        return t.round().clamp(-127, 127)
    scale, out = layer.tensors[f"{name}_scale"].float(), torch.empty_like(t)
    for k, j in torch.cartesian_prod(*map(torch.arange, t.shape)).tolist():
        step = scale[k, j // 128]
        out[k, j] = (t[k, j] / step).round().clamp(-8, 7) * step
    return out


def inputs(seed=1):
    return torch.randn(2, 5, COLS, generator=torch.Generator().manual_seed(seed))


KINDS = [DENSE, *(chosen for chosen in OPTIONS if chosen["group"] is None)]


@pytest.mark.parametrize("in_scale", [False, True])
@pytest.mark.parametrize("chosen", KINDS, ids=options_id)
def test_a_product_and_its_gradients_are_those_of_the_dense_weight(chosen, in_scale):
    layer = layer_of(chosen, in_scale)
    start = K.moving(layer)
    names = [f"codebook.{b}" for b in TABLES] + [f"trellis.{w}" for w in TRELLISES]
    names += ["lora_a", "lora_b"] if layer.spec.rank else []
    assert set(start) == {*names, *(f"row_scale.{w}" for w in layer.spec.counts)}
    moved = changed(start)
    ours = {n: t.clone().requires_grad_() for n, t in moved.items()}
    theirs = {n: t.clone().requires_grad_() for n, t in rounded(layer, moved).items()}
    x, y = (inputs().requires_grad_() for _ in range(2))
    got, want = K.product(x, layer, ours), y @ dense(layer, theirs).T
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
    got.backward(probe)
    want.backward(probe)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen", [DENSE, *OPTIONS[::3]], ids=options_id)
def test_unmoved_it_is_the_weight_that_is_stored(chosen):
    layer = layer_of(chosen)
    identity = torch.eye(COLS)
    w = K.product(identity, layer, {}).T
    q = unpack(layer)
    want = dequantize(q)
    if q.adapter is not None:
        a, b = q.adapter.values()
        want = want + b.T @ a
        torch.testing.assert_close(w, want, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(w, want)
    moving = K.moving(layer)
    assert bool(moving) == (chosen["group"] is None or chosen["rank"] > 0)
    assert all(n.startswith("lora") for n in moving if chosen["group"] is not None)
    assert torch.equal(K.product(identity, layer, moving).T, w)


def test_the_native_bfloat16_path_sums_what_the_codes_share(isa):
    layer = layer_of(DENSE)
    books = {n: t.requires_grad_() for n, t in K.moving(layer).items()}
    x = inputs().bfloat16().requires_grad_()
    got = K.product(x, layer, books)
    w = dense(layer, {n: t.detach() for n, t in books.items()}).bfloat16()
    assert torch.equal(got, x.detach() @ w.T)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got.backward(probe)
    assert torch.equal(x.grad, probe @ w)
    full = (probe.flatten(0, 1).T @ x.detach().flatten(0, 1)).double()
    q = unpack(layer)
    for b in TABLES:
        index = (q.widths == b).nonzero().flatten()
        want = torch.zeros(len(index), 2**b, dtype=torch.float64)
        want.scatter_add_(1, q.codes[index].long(), full[index])
        want *= q.row_scale[index].double()[:, None]  # a level counts by its row's scale
        got = books[f"codebook.{b}"].grad.double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chosen", KINDS[::4], ids=options_id)
def test_what_is_stored_is_what_was_computed_with_and_all_else_as_it_was(chosen):
    layer = layer_of(chosen)
    moved = changed(K.moving(layer))
    made = K.stored(layer, moved)
    assert made.spec == layer.spec
    before, after = unpack(layer), unpack(made)
    assert torch.equal(before.codes, after.codes) and torch.equal(before.widths, after.widths)
    got, want = K.moving(made), rounded(layer, moved)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    same = K.stored(layer, {})
    assert all(torch.equal(t, same.tensors[n]) for n, t in layer.tensors.items())
    assert dataclasses.replace(layer.spec) == same.spec
