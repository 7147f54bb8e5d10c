"""Newton's method on the semi-dual: quadratic convergence where Sinkhorn's steps are slow.

    u ← u + (diag(r) − P diag(1/c) Pᵀ)⁺ (a − r),     r and c the row and column sums of P

On the smaller cloud, by factorisation or, from a few hundred points on, by conjugate gradients, falling back on
Sinkhorn's step wherever its own does not raise the dual. The problems of a batch take their steps together and leave
one by one as they are solved; the host waits for the device once a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import weighted_columns, weighted_rows
from .problem import Potentials, Problem
from .semidual import Plan

# Newton's system is factorised up to this size; larger ones are solved by conjugate gradients, to a hundredth at most.
MAX_FACTORISED_SIZE = 384
CG_TOLERANCE, CG_ITERATIONS = 0.01, 100
# The `marginal_error` to which each temperature is solved before the next, so that Newton starts close to its solution.
LEVEL_TOLERANCE = 0.01
# Newton stops where this many steps in a row bring no lower error: costs of 1e5 eps leave float32 little precision.
PATIENCE = 20
# Lengths of a step, over Newton's, that are tried before Sinkhorn's.
SHORTENINGS = (1.0, 0.25, 0.0625)


def newton_loop(problem: Problem, f: Tensor, ladder: list[float], tolerance: float, max_iterations: int) -> Potentials:
    """Follow the ladder of temperatures from f, [P, N], with at least one Newton step at each."""
    iterations = 0
    for level, eps in enumerate(ladder):
        enough = tolerance if level == len(ladder) - 1 else LEVEL_TOLERANCE
        plan, passes = _solve_level(problem.semidual(eps).at(f / eps), enough, max_iterations - iterations)
        iterations += passes
        f = eps * plan.u
    return Potentials(f, eps * plan.v, plan.error.cpu(), iterations)


def _solve_level(plan: Plan, tolerance: float, max_passes: int) -> tuple[Plan, int]:
    """Steps at one temperature until every problem is solved, or stalls, or the passes are spent."""
    active, passes = list(range(len(plan.u))), 0
    lowest, stalled = [math.inf] * len(active), [0] * len(active)
    while active and passes < max_passes:
        improved, errors, taken = _improve(plan.take(active))
        plan = plan.put(active, improved)
        passes += taken
        for problem, error in zip(active, errors, strict=True):
            stalled[problem] = 0 if error < lowest[problem] else stalled[problem] + 1
            lowest[problem] = min(lowest[problem], error)
        found = dict(zip(active, errors, strict=True))
        active = [problem for problem in active if found[problem] >= tolerance and stalled[problem] < PATIENCE]
    return plan, passes


def _improve(plan: Plan) -> tuple[Plan, list[float], int]:
    """A step to better points: Newton's where it raises the dual, shortened if need be, else Sinkhorn's.

    Returns the points, their errors on the host, and the passes it took.
    """
    dual, rounding, tiny = plan.dual, torch.finfo(plan.u.dtype).eps, torch.finfo(plan.u.dtype).tiny
    log_rows = plan.rows.clamp(min=tiny).log()
    sinkhorn_step = (plan.u + dual.log_a - log_rows) / (1 + dual.relaxation) - plan.u
    newton_step = _newton_step(plan)
    step = torch.where(newton_step.isfinite().all(-1, keepdim=True), newton_step, sinkhorn_step)
    floor = plan.value - 8 * rounding * (1 + plan.value.abs())
    best, errors, undecided = plan, [math.inf] * len(plan.u), list(range(len(plan.u)))
    attempts = 0
    for shortening in (*SHORTENINGS, None):
        move = sinkhorn_step if shortening is None else shortening * step
        attempts += 1
        trial = dual.take(undecided).at((plan.u + move)[undecided])
        trial_errors, better = torch.stack([trial.error, (trial.value >= floor[undecided]).to(floor)]).tolist()
        best = best.put(undecided, trial)
        for problem, error in zip(undecided, trial_errors, strict=True):
            errors[problem] = error
        undecided = [problem for problem, is_better in zip(undecided, better, strict=True) if not is_better]
        if not undecided:
            break
    return best, errors, attempts


def _newton_step(plan: Plan) -> Tensor:
    """Ascent direction from the Hessian diag(r + κ targets) − P diag(1/c) Pᵀ/(1 + κ), scaled to a unit diagonal.

    For κ = 0 the constant vector, along which the dual does not change, is filled by r rᵀ; a ridge covers clusters that
    exchange no mass. Not finite where a row has lost its mass.
    """
    relaxation = plan.dual.relaxation
    root = (plan.rows + relaxation * plan.targets).sqrt()
    flow = plan.matrix * (plan.columns * (1 + relaxation)).rsqrt()[..., None, :] / root[..., None]
    filling = root if relaxation == 0 else torch.zeros_like(root)
    gradient = (plan.targets - plan.rows) / root
    if root.shape[-1] > MAX_FACTORISED_SIZE:
        return _conjugate_gradients(flow, filling, gradient) / root
    hessian = (filling[..., :, None] * filling[..., None, :]).sub_(flow @ flow.mT).double()
    hessian.diagonal(dim1=-2, dim2=-1).add_(1 + 4 * torch.finfo(root.dtype).eps)
    factor, _ = torch.linalg.cholesky_ex(hessian)
    return torch.cholesky_solve(gradient.double()[..., None], factor)[..., 0].to(root.dtype) / root


def _conjugate_gradients(flow: Tensor, filling: Tensor, gradient: Tensor) -> Tensor:
    """Approximate solution z of (I − F Fᵀ + q qᵀ) z = gradient; stopped early it is still an ascent direction."""

    def product(z: Tensor, w: Tensor) -> Tensor:
        return (z * w).sum(-1, keepdim=True)

    solution, residual, tiny = torch.zeros_like(gradient), gradient, torch.finfo(gradient.dtype).tiny
    direction, norm = residual, product(residual, residual)
    goal = CG_TOLERANCE**2 * norm
    for iteration in range(1, CG_ITERATIONS + 1):
        image = direction + filling * product(filling, direction)
        image = image - weighted_columns(flow, weighted_rows(direction, flow))
        length = norm / product(direction, image).clamp(min=tiny)
        solution, residual = solution + length * direction, residual - length * image
        norm, previous = product(residual, residual), norm
        direction = residual + norm / previous.clamp(min=tiny) * direction
        if iteration % 10 == 0 and bool((norm < goal).all()):
            break
    return solution
