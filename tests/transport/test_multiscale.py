"""The solver for large clouds, compared with the one for small clouds and with closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.evaluation import metrics
from ot_diffusers.transport import divergence_value, has_stored_solver, multiscale, sinkhorn_divergence


def clusters(rows: int, seed: int, columns: int = 24) -> Tensor:
    """Ten clusters of unequal weights: Sinkhorn iterations are slow where mass has to cross the gaps between them."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(10, columns, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(10, (rows,), generator=generator)] + torch.randn(rows, columns, generator=generator)


@pytest.fixture
def small_coarse_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarsen twice already at 600 points."""
    monkeypatch.setattr(multiscale, "MAX_COARSE_ENTRIES", 50 * 50)


@pytest.mark.slow
@pytest.mark.usefixtures("small_coarse_problem")
@pytest.mark.parametrize(("rows", "columns"), [(600, 600), (300, 700), (700, 300)])
@pytest.mark.parametrize("blur", [0.05, 0.3])
@pytest.mark.parametrize("normalize", ["l2", "median"])
def test_agrees_with_the_solver_for_small_clouds(rows: int, columns: int, blur: float, normalize: str) -> None:
    x, y = clusters(rows, 1), clusters(columns, 2)
    if normalize == "l2":
        x, y = (torch.nn.functional.normalize(cloud) for cloud in (x, y))
    else:
        x, y = x / torch.pdist(y).median(), y / torch.pdist(y).median()
    expected = sinkhorn_divergence(x, y, blur=blur).item()
    assert divergence_value(x, y, blur=blur) == pytest.approx(expected, rel=1e-3)  # the claim of the docstring


@pytest.mark.usefixtures("small_coarse_problem")
def test_translation_costs_half_its_squared_length() -> None:
    x = clusters(400, 1)
    shift = torch.linspace(-1, 1, 24)
    expected = 0.5 * shift.square().sum().item()
    assert divergence_value(x + shift, x, blur=0.5) == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("small_coarse_problem")
def test_is_zero_for_equal_clouds_and_symmetric() -> None:
    x, y = (cloud / 10 for cloud in (clusters(400, 1), clusters(500, 2)))
    assert divergence_value(x, x, blur=0.1) == pytest.approx(0, abs=1e-4)  # of transport costs near .1
    assert divergence_value(x, y, blur=0.1) == pytest.approx(divergence_value(y, x, blur=0.1), rel=1e-3)


@pytest.mark.usefixtures("small_coarse_problem")
def test_repeated_points() -> None:
    """Between copies of one point and copies of another the divergence is ½‖x − y‖², whatever the blur."""
    x, y = torch.zeros(200, 2), torch.tensor([[3.0, 4.0]]).repeat(300, 1)
    assert divergence_value(x, y, blur=1.0) == pytest.approx(12.5, rel=1e-4)  # float32


@pytest.mark.usefixtures("small_coarse_problem")
def test_potentials_solve_the_marginals() -> None:
    x, y = (cloud / 10 for cloud in (clusters(500, 1), clusters(400, 2)))
    actual = multiscale.multiscale_potentials(x, y, blur=0.1)
    assert actual.marginal_error < 0.002
    plan = torch.exp((actual.f[:, None] + actual.g - torch.cdist(x, y).square() / 2) / 0.1**2).double() / (500 * 400)
    assert (plan.sum(1) - 1 / 500).abs().sum() < 0.004
    assert (plan.sum(0) - 1 / 400).abs().sum() < 0.004


@pytest.mark.slow
def test_large_sets_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_stored_solver(10_000, 10_000) and not has_stored_solver(1000, 1000)
    assert not has_stored_solver(200_000, 100)  # its self-term has a kernel of 160 GB
    x, y = clusters(500, 1), clusters(500, 2)
    expected = metrics.sinkhorn_distance(x, y)
    monkeypatch.setattr(multiscale, "MIN_STORED_ENTRIES", 1)
    actual = metrics.sinkhorn_distance(x, y)
    assert actual != expected
    assert actual == pytest.approx(expected, rel=1e-3)


def test_refuses_what_has_no_problem() -> None:
    with pytest.raises(InputError, match="`y` must be finite"):
        divergence_value(torch.zeros(3, 2), torch.full((3, 2), torch.nan), blur=1.0)
