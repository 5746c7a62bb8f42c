"""Trellis rows against streams of bits read by hand, enumeration, and least squares by QR."""

import itertools

import numpy as np
import pytest
import torch

from skimlm.format.row_codes import WINDOWS, windows
from skimlm.quantize import trellis, trellis_fit
from skimlm.quantize.refine import damped
from skimlm.quantize.trellis import (
    descend,
    descend_reference,
    normal_reference,
    scale_step,
    table_step,
    values,
    viterbi,
    viterbi_reference,
)
from skimlm.quantize.trellis_fit import (
    curve,
    find_scales,
    fit,
    learn_table,
    start,
    start_table,
)


@pytest.fixture(params=[1, 2, 3, 4])
def bits(request):
    """Every width."""
    return request.param


def integers(seed: int, bits: int, r: int = 5, c: int = 30):
    """w, h, table, scale, codes in small integers: float32 computes with them without rounding."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randint(-3, 4, (c, c), generator=g)
    h = (h + h.T).float().fill_diagonal_(64)
    w = torch.randint(-12, 13, (r, c), generator=g).float()
    table = torch.randint(-9, 10, (WINDOWS,), generator=g).float()
    scale = torch.randint(1, 3, (r,), generator=g).float()
    return w, h, table, scale, symbols(g, bits, r, c)


def realistic(seed: int, bits: int, r: int = 20, c: int = 100):
    """w, h, table, scale, codes: correlated inputs, a table that suits the weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * c, c, generator=g) @ (torch.randn(c, c, generator=g) / 5 + torch.eye(c))
    w = torch.randn(r, c, generator=g)
    scale = torch.rand(r, generator=g) + 0.5
    return w, damped(x.T @ x), start_table(bits), scale, symbols(g, bits, r, c)


def symbols(g, bits: int, r: int, c: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (r, c), generator=g).to(torch.uint8)


def errors(w, h, table, scale, codes, bits) -> np.ndarray:
    """(w_hat - w) H (w_hat - w) of every row, float64."""
    d = values(codes, bits, table, scale).double().numpy() - w.double().numpy()
    return np.einsum("ij,jk,ik->i", d, h.double().numpy(), d)


def diagonal_errors(w, f, table, scale, codes, bits) -> np.ndarray:
    d = values(codes, bits, table, scale).double() - w.double()
    return (f.double() * d * d).sum(1).numpy()


def every(bits: int, c: int) -> torch.Tensor:
    """All rows of c symbols."""
    rows = itertools.product(range(1 << bits), repeat=c)
    return torch.tensor(list(rows), dtype=torch.uint8)


def test_values_are_levels_times_scales(bits):
    _, _, table, scale, codes = integers(1, bits)
    got = values(codes, bits, table, scale)
    for i, j in itertools.product(range(5), range(30)):
        assert got[i, j] == table[int(windows(codes, bits)[i, j])] * scale[i]


@pytest.mark.parametrize("seed", range(3))
def test_viterbi_finds_the_best_of_all_rows_of_symbols(isa_or_none, bits, seed):
    c = {1: 10, 2: 6, 3: 4, 4: 3}[bits]
    w, _, table, scale, _ = integers(seed, bits, r=20, c=c)
    f = torch.randint(0, 4, w.shape, generator=torch.Generator().manual_seed(seed)).float()
    got = diagonal_errors(w, f, table, scale, viterbi(w, f, table, scale, bits), bits)
    rows = every(bits, c)
    for i in range(20):
        many = [x[i : i + 1].expand(len(rows), *x.shape[1:]) for x in (w, f, scale)]
        assert got[i] == diagonal_errors(many[0], many[1], table, many[2], rows, bits).min()


def test_viterbi_agrees_with_the_reference_where_numbers_round(isa_or_none, bits):
    w, _, table, scale, _ = realistic(2, bits)
    f = torch.rand(w.shape, generator=torch.Generator().manual_seed(0))
    got, want = (find(w, f, table, scale, bits) for find in (viterbi, viterbi_reference))
    least = diagonal_errors(w, f, table, scale, want, bits)
    np.testing.assert_allclose(diagonal_errors(w, f, table, scale, got, bits), least, rtol=1e-5)


@pytest.mark.parametrize("columns", [5, 30, 63, 64, 150])
def test_descent_makes_the_choices_of_the_reference(isa_or_none, bits, columns):
    w, h, table, scale, codes = integers(columns, bits, c=columns)
    before = codes.clone()
    for sweeps in (1, 3):
        got = descend(w, h, table, scale, codes, bits, sweeps)
        want = descend_reference(w, h, table, scale, codes, bits, sweeps)
        assert torch.equal(got, want) and not torch.equal(got, codes)
    assert torch.equal(codes, before)  # the start is left alone


