"""Sliced Wasserstein distances: optimal transport along random lines, where sorting solves it.

    SW(x, y) = E_θ ½ W₂²(⟨x, θ⟩, ⟨y, θ⟩),   θ uniform on the unit sphere

The cost is ½(a − b)² as everywhere in this package, so the distance between two clouds that differ by a translation m
in D dimensions is ‖m‖² / (2D).

References: [Bonneel2015]; for patches [Elnekave2022].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from .checks import is_readable
from .precision import LENGTHS, largest_radius, narrowed, result_dtype

# If the coordinates exceed the radius of the cloud by this factor, float32 leaves too little precision for the cloud.
LARGE_OFFSET = 100.0


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    num_projections: int = 256,
    orthogonal: bool = False,
    projections: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over directions of the one-dimensional transport cost ½ W₂² between two clouds.

    Exact on each line for clouds of any two sizes. Memory is O((N + M) · num_projections), never N × M. Half-precision
    input is projected and sorted in float32. Flatten images first; on features this is a distance in feature space.

    Args:
        x: cloud, [N, D]. The gradient flows to `x` and `y`.
        y: cloud, [M, D].
        num_projections: number of random directions.
        orthogonal: draw the directions in orthogonal blocks of D, which lowers the variance.
        projections: unit directions [K, D] to use in place of random ones.
        generator: random generator of the directions.

    Returns:
        Scalar ≥ 0, in squared units of the data.

    Example:
        >>> x = torch.zeros(4, 2)
        >>> round(sliced_wasserstein(x, x + 2, num_projections=2, orthogonal=True).item(), 4)  # ‖m‖² / (2D) = 8 / 4
        2.0

    Reference: [Bonneel2015].
    """
    for name, cloud in (("x", x), ("y", y)):
        require(cloud.ndim == 2 and len(cloud) > 0, name, "have shape [N, D] with N ≥ 1", tuple(cloud.shape))
        require(cloud.is_cuda or bool(cloud.isfinite().all()), name, "be finite", "NaN or Inf")
    require(x.shape[1] == y.shape[1], "y", f"have {x.shape[1]} columns like `x`", y.shape[1])
    dtype = result_dtype(x, y)
    x, y = (cloud.to(_resolving_dtype(x, y)) for cloud in (x, y))
    if projections is None:
        projections = random_directions(
            num_projections, x.shape[1], orthogonal=orthogonal, generator=generator, device=x.device, dtype=x.dtype
        )
    matched = projections.ndim == 2 and projections.shape[1] == x.shape[1]
    require(matched, "projections", f"have shape [K, {x.shape[1]}]", tuple(projections.shape))
    with torch.autocast(x.device.type, enabled=False):
        projections = projections.to(x)
        return narrowed(transport_on_lines(projections @ x.T, projections @ y.T), dtype)


