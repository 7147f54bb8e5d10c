"""Products of matrices in full precision, whatever the program around them has chosen for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
