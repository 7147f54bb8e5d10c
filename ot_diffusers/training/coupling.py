"""Noise–image couplings: which noise an image is taken to, so that images do not compete for it.

A denoiser learns E[ε | x_t] however noise and images are paired; pairs that are close to each other leave it less to
average over. Sampling stays as it is: it starts from independent noise.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..config import DiffusionConfig
from ..transport.geometry import half_squared_distances


def coupled_noise(
    clean: Tensor, noise: Tensor, part: slice, config: DiffusionConfig, generator: torch.Generator
) -> Tensor:
    """The noise of a process' images [B, C, H, W], out of the draw [N, C, H, W] for all, by the run's coupling."""
    match config.noise_coupling:
        case "assignment":
            return assigned_noise(clean, noise[part])
        case "nearest":
            shape = (config.noise_candidates - 1, *noise.shape)
            others = torch.randn(shape, generator=generator, device=noise.device)
            return nearest_noise(clean, torch.cat([noise[None], others])[:, part])
    return noise[part]


def assigned_noise(clean: Tensor, noise: Tensor) -> Tensor:
    """The rows of `noise` in the order of the optimal transport from images to noise, for ‖x0 − ε‖².

    The noise of a batch stays Gaussian; only who gets which changes.

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


def nearest_noise(clean: Tensor, candidates: Tensor) -> Tensor:
    """For each image the nearest of its own candidates: a coupling that no other image takes part in.

    Args:
        clean: [B, C, H, W] in [-1, 1].
        candidates: [K, B, C, H, W].

    Returns:
        [B, C, H, W].

    Reference: [Li2025], the coupling by nearest neighbours.

    Example:
        >>> candidates = torch.tensor([[[-2.0], [0.5]], [[0.5], [-2.0]]])
        >>> nearest_noise(torch.tensor([[1.0], [-1.0]]), candidates).flatten()
        tensor([ 0.5000, -2.0000])
    """
    distances = (candidates - clean).flatten(2).square().sum(dim=2)
    return candidates[distances.argmin(dim=0), torch.arange(len(clean), device=clean.device)]
