"""The losses of the learned priors: evidence bound, adversarial game, and transport without an adversary.

All are functions of tensors and know nothing of networks in training. Transport compares what a generator made with
real images, both diffused to step T', by one or several of

    pixel      sliced Wasserstein on whole images, the original study's loss
    patch      sliced Wasserstein on patches of several widths: fine structure
    feature    sliced Wasserstein between features of a frozen network
    sinkhorn   Sinkhorn divergence between such features, its self-term between two independent generated batches

The features are those of a frozen network at several depths: the denoiser at step T', which has seen images of just
this noise level and no labels, or a feature network of the losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from ..models.feature_extractor import FeatureExtractor, ResidualBlock
from ..transport import sinkhorn_divergence
from ..transport.sliced import patch_sliced_wasserstein, sliced_wasserstein

POOLED_SIZE = 4
"""Feature maps are averaged down to this many rows and columns: they keep where things are, in few numbers."""


# --- VAE --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvidenceBound:
    """Negative evidence bound per pixel, in nats: `loss` = `reconstruction` + β · `divergence`; 0-d tensors."""

    loss: Tensor
    reconstruction: Tensor
    divergence: Tensor


def evidence_bound(
    images: Tensor, reconstructed: Tensor, mean: Tensor, log_variance: Tensor, *, beta: float = 1.0
) -> EvidenceBound:
    """Negative evidence bound of a VAE whose decoder is Gaussian with one variance, the best for this batch.

        ½ (1 + log 2π s²) + β KL(q(z | x) ‖ N(0, I)) / D,   s² = mean squared error

    The best variance weighs the two terms against each other, so β = 1 suits any data.

    Args:
        images: what the decoder should give back, [B, …], D numbers each.
        reconstructed: what it gives, of the same shape.
        mean, log_variance: of the posterior q(z | x), [B, latent_dim].
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
    """−E log D(x) − E log(1 − D(G(z))) of logits [B]; 2 log 2 where nothing can be told apart.

    Reference: [Goodfellow2014].
    """
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def gradient_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """½ E ‖∇_x D(x)‖² at real images that require gradients: R1 for weight 1. Its gradient flows to D.

    Each logit may depend on its own image only.

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
    """Sliced Wasserstein between whole images [N, C, H, W] and [M, C, H, W]: a squared length per pixel."""
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

    With a `patch_stride` only the positions of a grid are compared, which begins at a random pixel: over many calls all
    of them, for a part of the sorts.
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
    """Sliced Wasserstein between features, each level [N, D] times its D, averaged over levels."""
    terms = [
        x.shape[1] * sliced_wasserstein(x, y, num_projections=num_projections, generator=generator)
        for x, y in zip(features, reference, strict=True)
    ]
    return torch.stack(terms).mean()


def sinkhorn_transport(
    features: Sequence[Tensor], reference: Sequence[Tensor], pair: Sequence[Tensor], *, blur: float, scaling: float
) -> Tensor:
    """Sinkhorn divergence between features at each level, averaged over levels; no constant of the reference.

    Args:
        features: of generated images, one [N, D] for each level; gradient flows.
        reference: of real images, [M, D] each.
        pair: of other generated images, independent of the first, [K, D] each; no gradient.
        blur: length in the units of the features.
        scaling: ratio of successive blurs of the solver.

    Reference: [Feydy2019], with an independent second sample in the self-term.
    """
    terms = [
        sinkhorn_divergence(x, y, blur=blur, scaling=scaling, x_pair=x_pair, y_self_cost=0.0)
        for x, y, x_pair in zip(features, reference, pair, strict=True)
    ]
    return torch.stack(terms).mean()


def denoiser_features(unet: Any, images: Tensor, timestep: int) -> tuple[Tensor, ...]:
    """What the contracting half of a frozen denoiser makes of x_t, level by level: [B, D] each, float32.

    Maps are averaged to at most 4 × 4 positions. The gradient flows to the images.

    Args:
        unet: a `UNet2DModel` without class conditioning.
        images: x_t, [B, C, H, W].
        timestep: t, where the denoiser has been trained.
    """
    with torch.autocast(device_type=images.device.type, enabled=False):
        hidden = unet.conv_in(images.float())
        steps = torch.full((len(images),), timestep, device=images.device)
        embedding = unet.time_embedding(unet.time_proj(steps).to(hidden.dtype))
        levels = []
        for block in unet.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=embedding)
            levels.append(hidden)
        levels.append(unet.mid_block(hidden, embedding))
        return tuple(_pooled(level) for level in levels)


def network_features(network: FeatureExtractor, images: Tensor) -> tuple[Tensor, ...]:
    """What a frozen feature network makes of images in [-1, 1], level by level: [B, D] each, float32.

    The levels are its pooled maps or residual blocks, averaged to at most 4 × 4 positions, and its penultimate layer.
    Values outside [-1, 1], which noise makes, are passed on. The gradient flows to the images.

    Args:
        network: a feature network for such images.
        images: [B, C, H, W].
    """
    with torch.autocast(device_type=images.device.type, enabled=False):
        hidden = images.float() / 2 + 0.5
        levels = []
        for layer in network.backbone.children():
            hidden = layer(hidden)
            if isinstance(layer, (nn.MaxPool2d, ResidualBlock)):
                levels.append(_pooled(hidden))
        return (*levels, hidden)


def _pooled(feature_map: Tensor) -> Tensor:
    height, width = feature_map.shape[2:]
    return F.adaptive_avg_pool2d(feature_map, (min(POOLED_SIZE, height), min(POOLED_SIZE, width))).flatten(1)
