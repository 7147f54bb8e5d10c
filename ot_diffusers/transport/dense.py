"""Problems whose plan fits in memory: Sinkhorn iterations on a stored plan, then Newton's method where needed.

The exponential of the plan is computed once for several iterations, each of which then needs two products of the stored
plan with a vector. With Nesterov momentum a few dozen iterations suffice at a moderate blur, with few host–device
synchronisations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .newton import newton_loop
from .problem import Potentials, Problem
from .semidual import Plan

# Sinkhorn iterations on one stored plan, after which the host reads the error.
ITERATIONS_PER_PLAN = 10
# Sinkhorn iterations before Newton's method takes over. On a GPU they cost almost nothing, whereas every Newton step
# needs a host–device synchronisation.
SINKHORN_LIMIT = {"cpu": 60, "cuda": 400}
# Where the relative error of every row sum is below NEAR, Newton's method continues at the last temperature for at most
# this many iterations. If that fails, it starts again at the highest temperature.
NEAR, FINISHING_ITERATIONS = 0.5, 8
# Where the `marginal_error` is still larger than this, Newton's method runs again with twice as many temperatures.
STUCK = 1e-3


def dense_loop(
    problem: Problem, f: Tensor, temperatures: list[float], tolerance: float, max_iterations: int
) -> Potentials:
    """Solve from f, [P, N], at decreasing temperatures; each problem stops at the tolerance or at `max_iterations`."""
    steps = min(max_iterations - FINISHING_ITERATIONS, SINKHORN_LIMIT.get(f.device.type, SINKHORN_LIMIT["cpu"]))
    every_second = [*temperatures[:-1:2], temperatures[-1]]
    potentials, worst_row = _sinkhorn_loop(problem, f, every_second, tolerance, max(1, steps))
    close = [index for index in _unsolved(potentials, tolerance) if worst_row[index] < NEAR]
    potentials = _refined(potentials, close, problem, potentials.f, temperatures[-1:], tolerance, FINISHING_ITERATIONS)
    budget = max_iterations - potentials.iterations
    if budget > 0 and len(temperatures) > 1:
        potentials = _refined(potentials, _unsolved(potentials, tolerance), problem, f, temperatures, tolerance, budget)
        stuck, budget = _unsolved(potentials, max(tolerance, STUCK)), max_iterations - potentials.iterations
        if stuck and budget > 2 * len(temperatures):
            between = [math.sqrt(hot * cold) for hot, cold in pairwise(temperatures)]
            finer = sorted([*temperatures, *between], reverse=True)
            second_attempt = newton_loop(problem.take(stuck), f[stuck], finer, tolerance, budget)
            better = (second_attempt.marginal_error < potentials.marginal_error[stuck]).nonzero()[:, 0].tolist()
            potentials = potentials.put([stuck[position] for position in better], second_attempt[better])
    return potentials


def anneal(problem: Problem, f: Tensor, temperatures: Sequence[Tensor | float]) -> Tensor:
    """One Sinkhorn iteration at every temperature above the last, from f; returns f/eps at the last one, [P, N]."""
    u = f / temperatures[0]
    for eps, colder in pairwise(temperatures):
        u = (u + problem.semidual(eps).at(u).annealing_step().log()) * (eps / colder)
    return u


def accelerate(plan: Plan, previous: Tensor, taken: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` Sinkhorn iterations with momentum from the plan's u.

    Args:
        plan: the plan at u.
        previous: [P, N], the iterate before u.
        taken: number of iterations so far.
        count: number of further iterations.

    Returns:
        The last iterate and the one before it, as factors of the plan's rows.

    Reference: [Nesterov1983].
    """
    factors, before = torch.ones_like(previous), (previous - plan.u).exp()
    for step in range(taken, taken + count):
        ahead = factors * (factors / before) ** (step / (step + 3))
        factors, before = plan.sinkhorn_step(ahead), factors
    return factors, before


def _sinkhorn_loop(
    problem: Problem, f: Tensor, temperatures: list[float], tolerance: float, max_iterations: int
) -> tuple[Potentials, list[float]]:
    """Sinkhorn iterations only. The host synchronises with the device once every `ITERATIONS_PER_PLAN` iterations.

    Returns:
        The potentials, and for each problem the largest relative error of a row sum.
    """
    eps, count = temperatures[-1], min(ITERATIONS_PER_PLAN, max_iterations)
    u = previous = anneal(problem, f, temperatures)
    dual, active = problem.semidual(eps), list(range(len(f)))
    potentials = Potentials(f, problem.b, f.new_full((len(f),), math.inf, device="cpu"), len(temperatures) - 1)
    worst_row, taken = [math.inf] * len(f), 0
    while active and (taken == 0 or potentials.iterations < max_iterations):
        plan = dual.at(u)
        factors, before = accelerate(plan, previous, taken, count)
        column_factors = plan.best_columns(factors)
        errors, worst = torch.stack(plan.errors_after(factors, column_factors)).tolist()
        taken += count
        u, previous, v = plan.u + factors.log(), plan.u + before.log(), plan.v + column_factors.log()
        del plan  # its matrix, before the next one
        part = Potentials(eps * u, eps * v, potentials.marginal_error.new_tensor(errors), count + 1)
        potentials = potentials.put(active, part)
        for index, row_error in zip(active, worst, strict=True):
            worst_row[index] = row_error
        kept = [position for position, error in enumerate(errors) if error >= tolerance]
        if len(kept) < len(active):
            u, previous, dual, active = u[kept], previous[kept], dual.take(kept), [active[index] for index in kept]
    return potentials, worst_row


def _unsolved(potentials: Potentials, tolerance: float) -> list[int]:
    return [index for index, error in enumerate(potentials.marginal_error.tolist()) if not error < tolerance]


def _refined(potentials: Potentials, which: list[int], problem: Problem, f: Tensor, *options: Any) -> Potentials:
    """`potentials`, with those of the problems `which` replaced by solutions of Newton's method, started from f."""
    if not which:
        return potentials
    return potentials.put(which, newton_loop(problem.take(which), f[which], *options))
