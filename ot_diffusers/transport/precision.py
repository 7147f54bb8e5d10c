"""The precision of a transport problem: float32 where that resolves it, float64 where it does not, and products of
matrices in full precision, whatever the program around them has chosen for its own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import require

# Costs are rounded to a share of the squared radius of the clouds. Up to so many blurs that is below .005 eps: for
# float32 24 bits of precision, for float64 53.
MAX_BLURS = {torch.float32: 2.0**7.5, torch.float64: 2.0**22}
# Above so many radii the value of the divergence is a small difference of numbers near eps: float64.
LARGE_BLUR = 2.0
# The solution does not change, to a share of 1e-8, where blur grows above so many radii, reach shrinks below this share
# of blur, or reach grows above so many blurs, where mass is conserved.
MAX_RADII, SMALLEST_REACH, LARGEST_REACH = 1e4, 1e-4, 1e12
# Below this share of blur the marginals depend on digits of the potentials that float32 does not have.
SMALL_REACH = 0.03
# Lengths whose squares are numbers of the type, with room for sums of them.
LENGTHS = {torch.float32: (1e-15, 1e15), torch.float64: (1e-145, 1e145)}


def result_dtype(*clouds: Tensor) -> torch.dtype:
    """float64 if one of the clouds is, float32 otherwise."""
    return functools.reduce(torch.promote_types, (cloud.dtype for cloud in clouds), torch.float32)


def resolve(
    clouds: Sequence[Tensor], blur: float, reach: float | None, *, looks: bool
) -> tuple[torch.dtype, float, float | None]:
    """The type in which a problem between clouds is solved to the documented tolerance, and its lengths, each moved to
    where the solution stays the same and the type resolves it.

    Args:
        clouds: [..., N, D] each; all costs are between two of them.
        blur, reach: as they were given.
        looks: whether the values of the clouds may be read. Where not, the type follows from blur and reach alone.

    Raises:
        InputError: points or a blur whose squares no type holds.
    """
    dtype, has_float64 = result_dtype(*clouds), clouds[0].device.type != "mps"  # Apple's GPUs lack it
    radius = largest_radius(clouds, dtype) if looks and has_float64 else None
    if radius == 0:  # all points are one, and no length matters
        return dtype, 1.0, None
    low, high = LENGTHS[torch.float64]
    if radius is not None:
        require(low < radius < high, "points", f"be finite, at distances between {low:g} and {high:g}", radius)
        smallest = radius / MAX_BLURS[torch.float64]
        if blur < smallest:
            warnings.warn(
                f"blur {blur:.3g} is below what float64 resolves between points {radius:.3g} apart, and {smallest:.3g} "
                "is taken: raise blur, or look for outliers",
                stacklevel=3,
            )
        blur = min(max(blur, smallest), MAX_RADII * radius)
    require(low < blur < high, "blur", f"lie between {low:g} and {high:g}", blur)
    if reach is not None:
        reach = None if reach > LARGEST_REACH * blur else max(reach, SMALLEST_REACH * blur)
    is_narrow = _is_resolved(radius, blur, reach) or not has_float64
    return (dtype if is_narrow else torch.float64), blur, reach


def _is_resolved(radius: float | None, blur: float, reach: float | None) -> bool:
    """Whether float32 does."""
    low, high = LENGTHS[torch.float32]
    if not all(low < length < high for length in (radius, blur, reach) if length is not None):
        return False
    if reach is not None and reach < SMALL_REACH * blur:
        return False
    return radius is None or (blur < LARGE_BLUR * radius and radius < MAX_BLURS[torch.float32] * blur)


def largest_radius(clouds: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest distance of a point from the centre of the last cloud."""
    low, high = LENGTHS[dtype]
    centre = clouds[-1].to(dtype).mean(-2, keepdim=True)
    offsets = [cloud.to(dtype) - centre for cloud in clouds]
    radius = torch.stack([torch.linalg.vector_norm(offset, dim=-1).amax() for offset in offsets]).amax().item()
    if low < radius < high or not centre.numel():
        return radius
    if dtype != torch.float64:
        return largest_radius(clouds, torch.float64)
    return max(offset.abs().amax().item() for offset in offsets)  # zero, or a length whose square is no number


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value in the type of the clouds, which may have been too narrow for the way to it."""
    if value.dtype == dtype:
        return value
    narrow = value.to(dtype)
    is_held = narrow.device.type != "cpu" or bool(narrow.isfinite().all())
    require(is_held, "points", f"have a transport cost that {dtype} holds", f"{value.abs().max().item():.3g}")
    return narrow


@contextmanager
def full_precision(points: Tensor) -> Iterator[None]:
    """Neither autocast nor TF32 inside: their rounding of the costs is larger than a typical eps.

    A compiled graph cannot switch TF32; there `matmul` and `weighted_rows` keep it out.
    """
    with torch.autocast(device_type=points.device.type, enabled=False):
        if torch.compiler.is_compiling():
            yield
            return
        matmul = torch.backends.cuda.matmul
        # Where the newer of torch's two switches exists it is read: the older one raises once a program has set the
        # newer.
        switch, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        before = getattr(matmul, switch)
        setattr(matmul, switch, off)
        try:
            yield
        finally:
            setattr(matmul, switch, before)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; in a compiled graph on a GPU, where TF32 cannot be switched off, by way of float64."""
    if torch.compiler.is_compiling() and left.is_cuda:
        return (left.double() @ right.double()).to(left.dtype)
    return left @ right


def subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """matrix − left @ right, of matrices or batches of them, in the place of the first."""
    if torch.compiler.is_compiling():
        return matrix - matmul(left, right)
    return (matrix.addmm_ if matrix.ndim == 2 else matrix.baddbmm_)(left, right, alpha=-1)


def weighted_rows(weights: Tensor, matrix: Tensor) -> Tensor:
    """Σ_i w_i M_ij, [P, M], for weights [P, N] and matrices [P, N, M].

    A row vector times a batch of matrices is many times faster on a CPU than a batch of matrices times a column.
    """
    if torch.compiler.is_compiling():
        return (weights[..., None] * matrix).sum(-2)  # fused into one kernel, and no product that TF32 could round
    return torch.bmm(weights[:, None], matrix)[:, 0]


def weighted_columns(matrix: Tensor, weights: Tensor) -> Tensor:
    """Σ_j M_ij w_j, [P, N]."""
    return weighted_rows(weights, matrix.mT)
