"""Sinkhorn divergence as a training loss: a scalar with the gradient of the converged problem.

    S(x, y) = OT(x, y) − ½ OT(x, x) − ½ OT(y, y)                                       [Feydy2019]

By the envelope theorem the gradient needs the optimal plan only, not the derivatives of the solver's iterations:

    ∂OT(x, y)/∂x_i = a_i (x_i − T(x_i)),     T(x_i) = Σ_j P_ij y_j / Σ_j P_ij          [Feydy2019]

so a loss needs one solve per term and no autograd graph of the iterations, and its gradient is as accurate as the
solution.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import extra, require
from .checks import check_clouds, check_iterations, is_finite, is_readable, normalised_weights
from .fixed_schedule import fixed_potentials
from .geometry import half_squared_distances
from .precision import full_precision, narrowed, resolve, result_dtype
from .problem import Potentials, Problem, as_batch, problems
from .sinkhorn import solve, solve_self, warn_of_errors

BACKENDS = ("native", "geomloss", "flash-sinkhorn")
# The averaged iteration for a self-term halves its error in every step.
SELF_ITERATIONS = 20

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def traced_if_fixed(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let `torch.compile` trace calls with `num_iterations`, and skip others, whose control flow depends on values."""
    untraced = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        return (untraced if options.get("num_iterations") is None else function)(*args, **options)

    return call


@traced_if_fixed
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    blur: float,
    scaling: float = 0.7,
    debias: bool = True,
    reach: float | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    x_pair: Tensor | None = None,
    y_self_cost: Tensor | float | None = None,
    backend: str = "native",
    num_iterations: int | None = None,
) -> Tensor:
    """Debiased entropic transport cost between two clouds, for ½‖x − y‖² and eps = blur².

    Computed in float32 whatever the input, with autocast and TF32 off. float64 is used for float64 clouds, and where
    float32 does not resolve the problem: points more than 180 blurs from the centre of `y`, such as outliers, a blur
    above twice the largest such distance, a reach below .03 blur, or lengths whose squares float32 cannot represent.
    Values and gradients are returned in the dtype of the input (float32 for half precision). The caller's gradient mode
    is respected and not changed. In float32 the value, unlike the gradient, has an uncertainty of about 1e-6 blur²,
    which is noticeable for clouds with equal means and a large blur.

    The relative error of the value is at most a thousandth (of OT, where debiasing cancels most of it), and the cosine
    similarity of the gradient with the exact one is at least .999. If the solver stops farther from the solution, a
    warning states the marginal error.

    Args:
        x: [N, D] points, or [P, N, D], the clouds of P problems; gradient flows.
        y: [M, D] points, or [P, M, D]; gradient flows if required. A single cloud is shared by all P problems.
        blur: length in the units of the points. Below about a third of the median nearest-neighbour distance the
            same-batch debiasing has no effect on the gradient; see `x_pair`.
        scaling: ratio of successive blurs during annealing, in (0, 1). It does not affect the result: a ratio below .5,
            or so near 1 that the solver has too little time for each temperature, is replaced by the nearest suitable
            one.
        debias: subtract the self-terms; `False` gives OT(x, y) alone.
        reach: length scale of unbalanced transport, any positive number; `None` for balanced transport.
        x_weights, y_weights: [N], [M] or [P, N], [P, M], positive, sum 1 (uniform by default); they receive no
            gradient.
        x_pair: [K, D] or [P, K, D], an independent second sample from the distribution of x, for the self-term OT(x,
            x_pair) instead of OT(x, x). If it requires no gradient, x receives the whole gradient of the self-term, as
            in the same-batch form.
        y_self_cost: OT(y, y), 0-d or [P], if it is already known (`self_transport_cost`), or 0 to leave it out: it only
            shifts the value. A `y` that requires a gradient still receives the gradient of this term.
        backend: `"native"`; `"geomloss"` to reproduce results obtained with `SamplesLoss("sinkhorn", p=2)`, whose
            gradient is unconverged at the usual `scaling`; or `"flash-sinkhorn"`, CUDA kernels of the library of this
            name with the same annealing, for clouds of tens of thousands of points on a GPU.
        num_iterations: fixed number of Sinkhorn iterations, at least 1; `None` iterates to convergence. With a fixed
            number no value is read back, so that a GPU never waits for the host and `torch.compile(fullgraph=True)` can
            trace the call. The gradient reaches a cosine similarity of .999 with that of the converged problem after 20
            iterations for blurs from .3 median distances, 100 from .1, and 200 from .05 (except for clusters of unequal
            weights). No warning reports the marginal error. On a GPU and in compiled code the precision does not depend
            on the values of the clouds: pass float64 clouds where that matters, for example with outliers.

    Returns:
        0-d tensor, or [P] for batches; float32 or float64.

    Raises:
        InputError: see `sinkhorn_potentials`; options that `backend="geomloss"` does not have.

    Reference: [Feydy2019], [Sejourne2019] for `reach`.

    Example:
        >>> x = torch.zeros(5, 2, requires_grad=True)
        >>> loss = sinkhorn_divergence(x, torch.full((5, 2), 3.0), blur=0.5)  # a translation by (3, 3): ½·18
        >>> round(loss.item(), 4)
        9.0
    """
    check_clouds(x, y, blur=blur, scaling=scaling, reach=reach)
    check_backend(backend, x.device)
    check_iterations(num_iterations)
    if backend != "native":
        require(x_pair is None, "x_pair", f"be None with backend={backend!r}", "a tensor")
        require(y_self_cost is None, "y_self_cost", f"be None with backend={backend!r}", y_self_cost)
        require(num_iterations is None, "num_iterations", f"be None with backend={backend!r}", num_iterations)
        a, b = normalised_weights(x_weights, x, "x_weights"), normalised_weights(y_weights, y, "y_weights")
        if x.ndim != y.ndim:
            x, y, a, b = (tensor.contiguous() for tensor in as_batch(x, y, a, b))
        library = _geomloss if backend == "geomloss" else _flash_sinkhorn
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # both libraries leave it enabled
            return library(a.float(), x.float(), b.float(), y.float(), blur, scaling, debias, reach)
    if x_pair is not None:
        check_clouds(x, x_pair, blur=blur, names=("x", "x_pair"))
    with full_precision(x):
        solver, dtype = Solver.of((x, y) if x_pair is None else (x, x_pair, y), blur, scaling, reach, num_iterations)
        x, y = x.to(solver.dtype), y.to(solver.dtype)
        a, b = normalised_weights(x_weights, x, "x_weights"), normalised_weights(y_weights, y, "y_weights")
        value = solver.transport_cost(x, y, a, b)
        if debias:
            value = value - _half_self_term(solver, x, a, x_pair) - _reference_term(solver, y, b, y_self_cost, value)
        solver.warn()
        return narrowed(value, dtype)


