"""Semi-discrete optimal transport: standard normal noise on one side, N points of equal mass on the other.

The transport map sends noise ε to the point argmax_j ⟨ε, x_j⟩ + h_j. The potentials h minimise the semi-dual

    D(h) = E_ε max_j (⟨ε, x_j⟩ + h_j) − mean(h),     ∂D/∂h_j = P(cell j) − 1/N,

so that at the minimum every point receives the share 1/N of the noise. `semidiscrete_potentials` finds them by averaged
stochastic gradient descent, `assign` applies the map.

Reference: [Genevay2016] for the stochastic semi-dual.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require, require_number
from ..seeds import keyed_generator

HALVES = 16
"""Noise is drawn as all sums of so many first and second halves, which share their inner products with the points."""
CPU_ENTRIES, GPU_ENTRIES, FEWEST_ROWS = 2**20, 2**26, 32
"""Scores that are held at a time, but for so many noise vectors at least: each pass reads all points."""
SCORE_BLOCK = 64
"""Points of which the largest score is taken first: PyTorch's `amax` is over ten times faster than its `argmax`."""
GOOD_START = 5.0
"""χ² up to which the descent begins at the starting potentials; beyond it, temperatures are annealed first."""
FIRST_TEMPERATURE, LAST_TEMPERATURE, COOLING, STEPS_PER_TEMPERATURE = 1.0, 0.01, 0.7, 6
DRAWS_PER_POINT = 4
"""Noise vectors of an annealing step, for each point and divided by the number of points that share a vector."""
LARGEST_STEP, STEP, EARLY_EPOCHS, DECAY = 0.5, 0.3, 5, 0.6
"""The step size begins at `STEP` times the draws per point, at most at `LARGEST_STEP`, and falls with the power `DECAY`
after `EARLY_EPOCHS` draws per point."""
CHECK_INTERVAL, PRECISION = 1.25, 10
"""χ² is measured whenever the draws have grown by this factor, with a standard error of about 1/10 of the tolerance."""
FEWEST_CHECKED = 2**16
"""Draws that a measurement of χ² may take in any case; beyond, a quarter of the draws so far."""
TIE = 2.0**-20
"""Scores closer than this share of |ε| · max |x| are compared again in float64."""

Progress = Callable[[int, float | None], None]


@dataclass(frozen=True)
class SemidiscretePotentials:
    """Potentials and how good they are.

    Attributes:
        values: h, float32 [N], with mean 0.
        chi_squared: mean of (N · P(cell) − 1)² over the points, an unbiased estimate from fresh draws; 0 is exact.
        num_draws: noise vectors that the solver used.
        seconds: what it took.
        converged: whether `chi_squared` is within the tolerance.
    """

    values: Tensor
    chi_squared: float
    num_draws: int
    seconds: float
    converged: bool


