"""Value and gradient against float64 truth, over clouds, weights, lengths and options: right, or a warning says not."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ot_diffusers.transport import sinkhorn_divergence, sinkhorn_potentials

KINDS = ("gaussian", "clusters", "duplicates", "outlier", "offset", "line", "far", "one place")


def exact(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, blur: float, reach: float | None
) -> tuple[float, Tensor, Tensor] | None:
    """OT(x, y) and its gradients in x and y, by plain log-domain Sinkhorn in float64; None where it does not converge.

    It has one fixed point, so that a start near it saves time and nothing else.
    """
    cost, eps = (x[:, None] - y[None]).square().sum(-1) / 2, blur**2
    share = 1.0 if reach is None else reach**2 / (reach**2 + eps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = sinkhorn_potentials(
            x, y, blur=blur, reach=reach, x_weights=a, y_weights=b, tolerance=1e-10, max_iterations=1500
        )
    f = start.f
    for _ in range(100):
        g = -share * eps * torch.logsumexp((f[:, None] - cost) / eps + a.log()[:, None], 0)
        rows = -share * eps * torch.logsumexp((g - cost) / eps + b.log(), 1)
        change, f = (rows - f).abs().max() / eps, rows
        if change < 1e-8:
            break
    if change > 1e-6:
        return None
    g = -share * eps * torch.logsumexp((f[:, None] - cost) / eps + a.log()[:, None], 0)
    plan = ((f[:, None] + g - cost) / eps + a.log()[:, None] + b.log()).exp()
    gradients = plan.sum(1)[:, None] * x - plan @ y, plan.sum(0)[:, None] * y - plan.T @ x
    if reach is None:
        return (a @ f + b @ g).item(), *gradients
    value = -(reach**2) * (a @ torch.expm1(-f / reach**2) + b @ torch.expm1(-g / reach**2))
    return (value - eps * (b @ torch.expm1(-g / reach**2))).item(), *gradients


@dataclass(frozen=True)
class Case:
    """Two clouds with weights, and the options of a divergence, lengths in units of the median distance."""

    seed: int
    sizes: tuple[int, int, int]
    kinds: tuple[str, str]
    weights: bool
    blur: float
    scaling: float
    reach: float | None
    debias: bool
    known: bool
    dtype: torch.dtype


@st.composite
def cases(draw: Any) -> Case:
    return Case(
        seed=draw(st.integers(0, 10**6)),
        sizes=(draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 16))),
        kinds=(draw(st.sampled_from(KINDS)), draw(st.sampled_from(KINDS))),
        weights=draw(st.booleans()),
        blur=10 ** draw(st.floats(-2, 1)),
        scaling=draw(st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 0.98, 0.999])),
        reach=draw(st.one_of(st.none(), st.floats(-1, 6).map(lambda power: 10**power))),
        debias=draw(st.booleans()),
        known=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


def cloud(kind: str, count: int, width: int, generator: torch.Generator) -> Tensor:
    points = torch.randn(count, width, generator=generator, dtype=torch.float64)
    match kind:
        case "clusters":
            points = points / 10 + 3 * torch.randint(-1, 2, (count, 1), generator=generator)
        case "duplicates":
            points = points[torch.arange(count) % max(1, count // 3)]
        case "outlier":
            points[0] *= 10 ** (1 + 4 * torch.rand((), generator=generator))
        case "offset":
            points = points + 10 ** (4 * torch.rand((), generator=generator))
        case "line":
            points = points[:, :1].expand_as(points).clone()
        case "far":
            points[::2] += 1000
        case "one place":
            points = points[:1].expand_as(points).clone()
    return points


def problem(case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The clouds and weights of a case in its type, and its lengths."""
    generator = torch.Generator().manual_seed(case.seed)
    n, m, width = case.sizes
    x, y = cloud(case.kinds[0], n, width, generator), cloud(case.kinds[1], m, width, generator)
    if case.kinds[0] == "offset" and case.seed % 2:  # of both
        y = y + (x[0] - x[0].sign())
    x, y = x.to(case.dtype), y.to(case.dtype)
    a, b = (10 ** (-4 * torch.rand(count, generator=generator) * case.weights) for count in (n, m))
    tensors = {"x": x, "y": y, "x_weights": (a / a.sum()).to(case.dtype), "y_weights": (b / b.sum()).to(case.dtype)}
    joined = torch.cat([x, y]).double()
    median = torch.pdist(joined).median().item() or 1.0
    return tensors, {"blur": case.blur * median, "reach": case.reach and case.reach * median}


def truth(case: Case) -> tuple[float, float, Tensor, Tensor] | None:
    """The divergence, the sum of the absolute values of its terms, and its gradients."""
    tensors, lengths = problem(case)
    x, y, a, b = (tensors[name].double() for name in ("x", "y", "x_weights", "y_weights"))
    a, b = a / a.sum(), b / b.sum()
    cross = exact(x, y, a, b, **lengths)
    if cross is None or not case.debias:
        return cross and (cross[0], abs(cross[0]), *cross[1:])
    own, known = exact(x, x, a, a, **lengths), exact(y, y, b, b, **lengths)
    if own is None or known is None:
        return None
    value = cross[0] - own[0] / 2 - (0 if case.known else known[0] / 2)
    terms = abs(cross[0]) + abs(own[0]) / 2 + abs(known[0]) / 2
    return value, terms, cross[1] - (own[1] + own[2]) / 2, cross[2] - (known[1] + known[2]) / 2


def found(case: Case) -> tuple[float, Tensor, Tensor, list[str]]:
    """The package's value, its gradients, and its warnings."""
    tensors, lengths = problem(case)
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    options = {"y_self_cost": 0.0} if case.known and case.debias else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = sinkhorn_divergence(**tensors, **lengths, scaling=case.scaling, debias=case.debias, **options)
    value.backward()
    return value.item(), x.grad.double(), y.grad.double(), [str(one.message) for one in said]


def errors(case: Case) -> dict[str, float] | None:
    """How far from the truth a case is, in units of what is documented; None where it is said."""
    right = truth(case)
    if right is None:
        return None
    value, terms, *gradients = right
    got, *got_gradients, said = found(case)
    tensors, lengths = problem(case)
    x, y = tensors["x"].double(), tensors["y"].double()
    spread = min(lengths["blur"], 2 * torch.cat([x, y]).sub(y.mean(0)).norm(dim=1).max().item())
    uncertainty = 1e-6 * spread**2 if case.dtype == torch.float32 else 1e-9 * spread**2
    result = {"value": abs(got - value) / (1e-3 * abs(value) + 1e-5 * terms + uncertainty + 1e-30)}
    for name, gradient, true, points in zip("xy", got_gradients, gradients, (x, y), strict=True):
        scale = (points - points.mean(0)).norm(dim=1).mean().item() + (x.mean(0) - y.mean(0)).norm().item()
        floor = 1e-4 * scale / math.sqrt(len(points))
        result[name] = ((gradient - true).norm() / (0.045 * true.norm() + floor + 1e-30)).item()
    result["said"] = float(bool(said))
    return result
