"""Sliced Wasserstein, compared with closed forms: translations, lines, Gaussians, and clouds of unequal sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from makers.draws import cloud as _cloud
from scipy.stats import wasserstein_distance  # W1, for the masses of the plan

from ot_diffusers.errors import InputError
from ot_diffusers.transport.sliced import (
    _quantile_pairs,
    patch_sliced_wasserstein,
    random_directions,
    sliced_wasserstein,
)


def test_identical_clouds_are_at_distance_zero():
    x = _cloud(50, 7)
    assert sliced_wasserstein(x, x).item() == 0
    # In a different order the matrix product rounds differently: squares of 1e-15.
    assert sliced_wasserstein(x, x[torch.randperm(50)]).item() == pytest.approx(0, abs=1e-28)


def test_translation_on_the_line_costs_half_its_square():
    x = _cloud(20, 1)
    # Float64 rounding of sums of 20 terms near 1.
    assert sliced_wasserstein(x, x + 3).item() == pytest.approx(4.5, rel=1e-12)


@pytest.mark.parametrize("dim", [2, 5, 16])
def test_translation_with_whole_bases_is_exact(dim):
    """Over an orthonormal basis Σ⟨m, θ⟩² = ‖m‖², so the mean of ½⟨m, θ⟩² is ‖m‖²/(2D) without sampling error."""
    x, shift = _cloud(30, dim), _cloud(dim, seed=1)
    generator = torch.Generator().manual_seed(0)
    value = sliced_wasserstein(x, x + shift, num_projections=3 * dim, orthogonal=True, generator=generator)
    # Float64 rounding of the QR decomposition.
    assert value.item() == pytest.approx(shift.square().sum().item() / (2 * dim), rel=1e-10)


def test_translation_with_random_directions_is_right_on_average():
    """E ½⟨m, θ⟩² = ‖m‖²/(2D)."""
    x, shift = _cloud(10, 8), torch.ones(8, dtype=torch.float64)
    value = sliced_wasserstein(x, x + shift, num_projections=20_000, generator=torch.Generator().manual_seed(0))
    # The relative standard deviation of ⟨m, θ⟩² is below √2, so 20,000 directions give 1%; tolerance: four times that.
    assert value.item() == pytest.approx(0.5, rel=0.04)


def test_gaussians_of_two_scales():
    """On every line, W₂² between N(0, 1) and N(0, s²) is (s − 1)²."""
    x, y = _cloud(20_000, 3), 2.5 * _cloud(20_000, 3, seed=1)
    value = sliced_wasserstein(x, y, num_projections=32, generator=torch.Generator().manual_seed(0))
    # 20,000 points give a standard deviation to .5%, and the difference of two to 1.3%; tolerance: (3 × 1.3%)².
    assert value.item() == pytest.approx(1.5**2 / 2, rel=0.08)


def test_given_projection_is_the_sorted_distance():
    x, y = _cloud(40, 3), _cloud(40, 3, seed=1)
    axis = torch.tensor([[0.0, 1.0, 0.0]])
    expected = (x[:, 1].sort().values - y[:, 1].sort().values).square().mean() / 2
    assert sliced_wasserstein(x, y, projections=axis).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (3, 4), (6, 4), (7, 21)])
def test_unequal_clouds_match_the_repeated_clouds(n, m):
    """Repeating n points m times and m points n times makes the sizes equal and leaves both measures unchanged."""
    x, y = _cloud(n, 2), _cloud(m, 2, seed=1)
    directions = random_directions(9, 2, dtype=torch.float64)
    repeated = sliced_wasserstein(x.repeat_interleave(m, 0), y.repeat_interleave(n, 0), projections=directions)
    # The same sums in a different order, in float64.
    assert sliced_wasserstein(x, y, projections=directions).item() == pytest.approx(repeated.item(), rel=1e-12)


def test_plan_has_the_right_marginals_and_the_cost_of_scipy():
    n, m = 9, 14
    index_x, index_y, mass = _quantile_pairs(n, m, torch.device("cpu"))
    assert len(mass) <= n + m - 1
    # Sums of at most 14 float64 fractions.
    torch.testing.assert_close(torch.bincount(index_x, mass, n), torch.full((n,), 1 / n, dtype=torch.float64))
    torch.testing.assert_close(torch.bincount(index_y, mass, m), torch.full((m,), 1 / m, dtype=torch.float64))
    x, y = np.sort(_cloud(n).numpy()), np.sort(_cloud(m, seed=1).numpy())
    cost = (np.abs(x[index_x] - y[index_y]) * mass.numpy()).sum()
    assert cost == pytest.approx(wasserstein_distance(x, y), rel=1e-12)


@pytest.mark.parametrize("m", [6, 9])
def test_gradient_agrees_with_finite_differences(m):
    x, y = _cloud(6, 3).requires_grad_(), _cloud(m, 3, seed=1).requires_grad_()
    directions = random_directions(5, 3, dtype=torch.float64)
    # Piecewise quadratic, and no two of the random points swap within the step of 1e-6.
    assert torch.autograd.gradcheck(lambda a, b: sliced_wasserstein(a, b, projections=directions), (x, y))


def test_value_and_gradient_do_not_depend_on_the_order():
    x, y, order = _cloud(12, 4), _cloud(17, 4, seed=1), torch.randperm(12)
    directions = random_directions(8, 4, dtype=torch.float64)
    gradients = []
    for cloud in (x, x[order]):
        leaf = cloud.clone().requires_grad_()
        sliced_wasserstein(leaf, y, projections=directions).backward()
        gradients.append(leaf.grad)
    # Sums in a different order, in float64.
    torch.testing.assert_close(gradients[1], gradients[0][order], rtol=1e-10, atol=1e-14)


def test_gradient_descent_moves_one_cloud_onto_the_other():
    x, y = _cloud(30, 2).requires_grad_(), _cloud(30, 2, seed=1) + 4
    generator = torch.Generator().manual_seed(0)
    before = sliced_wasserstein(x, y, generator=generator).item()
    for _ in range(100):
        loss = sliced_wasserstein(x, y, num_projections=32, generator=generator)
        # N·D·∇ is a full step on average over the directions.
        x = (x - 30 * 2 * torch.autograd.grad(loss, x)[0]).detach().requires_grad_()
    # Gradient descent contracts; the error left by the random directions is far below 1/1000 of the start.
    assert sliced_wasserstein(x, y, generator=generator).item() < 1e-3 * before


def test_same_generator_gives_the_same_value_and_leaves_global_state_alone():
    x, y, state = _cloud(9, 3), _cloud(9, 3, seed=1), torch.get_rng_state()
    values = [sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(4)).item() for _ in range(2)]
    assert values[0] == values[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_input_under_autocast_is_computed_in_float32():
    x, y = _cloud(64, 5).bfloat16(), _cloud(64, 5, seed=1).bfloat16()
    directions = random_directions(16, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sliced_wasserstein(x, y, projections=directions)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, sliced_wasserstein(x.float(), y.float(), projections=directions), rtol=0, atol=0)


def test_no_matrix_of_all_pairs_is_made():
    """60,000 × 50,000 float32 pairs would need 12 GB; the projections need 4 MB."""
    x, y = torch.randn(60_000, 2), torch.randn(50_000, 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        sliced_wasserstein(x, y, num_projections=8)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 20 * 8 * 110_000 * 4  # a few copies of the projected clouds


def test_directions_are_unit_vectors_and_blocks_are_bases():
    directions = random_directions(7, 3, orthogonal=True, dtype=torch.float64)
    # Float64 rounding of one QR step.
    torch.testing.assert_close(directions[:3] @ directions[:3].T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(7, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("per_position", [False, True])
def test_brighter_images_cost_half_the_square_of_the_shift(per_position):
    """A shift of every pixel by c moves each patch by (c, …, c): ‖m‖²/(2d) = c²/2 for any patch size."""
    images = _cloud(6, 2, 8, 8)
    value = patch_sliced_wasserstein(
        images,
        images + 0.3,
        num_projections=4000,
        per_position=per_position,
        generator=torch.Generator().manual_seed(0),
    )
    # 4,000 filters for each of two sizes: relative error √2/√8000 = 1.6%; tolerance: four times that.
    assert value.item() == pytest.approx(0.3**2 / 2, rel=0.064)


def test_patches_of_the_whole_image_are_the_plain_distance():
    x, y = _cloud(10, 1, 4, 4), _cloud(15, 1, 4, 4, seed=1)
    seeded = [torch.Generator().manual_seed(2) for _ in range(2)]
    patches = patch_sliced_wasserstein(x, y, patch_sizes=(4,), num_projections=6, generator=seeded[0])
    plain = sliced_wasserstein(x.flatten(1), y.flatten(1), num_projections=6, generator=seeded[1])
    # The convolution sums 16 products in a different order.
    assert patches.item() == pytest.approx(plain.item(), rel=1e-10)


def test_only_positions_tell_a_moved_pattern_apart():
    """A dot in the upper or the lower half of an image gives the same patches at different positions."""
    upper, lower = torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)
    upper[:, :, 2, 3], lower[:, :, 5, 3] = 1, 1
    pooled, located = (
        patch_sliced_wasserstein(upper, lower, patch_sizes=(3,), stride=1, per_position=flag) for flag in (False, True)
    )
    # The convolution of equal patches agrees to float32 precision: squares of 1e-7.
    assert pooled.item() == pytest.approx(0, abs=1e-12)
    assert located.item() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3, 1)), "`x`"),
        ((torch.zeros(3, 2), torch.zeros(3, 1)), "`y`"),
        ((torch.zeros(3, 2), torch.zeros(0, 2)), "`y`"),
    ],
)
def test_bad_clouds_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        sliced_wasserstein(*arguments)


def test_bad_directions_and_patches_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(InputError, match="num_projections"):
        sliced_wasserstein(x, x, num_projections=0)
    with pytest.raises(InputError, match="projections"):
        sliced_wasserstein(x, x, projections=torch.ones(4, 2))
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(InputError, match="patch_sizes"):
        patch_sliced_wasserstein(images, images, patch_sizes=(5,))
    with pytest.raises(InputError, match="reference"):
        patch_sliced_wasserstein(images, images[..., :3])
