"""Entropic transport, compared with closed forms, an independent float64 solver, geomloss and POT."""

from __future__ import annotations

import functools
import itertools

import geomloss
import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers.draws import cloud as _cloud
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.transport import (
    divergence_gradient,
    divergence_gradient_at,
    geometry,
    newton,
    self_potential,
    self_transport_cost,
    sinkhorn_divergence,
    sinkhorn_potentials,
)

transport_cost = functools.partial(sinkhorn_divergence, debias=False)


def _costs(x: Tensor, y: Tensor) -> Tensor:
    """½‖x − y‖², [N, M], from differences."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 2


def _weights(count: int, seed: int = 0) -> Tensor:
    weights = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return weights / weights.sum()


def _uniform(points: Tensor) -> Tensor:
    return torch.full((len(points),), 1 / len(points), dtype=torch.float64)


def _plan(x: Tensor, y: Tensor, f: Tensor, g: Tensor, blur: float) -> Tensor:
    """a_i b_j exp((f_i + g_j − C_ij)/eps), [N, M]; only the solution has a and b as its marginals."""
    return torch.exp((f[:, None] + g - _costs(x, y)) / blur**2) / len(x) / len(y)


def _solve_independently(x: Tensor, y: Tensor, blur: float, reach: float | None = None) -> tuple[Tensor, Tensor]:
    """OT(x, y) and its gradient in x, by float64 Sinkhorn iterations until the potential moves by less than 1e-6 eps.

    For a cloud against itself f = g, and averaging the two converges in a few dozen iterations.
    """
    costs, (a, b) = _costs(x, y), (_uniform(x), _uniform(y))
    f, eps = torch.zeros_like(a), max(costs.max().item(), blur**2)
    while True:
        eps = max(eps / 2, blur**2)
        relaxed = 1.0 if reach is None else reach**2 / (reach**2 + eps)
        for _ in range(20 if eps > blur**2 else 20_000):
            before, g = f, -eps * relaxed * torch.logsumexp((f[:, None] - costs) / eps + a.log()[:, None], 0)
            f = (f + g) / 2 if x is y else -eps * relaxed * torch.logsumexp((g - costs) / eps + b.log(), 1)
            if (f - before).abs().max() < 1e-6 * eps:
                break
        if eps == blur**2:
            break
    plan = _plan(x, y, f, g, blur)
    gradient = plan.sum(1)[:, None] * x - plan @ y
    if reach is None:
        return a @ f + b @ g, gradient
    kl = sum((torch.xlogy(p, p / q) - p + q).sum() for p, q in ((plan.sum(1), a), (plan.sum(0), b)))
    reference = a[:, None] * b
    entropy = (torch.xlogy(plan, plan / reference) - plan + reference).sum()
    return (plan * costs).sum() + eps * entropy + reach**2 * kl, gradient


def _value_and_gradient(x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = sinkhorn_divergence(x, y, **options)
    return value.detach(), torch.autograd.grad(value, x)[0]


def _cosine(u: Tensor, v: Tensor) -> float:
    return torch.cosine_similarity(u.double().flatten(), v.double().flatten(), dim=0).item()


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0.01, 1.0, 100.0])
def test_between_two_points_the_cost_is_half_the_squared_distance(blur):
    x, y = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[4.0, 5.0]], dtype=torch.float64)
    value, gradient = _value_and_gradient(x, y, blur=blur)
    assert value.item() == pytest.approx(12.5, rel=1e-12)  # float64 rounding
    torch.testing.assert_close(gradient, x - y, rtol=1e-12, atol=0)


def test_from_one_point_every_other_point_is_reached():
    y = _cloud(7, 3)
    weights = _weights(7)
    value, gradient = _value_and_gradient(
        torch.zeros(1, 3, dtype=torch.float64), y, blur=0.3, debias=False, y_weights=weights
    )
    assert value.item() == pytest.approx((weights @ (y**2).sum(1) / 2).item(), rel=1e-12)  # only one plan exists
    torch.testing.assert_close(gradient[0], -weights @ y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("blur", [0.05, 0.5, 5.0])
def test_a_translation_costs_half_its_squared_length(blur):
    # For the quadratic cost ⟨x − y, t⟩ separates, so the plan of (x, x + t) is that of (x, x) and S = ½‖t‖².
    x, shift = _cloud(40, 3), torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    value, gradient = _value_and_gradient(x, x + shift, blur=blur)
    assert value.item() == pytest.approx(4.5, rel=1e-4)  # solved to a marginal error of 1e-4
    torch.testing.assert_close(gradient, (-shift / 40).expand(40, 3), rtol=1e-3, atol=1e-5)


def test_at_small_blur_the_line_is_sorted_and_the_plane_assigned():
    x, y = _cloud(30, 1), _cloud(30, 1, seed=1, shift=0.5)
    exact = ((x.sort(0).values - y.sort(0).values) ** 2).mean() / 2
    # Entropy costs at most eps·log(N) = 3.4e-4.
    assert transport_cost(x, y, blur=0.01).item() == pytest.approx(exact.item(), abs=4e-4)

    x, y = _cloud(30, 2), _cloud(30, 2, seed=1, shift=0.5)
    costs = _costs(x, y).numpy()
    rows, columns = linear_sum_assignment(costs)
    value, gradient = _value_and_gradient(x, y, blur=0.005, debias=False)
    assert value.item() == pytest.approx(costs[rows, columns].mean(), abs=1e-4)  # eps·log(N) = 8.5e-5
    assert _cosine(gradient, x - y[columns]) > 0.999


def test_gaussians_follow_the_closed_form():
    # Between N(0, s²) and N(m, t²), with D = √(4 s²t² + eps²) and P = s²t²-coupling c = (D − eps)/2, the cost is
    # ½(m² + s² + t² − 2c) + ½·eps·log(s²t²/(s²t² − c²)): the optimal plan is the Gaussian whose covariance c makes this
    # stationary. Quantiles represent the Gaussians.
    s, t, mean, blur = 1.0, 0.5, 1.5, 0.7
    eps = blur**2
    c = ((4 * s**2 * t**2 + eps**2) ** 0.5 - eps) / 2
    expected = (mean**2 + s**2 + t**2 - 2 * c + eps * np.log(s**2 * t**2 / (s**2 * t**2 - c**2))) / 2
    quantiles = torch.special.ndtri((torch.arange(600, dtype=torch.float64) + 0.5) / 600)[:, None]
    x, y = s * quantiles, t * quantiles + mean
    # 600 quantiles miss .3% of the variance, in the tails.
    assert transport_cost(x, y, blur=blur).item() == pytest.approx(expected, rel=3e-3)
    _, gradient = _value_and_gradient(x, y, blur=blur, debias=False)
    # The barycentric map of that plan is linear, y = mean + (c/s²) x.
    centre = slice(100, 500)
    torch.testing.assert_close(600 * gradient[centre], (x - mean - c / s**2 * x)[centre], rtol=0, atol=5e-3)


def test_a_cloud_is_at_distance_zero_from_itself():
    x, weights = _cloud(50, 4), _weights(50)
    value, gradient = _value_and_gradient(x, x.clone(), blur=0.5, x_weights=weights, y_weights=weights)
    assert abs(value.item()) < 1e-6  # second order in the marginal error of 1e-4
    assert gradient.abs().max() < 1e-5  # against 1/50 for the two terms alone: first order in that error
    torch.testing.assert_close(self_transport_cost(x, blur=0.5), transport_cost(x, x, blur=0.5), rtol=1e-5, atol=0)


def test_symmetry_between_the_clouds():
    x, y, a, b = _cloud(20, 3), _cloud(45, 3, seed=1), _weights(20), _weights(45, seed=1)
    forward = sinkhorn_divergence(x, y, blur=0.4, x_weights=a, y_weights=b)
    assert forward.item() == pytest.approx(
        sinkhorn_divergence(y, x, blur=0.4, x_weights=b, y_weights=a).item(), rel=1e-12
    )


@pytest.mark.parametrize("sizes", [(30, 70), (70, 30)])
def test_the_plan_has_the_marginals_that_were_asked_for(sizes):
    x, y = _cloud(sizes[0], 5), _cloud(sizes[1], 5, seed=1)
    actual = sinkhorn_potentials(x, y, blur=0.2, tolerance=1e-9)
    plan = _plan(x, y, actual.f, actual.g, 0.2)
    assert (plan.sum(1) - _uniform(x)).abs().sum() < 2e-9
    assert (plan.sum(0) - _uniform(y)).abs().sum() < 2e-9
    assert actual.marginal_error < 1e-9


@pytest.mark.parametrize("reach", [None, 1.5])
def test_a_weight_is_a_number_of_repetitions(reach):
    x, y = _cloud(6, 2), _cloud(15, 2, seed=1)
    counts = torch.tensor([1, 2, 3, 1, 2, 1])
    options = {"blur": 0.3, "reach": reach}
    value, gradient = _value_and_gradient(x, y, x_weights=counts / counts.sum(), **options)
    repeated, gradients = _value_and_gradient(x.repeat_interleave(counts, 0), y, **options)
    assert value.item() == pytest.approx(repeated.item(), rel=1e-4)  # both solves stop at a marginal error of 1e-4
    owner = torch.arange(6).repeat_interleave(counts)
    summed = torch.zeros_like(x).index_add_(0, owner, gradients)
    torch.testing.assert_close(gradient, summed, rtol=1e-3, atol=1e-5)


def test_mass_out_of_reach_is_destroyed():
    # Two Diracs far apart: moving nothing costs reach²·(|a| + |b|) and eps·|a||b| for the empty plan.
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 100.0, dtype=torch.float64)
    value, gradient = _value_and_gradient(x, y, blur=0.1, reach=1.0, debias=False)
    assert value.item() == pytest.approx(2 + 0.01, rel=1e-9)
    assert gradient.abs().item() < 1e-9


def test_one_dirac_within_reach():
    # min over the mass m of m·C + eps·KL(m|1) + 2ρ·KL(m|1): log m = −C/(2ρ + eps), value (2ρ + eps)(1 − m).
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    total = 2 * 1.5**2 + 0.3**2
    mass = np.exp(-0.5 / total)
    value, gradient = _value_and_gradient(x, y, blur=0.3, reach=1.5, debias=False)
    assert value.item() == pytest.approx(total * (1 - mass), rel=1e-5)  # solved to 1e-4
    assert gradient.item() == pytest.approx(-mass, rel=1e-4)


# --- the converged float64 problem ----------------------------------------------------------------------------------

_SIZES = [(16, 24, 2), (24, 16, 8), (1, 20, 3), (20, 1, 3), (8, 8, 1), (10, 10, 200)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", _SIZES)
@pytest.mark.parametrize("ratio", [2.0, 0.5, 0.1, 0.03])
def test_float32_matches_an_independent_float64_solve(sizes, ratio):
    n, m, dim = sizes
    x, y = _cloud(n, dim, shift=0.3), _cloud(m, dim, seed=1)
    blur = ratio * torch.cdist(x, y).median().item()
    expected, expected_gradient = _solve_independently(x, y, blur)
    self_cost, self_gradient = _solve_independently(x, x, blur)
    other_cost, _ = _solve_independently(y, y, blur)
    # 1e-4 of the larger terms: S is a difference of numbers that float32 holds to 1e-7 and the solver to 1e-4 squared.
    value, gradient = _value_and_gradient(x.float(), y.float(), blur=blur, debias=False)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert _cosine(gradient, expected_gradient) > 0.9999
    value, gradient = _value_and_gradient(x.float(), y.float(), blur=blur)
    terms = abs(expected) + (abs(self_cost) + abs(other_cost)) / 2
    assert value.item() == pytest.approx((expected - (self_cost + other_cost) / 2).item(), abs=1e-5 * terms.item())
    # Both arguments of the self-term move, and it enters with one half.
    assert _cosine(gradient, expected_gradient - self_gradient) > 0.999


@pytest.mark.parametrize("ratio", [2.0, 0.5, 0.1, 0.03])
def test_a_training_batch_against_two_thousand_references(ratio):
    # A plan exp((f + g − C)/eps) with the right marginals is optimal, whatever solver made f and g: this certifies the
    # float64 solution.
    x, y = _cloud(128, 64, shift=0.3), _cloud(2000, 64, seed=1)
    blur = ratio * torch.cdist(x, y).median().item()
    actual = sinkhorn_potentials(x, y, blur=blur, tolerance=1e-7)
    plan = _plan(x, y, actual.f, actual.g, blur)
    assert (plan.sum(1) - 1 / 128).abs().sum() + (plan.sum(0) - 1 / 2000).abs().sum() < 1e-6
    value, gradient = _value_and_gradient(x.float(), y.float(), blur=blur, debias=False)
    assert value.item() == pytest.approx((actual.f.mean() + actual.g.mean()).item(), rel=1e-5)
    assert _cosine(gradient, x / 128 - plan @ y) > 0.9999


@pytest.mark.parametrize("ratio, reach", list(itertools.product([1.0, 0.3, 0.1], [0.3, 1.0, 3.0])))
def test_unbalanced_matches_an_independent_float64_solve(ratio, reach):
    x, y = _cloud(30, 3, shift=0.5), _cloud(50, 3, seed=1)
    median = torch.cdist(x, y).median().item()
    options = {"blur": ratio * median, "reach": reach * median}
    expected, expected_gradient = _solve_independently(x, y, **options)
    value, gradient = _value_and_gradient(x.float(), y.float(), debias=False, **options)
    assert value.item() == pytest.approx(expected.item(), rel=3e-3)
    assert _cosine(gradient, expected_gradient) > 0.999


@pytest.mark.parametrize("reach", [None, 2.0])
@pytest.mark.parametrize("debias", [True, False])
def test_gradcheck(reach, debias):
    x, y, a = _cloud(5, 2), _cloud(7, 2, seed=1, shift=0.5), _weights(5)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, blur=0.7, reach=reach, debias=debias, x_weights=a)

    # The error of the values is the squared marginal error, at most 1e-8; the difference quotient divides it by 1e-3.
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), y.requires_grad_()), eps=1e-3, atol=1e-4, rtol=1e-3)


def test_divergence_gradient_is_the_gradient_of_the_divergence():
    x, y = _cloud(20, 3), _cloud(40, 3, seed=1)
    field, potentials = divergence_gradient(x, y, blur=0.4)
    torch.testing.assert_close(field, _value_and_gradient(x, y, blur=0.4)[1], rtol=1e-6, atol=1e-9)
    again, warm = divergence_gradient(x + 0.01, y, blur=0.4, initial=potentials)
    torch.testing.assert_close(again, _value_and_gradient(x + 0.01, y, blur=0.4)[1], rtol=1e-3, atol=1e-5)
    assert warm.iterations < potentials.iterations


def test_the_gradient_extends_to_points_that_were_not_there():
    x, y = _cloud(400, 2), _cloud(300, 2, seed=1, shift=1.0)
    field, potentials = divergence_gradient(x, y, blur=0.4)
    arguments = (potentials.cross.g, potentials.self_potential)
    actual = divergence_gradient_at(x, x, y, *arguments, blur=0.4)
    # Each point joins 400 points among which is a copy of it, which matters most where it has few other neighbours.
    assert (actual - 400 * field).abs().mean() < 0.01
    torch.testing.assert_close(actual, 400 * field, rtol=0, atol=0.1)
    joined = torch.cat([x, _cloud(1, 2, seed=9)])
    expected = 401 * divergence_gradient(joined, y, blur=0.4)[0][-1:]
    torch.testing.assert_close(
        divergence_gradient_at(joined[-1:], x, y, *arguments, blur=0.4), expected, rtol=0, atol=0.02
    )


def test_the_gradient_extends_with_the_weights_of_the_cloud():
    """A point of weight 2a is equivalent to two of weight a; a new point has the weight of the first one."""
    x, y = _cloud(200, 2), _cloud(150, 2, seed=1, shift=1.0)
    weights = torch.cat([torch.full((100,), 1 / 300), torch.full((100,), 2 / 300)]).to(x)
    field, potentials = divergence_gradient(x, y, blur=0.4, x_weights=weights)
    twice = torch.cat([x, x[100:]])
    self_potential = torch.cat([potentials.self_potential, potentials.self_potential[100:]])
    actual = divergence_gradient_at(x, x, y, potentials.cross.g, potentials.self_potential, blur=0.4, x_weights=weights)
    expected = divergence_gradient_at(x, twice, y, potentials.cross.g, self_potential, blur=0.4)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert (actual[:100] - 300 * field[:100]).abs().mean() < 0.02  # each next to a copy of itself


def test_a_point_far_from_its_cloud_keeps_its_own_mass():
    x, y = _cloud(50, 2), _cloud(60, 2, seed=1)
    _, potentials = divergence_gradient(x, y, blur=0.1)
    far = torch.full((1, 2), 40.0, dtype=torch.float64)
    actual = divergence_gradient_at(far, x, y, potentials.cross.g, potentials.self_potential, blur=0.1)
    nearest = y[(y - far).square().sum(1).argmin()]
    assert (actual - (far - nearest)).abs().max() < 1.5  # T_xx is the point itself, T_xy lies in y


# --- the options of the divergence ----------------------------------------------------------------------------------


def test_an_independent_pair_replaces_the_self_term():
    x, pair, y = _cloud(20, 3), _cloud(25, 3, seed=1), _cloud(30, 3, seed=2, shift=1.0)
    value, gradient = _value_and_gradient(x, y, blur=0.4, x_pair=pair)
    cost, cost_gradient = _value_and_gradient(x, y, blur=0.4, debias=False)
    self_cost, self_gradient = _value_and_gradient(x, pair, blur=0.4, debias=False)
    other = self_transport_cost(y, blur=0.4)
    assert value.item() == pytest.approx((cost - self_cost / 2 - other / 2).item(), rel=1e-10)
    torch.testing.assert_close(gradient, cost_gradient - self_gradient, rtol=1e-10, atol=1e-14)

    # If both samples require gradients, each gets its own half.
    x, pair = x.requires_grad_(), pair.requires_grad_()
    halves = torch.autograd.grad(sinkhorn_divergence(x, y, blur=0.4, x_pair=pair), (x, pair))
    pair_gradient = torch.autograd.grad(transport_cost(x, pair, blur=0.4), pair)[0]
    torch.testing.assert_close(halves[0], cost_gradient - self_gradient / 2, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(halves[1], -pair_gradient / 2, rtol=1e-10, atol=1e-14)


def test_the_known_cost_of_the_references_shifts_the_value_only():
    x, y = _cloud(20, 3), _cloud(30, 3, seed=1)
    value, gradient = _value_and_gradient(x, y, blur=0.4)
    self_cost = self_transport_cost(y, blur=0.4)
    for y_self_cost in (self_cost, self_cost.item(), 0):
        shifted, same_gradient = _value_and_gradient(x, y, blur=0.4, y_self_cost=y_self_cost)
        left_out = self_cost.item() / 2 if isinstance(y_self_cost, int) else 0.0
        assert shifted.item() == pytest.approx(value.item() + left_out, rel=1e-12)
        assert torch.equal(gradient, same_gradient)


@pytest.mark.parametrize("reach", [None, 1.0])
def test_blocks_give_what_the_whole_matrix_gives(monkeypatch, reach):
    x, y = _cloud(23, 3), _cloud(41, 3, seed=1)
    options = {"blur": 0.5, "reach": reach}
    value, gradient = _value_and_gradient(x, y, **options)
    monkeypatch.setattr(geometry, "MAX_DENSE_ENTRIES", 200)
    assert not geometry.Cost(x, y).is_dense
    blockwise, blockwise_gradient = _value_and_gradient(x, y, **options)
    # Both solvers stop at a marginal error of 1e-4.
    assert blockwise.item() == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(blockwise_gradient, gradient, rtol=1e-3, atol=1e-5)


def test_a_warm_start_ends_at_the_same_potentials_sooner():
    x, y = _cloud(40, 3), _cloud(60, 3, seed=1)
    cold = sinkhorn_potentials(x, y, blur=0.3, tolerance=1e-8)
    for first, second in ((x, y), (y, x)):
        before = sinkhorn_potentials(first, second, blur=0.3)
        moved = first + 0.01 * _cloud(*first.shape, seed=2)
        warm = sinkhorn_potentials(moved, second, blur=0.3, tolerance=1e-8, initial=before)
        expected = sinkhorn_potentials(moved, second, blur=0.3, tolerance=1e-8)
        assert warm.iterations < expected.iterations
        # Potentials are unique up to a constant that is added to f and subtracted from g.
        torch.testing.assert_close(warm.f - warm.f.mean(), expected.f - expected.f.mean(), rtol=0, atol=1e-7)
        torch.testing.assert_close(
            warm.f[:, None] + warm.g[None], expected.f[:, None] + expected.g[None], rtol=0, atol=1e-7
        )
    assert cold.marginal_error < 1e-8


def test_a_start_from_another_problem_does_no_harm():
    x, y = _cloud(40, 3), _cloud(60, 3, seed=1)
    misleading = sinkhorn_potentials(x * 30, y - 50, blur=0.3)
    actual = sinkhorn_potentials(x, y, blur=0.05, initial=misleading)
    expected = sinkhorn_potentials(x, y, blur=0.05)
    torch.testing.assert_close(
        actual.f[:, None] + actual.g[None], expected.f[:, None] + expected.g[None], rtol=0, atol=1e-5
    )


def test_self_potential_solves_the_symmetric_problem():
    x = _cloud(30, 2)
    f = self_potential(x, blur=0.3, tolerance=1e-10)
    assert (_plan(x, x, f, f, 0.3).sum(1) - 1 / 30).abs().sum() < 1e-8


# --- other libraries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [None, 2.0])
@pytest.mark.parametrize("debias", [True, False])
def test_agrees_with_geomloss_where_that_converges(reach, debias):
    x, y = _cloud(40, 3), _cloud(60, 3, seed=1, shift=0.5)
    options = {"blur": 1.0, "reach": reach, "debias": debias}
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, scaling=0.995, backend="tensorized", **options)
    inputs = x.clone().requires_grad_()
    expected = theirs(inputs, y)
    # geomloss performs one iteration per temperature, in steps of 0.5% in blur, and loses O(1e-3) at each end.
    value, gradient = _value_and_gradient(x, y, **options)
    assert value.item() == pytest.approx(expected.item(), rel=2e-3)
    assert _cosine(gradient, torch.autograd.grad(expected, inputs)[0]) > 0.9999


def test_the_geomloss_backend_is_geomloss():
    x, y = _cloud(20, 3).float(), _cloud(30, 3, seed=1).float()
    expected = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.2, scaling=0.5, backend="tensorized")(x, y)
    assert torch.equal(sinkhorn_divergence(x, y, blur=0.2, scaling=0.5, backend="geomloss"), expected)


def test_agrees_with_pot():
    x, y, blur = _cloud(30, 3), _cloud(40, 3, seed=1), 0.5
    a, b = _weights(30), _weights(40, seed=1)
    plan = ot.sinkhorn(
        a.numpy(), b.numpy(), _costs(x, y).numpy(), reg=blur**2, method="sinkhorn_log", stopThr=1e-10, numItermax=5000
    )
    actual = sinkhorn_potentials(x, y, blur=blur, x_weights=a, y_weights=b, tolerance=1e-8)
    ours = a[:, None] * b * torch.exp((actual.f[:, None] + actual.g - _costs(x, y)) / blur**2)
    np.testing.assert_allclose(ours.numpy(), plan, atol=1e-8)  # both solved to 1e-8


def test_unbalanced_agrees_with_pot():
    x, y, blur, reach = _cloud(30, 3), _cloud(40, 3, seed=1), 0.7, 1.5
    a, b = _uniform(x).numpy(), _uniform(y).numpy()
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a, b, _costs(x, y).numpy(), reg=blur**2, reg_m=reach**2, reg_type="kl", stopThr=1e-12, numItermax=5000
    )
    actual = sinkhorn_potentials(x, y, blur=blur, reach=reach, tolerance=1e-8)
    np.testing.assert_allclose(_plan(x, y, actual.f, actual.g, blur).numpy(), plan, atol=1e-7)


# --- callers --------------------------------------------------------------------------------------------------------


def _half_problem() -> tuple[Tensor, Tensor]:
    return _cloud(12, 3).float(), _cloud(20, 3, seed=1).float()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same_and_the_mode_stays(mode):
    x, y = _half_problem()
    expected = sinkhorn_divergence(x.clone().requires_grad_(), y, blur=0.3)
    with mode():
        value = sinkhorn_divergence(x, y, blur=0.3)
        assert not torch.is_grad_enabled()
    assert not value.requires_grad and torch.equal(value, expected.detach())
    assert torch.is_grad_enabled()


def test_autocast_does_not_reach_inside():
    x, y = _half_problem()
    expected = _value_and_gradient(x, y, blur=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = _value_and_gradient(x, y, blur=0.3)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("sizes", [(280, 7), (100, 100), (128, 1000)])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 10.0])
def test_the_values_uncertainty_in_float32(sizes, ratio):
    """The claim of the docstring: 1e-6 blur², besides the rounding of the costs, for clouds with equal means."""
    x, y = (torch.randn(size, 32, generator=torch.Generator().manual_seed(size)) for size in sizes)
    x, y = x - x.mean(0), y - y.mean(0)
    blur = ratio * torch.cdist(x, y).median().item()
    error = sinkhorn_divergence(x, y, blur=blur).item() - sinkhorn_divergence(x.double(), y.double(), blur=blur).item()
    assert abs(error) < 1e-6 * blur**2 + 1e-6 * x.square().sum(1).max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_points_are_solved_in_float32(dtype):
    x, y = (cloud.to(dtype) for cloud in _half_problem())
    value, gradient = _value_and_gradient(x, y, blur=0.3)
    expected, expected_gradient = _value_and_gradient(x.float(), y.float(), blur=0.3)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("switch", ["allow_tf32", "fp32_precision"])
def test_the_programs_own_tf32_setting_is_left_as_it_was(switch):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, switch):
        pytest.skip(f"this torch has no {switch}")
    on = {"allow_tf32": True, "fp32_precision": "tf32"}[switch]
    before = getattr(matmul, switch)
    setattr(matmul, switch, on)
    try:
        sinkhorn_divergence(*_half_problem(), blur=0.3)
        assert getattr(matmul, switch) == on
    finally:
        setattr(matmul, switch, before)


def test_a_compiled_caller_gets_the_same_gradient():
    x, y = _half_problem()

    @torch.compile(backend="eager")
    def loss(x: Tensor) -> Tensor:
        return 2 * sinkhorn_divergence(x * 1.5, y, blur=0.3)

    compiled, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(compiled).backward()
    (2 * sinkhorn_divergence(plain * 1.5, y, blur=0.3)).backward()
    assert torch.equal(compiled.grad, plain.grad)


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, y = _half_problem()
    value = sinkhorn_divergence(x.requires_grad_(), y, blur=0.3)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()


def test_leaves_no_graph_in_the_inputs():
    x, y = _half_problem()
    x.requires_grad_()
    sinkhorn_divergence(x, y, blur=0.3).backward()
    assert x.grad is not None and x.is_leaf and y.grad is None and not y.requires_grad


# --- hard inputs ----------------------------------------------------------------------------------------------------


def test_repeated_points_and_empty_neighbourhoods():
    x = torch.zeros(20, 2)
    y = torch.cat([torch.zeros(5, 2), torch.full((15, 2), 3.0)])
    value, gradient = _value_and_gradient(x, y, blur=0.05)
    assert value.item() == pytest.approx(
        0.75 * 9, rel=1e-3
    )  # three quarters of the mass travel at a cost of ½·18; eps·log(4) remains
    torch.testing.assert_close(gradient, torch.full((20, 2), -0.75 * 3 / 20), rtol=1e-3, atol=0)


def test_clouds_a_thousand_blurs_apart():
    x, y = _cloud(30, 2).float(), _cloud(40, 2, seed=1).float() + 100.0
    value, gradient = _value_and_gradient(x, y, blur=0.1)
    mean = x.mean(0) - y.mean(0)
    # The divergence is at least that of the means, and exceeds it by the difference between the shapes.
    assert mean.square().sum().item() / 2 <= value.item() < mean.square().sum().item() / 2 + 2
    torch.testing.assert_close(gradient.sum(0), mean, rtol=1e-4, atol=0)
    assert sinkhorn_potentials(x, y, blur=0.1).iterations < 200  # float32 allows no more; the solver must notice


def test_two_clusters_that_exchange_no_mass():
    x, y = _cloud(20, 2) * 0.1, _cloud(30, 2, seed=1) * 0.1
    x, y = torch.cat([x, x + 50]), torch.cat([y, y + 50])
    value = sinkhorn_divergence(x, y, blur=0.05)
    assert value.item() == pytest.approx(sinkhorn_divergence(x[:20], y[:30], blur=0.05).item(), rel=1e-3)


@settings(max_examples=25)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.floats(0.02, 20),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
def test_finite_symmetric_and_not_negative(n, m, dim, blur, scale, seed):
    x, y = _cloud(n, dim, seed=seed) * scale, _cloud(m, dim, seed=seed + 1) * scale
    value, gradient = _value_and_gradient(x, y, blur=blur * scale)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert value.item() >= -1e-6 * scale**2  # the squared marginal error, in units of the cost
    assert value.item() == pytest.approx(
        sinkhorn_divergence(y, x, blur=blur * scale).item(), rel=1e-4, abs=1e-6 * scale**2
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, "`x` must be a cloud of shape"),
        ({"x": torch.zeros(0, 3)}, "`x` must hold at least one point"),
        ({"y": torch.zeros(0, 3)}, "`y` must hold at least one point"),
        ({"y": torch.zeros(4, 2)}, "`y` must have 3 coordinates like `x`"),
        ({"x": torch.zeros(4, 3, dtype=torch.long)}, "`x` must be a floating-point tensor"),
        ({"x": torch.full((4, 3), torch.nan)}, "`x` must be finite"),
        ({"y": torch.full((4, 3), torch.inf)}, "`y` must be finite"),
        ({"blur": 0.0}, "`blur` must be a positive length, got 0.0"),
        ({"blur": -0.2}, "`blur` must be a positive length, got -0.2"),
        ({"blur": float("nan")}, "`blur` must be a positive length"),
        ({"scaling": 1.0}, "`scaling` must lie strictly between 0 and 1"),
        ({"reach": 0.0}, "`reach` must be a positive length or None"),
        ({"x_weights": torch.ones(3) / 3}, "`x_weights` must have shape"),
        ({"x_weights": torch.tensor([0.5, 0.5, 0.5, -0.5])}, "`x_weights` must be positive"),
        ({"y_weights": torch.full((5,), torch.nan)}, "`y_weights` must be positive"),
        ({"y_weights": torch.ones(5)}, "`y_weights` must sum to 1"),
        ({"x_pair": torch.zeros(4, 2)}, "`x_pair` must have 3 coordinates like `x`"),
        ({"backend": "pot"}, "`backend` must be one of native, geomloss, flash-sinkhorn, got 'pot'"),
        (
            {"backend": "flash-sinkhorn"},
            "`backend` must be native or geomloss for points that are on cpu, got 'flash-sinkhorn'",
        ),
        ({"backend": "geomloss", "x_pair": torch.zeros(4, 3)}, "`x_pair` must be None with backend='geomloss'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.zeros(4, 3), "y": torch.ones(5, 3), "blur": 0.1, **change}
    with pytest.raises(InputError, match=message):
        sinkhorn_divergence(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize("blur", [1.0, 0.2, 0.05])
def test_conjugate_gradients_and_factorisation_find_the_same_plan(blur: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _cloud(60, 5, seed=7), _cloud(90, 5, seed=8, shift=0.5)
    plans = []
    for size in (0, 1000):
        monkeypatch.setattr(newton, "MAX_FACTORISED_SIZE", size)
        solution = sinkhorn_potentials(x, y, blur=blur, tolerance=1e-10)
        scores = (solution.f[:, None] + solution.g[None, :] - _costs(x, y)) / blur**2
        plans.append(scores.exp() / (60 * 90))
    # The plan is unique, but potentials of clusters that exchange no mass are not. Tolerance 1e-6 of the mass: the
    # marginal error is 1e-10, and at the smallest blur the plan is up to 1e4 times more sensitive.
    assert (plans[0] - plans[1]).abs().sum() < 1e-6


@pytest.mark.parametrize("entries", [2**25, 100])
@pytest.mark.parametrize("max_iterations", [1, 3, 12])
def test_few_iterations_leave_a_plan_with_right_columns(entries, max_iterations, monkeypatch):
    monkeypatch.setattr(geometry, "MAX_DENSE_ENTRIES", entries)
    x, y = _cloud(20, 3), _cloud(30, 3, seed=1)
    actual = sinkhorn_potentials(x, y, blur=0.2, max_iterations=max_iterations)
    columns = _plan(x, y, actual.f, actual.g, 0.2).sum(0)
    assert (columns - 1 / 30).abs().sum() < 1e-6  # g is optimal for f, whatever f is
    assert actual.marginal_error > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_that_hardly_exchange_mass_are_solved(dtype):
    """With unequal weights, mass has to cross gaps of many eps between groups; the blur is .01 median distances."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(size, 3, generator=generator, dtype=dtype) for size in (12, 20))
        blur = 0.005 * torch.cdist(x, y).median().item()
        a, b = _weights(12, seed), _weights(20, seed + 50)
        actual = sinkhorn_potentials(x, y, blur=blur, x_weights=a, y_weights=b)
        # In float32, costs of 1e5 eps have an error of 1e-2 eps, which is the relative error of the plan's entries.
        assert actual.marginal_error < (1e-5 if dtype == torch.float64 else 1e-3)
