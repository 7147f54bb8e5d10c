"""Noise–image couplings: the noise that an image is paired with in training.

A denoiser learns E[ε | x_t] for every pairing of noise and images. If pairs are close to each other, ε varies less
given x_t. Sampling does not change: it starts from independent noise.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..transport.geometry import half_squared_distances


def assigned_noise(clean: Tensor, noise: Tensor) -> Tensor:
    """The rows of `noise` in the order of the optimal transport from images to noise, for ‖x0 − ε‖².

    The noise of a batch stays Gaussian; only the pairing changes.

    Args:
        clean: [B, C, H, W] in [-1, 1].
        noise: [B, C, H, W].

    Returns:
        [B, C, H, W]. The assignment is solved on the CPU.

    Reference: [Li2024]; [Tong2024] for flow matching.

    Example:
        >>> assigned_noise(torch.tensor([[1.0], [-1.0]]), torch.tensor([[-2.0], [0.5]])).flatten()
        tensor([ 0.5000, -2.0000])
    """
    costs = half_squared_distances(clean.flatten(1).float(), noise.flatten(1).float())
    _, columns = linear_sum_assignment(costs.cpu().numpy())
    return noise[torch.as_tensor(columns, device=noise.device)]
