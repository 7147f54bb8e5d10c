"""Batches of transport problems: each problem is solved as it would be alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.transport import (
    divergence_gradient,
    geometry,
    self_potential,
    self_transport_cost,
    sinkhorn_divergence,
    sinkhorn_potentials,
)

COUNT, ROWS, COLUMNS, WIDTH = 4, 12, 20, 3


def _clouds(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal points in float64; every cloud has its own scale and position."""
    points = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    numbers = torch.arange(len(points), dtype=torch.float64)[:, None, None]
    return points * (1 + numbers) / 2 + seed * numbers


def _weights(*shape: int, seed: int = 0) -> Tensor:
    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def _pair() -> tuple[Tensor, Tensor]:
    return _clouds(COUNT, ROWS, WIDTH), _clouds(COUNT, COLUMNS, WIDTH, seed=1)


def _value_and_gradient(x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = sinkhorn_divergence(x, y, **options)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("reach", [None, 1.5])
@pytest.mark.parametrize("blur", [1.0, 0.2, 0.02])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_batch_is_its_problems(blur, reach, is_swapped):
    (x, y), (a, b) = _pair(), (_weights(COUNT, ROWS), _weights(COUNT, COLUMNS, seed=1))
    if is_swapped:
        x, y, a, b = y, x, b, a
    options = {"blur": blur, "reach": reach}
    values, gradients = _value_and_gradient(x, y, x_weights=a, y_weights=b, **options)
    for one in range(COUNT):
        value, gradient = _value_and_gradient(x[one], y[one], x_weights=a[one], y_weights=b[one], **options)
        # Both solves stop at a marginal error of 1e-5; the potentials differ by a few units of the cost.
        torch.testing.assert_close(values[one], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients[one], gradient, rtol=1e-3, atol=1e-4)


def test_an_easy_problem_does_not_wait_for_precision_and_a_hard_one_gets_it():
    far = torch.cat([_clouds(1, 6, WIDTH) * 0.1, _clouds(1, 6, WIDTH, seed=1) * 0.1 + 50], dim=1)
    x = torch.cat([_clouds(1, ROWS, WIDTH), far])
    y = torch.cat([_clouds(1, ROWS, WIDTH, seed=1), far + 0.05 * _clouds(1, ROWS, WIDTH, seed=2)])
    actual = sinkhorn_potentials(x, y, blur=0.05, tolerance=1e-8)
    assert actual.marginal_error.shape == (2,) and bool((actual.marginal_error < 1e-8).all())
    for index in range(2):
        plan = actual.f[index][:, None] + actual.g[index] - torch.cdist(x[index], y[index]) ** 2 / 2
        marginal = (plan / 0.05**2).exp().sum(1) / ROWS**2
        assert (marginal - 1 / ROWS).abs().sum() < 1e-6


def test_one_cloud_belongs_to_all():
    x, y = _pair()
    references = y[0].clone().requires_grad_()
    values = sinkhorn_divergence(x, references, blur=0.3, x_weights=_weights(ROWS))
    expected = sinkhorn_divergence(x, y[:1].expand(COUNT, -1, -1), blur=0.3, x_weights=_weights(ROWS))
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=0)
    gradient = torch.autograd.grad(values.sum(), references)[0]
    alone = [_value_and_gradient(y[0], cloud, blur=0.3, y_weights=_weights(ROWS))[1] for cloud in x]
    torch.testing.assert_close(gradient, torch.stack(alone).sum(0), rtol=1e-3, atol=1e-5)
    turned = sinkhorn_divergence(references, x, blur=0.3, y_weights=_weights(ROWS))
    torch.testing.assert_close(turned, values, rtol=1e-6, atol=1e-8)