def patch_sliced_wasserstein(
    images: Tensor,
    reference: Tensor,
    *,
    patch_sizes: tuple[int, ...] = (3, 7),
    stride: int | None = None,
    per_position: bool = False,
    num_projections: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sliced Wasserstein distance between the patches of two sets of images, averaged over patch sizes.

    A direction in the space of p × p patches is a random convolution filter of unit norm: filtering projects every
    patch at once.

    Args:
        images: [N, C, H, W]. The gradient flows to `images` and `reference`.
        reference: [M, C, H, W].
        patch_sizes: widths p of the patches in pixels.
        stride: distance between neighbouring patches in pixels; half a patch by default.
        per_position: compare the patches of each position with those of the same position, instead of all patches as
            one cloud. The distance then depends on where things are, and costs less because the sorts are shorter.
        num_projections: random filters for each patch size.
        generator: random generator of the filters.

    Returns:
        Scalar ≥ 0; a shift of every pixel by c costs c² / 2 on average, for any patch size.

    Reference: [Elnekave2022].
    """
    for name, batch in (("images", images), ("reference", reference)):
        require(batch.ndim == 4 and len(batch) > 0, name, "have shape [N, C, H, W] with N ≥ 1", tuple(batch.shape))
    require(
        images.shape[1:] == reference.shape[1:], "reference", f"hold images {images.shape[1:]}", reference.shape[1:]
    )
    largest = min(images.shape[2:])
    fits = bool(patch_sizes) and all(1 <= size <= largest for size in patch_sizes)
    require(fits, "patch_sizes", f"hold sizes from 1 to {largest}", patch_sizes)
    images, reference = _full_precision(images), _full_precision(reference)
    channels = images.shape[1]
    losses = []
    for size in patch_sizes:
        directions = random_directions(
            num_projections, channels * size * size, generator=generator, device=images.device, dtype=images.dtype
        )
        filters = directions.view(num_projections, channels, size, size)
        step = stride or max(1, size // 2)
        projected = [_project_patches(batch, filters, step, per_position) for batch in (images, reference)]
        losses.append(transport_on_lines(*projected))
    return torch.stack(losses).mean()


def random_directions(
    num_projections: int,
    dim: int,
    *,
    orthogonal: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Directions uniform on the unit sphere, [num_projections, dim]; `orthogonal` ones form bases of `dim` rows each.

    They are drawn on the generator's device, so a CPU generator gives the same directions on every device.
    """
    require(num_projections >= 1, "num_projections", "be at least 1", num_projections)
    source = generator.device if generator is not None else device
    if not orthogonal:
        gaussian = torch.randn(num_projections, dim, generator=generator, device=source, dtype=dtype)
        return torch.nn.functional.normalize(gaussian, dim=1).to(device)
    blocks = []
    for _ in range(0, num_projections, dim):
        gaussian = torch.randn(dim, dim, generator=generator, device=source, dtype=dtype)
        blocks.append(torch.linalg.qr(gaussian).Q.mT)  # a column's sign is not uniform; costs are the same for −θ
    return torch.cat(blocks)[:num_projections].to(device)


def _resolving_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """float32 if it can represent the squared distances and resolve the points despite their offset; else float64."""
    dtype = result_dtype(x, y)
    if not (is_readable(x) and is_readable(y)) or dtype == torch.float64:
        return dtype
    low, high = LENGTHS[dtype]
    radius = largest_radius((x, y), dtype)
    farthest = max(cloud.abs().max().item() for cloud in (x, y)) if x.numel() else 0.0
    return dtype if radius == 0 or (low < radius < high and farthest < LARGE_OFFSET * radius) else torch.float64


def _project_patches(images: Tensor, filters: Tensor, stride: int, per_position: bool) -> Tensor:
    """Projections of every patch on every filter: [K, N · positions], or [K · positions, N] with `per_position`."""
    with torch.autocast(images.device.type, enabled=False):
        response = torch.nn.functional.conv2d(images, filters, stride=stride).flatten(2)  # [N, K, positions]
    return response.permute(1, 2, 0).flatten(0, 1) if per_position else response.transpose(0, 1).flatten(1)


def transport_on_lines(x: Tensor, y: Tensor) -> Tensor:
    """Mean over the lines [K, N] and [K, M] of ½ ∫ (F_x⁻¹(u) − F_y⁻¹(u))² du, by sorting."""
    x, y = x.sort(dim=1).values, y.sort(dim=1).values
    if x.shape[1] == y.shape[1]:
        return (x - y).square().mean() / 2
    index_x, index_y, weight = _quantile_pairs(x.shape[1], y.shape[1], x.device)
    squared = (x[:, index_x] - y[:, index_y]).square()
    return (squared @ weight.to(squared)).mean() / 2


def _quantile_pairs(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal plan between n and m sorted points of equal mass: pairs and their masses, at most n + m − 1.

    Both quantile functions are constant between the breakpoints i/n and j/m, here integers in units of 1/(nm).
    """
    breakpoints = torch.cat([torch.arange(n + 1, device=device) * m, torch.arange(m + 1, device=device) * n]).unique()
    start, length = breakpoints[:-1], breakpoints.diff()
    return start // m, start // n, length.double() / (n * m)


def _full_precision(x: Tensor) -> Tensor:
    """float64 as it is, every lower precision as float32."""
    return x if x.dtype == torch.float64 else x.float()
