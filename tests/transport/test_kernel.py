"""The kernel discrepancy that guidance can follow in place of the Sinkhorn divergence."""

from __future__ import annotations

import torch
from makers.draws import cloud
from torch import Tensor

from ot_diffusers.transport.kernel import BANDWIDTHS, mmd_displacement


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
