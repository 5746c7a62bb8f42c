"""The closed-form scaling vector against gradient training of the same objective."""

import pytest
import torch

from skimlm.quantize.scale import normalise, scale_step, scaled_error


def problem(seed: int = 0, rows=(9,), c: int = 12):
    """Weights, coarse versions of them, Gram matrices and row weights of linears of one input."""
    g = torch.Generator().manual_seed(seed)
    w, v, h, rho = [], [], [], []
    for r in rows:
        w.append(torch.randn(r, c, generator=g))
        v.append((w[-1] * 1.5).round() / 1.5 * (0.7 + 0.6 * torch.rand(c, generator=g)))
        x = torch.randn(4 * c, c, generator=g) * (0.5 + torch.rand(c, generator=g))
        h.append(x.T @ x)
        rho.append(0.1 + torch.rand(r, generator=g))
    return w, v, h, rho


def objective(w, v, h, rho, s) -> torch.Tensor:
    """Sum over linears and rows, one row at a time, in float64."""
    loss = torch.zeros((), dtype=torch.float64)
    for w_, v_, h_, rho_ in zip(w, v, h, rho, strict=True):
        for i in range(len(w_)):
            d = v_[i].double() * s - w_[i].double()
            loss = loss + rho_[i].double() * (d @ h_.double() @ d)
    return loss


def penalty(v, h, rho, s, start, ridge: float) -> torch.Tensor:
    """The ridge: the curvature of each channel times its squared distance from the start."""
    curvature = sum(
        h_.diagonal().double() * (rho_[:, None] * v_**2).sum(0).double()
        for v_, h_, rho_ in zip(v, h, rho, strict=True)
    )
    return ridge * (curvature * (s - start) ** 2).sum()


def trained(loss, start, method: str) -> torch.Tensor:
    """The paper's way: follow the gradient of the error with respect to s."""
    s = start.double().clone().requires_grad_()
    if method == "adam":
        optimizer = torch.optim.Adam([s], lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
        for _ in range(250):
            optimizer.zero_grad()
            loss(s).backward()
            optimizer.step()
            schedule.step()
    else:
        optimizer = torch.optim.LBFGS(
            [s], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12
        )

        def closure():
            optimizer.zero_grad()
            value = loss(s)
            value.backward()
            return value

        optimizer.step(closure)
    return s.detach()


@pytest.mark.parametrize(
    "method, rows, ridge",
    [("adam", (5, 3, 2), 1e-2)]
    + [("lbfgs", rows, ridge) for rows in ((9,), (5, 3, 2)) for ridge in (0.0, 1e-2, 0.5)],
)
def test_gradient_training_never_finds_a_better_vector(method, rows, ridge):
    w, v, h, rho = problem(rows=rows)
    start = torch.ones(12) * 0.9

    def loss(s):
        return objective(w, v, h, rho, s) + penalty(v, h, rho, s, start.double(), ridge)

    closed = scale_step(w, v, h, rho, start, ridge=ridge)
    found = trained(loss, start, method)
    assert loss(closed.double()) <= loss(found) * (1 + 1e-9)
    assert loss(closed.double()) < loss(start.double())
    torch.testing.assert_close(closed.double(), found, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_without_the_ridge_never_rises(seed):
    w, v, h, rho = problem(seed, rows=(6, 4))
    start = torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 0.5
    for ridge in (0.0, 1e-2, 1.0):
        s = scale_step(w, v, h, rho, start, ridge=ridge)
        assert objective(w, v, h, rho, s.double()) <= objective(w, v, h, rho, start.double())


def test_linears_of_one_input_count_like_one_stacked_linear():
    w, v, h, rho = problem(rows=(5, 3, 2))
    start = torch.ones(12)
    apart = scale_step(w, v, [h[0]] * 3, rho, start)
    stacked = scale_step([torch.cat(w)], [torch.cat(v)], [h[0]], [torch.cat(rho)], start)
    torch.testing.assert_close(apart, stacked, rtol=1e-5, atol=1e-6)


def test_a_vector_that_is_already_best_stays():
    w, v, h, rho = problem()
    s = 0.5 + torch.rand(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(scale_step([v[0] * s], v, h, rho, s), s, rtol=1e-5, atol=1e-5)
    found = scale_step([v[0] * s], v, h, rho, torch.ones(12), ridge=0.0)
    torch.testing.assert_close(found, s, rtol=1e-4, atol=1e-4)


def test_dead_columns_keep_their_scale_and_do_not_disturb_the_others():
    w, v, h, rho = problem()
    start = torch.linspace(0.5, 2, 12)
    h[0][3], h[0][:, 3] = 0, 0  # an input that is always zero
    v[0][:, 7] = 0  # a column whose weights all became zero
    s = scale_step(w, v, h, rho, start)
    assert s[3] == start[3] and s[7] == start[7]
    live = [i for i in range(12) if i not in (3, 7)]
    assert not torch.isclose(s[live], start[live]).any()
    again = scale_step(w, v, [h[0] * 2.0**-80], rho, start)
    torch.testing.assert_close(again, s, rtol=1e-4, atol=1e-4)


def test_nothing_alive_changes_nothing():
    start = torch.linspace(0.5, 2, 12)
    w, v, h, rho = problem()
    assert torch.equal(scale_step(w, v, [torch.zeros(12, 12)], rho, start), start)


def test_a_column_that_would_vanish_keeps_its_scale():
    w, v, h, rho = problem()
    w[0][:, 5] = 0
    h[0] = torch.diag(h[0].diagonal())
    start = torch.full((12,), 0.8)
    s = scale_step(w, v, h, rho, start, ridge=0.0)
    assert s[5] == start[5] and (s > 0).all()


def test_rows_without_weight_have_no_say():
    w, v, h, rho = problem(rows=(6,))
    rho[0][2] = 0
    want = scale_step(w, v, h, rho, torch.ones(12))
    w[0][2] += 100
    torch.testing.assert_close(scale_step(w, v, h, rho, torch.ones(12)), want)


def test_normalised_scales_are_half_precision_numbers_of_geometric_mean_one():
    g = torch.Generator().manual_seed(0)
    s = normalise(torch.rand(300, generator=g) * 7 + 0.1)
    assert torch.equal(s, s.half().float()) and (s > 0).all()
    assert float(s.double().log().mean().exp()) == pytest.approx(1, abs=2**-11)
    assert torch.equal(normalise(torch.full((9,), 3.7)), torch.ones(9))


def test_scaled_error_is_the_sum_over_rows():
    w, v, h, rho = problem()
    s = torch.linspace(0.5, 2, 12)
    want = objective(w, v, h, rho, s.double())
    torch.testing.assert_close(
        scaled_error(w[0], v[0], h[0], rho[0], s).double(), want, rtol=1e-5, atol=1e-5
    )
