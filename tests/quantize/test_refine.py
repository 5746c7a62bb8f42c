"""Refinement against one-at-a-time float64 versions, enumeration, and least squares by QR."""

import itertools

import numpy as np
import pytest
import torch

from skimlm.quantize.refine import (
    PRUNED,
    codebook_step,
    codebook_step_reference,
    coordinate_descent,
    coordinate_descent_reference,
    damped,
    dense,
    refine,
    row_errors,
    sparse_dense,
    sparse_descent,
    sparse_descent_reference,
)


def integers(seed: int, r: int = 6, c: int = 11, k: int = 8):
    """A problem in small integers, H with diagonal 64: float32 computes it without any rounding."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randint(-4, 5, (c, c), generator=g)
    h = (h + h.T).float().fill_diagonal_(64)
    w = torch.randint(-12, 13, (r, c), generator=g).float()
    sizes = torch.randint(1, k + 1, (r,), generator=g).int()
    entries = [torch.randperm(21, generator=g)[:k] - 10 for _ in range(r)]
    codebook = torch.stack(entries).float().sort(1).values
    codes = (torch.rand(r, c, generator=g) * sizes[:, None]).to(torch.uint8)
    return w, h, codebook, sizes, codes


def realistic(seed: int, r: int = 8, c: int = 40, k: int = 32, tokens: int = 120):
    """Correlated inputs, mixed sizes, k-means-like start."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, c, generator=g) @ torch.randn(c, c, generator=g)
    w = torch.randn(r, c, generator=g)
    sizes = 2 ** torch.randint(0, k.bit_length(), (r,), generator=g).int()
    codebook = torch.randn(r, k, generator=g).sort(1).values
    for i, n in enumerate(sizes.tolist()):
        codebook[i, :n] = (
            codebook[i, :n].clone() if n == k else torch.randn(n, generator=g).sort().values
        )
        codebook[i, n:] = codebook[i, n - 1]
    codes = (torch.rand(r, c, generator=g) * sizes[:, None]).to(torch.uint8)
    return w, damped(x.T @ x), codebook, sizes, codes


def exact_errors(w, h, codebook, codes) -> np.ndarray:
    """(w_hat - w) H (w_hat - w) of every row, one loop per row, float64."""
    w, h = w.double().numpy(), h.double().numpy()
    values = np.take_along_axis(codebook.double().numpy(), codes.long().numpy(), 1)
    return np.array([(values[i] - w[i]) @ h @ (values[i] - w[i]) for i in range(len(w))])


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_descent_makes_the_moves_of_the_reference(isa_or_none, seed, sweeps):
    problem = integers(seed)
    before = problem[4].clone()
    codes = coordinate_descent(*problem, sweeps)
    assert torch.equal(codes, coordinate_descent_reference(*problem, sweeps))
    assert torch.equal(problem[4], before)  # the start is left alone


@pytest.mark.parametrize("columns", [64, 150, 192])
def test_many_rows_and_columns_go_through_tiles_of_h(isa_or_none, columns):
    """64 columns at a time; where few codes change H is read as it stands, else copied."""
    for rows in (3, 40):
        w, h, codebook, sizes, codes = integers(columns, r=rows, c=columns)
        got = coordinate_descent(w, h, codebook, sizes, codes, 2)
        assert torch.equal(got, coordinate_descent_reference(w, h, codebook, sizes, codes, 2))
        assert (got != codes).sum() > (64 if rows > 3 else 0)


