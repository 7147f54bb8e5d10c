"""Sinkhorn divergence as a training loss: a scalar with the gradient of the converged problem.

    S(x, y) = OT(x, y) − ½ OT(x, x) − ½ OT(y, y)                                       [Feydy2019]

By the envelope theorem the gradient needs the plan alone, never the path of the solver:

    ∂OT(x, y)/∂x_i = a_i (x_i − T(x_i)),     T(x_i) = Σ_j P_ij y_j / Σ_j P_ij          [Feydy2019]

so a loss costs one solve per term, holds no graph of the iterations, and is exact where the solve is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, require
from .sinkhorn import (
    Cost,
    Potentials,
    centred,
    check_clouds,
    full_precision,
    half_squared_distances,
    normalised_weights,
    solve,
    solve_self,
)

BACKENDS = ("native", "geomloss", "flash-sinkhorn")


@torch.compiler.disable
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
) -> Tensor:
    """Debiased entropic transport cost between two clouds, for ½‖x − y‖² and eps = blur².

    Computed in float32 (float64 for float64 clouds) whatever the input, with autocast and TF32 off; gradients come back
    in the dtype of the input. The gradient mode of the caller is respected and left as it was.

    Args:
        x: [N, D] points; gradient flows.
        y: [M, D] points; gradient flows if required.
        blur: length in the units of the points. Below about a third of the median nearest-neighbour distance the
            same-batch debiasing has no effect on the gradient; see `x_pair`.
        scaling: ratio of successive blurs of the annealing, in (0, 1).
        debias: subtract the self-terms. `False` gives OT(x, y) alone.
        reach: length of unbalanced transport, `None` for balanced.
        x_weights, y_weights: [N], [M], positive, sum 1 (uniform by default); no gradient flows to them.
        x_pair: [K, D], an independent second sample of x's law, for the self-term OT(x, x_pair) instead of OT(x, x). If
            it carries no gradient, x receives the whole gradient of the self-term, as in the same-batch form.
        y_self_cost: OT(y, y) where it is known (`self_transport_cost`), or 0 to leave it out: it shifts the value only.
        backend: `"native"`; `"geomloss"` to reproduce results obtained with `SamplesLoss("sinkhorn", p=2)`, whose
            gradient is unconverged at the usual `scaling`; or `"flash-sinkhorn"`, that library's CUDA kernels with the
            same schedule, for clouds of tens of thousands of points on a GPU.

    Returns:
        0-d tensor, float32 or float64.

    Raises:
        InputError: see `sinkhorn_potentials`; options that `backend="geomloss"` does not have.

    Reference: [Feydy2019], [Sejourne2019] for `reach`.

    Example:
        >>> x = torch.zeros(5, 2, requires_grad=True)
        >>> loss = sinkhorn_divergence(x, torch.full((5, 2), 3.0), blur=0.5)  # a translation by (3, 3): ½·18
        >>> round(loss.item(), 4)
        9.0
    """
    require(backend in BACKENDS, "backend", f"be one of {', '.join(BACKENDS)}", backend)
    if backend != "native":
        require(x_pair is None, "x_pair", f"be None with backend={backend!r}", "a tensor")
        require(y_self_cost is None, "y_self_cost", f"be None with backend={backend!r}", y_self_cost)
        check_clouds(x, y, blur=blur, scaling=scaling, reach=reach)
        a, b = normalised_weights(x_weights, x, "x_weights"), normalised_weights(y_weights, y, "y_weights")
        library = _geomloss if backend == "geomloss" else _flash_sinkhorn
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # both leave it on
            return library(a.float(), x.float(), b.float(), y.float(), blur, scaling, debias, reach)
    check_clouds(x, y, blur=blur, scaling=scaling, reach=reach)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with full_precision(x):
        x, y = x.to(dtype), y.to(dtype)
        a, b = normalised_weights(x_weights, x, "x_weights"), normalised_weights(y_weights, y, "y_weights")
        value = _TransportCost.apply(x, y, a, b, blur, scaling, reach)
        if not debias:
            return value
        if y_self_cost is None:
            y_self_cost = _SelfTransportCost.apply(y, b, blur, reach)
        return value - _half_self_term(x, a, x_pair, blur, scaling, reach) - y_self_cost / 2


@dataclass(frozen=True)
class DivergencePotentials:
    """What determines the gradient of S(x, y) anywhere.

    Attributes:
        cross: the potentials of OT(x, y).
        own: [N], the potential of OT(x, x).
    """

    cross: Potentials
    own: Tensor

    @property
    def iterations(self) -> int:
        """Passes over the plan of OT(x, y)."""
        return self.cross.iterations


@torch.no_grad()
def divergence_gradient(
    x: Tensor, y: Tensor, *, blur: float, scaling: float = 0.7, initial: DivergencePotentials | None = None
) -> tuple[Tensor, DivergencePotentials]:
    """∂S/∂x_i = a_i (T_xx(x_i) − T_xy(x_i)), the direction in which each point leaves its own cloud for the other.

    For loops that follow the field of a slowly moving cloud: the potentials of one call are the start of the next,
    which then takes a few passes over the plan instead of a few dozen.

    Args:
        x: [N, D] points.
        y: [M, D] points.
        blur, scaling: as in `sinkhorn_divergence`.
        initial: the potentials that the previous call returned.

    Returns:
        The gradient, [N, D] float32 or float64, and the potentials.

    Example:
        >>> x, y = torch.randn(20, 3), torch.randn(30, 3) + 1
        >>> field, potentials = divergence_gradient(x, y, blur=0.5)
        >>> again, warm = divergence_gradient(x, y, blur=0.5, initial=potentials)
        >>> warm.iterations < potentials.iterations
        True
    """
    check_clouds(x, y, blur=blur, scaling=scaling)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with full_precision(x):
        x, y, eps = x.to(dtype), y.to(dtype), blur**2
        a, b = normalised_weights(None, x, "x"), normalised_weights(None, y, "y")
        cost, self_cost = Cost(*centred(x, y)), Cost(*centred(x, x))
        cross = solve(cost, a, b, blur, scaling, reach=None, initial=initial.cross if initial else None)
        own = solve_self(self_cost, a, blur, reach=None)
        field = _displacement(cost, a, b, cross.f, cross.g, eps, None)
        return field - _displacement(self_cost, a, a, own, own, eps, None), DivergencePotentials(cross, own)


@torch.no_grad()
def divergence_gradient_at(
    points: Tensor, x: Tensor, y: Tensor, reference_potential: Tensor, own_potential: Tensor, *, blur: float
) -> Tensor:
    """The direction N ∂S/∂x_i that a further point of the cloud x would have, for each of `points` alone.

    Potentials of a solved problem S(x, y) extend to any place: with them T_xy needs one softmax over y and no solve. In
    T_xx the point meets itself, too. Its own potential f solves e^(−f/eps) = Σ_j e^((f_j − C_j)/eps)/N + e^(f/eps)/N, a
    quadratic equation in e^(f/eps), so that it keeps as much of its own mass as a point of x does.

    Args:
        points: [B, D].
        x: [N, D], the cloud the points join.
        y: [M, D], the cloud they move to.
        reference_potential: [M], `potentials.cross.g` of `divergence_gradient(x, y)`.
        own_potential: [N], `potentials.own`.
        blur: that of the solved problem.

    Returns:
        [B, D]; row i depends on point i alone.

    Example:
        >>> x, y = torch.randn(200, 3), torch.randn(300, 3) + 1
        >>> field, potentials = divergence_gradient(x, y, blur=0.5)
        >>> again = divergence_gradient_at(x[:5], x, y, potentials.cross.g, potentials.own, blur=0.5)
        >>> bool((again - 200 * field[:5]).abs().max() < 0.1)
        True
    """
    check_clouds(points, y, blur=blur, names=("points", "y"))
    check_clouds(points, x, blur=blur, names=("points", "x"))
    eps, log_size, mean = blur**2, math.log(len(x)), y.mean(0)
    points, x, y = points - mean, x - mean, y - mean
    with full_precision(points):
        towards = torch.softmax((reference_potential - half_squared_distances(points, y)) / eps, dim=1) @ y
        scores = (own_potential - half_squared_distances(points, x)) / eps
        log_others = torch.logsumexp(scores, dim=1) - log_size
        root = torch.logaddexp(2 * log_others, log_others.new_tensor(math.log(4) - log_size)) / 2
        kept = torch.exp(2 * (math.log(2) - torch.logaddexp(log_others, root)) - log_size)[:, None]
        return kept * points + (1 - kept) * (torch.softmax(scores, dim=1) @ x) - towards


def self_transport_cost(
    y: Tensor, *, blur: float, reach: float | None = None, y_weights: Tensor | None = None
) -> Tensor:
    """OT(y, y), 0-d: the term of the divergence that a fixed reference can pay once (`y_self_cost`)."""
    check_clouds(y, y, blur=blur, reach=reach)
    with torch.no_grad(), full_precision(y):
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return _SelfTransportCost.apply(y, normalised_weights(y_weights, y, "y_weights"), blur, reach)


def _half_self_term(
    x: Tensor, a: Tensor, x_pair: Tensor | None, blur: float, scaling: float, reach: float | None
) -> Tensor:
    """½ OT(x, x) or ½ OT(x, x_pair), with the gradient in x of a self-term in both cases."""
    if x_pair is None:
        return _SelfTransportCost.apply(x, a, blur, reach) / 2
    check_clouds(x, x_pair, blur=blur, names=("x", "x_pair"))
    x_pair = x_pair.to(x.dtype)
    uniform = normalised_weights(None, x_pair, "x_pair")
    half = _TransportCost.apply(x, x_pair, a, uniform, blur, scaling, reach) / 2
    if x_pair.requires_grad:
        return half
    return 2 * half - half.detach()  # the value of one half, the gradient of the whole


class _TransportCost(torch.autograd.Function):
    """OT(x, y) by one solve; the gradients are computed with it, since the plan is at hand, and kept for `backward`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, blur: float, scaling: float, reach: float | None
    ) -> Tensor:
        eps = blur**2
        cost = Cost(*centred(x, y))
        potentials = solve(cost, a, b, blur, scaling, reach)
        if ctx.needs_input_grad[0]:
            ctx.x_grad = _displacement(cost, a, b, potentials.f, potentials.g, eps, reach)
        if ctx.needs_input_grad[1]:
            ctx.y_grad = _displacement(cost.T, b, a, potentials.g, potentials.f, eps, reach)
        ctx.save_for_backward(*(z if needed else None for z, needed in zip((x, y), ctx.needs_input_grad, strict=False)))
        return _dual_value(potentials, a, b, eps, reach)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        x_grad = _FirstDerivative.apply(grad_output * ctx.x_grad, x) if ctx.needs_input_grad[0] else None
        y_grad = _FirstDerivative.apply(grad_output * ctx.y_grad, y) if ctx.needs_input_grad[1] else None
        return x_grad, y_grad, None, None, None, None, None


