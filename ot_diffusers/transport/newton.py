"""Newton's method on the semi-dual: quadratic convergence where Sinkhorn iterations are slow.

    u ← u + (diag(r) − P diag(1/c) Pᵀ)⁺ (a − r),     r and c the row and column sums of P

The unknowns belong to the smaller cloud. The linear system is solved by factorisation or, from a few hundred points on,
by conjugate gradients; where the Newton step does not raise the dual objective, a Sinkhorn step replaces it. The
problems of a batch take their steps together, and each leaves the batch when it has converged; the host synchronises
with the device once per step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import weighted_columns, weighted_rows
from .problem import Potentials, Problem
from .semidual import Plan

# Newton's system is factorised up to this size; larger systems are solved by conjugate gradients, to a relative
# residual of .01 at best.
MAX_FACTORISED_SIZE = 384
CG_TOLERANCE, CG_ITERATIONS = 0.01, 100
# Each temperature above the last is solved to this `marginal_error`, so that the next one starts close to its solution.
LEVEL_TOLERANCE = 0.01
# Newton's method stops after this many steps in a row without a lower error: costs of 1e5 eps leave float32 little
# precision.
PATIENCE = 20
# No potential moves by more than this many eps in one step: between clusters that hardly exchange mass the dual is an
# exponential, which Newton's quadratic model approximates badly. Shortened steps are tried before a Sinkhorn step.
LONGEST_STEP = 8.0
SHORTENINGS = (1.0, 0.25, 0.0625)


def newton_loop(
    problem: Problem, f: Tensor, temperatures: list[float], tolerance: float, max_iterations: int
) -> Potentials:
    """Newton's method at decreasing temperatures, from f, [P, N], with at least one step at each."""
    iterations = [0] * len(f)
    for level, eps in enumerate(temperatures):
        level_tolerance = tolerance if level == len(temperatures) - 1 else LEVEL_TOLERANCE
        plan = _solve_level(problem.semidual(eps).at(f / eps), level_tolerance, iterations, max_iterations)
        f = eps * plan.u
    return Potentials(f, eps * plan.v, plan.error.cpu(), max(iterations))


def _solve_level(plan: Plan, tolerance: float, iterations: list[int], max_iterations: int) -> Plan:
    """Steps at one temperature until each problem converges, stalls or reaches `max_iterations`; counts
    `iterations`."""
    lowest, stalled = [math.inf] * len(iterations), [0] * len(iterations)
    active = [index for index in range(len(iterations)) if iterations[index] < max_iterations]
    while active:
        improved, errors, taken = _improve(plan.take(active))
        plan = plan.put(active, improved)
        for index, error, count in zip(active, errors, taken, strict=True):
            stalled[index] = 0 if error < lowest[index] else stalled[index] + 1
            lowest[index] = min(lowest[index], error)
            iterations[index] += count
        unsolved = [index for index, error in zip(active, errors, strict=True) if error >= tolerance]
        active = [index for index in unsolved if stalled[index] < PATIENCE and iterations[index] < max_iterations]
    return plan


def _improve(plan: Plan) -> tuple[Plan, list[float], list[int]]:
    """One step of every problem: Newton's where it raises the dual objective, shortened if necessary, else Sinkhorn's.

    Returns:
        The new plan, and for each problem its error, on the host, and the number of plans that were evaluated.
    """
    dual, rounding, tiny = plan.dual, torch.finfo(plan.u.dtype).eps, torch.finfo(plan.u.dtype).tiny
    log_rows = plan.rows.clamp(min=tiny).log()
    sinkhorn_step = (plan.u + dual.log_a - log_rows) / (1 + dual.relaxation) - plan.u
    newton_step = _newton_step(plan)
    if dual.is_balanced:
        newton_step = newton_step / (newton_step.abs().amax(-1, keepdim=True) / LONGEST_STEP).clamp(min=1)
    else:  # a row out of reach may move by reach² per step, and does not slow down the others
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
        for index, error in zip(undecided, trial_errors, strict=True):
            errors[index], taken[index] = error, taken[index] + 1
        undecided = [index for index, is_better in zip(undecided, better, strict=True) if not is_better]
        if not undecided:
            break
    return best, errors, taken


def _newton_step(plan: Plan) -> Tensor:
    """Ascent direction from the Hessian diag(r + κ targets) − P diag(1/c) Pᵀ/(1 + κ), scaled to a unit diagonal.

    For κ = 0 the dual does not change along the constant vector: r rᵀ makes the matrix invertible there, and a ridge
    does so for clusters that exchange no mass. The result is not finite where a row has lost its mass.
    """
    relaxation = plan.dual.relaxation
    root = (plan.rows + relaxation * plan.targets).sqrt()
    flow = (plan.matrix * (plan.columns * (1 + relaxation)).rsqrt()[..., None, :]).div_(root[..., None])
    filling = root if relaxation == 0 else torch.zeros_like(root)
    gradient = (plan.targets - plan.rows) / root
    if root.shape[-1] > MAX_FACTORISED_SIZE:
        return _conjugate_gradients(flow, filling, gradient) / root
    hessian = (filling[..., :, None] * filling[..., None, :]).sub_(flow @ flow.mT).double()
    hessian.diagonal(dim1=-2, dim2=-1).add_(1 + 4 * torch.finfo(root.dtype).eps)
    factor, _ = torch.linalg.cholesky_ex(hessian)
    return torch.cholesky_solve(gradient.double()[..., None], factor)[..., 0].to(root.dtype) / root


def _conjugate_gradients(flow: Tensor, filling: Tensor, gradient: Tensor) -> Tensor:
    """Approximate solution z of (I − F Fᵀ + q qᵀ) z = gradient; an ascent direction even when stopped early."""

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
