"""Numerical precision of a transport problem: float32 where it resolves the problem, otherwise float64, and matrix
products in full precision whatever autocast and TF32 settings the calling program has."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import require

# Rounding errors of the costs are proportional to the squared radius of the clouds. Up to this ratio of radius to blur
# they stay below .005 eps, with the 24 significant bits of float32 and the 53 bits of float64.
MAX_BLURS = {torch.float32: 2.0**7.5, torch.float64: 2.0**22}
# Above this ratio of blur to radius the divergence is a small difference of numbers near eps, which needs float64.
LARGE_BLUR = 2.0
# Beyond these limits the solution changes by less than a relative 1e-8, and lengths are clipped: blur above so many
# radii, reach below this ratio to blur, and reach above this ratio to blur, where transport is balanced.
MAX_RADII, SMALLEST_REACH, LARGEST_REACH = 1e4, 1e-4, 1e12
# Below this ratio of reach to blur the marginals depend on digits of the potentials that float32 cannot represent.
SMALL_REACH = 0.03
# Range of the lengths whose squares, and sums of squares, the dtype can represent.
LENGTHS = {torch.float32: (1e-15, 1e15), torch.float64: (1e-145, 1e145)}


def result_dtype(*clouds: Tensor) -> torch.dtype:
    """float64 if one of the clouds is, float32 otherwise."""
    return functools.reduce(torch.promote_types, (cloud.dtype for cloud in clouds), torch.float32)


def resolve(
    clouds: Sequence[Tensor], blur: float, reach: float | None, *, may_read_values: bool
) -> tuple[torch.dtype, float, float | None]:
    """The dtype that solves a problem to the documented tolerance, and blur and reach clipped to what it resolves.

    Clipping does not change the solution, except that a blur too small even for float64 is raised, with a warning.

    Args:
        clouds: [..., N, D] each; all costs are between points of these clouds.
        blur, reach: the lengths that the user chose.
        may_read_values: whether the values of the clouds may be read; otherwise the dtype follows from blur and reach.

    Raises:
        InputError: points or a blur whose squares no dtype can represent.
    """
    dtype, has_float64 = result_dtype(*clouds), clouds[0].device.type != "mps"  # Apple's GPUs lack float64
    radius = largest_radius(clouds, dtype) if may_read_values and has_float64 else None
    if radius == 0:  # all points coincide, so that no length matters
        return dtype, 1.0, None
    low, high = LENGTHS[torch.float64]
    if radius is not None:
        require(low < radius < high, "points", f"be finite, with distances between {low:g} and {high:g}", radius)
        smallest = radius / MAX_BLURS[torch.float64]
        if blur < smallest:
            warnings.warn(
                f"blur {blur:.3g} is too small for float64 with points {radius:.3g} apart; {smallest:.3g} is used "
                "instead: raise blur, or look for outliers",
                stacklevel=3,
            )
        blur = min(max(blur, smallest), MAX_RADII * radius)
    require(low < blur < high, "blur", f"lie between {low:g} and {high:g}", blur)
    if reach is not None:
        reach = None if reach > LARGEST_REACH * blur else max(reach, SMALLEST_REACH * blur)
    is_narrow = _is_resolved(radius, blur, reach) or not has_float64
    return (dtype if is_narrow else torch.float64), blur, reach


def _is_resolved(radius: float | None, blur: float, reach: float | None) -> bool:
    """Whether float32 resolves the problem."""
    low, high = LENGTHS[torch.float32]
    if not all(low < length < high for length in (radius, blur, reach) if length is not None):
        return False
    if reach is not None and reach < SMALL_REACH * blur:
        return False
    return radius is None or (blur < LARGE_BLUR * radius and radius < MAX_BLURS[torch.float32] * blur)


def largest_radius(clouds: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest distance of a point of any cloud from the centre of the last one."""
    low, high = LENGTHS[dtype]
    centre = clouds[-1].to(dtype).mean(-2, keepdim=True)
    offsets = [cloud.to(dtype) - centre for cloud in clouds]
    radius = torch.stack([torch.linalg.vector_norm(offset, dim=-1).amax() for offset in offsets]).amax().item()
    if low < radius < high or not centre.numel():
        return radius
    if dtype != torch.float64:
        return largest_radius(clouds, torch.float64)
    return max(offset.abs().amax().item() for offset in offsets)  # zero, or its square is not representable


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the dtype of the clouds; an error if this dtype cannot represent it."""
    if value.dtype == dtype:
        return value
    narrow = value.to(dtype)
    is_held = narrow.device.type != "cpu" or bool(narrow.isfinite().all())
    require(is_held, "points", f"have a transport cost that {dtype} can represent", f"{value.abs().max().item():.3g}")
    return narrow


@contextmanager
def full_precision(points: Tensor) -> Iterator[None]:
    """Context without autocast and TF32, whose rounding errors of the costs exceed a typical eps.

    A compiled graph cannot switch TF32 off; there `matmul` and `weighted_rows` avoid it.
    """
    with torch.autocast(device_type=points.device.type, enabled=False):
        if torch.compiler.is_compiling():
            yield
            return
        matmul = torch.backends.cuda.matmul
        # The newer of torch's two switches is used where it exists: the older one raises an error once a program has
        # set the newer one.
        switch, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        before = getattr(matmul, switch)
        setattr(matmul, switch, off)
        try:
            yield
        finally:
            setattr(matmul, switch, before)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right. A compiled graph on a GPU cannot switch TF32 off and computes the product in float64."""
    if torch.compiler.is_compiling() and left.is_cuda:
        return (left.double() @ right.double()).to(left.dtype)
    return left @ right


def subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """matrix − left @ right, for matrices or batches of matrices; `matrix` may be overwritten."""
    if torch.compiler.is_compiling():
        return matrix - matmul(left, right)
    return (matrix.addmm_ if matrix.ndim == 2 else matrix.baddbmm_)(left, right, alpha=-1)


def weighted_rows(weights: Tensor, matrix: Tensor) -> Tensor:
    """Σ_i w_i M_ij, [P, M], for weights [P, N] and matrices [P, N, M].

    On a CPU, a row vector times a batch of matrices is many times faster than a batch of matrices times a column.
    """
    if torch.compiler.is_compiling():
        return (weights[..., None] * matrix).sum(-2)  # one fused kernel, without a product that TF32 could round
    return torch.bmm(weights[:, None], matrix)[:, 0]


def weighted_columns(matrix: Tensor, weights: Tensor) -> Tensor:
    """Σ_j M_ij w_j, [P, N]."""
    return weighted_rows(weights, matrix.mT)
