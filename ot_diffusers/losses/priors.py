"""Losses of the learned priors: the evidence bound, the adversarial losses, and transport without a discriminator.

All are functions of tensors, independent of the networks in training. The transport losses compare generated with real
images, both diffused to step T', by one or more of

    pixel      sliced Wasserstein on whole images, the original study's loss
    patch      sliced Wasserstein on patches of several widths, for fine structure
    feature    sliced Wasserstein between features of a frozen network
    sinkhorn   Sinkhorn divergence between such features, with two independent generated batches in the self-term

With classes, the first two are compared in each class, and the others by the joint law of features and label.

The features are those of a frozen network at several depths: the denoiser at step T', which was trained without labels
on images of this noise level, or a feature network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from ..models.denoiser_extractor import contracting_maps, pooled
from ..models.feature_extractor import ConvFeatureExtractor, FeatureExtractor, ResidualBlock, ResidualFeatureExtractor
from ..transport import sinkhorn_divergence
from ..transport.sliced import patch_sliced_wasserstein, sliced_wasserstein

CLASS_DISTANCE = 10.0
"""Distance between classes in the joint law, where the median distance of real images is 1."""


# --- VAE --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvidenceBound:
    """Negative evidence lower bound per pixel, in nats: `loss` = `reconstruction` + β · `divergence`; 0-d tensors."""

    loss: Tensor
    reconstruction: Tensor
    divergence: Tensor


def evidence_bound(
    images: Tensor, reconstructed: Tensor, mean: Tensor, log_variance: Tensor, *, beta: float = 1.0
) -> EvidenceBound:
    """Negative evidence lower bound of a VAE whose Gaussian decoder has one variance, the optimal one for this batch.

        ½ (1 + log 2π s²) + β KL(q(z | x) ‖ N(0, I)) / D,   s² = mean squared error

    The optimal variance balances the two terms, so that β = 1 suits any data.

    Args:
        images: images to reconstruct, [B, …], with D numbers each.
        reconstructed: reconstructions of the decoder, of the same shape.
        mean, log_variance: parameters of the posterior q(z | x), [B, latent_dim].
        beta: weight of the divergence, ≥ 0.

    Reference: [Kingma2014] for the divergence; [Rybkin2021] for the variance.

    Example:
        >>> x = torch.zeros(2, 1, 4, 4)
        >>> terms = evidence_bound(x, x + 1, torch.zeros(2, 3), torch.zeros(2, 3))
        >>> round(terms.loss.item(), 4), terms.divergence.item()  # ½ (1 + log 2π), posterior = prior
        (1.4189, 0.0)
    """
    variance = F.mse_loss(reconstructed.float(), images.float()).clamp(min=1e-8)
    reconstruction = (1 + (2 * math.pi * variance).log()) / 2
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2
    divergence = divergence / images[0].numel()
    return EvidenceBound(reconstruction + beta * divergence, reconstruction, divergence)


# --- GAN --------------------------------------------------------------------------------------------------------------


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss −E log D(G(z)) of logits [B].

    Reference: [Goodfellow2014].
    """
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−E log D(x) − E log(1 − D(G(z))) of logits [B]; 2 log 2 if D cannot tell real from generated images.

    Reference: [Goodfellow2014].
    """
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def gradient_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """½ E ‖∇_x D(x)‖² at real images that require gradients: R1 with weight 1. Its gradient flows to D.

    Each logit must depend on its own image only.

    Reference: [Mescheder2018].

    Example:
        >>> x = torch.ones(5, 3, requires_grad=True)
        >>> gradient_penalty(x @ torch.tensor([1.0, 2.0, 2.0]), x).item()  # ½ (1 + 4 + 4)
        4.5
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1).mean() / 2


# --- Optimal transport ------------------------------------------------------------------------------------------------


