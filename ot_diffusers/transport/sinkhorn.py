"""Entropic optimal transport between two point clouds, solved in the log domain to a stated accuracy.

Conventions of the whole folder: cost C(x, y) = ½‖x − y‖², temperature eps = blur² (so `blur` is a length, in the units
of the points), clouds are [N, D], weights are positive and sum to one.

Symbols:

    a, b    weights of the rows and of the columns
    f, g    dual potentials                              [N], [M]
    P_ij  = a_i b_j exp((f_i + g_j − C_ij)/eps)          the transport plan
    r_i   = Σ_j P_ij                                     its row sums, equal to a_i at the solution

The solver follows eps down from the squared diameter to blur². The best g given f is explicit (then the column sums of
P are exact), which leaves a concave function of f alone, and two kinds of steps on it:

    Sinkhorn   f ← f + eps·log(a/r)                                  cheap, linear convergence      [Cuturi2013]
    Newton     f ← f + eps·(diag(r) − P diag(1/b) Pᵀ)⁺ (a − r)       N×N system, quadratic convergence

Where the plan fits in one block, its exponential is taken once at a temperature. A Sinkhorn step is then two products
of the stored plan with a vector, and with Nesterov's momentum a few dozen of them do at a moderate blur, with hardly a
word between host and device. What they leave unsolved at a small blur Newton finishes, on the smaller cloud, by
factorisation or, from a few hundred points on, by conjugate gradients, falling back on Sinkhorn's step wherever its own
does not raise the dual. Plans that do not fit are recomputed block by block in every Sinkhorn step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import require

# Above this many entries no N×M tensor is made: costs are recomputed block by block.
MAX_DENSE_ENTRIES = 2**25
# Sinkhorn steps on one stored plan before the host looks at the error; one at each temperature above the last.
PASSES_PER_PLAN = 10
# Sinkhorn steps before Newton takes over. On a GPU they are nearly free, and every Newton step is a wait.
MAX_PLAIN_PASSES = {"cpu": 60, "cuda": 400}
# Where every row has its mass up to this share of it, Newton has so many passes to finish from there, at the last
# temperature, before it starts at the top of the ladder.
NEAR, FINISHING_PASSES = 0.5, 8
# Newton's system is factorised up to this size; larger ones are solved by conjugate gradients, to a hundredth at most.
MAX_FACTORISED_SIZE = 384
CG_TOLERANCE, CG_ITERATIONS = 0.01, 100
# Passes that a warm start may take before the problem is solved from the top of the ladder after all.
WARM_PASSES = 30
# The `marginal_error` to which each temperature is solved before the next, so that Newton starts close to its solution.
LEVEL_TOLERANCE = 0.01
# Newton stops where this many steps in a row bring no lower error: costs of 1e5 eps leave float32 little precision.
PATIENCE = 20


@dataclass(frozen=True)
class Potentials:
    """Dual solution of one entropic transport problem.

    Attributes:
        f: [N], potential of the first cloud; `f` and `g` are in units of cost.
        g: [M], potential of the second cloud.
        marginal_error: ‖r − a‖₁ in [0, 2], how far the row sums of the plan were from their weights when the loop
            stopped (0-d tensor, on the CPU where the host has seen it; for unbalanced problems how far from
            a exp(−f/reach²), over its mass).
        iterations: passes over the plan.
    """

    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: int


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
        x: [N, D] points. No gradient flows through this function.
        y: [M, D] points.
        blur: length; eps = blur².
        scaling: in (0, 1), ratio of successive blurs on the way down from the diameter (geomloss' meaning).
        x_weights, y_weights: [N], [M], positive, sum 1; uniform by default.
        reach: length beyond which mass is rather destroyed than moved (KL penalty of strength reach²); `None` is
            balanced.
        tolerance: stop when `marginal_error` falls below it.
        max_iterations: bound on the passes over the plan.
        initial: potentials of a similar problem, tried first at the final eps.

    Raises:
        InputError: shapes, `blur`, `scaling`, `reach` or weights out of range, or points that are not finite.

    Reference: [Cuturi2013]; annealing and unbalanced damping as in [Feydy2019], [Sejourne2019].

    Example:
        >>> x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> solution = sinkhorn_potentials(x, y, blur=0.1)
        >>> (solution.f + solution.g).item()  # ½·5²
        12.5
    """
    check_clouds(x, y, blur=blur, scaling=scaling, reach=reach)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.detach().to(dtype), y.detach().to(dtype)
    a, b = normalised_weights(x_weights, x, "x_weights"), normalised_weights(y_weights, y, "y_weights")
    with torch.no_grad(), full_precision(x):
        return solve(Cost(*centred(x, y)), a, b, blur, scaling, reach, tolerance, max_iterations, initial)