@dataclass(frozen=True)
class Solver:
    """Settings of the solver, see `sinkhorn_divergence`, and the marginal errors of what it has solved."""

    blur: float
    scaling: float = 0.7
    reach: float | None = None
    num_iterations: int | None = None
    dtype: torch.dtype = torch.float32
    errors: list[Tensor] = field(default_factory=list, compare=False)

    @classmethod
    def of(
        cls,
        clouds: Sequence[Tensor],
        blur: float,
        scaling: float = 0.7,
        reach: float | None = None,
        num_iterations: int | None = None,
    ) -> tuple[Solver, torch.dtype]:
        """A solver with the dtype that resolves problems between these clouds, and the dtype of the results."""
        may_read_values = num_iterations is None or all(is_readable(cloud) for cloud in clouds)
        solved_in, blur, reach = resolve(clouds, blur, reach, may_read_values=may_read_values)
        return cls(blur, scaling, reach, num_iterations, solved_in), result_dtype(*clouds)

    def warn(self) -> None:
        """Warn once of the largest marginal error if it is too large, unless the number of iterations was fixed."""
        if self.num_iterations is None:
            warn_of_errors(self.errors, 0.0, "raise blur")

    def transport_cost(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """OT(x, y), 0-d or [P], with its gradients."""
        values = _TransportCost.apply(*as_batch(x, y, a, b), self)
        return values if x.ndim == 3 or y.ndim == 3 else values[0]

    def self_transport_cost(self, x: Tensor, a: Tensor) -> Tensor:
        """OT(x, x), 0-d or [P], with its gradient."""
        is_single = x.ndim == 2
        values = _SelfTransportCost.apply(x[None] if is_single else x, a[None] if is_single else a, self)
        return values[0] if is_single else values

    def solutions(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, initial: Potentials | None = None
    ) -> Iterator[tuple[Problem, Potentials]]:
        """The problems OT(x, y), in sub-batches that fit in memory, with their potentials."""
        for part, problem in problems(x, y, a, b, self.blur, self.reach):
            start = initial[part] if initial is not None else None
            if self.num_iterations is None:
                potentials = solve(problem, self.scaling, initial=start)
                self.errors.append(problem.misplaced(potentials))
                yield problem, potentials
            else:
                yield problem, fixed_potentials(problem, self.num_iterations, start)

    def self_solutions(
        self, x: Tensor, a: Tensor, initial: Tensor | None = None
    ) -> Iterator[tuple[Problem, Potentials]]:
        """The problems OT(x, x) in the same way, with potentials [P, N] as the optional start."""
        for part, problem in problems(x, x, a, a, self.blur, self.reach):
            start = initial[part] if initial is not None else None
            if self.num_iterations is None:
                f = solve_self(problem, initial=start)
            else:
                f = solve_self(problem, 0.0, min(SELF_ITERATIONS, self.num_iterations), start)
            yield problem, Potentials(f, f, f.new_zeros(len(f)), 0)


@dataclass(frozen=True)
class DivergencePotentials:
    """The potentials that determine the gradient of S(x, y) at any point.

    Attributes:
        cross: the potentials of OT(x, y).
        self_potential: [N] or [P, N], the potential of OT(x, x).
    """

    cross: Potentials
    self_potential: Tensor

    @property
    def iterations(self) -> int:
        """Iterations of the solver for OT(x, y)."""
        return self.cross.iterations


@traced_if_fixed
@torch.no_grad()
def divergence_gradient(
    x: Tensor,
    y: Tensor,
    *,
    blur: float,
    scaling: float = 0.7,
    reach: float | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    num_iterations: int | None = None,
    initial: DivergencePotentials | None = None,
) -> tuple[Tensor, DivergencePotentials]:
    """∂S/∂x_i = a_i (T_xx(x_i) − T_xy(x_i)); a step against it moves a point towards the other cloud.

    For loops in which the cloud moves slowly along this gradient: the potentials of one call are a warm start for the
    next, which then needs a few iterations instead of a few dozen.

    Args:
        x: [N, D] points, or [P, N, D], the clouds of P problems.
        y: [M, D] points, or [P, M, D]; a single cloud is shared by all P problems.
        blur, scaling, reach, x_weights, y_weights, num_iterations: as in `sinkhorn_divergence`. With `initial`, a fixed
            number of iterations is performed at eps = blur² alone, where a few suffice.
        initial: the potentials that the previous call returned.

    Returns:
        The gradient, [N, D] or [P, N, D] float32 or float64, and the potentials.

    Example:
        >>> x, y = torch.randn(20, 3), torch.randn(30, 3) + 1
        >>> field, potentials = divergence_gradient(x, y, blur=0.5)
        >>> again, warm = divergence_gradient(x, y, blur=0.5, initial=potentials)
        >>> warm.iterations < potentials.iterations
        True
    """
    check_clouds(x, y, blur=blur, scaling=scaling, reach=reach)
    check_iterations(num_iterations)
    is_single = x.ndim == y.ndim == 2
    before = initial.cross if initial is not None else None
    self_before = torch.atleast_2d(initial.self_potential) if initial is not None else None
    cross, self_potentials, fields, self_fields = [], [], [], []
    with full_precision(x):
        solver, dtype = Solver.of((x, y), blur, scaling, reach, num_iterations)
        x, y = x.to(solver.dtype), y.to(solver.dtype)
        a, b = normalised_weights(x_weights, x, "x_weights"), normalised_weights(y_weights, y, "y_weights")
        for problem, potentials in solver.solutions(x, y, a, b, before[None] if before and is_single else before):
            cross.append(potentials)
            fields.append(problem.displacement(potentials))
        for problem, potentials in solver.self_solutions(x, a, self_before):
            self_potentials.append(potentials.f)
            self_fields.append(problem.displacement(potentials))
    solver.warn()
    gradient, joined = (torch.cat(fields) - torch.cat(self_fields)).to(dtype), Potentials.join(cross).to(dtype)
    self_potential = torch.cat(self_potentials).view(a.shape).to(dtype)
    if is_single:
        return gradient[0], DivergencePotentials(joined[0], self_potential)
    return gradient, DivergencePotentials(joined, self_potential)


@torch.no_grad()
def divergence_gradient_at(
    points: Tensor,
    x: Tensor,
    y: Tensor,
    reference_potential: Tensor,
    self_potential: Tensor,
    *,
    blur: float,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    """The direction ∂S/∂x_i / a_i for each of `points` if that point alone joined the cloud x.

    The potentials of a solved problem S(x, y) extend to any point: T_xy needs one softmax over y and no solve. T_xx
    includes the new point itself. Its potential f solves e^(−f/eps) = Σ_j a_j e^((f_j − C_j)/eps) + a_1 e^(f/eps), a
    quadratic equation in e^(f/eps), so that it keeps as much of its own mass as the first point of x does.

    Args:
        points: [B, D].
        x: [N, D], the cloud that the points join.
        y: [M, D], the cloud that they move towards.
        reference_potential: [M], `potentials.cross.g` of `divergence_gradient(x, y)`.
        self_potential: [N], `potentials.self_potential`.
        blur: the blur of the solved problem.
        x_weights, y_weights: [N], [M], the weights a of x, and those of y, positive, sum 1 (uniform by default).

    Returns:
        [B, D]; row i depends on point i alone.

    Example:
        >>> x, y = torch.randn(200, 3), torch.randn(300, 3) + 1
        >>> field, potentials = divergence_gradient(x, y, blur=0.5)
        >>> again = divergence_gradient_at(x[:5], x, y, potentials.cross.g, potentials.self_potential, blur=0.5)
        >>> bool((again - 200 * field[:5]).abs().max() < 0.1)
        True
    """
    check_clouds(points, y, blur=blur, names=("points", "y"))
    check_clouds(points, x, blur=blur, names=("points", "x"))
    dtype = points.dtype
    log_size = math.log(len(x)) if x_weights is None else -x_weights[0].log()
    log_ratios = 0.0 if x_weights is None else x_weights.log() + log_size
    with full_precision(points):
        # The dtype must not depend on the values: the result for one point is independent of the other points.
        solved_in, blur, _ = resolve((points, x, y), blur, None, may_read_values=False)
        eps, points, x, y = blur**2, points.to(solved_in), x.to(solved_in), y.to(solved_in)
        mean = y.mean(0)
        points, x, y = points - mean, x - mean, y - mean
        attraction = (reference_potential - half_squared_distances(points, y)) / eps
        attraction = attraction if y_weights is None else attraction + y_weights.log()
        towards = torch.softmax(attraction, dim=1) @ y
        scores = (self_potential - half_squared_distances(points, x)) / eps + log_ratios
        log_others = torch.logsumexp(scores, dim=1) - log_size
        root = torch.logaddexp(2 * log_others, log_others.new_zeros(()) + (math.log(4) - log_size)) / 2
        kept = torch.exp(2 * (math.log(2) - torch.logaddexp(log_others, root)) - log_size)[:, None]
        return (kept * points + (1 - kept) * (torch.softmax(scores, dim=1) @ x) - towards).to(dtype)


def self_transport_cost(
    y: Tensor, *, blur: float, reach: float | None = None, y_weights: Tensor | None = None
) -> Tensor:
    """OT(y, y), 0-d, or [P] for clouds [P, M, D]: the self-term that a fixed reference set needs only once
    (`y_self_cost`).

    If required, its gradient flows to y through both arguments.
    """
    check_clouds(y, y, blur=blur, reach=reach)
    with full_precision(y):
        solver, dtype = Solver.of((y,), blur, reach=reach)
        y = y.to(solver.dtype)
        return narrowed(solver.self_transport_cost(y, normalised_weights(y_weights, y, "y_weights")), dtype)


def _half_self_term(solver: Solver, x: Tensor, a: Tensor, x_pair: Tensor | None) -> Tensor:
    """½ OT(x, x) or ½ OT(x, x_pair); x receives the whole gradient of the self-term unless x_pair requires one."""
    if x_pair is None:
        return solver.self_transport_cost(x, a) / 2
    x_pair = x_pair.to(x.dtype)
    half = solver.transport_cost(x, x_pair, a, normalised_weights(None, x_pair, "x_pair")) / 2
    if x_pair.requires_grad:
        return half
    return 2 * half - half.detach()  # the value of ½ OT, and the gradient of OT


def _reference_term(solver: Solver, y: Tensor, b: Tensor, cost: Tensor | float | None, like: Tensor) -> Tensor | float:
    """½ OT(y, y); a given `cost` replaces its value but not its gradient."""
    if cost is None:
        return solver.self_transport_cost(y, b) / 2
    cost = torch.as_tensor(cost, dtype=like.dtype, device=like.device).detach()
    require(cost.shape in ((), like.shape), "y_self_cost", f"have shape {tuple(like.shape)}", tuple(cost.shape))
    require(not is_readable(cost) or is_finite(cost), "y_self_cost", "be finite", "NaN or Inf")
    if not (y.requires_grad and torch.is_grad_enabled()):
        return cost / 2
    term = solver.self_transport_cost(y, b)
    return (term - term.detach() + cost) / 2


class _TransportCost(torch.autograd.Function):
    """OT of P problems. `forward` computes the gradients too, from the plan at hand, and saves them for `backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, solver: Solver) -> Tensor:
        values, x_grads, y_grads = [], [], []
        for problem, potentials in solver.solutions(x, y, a, b):
            values.append(problem.value(potentials))
            if ctx.needs_input_grad[0]:
                x_grads.append(problem.displacement(potentials))
            if ctx.needs_input_grad[1]:
                y_grads.append(problem.T.displacement(potentials.T))
        ctx.x_grad, ctx.y_grad = (torch.cat(grads) if grads else None for grads in (x_grads, y_grads))
        ctx.save_for_backward(*(z if needed else None for z, needed in zip((x, y), ctx.needs_input_grad, strict=False)))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        scale = grad_output[:, None, None]
        x_grad = _FirstDerivative.apply(scale * ctx.x_grad, x) if ctx.needs_input_grad[0] else None
        y_grad = _FirstDerivative.apply(scale * ctx.y_grad, y) if ctx.needs_input_grad[1] else None
        return x_grad, y_grad, None, None, None


class _SelfTransportCost(torch.autograd.Function):
    """OT(x, x) of P clouds from their symmetric potentials; the gradient is that with respect to both arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, solver: Solver) -> Tensor:
        values, grads = [], []
        for problem, potentials in solver.self_solutions(x, a):
            values.append(problem.value(potentials))
            if ctx.needs_input_grad[0]:
                grads.append(2 * problem.displacement(potentials))
        if grads:
            ctx.x_grad = torch.cat(grads)
            ctx.save_for_backward(x)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _FirstDerivative.apply(grad_output[:, None, None] * ctx.x_grad, x), None, None


class _FirstDerivative(torch.autograd.Function):
    """A gradient that depends on its points in the graph: a second derivative raises an error instead of being zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, points: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> None:
        raise NotImplementedError("the Sinkhorn divergence has no second derivative: its plan is treated as constant")


def check_backend(backend: str, device: torch.device, name: str = "backend") -> None:
    """Raise `InputError` for a backend that does not exist, is not installed, or does not support the device.

    Args:
        backend: see `sinkhorn_divergence`.
        device: where the points are.
        name: name of the argument in the error.
    """
    require(backend in BACKENDS, name, f"be one of {', '.join(BACKENDS)}", backend)
    if backend == "geomloss":
        with extra("solvers"):
            importlib.import_module("geomloss")
    if backend == "flash-sinkhorn":
        require(device.type == "cuda", name, f"be native or geomloss for points that are on {device.type}", backend)
        is_installed = importlib.util.find_spec("flash_sinkhorn") is not None
        require(is_installed, name, "be installed (pip install flash-sinkhorn)", backend)


def _geomloss(
    a: Tensor, x: Tensor, b: Tensor, y: Tensor, blur: float, scaling: float, debias: bool, reach: float | None
) -> Tensor:
    """The same divergence from geomloss, which computes the reference self-term in every call."""
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, reach=reach, debias=debias, backend="tensorized")
    return loss(a, x, b, y)


def _flash_sinkhorn(
    a: Tensor, x: Tensor, b: Tensor, y: Tensor, blur: float, scaling: float, debias: bool, reach: float | None
) -> Tensor:
    """The same divergence from flash-sinkhorn, with float32 products and our cost ½‖x − y‖²."""
    from flash_sinkhorn import SamplesLoss

    # By default the library times a hundred kernels for every new shape, which takes minutes.
    options = {"half_cost": True, "allow_tf32": False, "autotune": False}
    loss = SamplesLoss("sinkhorn", blur=blur, scaling=scaling, reach=reach, debias=debias, **options)
    return loss(a, x, b, y)