class _SelfTransportCost(torch.autograd.Function):
    """OT(x, x) by its symmetric potential; its gradient is that of both arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, blur: float, reach: float | None) -> Tensor:
        eps = blur**2
        cost = Cost(*centred(x, x))
        f = solve_self(cost, a, blur, reach)
        if ctx.needs_input_grad[0]:
            ctx.x_grad = 2 * _displacement(cost, a, a, f, f, eps, reach)
            ctx.save_for_backward(x)
        return _dual_value(Potentials(f, f, f.new_zeros(()), 0), a, a, eps, reach)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _FirstDerivative.apply(grad_output * ctx.x_grad, x), None, None, None


class _FirstDerivative(torch.autograd.Function):
    """A gradient that knows the points it depends on: a second derivative is refused, not taken for zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, points: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> None:
        raise NotImplementedError("the Sinkhorn divergence has no second derivative: its plan is held fixed")


def _displacement(cost: Cost, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, reach: float | None) -> Tensor:
    """Row mass × (x − T(x)), [N, D]; the mass is a_i, times exp(−f_i/reach²) where it is not conserved."""
    mass = a if reach is None else a * torch.exp(-f / reach**2)
    return mass[:, None] * (cost.x - cost.barycentric_projection(g, b.log(), eps))


def _dual_value(potentials: Potentials, a: Tensor, b: Tensor, eps: float, reach: float | None) -> Tensor:
    """The dual objective at the optimum; with `reach` the transported mass, at most 1, enters too [Sejourne2019]."""
    if reach is None:
        return a @ potentials.f + b @ potentials.g
    rho = reach**2
    x_mass, y_mass = a @ torch.exp(-potentials.f / rho), b @ torch.exp(-potentials.g / rho)
    return rho * (2 - x_mass - y_mass) + eps * (1 - (x_mass + y_mass) / 2)


def _geomloss(
    a: Tensor, x: Tensor, b: Tensor, y: Tensor, blur: float, scaling: float, debias: bool, reach: float | None
) -> Tensor:
    """The same quantity by geomloss, which computes the reference self-term at every call."""
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, reach=reach, debias=debias, backend="tensorized")
    return loss(a, x, b, y)


def _flash_sinkhorn(
    a: Tensor, x: Tensor, b: Tensor, y: Tensor, blur: float, scaling: float, debias: bool, reach: float | None
) -> Tensor:
    """The same quantity by flash-sinkhorn, in float32 products and our cost ½‖x − y‖².

    Raises:
        InputError: not on a GPU, or the library is not installed.
    """
    require(x.is_cuda, "backend", "be native or geomloss for points that are not on a CUDA device", "flash-sinkhorn")
    try:
        from flash_sinkhorn import SamplesLoss
    except ImportError as error:
        raise InputError("`backend` flash-sinkhorn must be installed: pip install flash-sinkhorn") from error
    options = {"half_cost": True, "allow_tf32": False}
    loss = SamplesLoss("sinkhorn", blur=blur, scaling=scaling, reach=reach, debias=debias, **options)
    return loss(a, x, b, y)