def self_potential(
    x: Tensor,
    *,
    blur: float,
    x_weights: Tensor | None = None,
    reach: float | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 200,
) -> Tensor:
    """The potential f = g of a cloud against itself, [N]; a symmetric problem whose averaged iteration converges fast.

    Reference: [Feydy2019].
    """
    check_clouds(x, x, blur=blur, reach=reach)
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    a = normalised_weights(x_weights, x, "x_weights")
    with torch.no_grad(), full_precision(x):
        return solve_self(Cost(*centred(x, x)), a, blur, reach, tolerance, max_iterations)


class Cost:
    """½‖x_i − y_j‖² between two clouds, held as one matrix where it fits and recomputed in row blocks where it does
    not."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self._rows = max(1, MAX_DENSE_ENTRIES // len(y))
        self._matrix = half_squared_distances(x, y) if len(x) <= self._rows else None

    @property
    def is_dense(self) -> bool:
        return self._matrix is not None

    @property
    def matrix(self) -> Tensor:
        """All costs, [N, M], of a dense problem."""
        assert self._matrix is not None
        return self._matrix

    @property
    def T(self) -> Cost:
        """The same costs seen from the other cloud."""
        transposed = object.__new__(Cost)
        transposed.x, transposed.y = self.y, self.x
        transposed._rows = max(1, MAX_DENSE_ENTRIES // len(self.x))
        transposed._matrix = self._matrix.T if self._matrix is not None else None
        return transposed

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Row slices with their [rows, M] costs."""
        if self._matrix is not None:
            yield slice(0, len(self.x)), self._matrix
            return
        for start in range(0, len(self.x), self._rows):
            rows = slice(start, start + self._rows)
            yield rows, half_squared_distances(self.x[rows], self.y)

    def softmin(self, g: Tensor, log_b: Tensor, eps: float) -> Tensor:
        """−eps log Σ_j b_j exp((g_j − C_ij)/eps), [N]: the best f given g."""
        scores = log_b + g / eps
        return torch.cat([-eps * torch.logsumexp(scores - block / eps, dim=1) for _, block in self.blocks()])

    def barycentric_projection(self, g: Tensor, log_b: Tensor, eps: float) -> Tensor:
        """T(x_i) = Σ_j π_ij y_j with the row-normalised plan π, [N, D]: where each x_i is sent on average."""
        scores = log_b + g / eps
        return torch.cat([torch.softmax(scores - block / eps, dim=1) @ self.y for _, block in self.blocks()])

    def diameter(self) -> float:
        """An upper bound of the largest distance between the clouds, from their bounding box."""
        low = torch.minimum(self.x.amin(0), self.y.amin(0))
        high = torch.maximum(self.x.amax(0), self.y.amax(0))
        return float((high - low).norm())


