"""Nearest neighbours in two sets of rows: as float64 decides, at float32's speed.

Distances come from matrix products in float32, whose rounding has a bound. What that leaves open, and only that, is
formed again in float64. Clusters that are tight beside their distance from the common mean, or copies, leave everything
open: then float32 was tried in vain. NumPy's products are always of the type they say; torch's may be set to less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

BLOCK_ENTRIES = 2**22
"""Squared distances that a thread holds at a time: 16 MiB of float32."""

TIE = 1e-12
"""Squared distances that differ by less than this share of the largest squared norm count as equal: a matrix product in
float64 leaves an error of about 1e-15, and features are float32."""


def nearest_rows(queries: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest row of `points` [M, D] for each row of `queries` [N, D]: long [N]."""
    a, b = to_unit_ball(queries, points)
    with worker_threads() as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(lambda rows: _nearest_rows(rows, b), _parts(a)))))


def in_each_others_balls(x: Tensor, y: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Whether each row of x [N, D] lies in a ball of y [M, D], and each row of y in a ball of x: bool [N], [M].

    The ball of a row reaches to its k-th nearest other row of its own set; what is on its surface is inside.
    """
    a, b = to_unit_ball(x, y)
    with worker_threads() as pool:
        a_radii, b_radii = pool.map(lambda points: squared_radii(points, num_neighbors), (a, b))
        parts = pool.map(lambda rows, radii: _margins(rows, radii, b, b_radii), _parts(a), _parts(a_radii))
        a_margins, b_margins = zip(*parts, strict=True)
    return (
        _decided(np.concatenate(a_margins), a, b, b_radii),
        _decided(np.min(b_margins, axis=0), b, a, a_radii),
    )


def count_members(x: Tensor, y: Tensor, num_neighbors: int) -> Tensor:
    """How many rows of x [N, D] lie in the ball of each row of y [M, D], as in `in_each_others_balls`: long [M]."""
    a, b = to_unit_ball(x, y)
    radii = squared_radii(b, num_neighbors)
    with worker_threads() as pool:
        sure, possible = np.sum(list(pool.map(lambda rows: _counts(rows, b, radii), _parts(a))), axis=0)
    open_balls = np.flatnonzero(sure < possible)
    limits = (radii + _tie(a, b))[open_balls, None]
    for balls, block in squared_distances(b[open_balls], a):
        sure[open_balls[balls]] = np.count_nonzero(block <= limits[balls], axis=1)
    return torch.from_numpy(sure)


@contextmanager
def worker_threads() -> Iterator[Executor]:
    """As many threads as torch would use, whose matrix products start no threads of their own to wait for."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield pool


def to_unit_ball(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64 about the mean of y, over a power of 2 (without rounding) for lengths of at most 1."""
    centre = y.double().mean(dim=0)
    x, y = x.double() - centre, y.double() - centre
    longest = max(rows.norm(dim=1).max().item() for rows in (x, y))
    scale = 2.0 ** -math.ceil(math.log2(longest)) if longest > 0 else 1.0
    return x.mul_(scale).numpy(), y.mul_(scale).numpy()


def float32_error(dimension: int) -> float:
    """Bound of the error of |x|² − 2⟨x, y⟩ + |y|² in float32, in any order of summation, for rows of length at most 1.

    The products and sums leave nu/(1 − nu) of the sum of the terms' sizes, which is at most 4 (u = 2⁻²⁴, n = D + 2
    terms); rounding the rows beforehand adds less than 16 to n.

    Reference: [Higham2002], §3.1.
    """
    share = (dimension + 18) * 2.0**-24
    return 4 * share / (1 - share)


def squared_radii(points: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Squared distance of each row [N, D] of length at most 1 to its k-th nearest other one, float64: [N]."""
    count = num_neighbors + 1  # every row is its own nearest neighbour
    nearest = np.full((len(points), count), np.inf)
    for rows, _, squared in _candidates(points, points, _group_minima_within(points, count), count):
        nearest[rows] = np.partition(np.concatenate([nearest[rows], squared], axis=1), count - 1, axis=1)[:, :count]
    return nearest.max(axis=1)


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of the rows of x [N, D] with their squared distances to y [M, D] in float64, [rows, M]."""
    return _products(_left(x), _right(y))


def _nearest_rows(queries: np.ndarray, points: np.ndarray) -> np.ndarray:
    shortest, nearest = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for rows, members, squared in _candidates(queries, points, _group_minima(queries, points), 1):
        found = squared.argmin(axis=1)
        squared = np.take_along_axis(squared, found[:, None], axis=1)[:, 0]
        closer = squared < shortest[rows]
        shortest[rows[closer]], nearest[rows[closer]] = squared[closer], members[found[closer]]
    return nearest


def _candidates(
    queries: np.ndarray, points: np.ndarray, minima: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Group by group: some rows of queries, some of points and their squared distances in float64, [rows, points].

    The `count` nearest points of every query are among them: `minima` are the squared distances to the nearest point of
    each group, [groups, N] float32, the g-th group being `points[g::groups]`, and the count-th smallest of them bounds
    the count-th smallest distance but for an error on either side and its own rounding.
    """
    limits = np.partition(minima, count - 1, axis=0)[count - 1] + 3 * float32_error(points.shape[1])
    left, right = _left(queries), _right(points).T.copy()  # the members of a group lie far apart
    for group, smallest in enumerate(minima):
        rows = np.flatnonzero(smallest <= limits)
        yield rows, np.arange(group, len(points), len(minima)), left[rows] @ right[group :: len(minima)].T


def _group_minima(queries: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`minima` of `_candidates` for the nearest of other points."""
    groups = _num_groups(len(points), 1)
    minima = np.empty((groups, len(queries)), np.float32)
    for rows, pairs in _products(_left(queries, np.float32), _right(points, np.float32, groups)):
        minima[:, rows] = pairs.reshape(len(pairs), -1, groups).min(axis=1).T
    return minima


def _group_minima_within(points: np.ndarray, count: int) -> np.ndarray:
    """`minima` of `_candidates` for the `count` nearest in the same set: half of the pairs serve both of their rows.

    They take 8N^1.5 √count bytes.
    """
    groups = _num_groups(len(points), count)
    left, right = _left(points, np.float32, groups), _right(points, np.float32, groups)
    minima = np.full((groups, len(left)), np.inf, np.float32)
    memory = np.empty(max(BLOCK_ENTRIES, len(left)), np.float32)
    for start in range(0, len(left), groups):  # a row of each group
        for rows, pairs in _products(left[start : start + groups], right[:, start:], memory):
            own = minima[:, start + rows.start : start + rows.stop]
            np.minimum(own, pairs.reshape(len(pairs), -1, groups).min(axis=1).T, out=own)
            later = minima[rows, start + groups :]
            np.minimum(later, pairs[:, groups:], out=later)
    return minima[:, : len(points)]


def _num_groups(size: int, count: int) -> int:
    """At least `count` groups, about four times as many as members in `count` of them."""
    return -(-size // max(1, math.isqrt(size // count) // 2))


def _margins(x: np.ndarray, x_radii: np.ndarray, y: np.ndarray, y_radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """min_j |x_i − y_j|² − r_j² and min_i |x_i − y_j|² − r_i², in float32: [N], [M].

    The radii of y enter as |y|² − r², so terms sum up to at most 8 and the error is twice that of a distance.
    """
    x_margins, y_margins = np.empty(len(x), np.float32), np.full(len(y), np.inf, np.float32)
    x_radii, y_radii = x_radii.astype(np.float32), y_radii.astype(np.float32)
    left, right = _left(x, np.float32), _right(y, np.float32)
    right[-1] -= y_radii
    for rows, pairs in _products(left, right):
        pairs.min(axis=1, out=x_margins[rows])
        pairs -= x_radii[rows, None]
        np.minimum(y_margins, pairs.min(axis=0), out=y_margins)
    return x_margins, y_margins + y_radii


def _decided(margins: np.ndarray, queries: np.ndarray, points: np.ndarray, radii: np.ndarray) -> Tensor:
    """Whether each query lies in a ball of `points`: by its margin in float32, and by float64 where that is small."""
    inside = margins <= 0
    close = np.flatnonzero(np.abs(margins) <= _doubt(points))
    limits = radii + _tie(queries, points)
    for rows, block in squared_distances(queries[close], points):
        inside[close[rows]] = (block <= limits).any(axis=1)
    return torch.from_numpy(inside)


def _counts(x: np.ndarray, y: np.ndarray, y_radii: np.ndarray) -> np.ndarray:
    """Rows of x that are in each ball of y for sure, and that may be, by float32: [2, M]."""
    counts = np.zeros((2, len(y)), np.int64)
    left, right = _left(x, np.float32), _right(y, np.float32)
    right[-1] -= y_radii.astype(np.float32)
    for _, pairs in _products(left, right):
        for count, bound in zip(counts, (-_doubt(y), _doubt(y)), strict=True):
            count += np.count_nonzero(pairs <= bound, axis=0)
    return counts


def _doubt(points: np.ndarray) -> float:
    """Bound of the error of |x − y|² − r² in float32: twice a distance's, as above, and roundings of r²."""
    return 3 * float32_error(points.shape[1])


def _tie(x: np.ndarray, y: np.ndarray) -> float:
    return TIE * max(np.einsum("ij,ij->i", rows, rows).max() for rows in (x, y))


def _left(points: np.ndarray, dtype: type = np.float64, multiple: int = 1) -> np.ndarray:
    """[N, D + 2], whose product with `_right` of other points is the squared distances of the two sets of rows.

    Rows beyond all others are added up to a multiple.
    """
    size, dimension = points.shape
    factor = np.zeros((-(-size // multiple) * multiple, dimension + 2), dtype)
    np.multiply(points, -2, out=factor[:size, :dimension], casting="same_kind")
    factor[:size, dimension], factor[size:, dimension] = np.einsum("ij,ij->i", points, points), 8
    factor[:, dimension + 1] = 1
    return factor


def _right(points: np.ndarray, dtype: type = np.float64, multiple: int = 1) -> np.ndarray:
    """[D + 2, M], see `_left`."""
    size, dimension = points.shape
    factor = np.zeros((dimension + 2, -(-size // multiple) * multiple), dtype)
    factor[:dimension, :size] = points.T
    factor[dimension] = 1
    factor[dimension + 1, :size], factor[dimension + 1, size:] = np.einsum("ij,ij->i", points, points), 8
    return factor


def _products(
    left: np.ndarray, right: np.ndarray, memory: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of the rows of `left` with their products with all rows of `right`.

    The next block overwrites the one before: touching new memory would cost more than the product.
    """
    columns = right.shape[1]
    if memory is None:
        memory = np.empty(max(min(BLOCK_ENTRIES, len(left) * columns), columns), left.dtype)
    step = len(memory) // columns
    for start in range(0, len(left), step):
        part = left[start : start + step]
        block = memory[: len(part) * columns].reshape(len(part), columns)
        yield slice(start, start + len(part)), np.matmul(part, right, out=block)


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    """One for each of the worker threads."""
    return np.array_split(rows, min(torch.get_num_threads(), len(rows)))
