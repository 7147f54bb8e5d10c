"""Problems whose plan does not fit in memory: every Sinkhorn iteration recomputes it block by block.

One sweep over blocks of the larger cloud is a whole iteration: each block of costs gives the optimal g for its points,
and with it the block's share of the row sums r, from which the next f follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import block_rows
from .precision import matmul, weighted_rows
from .problem import Potentials, Problem


def blockwise_loop(
    problem: Problem, f: Tensor, temperatures: Sequence[Tensor | float], tolerance: float | None, max_iterations: int
) -> Potentials:
    """One sweep at every second temperature above the last, from f; then accelerated sweeps at the last temperature
    until the error is below the tolerance. With `tolerance=None` all iterations are performed, and the host reads no
    value.

    Reference: [Nesterov1983] for the momentum.
    """
    every_second = temperatures[:-1:2]
    for eps in every_second:
        f = _sinkhorn_step(problem, f, eps, _sweep(problem, f, eps)[1])
    eps, before, error = temperatures[-1], f, f.new_full((len(f),), torch.inf)
    for step in range(max(1, max_iterations - len(every_second))):
        start = f + step / (step + 3) * (f - before)
        g, rows = _sweep(problem, start, eps)
        targets = problem.row_mass(start)
        error = (rows - targets).abs().sum(-1) / targets.sum(-1)
        if tolerance is not None and bool(error < tolerance):
            break
        f, before = _sinkhorn_step(problem, start, eps, rows), f
    return Potentials(start, g, error, len(every_second) + step + 1)


def _sinkhorn_step(problem: Problem, f: Tensor, eps: Tensor | float, rows: Tensor) -> Tensor:
    """The optimal f given the g that produced these row sums together with f."""
    log_ratio = (problem.a / rows.clamp(min=torch.finfo(rows.dtype).tiny)).log()
    return (f + eps * log_ratio) / (1 + problem.relaxation(eps))


def _sweep(problem: Problem, f: Tensor, eps: Tensor | float) -> tuple[Tensor, Tensor]:
    """The optimal g given f, [1, M], and the row sums of their plan, [1, N]."""
    x, y, log_b, relaxation = problem.cost.x, problem.cost.y, problem.b.log(), problem.relaxation(eps)
    # (f_i − C_ij)/eps = (f_i − ½‖x_i‖²)/eps + ⟨y_j, x_i/eps⟩ − ½‖y_j‖²/eps
    offset = problem.a.log() + (f - x.square().sum(-1) / 2) / eps
    scaled = (x / eps if not isinstance(eps, Tensor) else x / eps[..., None]).mT
    sums, g_parts, count = torch.zeros_like(f), [], block_rows(x)
    for part, log_weights in zip(y.split(count, dim=-2), log_b.split(count, dim=-1), strict=True):
        scores = matmul(part, scaled).add_(offset[..., None, :])
        peak = scores.amax(-1)
        shares = scores.sub_(peak[..., None]).exp_()
        peak, log_mass = peak - part.square().sum(-1) / 2 / eps, shares.sum(-1).log()
        g_parts.append(-eps * (peak + log_mass) / (1 + relaxation))
        log_factors = (relaxation * peak - log_mass) / (1 + relaxation)  # g/eps + peak, without the terms that cancel
        sums = sums + weighted_rows(torch.exp(log_weights + log_factors), shares)
    return torch.cat(g_parts, dim=-1), sums