def half_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """½‖x_i − y_j‖², [N, M], never negative."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :]
    return torch.addmm(squares, x, y.T, beta=0.5, alpha=-1).clamp_(min=0)


def damping(eps: float, reach: float | None) -> float:
    """Factor on the softmin for relaxed marginals, 1/(1 + eps/reach²); 1 where mass is conserved."""
    return 1.0 if reach is None else 1.0 / (1.0 + eps / reach**2)


def solve(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    blur: float,
    scaling: float,
    reach: float | None,
    tolerance: float = 1e-5,
    max_iterations: int = 500,
    initial: Potentials | None = None,
) -> Potentials:
    """`sinkhorn_potentials` on prepared costs and weights, unchecked: anneal to eps = blur², then converge."""
    if len(a) > len(b):  # f lives on the smaller side, where Newton is cheap
        swapped = Potentials(initial.g, initial.f, initial.marginal_error, 0) if initial else None
        found = solve(cost.T, b, a, blur, scaling, reach, tolerance, max_iterations, swapped)
        return Potentials(found.g, found.f, found.marginal_error, found.iterations)
    loop = _dense_loop if cost.is_dense else _sinkhorn_loop
    if initial is not None:
        warm = loop(cost, a, b, initial.f.to(a), [blur**2], reach, tolerance, WARM_PASSES)
        if warm.marginal_error < tolerance:
            return warm
    diameter = cost.diameter()
    require(math.isfinite(diameter), "points", "be finite and at finite distances", diameter)
    ladder = annealing_ladder(diameter, blur, scaling)
    return loop(cost, a, b, torch.zeros_like(a), ladder, reach, tolerance, max_iterations)


def solve_self(
    cost: Cost, a: Tensor, blur: float, reach: float | None, tolerance: float = 1e-5, max_iterations: int = 200
) -> Tensor:
    """`self_potential` on prepared costs and weights, unchecked."""
    eps, log_a, factor = blur**2, a.log(), damping(blur**2, reach)
    stored = torch.exp(log_a - cost.matrix / eps) if cost.is_dense else None  # |f| ≤ ½ eps log N: it never overflows
    if stored is not None:  # where eps is below the rounding of the costs, a point can seem to be far from itself
        stored.diagonal().clamp_(min=torch.finfo(stored.dtype).tiny)

    def best(f: Tensor) -> Tensor:
        if stored is None:
            return factor * cost.softmin(f, log_a, eps)
        return -factor * eps * (stored @ (f / eps).exp()).log()

    f = torch.zeros_like(a)
    for step in range(1, max_iterations + 1):
        update = best(f)
        f, change = (f + update) / 2, update - f
        if step % PASSES_PER_PLAN == 0 and change.abs().max() < tolerance * eps:
            break
    return best(f)


def annealing_ladder(diameter: float, blur: float, scaling: float) -> list[float]:
    """Temperatures from diameter² to blur², each `scaling`² times the one before."""
    levels = max(0, math.ceil(math.log(blur / max(diameter, blur)) / math.log(scaling)))
    return [(blur / scaling**level) ** 2 for level in range(levels, -1, -1)]


def _sinkhorn_loop(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    ladder: list[float],
    reach: float | None,
    tolerance: float,
    max_iterations: int,
) -> Potentials:
    """Alternating (damped) updates; convergence is checked every few passes, where the last temperature is reached."""
    log_a, log_b, columns = a.log(), b.log(), cost.T
    error = torch.full((), torch.inf)
    iterations = 0
    for level, eps in enumerate(ladder):
        last = level == len(ladder) - 1
        factor = damping(eps, reach)
        while True:
            g = factor * columns.softmin(f, log_a, eps)
            best = cost.softmin(g, log_b, eps)
            iterations += 1
            if last and iterations % 5 == 0:
                rows = a * torch.exp((f - best) / eps)
                targets = a if reach is None else a * torch.exp(-f / reach**2)
                error = (rows - targets).abs().sum() / targets.sum()
            f = factor * best
            if not last or iterations >= max_iterations or error < tolerance:
                break
    g = factor * columns.softmin(f, log_a, eps)
    return Potentials(f, g, error, iterations)


@dataclass(frozen=True)
class _Point:
    """An iterate u = f/eps of the Newton loop, with all that follows from it.

    Attributes:
        u, v: f/eps [N] and the best g/eps given it [M].
        plan: [N, M].
        rows, columns: r [N] and c [M], its sums.
        targets: what the rows should sum to, a exp(−κu), [N].
        dual: value of the dual, 0-d.
        error: ‖r − targets‖₁ over the mass of the targets, 0-d.
    """

    u: Tensor
    v: Tensor
    plan: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    dual: Tensor
    error: Tensor


@dataclass(frozen=True)
class _SemiDual:
    """The dual as a function of u alone, at one temperature; κ = eps/reach² relaxes the marginals, 0 keeps them.

    D(u, v) = ⟨a, φ(u)⟩ + ⟨b, φ(v)⟩ − Σ_ij P_ij,     φ(u) = (1 − exp(−κu))/κ, or u for κ = 0
    """

    scaled_cost: Tensor
    a: Tensor
    b: Tensor
    relaxation: float

    def at(self, u: Tensor) -> _Point:
        """One pass over the plan: v maximises D given u."""
        scores = (u + self.a.log())[:, None] - self.scaled_cost
        peak = scores.amax(0)
        plan = scores.sub_(peak).exp_()
        mass = plan.sum(0)
        v = -(peak + mass.log()) / (1 + self.relaxation)
        columns = self.b * torch.exp(-self.relaxation * v)
        plan.mul_(columns / mass)
        rows, targets = plan.sum(1), self.a * torch.exp(-self.relaxation * u)
        dual = self.a @ self._phi(u) + self.b @ self._phi(v) - columns.sum()
        return _Point(u, v, plan, rows, columns, targets, dual, (rows - targets).abs().sum() / targets.sum())

    def _phi(self, u: Tensor) -> Tensor:
        return u if self.relaxation == 0 else -torch.expm1(-self.relaxation * u) / self.relaxation

    def improve(self, point: _Point) -> tuple[_Point, float, int]:
        """A step to a better point: Newton's where it raises the dual, shortened if need be, else Sinkhorn's.

        Returns the point, its error on the host, and the passes it took.
        """
        tiny, rounding = torch.finfo(self.a.dtype).tiny, torch.finfo(self.a.dtype).eps
        log_rows = point.rows.clamp(min=tiny).log()
        sinkhorn_step = (point.u + self.a.log() - log_rows) / (1 + self.relaxation) - point.u
        newton_step = self.newton_step(point)
        step = torch.where(newton_step.isfinite().all(), newton_step, sinkhorn_step)
        floor = point.dual - 8 * rounding * (1 + point.dual.abs())
        for attempt, shortening in enumerate((1.0, 0.25, 0.0625), start=1):
            trial = self.at(point.u + shortening * step)
            error, better = torch.stack([trial.error, (trial.dual >= floor).to(trial.error.dtype)]).tolist()
            if better:
                return trial, error, attempt
        trial = self.at(point.u + sinkhorn_step)
        return trial, trial.error.item(), 4

    def newton_step(self, point: _Point) -> Tensor:
        """Ascent direction from the Hessian diag(r + κ targets) − P diag(1/c) Pᵀ/(1 + κ), scaled to a unit diagonal.

        For κ = 0 the constant vector, along which the dual does not change, is filled by r rᵀ; a ridge covers clusters
        that exchange no mass. Not finite where a row has lost its mass.
        """
        root = (point.rows + self.relaxation * point.targets).sqrt()
        flow = point.plan * (point.columns * (1 + self.relaxation)).rsqrt() / root[:, None]
        filling = root if self.relaxation == 0 else torch.zeros_like(root)
        gradient = (point.targets - point.rows) / root
        if len(root) > MAX_FACTORISED_SIZE:
            return _conjugate_gradients(flow, filling, gradient) / root
        hessian = torch.outer(filling, filling).sub_(flow @ flow.T).double()
        hessian.diagonal().add_(1 + 4 * torch.finfo(root.dtype).eps)
        factor, _ = torch.linalg.cholesky_ex(hessian)
        return torch.cholesky_solve(gradient.double()[:, None], factor)[:, 0].to(root.dtype) / root


def _dense_loop(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    ladder: list[float],
    reach: float | None,
    tolerance: float,
    max_iterations: int,
) -> Potentials:
    """Sinkhorn steps on stored plans, and Newton's where they do not suffice."""
    steep = [*ladder[:-1:2], ladder[-1]]
    steps = min(max_iterations - FINISHING_PASSES, MAX_PLAIN_PASSES.get(a.device.type, MAX_PLAIN_PASSES["cpu"]))
    found, worst_row = _stored_loop(cost, a, b, f, steep, reach, tolerance, max(1, steps))
    if not found.marginal_error < tolerance and worst_row < NEAR:
        found = _continued(found, cost, a, b, found.f, ladder[-1:], reach, tolerance, FINISHING_PASSES)
    left = max_iterations - found.iterations
    if not found.marginal_error < tolerance and left > 0 and len(ladder) > 1:
        found = _continued(found, cost, a, b, f, ladder, reach, tolerance, left)
    return found


