"""Distances between clouds: the cost ½‖x − y‖², stored where it fits. Of one cloud, the length that blurs are measured
in, and how many directions it spreads in."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import require
from .precision import matmul, subtract_product

# Above this many entries no N×M tensor is made: costs are recomputed block by block.
MAX_DENSE_ENTRIES = 2**25
# Entries of a block: what a CPU's caches hold, and what keeps a GPU busy.
BLOCK_ENTRIES = {"cpu": 2**22, "cuda": 2**25}


def half_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """½‖x_i − y_j‖², [..., N, M], never negative."""
    halves = (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]) / 2
    return subtract_product(halves, x, y.mT).clamp_(min=0)


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds moved so that `y` has mean zero: costs stay the same, rounding shrinks."""
    mean = y.mean(-2, keepdim=True)
    return x - mean, y - mean


class Cost:
    """½‖x_i − y_j‖² between two clouds [..., N, D] and [..., M, D], held as one matrix where it fits and recomputed in
    row blocks where it does not."""

    def __init__(self, x: Tensor, y: Tensor, matrix: Tensor | None = None) -> None:
        self.x, self.y = x, y
        fits = x.shape[-2] * y.shape[-2] <= MAX_DENSE_ENTRIES
        self._matrix = half_squared_distances(x, y) if matrix is None and fits else matrix

    @property
    def is_dense(self) -> bool:
        """Whether the matrix of costs is held."""
        return self._matrix is not None

    @property
    def matrix(self) -> Tensor:
        """All costs, [..., N, M], of a dense problem."""
        assert self._matrix is not None
        return self._matrix

    @property
    def T(self) -> Cost:
        """The same costs seen from the other cloud."""
        return Cost(self.y, self.x, self._matrix.mT if self._matrix is not None else None)

    def take(self, problems: list[int]) -> Cost:
        """The costs of some problems of a dense batch."""
        return Cost(self.x[problems], self.y[problems], self.matrix[problems])

    def blocks(self) -> Iterator[Tensor]:
        """The costs of successive rows, [..., rows, M]."""
        if self._matrix is not None:
            yield self._matrix
            return
        for x in self.x.split(block_rows(self.y), dim=-2):
            yield half_squared_distances(x, self.y)

    def softmin(self, g: Tensor, log_b: Tensor, eps: float) -> Tensor:
        """−eps log Σ_j b_j exp((g_j − C_ij)/eps), [..., N]: the best f given g."""
        scores = (log_b + g / eps)[..., None, :]
        return torch.cat([-eps * torch.logsumexp(scores - block / eps, dim=-1) for block in self.blocks()], dim=-1)

    def barycentric_projection(self, g: Tensor, log_b: Tensor, eps: float) -> Tensor:
        """T(x_i) = Σ_j π_ij y_j with the row-normalised plan π, [..., N, D]: where each x_i is sent on average."""
        scores = (log_b + g / eps)[..., None, :]
        sent = [matmul(torch.softmax(scores - block / eps, dim=-1), self.y) for block in self.blocks()]
        return torch.cat(sent, dim=-2)

    def diameter(self) -> Tensor:
        """An upper bound of the largest distance between the clouds, [...], from their bounding box."""
        low = torch.minimum(self.x.amin(-2), self.y.amin(-2))
        high = torch.maximum(self.x.amax(-2), self.y.amax(-2))
        return (high - low).norm(dim=-1)


def block_rows(columns: Tensor) -> int:
    """Rows of a block whose columns belong to a cloud [..., M, D]."""
    entries = BLOCK_ENTRIES.get(columns.device.type, BLOCK_ENTRIES["cpu"])
    return max(1, entries // columns.shape[-2])


def median_distance(features: Tensor, max_points: int = 2000) -> float:
    """Median pairwise Euclidean distance of evenly spaced rows: the unit of length of the `scaled` presets.

    Args:
        features: [N, D], N ≥ 2.
        max_points: at most this many rows enter.

    Raises:
        InputError: fewer than two rows, or rows of which most are the same.
    """
    require(len(features) >= 2, "features", "hold at least two rows", tuple(features.shape))
    rows = features[:: math.ceil(len(features) / max_points)]
    median = torch.pdist(rows if rows.dtype == torch.float64 else rows.float()).median().item()
    if not 0 < median < math.inf:  # perhaps of lengths whose squares float32 does not hold
        median = torch.pdist(rows.double()).median().item()
    require(0 < median < math.inf, "features", "differ from one another and be finite", f"median distance {median}")
    return median


def log_effective_rank(points: Tensor) -> Tensor:
    """Entropy of the covariance's normalised eigenvalues, of a cloud [N, D]: the log of how many directions it spreads
    in, from 0 (on a line, or in one place) to log min(N − 1, D); 0-d, in the precision of the points.

    Reference: [Roy2007].

    Example:
        >>> [round(log_effective_rank(points).exp().item(), 3) for points in (torch.eye(4)[:2], torch.eye(4))]
        [1.0, 3.0]
    """
    spectrum = torch.linalg.svdvals(points - points.mean(dim=0)).square()
    shares = spectrum / spectrum.sum().clamp(min=torch.finfo(spectrum.dtype).tiny)
    return torch.special.entr(shares).sum()
