"""A number of Sinkhorn steps set in advance: no value is read back, so that a GPU never waits for the host and
`torch.compile` sees one graph.

Some of the steps go down a ladder of temperatures from the squared diameter, which is computed where the points
are; the rest are accelerated steps at eps = blur², on plans that are stored for a few of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blockwise import blockwise_loop
from .dense import PASSES_PER_PLAN, accelerate, anneal
from .problem import Potentials, Problem

# One of so many steps is taken above the last temperature, and no more than these.
LADDER_SHARE, MAX_LEVELS = 4, 3


def fixed_potentials(problem: Problem, num_iterations: int, initial: Potentials | None = None) -> Potentials:
    """The potentials after `num_iterations` steps; from those of a similar problem all are taken at eps = blur².

    `marginal_error` stays on the device and says how far they got.

    Reference: [Schmitzer2019] for the stored plan, [Nesterov1983] for the momentum, [Feydy2019] for the ladder.
    """
    if problem.a.shape[-1] > problem.b.shape[-1]:
        return fixed_potentials(problem.T, num_iterations, initial.T if initial is not None else None).T
    eps, levels = problem.eps, 0 if initial is not None else min(num_iterations // LADDER_SHARE, MAX_LEVELS)
    f = torch.zeros_like(problem.a) if initial is None else initial.f.to(problem.a)
    ladder: list[Tensor | float] = [*_temperatures(problem, levels), eps]
    if not problem.cost.is_dense:
        return blockwise_loop(problem, f, ladder, None, num_iterations)
    u = previous = anneal(problem, f, ladder)
    dual = problem.semidual(eps)
    for taken in range(0, num_iterations - levels, PASSES_PER_PLAN):
        count = min(PASSES_PER_PLAN, num_iterations - levels - taken)
        factors, before = accelerate(dual.at(u), previous, taken, count)
        u, previous = u + factors.log(), u + before.log()
    plan = dual.at(u)
    return Potentials(eps * u, eps * plan.v, plan.error, num_iterations)


def _temperatures(problem: Problem, count: int) -> list[Tensor]:
    """Geometric from diameter² towards blur², without the latter, [P, 1] each."""
    ratio = (problem.cost.diameter()[..., None] / problem.blur).clamp(min=1)
    return [problem.eps * ratio ** (2 - 2 * level / count) for level in range(count)]
