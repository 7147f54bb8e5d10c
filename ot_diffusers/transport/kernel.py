"""Peers of the divergence that compare two clouds of points by a kernel: the maximum mean discrepancy (MMD), and the
field of drifting."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import half_squared_distances

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Widths of the Gaussian kernels, in the units of the points: median distance 1 for normalised features."""
TEMPERATURES = (0.02, 0.05, 0.2)
"""Lengths of the exponential kernels of drifting, in the same units."""


def mmd_displacement(x: Tensor, y: Tensor, y_weights: Tensor | None = None) -> Tensor:
    """N times the gradient of MMD²(x, y) with respect to x, [N, D]; points that step against it come closer to y.

    The kernel is Σ_h h² k_h(x, y) over the `BANDWIDTHS`, k_h(x, y) = exp(−‖x − y‖²/2h²). The factor h² makes every term
    a mean shift, of the length of a displacement:

        d_i = 2 Σ_h [ mean_j k_h(x_i, y_j) (x_i − y_j) − mean_j k_h(x_i, x_j) (x_i − x_j) ]

    Args:
        x: [N, D], points that move.
        y: [M, D], references.
        y_weights: [M], their weights, which sum to 1 (uniform by default); means over y are weighted by them.

    Reference: [Sani2026] for guidance by the MMD.

    Example:
        >>> mmd_displacement(torch.zeros(1, 1), torch.ones(1, 1)).item() < 0  # stepping against it leads towards y
        True
    """
    return 2 * (_shift(x, y, y_weights) - _shift(x, x))


def _shift(x: Tensor, y: Tensor, y_weights: Tensor | None = None) -> Tensor:
    """Σ_h mean_j exp(−‖x_i − y_j‖²/2h²) (x_i − y_j)."""
    costs = half_squared_distances(x, y)
    kernels = torch.stack([torch.exp(-costs / width**2) for width in BANDWIDTHS]).sum(0)
    weights = kernels / len(y) if y_weights is None else kernels * y_weights
    return weights.sum(1, keepdim=True) * x - weights @ y


def squared_mmd(x: Tensor, y: Tensor, *, x_pair: Tensor | None = None) -> Tensor:
    """MMD²(x, y) by the kernel of `mmd_displacement`, up to the constant of y; 0-d, with a gradient for x.

    Args:
        x: [N, D].
        y: [M, D], references.
        x_pair: [K, D], a second sample from the distribution of x, which makes the estimate unbiased; x itself if None.

    Reference: [Feng2026] for finished images.
    """
    pair = x if x_pair is None else x_pair.detach()
    own, cross = _mean_kernel(x, pair), _mean_kernel(x, y)
    # The gradient of E k(x, x') is twice that for one argument where the other is held.
    return (own if x_pair is None else 2 * own - own.detach()) - 2 * cross


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The mean of Σ_h h² exp(−‖x − y‖²/2h²) over all pairs."""
    costs = half_squared_distances(x, y)
    return torch.stack([width**2 * torch.exp(-costs / width**2).mean() for width in BANDWIDTHS]).sum()


def drifting_loss(x: Tensor, y: Tensor, *, x_pair: Tensor) -> Tensor:
    """Mean squared distance of points to where they drift, ‖x − stopgrad(x + V)‖²; 0-d, with a gradient for x.

    V is the sum of the fields `drift` of all `TEMPERATURES`, each divided by its root mean square length. The value
    therefore says little of the distance between the clouds; its gradient leads x along V.

    Args:
        x: [N, D].
        y: [M, D], references.
        x_pair: [K, D], a second sample from the distribution of x, from which x is repelled.

    Reference: [Deng2026], with the kernels normalised over y and over x' alone, and x' independent of x.
    """
    fields = [drift(x.detach(), y, x_pair.detach(), temperature) for temperature in TEMPERATURES]
    lengths = [field.square().sum(1).mean().sqrt().clamp(min=torch.finfo(field.dtype).tiny) for field in fields]
    goal = x.detach() + sum(field / length for field, length in zip(fields, lengths, strict=True))
    return (x - goal).square().sum(1).mean()


def drift(x: Tensor, y: Tensor, x_pair: Tensor, temperature: float) -> Tensor:
    """Attraction of points to references minus repulsion from other points of their kind, [N, D].

        V(x) = Σ_j p_j y_j − Σ_k q_k x'_k,   p = softmax_j(−‖x − y_j‖/τ),  q = softmax_k(−‖x − x'_k‖/τ)

    Its mean is zero where x' and y are equally many points of one distribution.

    Args:
        x: [N, D], points that move.
        y: [M, D], references.
        x_pair: [K, D], points that repel.
        temperature: τ, a length.

    Reference: [Deng2026].

    Example:
        >>> drift(torch.zeros(1, 1), torch.ones(1, 1), -torch.ones(1, 1), 0.2).item()
        2.0
    """
    return _barycentres(x, y, temperature) - _barycentres(x, x_pair, temperature)


def _barycentres(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    distances = (2 * half_squared_distances(x, y)).sqrt()
    return torch.softmax(-distances / temperature, dim=1) @ y
