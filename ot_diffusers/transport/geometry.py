"""Costs ½‖x − y‖² between two point clouds, stored where they fit in memory, and two statistics of one cloud: its
median pairwise distance and its effective rank."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import require
from .precision import matmul, subtract_product

# Above this number of entries no N×M matrix is stored: costs are recomputed block by block.
MAX_DENSE_ENTRIES = 2**25
# Entries of one block: few enough for the caches of a CPU, many enough to keep a GPU busy.
BLOCK_ENTRIES = {"cpu": 2**22, "cuda": 2**25}


def half_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """½‖x_i − y_j‖², [..., N, M], never negative."""
    halves = (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]) / 2
    return subtract_product(halves, x, y.mT).clamp_(min=0)


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds, translated so that `y` has mean zero: costs do not change and rounding errors shrink."""
    mean = y.mean(-2, keepdim=True)
    return x - mean, y - mean


class Cost:
    """½‖x_i − y_j‖² between two clouds [..., N, D] and [..., M, D], stored as one matrix where it fits in memory,
    otherwise recomputed in blocks of rows."""

    def __init__(self, x: Tensor, y: Tensor, matrix: Tensor | None = None) -> None:
        self.x, self.y = x, y
        fits = x.shape[-2] * y.shape[-2] <= MAX_DENSE_ENTRIES
        self._matrix = half_squared_distances(x, y) if matrix is None and fits else matrix

    @property
    def is_dense(self) -> bool:
        """Whether the cost matrix is stored."""
        return self._matrix is not None

    @property
    def matrix(self) -> Tensor:
        """The stored cost matrix, [..., N, M]; dense problems only."""
        assert self._matrix is not None
        return self._matrix

    @property
    def T(self) -> Cost:
        """The same costs with both clouds exchanged."""
        return Cost(self.y, self.x, self._matrix.mT if self._matrix is not None else None)

    def take(self, problems: list[int]) -> Cost:
        """The costs of selected problems of a dense batch."""
        return Cost(self.x[problems], self.y[problems], self.matrix[problems])

    def blocks(self) -> Iterator[Tensor]:
        """Blocks of successive rows of the cost matrix, [..., rows, M]."""
        if self._matrix is not None:
            yield from self._matrix.split(block_rows(self.y), dim=-2)
            return
        for x in self.x.split(block_rows(self.y), dim=-2):
            yield half_squared_distances(x, self.y)

    def softmin(self, g: Tensor, log_b: Tensor, eps: float) -> Tensor:
        """−eps log Σ_j b_j exp((g_j − C_ij)/eps), [..., N]: the optimal f given g."""
        scores = (log_b + g / eps)[..., None, :]
        return torch.cat([-eps * torch.logsumexp(scores - block / eps, dim=-1) for block in self.blocks()], dim=-1)

    def barycentric_projection(self, g: Tensor, log_b: Tensor, eps: float) -> Tensor:
        """T(x_i) = Σ_j π_ij y_j with the row-normalised plan π, [..., N, D]: the average destination of each x_i."""
        scores = (log_b + g / eps)[..., None, :]
        sent = [matmul(torch.softmax(scores - block / eps, dim=-1), self.y) for block in self.blocks()]
        return torch.cat(sent, dim=-2)

    def diameter(self) -> Tensor:
        """Upper bound of the distance between any two points of both clouds, [...], from their joint bounding box."""
        low = torch.minimum(self.x.amin(-2), self.y.amin(-2))
        high = torch.maximum(self.x.amax(-2), self.y.amax(-2))
        return (high - low).norm(dim=-1)


def block_rows(columns: Tensor) -> int:
    """Number of rows in a block of costs; its columns belong to the cloud `columns`, [..., M, D]."""
    entries = BLOCK_ENTRIES.get(columns.device.type, BLOCK_ENTRIES["cpu"])
    return max(1, entries // columns.shape[-2])


def median_distance(features: Tensor, max_points: int = 2000) -> float:
    """Median pairwise Euclidean distance between evenly spaced rows: the unit of length of the `scaled` presets.

    Args:
        features: [N, D], N ≥ 2.
        max_points: at most this many rows are used.

    Raises:
        InputError: fewer than two rows, or rows that are mostly identical.
    """
    require(len(features) >= 2, "features", "hold at least two rows", tuple(features.shape))
    rows = features[:: math.ceil(len(features) / max_points)]
    median = torch.pdist(rows if rows.dtype == torch.float64 else rows.float()).median().item()
    if not 0 < median < math.inf:  # the squared distances may be outside the range of float32
        median = torch.pdist(rows.double()).median().item()
    require(0 < median < math.inf, "features", "differ from one another and be finite", f"median distance {median}")
    return median


def log_effective_rank(points: Tensor) -> Tensor:
    """Logarithm of the effective rank of a cloud [N, D]: the entropy of the normalised eigenvalues of its covariance.

    It ranges from 0 (all points on a line, or equal) to log min(N − 1, D); 0-d, in the dtype of the points.

    Reference: [Roy2007].

    Example:
        >>> [round(log_effective_rank(points).exp().item(), 3) for points in (torch.eye(4)[:2], torch.eye(4))]
        [1.0, 3.0]
    """
    spectrum = torch.linalg.svdvals(points - points.mean(dim=0)).square()
    shares = spectrum / spectrum.sum().clamp(min=torch.finfo(spectrum.dtype).tiny)
    return torch.special.entr(shares).sum()
