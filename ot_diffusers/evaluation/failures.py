"""The samples that are furthest from every real image, with the real images nearest to them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from .evaluate import ImageSet
from .metrics import nearest_distances


def worst_samples(images: ImageSet, reference: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """The `count` generated images with the largest distance to their nearest real one, worst first.

    `metrics.precision_distance` is the mean of these distances over all images.

    Args:
        images: generated.
        reference: real.
        count: number of samples, from 1 to the number of generated images.

    Returns:
        The images and, in the same order, the real image nearest to each, both uint8 [count, C, H, W].
    """
    require(1 <= count <= len(images), "count", f"lie in 1 … {len(images)}", count)
    rows = nearest_distances(images.features, reference.features).topk(count).indices
    nearest = torch.cdist(images.features[rows], reference.features).argmin(dim=1)
    return images.images[rows], reference.images[nearest]
