"""Problems whose plan does not fit in memory: it is recomputed block by block in every Sinkhorn step."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Potentials, Problem


def blockwise_loop(
    problem: Problem, f: Tensor, ladder: list[float], tolerance: float, max_iterations: int
) -> Potentials:
    """Alternating (damped) updates; convergence is checked every few passes, where the last temperature is reached."""
    log_a, log_b, columns = problem.a.log(), problem.b.log(), problem.cost.T
    error = torch.full((1,), torch.inf)
    iterations = 0
    for level, eps in enumerate(ladder):
        last = level == len(ladder) - 1
        factor = 1 / (1 + problem.relaxation(eps))
        while True:
            g = factor * columns.softmin(f, log_a, eps)
            best = problem.cost.softmin(g, log_b, eps)
            iterations += 1
            if last and iterations % 5 == 0:
                rows, targets = problem.a * torch.exp((f - best) / eps), problem.row_mass(f)
                error = (rows - targets).abs().sum(-1) / targets.sum(-1)
            f = factor * best
            if not last or iterations >= max_iterations or error < tolerance:
                break
    return Potentials(f, factor * columns.softmin(f, log_a, eps), error, iterations)
