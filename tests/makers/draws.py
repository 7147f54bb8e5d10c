"""Random numbers that are the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def cloud(*shape: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Standard normal points in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator for each image of a batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
