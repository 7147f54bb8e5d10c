"""The losses of the priors, compared with closed forms."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from diffusers import UNet2DModel
from makers.draws import cloud
from makers.models import make_unet
from torch.distributions import Normal, kl_divergence

from ot_diffusers.errors import InputError
from ot_diffusers.evaluation import metrics
from ot_diffusers.losses.priors import (
    denoiser_features,
    discriminator_loss,
    evidence_bound,
    feature_transport,
    frechet_transport,
    generator_loss,
    gradient_penalty,
    network_features,
    patch_transport,
    pixel_transport,
    sinkhorn_transport,
    with_labels,
    within_classes,
)
from ot_diffusers.models.feature_extractor import ConvFeatureExtractor, ResidualFeatureExtractor


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(count: int, seed: int, size: int = 8) -> torch.Tensor:
    return torch.randn(count, 2, size, size, generator=_seeded(seed))


# --- VAE --------------------------------------------------------------------------------------------------------------


def test_evidence_bound_is_the_gaussian_likelihood_and_the_divergence_of_distributions():
    images, reconstructed = _images(6, 0), _images(6, 1)
    mean, log_variance = torch.randn(2, 6, 5, generator=_seeded(2))
    bound = evidence_bound(images, reconstructed, mean, log_variance, beta=0.7)
    scale = (images - reconstructed).square().mean().sqrt()
    expected = -Normal(reconstructed, scale).log_prob(images).mean()
    posterior = Normal(mean, (log_variance / 2).exp())
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean() / images[0].numel()
    # Rounding of float32 sums over a few hundred numbers.
    torch.testing.assert_close(bound.reconstruction, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(bound.divergence, divergence, rtol=1e-5, atol=0)
    torch.testing.assert_close(bound.loss, expected + 0.7 * divergence, rtol=1e-5, atol=0)


def test_the_variance_of_the_decoder_is_the_best_one():
    """No other fixed variance of the decoder gives a higher likelihood."""
    images, reconstructed = _images(6, 0), _images(6, 1)
    zero = torch.zeros(6, 3)
    best = evidence_bound(images, reconstructed, zero, zero).reconstruction
    scale = (images - reconstructed).square().mean().sqrt()
    for factor in (0.8, 1.25):
        assert best < -Normal(reconstructed, factor * scale).log_prob(images).mean()


def test_a_perfect_reconstruction_is_finite():
    zero = torch.zeros(2, 3)
    assert evidence_bound(zero, zero, zero, zero).loss.isfinite()


# --- GAN --------------------------------------------------------------------------------------------------------------


def test_adversarial_losses_at_indifference_and_certainty():
    """D = ½ costs 2 log 2 and log 2; the non-saturating loss has slope −1 where the discriminator is certain."""
    zero = torch.zeros(4)
    # Rounding of the float32 logarithm.
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert generator_loss(zero).item() == pytest.approx(math.log(2), rel=1e-6)
    assert discriminator_loss(zero + 40, zero - 40).item() < 1e-15
    logits = torch.full((4,), -40.0, requires_grad=True)
    generator_loss(logits).backward()
    torch.testing.assert_close(logits.grad, torch.full((4,), -1 / 4))


def test_gradient_penalty_of_a_linear_critic_is_half_its_squared_norm_and_trains_it():
    weight = torch.tensor([3.0, -4.0], requires_grad=True)
    images = torch.randn(5, 2, generator=_seeded(), requires_grad=True)
    penalty = gradient_penalty(images @ weight, images)
    assert penalty.item() == 12.5
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach())


# --- Transport --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transport",
    [
        lambda x, y: pixel_transport(x, y, num_projections=20_000, generator=_seeded()),
        lambda x, y: patch_transport(x, y, patch_sizes=(2, 4), num_projections=20_000, generator=_seeded()),
        lambda x, y: (
            feature_transport([x.flatten(1)], [y.flatten(1)], num_projections=20_000, generator=_seeded())
            / x[0].numel()
        ),
    ],
)
def test_a_shift_of_every_pixel_costs_half_its_square(transport):
    """½ E ⟨c·1, θ⟩² = c²/2 per pixel for directions uniform on the sphere."""
    images = _images(3, 0, size=4)
    # The mean of 20,000 squared projections with a relative variance below 2 has a standard error of 1%; tolerance: 5%.
    assert transport(images, images + 0.6).item() == pytest.approx(0.18, rel=0.05)


def test_transport_to_itself_is_free_and_its_minimum_is_stationary():
    images = _images(6, 0).requires_grad_()
    cost = pixel_transport(images, images.detach().flip(0), num_projections=16, generator=_seeded())
    # Projections of reordered rows may differ in the last bits.
    assert cost.item() < 1e-12
    assert torch.autograd.grad(cost, images)[0].abs().max() < 1e-8


def test_patches_wider_than_the_image_are_left_out():
    x, y = _images(4, 0), _images(4, 1)
    narrow, both = (
        patch_transport(x, y, patch_sizes=sizes, num_projections=8, generator=_seeded()) for sizes in ((3,), (3, 9))
    )
    assert torch.equal(narrow, both)
    with pytest.raises(InputError, match="patch_sizes"):
        patch_transport(x, y, patch_sizes=(9,), num_projections=8, generator=_seeded())


def test_a_stride_leaves_room_for_the_widest_patch():
    """With a single possible position the grid cannot move, and the distance is that between whole images."""
    x, y = _images(4, 0, size=4), _images(4, 1, size=4)
    options: dict = {"patch_sizes": (4,), "num_projections": 8}
    moved = [patch_transport(x, y, patch_stride=4, **options, generator=_seeded(seed)) for seed in range(20)]
    assert min(moved) > 0
    # With the same shift everywhere, every grid gives c² / 2 up to the sampling of directions (5% as above).
    shifted = patch_transport(x, x + 0.6, patch_sizes=(2,), patch_stride=3, num_projections=20_000, generator=_seeded())
    assert shifted.item() == pytest.approx(0.18, rel=0.05)


def test_the_independent_pair_takes_the_bias_out_of_the_sinkhorn_gradient():
    """Two samples of one distribution, with a blur below the spacing of the points: with an independent second batch,
    attraction by the references and repulsion by the self-term are equal in size and almost cancel."""
    x, y, pair = (torch.randn(200, 16, generator=_seeded(seed)) / 4 for seed in range(3))
    x.requires_grad_()
    options = {"blur": 0.3, "scaling": 0.7}
    (balanced,) = torch.autograd.grad(sinkhorn_transport([x], [y], [pair], **options), x)
    (self_paired,) = torch.autograd.grad(sinkhorn_transport([x], [y], [x.detach()], **options), x)
    along = (balanced * x).sum() / (x * x).sum()
    pulled = (self_paired * x).sum() / (x * x).sum()
    # For equal distributions the spread should not change; with the same batch in the self-term it shrinks.
    assert pulled > 0
    assert abs(along) < 0.2 * pulled


# --- Features ---------------------------------------------------------------------------------------------------------


def _unet() -> UNet2DModel:
    shape = {"sample_size": 16, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16)}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return make_unet(seed=0, **shape, **blocks)


def _whitened(count: int, dim: int, seed: int) -> torch.Tensor:
    """Points with mean 0 and covariance I to rounding."""
    points = cloud(count, dim, seed=seed)
    directions = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)[0]
    return directions * math.sqrt(count - 1)


def test_the_frechet_distance_of_aligned_gaussians_and_its_gradient_are_closed_forms():
    """‖m − n‖² + Σ (a_i − b_i)² for N(m, diag a²) and N(n, diag b²)."""
    m, a = (torch.tensor(values).double().requires_grad_() for values in ([1.0, 2.0, 0.5], [0.5, 1.0, 3.0]))
    n, b = (torch.tensor(values).double() for values in ([0.0, 2.5, 0.5], [1.0, 1.0, 2.0]))
    distance = frechet_transport(m + a * _whitened(40, 3, seed=0), n + b * _whitened(30, 3, seed=1))
    expected = (m - n).square().sum() + (a - b).square().sum()
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(torch.autograd.grad(distance, (m, a)), (2 * (m - n).detach(), 2 * (a - b).detach()))


@pytest.mark.parametrize("count", [5, 40])
def test_the_frechet_distance_and_its_gradient_are_right_for_singular_covariances_too(count):
    """5 points in 8 dimensions, against the metric, which takes another path, and against finite differences."""
    x, y = cloud(count, 8, shift=0.3).requires_grad_(), 2 * cloud(60, 8, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the metric warns of its bias
        expected = metrics.frechet_distance(x.detach(), y)
    # Roots of eigenvalues that are rounding errors are left out: √(8 · 2.2e-16) of the largest, at most.
    assert frechet_transport(x, y).item() == pytest.approx(expected, rel=1e-7)
    assert torch.autograd.gradcheck(lambda x: frechet_transport(x, y), x)


def test_a_held_pair_of_the_frechet_distance_counts_in_the_gradient():
    """With x itself as the pair, the gradient is that of x in both places."""
    x, y = cloud(6, 3), cloud(9, 3, seed=1)
    both, held = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole, halved = frechet_transport(torch.cat([both, both]), y), frechet_transport(held, y, x_pair=x)
    torch.testing.assert_close(halved, whole)
    torch.testing.assert_close(torch.autograd.grad(halved, held), torch.autograd.grad(whole, both))


def test_images_that_are_all_alike_have_a_finite_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(frechet_transport(x, cloud(9, 3).float()), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_denoiser_features_are_what_the_denoiser_itself_computes():
    unet, images = _unet(), _images(3, 0, size=16)
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for module in (*unet.down_blocks, unet.mid_block)
    ]
    with torch.no_grad():
        unet(images, 7)
        for hook in hooks:
            hook.remove()
        levels = denoiser_features(unet, images, 7)
    maps = [output[0] if isinstance(output, tuple) else output for output in seen]
    assert len(levels) == len(maps) == 3
    for level, expected in zip(levels, maps, strict=True):
        assert torch.equal(level, torch.nn.functional.adaptive_avg_pool2d(expected, 4).flatten(1))


def test_features_do_not_depend_on_the_batch_and_pass_gradients_to_the_images():
    unet, images = _unet().requires_grad_(False), _images(3, 0, size=16).requires_grad_()
    levels = denoiser_features(unet, images, 7)
    alone = denoiser_features(unet, images[:1], 7)
    for level, single in zip(levels, alone, strict=True):
        # Convolutions of different batch sizes round differently.
        torch.testing.assert_close(level[:1], single, rtol=1e-4, atol=1e-5)
    levels[-1].sum().backward()
    assert images.grad.abs().min() > 0


@pytest.mark.parametrize("network_class", [ConvFeatureExtractor, ResidualFeatureExtractor])
def test_network_features_end_in_the_penultimate_layer(network_class):
    torch.manual_seed(0)
    network = network_class(sample_size=8, in_channels=2, block_out_channels=(8, 16), feature_dim=12)
    images = _images(3, 0).clamp(-1, 1)
    levels = network_features(network, images)
    # Two stages of feature maps, computed by the same functions from the same input.
    assert len(levels) == 3
    assert torch.equal(levels[-1], network.extract(images))


# --- Classes ----------------------------------------------------------------------------------------------------------


def test_images_of_the_wrong_class_cost_what_they_lie_apart():
    """Two classes at −1 and 1 whose labels are exchanged: the images are those of the data, only the pairs are not."""
    labels = torch.arange(12) % 2
    real = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    wrong = real.flip(0).clone().requires_grad_()
    options = {"num_projections": 8, "generator": _seeded()}
    for transport in (pixel_transport, lambda *images, **own: patch_transport(*images, patch_sizes=(2,), **own)):
        assert within_classes(transport, wrong, real, None, **options).item() < 1e-10  # the rounding of projections
        assert within_classes(transport, real, real, labels, **options).item() < 1e-10
        wrong.grad = None
        within_classes(transport, wrong, real, labels, **options).backward()
        assert bool(((wrong - real) * wrong.grad).sum(dim=(1, 2, 3)).gt(0).all())  # every image is drawn to its class
    # ½ ‖2‖² / D of every pixel, on average over directions: here by a full basis of them.
    exact = {"num_projections": 16, "generator": _seeded()}
    found = [within_classes(pixel_transport, wrong, real, labels, **exact).item() for _ in range(200)]
    # ⟨θ, 1⟩² has mean 1 and a variance below 2: four standard errors of 3,200 directions are .1 of 2.
    assert sum(found) / 200 == pytest.approx(2, rel=0.1)


def test_joint_laws_compare_features_within_classes():
    """Clouds of equal shares: the divergence of the joint law is the mean of those in the classes, and other classes of
    the same points are seen."""
    labels = torch.tensor([0, 1, 1] * 8)
    x, y, pair = (torch.randn(24, 3, generator=_seeded(seed)) + labels[:, None] for seed in range(3))
    options = {"blur": 0.1, "scaling": 0.7}
    joint = sinkhorn_transport(*(with_labels([points], labels) for points in (x, y, pair)), **options)
    parts = [
        (labels == label).float().mean()
        * sinkhorn_transport(*([points[labels == label]] for points in (x, y, pair)), **options)
        for label in (0, 1)
    ]
    torch.testing.assert_close(joint, sum(parts), rtol=0.02, atol=0)  # two solutions of the annealed solver
    told = labels.flip(0)
    mixed = (with_labels([points], own) for points, own in ((x, told), (y, labels), (pair, told)))
    assert sinkhorn_transport(*mixed, **options) > 1.5 * joint