def _continued(found: Potentials, *problem: Any) -> Potentials:
    """What Newton's loop makes of the problem, after the passes of an earlier attempt."""
    finished = _newton_loop(*problem)
    return replace(finished, iterations=found.iterations + finished.iterations)


def _stored_loop(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    ladder: list[float],
    reach: float | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Potentials, float]:
    """Sinkhorn steps on stored plans: one at each temperature, with momentum at the last until the error is small.

    The host waits for the device once every `PASSES_PER_PLAN` steps.

    Returns:
        The potentials, and the largest share of its mass that a row has too much or too little. Neither error is a
        number where the steps went astray.

    Reference: [Schmitzer2019] for the stored plan, [Nesterov1983] for the momentum.
    """
    iterations = taken = 0
    u = previous = f / ladder[0]
    for level, eps in enumerate(ladder):
        last = level == len(ladder) - 1
        problem = _SemiDual(cost.matrix / eps, a, b, 0.0 if reach is None else eps / reach**2)
        while True:
            plan = _StoredPlan(problem, problem.at(u))
            for _ in range(min(PASSES_PER_PLAN, max_iterations) if last else 1):
                momentum = taken / (taken + 3) if last else 0.0
                u, previous = plan.sinkhorn_step(u + momentum * (u - previous)), u
                taken += last
                iterations += 1
            if not last:
                u = previous = u * (eps / ladder[level + 1])
                break
            v, excess = plan.best(u)
            iterations += 1
            error, worst_row = excess.tolist()
            if not error >= tolerance or iterations >= max_iterations:
                return Potentials(eps * u, eps * v, torch.tensor(error), iterations), worst_row
    raise AssertionError("the ladder has a last temperature")


