"""Value and gradient over many clouds, weights, lengths and options: accurate against float64, or with a warning."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.transport import (
    divergence_gradient,
    divergence_value,
    geometry,
    median_distance,
    self_potential,
    self_transport_cost,
    sinkhorn_divergence,
    sinkhorn_potentials,
)
from ot_diffusers.transport.sliced import sliced_wasserstein

KINDS = ("gaussian", "clusters", "duplicates", "outlier", "offset", "line", "far", "one place")


def exact(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, blur: float, reach: float | None
) -> tuple[float, Tensor, Tensor] | None:
    """OT(x, y) and its gradients in x and y, by plain log-domain Sinkhorn in float64; None where it does not converge.

    The fixed point is unique, so that a start near it only saves time.
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
    omits_y_self_term: bool
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
        omits_y_self_term=draw(st.booleans()),
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
    """The clouds and weights of a case, in its dtype, and its lengths."""
    generator = torch.Generator().manual_seed(case.seed)
    n, m, width = case.sizes
    x, y = cloud(case.kinds[0], n, width, generator), cloud(case.kinds[1], m, width, generator)
    if case.kinds[0] == "offset" and case.seed % 2:  # both clouds
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
    x_self, y_self = exact(x, x, a, a, **lengths), exact(y, y, b, b, **lengths)
    if x_self is None or y_self is None:
        return None
    value = cross[0] - x_self[0] / 2 - (0 if case.omits_y_self_term else y_self[0] / 2)
    terms = abs(cross[0]) + abs(x_self[0]) / 2 + abs(y_self[0]) / 2
    return value, terms, cross[1] - (x_self[1] + x_self[2]) / 2, cross[2] - (y_self[1] + y_self[2]) / 2


def actual(case: Case) -> tuple[float, Tensor, Tensor, list[str]]:
    """The package's value, its gradients, and its warnings."""
    tensors, lengths = problem(case)
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    options = {"y_self_cost": 0.0} if case.omits_y_self_term and case.debias else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = sinkhorn_divergence(**tensors, **lengths, scaling=case.scaling, debias=case.debias, **options)
    value.backward()
    return value.item(), x.grad.double(), y.grad.double(), [str(warning.message) for warning in caught]


def errors(case: Case) -> dict[str, float] | None:
    """The errors of a case in units of the documented tolerance, and whether there was a warning; None without
    truth."""
    right = truth(case)
    if right is None:
        return None
    value, terms, *gradients = right
    got, *got_gradients, messages = actual(case)
    tensors, lengths = problem(case)
    x, y = tensors["x"].double(), tensors["y"].double()
    spread = min(lengths["blur"], 2 * torch.cat([x, y]).sub(y.mean(0)).norm(dim=1).max().item())
    uncertainty = 1e-6 * spread**2 if case.dtype == torch.float32 else 1e-9 * spread**2
    result = {"value": abs(got - value) / (1e-3 * abs(value) + 1e-5 * terms + uncertainty + 1e-30)}
    for name, gradient, true, points in zip("xy", got_gradients, gradients, (x, y), strict=True):
        scale = (points - points.mean(0)).norm(dim=1).mean().item() + (x.mean(0) - y.mean(0)).norm().item()
        floor = 1e-4 * scale / math.sqrt(len(points))
        result[name] = ((gradient - true).norm() / (0.045 * true.norm() + floor + 1e-30)).item()
    result["warned"] = float(bool(messages))
    return result


@pytest.mark.slow
@settings(max_examples=25)
@given(cases())
def test_accurate_or_warned(case: Case) -> None:
    wrong = errors(case)
    assume(wrong is not None)
    is_warned = wrong.pop("warned")
    assert is_warned or max(wrong.values()) <= 1, wrong
    is_ordinary = {"outlier", "far", "offset"}.isdisjoint(case.kinds) and case.blur > 0.05
    assert not (is_warned and is_ordinary)


# --- one option or length at a time ---------------------------------------------------------------------------------

SCALINGS = [1e-9, 0.01, 0.3, 0.7, 0.98, 0.99, 0.995, 0.9999, 1 - 1e-12]


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 8, generator=generator).to(dtype), torch.randn(60, 8, generator=generator).to(dtype)