@torch.no_grad()
def semidiscrete_potentials(
    points: Tensor,
    *,
    tolerance: float = 0.02,
    max_seconds: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SemidiscretePotentials:
    """Potentials whose cells all have the mass 1/N, to a root mean square of √tolerance of it.

    Args:
        points: [N, D], N ≥ 2, any scale and centre.
        tolerance: χ² at which the descent stops, > 0. It takes about 2N/tolerance draws.
        max_seconds: stop about then in any case.
        seed: random seed of the draws.
        progress: called with the number of draws so far, and χ² when it has been measured.

    Raises:
        InputError: fewer than two points, values that are not finite, a tolerance that is not positive.

    Example:
        Two points share the noise by the sign of its projection onto their difference.

        >>> solved = semidiscrete_potentials(torch.tensor([[-1.0], [1.0]]))
        >>> solved.converged
        True
    """
    require(points.ndim == 2 and len(points) >= 2, "points", "have shape [N, D] with N ≥ 2", tuple(points.shape))
    require(bool(points.isfinite().all()), "points", "be finite", "NaN or Inf")
    require_number("tolerance", tolerance, at_least=0)
    require(tolerance > 0, "tolerance", "be positive", tolerance)
    started = time.monotonic()
    centred = points.float() - points.float().mean(dim=0)
    scale = centred.square().sum(dim=1).mean().sqrt().item()
    require(scale > 0, "points", "differ from each other", "copies of one point")
    solver = _Solver(centred / scale, keyed_generator(points.device, seed, "semidiscrete"))

    def out_of_time() -> bool:
        return max_seconds is not None and time.monotonic() - started > max_seconds

    start = solver.start()
    precise = math.sqrt(2 * len(points)) * PRECISION + 4 * PRECISION**2  # draws, for a tolerance of 1
    if solver.chi_squared(start, precise) > GOOD_START:
        start = solver.anneal(start, out_of_time)
    next_check = 2 * len(points) / tolerance
    for potentials, num_draws in solver.descend(start):
        if progress is not None:
            progress(num_draws, None)
        stops = out_of_time()
        if num_draws >= next_check or stops:
            affordable = max(num_draws / 4, FEWEST_CHECKED)
            chi_squared = solver.chi_squared(potentials, min(precise / tolerance, affordable))
            next_check = CHECK_INTERVAL * num_draws
            if progress is not None:
                progress(num_draws, chi_squared)
            if chi_squared <= tolerance or stops:
                break
    seconds = time.monotonic() - started
    return SemidiscretePotentials(potentials * scale, chi_squared, num_draws, seconds, chi_squared <= tolerance)


@torch.no_grad()
def assign(noise: Tensor, points: Tensor, potentials: Tensor, *, longest: Tensor | None = None) -> Tensor:
    """The point that each noise vector is sent to, argmax_j ⟨ε, x_j⟩ + h_j: int64 [B].

    The result for a row does not depend on the other rows: where two scores are so close that float32 might decide by
    the shape of the batch, float64 decides.

    Args:
        noise: [B, D].
        points: [N, D], on the device of the noise.
        potentials: [N].
        longest: largest length of a point, 0-d, for callers that know it; computed by default.
    """
    longest = points.norm(dim=1).max() if longest is None else longest
    parts = []
    for rows in noise.split(_rows_at_a_time(len(points), noise.device)):
        winners, margin = _winners(torch.addmm(potentials, rows, points.T), want_margin=True)
        doubtful = (margin <= TIE * rows.norm(dim=1) * longest).nonzero()[:, 0]
        if len(doubtful):
            exact = torch.addmm(in_float64(potentials), in_float64(rows[doubtful]), in_float64(points).T)
            winners[doubtful] = exact.argmax(dim=1).to(winners.device)
        parts.append(winners)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=noise.device)


def in_float64(values: Tensor) -> Tensor:
    """`values` in float64, on the CPU where the device is an Apple GPU, which lacks it."""
    return (values.cpu() if values.device.type == "mps" else values).double()