def test_a_matrix_in_the_streams_order_can_be_shared(isa_or_none, bits):
    w, h, table, scale, codes = integers(2, bits, r=300, c=30)
    order = [j for first in range(8) for j in range(first, 30, 8)]
    ordered = trellis.in_stream(h)
    assert all(ordered[i, j] == h[a, b] for i, a in enumerate(order) for j, b in enumerate(order))
    want = descend(w, h, table, scale, codes, bits, 1)
    assert torch.equal(descend(w, h, table, scale, codes, bits, 1, ordered), want)


def test_scales_do_not_need_an_exact_matrix(bits):
    w, h, table, scale, _ = realistic(5, bits)
    codes, scale = start(w, h.diagonal().expand(w.shape).contiguous(), table, scale, bits)
    exact, coarse = (scale_step(w, x, table, scale, codes, bits) for x in (h, h.bfloat16()))
    assert not torch.equal(exact, coarse)
    torch.testing.assert_close(coarse, exact, rtol=5e-3, atol=0)


def test_descent_never_raises_the_error_of_a_row(isa_or_none, bits):
    w, h, table, scale, codes = realistic(3, bits)
    before = errors(w, h, table, scale, codes, bits)
    for _ in range(4):
        codes = descend(w, h, table, scale, codes, bits, 1)
        after = errors(w, h, table, scale, codes, bits)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def test_where_h_is_diagonal_a_run_over_the_whole_row_is_the_best_of_all(isa_or_none, bits):
    c = {1: 10, 2: 6, 3: 4, 4: 3}[bits]
    w, _, table, scale, codes = integers(4, bits, r=12, c=c)
    h = torch.randint(1, 5, (c,), generator=torch.Generator().manual_seed(0)).float().diag()
    got = errors(w, h, table, scale, descend(w, h, table, scale, codes, bits, 1), bits)
    rows = every(bits, c)
    for i in range(12):
        many = [x[i : i + 1].expand(len(rows), *x.shape[1:]) for x in (w, scale)]
        assert got[i] == errors(many[0], h, table, many[1], rows, bits).min()


def test_symbols_around_a_run_stay(bits):
    w, h, table, scale, codes = integers(5, bits)
    begin, end = 8, 8 + trellis.RUN
    level = table.double() * scale.double().unsqueeze(1)
    got = trellis._best_run(w.double(), h.double(), level, codes, bits, begin)
    assert torch.equal(got[:, :begin], codes[:, :begin])
    assert torch.equal(got[:, end:], codes[:, end:])
    assert not torch.equal(got, codes)


def test_threads_do_not_change_a_bit(isa_or_none, bits):
    w, h, table, scale, codes = realistic(6, bits, r=150, c=70)
    f, weight = torch.rand(w.shape), torch.rand(150)

    def everything():
        return (
            viterbi(w, f, table, scale, bits),
            descend(w, h, table, scale, codes, bits, 2),
            table_step(w, h, weight, table, scale, codes, bits),
        )

    one = everything()
    try:
        torch.set_num_threads(3)
        many = everything()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])
    torch.testing.assert_close(one[2], many[2], rtol=1e-5, atol=1e-5)  # torch's products differ


def test_the_normal_equations_are_those_of_one_hot_matrices(isa, bits):
    _, h, _, scale, codes = integers(7, bits, r=70, c=90)  # more than one block of rows
    got = trellis._normal(h, codes, scale, bits)
    assert torch.equal(got, normal_reference(h, codes, scale, bits))


def test_scales_and_tables_are_least_squares_solutions(isa_or_none, bits):
    w, h, table, scale, codes = realistic(8, bits, r=12, c=60)
    weight = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1
    factor = np.linalg.cholesky(h.double().numpy()).T
    level = table[windows(codes, bits).long()].double().numpy()
    got = scale_step(w, h, table, scale, codes, bits)
    for i in range(12):
        a = (factor @ level[i])[:, None]
        want = np.linalg.lstsq(a, factor @ w[i].double().numpy(), rcond=None)[0]
        assert float(got[i]) == pytest.approx(want[0], rel=1e-4)
    hot = np.eye(WINDOWS)[windows(codes, bits).long().numpy()]
    root = np.sqrt(weight.double().numpy())
    a = np.concatenate([root[i] * float(scale[i]) * factor @ hot[i] for i in range(12)])
    b = np.concatenate([root[i] * factor @ w[i].double().numpy() for i in range(12)])
    best = np.square(a @ np.linalg.lstsq(a, b, rcond=None)[0] - b).sum()
    new = table_step(w, h, weight, table, scale, codes, bits)
    least = (errors(w, h, new, scale, codes, bits) * weight.double().numpy()).sum()
    assert best <= least * (1 + 1e-6) and least <= best * (1 + 1e-3)
    unused = torch.ones(WINDOWS, dtype=torch.bool)
    unused[windows(codes, bits).long().flatten()] = False
    torch.testing.assert_close(new[unused], table[unused])


