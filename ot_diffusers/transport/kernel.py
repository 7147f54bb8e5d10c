"""Kernel discrepancy between two clouds of points: the maximum mean discrepancy (MMD), as a peer of the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import half_squared_distances

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Widths of the Gaussian kernels, in the units of the points: median distance 1 for normalised features."""


def mmd_displacement(x: Tensor, y: Tensor) -> Tensor:
    """N times the gradient of MMD²(x, y) with respect to x, [N, D]; points that step against it come closer to y.

    The kernel is Σ_h h² k_h(x, y) over the `BANDWIDTHS`, k_h(x, y) = exp(−‖x − y‖²/2h²). The factor h² makes every term
    a mean shift, of the length of a displacement:

        d_i = 2 Σ_h [ mean_j k_h(x_i, y_j) (x_i − y_j) − mean_j k_h(x_i, x_j) (x_i − x_j) ]

    Args:
        x: [N, D], points that move.
        y: [M, D], references.

    Reference: [Sani2026] for guidance by the MMD.

    Example:
        >>> mmd_displacement(torch.zeros(1, 1), torch.ones(1, 1)).item() < 0  # stepping against it leads towards y
        True
    """
    return 2 * (_shift(x, y) - _shift(x, x))


def _shift(x: Tensor, y: Tensor) -> Tensor:
    """Σ_h mean_j exp(−‖x_i − y_j‖²/2h²) (x_i − y_j)."""
    costs = half_squared_distances(x, y)
    weights = torch.stack([torch.exp(-costs / width**2) for width in BANDWIDTHS]).sum(0) / len(y)
    return weights.sum(1, keepdim=True) * x - weights @ y


def squared_mmd(x: Tensor, y: Tensor, *, x_pair: Tensor | None = None) -> Tensor:
    """MMD²(x, y) by the kernel of `mmd_displacement`, up to the constant of y; 0-d, with a gradient for x.

    Args:
        x: [N, D].
        y: [M, D], references.
        x_pair: [K, D], a second sample from the distribution of x, which makes the estimate unbiased; x itself if None.
    """
    pair = x if x_pair is None else x_pair.detach()
    own, cross = _mean_kernel(x, pair), _mean_kernel(x, y)
    # The gradient of E k(x, x') is twice that for one argument where the other is held.
    return (own if x_pair is None else 2 * own - own.detach()) - 2 * cross


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The mean of Σ_h h² exp(−‖x − y‖²/2h²) over all pairs."""
    costs = half_squared_distances(x, y)
    return torch.stack([width**2 * torch.exp(-costs / width**2).mean() for width in BANDWIDTHS]).sum()