@dataclass
class _Solver:
    """The descent for points [N, D] with mean 0 and mean square 1."""

    points: Tensor
    generator: torch.Generator

    @property
    def count(self) -> int:
        """N."""
        return len(self.points)

    def start(self) -> Tensor:
        """Potentials that are nearly right in many dimensions: the scores of a point are normal with standard deviation
        |x_j|, and at −q |x_j| with q = Φ⁻¹(1 − 1/N) all of them pass one threshold equally often."""
        quantile = torch.special.ndtri(torch.tensor(1 - 1 / self.count, dtype=torch.float64)).item()
        return _centred(-quantile * self.points.norm(dim=1))

    def normal(self, count: int) -> Tensor:
        """Standard normal vectors, [count, D]."""
        return torch.randn(
            (count, self.points.shape[1]), generator=self.generator, device=self.points.device, dtype=torch.float32
        )

    def sampled_winners(self, potentials: Tensor) -> Tensor:
        """The points that a block of noise vectors (ε_i + ε'_k)/√2 is sent to, int64 [16, 16].

        Two inner products with every point serve 16 vectors each. Vectors that share a half are sent to the same point
        in one or two of a hundred cases only.
        """
        first, second = (half @ self.points.T for half in self.normal(2 * HALVES).div_(math.sqrt(2)).chunk(2))
        second += potentials
        step = max(1, _rows_at_a_time(self.count, self.points.device) // HALVES)
        return torch.cat([_winners(part[:, None] + second)[0] for part in first.split(step)])

    def cell_masses(self, potentials: Tensor) -> Tensor:
        """Estimate of P(cell j), [N], from one block."""
        return self.sampled_winners(potentials).flatten().bincount(minlength=self.count) / HALVES**2

    def chi_squared(self, potentials: Tensor, num_draws: float) -> float:
        """N Σ_j P(cell j)² − 1 without bias, from the pairs of independent draws that are sent to the same point."""
        num_blocks = max(2, math.ceil(num_draws / HALVES**2))
        blocks = torch.stack([self.sampled_winners(potentials) for _ in range(num_blocks)])
        same_point = _equal_pairs(blocks.flatten().bincount(minlength=self.count))
        same_half = sum(_equal_pairs_along(each) for each in (blocks, blocks.mT))
        block_size, rest = HALVES**2, (HALVES - 1) ** 2
        pairs = blocks.numel() * (blocks.numel() - block_size + rest)
        return self.count * (same_point - same_half) / pairs - 1

    def anneal(self, potentials: Tensor, out_of_time: Callable[[], bool]) -> Tensor:
        """Potentials of ever less entropic problems, which move mass over long distances, where the descent is slow."""
        temperature, rows = FIRST_TEMPERATURE, _rows_at_a_time(self.count, self.points.device)
        while temperature > LAST_TEMPERATURE and not out_of_time():
            shares = self.shares(self.normal(64), potentials, temperature)
            wanted = DRAWS_PER_POINT * self.count * shares.square().sum(dim=1).mean().item()
            draws = max(HALVES**2, min(self.count, round(wanted)))
            for _ in range(STEPS_PER_TEMPERATURE):
                masses = torch.zeros_like(potentials)
                for part in self.normal(draws).split(rows):
                    masses += self.shares(part, potentials, temperature).sum(dim=0)
                excess = (self.count / draws * masses - 1).clamp(max=2)
                potentials = _centred(potentials - temperature * excess)
            temperature *= COOLING
        return potentials

    def shares(self, noise: Tensor, potentials: Tensor, temperature: float) -> Tensor:
        """The share of each noise vector that each point receives in the entropic problem, [B, N]."""
        return torch.addmm(potentials, noise, self.points.T).div_(temperature).softmax(dim=1)

    def descend(self, potentials: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Averages of the descent's iterates, later ones with more weight, and the number of draws so far."""
        block = HALVES**2
        length = self.typical_gap(potentials) * min(LARGEST_STEP, STEP * block / self.count)
        early = EARLY_EPOCHS * self.count / block
        average = potentials
        step = 0
        while True:
            step += 1
            excess = self.count * self.cell_masses(potentials) - 1
            potentials = _centred(potentials - length * (1 + step / early) ** -DECAY * excess)
            average = average.lerp(potentials, 2 / (step + 1))
            yield average, step * block

    def typical_gap(self, potentials: Tensor) -> float:
        """Mean difference between the two largest scores: by how much potentials have to move to move the cells."""
        scores = torch.addmm(potentials, self.normal(256), self.points.T)
        return _winners(scores, want_margin=True)[1].mean().item()


def _centred(potentials: Tensor) -> Tensor:
    return potentials - potentials.mean()


def _rows_at_a_time(num_points: int, device: torch.device) -> int:
    return max(FEWEST_ROWS, (CPU_ENTRIES if device.type == "cpu" else GPU_ENTRIES) // num_points)


def _winners(scores: Tensor, want_margin: bool = False) -> tuple[Tensor, Tensor]:
    """Position of the largest entry of each row of `scores` [..., N], and how far it is above the second, if wanted."""
    *shape, count = scores.shape
    scores = scores.reshape(-1, count)
    whole = count - count % SCORE_BLOCK
    blocks = scores[:, :whole].view(len(scores), whole // SCORE_BLOCK, SCORE_BLOCK)
    peaks = blocks.amax(dim=2)
    if whole < count:
        peaks = torch.cat([peaks, scores[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    best = peaks.topk(min(2, peaks.shape[1]), dim=1).indices  # the second largest entry is in one of these two
    place = (best[..., None] * SCORE_BLOCK + torch.arange(SCORE_BLOCK, device=scores.device)).flatten(1)
    inside = scores.gather(1, place.clamp(max=count - 1)).masked_fill(place >= count, -math.inf)
    if not want_margin:
        inside, place = inside[:, :SCORE_BLOCK], place[:, :SCORE_BLOCK]
        return place.gather(1, inside.argmax(dim=1, keepdim=True)).view(shape), scores.new_zeros(())
    top = inside.topk(2, dim=1)
    return place.gather(1, top.indices[:, :1]).view(shape), (top.values[:, 0] - top.values[:, 1]).view(shape)


def _equal_pairs(counts: Tensor) -> int:
    """Ordered pairs of different draws that are sent to the same point."""
    return int((counts * (counts - 1)).sum())


def _equal_pairs_along(blocks: Tensor) -> int:
    """The same within each row of [..., n], n small."""
    return int((blocks[..., None] == blocks[..., None, :]).sum()) - blocks.numel()
