"""Low-rank adapters against singular value decompositions."""

import pytest
import torch

from skimlm.errors import SkimError
from skimlm.format.pack import factor_values as values
from skimlm.quantize import lowrank
from skimlm.quantize.lowrank import low_rank, nibbles, quantized, rank_of


def matrix(r, c, seed=0):
    return torch.randn(r, c, generator=torch.Generator().manual_seed(seed))


def gram(c, seed=1):
    x = matrix(3 * c, c, seed) @ (matrix(c, c, seed + 1) * 0.3 + torch.eye(c))
    return x.T @ x


def lost(e, ab, root):
    """||(E - B^T A) root||_F."""
    a, b = ab
    return float(((e - b.T @ a).double() @ root.double()).norm())


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_every_weighting_loses_just_the_discarded_singular_values(shape, k):
    e, c = matrix(*shape), shape[1]
    h = gram(c)
    squares = matrix(1, c, 5)[0].square()
    for weighting, root in (
        (None, torch.eye(c)),
        (squares, squares.sqrt().diag()),
        (h, torch.linalg.cholesky(h)),
    ):
        discarded = torch.linalg.svdvals(e.double() @ root.double())[k:]
        got = lost(e, low_rank(e, k, weighting), root)
        assert got == pytest.approx(float(discarded.norm()), rel=1e-4, abs=1e-3)


def test_constant_inputs_make_slim_lora_naive_lora():
    e = matrix(12, 16)
    plain, weighted = low_rank(e, 4), low_rank(e, 4, torch.full((16,), 3.0))
    torch.testing.assert_close(plain[1].T @ plain[0], weighted[1].T @ weighted[0])


def test_the_more_is_known_of_the_inputs_the_less_is_lost():
    e, h = matrix(24, 24), gram(24)
    root = torch.linalg.cholesky(h)
    none = float((e @ root).norm())
    naive, diag, full = (lost(e, low_rank(e, 6, w), root) for w in (None, h.diagonal(), h))
    assert full < diag < none and full < naive < none


def test_more_rank_never_loses_more():
    e, h = matrix(16, 16), gram(16)
    root = torch.linalg.cholesky(h)
    losses = [lost(e, low_rank(e, k, h), root) for k in (0, 2, 5, 11, 16)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-3 * losses[0]


def test_subspace_iteration_loses_hardly_more_and_is_seeded(monkeypatch):
    e, h = matrix(60, 90) @ torch.diag(torch.linspace(3, 0.1, 90)), gram(90)
    root = torch.linalg.cholesky(h)
    exact = lost(e, low_rank(e, 10, h), root)
    monkeypatch.setattr(lowrank, "EXACT", 1)
    again = low_rank(e, 10, h)
    assert lost(e, again, root) <= 1.01 * exact
    assert torch.equal(again[0], low_rank(e, 10, h)[0])
    warm = low_rank(e, 10, h, start=again[1])
    assert lost(e, warm, root) <= 1.002 * exact


def test_dead_inputs_and_zero_matrices_are_finite():
    e, h = matrix(8, 8), gram(8)
    h[2], h[:, 2] = 0, 0
    for weighting in (h, h.diagonal(), torch.zeros(8), torch.zeros(8, 8)):
        a, b = low_rank(e, 3, weighting)
        assert a.isfinite().all() and b.isfinite().all()
        assert (b @ b.T - torch.eye(3)).abs().max() < 1e-4
    adapter = quantized(torch.zeros(8, 8), *low_rank(torch.zeros(8, 8), 3, h), 4, h)
    a, b = adapter.values()
    assert not (b.T @ a).any()


@pytest.mark.parametrize(
    ("ratio", "shape", "want"),
    [(0, (576, 576), 0), (0.1, (576, 1536), 64), (0.1, (4096, 4096), 416), (0.01, (64, 64), 0)]
    + [(1, (20, 30), 20), (0.5, (192, 576), 96)],
)
def test_ranks_are_rounded_up_to_sixteens(ratio, shape, want):
    assert rank_of(ratio, *shape) == want


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_rank_above_the_smaller_side_is_refused(ratio):
    with pytest.raises(SkimError, match="rank must be 0"):
        rank_of(ratio, 8, 8)


def test_a_nibble_is_within_half_a_step_of_what_it_stands_for():
    x = matrix(3, 300)
    codes, scale = nibbles(x)
    assert codes.dtype == torch.int8 and scale.shape == (3, 3)
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    d = (values(codes, scale) - x).abs()
    plain = x.abs().view(3, 3, 100).amax(-1).max() / 7  # the step that clips nothing
    assert float(d.square().mean().sqrt()) < float(plain) / 12**0.5


def test_a_rounded_adapter_is_nearly_as_good_and_better_than_rounding_its_factors():
    e, h = matrix(96, 160) @ torch.diag(torch.linspace(4, 0.1, 160)), gram(160)
    root = torch.linalg.cholesky(h)
    a, b = low_rank(e, 16, h)
    exact = lost(e, (a, b), root)
    adapter = quantized(e, a, b, 4, h)
    once = (values(*nibbles(a)), values(*nibbles(b)))
    fitted = lost(e, adapter.values(), root)
    assert exact <= fitted < 1.1 * exact
    assert fitted < lost(e, once, root)


def test_sixteen_bits_are_bfloat16():
    e = matrix(8, 12)
    adapter = quantized(e, *low_rank(e, 2), 16)
    assert adapter.a.dtype == adapter.b.dtype == torch.bfloat16 and adapter.a_scale is None
