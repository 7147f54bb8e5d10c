"""The three ranges an image lives in, and the only place that converts between them.

Stored images are uint8 in 0 … 255, diffusion models work in [-1, 1], feature networks and saved pictures in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images 0 … 255, any shape, as float32 in [-1, 1]: x / 127.5 − 1.

    Example:
        >>> to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    return images.to(torch.float32) / 127.5 - 1


def to_unit_range(images: Tensor) -> Tensor:
    """Float images from [-1, 1] to [0, 1], values outside clamped. Gradients flow where nothing is clamped.

    Example:
        >>> to_unit_range(torch.tensor([-1.0, 0.0, 1.5]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (images / 2 + 0.5).clamp(0, 1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images from [-1, 1] to uint8 0 … 255, rounded as in the pictures that diffusers' pipelines return.

    The inverse of `to_model_range`: every one of the 256 values comes back.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.5, 1.0]))
        tensor([  0, 191, 255], dtype=torch.uint8)
    """
    return (to_unit_range(images.float()) * 255).round().to(torch.uint8)
