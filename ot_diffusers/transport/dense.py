"""Problems whose plan fits in memory: Sinkhorn's steps on stored plans, and Newton's where they do not suffice.

The exponential of a plan is taken once at a temperature. A Sinkhorn step is then two products of the stored plan with a
vector, and with Nesterov's momentum a few dozen of them do at a moderate blur, with hardly a word between host and
device.
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

# Sinkhorn steps on one stored plan before the host looks at the error; one at each temperature above the last.
PASSES_PER_PLAN = 10
# Sinkhorn steps before Newton takes over. On a GPU they are nearly free, and every Newton step is a wait.
MAX_PLAIN_PASSES = {"cpu": 60, "cuda": 400}
# Where every row has its mass up to this share of it, Newton has so many passes to finish from there, at the last
# temperature, before it starts at the top of the ladder.
NEAR, FINISHING_PASSES = 0.5, 8
# Newton gets a second ladder of half the steps where the first one left a larger `marginal_error`.
STUCK = 1e-3


def dense_loop(problem: Problem, f: Tensor, ladder: list[float], tolerance: float, max_iterations: int) -> Potentials:
    """From f, [P, N], down the ladder of temperatures until each problem is solved or has spent its passes."""
    steps = min(max_iterations - FINISHING_PASSES, MAX_PLAIN_PASSES.get(f.device.type, MAX_PLAIN_PASSES["cpu"]))
    steep = [*ladder[:-1:2], ladder[-1]]
    potentials, worst_row = _plain_loop(problem, f, steep, tolerance, max(1, steps))
    near = [one for one in _unsolved(potentials, tolerance) if worst_row[one] < NEAR]
    potentials = _finished(potentials, near, problem, potentials.f, ladder[-1:], tolerance, FINISHING_PASSES)
    left = max_iterations - potentials.iterations
    if left > 0 and len(ladder) > 1:
        potentials = _finished(potentials, _unsolved(potentials, tolerance), problem, f, ladder, tolerance, left)
        stuck, left = _unsolved(potentials, max(tolerance, STUCK)), max_iterations - potentials.iterations
        if stuck and left > 2 * len(ladder):
            between = [math.sqrt(hot * cold) for hot, cold in pairwise(ladder)]
            finer = sorted([*ladder, *between], reverse=True)
            again = newton_loop(problem.take(stuck), f[stuck], finer, tolerance, left)
            better = (again.marginal_error < potentials.marginal_error[stuck]).nonzero()[:, 0].tolist()
            potentials = potentials.put([stuck[position] for position in better], again[better])
    return potentials


def anneal(problem: Problem, f: Tensor, ladder: Sequence[Tensor | float]) -> Tensor:
    """One Sinkhorn step at every temperature above the last, from f; what f/eps is at the last, [P, N]."""
    u = f / ladder[0]
    for eps, colder in pairwise(ladder):
        u = (u + problem.semidual(eps).at(u).annealing_step().log()) * (eps / colder)
    return u


def accelerate(plan: Plan, previous: Tensor, taken: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` Sinkhorn steps with momentum from the plan's u, to which earlier ones led by way of `previous`.

    Returns:
        The last iterate and the one before it, as factors of the plan's rows.

    Reference: [Nesterov1983].
    """
    factors, before = torch.ones_like(previous), (previous - plan.u).exp()
    for step in range(taken, taken + count):
        ahead = factors * (factors / before) ** (step / (step + 3))
        factors, before = plan.sinkhorn_step(ahead), factors
    return factors, before


def _plain_loop(
    problem: Problem, f: Tensor, ladder: list[float], tolerance: float, max_iterations: int
) -> tuple[Potentials, list[float]]:
    """Sinkhorn steps alone. The host waits for the device once every `PASSES_PER_PLAN` steps.

    Returns:
        The potentials, and for each problem the largest share of its mass that a row has too much or too little.
    """
    eps, count = ladder[-1], min(PASSES_PER_PLAN, max_iterations)
    dual, active = problem.semidual(eps), list(range(len(f)))
    u = previous = anneal(problem, f, ladder)
    potentials = Potentials(f, problem.b, f.new_full((len(f),), math.inf, device="cpu"), len(ladder) - 1)
    worst_row, taken = [math.inf] * len(f), 0
    while active and (taken == 0 or potentials.iterations < max_iterations):
        plan = dual.at(u)
        factors, before = accelerate(plan, previous, taken, count)
        column_factors = plan.best_columns(factors)
        errors, worst = torch.stack(plan.errors_after(factors, column_factors)).tolist()
        taken += count
        u, previous, v = plan.u + factors.log(), plan.u + before.log(), plan.v + column_factors.log()
        part = Potentials(eps * u, eps * v, potentials.marginal_error.new_tensor(errors), count + 1)
        potentials = potentials.put(active, part)
        for one, share in zip(active, worst, strict=True):
            worst_row[one] = share
        left = [position for position, error in enumerate(errors) if error >= tolerance]
        if len(left) < len(active):
            u, previous, dual, active = u[left], previous[left], dual.take(left), [active[one] for one in left]
    return potentials, worst_row


def _unsolved(potentials: Potentials, tolerance: float) -> list[int]:
    return [one for one, error in enumerate(potentials.marginal_error.tolist()) if not error < tolerance]


def _finished(potentials: Potentials, which: list[int], problem: Problem, f: Tensor, *options: Any) -> Potentials:
    """What Newton's loop makes of some of the problems, from f, after the passes of an earlier attempt."""
    if not which:
        return potentials
    return potentials.put(which, newton_loop(problem.take(which), f[which], *options))
