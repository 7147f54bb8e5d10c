"""Input checks. Checks that read a tensor's values are skipped on a GPU, where they would need a host–device
synchronisation, and in a compiled graph, where the values do not exist yet."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import require


def check_clouds(
    x: Tensor,
    y: Tensor,
    *,
    blur: float,
    scaling: float = 0.7,
    reach: float | None = None,
    names: tuple[str, str] = ("x", "y"),
) -> None:
    """Raise `InputError` for wrong shapes, empty or non-finite clouds, and lengths that are not positive."""
    for name, cloud in zip(names, (x, y), strict=True):
        shape = tuple(cloud.shape)
        require(cloud.ndim in (2, 3), name, "be a cloud of shape [N, D] or clouds of shape [P, N, D]", shape)
        require(0 not in shape[:-1], name, "hold at least one point", shape)
        require(cloud.is_floating_point(), name, "be a floating-point tensor", cloud.dtype)
        require(not is_readable(cloud) or is_finite(cloud), name, "be finite", "NaN or Inf")
    first, second = names
    require(x.shape[-1] == y.shape[-1], second, f"have {x.shape[-1]} coordinates like `{first}`", tuple(y.shape))
    fits = x.ndim == 2 or y.ndim == 2 or len(x) == len(y)
    require(fits, second, f"hold {len(x)} clouds like `{first}`, or one for all", tuple(y.shape))
    require(x.device == y.device, second, f"be on {x.device} like `{first}`", str(y.device))
    require(0 < blur < math.inf, "blur", "be a positive length", blur)
    require(0 < scaling < 1, "scaling", "lie strictly between 0 and 1", scaling)
    require(reach is None or 0 < reach < math.inf, "reach", "be a positive length or None", reach)


def check_iterations(num_iterations: int | None) -> None:
    """Raise `InputError` for a fixed number of iterations below 1."""
    require(num_iterations is None or num_iterations >= 1, "num_iterations", "be at least 1 or None", num_iterations)


def normalised_weights(weights: Tensor | None, points: Tensor, name: str) -> Tensor:
    """[..., N] `weights` of the points [..., N, D], divided by their sum, in the dtype of the points; uniform if
    None."""
    shape = points.shape[:-1]
    if weights is None:
        return points.new_full(shape, 1 / shape[-1])
    require(weights.shape in (shape, shape[-1:]), name, f"have shape {tuple(shape)}", tuple(weights.shape))
    weights = weights.detach().to(points)
    total = weights.sum(-1, keepdim=True)
    if is_readable(weights):
        least, smallest, largest = torch.stack([weights.min(), total.min(), total.max()]).tolist()
        require(least > 0, name, "be positive", least)
        for sum_of_weights in (smallest, largest):
            require(abs(sum_of_weights - 1) < 1e-3, name, "sum to 1", sum_of_weights)
    return (weights / total).expand(shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, from the minimum and the maximum: much faster than `isfinite().all()`."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def is_readable(tensor: Tensor) -> bool:
    """Whether the values can be read without a host–device synchronisation."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
