"""Semi-discrete transport against closed forms and an exact solver."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.transport import semidiscrete
from ot_diffusers.transport.semidiscrete import assign, semidiscrete_potentials

pytestmark = pytest.mark.fast


def normal(count: int, dimension: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def chi_squared(points: Tensor, potentials: Tensor, num_draws: int = 200_000) -> float:
    """Of independent draws, counted without the solver."""
    counts = assign(normal(num_draws, points.shape[1], seed=1), points, potentials).bincount(minlength=len(points))
    return len(points) * (counts * (counts - 1)).sum().item() / (num_draws * (num_draws - 1)) - 1


def test_two_points_are_told_by_the_sign() -> None:
    points = torch.tensor([[-1.0], [1.0]])
    solved = semidiscrete_potentials(points, tolerance=1e-4)
    noise = normal(1000, 1)
    far = noise.abs()[:, 0] > 0.03  # χ² = (2P − 1)², so that the boundary is right to 0.0125 or so
    assert torch.equal(assign(noise, points, solved.values)[far], (noise > 0).long()[far, 0])


def test_points_on_a_line_have_cells_that_end_at_quantiles() -> None:
    """Cell j of N sorted points ends at Φ⁻¹(j/N), where the scores of two neighbours are equal."""
    points = torch.tensor([-3.0, -1.0, -0.5, 0.0, 2.0, 2.5, 5.0, 9.0])[:, None]
    solved = semidiscrete_potentials(points, tolerance=5e-4)
    ends = -solved.values.diff() / points[:, 0].diff()
    assert solved.converged
    assert torch.allclose(ends, torch.special.ndtri(torch.arange(1, 8) / 8), atol=0.05)


def test_points_on_a_circle_have_equal_potentials() -> None:
    angles = 2 * math.pi * torch.arange(12) / 12
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert semidiscrete_potentials(points, tolerance=1e-3).values.std() < 0.02


@pytest.mark.parametrize(("count", "dimension"), [(300, 2), (500, 16), (700, 64)])
def test_every_point_receives_its_share(count: int, dimension: int) -> None:
    """Points of unequal lengths, far from the origin."""
    points = normal(count, dimension) * normal(count, 1, seed=2).exp() + 7
    solved = semidiscrete_potentials(points, tolerance=0.02)
    assert solved.converged
    assert solved.chi_squared <= 0.02
    # The solver knows χ² to a tenth of the tolerance, and stops at the first of several measurements below it.
    assert chi_squared(points, solved.values) < 1.4 * 0.02


def test_chi_squared_is_unbiased() -> None:
    """Without potentials, only the two outer points of a line receive anything: χ² = N · 2 · (1/2)² − 1."""
    points = torch.linspace(-1, 1, 10)[:, None]
    solver = semidiscrete._Solver(points, torch.Generator().manual_seed(0))
    assert solver.chi_squared(torch.zeros(10), 50_000) == pytest.approx(4, abs=0.05)


def test_the_map_is_optimal() -> None:
    """The mean cost is that of an exact assignment of 1,000 draws to 50 copies of 20 points, which is a little less
    for having seen the draws."""
    points, noise = normal(20, 5, seed=3), normal(1000, 5, seed=4)
    solved = semidiscrete_potentials(points, tolerance=1e-3)
    cost = (noise - points[assign(noise, points, solved.values)]).square().sum(dim=1).mean()
    costs = torch.cdist(noise, points).square().repeat_interleave(50, dim=1)
    exact = costs[linear_sum_assignment(costs.numpy())].mean()
    independent = (noise.square().sum(dim=1).mean() + points.square().sum(dim=1).mean()).item()
    assert abs(cost - exact) < 0.02 * (independent - exact)


def test_scale_and_centre_change_nothing() -> None:
    points, noise = normal(200, 8), normal(2000, 8, seed=1)
    here = assign(noise, points, semidiscrete_potentials(points).values)
    there = assign(noise, 10 * points - 3, semidiscrete_potentials(10 * points - 3).values)
    assert (here == there).float().mean() > 0.99  # rounding moves some boundaries


def test_a_row_does_not_depend_on_its_companions(monkeypatch: pytest.MonkeyPatch) -> None:
    points, potentials = normal(1000, 30), normal(1000, 1, seed=1)[:, 0]
    noise = normal(500, 30, seed=2)
    whole = assign(noise, points, potentials)
    assert torch.equal(whole, torch.cat([assign(row, points, potentials) for row in noise.split(1)]))
    monkeypatch.setattr(semidiscrete, "CPU_ENTRIES", 7000)
    assert torch.equal(whole, assign(noise, points, potentials))
    exact = (noise.double() @ points.T.double() + potentials.double()).argmax(dim=1)
    assert torch.equal(whole, exact)
    assert len(assign(noise[:0], points, potentials)) == 0


@pytest.mark.parametrize("count", [2, 5, 63, 64, 65, 127, 128, 129, 1000])
def test_winners_are_the_largest_scores(count: int) -> None:
    scores = normal(40, count)
    winners, margin = semidiscrete._winners(scores, want_margin=True)
    two = scores.topk(2, dim=1)
    assert torch.equal(winners, two.indices[:, 0])
    assert torch.equal(margin, two.values[:, 0] - two.values[:, 1])
    assert torch.equal(semidiscrete._winners(scores.view(5, 8, count))[0].flatten(), winners)


def test_the_same_seed_gives_the_same_potentials() -> None:
    points = normal(100, 4)
    first, again, other = (semidiscrete_potentials(points, seed=seed).values for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_time_ends_the_descent_with_what_it_has() -> None:
    told: list[tuple[int, float | None]] = []
    solved = semidiscrete_potentials(
        normal(500, 64), tolerance=1e-6, max_seconds=0.3, progress=lambda *values: told.append(values)
    )
    assert not solved.converged
    assert solved.seconds < 5
    assert told[-1] == (solved.num_draws, solved.chi_squared)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (torch.zeros(3), {}, r"`points` must have shape \[N, D\]"),
        (torch.zeros(1, 3), {}, r"`points` must have shape \[N, D\]"),
        (torch.full((3, 2), math.nan), {}, "`points` must be finite"),
        (torch.ones(3, 2), {}, "`points` must differ from each other"),
        (normal(3, 2), {"tolerance": 0}, "`tolerance` must be positive"),
    ],
)
def test_bad_input_is_named(points: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        semidiscrete_potentials(points, **options)