def pixel_transport(images: Tensor, reference: Tensor, *, num_projections: int, generator: torch.Generator) -> Tensor:
    """Sliced Wasserstein between whole images [N, C, H, W] and [M, C, H, W], as a squared length per pixel."""
    x, y = images.flatten(1), reference.flatten(1)
    return sliced_wasserstein(x, y, num_projections=num_projections, generator=generator)


def patch_transport(
    images: Tensor,
    reference: Tensor,
    *,
    patch_sizes: Sequence[int],
    patch_stride: int | None = None,
    num_projections: int,
    generator: torch.Generator,
) -> Tensor:
    """Sliced Wasserstein between patches at each position, averaged over widths, in the unit of `pixel_transport`.

    With a `patch_stride`, only the positions on a grid are compared. The grid starts at a random pixel, so that many
    calls cover all positions at a fraction of the cost.
    """
    side = min(images.shape[2:])
    sizes = tuple(size for size in patch_sizes if size <= side)
    require(bool(sizes), "patch_sizes", f"hold a width up to {side}", tuple(patch_sizes))
    if patch_stride is not None:
        starts = min(patch_stride, side - max(sizes) + 1)  # the widest patch always fits
        top, left = torch.randint(starts, (2,), generator=generator, device=generator.device).tolist()
        images, reference = images[..., top:, left:], reference[..., top:, left:]
    return patch_sliced_wasserstein(
        images,
        reference,
        patch_sizes=sizes,
        stride=patch_stride,
        per_position=True,
        num_projections=num_projections,
        generator=generator,
    )


def feature_transport(
    features: Sequence[Tensor], reference: Sequence[Tensor], *, num_projections: int, generator: torch.Generator
) -> Tensor:
    """Sliced Wasserstein between features, multiplied by their width D at each level, and averaged over levels."""
    terms = [
        x.shape[1] * sliced_wasserstein(x, y, num_projections=num_projections, generator=generator)
        for x, y in zip(features, reference, strict=True)
    ]
    return torch.stack(terms).mean()


def sinkhorn_transport(
    features: Sequence[Tensor], reference: Sequence[Tensor], pair: Sequence[Tensor], *, blur: float, scaling: float
) -> Tensor:
    """Sinkhorn divergence between features at each level, averaged over levels, without the constant of the references.

    Args:
        features: features of generated images, one [N, D] for each level; gradient flows.
        reference: features of real images, [M, D] each.
        pair: features of other generated images, independent of the first, [K, D] each; no gradient.
        blur: length in the units of the features.
        scaling: ratio of successive blurs during annealing.

    Reference: [Feydy2019], with an independent second sample in the self-term.
    """
    terms = [
        sinkhorn_divergence(x, y, blur=blur, scaling=scaling, x_pair=x_pair, y_self_cost=0.0)
        for x, y, x_pair in zip(features, reference, pair, strict=True)
    ]
    return torch.stack(terms).mean()


def with_labels(levels: Sequence[Tensor], class_labels: Tensor | None) -> tuple[Tensor, ...]:
    """Levels of (image, label) pairs, `CLASS_DISTANCE` apart between classes: [N, D + C] each, of levels [N, D] and
    labels [N], where C − 1 is the largest label. Without labels, the levels themselves."""
    if class_labels is None:
        return tuple(levels)
    one_hot = F.one_hot(class_labels) * (CLASS_DISTANCE / 2**0.5)
    return tuple(torch.cat([level, one_hot.to(level)], dim=1) for level in levels)


def within_classes(
    transport: Callable[..., Tensor], images: Tensor, reference: Tensor, class_labels: Tensor | None, **options: Any
) -> Tensor:
    """A transport term in each class, averaged by the shares of the classes; 0-d.

    Args:
        transport: function of images and references, such as `patch_transport`.
        images, reference: [N, C, H, W] both, of the same classes row by row.
        class_labels: int64 [N]; None for one term over all images.
        options: further arguments of `transport`.
    """
    if class_labels is None:
        return transport(images, reference, **options)
    total = images.new_zeros(())
    for label in class_labels.unique():
        rows = class_labels == label
        total = total + rows.float().mean() * transport(images[rows], reference[rows], **options)
    return total


