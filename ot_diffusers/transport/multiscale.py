"""Value of the Sinkhorn divergence between clouds of ten thousand points, from a coarse problem and a stored kernel.

`blockwise.py` computes the exponential of every cost in every iteration, which dominates its run time on large clouds.
Here it is computed once per temperature, around nearly optimal potentials (f, g), and the remaining unknowns are
factors near one [Schmitzer2019]:

    P_ij = u_i K_ij v_j / (NM),     K_ij = exp((f_i + g_j − C_ij)/eps),     weights 1/N and 1/M

With v_j = N/(Kᵀu)_j the column sums are exact, which leaves the dual as a function of log u, maximised by the Newton
steps of `newton.py`. Every step is a few products of K with a vector. The nearly optimal potentials come from a problem
with every fourth point at a higher temperature, followed by a few decreasing temperatures down to blur².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import geometry
from .checks import check_clouds
from .geometry import Cost, centred
from .precision import full_precision, resolve, result_dtype
from .problem import Potentials, Problem
from .sinkhorn import solve, warn_of_errors

# Kernels of up to this many entries are stored: 1 GiB in float32, 2 GiB in float64.
MAX_STORED_ENTRIES = 2**28
# From this many entries on, the stored kernel is faster.
MIN_STORED_ENTRIES = 2**22
# Problems of at most this many entries are solved as `sinkhorn_potentials` does.
MAX_COARSE_ENTRIES = 2**20
COARSENING = 4
# Blurs on the full clouds, as multiples of the given one; the coarse problem is solved at the first.
BLUR_RATIOS = (2 * math.sqrt(2), 2.0, math.sqrt(2), 1.0)
# Ratio of successive blurs while the coarsest problem is annealed.
SCALING = 0.7
# The solver moves to the next temperature at this `marginal_error`, or after this many Newton steps.
LEVEL_TOLERANCE, MAX_STEPS = 0.05, 30
# Newton's system is solved roughly: an iteration of conjugate gradients costs as much as evaluating a new point.
CG_TOLERANCE, CG_ITERATIONS = 0.3, 15
# Up to this `marginal_error` the value is accurate to a thousandth: the error has a second-order effect only.
LARGEST_ERROR = 0.01
# log u and log v stay below this, far from float32's limit of 88; larger ones are absorbed into f and g.
MAX_LOG_FACTOR = 20.0
MIN_EXPONENT = -80.0
KERNEL_ROWS = 512


def has_stored_solver(rows: int, columns: int) -> bool:
    """Whether `divergence_value` suits clouds of these sizes: large ones whose kernels can still be stored."""
    largest = max(rows, columns) ** 2  # the self-terms have kernels too
    return rows * columns >= MIN_STORED_ENTRIES and largest <= MAX_STORED_ENTRIES


def divergence_value(x: Tensor, y: Tensor, *, blur: float) -> float:
    """S(x, y) = OT(x, y) − ½ OT(x, x) − ½ OT(y, y) for uniform weights, ½‖x − y‖² and eps = blur²: value only.

    The dual is flat at its maximum, so that an error of the marginals has a second-order effect on the value.

    Args:
        x: [N, D] points; computed in float32, or in float64 where float32 does not resolve the problem.
        y: [M, D] points.
        blur: length in the units of the points.

    Raises:
        InputError: see `sinkhorn_potentials`.

    Reference: [Feydy2019].
    """
    check_clouds(x, y, blur=blur)
    with torch.no_grad(), full_precision(x):
        dtype = result_dtype(x, y)
        x, y = (cloud.float() for cloud in centred(x.to(dtype), y.to(dtype)))
        solved_in, blur, _ = resolve((x, y), blur, None, may_read_values=True)
        x, y = x.to(solved_in), y.to(solved_in)
        storage = x.new_empty(max(len(x), len(y)) ** 2)
        potentials = multiscale_potentials(x, y, blur=blur, storage=storage)
        if potentials.marginal_error > LARGEST_ERROR and len(x) * len(y) <= geometry.MAX_DENSE_ENTRIES:
            potentials = _solve_densely(x, y, blur, LARGEST_ERROR / 10)
        warn_of_errors([potentials.marginal_error], LARGEST_ERROR, "raise blur")
        cross = _mean(potentials.f) + _mean(potentials.g)
        return cross - sum(_mean(_self_potential(cloud, blur**2, storage)) for cloud in (x, y))


@torch.no_grad()
def multiscale_potentials(
    x: Tensor, y: Tensor, *, blur: float, tolerance: float = 0.002, storage: Tensor | None = None
) -> Potentials:
    """As `sinkhorn_potentials` with uniform weights and a looser tolerance, for clouds with N·M > 2²⁰.

    Args:
        x: [N, D] points, in the dtype that resolves the problem.
        y: [M, D] points, in the same dtype.
        blur: length; eps = blur².
        tolerance: stop when `marginal_error` falls below it.
        storage: buffer for the kernels, at least N·M numbers of that dtype, overwritten; allocated here by default.

    Returns:
        Potentials; `iterations` counts the Newton steps on the full clouds.

    Reference: [Schmitzer2019] for the absorbed kernel and the coarse start.
    """
    if len(x) > len(y):  # Newton's unknowns belong to the smaller cloud
        swapped = multiscale_potentials(y, x, blur=blur, tolerance=tolerance, storage=storage)
        return Potentials(swapped.g, swapped.f, swapped.marginal_error, swapped.iterations)
    if len(x) * len(y) <= MAX_COARSE_ENTRIES:
        return _solve_densely(x, y, blur, tolerance)
    storage = x.new_empty(len(x) * len(y)) if storage is None else storage
    coarse_x, coarse_y, eps = x[::COARSENING], y[::COARSENING], (BLUR_RATIOS[0] * blur) ** 2
    coarse = multiscale_potentials(
        coarse_x, coarse_y, blur=BLUR_RATIOS[0] * blur, tolerance=LEVEL_TOLERANCE, storage=storage
    )
    f = Cost(x, coarse_y).softmin(coarse.g, x.new_full((len(coarse_y),), -math.log(len(coarse_y))), eps)
    g = Cost(y, coarse_x).softmin(coarse.f, x.new_full((len(coarse_x),), -math.log(len(coarse_x))), eps)
    steps = 0
    for ratio in BLUR_RATIOS:
        level_tolerance = tolerance if ratio == BLUR_RATIOS[-1] else LEVEL_TOLERANCE
        f, g, error, level_steps = _solve_level(x, y, f, g, (ratio * blur) ** 2, level_tolerance, storage)
        steps += level_steps
    return Potentials(f, g, torch.tensor(error), steps)


def _solve_densely(x: Tensor, y: Tensor, blur: float, tolerance: float) -> Potentials:
    """The potentials from the solver of `sinkhorn_potentials`."""
    a, b = x.new_full((1, len(x)), 1 / len(x)), y.new_full((1, len(y)), 1 / len(y))
    problem = Problem(Cost(*(cloud[None] for cloud in centred(x, y))), a, b, blur)
    return solve(problem, SCALING, tolerance)[0]


@dataclass(frozen=True)
class _Point:
    """An iterate: log u [N], u [N], v [M], row sums N·r [N] (1 at the solution), the gain of the dual over (f, g) in
    units of eps, and the marginal error."""

    log_u: Tensor
    u: Tensor
    v: Tensor
    rows: Tensor
    gain: float
    error: float

    @property
    def is_moderate(self) -> bool:
        """Whether all factors are well within the range of float32."""
        largest = torch.stack([self.log_u.abs().max(), self.v.log().abs().max()]).max().item()
        return math.isfinite(self.error) and largest < MAX_LOG_FACTOR


class _Kernel:
    """The kernel K of the module docstring, as one matrix in a reused buffer: fresh memory is slow at first use."""

    def __init__(self, x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: float, storage: Tensor) -> None:
        # (f + g − C)/eps = ⟨x, y⟩/eps + (f − ½‖x‖²)/eps + (g − ½‖y‖²)/eps
        rows, columns = (f - x.square().sum(1) / 2) / eps, (g - y.square().sum(1) / 2) / eps
        self.matrix = storage[: len(x) * len(y)].view(len(x), len(y))
        for start in range(0, len(x), KERNEL_ROWS):
            part = slice(start, start + KERNEL_ROWS)
            block = torch.addmm(columns, x[part] / eps, y.T, out=self.matrix[part])
            block.add_(rows[part, None]).clamp_(min=MIN_EXPONENT).exp_()

    def times(self, v: Tensor) -> Tensor:
        """Mean over the columns of K_ij v_j, [N]."""
        return self.matrix @ v / len(v)

    def transposed_times(self, u: Tensor) -> Tensor:
        """Mean over the rows of u_i K_ij, [M]."""
        return u @ self.matrix / len(u)

    def at(self, log_u: Tensor) -> _Point:
        u = log_u.exp()
        v = 1 / self.transposed_times(u)
        rows = u * self.times(v)
        return _Point(log_u, u, v, rows, _mean(log_u) + _mean(v.log()), _mean((rows - 1).abs()))

    def newton_step(self, point: _Point) -> Tensor:
        """Ascent direction in log u, by conjugate gradients on I − F Fᵀ + q qᵀ, F = diag(u/q) K diag(v), q = √rows.

        q spans the constant shift of log u, along which the dual does not change; products with K are means.
        """
        root = point.rows.sqrt()
        left, squares = point.u / root, point.v.square()

        def hessian(z: Tensor) -> Tensor:
            return z - left * self.times(squares * self.transposed_times(left * z)) + root * (root * z).mean()

        residual = (1 - point.rows) / root
        solution, direction, norm = torch.zeros_like(residual), residual, residual @ residual
        goal = CG_TOLERANCE**2 * norm.item()
        for _ in range(CG_ITERATIONS):
            image = hessian(direction)
            length = norm / (direction @ image).clamp(min=torch.finfo(norm.dtype).tiny)
            solution, residual = solution + length * direction, residual - length * image
            norm, previous = residual @ residual, norm
            if norm.item() <= goal:
                break
            direction = residual + norm / previous * direction
        return solution / root

    def improve(self, point: _Point) -> _Point:
        """A Newton step where it raises the dual, shortened if necessary, else a Sinkhorn step."""
        step = self.newton_step(point)
        longest = min(1.0, MAX_LOG_FACTOR / max(step.abs().max().item(), 1e-30))
        floor = point.gain - 1e-6 * (1 + abs(point.gain))
        for shortening in (1.0, 0.5, 0.25, 0.0625):
            trial = self.at(point.log_u + shortening * longest * step)
            if math.isfinite(trial.error) and trial.gain >= floor:
                return trial
        return self.at(point.log_u - point.rows.log())


def _solve_level(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: float, tolerance: float, storage: Tensor
) -> tuple[Tensor, Tensor, float, int]:
    """Newton steps at one temperature from potentials of a nearby one; returns f, g, the marginal error, the count."""
    g, kernel, point = _start(x, y, f, g, eps, storage)
    steps = 0
    while point.error >= tolerance and steps < MAX_STEPS:
        point = kernel.improve(point)
        steps += 1
        if not point.is_moderate:
            f = f + eps * point.log_u
            g, kernel, point = _start(x, y, f, g + eps * point.v.log(), eps, storage)
    return f + eps * point.log_u, g + eps * point.v.log(), point.error, steps


def _start(x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: float, storage: Tensor) -> tuple[Tensor, _Kernel, _Point]:
    """The kernel around (f, g) and its point u = 1; if that exceeds float32, around f and the optimal g given f."""
    zero = torch.zeros_like(f)
    kernel = _Kernel(x, y, f, g, eps, storage)
    point = kernel.at(zero)
    if not point.is_moderate:
        g = Cost(y, x).softmin(f, zero - math.log(len(x)), eps)
        kernel = _Kernel(x, y, f, g, eps, storage)
        point = kernel.at(zero)
    return g, kernel, point


def _self_potential(
    x: Tensor, eps: float, storage: Tensor, tolerance: float = 1e-5, max_iterations: int = 50
) -> Tensor:
    """f = g of a cloud against itself: u ← √(u / K u), which halves the error of log u, with u in [N^-½, N^½]."""
    zero = x.new_zeros(len(x))
    kernel, u = _Kernel(x, x, zero, zero, eps, storage), zero + 1
    for _ in range(max_iterations):
        sums = kernel.times(u)
        error = _mean((u * sums - 1).abs())
        u = (u / sums).sqrt()
        if error < tolerance:
            break
    return eps * u.log()


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
