"""Nearest neighbours in two sets of rows, by squared distances in float64, block by block."""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_ENTRIES = 2**22
"""Squared distances in memory at a time: 32 MiB."""

TIE = 1e-12
"""Squared distances that differ by less than this share of the largest squared norm count as equal: a matrix product in
float64 leaves an error of about 1e-15, and features are float32."""

KEPT_RESULTS = 32
"""How many results `by_content` keeps. Scoring one set of images asks for seven."""
results_by_content: OrderedDict[Hashable, Tensor] = OrderedDict()


def by_content(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the last results of a function of tensors and numbers under a hash of its arguments' contents.

    A study compares many sets of generated images with the same real ones; what concerns the real ones alone is then
    computed once.
    """

    @functools.wraps(compute)
    def looked_up(*arguments: Any) -> Tensor:
        contents = (_digest(value) if isinstance(value, Tensor) else value for value in arguments)
        key = (compute.__qualname__, *contents)
        if key not in results_by_content:
            results_by_content[key] = compute(*arguments)
        results_by_content.move_to_end(key)
        while len(results_by_content) > KEPT_RESULTS:
            results_by_content.popitem(last=False)
        return results_by_content[key].clone()

    return looked_up


def _digest(values: Tensor) -> tuple[str, torch.dtype, torch.Size]:
    contents = hashlib.sha256(values.detach().cpu().contiguous().numpy().data).hexdigest()
    return contents, values.dtype, values.shape


def nearest_rows(queries: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest row of `points` [M, D] for each row of `queries` [N, D]: long [N]."""
    blocks = squared_distances(*_centred(queries, points))
    return torch.cat([block.argmin(dim=1) for _, block in blocks])


def in_each_others_balls(x: Tensor, y: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Whether each row of x [N, D] lies in a ball of y [M, D], and each row of y in a ball of x: bool [N], [M].

    The ball of a row reaches to its k-th nearest other row of its own set; what is on its surface is inside.
    """
    x, y = _centred(x, y)
    x_limits, y_limits = (squared_radii(points, num_neighbors) + _tie(x, y) for points in (x, y))
    x_inside, y_inside = [], torch.zeros(len(y), dtype=torch.bool)
    for rows, block in squared_distances(x, y):
        x_inside.append((block <= y_limits).any(dim=1))
        y_inside |= (block <= x_limits[rows, None]).any(dim=0)
    return torch.cat(x_inside), y_inside


def count_members(x: Tensor, y: Tensor, num_neighbors: int) -> Tensor:
    """How many rows of x [N, D] lie in the ball of each row of y [M, D], as in `in_each_others_balls`: long [M]."""
    x, y = _centred(x, y)
    limits = squared_radii(y, num_neighbors) + _tie(x, y)
    counts = torch.zeros(len(y), dtype=torch.long)
    for _, block in squared_distances(x, y):
        counts += (block <= limits).sum(dim=0)
    return counts


@by_content
def squared_radii(points: Tensor, num_neighbors: int) -> Tensor:
    """Squared distance of each row [N, D] to its k-th nearest other one: [N]."""
    count = num_neighbors + 1  # every row is its own nearest neighbour
    blocks = squared_distances(points, points)
    return torch.cat([block.topk(count, dim=1, largest=False).values[:, -1] for _, block in blocks])


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows of x [N, D] with their squared distances to y [M, D], [rows, M]."""
    squares = y.square().sum(dim=1)
    step = max(1, BLOCK_ENTRIES // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        lengths = x[rows].square().sum(dim=1, keepdim=True) + squares
        yield rows, torch.addmm(lengths, x[rows], y.T, alpha=-2)


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 about the mean of y: large offsets would cost digits."""
    centre = y.double().mean(dim=0)
    return x.double() - centre, y.double() - centre


def _tie(x: Tensor, y: Tensor) -> Tensor:
    return TIE * max(rows.square().sum(dim=1).max() for rows in (x, y))