def test_the_options_of_the_divergence():
    x, y = _pair()
    pair = _clouds(COUNT, 9, WIDTH, seed=3)
    self_cost = self_transport_cost(y, blur=0.3)
    for options in ({"debias": False}, {"x_pair": pair}, {"x_pair": pair[0]}, {"y_self_cost": self_cost}):
        actual = sinkhorn_divergence(x, y, blur=0.3, **options)
        for index in range(COUNT):
            single = {name: v[index] if isinstance(v, Tensor) and len(v) == COUNT else v for name, v in options.items()}
            expected = sinkhorn_divergence(x[index], y[index], blur=0.3, **single)
            torch.testing.assert_close(actual[index], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("entries", [2 * ROWS * COLUMNS, 100])
def test_batches_that_do_not_fit_are_solved_in_parts(entries, monkeypatch):
    x, y = _pair()
    expected = _value_and_gradient(x, y, blur=0.5)
    potentials = self_potential(x, blur=0.5)
    monkeypatch.setattr(geometry, "MAX_DENSE_ENTRIES", entries)
    for actual, value in zip(_value_and_gradient(x, y, blur=0.5), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5)  # two solvers, each to 1e-5
    torch.testing.assert_close(self_potential(x, blur=0.5), potentials, rtol=1e-5, atol=1e-6)
    for actual in (sinkhorn_potentials(x, y, blur=0.5), divergence_gradient(x, y, blur=0.5)[1].cross):
        assert actual.f.shape == (COUNT, ROWS) and actual.g.shape == (COUNT, COLUMNS)


def test_the_gradient_for_loops_and_its_warm_start():
    x, y = _pair()
    field, potentials = divergence_gradient(x, y, blur=0.4, reach=3.0, x_weights=_weights(ROWS))
    expected = _value_and_gradient(x, y, blur=0.4, reach=3.0, x_weights=_weights(ROWS))[1]
    torch.testing.assert_close(field, expected, rtol=1e-6, atol=1e-9)
    options = {"blur": 0.4, "reach": 3.0, "x_weights": _weights(ROWS)}
    again, warm = divergence_gradient(x + 0.01, y, initial=potentials, **options)
    assert warm.iterations < potentials.iterations
    torch.testing.assert_close(again, divergence_gradient(x + 0.01, y, **options)[0], rtol=1e-3, atol=1e-4)
    _, shared = divergence_gradient(x[0], y, blur=0.4)
    assert shared.cross.f.shape == (COUNT, ROWS) and shared.self_potential.shape == (ROWS,)


def test_the_geomloss_backend_takes_batches():
    x, y = (cloud.float() for cloud in _pair())
    actual = sinkhorn_divergence(x, y[0], blur=0.5, scaling=0.9, backend="geomloss")
    alone = [sinkhorn_divergence(cloud, y[0], blur=0.5, scaling=0.9, backend="geomloss") for cloud in x]
    # geomloss starts all problems at the diameter of the largest.
    torch.testing.assert_close(actual, torch.stack(alone), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 2, 4, 3)}, "`x` must be a cloud of shape .* or clouds of shape .*, got .2, 2, 4, 3."),
        ({"x": torch.zeros(2, 0, 3)}, "`x` must hold at least one point"),
        ({"y": torch.zeros(3, 5, 3)}, "`y` must hold 2 clouds like `x`, or one for all, got .3, 5, 3."),
        ({"y": torch.zeros(2, 5, 2)}, "`y` must have 3 coordinates like `x`"),
        ({"x_weights": torch.ones(3, 4) / 4}, "`x_weights` must have shape .2, 4., got .3, 4."),
        ({"x_weights": torch.stack([torch.ones(4), torch.ones(4) / 4])}, "`x_weights` must sum to 1, got 4.0"),
        ({"y_weights": torch.ones(2, 5) / 5 - 0.2}, "`y_weights` must be positive"),
        ({"x_pair": torch.zeros(3, 4, 3)}, "`x_pair` must hold 2 clouds like `x`"),
    ],
)
def test_bad_batches_are_named(change, message):
    arguments = {"x": torch.zeros(2, 4, 3), "y": torch.ones(2, 5, 3), "blur": 0.1, **change}
    with pytest.raises(InputError, match=message):
        sinkhorn_divergence(arguments.pop("x"), arguments.pop("y"), **arguments)
