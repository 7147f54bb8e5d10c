"""Entropic optimal transport between point clouds, solved in the log domain to a stated accuracy.

Conventions of this package: cost C(x, y) = ½‖x − y‖², temperature eps = blur² (so `blur` is a length, in the units
of the points), clouds are [N, D], weights are positive and sum to one.

Symbols:

    a, b    weights of the rows and of the columns
    f, g    dual potentials                              [N], [M]
    P_ij  = a_i b_j exp((f_i + g_j − C_ij)/eps)          the transport plan
    r_i   = Σ_j P_ij                                     its row sums, equal to a_i at the solution

The solver anneals eps from the squared diameter to blur². The optimal g given f has a closed form (with it the column
sums of P are exact), which leaves a concave function of f alone, the semi-dual. Two kinds of steps maximise it:

    Sinkhorn   f ← f + eps·log(a/r)                                  cheap, linear convergence      [Cuturi2013]
    Newton     f ← f + eps·(diag(r) − P diag(1/b) Pᵀ)⁺ (a − r)       N×N system, quadratic convergence

Where to read next: `problem.py` states the problem, `dense.py` solves it where the plan fits in memory, with Newton's
method of `newton.py`, and `blockwise.py` where it does not. All of them take batches [P, N, D] of problems of one size;
a single problem is a batch of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from .blockwise import blockwise_loop
from .checks import check_clouds, is_readable, normalised_weights
from .dense import ITERATIONS_PER_PLAN, dense_loop
from .precision import full_precision, resolve, result_dtype, weighted_columns
from .problem import Potentials, Problem, annealing_schedule, problems
from .semidual import MAX_MOVE

# Iterations of a warm start before the problem is solved by annealing from the highest temperature after all.
WARM_START_ITERATIONS = 30
# Least number of `max_iterations` per annealing temperature: most iterations are left for the last temperature.
ITERATIONS_PER_LEVEL = 8
# Up to this `marginal_error` the value and the gradient meet the documented tolerance.
LARGEST_ERROR = 1e-3


def sinkhorn_potentials(
    x: Tensor,
    y: Tensor,
    *,
    blur: float,
    scaling: float = 0.7,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    reach: float | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 500,
    initial: Potentials | None = None,
) -> Potentials:
    """Solve max_{f,g} ⟨a, f⟩ + ⟨b, g⟩ − eps ⟨a⊗b, exp((f⊕g − C)/eps) − 1⟩ (marginals relaxed with `reach`).

    Args:
        x: [N, D] points, or [P, N, D], the clouds of P problems. No gradient flows through this function.
        y: [M, D] points, or [P, M, D]; a single cloud is shared by all P problems.
        blur: length; eps = blur².
        scaling: in (0, 1), ratio of successive blurs during annealing from the diameter (as in geomloss), at least .5.
            A ratio that needs more than one temperature for every 8 of `max_iterations` is lowered.
        x_weights, y_weights: [N], [M] or [P, N], [P, M], positive, sum 1; uniform by default.
        reach: length beyond which mass is destroyed rather than moved (KL penalty of strength reach²); `None` for
            balanced transport.
        tolerance: each problem stops when its own `marginal_error` falls below this.
        max_iterations: limit of the number of iterations. If the final `marginal_error` is above both the tolerance and
            1e-3, a warning states it.
        initial: potentials of a similar problem, for a warm start at the final eps.

    Raises:
        InputError: shapes, `blur`, `scaling`, `reach` or weights out of range, or non-finite points. On a GPU the
            values of weights are not checked, which would need a host–device synchronisation; they are normalised.

    Reference: [Cuturi2013]; annealing and unbalanced damping as in [Feydy2019], [Sejourne2019].

    Example:
        >>> x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> solution = sinkhorn_potentials(x, y, blur=0.1)
        >>> (solution.f + solution.g).item()  # ½·5²
        12.5
    """
    check_clouds(x, y, blur=blur, scaling=scaling, reach=reach)
    is_single = x.ndim == y.ndim == 2
    if initial is not None and is_single:
        initial = initial[None]
    solutions, errors = [], []
    with torch.no_grad(), full_precision(x):
        dtype = result_dtype(x, y)
        solved_in, blur, reach = resolve((x, y), blur, reach, may_read_values=True)
        x, y = x.to(solved_in), y.to(solved_in)
        a, b = normalised_weights(x_weights, x, "x_weights"), normalised_weights(y_weights, y, "y_weights")
        for part, problem in problems(x, y, a, b, blur, reach):
            start = initial[part] if initial is not None else None
            solutions.append(solve(problem, scaling, tolerance, max_iterations, start))
            errors.append(problem.misplaced(solutions[-1]))
    joined = Potentials.join(solutions).to(dtype)
    warn_of_errors(errors, tolerance, "raise blur or max_iterations")
    return joined[0] if is_single else joined


def self_potential(
    x: Tensor,
    *,
    blur: float,
    x_weights: Tensor | None = None,
    reach: float | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 200,
) -> Tensor:
    """The potential f = g of a cloud against itself, [N] or [P, N]; the averaged iteration of this symmetric problem
    converges fast.

    Reference: [Feydy2019].
    """
    check_clouds(x, x, blur=blur, reach=reach)
    with torch.no_grad(), full_precision(x):
        dtype = result_dtype(x)
        solved_in, blur, reach = resolve((x,), blur, reach, may_read_values=True)
        x = x.to(solved_in)
        a = normalised_weights(x_weights, x, "x_weights")
        parts = (problem for _, problem in problems(x, x, a, a, blur, reach))
        return torch.cat([solve_self(part, tolerance, max_iterations) for part in parts]).view(a.shape).to(dtype)


def _warn_of_last_step(move: Tensor, tolerance: float) -> None:
    """Warn if the last step of the averaged iteration, half the log error of each row, exceeds a tolerance above 0."""
    if tolerance > 0:
        warn_of_errors([2 * move.abs()], tolerance, "raise max_iterations")


def warn_of_errors(errors: Iterable[Tensor], tolerance: float, remedy: str) -> None:
    """Warn once if a `marginal_error` on the host is too large for the documented tolerance."""
    seen = [error.max() for error in errors if is_readable(error)]
    worst = torch.stack(seen).max().item() if seen else 0.0
    if not worst <= max(LARGEST_ERROR, tolerance):
        warnings.warn(
            f"the transport problem has not converged: its marginal error is {worst:.2g}, and value and gradient are "
            f"wrong by about as much; {remedy}",
            stacklevel=3,
        )


def solve(
    problem: Problem,
    scaling: float,
    tolerance: float = 1e-5,
    max_iterations: int = 500,
    initial: Potentials | None = None,
) -> Potentials:
    """`sinkhorn_potentials` for a batch of problems, without checks: anneal to eps = blur², then converge."""
    a, b = problem.a, problem.b
    if a.shape[-1] > b.shape[-1]:  # f belongs to the smaller cloud, where Newton's method is cheap
        return solve(problem.T, scaling, tolerance, max_iterations, initial.T if initial is not None else None).T
    loop = dense_loop if problem.cost.is_dense else blockwise_loop
    if initial is not None:
        warm = loop(problem, initial.f.to(a), [problem.eps], tolerance, WARM_START_ITERATIONS)
        if bool((warm.marginal_error < tolerance).all()):
            return warm
    diameter = problem.cost.diameter().max().item()
    temperatures = annealing_schedule(diameter, problem.blur, scaling, max_iterations // ITERATIONS_PER_LEVEL)
    return loop(problem, torch.zeros_like(a), temperatures, tolerance, max_iterations)


def solve_self(
    problem: Problem, tolerance: float = 1e-5, max_iterations: int = 200, initial: Tensor | None = None
) -> Tensor:
    """`self_potential` for a batch of problems, without checks, from `initial` or zero, [P, N]. With a tolerance of 0
    all iterations are performed, and the host reads no value."""
    f = torch.zeros_like(problem.a) if initial is None else initial.to(problem.a)
    loop = _dense_self_loop if problem.cost.is_dense else _blockwise_self_loop
    return loop(problem, f, tolerance, max_iterations)


def _dense_self_loop(problem: Problem, f: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Averaged iteration of the factors exp(f/eps) ← √(exp(f/eps) · optimal factors), on the stored plan of f = 0."""
    eps, share = problem.eps, 1 / (1 + problem.relaxation(problem.eps))
    stored = (problem.cost.matrix / -eps).add_(problem.a.log()[..., None, :]).exp_()
    # If eps is below the rounding errors of the costs, a point can seem to be far from itself.
    stored.diagonal(dim1=-2, dim2=-1).clamp_(min=torch.finfo(stored.dtype).tiny)
    factors = (f / eps).clamp(-MAX_MOVE, MAX_MOVE).exp()
    for step in range(1, max_iterations + 1):
        sums = weighted_columns(stored, factors)
        ratio = factors / (sums if problem.reach is None else sums**share)
        factors, before = ratio.sqrt(), factors
        is_due = tolerance > 0 and step % ITERATIONS_PER_PLAN == 0
        if is_due and (factors / before).log().abs().max() < tolerance / 2:
            break
    else:
        _warn_of_last_step((factors / before).log(), tolerance)
    return -share * eps * weighted_columns(stored, factors).log()


def _blockwise_self_loop(problem: Problem, f: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Averaged iteration: f ← the mean of f and the optimal potential given f."""
    eps, log_a, share = problem.eps, problem.a.log(), 1 / (1 + problem.relaxation(problem.eps))
    for step in range(1, max_iterations + 1):
        update = share * problem.cost.softmin(f, log_a, eps)
        f, before = (f + update) / 2, f
        is_due = tolerance > 0 and step % ITERATIONS_PER_PLAN == 0
        if is_due and (f - before).abs().max() < tolerance * eps / 2:
            break
    else:
        _warn_of_last_step((f - before) / eps, tolerance)
    return share * problem.cost.softmin(f, log_a, eps)