def frechet_transport(x: Tensor, y: Tensor, *, x_pair: Tensor | None = None) -> Tensor:
    """Fréchet distance of two clouds: the squared Wasserstein distance of their Gaussian fits; 0-d, gradient for x.

        ‖μ − ν‖² + tr Σ + tr Γ − 2 tr (Γ^½ Σ Γ^½)^½

    The last trace is the sum of the roots of eigenvalues, whose gradient holds no differences of eigenvalues. Those of
    a singular covariance, which are rounding errors, are left out. In float64.

    Args:
        x: [N, D], N ≥ 2; the gradient flows through their mean μ and covariance Σ.
        y: [M, D], M ≥ 2, references with mean ν and covariance Γ.
        x_pair: [K, D], a second sample from the distribution of x. μ and Σ are those of both, which lessens the bias;
            x counts in the gradient for both.

    Reference: [Heusel2017] for the distance; [Yang2026] for the loss.

    Example:
        >>> x = torch.randn(50, 3)
        >>> round(frechet_transport(x + 2, x).item(), 4)  # ‖(2, 2, 2)‖²
        12.0
    """
    generated = x.double()
    if x_pair is not None:
        share = 1 + len(x_pair) / len(x)
        counted = share * generated - (share - 1) * generated.detach()
        generated = torch.cat([counted, x_pair.detach().double()])
    with torch.autocast(device_type=x.device.type, enabled=False):
        (mean, covariance), (real_mean, real_covariance) = _moments(generated), _moments(y.double())
        spread, directions = torch.linalg.eigh(real_covariance)
        root = directions * spread.clamp(min=0).sqrt()
        shared = torch.linalg.eigvalsh(root.mT @ covariance @ root)
        rounding = len(shared) * torch.finfo(shared.dtype).eps * shared.detach().max()
        overlap = shared[shared > rounding].sqrt().sum()
        trace = covariance.trace() + real_covariance.trace() - 2 * overlap
        return ((mean - real_mean).square().sum() + trace).to(x.dtype)


def _moments(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of points [N, D]."""
    mean = points.mean(dim=0)
    centred = points - mean
    return mean, centred.mT @ centred / (len(points) - 1)


def denoiser_features(unet: Any, images: Tensor, timestep: int) -> tuple[Tensor, ...]:
    """Features of x_t from the contracting half of a frozen denoiser, one [B, D] per level, float32.

    Maps are averaged to at most 4 × 4 positions. The gradient flows to the images.

    Args:
        unet: a `UNet2DModel`, without classes or with a null label, which is its last.
        images: x_t, [B, C, H, W].
        timestep: t, one of the timesteps that the denoiser was trained on.
    """
    with torch.autocast(device_type=images.device.type, enabled=False):
        return tuple(pooled(level) for level in contracting_maps(unet, images.float(), timestep))


def network_features(network: FeatureExtractor, images: Tensor) -> tuple[Tensor, ...]:
    """Features of images from several depths of a frozen feature network, one [B, D] per level, float32.

    The levels are its pooled maps or residual blocks, averaged to at most 4 × 4 positions, and its penultimate layer.
    Any other network, such as a backbone, has one level, its features. Values outside [-1, 1], which noise causes, are
    not clamped. The gradient flows to the images.

    Args:
        network: a feature network for images of this shape.
        images: [B, C, H, W], nominally in [-1, 1].
    """
    with torch.autocast(device_type=images.device.type, enabled=False):
        hidden = images.float() / 2 + 0.5
        if not isinstance(network, ConvFeatureExtractor | ResidualFeatureExtractor):
            return (network(hidden, return_dict=False)[0],)
        levels = []
        for layer in network.backbone.children():
            hidden = layer(hidden)
            if isinstance(layer, (nn.MaxPool2d, ResidualBlock)):
                levels.append(pooled(hidden))
        return (*levels, hidden)
