"""The kernel discrepancy that guidance can follow in place of the Sinkhorn divergence, and the field of drifting."""

from __future__ import annotations

import pytest
import torch
from makers.draws import cloud
from torch import Tensor

from ot_diffusers.transport.kernel import BANDWIDTHS, TEMPERATURES, drift, drifting_loss, mmd_displacement


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    def mean_kernel(one: Tensor, other: Tensor) -> Tensor:
        squared = (one[:, None] - other[None]).square().sum(-1)
        return sum(width**2 * torch.exp(-squared / (2 * width**2)).mean() for width in BANDWIDTHS)

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def test_the_displacement_is_the_gradient_of_the_discrepancy() -> None:
    x, y = cloud(7, 3).requires_grad_(), cloud(11, 3, seed=1, shift=0.5)
    (gradient,) = torch.autograd.grad(_squared_mmd(x, y), x)
    torch.testing.assert_close(mmd_displacement(x.detach(), y), len(x) * gradient)


def test_equal_clouds_stay() -> None:
    x = cloud(9, 2)
    torch.testing.assert_close(mmd_displacement(x, x.flip(0)), torch.zeros_like(x))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_distributions_do_not_drift_in_the_mean(temperature: float) -> None:
    x = cloud(20, 2)
    draws = [drift(x, cloud(30, 2, seed=2 * i), cloud(30, 2, seed=2 * i + 1), temperature) for i in range(1, 201)]
    fields = torch.stack(draws)
    scores = fields.mean(0) / (fields.std(0) / len(fields) ** 0.5)
    # Of 40 standard normal scores, the largest exceeds 4 once in 400 times, and their mean square is 1 ± .22.
    assert scores.abs().max() < 4 and 0.3 < scores.square().mean() < 1.7


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_drift_leads_from_generated_to_real_points(temperature: float) -> None:
    x, other, real = cloud(20, 2), cloud(30, 2, seed=1), cloud(30, 2, seed=2, shift=10.0)
    field = drift(x, real, other, temperature)
    assert (field > 0).all()
    torch.testing.assert_close(drift(x, other, real, temperature), -field)
    # The nearest real point for a kernel much shorter than all distances, their mean for a longer one.
    nearest = real[torch.cdist(x, real).argmin(1)] - other[torch.cdist(x, other).argmin(1)]
    torch.testing.assert_close(drift(x, real, other, 1e-6), nearest)
    torch.testing.assert_close(drift(x, real, other, 1e9), (real.mean(0) - other.mean(0)).expand(20, 2))


def test_the_drifting_loss_leads_along_its_field() -> None:
    x, other, real = cloud(20, 2).requires_grad_(), cloud(30, 2, seed=1), cloud(30, 2, seed=2, shift=1.0)
    (gradient,) = torch.autograd.grad(drifting_loss(x, real, x_pair=other), x)
    fields = [drift(x.detach(), real, other, temperature) for temperature in TEMPERATURES]
    # Each field counts alike: divided by its root mean square length.
    along = sum(field * (20**0.5 / field.norm()) for field in fields)
    torch.testing.assert_close(gradient, -2 * along / 20)
