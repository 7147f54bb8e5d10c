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
# No potential moves by more than this many eps in a step: between clusters that hardly exchange mass the dual is an
# exponential, of which Newton's step knows next to nothing. Shorter ones are tried before Sinkhorn's.
LONGEST_STEP = 8.0
SHORTENINGS = (1.0, 0.25, 0.0625)


def newton_loop(problem: Problem, f: Tensor, ladder: list[float], tolerance: float, max_iterations: int) -> Potentials:
    """Follow the ladder of temperatures from f, [P, N], with at least one Newton step at each."""
    passes = [0] * len(f)
    for level, eps in enumerate(ladder):
        enough = tolerance if level == len(ladder) - 1 else LEVEL_TOLERANCE
        plan = _solve_level(problem.semidual(eps).at(f / eps), enough, passes, max_iterations)
        f = eps * plan.u
    return Potentials(f, eps * plan.v, plan.error.cpu(), max(passes))


def _solve_level(plan: Plan, tolerance: float, passes: list[int], max_passes: int) -> Plan:
    """Steps at one temperature until every problem is solved, or stalls, or has spent its passes, which are counted."""
    lowest, stalled = [math.inf] * len(passes), [0] * len(passes)
    active = [one for one in range(len(passes)) if passes[one] < max_passes]
    while active:
        improved, errors, taken = _improve(plan.take(active))
        plan = plan.put(active, improved)
        for one, error, count in zip(active, errors, taken, strict=True):
            stalled[one] = 0 if error < lowest[one] else stalled[one] + 1
            lowest[one] = min(lowest[one], error)
            passes[one] += count
        unsolved = [one for one, error in zip(active, errors, strict=True) if error >= tolerance]
        active = [one for one in unsolved if stalled[one] < PATIENCE and passes[one] < max_passes]
    return plan


def _improve(plan: Plan) -> tuple[Plan, list[float], list[int]]:
    """A step to better points: Newton's where it raises the dual, shortened if need be, else Sinkhorn's.

    Returns the points, and for each problem its error, on the host, and the passes it took.
    """
    dual, rounding, tiny = plan.dual, torch.finfo(plan.u.dtype).eps, torch.finfo(plan.u.dtype).tiny
    log_rows = plan.rows.clamp(min=tiny).log()
    sinkhorn_step = (plan.u + dual.log_a - log_rows) / (1 + dual.relaxation) - plan.u
    newton_step = _newton_step(plan)
    if dual.is_balanced:
        newton_step = newton_step / (newton_step.abs().amax(-1, keepdim=True) / LONGEST_STEP).clamp(min=1)
    else:  # a row out of reach goes on by reach² at a time, and the others do not wait for it
        newton_step = newton_step.clamp(-LONGEST_STEP, max(LONGEST_STEP, 1 / float(dual.relaxation)))
    step = torch.where(newton_step.isfinite().all(-1, keepdim=True), newton_step, sinkhorn_step)
    value = plan.value
    floor = value - 8 * rounding * (1 + value.abs())
    best, errors, taken = plan, [math.inf] * len(value), [0] * len(value)
    undecided = list(range(len(value)))
    for shortening in (*SHORTENINGS, None):
        move = sinkhorn_step if shortening is None else shortening * step
        trial = dual.take(undecided).at((plan.u + move)[undecided])
        trial_errors, better = torch.stack([trial.error, (trial.value >= floor[undecided]).to(floor)]).tolist()
        best = best.put(undecided, trial)
        for one, error in zip(undecided, trial_errors, strict=True):
            errors[one], taken[one] = error, taken[one] + 1
        undecided = [one for one, is_better in zip(undecided, better, strict=True) if not is_better]
        if not undecided:
            break
    return best, errors, taken


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