def test_rows_of_zeros_and_dead_inputs_are_ordinary(isa_or_none, bits):
    w, h, table, scale, codes = realistic(9, bits)
    w[3], w[:, 7] = 0, 0
    h[5], h[:, 5] = 0, 0
    f = torch.rand(w.shape)
    f[4] = 0
    start_at = learn_table(w, f, bits)
    size = find_scales(w, f, start_at, bits)
    rows = fit(w, f, h, torch.ones(len(w)), start_at, size, bits)
    assert torch.isfinite(rows.scale.float()).all() and torch.isfinite(start_at).all()
    dead = torch.zeros_like(h)
    assert torch.equal(descend(w, dead, table, scale, codes, bits, 2), codes)
    assert torch.equal(scale_step(w, dead, table, scale, codes, bits), scale)
    assert torch.equal(table_step(w, dead, scale, table, scale, codes, bits), table)


def test_a_fit_ends_on_what_is_stored_and_below_its_start(isa_or_none, bits):
    w, h, *_ = realistic(10, bits, r=40)
    f, weight = torch.rand(w.shape) * h.diagonal(), torch.rand(40) + 0.5
    table = learn_table(w, f, bits)
    size = find_scales(w, f, table, bits)
    codes, scale = start(w, f, table, size, bits)
    before = (errors(w, h, table, scale, codes, bits) * weight.numpy()).sum()
    rows = fit(w, f, h, weight, table, size, bits)
    assert rows.table.dtype == torch.int8 and int(rows.table.abs().max()) == 127
    assert rows.scale.dtype == torch.bfloat16 and rows.codes.dtype == torch.uint8
    stored = errors(w, h, rows.table.float(), rows.scale.float(), rows.codes, bits)
    assert (stored * weight.numpy()).sum() < 0.8 * before


def test_no_row_starts_worse_than_from_any_of_a_few_scales(bits):
    """Some rows have a sensitive weight far out."""
    g = torch.Generator().manual_seed(12)
    w, f = torch.randn(12, 200, generator=g), torch.ones(12, 200)
    w[::2, 50], f[::2, 50] = 9, 1e3
    table = start_table(bits)
    codes, scale = start(w, f, table, find_scales(w, f, table, bits), bits)
    got = diagonal_errors(w, f, table, scale, codes, bits)
    for factor in trellis_fit.SCALES:
        codes = viterbi(w, f, table, w.square().mean(1).sqrt() * factor, bits)
        level = table[windows(codes, bits).int()]
        scale = (f * level * w).sum(1) / (f * level * level).sum(1)
        assert (got <= diagonal_errors(w, f, table, scale, codes, bits) * (1 + 1e-5)).all()


def test_the_curve_is_the_error_of_the_start(bits):
    w, h, *_ = realistic(11, bits)
    f = torch.rand(w.shape)
    table, size, got = curve(w, f, None, bits)
    assert torch.equal(size, find_scales(w, f, table, bits))
    codes, scale = start(w, f, table, size, bits)
    want = diagonal_errors(w, f, table, scale, codes, bits)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4)
    full = curve(w, f, h, bits)[2]
    want = errors(w, h, table, scale, codes, bits)
    np.testing.assert_allclose(full.numpy(), want, rtol=3e-2)  # bfloat16 products


def test_normal_weights_lose_less_than_the_best_quantizer_of_each_alone():
    """Gaussian source, error over that of Lloyd and Max: 0.83, 0.74, 0.68, 0.70 to the end."""
    w = torch.randn(64, 600, generator=torch.Generator().manual_seed(0))
    f = torch.ones_like(w)
    alone = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
    for bits, most in {1: 0.9, 2: 0.82, 3: 0.8, 4: 0.8}.items():
        assert float(curve(w, f, None, bits)[2].mean()) / 600 < most * alone[bits]


W, H, TABLE, SCALE, CODES = integers(0, 3)
BAD = [
    (dict(w=W.double()), "w must be torch.float32"),
    (dict(h=H[:-1]), "h must be torch.float32"),
    (dict(table=TABLE[:-1]), "table must be"),
    (dict(scale=SCALE.double()), "scale must be"),
    (dict(codes=CODES.int()), "codes must be torch.uint8"),
    (dict(bits=6), "trellis rows have 1..4 bits, got 6"),
]


@pytest.mark.parametrize("changes, match", BAD, ids=[match for _, match in BAD])
def test_bad_input_is_a_value_error(changes, match):
    good = dict(w=W, h=H, table=TABLE, scale=SCALE, codes=CODES, bits=3, sweeps=1)
    with pytest.raises(ValueError, match=match):
        descend(**(good | changes))


def test_a_symbol_of_more_bits_than_its_row_is_an_error():
    w, h, table, scale, codes = realistic(13, 2)
    codes[3, 5] = 4
    with pytest.raises(ValueError, match="a symbol of 2 bits is below 4, got 4"):
        descend(w, h, table, scale, codes, 2, 1)