@dataclass(frozen=True)
class _StoredPlan:
    """The plan P° at one point (u°, v°), by which sums over the plan at any other point (u, v) near it are products:

    Σ_i P_ij = exp(v_j − v°_j) Σ_i P°_ij exp(u_i − u°_i)
    """

    problem: _SemiDual
    point: _Point

    def best(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The best v given u; the `marginal_error` of the two and the worst row's share of error, [2]."""
        v = self._best_columns(u)
        rows = torch.exp(u - self.point.u) * self._row_sums(v)
        targets = self.problem.a * torch.exp(-self.problem.relaxation * u)
        excess = (rows - targets).abs()
        return v, torch.stack([excess.sum() / targets.sum(), (excess / targets).max()])

    def sinkhorn_step(self, u: Tensor) -> Tensor:
        """The best u given the best v given u."""
        sums = self._row_sums(self._best_columns(u))
        return (self.point.u + (self.problem.a / sums).log()) / (1 + self.problem.relaxation)

    def _best_columns(self, u: Tensor) -> Tensor:
        sums = torch.exp(u - self.point.u) @ self.point.plan
        return (self.point.v + (self.problem.b / sums).log()) / (1 + self.problem.relaxation)

    def _row_sums(self, v: Tensor) -> Tensor:
        return self.point.plan @ torch.exp(v - self.point.v)


def _newton_loop(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    ladder: list[float],
    reach: float | None,
    tolerance: float,
    max_iterations: int,
) -> Potentials:
    """Follow the ladder with Newton steps, at least one a level. The host waits for the device once a step."""
    iterations = 0
    for level, eps in enumerate(ladder):
        enough = tolerance if level == len(ladder) - 1 else LEVEL_TOLERANCE
        problem = _SemiDual(cost.matrix / eps, a, b, 0.0 if reach is None else eps / reach**2)
        point = problem.at(f / eps)
        error = lowest = math.inf
        stalled = 0
        while error >= enough and iterations < max_iterations and stalled < PATIENCE:
            point, error, passes = problem.improve(point)
            iterations += passes
            stalled = 0 if error < lowest else stalled + 1
            lowest = min(lowest, error)
        f = eps * point.u
    return Potentials(f, eps * point.v, point.error, iterations)


def _conjugate_gradients(flow: Tensor, filling: Tensor, gradient: Tensor) -> Tensor:
    """Approximate solution z of (I − F Fᵀ + q qᵀ) z = gradient; stopped early it is still an ascent direction."""
    solution, residual = torch.zeros_like(gradient), gradient
    direction, norm = residual, residual @ residual
    goal = CG_TOLERANCE**2 * norm
    for iteration in range(1, CG_ITERATIONS + 1):
        image = direction + filling * (filling @ direction) - flow @ (flow.T @ direction)
        length = norm / (direction @ image).clamp(min=torch.finfo(norm.dtype).tiny)
        solution, residual = solution + length * direction, residual - length * image
        norm, previous = residual @ residual, norm
        direction = residual + norm / previous.clamp(min=torch.finfo(norm.dtype).tiny) * direction
        if iteration % 10 == 0 and norm < goal:
            break
    return solution


def check_clouds(
    x: Tensor,
    y: Tensor,
    *,
    blur: float,
    scaling: float = 0.7,
    reach: float | None = None,
    names: tuple[str, str] = ("x", "y"),
) -> None:
    """Refuse what has no transport problem: wrong shapes, empty or non-finite clouds, lengths that are not positive.

    Points on a GPU are not looked at, which would be a wait; `solve` notices what is not finite.
    """
    for name, cloud in zip(names, (x, y), strict=True):
        require(cloud.ndim == 2, name, "be a cloud of shape [N, D]", tuple(cloud.shape))
        require(len(cloud) > 0, name, "hold at least one point", tuple(cloud.shape))
        require(cloud.is_floating_point(), name, "be a floating-point tensor", cloud.dtype)
        require(cloud.is_cuda or bool(cloud.isfinite().all()), name, "be finite", "NaN or Inf")
    require(x.shape[1] == y.shape[1], names[1], f"have {x.shape[1]} coordinates like `{names[0]}`", tuple(y.shape))
    require(x.device == y.device, names[1], f"be on {x.device} like `{names[0]}`", str(y.device))
    require(0 < blur < math.inf, "blur", "be a positive length", blur)
    require(0 < scaling < 1, "scaling", "lie strictly between 0 and 1", scaling)
    require(reach is None or 0 < reach < math.inf, "reach", "be a positive length or None", reach)


def normalised_weights(weights: Tensor | None, points: Tensor, name: str) -> Tensor:
    """`weights` in the dtype of `points`, uniform if None; they must be positive and sum to one."""
    if weights is None:
        return points.new_full((len(points),), 1 / len(points))
    require(weights.shape == (len(points),), name, f"have shape ({len(points)},)", tuple(weights.shape))
    weights = weights.detach().to(points)
    total = weights.sum()
    least, sum_of_weights = torch.stack([weights.min(), total]).tolist()
    require(least > 0, name, "be positive", least)
    require(abs(sum_of_weights - 1) < 1e-3, name, "sum to 1", sum_of_weights)
    return weights / total


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds moved so that `y` has mean zero: costs stay the same, rounding shrinks."""
    mean = y.mean(0)
    return x - mean, y - mean


@contextmanager
def full_precision(points: Tensor) -> Iterator[None]:
    """Neither autocast nor TF32 inside: their rounding of the costs is larger than a typical eps."""
    matmul = torch.backends.cuda.matmul
    # Where the newer of torch's two switches exists it is read: the older one raises once a program has set the newer.
    switch, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, switch)
    setattr(matmul, switch, off)
    try:
        with torch.autocast(device_type=points.device.type, enabled=False):
            yield
    finally:
        setattr(matmul, switch, before)


def median_distance(features: Tensor, max_points: int = 2000) -> float:
    """Median pairwise Euclidean distance of evenly spaced rows: the unit of length of the `scaled` presets.

    Args:
        features: [N, D], N ≥ 2.
        max_points: at most this many rows enter.

    Raises:
        InputError: fewer than two rows, or rows of which most are the same.
    """
    require(len(features) >= 2, "features", "hold at least two rows", tuple(features.shape))
    rows = features[:: math.ceil(len(features) / max_points)].float()
    median = torch.pdist(rows).median().item()
    require(0 < median < math.inf, "features", "differ from one another and be finite", f"median distance {median}")
    return median
