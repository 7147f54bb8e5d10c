"""A fixed number of Sinkhorn iterations: no value is read back, so that a GPU never waits for the host and
`torch.compile` sees one graph.

Some of the iterations anneal from the squared diameter, which is computed on the device; the rest are accelerated
iterations at eps = blur², each stored plan serving several of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blockwise import blockwise_loop
from .dense import ITERATIONS_PER_PLAN, accelerate, anneal
from .problem import Potentials, Problem

# A quarter of the iterations, at most 3, anneal above the final temperature.
ITERATIONS_PER_LEVEL, MAX_LEVELS = 4, 3


def fixed_potentials(problem: Problem, num_iterations: int, initial: Potentials | None = None) -> Potentials:
    """The potentials after `num_iterations` iterations; with `initial`, all of them are performed at eps = blur².

    `marginal_error` stays on the device.

    Reference: [Schmitzer2019] for the stored plan, [Nesterov1983] for the momentum, [Feydy2019] for the annealing.
    """
    if problem.a.shape[-1] > problem.b.shape[-1]:
        return fixed_potentials(problem.T, num_iterations, initial.T if initial is not None else None).T
    eps, levels = problem.eps, 0 if initial is not None else min(num_iterations // ITERATIONS_PER_LEVEL, MAX_LEVELS)
    f = torch.zeros_like(problem.a) if initial is None else initial.f.to(problem.a)
    temperatures: list[Tensor | float] = [*_annealing_temperatures(problem, levels), eps]
    if not problem.cost.is_dense:
        return blockwise_loop(problem, f, temperatures, None, num_iterations)
    u = previous = anneal(problem, f, temperatures)
    dual = problem.semidual(eps)
    for taken in range(0, num_iterations - levels, ITERATIONS_PER_PLAN):
        count = min(ITERATIONS_PER_PLAN, num_iterations - levels - taken)
        factors, before = accelerate(dual.at(u), previous, taken, count)
        u, previous = u + factors.log(), u + before.log()
    plan = dual.at(u)
    return Potentials(eps * u, eps * plan.v, plan.error, num_iterations)


def _annealing_temperatures(problem: Problem, count: int) -> list[Tensor]:
    """`count` geometrically decreasing temperatures from diameter² towards blur², without blur² itself, [P, 1] each."""
    ratio = (problem.cost.diameter()[..., None] / problem.blur).clamp(min=1)
    return [problem.eps * ratio ** (2 - 2 * level / count) for level in range(count)]