@pytest.mark.parametrize("columns", [40, 64, 150])
def test_the_gradient_follows_every_step(isa_or_none, columns):
    """With it, and with the columns in tiles, the solution stays that of one-hot matrices."""
    w, h, codebook, sizes, codes = realistic(3, r=9, c=columns, tokens=3 * columns)
    gradient = ((dense(codes, codebook) - w) @ h).contiguous()
    got, renamed = codebook_step(w, h, codebook, sizes, codes, gradient=gradient)
    again = codebook_step(w, h, codebook, sizes, codes)
    assert torch.equal(got, again[0]) and torch.equal(renamed, again[1])
    reference = codebook_step_reference(w, h, codebook, sizes, codes)
    np.testing.assert_allclose(
        exact_errors(w, h, got, renamed), exact_errors(w, h, reference, codes), rtol=1e-4
    )
    want = (dense(renamed, got) - w).double() @ h.double()
    scale = float(want.abs().max())
    np.testing.assert_allclose(gradient.numpy(), want.numpy(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("seed", range(3))
def test_descent_agrees_with_the_reference_where_numbers_round(isa_or_none, seed):
    problem = realistic(seed)
    codes, want = coordinate_descent(*problem, 2), coordinate_descent_reference(*problem, 2)
    w, h, codebook = problem[:3]
    got, least = exact_errors(w, h, codebook, codes), exact_errors(w, h, codebook, want)
    np.testing.assert_allclose(got, least, rtol=1e-4)
    assert (codes != want).float().mean() < 0.01


def one_by_one(w, h, entries, codes, sweeps: int) -> list[int]:
    """Cyclic descent by trying every entry and computing the whole error afresh; float64."""
    codes = list(codes)
    for _ in range(sweeps):
        for j in range(len(codes)):
            if h[j, j] <= 0:
                continue
            errors = []
            for m in range(len(entries)):
                d = entries[[*codes[:j], m, *codes[j + 1 :]]] - w
                errors.append(d @ h @ d)
            if min(errors) < errors[codes[j]]:
                codes[j] = int(np.argmin(errors))
    return codes


@pytest.mark.parametrize("seed", range(4))
def test_descent_is_trying_every_entry_in_turn(isa_or_none, seed):
    w, h, codebook, sizes, codes = integers(seed, r=4, c=8, k=5)
    got = coordinate_descent(w, h, codebook, sizes, codes, 2)
    for i, n in enumerate(sizes.tolist()):
        entries = codebook[i, :n].double().numpy()
        want = one_by_one(w[i].double().numpy(), h.double().numpy(), entries, codes[i].tolist(), 2)
        assert entries[got[i].tolist()].tolist() == entries[want].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_descent_ends_where_no_single_change_pays(isa_or_none, seed):
    w, h, codebook, sizes, codes = integers(seed)
    codes = coordinate_descent(w, h, codebook, sizes, codes, 50)
    least = exact_errors(w, h, codebook, codes)
    for j in range(w.shape[1]):
        for m in range(codebook.shape[1]):
            other = codes.clone()
            other[:, j] = torch.minimum(torch.tensor(m), sizes - 1)
            assert (exact_errors(w, h, codebook, other) >= least).all()


@pytest.mark.parametrize("seed", range(3))
def test_descent_never_leaves_the_best_codes_of_all(isa_or_none, seed):
    w, h, codebook, sizes, codes = integers(seed, r=3, c=6, k=3)
    every = torch.tensor(list(itertools.product(range(3), repeat=6)), dtype=torch.uint8)
    for i, n in enumerate(sizes.tolist()):
        able = every[(every < n).all(1)]
        many = codebook[i].expand(len(able), -1)
        errors = exact_errors(w[i].expand(len(able), -1), h, many, able)
        best = able[int(errors.argmin())][None]
        row = (w[i : i + 1], h, codebook[i : i + 1], sizes[i : i + 1])
        assert torch.equal(coordinate_descent(*row, best, 3), best)
        found = coordinate_descent(*row, codes[i : i + 1], 20)
        assert exact_errors(row[0], h, row[2], found)[0] >= errors.min()


@pytest.mark.parametrize("seed", range(4))
def test_no_step_raises_the_error_of_any_row(isa_or_none, seed):
    w, h, codebook, sizes, codes = realistic(seed, tokens=25)  # fewer tokens than channels
    last = exact_errors(w, h, codebook, codes)
    start = last
    for _ in range(4):
        codes = coordinate_descent(w, h, codebook, sizes, codes, 1)
        middle = exact_errors(w, h, codebook, codes)
        codebook, codes = codebook_step(w, h, codebook, sizes, codes)
        end = exact_errors(w, h, codebook, codes)
        assert (middle <= last * (1 + 1e-6)).all() and (end <= middle * (1 + 1e-6)).all()
        last = end
    assert (last < start).all()
    np.testing.assert_allclose(
        row_errors(w, dense(codes, codebook), h).numpy(), last, rtol=1e-3, atol=1e-3
    )


def test_refine_is_its_steps_in_a_row():
    w, h, codebook, sizes, codes = realistic(5)
    got = refine(w, h, codebook, sizes, codes, 2, 3)
    for _ in range(2):
        codes = coordinate_descent(w, h, codebook, sizes, codes, 3)
        codebook, codes = codebook_step(w, h, codebook, sizes, codes)
    codes = coordinate_descent(w, h, codebook, sizes, codes, 3)
    # the gradient is carried along there, here it is computed anew
    want = exact_errors(w, h, codebook, codes)
    np.testing.assert_allclose(exact_errors(w, h, got[0], got[1]), want, rtol=1e-4)


def least_squares(w, h, entries, codes, ridge: float) -> np.ndarray:
    """The same minimum by QR: rows of the factor of H, and one row per entry for the ridge."""
    n = len(entries)
    p = np.eye(n)[codes]
    factor = np.linalg.cholesky(h).T
    used = p.sum(0) > 0
    pull = np.sqrt(np.where(used, ridge * np.trace(p.T @ h @ p) / n, 1.0))
    a = np.concatenate([factor @ p, np.diag(pull)])
    return np.linalg.lstsq(a, np.concatenate([factor @ w, pull * entries]), rcond=None)[0]


@pytest.mark.parametrize("ridge", [1e-7, 0.03])
@pytest.mark.parametrize("seed", range(3))
def test_codebooks_are_the_least_squares_solution(isa_or_none, seed, ridge):
    w, h, codebook, sizes, codes = realistic(seed)
    got, renamed = codebook_step(w, h, codebook, sizes, codes, ridge)
    reference = codebook_step_reference(w, h, codebook, sizes, codes, ridge)
    for i, n in enumerate(sizes.tolist()):
        want = least_squares(
            w[i].double().numpy(),
            h.double().numpy(),
            codebook[i, :n].double().numpy(),
            codes[i].long().numpy(),
            ridge,
        )
        np.testing.assert_allclose(reference[i, :n].numpy(), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got[i, :n].numpy(), np.sort(want), rtol=2e-3, atol=2e-3)
        # every weight keeps its entry under the entry's new name
        values = got[i][renamed[i].long()].numpy()
        np.testing.assert_allclose(values, want[codes[i].long().numpy()], rtol=2e-3, atol=2e-3)
        assert (got[i, :n].diff() >= 0).all()
        assert torch.equal(got[i, n:], codebook[i, n:])
    least = exact_errors(w, h, reference, codes)
    np.testing.assert_allclose(exact_errors(w, h, got, renamed), least, rtol=1e-4)


def test_entries_that_cross_are_renamed():
    """The first entry must become the larger one: w asks for it."""
    w = torch.tensor([[5.0, 5, -5, -5, 1]])
    codes = torch.tensor([[0, 0, 1, 1, 2]], dtype=torch.uint8)
    codebook, sizes = torch.tensor([[-1.0, 0, 1]]), torch.tensor([3], dtype=torch.int32)
    got, renamed = codebook_step(w, torch.eye(5), codebook, sizes, codes)
    torch.testing.assert_close(got, torch.tensor([[-5.0, 1, 5]]), atol=1e-5, rtol=0)
    assert renamed.tolist() == [[2, 2, 0, 0, 1]]


def test_unused_entries_keep_their_value(isa_or_none):
    w, h, codebook, sizes, codes = realistic(1, k=8)
    sizes[:] = 8
    codes = codes % 3 * 2  # entries 0, 2, 4 only
    got, renamed = codebook_step(w, h, codebook, sizes, codes)
    for i in range(len(w)):
        for m in (1, 3, 5, 6, 7):
            assert (got[i] - codebook[i, m]).abs().min() <= 1e-6
        assert len(set(renamed[i].tolist())) == len(set(codes[i].tolist()))


@pytest.mark.parametrize("power", [-80, -40, 40, 60, 80])
def test_the_size_of_h_does_not_matter(isa_or_none, power):
    """Sums over tokens are anything from 1e-12 (end loss) to 1e12 (outlier channels)."""
    w, h, codebook, sizes, codes = realistic(2, k=8)
    sizes[:] = 8
    codes = (codes % 3 * 2).to(torch.uint8)  # some entries are unused
    big = h * 2.0**power
    step = codebook_step(w, h, codebook, sizes, codes)
    again = codebook_step(w, big, codebook, sizes, codes)
    assert torch.equal(step[1], again[1])
    torch.testing.assert_close(step[0], again[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(
        coordinate_descent(w, h, codebook, sizes, codes, 2),
        coordinate_descent(w, big, codebook, sizes, codes, 2),
    )


def test_dead_channels_keep_their_codes(isa_or_none):
    w, h, codebook, sizes, codes = integers(2)
    h[4], h[:, 4] = 0, 0
    sizes[:] = 8
    codes[:, 4] = 7
    assert (coordinate_descent(w, h, codebook, sizes, codes, 3)[:, 4] == 7).all()
    codes[codes == 7] = 6
    codes[:, 4] = 7  # entry 7 serves dead channels only
    got, renamed = codebook_step(w, h, codebook, sizes, codes)
    for i in range(len(w)):
        assert float(got[i, int(renamed[i, 4])]) == pytest.approx(float(codebook[i, 7]), abs=1e-5)
    dead = torch.zeros_like(h)
    assert torch.equal(coordinate_descent(w, dead, codebook, sizes, codes, 3), codes)
    same, names = codebook_step(w, dead, codebook, sizes, codes)
    assert torch.equal(same, codebook) and torch.equal(names, codes)


def test_full_codebooks_of_32_and_single_entries(isa_or_none):
    w, h, codebook, sizes, codes = realistic(7, r=3, c=70)
    for n in (1, 32):
        sizes[:] = n
        codes = (torch.arange(70) % n).to(torch.uint8).expand(3, -1).contiguous()
        want = coordinate_descent_reference(w, h, codebook, sizes, codes, 1)
        got = coordinate_descent(w, h, codebook, sizes, codes, 1)
        np.testing.assert_allclose(
            exact_errors(w, h, codebook, got), exact_errors(w, h, codebook, want), rtol=1e-4
        )
        assert (got < n).all()


def test_threads_do_not_change_a_bit(isa_or_none):
    w, h, codebook, sizes, codes = realistic(8, r=30)
    one = refine(w, h, codebook, sizes, codes, 2, 2)
    try:
        torch.set_num_threads(3)
        many = refine(w, h, codebook, sizes, codes, 2, 2)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])


def test_damping_shrinks_and_makes_definite():
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    h = x.T @ x
    got = damped(h + 1e-3 * torch.rand(20, 20), shrink=0.3, damp=0.01)
    assert torch.equal(got, got.T) and got.is_contiguous()
    assert torch.linalg.eigvalsh(got.double()).min() > 0
    got = damped(h, shrink=0.3, damp=0.01)
    want = 0.7 * h + 0.3 * h.diagonal().diag() + 0.01 * h.diagonal().mean() * torch.eye(20)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(damped(h, 0, 0), h, rtol=1e-6, atol=1e-6)


def changed(problem, **changes):
    names = ("w", "h", "codebook", "sizes", "codes")
    return [changes.get(n, value) for n, value in zip(names, problem, strict=True)]


W, H, CODEBOOK, SIZES, CODES = integers(0)
BAD = [
    ({"w": W.double()}, "w must be torch.float32"),
    ({"h": H[:-1]}, "h must be torch.float32"),
    ({"h": H.half()}, "h must be torch.float32"),
    ({"codebook": CODEBOOK[:-1]}, "codebook must be"),
    ({"sizes": SIZES.long()}, "sizes must be torch.int32"),
    ({"sizes": torch.zeros_like(SIZES)}, "codebooks have 1..8 entries"),
    ({"sizes": torch.full_like(SIZES, 9)}, "codebooks have 1..8 entries"),
    ({"codes": CODES.int()}, "codes must be torch.uint8"),
    ({"codes": torch.full_like(CODES, 8)}, "past the end"),
    ({"codebook": CODEBOOK.repeat(1, 5)}, "codebooks have 1..32 entries"),
    ({"w": W.T.contiguous().T}, "contiguous"),
    ({"h": torch.zeros(11, 22)[:, ::2]}, "contiguous"),
]


@pytest.mark.parametrize("changes, match", BAD, ids=[match for _, match in BAD])
def test_bad_input_is_a_value_error(changes, match):
    problem = changed((W, H, CODEBOOK, SIZES, CODES), **changes)
    with pytest.raises(ValueError, match=match):
        codebook_step(*problem)
    if "w" not in changes or match != "contiguous":  # descent never passes w on
        with pytest.raises(ValueError, match=match):
            coordinate_descent(*problem, 1)


def test_a_ridge_of_zero_may_be_an_integer():
    problem = realistic(0, k=2)
    zero, number = codebook_step(*problem, ridge=0), codebook_step(*problem, ridge=0.0)
    assert torch.equal(zero[0], number[0]) and torch.equal(zero[1], number[1])


# ---- sparse rows


def sparse_case(r, c, kind, seed=0, dead=False):
    """w, h, codebook, sizes, scale, group, codes of a row with every second weight pruned."""

    def random(shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    x = random((3 * c, c), seed + 1) @ (random((c, c), seed + 7) * 0.2 + torch.eye(c))
    w, h = random((r, c), seed), x.T @ x
    if dead:
        h[2], h[:, 2] = 0, 0
    if kind == "codebook":
        sizes = torch.tensor([(4, 16, 9)[i % 3] for i in range(r)], dtype=torch.int32)
        codebook = random((r, 16), seed + 2).sort(dim=1).values.contiguous()
        scale, group = torch.ones(r, 1), c
    else:
        sizes = torch.full((r,), 16, dtype=torch.int32)
        codebook = (torch.arange(16.0) - 8).repeat(r, 1)
        group = 8
        scale = random((r, -(-c // 8)), seed + 3).abs() * 0.2 + 0.05
    g = torch.Generator().manual_seed(seed)
    codes = (torch.rand(r, c, generator=g) * sizes[:, None]).to(torch.uint8)
    keep = torch.rand(r, c // 4, 4, generator=g).argsort(-1) < 2
    return w, h, codebook, sizes, scale, group, codes.masked_fill(~keep.view(r, c), PRUNED)


def loss(w, h, codebook, scale, group, codes):
    d = (sparse_dense(codes, codebook, scale, group) - w).double()
    return ((d @ h.double()) * d).sum(1)


@pytest.mark.parametrize("kind", ["codebook", "grid"])
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "fixed mask"])
def test_sparse_descent_is_its_readable_version(kind, pairs):
    w, h, codebook, sizes, scale, group, codes = sparse_case(6, 20, kind)
    for sweeps in (1, 3):
        args = (w, h, codebook, sizes, scale, group, codes, pairs, sweeps)
        assert torch.equal(sparse_descent(*args), sparse_descent_reference(*args))


@pytest.mark.parametrize("kind", ["codebook", "grid"])
def test_pairs_keep_two_of_four_and_never_raise_the_error(kind):
    w, h, codebook, sizes, scale, group, codes = sparse_case(33, 64, kind, seed=4)
    before = loss(w, h, codebook, scale, group, codes)
    for _ in range(4):
        codes = sparse_descent(w, h, codebook, sizes, scale, group, codes, True, 1)
        kept = (codes != PRUNED).view(33, 16, 4).sum(-1)
        assert (kept == 2).all()
        after = loss(w, h, codebook, scale, group, codes)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def test_where_h_is_diagonal_the_best_pair_of_every_four_is_found():
    w, _, codebook, sizes, scale, group, codes = sparse_case(8, 16, "codebook", seed=2)
    h = torch.diag(torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.1)
    codes = sparse_descent(w, h, codebook, sizes, scale, group, codes, True, 3)
    got = loss(w, h, codebook, scale, group, codes)
    for i in range(8):
        entries = codebook[i, : int(sizes[i])]
        total = 0.0
        for j in range(0, 16, 4):
            # what keeping a column saves, at its nearest entry
            nearest = [float((entries - w[i, j + p]).square().min()) for p in range(4)]
            costs = [float(h[j + p, j + p]) * float(w[i, j + p]) ** 2 for p in range(4)]
            left = [float(h[j + p, j + p]) * nearest[p] for p in range(4)]
            pairs = itertools.combinations(range(4), 2)
            total += min(sum(left[p] if p in s else costs[p] for p in range(4)) for s in pairs)
        assert float(got[i]) == pytest.approx(total, rel=1e-4)


def test_a_fixed_mask_stays_and_no_thread_count_changes_a_code():
    w, h, codebook, sizes, scale, group, codes = sparse_case(40, 64, "codebook", seed=6)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(sparse_descent(w, h, codebook, sizes, scale, group, codes, False, 2))
    assert torch.equal(*results)
    assert torch.equal(results[0] == PRUNED, codes == PRUNED)
    assert not torch.equal(results[0], codes)


def test_a_dead_input_is_left_alone_by_sparse_descent():
    w, h, codebook, sizes, scale, group, codes = sparse_case(5, 16, "codebook", dead=True)
    after = sparse_descent(w, h, codebook, sizes, scale, group, codes, True, 2)
    assert ((after != PRUNED).view(5, 4, 4).sum(-1) == 2).all()
    assert torch.equal(after[:, 2], codes[:, 2]) or (after != codes).any()


def test_the_codebook_step_of_sparse_rows_solves_for_the_kept_weights_only():
    w, h, codebook, sizes, _, _, codes = sparse_case(6, 24, "codebook", seed=9)
    book, renamed = codebook_step(w, h, codebook, sizes, codes)
    assert torch.equal(renamed == PRUNED, codes == PRUNED)
    ones = torch.ones(6, 1)
    got = loss(w, h, book, ones, 24, renamed)
    for i in range(6):
        n = int(sizes[i])
        one_hot = torch.zeros(24, n, dtype=torch.float64)
        kept = (codes[i] != PRUNED).nonzero().flatten()
        one_hot[kept, codes[i, kept].long()] = 1
        used = one_hot.sum(0) > 0
        p = one_hot[:, used]
        hd, wd = h.double(), w[i].double()
        best = torch.linalg.lstsq(p.T @ hd @ p, (p.T @ hd @ wd)[:, None]).solution[:, 0]
        d = p @ best - wd
        assert float(got[i]) == pytest.approx(float(d @ hd @ d), rel=1e-3)


def test_sparse_descent_refuses_pairs_of_a_width_that_four_does_not_divide():
    w, h, codebook, sizes, scale, group, codes = sparse_case(2, 20, "codebook")
    part = (w[:, :18].contiguous(), h[:18, :18].contiguous(), codebook, sizes, scale, 18)
    with pytest.raises(ValueError, match="multiple of 4"):
        sparse_descent(*part, codes[:, :18].contiguous(), True, 1)