def cosine(u: Tensor, v: Tensor) -> float:
    return torch.cosine_similarity(u.double().flatten(), v.double().flatten(), dim=0).item()


def value_and_gradient(x: Tensor, y: Tensor, **options: Any) -> tuple[float, Tensor]:
    x = x.clone().requires_grad_()
    value = sinkhorn_divergence(x, y, **options)
    return value.item(), torch.autograd.grad(value, x)[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_any_scaling_converges(scaling: float, debias: bool) -> None:
    x, y = pair()
    expected, gradient = value_and_gradient(x.double(), y.double(), blur=0.05, debias=debias)
    value, actual = value_and_gradient(x, y, blur=0.05, debias=debias, scaling=scaling)
    assert value == pytest.approx(expected, rel=1e-3)
    assert cosine(actual, gradient) > 0.999


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scaling", [0.01, 0.99, 0.9999])
@pytest.mark.parametrize("path", ["field", "potentials", "warm", "batch", "blocks"])
def test_any_scaling_converges_by_every_path(path: str, scaling: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair()
    blur = 0.3 if path == "blocks" else 0.05  # Newton's method, which a small blur needs, does not serve large clouds
    expected, _ = divergence_gradient(x, y, blur=blur)
    if path == "blocks":
        monkeypatch.setattr(geometry, "MAX_DENSE_ENTRIES", 100)
    match path:
        case "potentials":
            assert sinkhorn_potentials(x, y, blur=blur, scaling=scaling).marginal_error < 1e-3
        case "warm":
            far = divergence_gradient(x * 10, y, blur=blur)[1]
            actual = divergence_gradient(x, y, blur=blur, scaling=scaling, initial=far)[0]
            assert cosine(actual, expected) > 0.999
        case "batch":
            actual = divergence_gradient(torch.stack([x, 2 * x]), y, blur=blur, scaling=scaling)[0]
            assert cosine(actual[0], expected) > 0.999
        case _:
            assert cosine(divergence_gradient(x, y, blur=blur, scaling=scaling)[0], expected) > 0.999


def test_what_is_not_solved_is_warned_once() -> None:
    x, y = pair()
    with pytest.warns(UserWarning, match=r"marginal error is 0\.\d+, .* raise blur or max_iterations") as caught:
        actual = sinkhorn_potentials(x, y, blur=0.05, max_iterations=5)
    assert len(caught) == 1 and actual.marginal_error > 0.01
    with pytest.warns(UserWarning, match="raise max_iterations"):
        self_potential(x, blur=0.5, max_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divergence_gradient(x, y, blur=0.05, num_iterations=5)  # the caller fixed the number of iterations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [3, 4, 8, 30, 200, 300])
def test_a_large_reach_conserves_mass(power: int, dtype: torch.dtype) -> None:
    x, y = pair(dtype)
    expected, gradient = value_and_gradient(x, y, blur=0.5)
    value, actual = value_and_gradient(x, y, blur=0.5, reach=10.0**power)
    assert value == pytest.approx(expected, rel=1e-5)  # costs of 10 in 1e6
    torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [1e-300, 1e-30, 1e-6, 1e-3])
def test_a_small_reach_moves_what_is_near_alone(reach: float, dtype: torch.dtype) -> None:
    # min ⟨C, π⟩ + eps KL(π | a⊗b) without marginals: π = a⊗b exp(−C/eps), of value eps (1 − mass).
    x, y = pair(dtype)
    x.requires_grad_()
    value = sinkhorn_divergence(x, y, blur=2.0, reach=reach, debias=False)
    plan = torch.exp(-torch.cdist(x, y).square() / 8).double().detach() / 3000
    assert value.item() == pytest.approx(4 * (1 - plan.sum().item()), rel=1e-5)
    value.backward()
    expected = plan.sum(1)[:, None] * x.double() - plan @ y.double()
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("blur", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("self_cost", [0, 3.5, torch.tensor(3.5, requires_grad=True)])
def test_a_given_self_cost_leaves_the_gradients(blur: float, self_cost: Any) -> None:
    (x, y), gradients = pair(), []
    for options in ({}, {"y_self_cost": self_cost}):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        gradients.append(torch.autograd.grad(sinkhorn_divergence(x, y, blur=blur, **options), (x, y)))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_self_cost_has_its_gradient() -> None:
    y = pair(torch.float64)[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda y: self_transport_cost(y, blur=2.0), y[:6], eps=1e-3, atol=1e-4)
    for wrong in (torch.zeros(3), math.nan):
        with pytest.raises(InputError, match="`y_self_cost` must"):
            sinkhorn_divergence(y, y, blur=2.0, y_self_cost=wrong)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("distance", [1e2, 1e3, 1e4, 1e5])
def test_an_outlier_leaves_the_gradient(distance: float) -> None:
    """Σ ∂OT/∂x = mean(x) − mean(y) for every plan with the right marginals."""
    x, y = pair()
    x[0, 0] = distance
    gradient = value_and_gradient(x, y, blur=0.5, debias=False)[1]
    difference = x.mean(0) - y.mean(0)
    assert (gradient.sum(0) - difference).norm() < 1e-4 * difference.norm()
    expected = value_and_gradient(x.double(), y.double(), blur=0.5, debias=False)[1]
    assert cosine(gradient[1:], expected[1:]) > 0.9999
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("offset", [1e4, 1e5, 1e6])
def test_a_common_offset_matters_by_its_rounding_alone(offset: float) -> None:
    x, y = (cloud + offset for cloud in pair())
    value, gradient = value_and_gradient(x, y, blur=0.5)
    expected, right = value_and_gradient(x.double(), y.double(), blur=0.5)
    assert value == pytest.approx(expected, rel=1e-4) and cosine(gradient, right) > 0.9999
    options = {"projections": torch.eye(8)}
    sliced = sliced_wasserstein(x, y, **options).item()
    assert sliced == pytest.approx(sliced_wasserstein(x.double(), y.double(), **options).item(), rel=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-40, -30, -10, 10, 18, 30, 100, 200])
def test_units_do_not_matter(power: int, dtype: torch.dtype) -> None:
    unit = 10.0**power
    x, y = ((unit * cloud).to(dtype) for cloud in pair(torch.float64))
    if power > (18 if dtype == torch.float32 else 100):  # the squares are out of the range of this dtype
        with pytest.raises(InputError, match=r"`(points|x)` must"):
            sinkhorn_divergence(x, y, blur=unit / 2)
        return
    value, gradient = value_and_gradient(x, y, blur=unit / 2)
    expected, right = value_and_gradient(*pair(torch.float64), blur=0.5)
    if dtype == torch.float64 or power >= -18:  # float32 cannot represent smaller squares
        assert value / unit / unit == pytest.approx(expected, rel=1e-4)
    assert cosine(gradient.double() / unit, right) > 0.9999
    assert median_distance(x) / unit == pytest.approx(median_distance(pair()[0]), rel=1e-4)


@pytest.mark.parametrize("num_iterations", [None, 100])
@pytest.mark.parametrize("power", [3, 10, 20, 100, 200, 308])
def test_an_immense_blur_compares_means(power: int, num_iterations: int | None) -> None:
    x, y = pair()
    difference = x.mean(0) - y.mean(0)
    value, gradient = value_and_gradient(x, y, blur=10.0**power, num_iterations=num_iterations)
    assert value == pytest.approx(difference.square().sum().item() / 2, rel=1e-4)
    torch.testing.assert_close(gradient, (difference / 50).expand_as(gradient), rtol=1e-4, atol=1e-8)
    assert divergence_value(x, y, blur=10.0**power) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("power", [-300, -30, -10])
def test_a_vanishing_blur_is_the_assignment(power: int) -> None:
    x, y = pair(torch.float64)
    with pytest.warns(UserWarning, match="too small for float64"):
        value, gradient = value_and_gradient(x, y[:50], blur=10.0**power, debias=False)
    _, columns = linear_sum_assignment(torch.cdist(x, y[:50]).square() / 2)
    assert value == pytest.approx((x - y[columns]).square().sum(1).mean().item() / 2, rel=1e-4)
    assert cosine(gradient, x - y[columns]) > 0.999
