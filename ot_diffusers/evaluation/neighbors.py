"""Which rows of two sets lie in each other's k-nearest-neighbour balls: as float64 decides, at float32's speed.

Distances come from matrix products in float32, whose rounding has a bound. Where a comparison is closer than that, and
only there, it is made again in float64. Clusters that are tight beside their distance from the common mean, or copies,
make all of it close: then float32 was tried in vain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

BLOCK_ENTRIES = 2**21
"""Squared distances held at a time: 16 MiB of float64, about what a processor's cache holds."""

FLOAT32_ENTRIES = 2 * BLOCK_ENTRIES
"""The same in float32 for each of two threads, 16 MiB."""

TIE = 1e-12
"""Squared distances that differ by less than this share of the largest squared norm count as equal: a matrix product in
float64 leaves an error of about 1e-15, and features are float32."""


def in_each_others_balls(x: Tensor, y: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Whether each row of x [N, D] lies in a ball of y [M, D], and each row of y in a ball of x: bool [N], [M].

    The ball of a row reaches to its k-th nearest other row of its own set. Memory grows with N + M: copies of
    the sets, and blocks of the distances between them.
    """
    x, y = to_unit_ball(x, y)
    # NumPy's threads and torch's would wait for one another: each half of the work has a thread of its own.
    workers = min(2, torch.get_num_threads())
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
        x_radii, y_radii = pool.map(lambda points: _float32_radii(points, num_neighbors), (x, y))
        parts = zip(x.chunk(workers), x_radii.chunk(workers), strict=True)
        found = list(pool.map(lambda part: _float32_margins(part[0], part[1], y, y_radii), parts))
    x_margins = torch.cat([x_part for x_part, _ in found])
    y_margins = torch.stack([y_part for _, y_part in found]).amin(dim=0)
    doubt = 3 * float32_error(x.shape[1])  # of d² − r²: of the radius, and twice as much of what is compared with it
    tie = TIE * max(rows.square().sum(dim=1).max().item() for rows in (x, y))
    in_y, in_x = x_margins <= -doubt, y_margins <= -doubt
    for inside, margins, queries, points, radii in (
        (in_y, x_margins, x, y, y_radii),
        (in_x, y_margins, y, x, x_radii),
    ):
        close = ((margins > -doubt) & (margins <= doubt)).nonzero().flatten()
        inside[close] = _float64_members(queries[close], points, radii.double(), num_neighbors, tie)
    return in_y, in_x


def to_unit_ball(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 about the mean of y, over a power of 2 (without rounding) for lengths of at most 1."""
    centre = y.double().mean(dim=0)
    x, y = x.double() - centre, y.double() - centre
    longest = max(rows.norm(dim=1).max().item() for rows in (x, y))
    scale = 2.0 ** -math.ceil(math.log2(longest)) if longest > 0 else 1.0
    return x * scale, y * scale


def float32_error(dimension: int) -> float:
    """Bound of the error of |x|² − 2⟨x, y⟩ + |y|² in float32, in any order of summation, for rows of length at most 1.

    The products and sums leave nu/(1 − nu) of the sum of the terms' sizes, which is at most 4 (u = 2⁻²⁴, n = D + 2
    terms); rounding the rows beforehand adds less than 16 to n.

    Reference: [Higham2002], §3.1.
    """
    share = (dimension + 18) * 2.0**-24
    return 4 * share / (1 - share)


def _float32_radii(points: Tensor, num_neighbors: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other one, [N] float32, off by `float32_error` at most: an order
    statistic moves by no more than the values do. Half of the pairs are formed, each serves both of its rows."""
    left, right = _factors(points)
    count, size = num_neighbors + 1, len(points)  # every row is its own nearest neighbour
    smallest = torch.full((count, size), torch.inf)
    memory = np.empty(max(FLOAT32_ENTRIES, size), np.float32)
    start = 0
    while start < size:
        stop = min(size, start + max(1, len(memory) // (size - start)))
        block = memory[: (stop - start) * (size - start)].reshape(stop - start, size - start)
        pairs = torch.from_numpy(np.matmul(left[start:stop], right[start:].T, out=block))
        for rows, found in (
            (slice(start, stop), _smallest(pairs, count, dim=1).T),
            (slice(stop, size), _smallest(pairs[:, stop - start :], count, dim=0)),
        ):
            smallest[:, rows] = torch.cat([smallest[:, rows], found]).topk(count, dim=0, largest=False).values
        start = stop
    return smallest[-1]


def _float32_margins(x: Tensor, x_radii: Tensor, y: Tensor, y_radii: Tensor) -> tuple[Tensor, Tensor]:
    """min_j |x_i − y_j|² − r_j² and min_i |x_i − y_j|² − r_i², in float32: [N], [M].

    The radii of y enter as |y|² − r², so terms sum up to at most 8 and the error is twice that of a distance.
    """
    left, right = _factors(x)[0], _factors(y)[1]
    right[:, -1] -= y_radii.numpy()
    memory = np.empty((max(1, FLOAT32_ENTRIES // len(y)), len(y)), np.float32)
    x_margins, y_margins = torch.empty(len(x)), torch.full((len(y),), torch.inf)
    for start in range(0, len(x), len(memory)):
        rows = slice(start, start + len(memory))
        factor = left[rows]
        pairs = torch.from_numpy(np.matmul(factor, right.T, out=memory[: len(factor)]))
        x_margins[rows] = pairs.amin(dim=1)
        y_margins = torch.minimum(y_margins, pairs.sub_(x_radii[rows, None]).amin(dim=0))
    return x_margins, y_margins + y_radii


def _factors(points: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Float32 matrices, left [N, D + 2] and right [M, D + 2], whose product is the squared distances of two sets.

    NumPy's product is always float32; torch's may be set to less.
    """
    norms = points.square().sum(dim=1, keepdim=True)
    ones = torch.ones_like(norms)
    left, right = torch.cat([-2 * points, norms, ones], dim=1), torch.cat([points, ones, norms], dim=1)
    return left.float().numpy(), right.float().numpy()


def _smallest(values: Tensor, count: int, dim: int) -> Tensor:
    """The `count` smallest along one dimension of a matrix (all, where there are fewer) in any order.

    They lie in the `count` groups with the smallest minima, and minima are cheap.
    """
    length = values.shape[dim]
    size = max(1, math.isqrt(length // count))
    groups = length // size
    if groups > count:
        minima = values.narrow(dim, 0, groups * size).unflatten(dim, (size, groups)).amin(dim)
        chosen = minima.topk(count, dim, largest=False, sorted=False).indices
        members = torch.cat([chosen + groups * row for row in range(size)], dim)
        rest = values.narrow(dim, groups * size, length - groups * size)
        values = torch.cat([values.gather(dim, members), rest], dim)
    return values.topk(min(count, length), dim, largest=False, sorted=False).values


def _float64_members(queries: Tensor, points: Tensor, radii: Tensor, num_neighbors: int, tie: float) -> Tensor:
    """Whether each query lies in a ball of `points`, or within `tie` of its surface.

    The squared `radii` are off by `float32_error` at most; those that this leaves open are replaced by exact ones.
    """
    doubt = float32_error(points.shape[1]) + tie
    exact = torch.zeros(len(points), dtype=torch.bool)
    inside = torch.zeros(len(queries), dtype=torch.bool)
    for rows, block in squared_distances(queries, points):
        open_balls = ((block - radii).abs() <= doubt).any(dim=0) & ~exact
        radii[open_balls] = squared_radii(points[open_balls], points, num_neighbors)[0]
        exact |= open_balls
        inside[rows] = (block <= radii + tie).any(dim=1)
    return inside


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows of x [N, D] with their squared distances to y, [rows, M], by a matrix product.

    The next block overwrites the one before: touching new memory would cost more than the product.
    """
    x_norms, y_norms = x.square().sum(dim=1), y.square().sum(dim=1)
    blocks = x.new_empty(block_rows(y), len(y))
    for start in range(0, len(x), len(blocks)):
        rows = slice(start, min(start + len(blocks), len(x)))
        block = torch.addmm(y_norms, x[rows], y.T, alpha=-2, out=blocks[: rows.stop - start])
        yield rows, block.add_(x_norms[rows, None])


def block_rows(y: Tensor) -> int:
    """Rows of a block of distances to y."""
    return max(1, BLOCK_ENTRIES // len(y))


def squared_radii(queries: Tensor, points: Tensor, *num_neighbors: int) -> Tensor:
    """Squared distance of some of the points to their k-th nearest other one, for one or more k: [K, N]."""
    # Every row is its own nearest neighbour at distance 0: k others come after it.
    nearest = [
        block.topk(max(num_neighbors) + 1, dim=1, largest=False).values[:, list(num_neighbors)]
        for _, block in squared_distances(queries, points)
    ]
    return torch.cat(nearest or [queries.new_empty(0, len(num_neighbors))]).T.clamp(min=0)
