"""Arbitrary clouds give a finite value with a finite gradient, or an error that names the argument, and end soon."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.transport import (
    divergence_gradient,
    median_distance,
    self_potential,
    self_transport_cost,
    sinkhorn_divergence,
    sinkhorn_potentials,
)
from ot_diffusers.transport.sliced import patch_sliced_wasserstein, sliced_wasserstein

EXAMPLES = settings(max_examples=60)
SECONDS = 20.0
"""For one call on some dozen points, on a machine that has other things to do. A call takes a few hundredths."""


@dataclass
class Clouds:
    """Two clouds of any shape, size, distance and precision, with a blur that may not suit them."""

    x: Tensor
    y: Tensor
    blur: float


@st.composite
def clouds(draw: Any) -> Clouds:
    width = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    scale = 10.0 ** draw(st.integers(-6, 6))

    def cloud() -> Tensor:
        points = torch.randn(draw(st.integers(1, 24)), width, generator=generator, dtype=torch.float64)
        match draw(st.sampled_from(["spread", "duplicates", "one place", "a line"])):
            case "duplicates":
                points = points[torch.randint(0, 2, (len(points),), generator=generator).clamp(max=len(points) - 1)]
            case "one place":
                points = points[:1].expand_as(points)
            case "a line":
                points = points[:, :1].expand_as(points)
        return points

    far = 10.0 ** draw(st.integers(-2, 4)) if draw(st.booleans()) else 0.0
    x, y = cloud(), cloud() + far
    largest = torch.finfo(dtype).max / 16
    x, y = ((scale * cloud).clamp(-largest, largest).to(dtype) for cloud in (x, y))
    return Clouds(x, y, 10.0 ** draw(st.integers(-4, 4)))


def check(compute: Any) -> Tensor | None:
    """The value, which must be finite; None if the input was rejected with a one-line error."""
    started = time.monotonic()
    try:
        value = compute()
    except InputError as error:
        assert str(error).startswith("`") and "\n" not in str(error)
        return None
    finally:
        assert time.monotonic() - started < SECONDS
    assert bool(torch.as_tensor(value).isfinite().all()), value
    return value


@pytest.mark.slow
@EXAMPLES
@given(
    clouds(), st.booleans(), st.one_of(st.none(), st.sampled_from([1e-3, 1.0, 1e3])), st.sampled_from([0.3, 0.7, 0.95])
)
def test_sinkhorn_divergence(given: Clouds, debias: bool, reach: float | None, scaling: float) -> None:
    x = given.x.clone().requires_grad_(True)
    options: dict[str, Any] = {"blur": given.blur, "debias": debias, "reach": reach, "scaling": scaling}
    value = check(lambda: sinkhorn_divergence(x, given.y, **options))
    if value is not None:
        value.backward()
        assert x.grad is not None and x.grad.shape == x.shape and bool(x.grad.isfinite().all())


@EXAMPLES
@given(clouds(), st.integers(0, 99))
def test_weighted_clouds(given: Clouds, seed: int) -> None:
    """Weights that span eight orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (10 ** (-8 * torch.rand(len(cloud), generator=generator)) for cloud in (given.x, given.y))
    weights = {"x_weights": a / a.sum(), "y_weights": b / b.sum()}
    check(lambda: sinkhorn_divergence(given.x, given.y, blur=given.blur, **weights))


@EXAMPLES
@given(clouds())
def test_gradient_for_guidance(given: Clouds) -> None:
    check(lambda: divergence_gradient(given.x, given.y, blur=given.blur)[0])


@EXAMPLES
@given(clouds())
def test_potentials_and_self_terms(given: Clouds) -> None:
    def both() -> Tensor:
        actual = sinkhorn_potentials(given.x, given.y, blur=given.blur)
        return torch.cat([actual.f, actual.g])

    check(both)
    check(lambda: self_potential(given.x, blur=given.blur))
    check(lambda: self_transport_cost(given.x, blur=given.blur))


@EXAMPLES
@given(clouds())
def test_median_distance(given: Clouds) -> None:
    value = check(lambda: median_distance(given.x))
    assert value is None or value > 0


@EXAMPLES
@given(clouds(), st.integers(1, 20), st.integers(0, 99))
def test_sliced_wasserstein(given: Clouds, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = given.x.clone().requires_grad_(True)
    value = check(lambda: sliced_wasserstein(x, given.y, num_projections=count, generator=generator))
    if value is not None:
        assert value >= 0
        value.backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())


@EXAMPLES
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 10), st.integers(0, 9)
)
def test_patches(count: int, others: int, channels: int, size: int, patch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, channels, size, size, generator=generator) for n in (count, others))
    options: dict[str, Any] = {"patch_sizes": (patch,), "num_projections": 4, "generator": generator}
    value = check(lambda: patch_sliced_wasserstein(x, y, **options))
    assert (value is None) == (patch > size)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["x", "y"])
def test_numbers_that_are_none_are_refused(wrong: float, side: str) -> None:
    pair = {"x": torch.zeros(4, 2), "y": torch.ones(5, 2)}
    pair[side][1, 1] = wrong
    with pytest.raises(InputError, match=f"`{side}` must be finite"):
        sinkhorn_divergence(pair["x"], pair["y"], blur=1.0)
