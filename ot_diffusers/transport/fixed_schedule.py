"""A number of Sinkhorn steps set in advance: no value is read back, so that a GPU never waits for the host and
`torch.compile` sees one graph.

A third of the steps goes down a ladder of temperatures from the squared diameter, which is computed where the points
are; the rest are accelerated steps at eps = blur², on plans that are stored for a few of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import PASSES_PER_PLAN, accelerate, anneal
from .problem import Potentials, Problem

# One of so many steps is taken above the last temperature.
LADDER_SHARE = 3


def fixed_potentials(problem: Problem, num_iterations: int, initial: Potentials | None = None) -> Potentials:
    """The potentials after `num_iterations` steps; from those of a similar problem all are taken at eps = blur².

    `marginal_error` stays on the device and says how far they got.

    Reference: [Schmitzer2019] for the stored plan, [Nesterov1983] for the momentum, [Feydy2019] for the ladder.
    """
    if problem.a.shape[-1] > problem.b.shape[-1]:
        return fixed_potentials(problem.T, num_iterations, initial.T if initial else None).T
    eps, above = problem.eps, 0 if initial else num_iterations // LADDER_SHARE
    f = initial.f.to(problem.a) if initial else torch.zeros_like(problem.a)
    u = previous = anneal(problem, f, [*_temperatures(problem, above), eps])
    dual = problem.semidual(eps)
    for taken in range(0, num_iterations - above, PASSES_PER_PLAN):
        count = min(PASSES_PER_PLAN, num_iterations - above - taken)
        move, before = accelerate(dual.at(u), previous, taken, count)
        u, previous = u + move, u + before
    plan = dual.at(u)
    return Potentials(eps * u, eps * plan.v, plan.error, num_iterations)


def _temperatures(problem: Problem, count: int) -> list[Tensor]:
    """Geometric from diameter² towards blur², without the latter, [P, 1] each."""
    ratio = (problem.cost.diameter()[..., None] / problem.blur).clamp(min=1)
    return [problem.eps * ratio ** (2 - 2 * level / count) for level in range(count)]
