"""Batches at step T' and the objectives of the learned priors: VAE, GAN and OT.

Every loss that compares distributions is one problem over all processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from ..config import PriorConfig
from ..data import evenly_spaced
from ..features import check_trained_on, load_feature_extractor
from ..losses.priors import (
    denoiser_features,
    discriminator_loss,
    evidence_bound,
    feature_transport,
    generator_loss,
    gradient_penalty,
    network_features,
    patch_transport,
    pixel_transport,
    sinkhorn_transport,
)
from ..models.prior import GaussianPrior, PriorGenerator
from ..models.prior_networks import PriorEncoder
from ..schedules import Scheduler, alpha_sigma, truncated_samples
from ..seeds import folded, key, keyed_generator
from ..transport import median_distance
from .batches import Images, Schedule, image_batches
from .checkpoints import TrainingState
from .processes import gather_rows
from .records import Record

MAX_FITTED_IMAGES = 50_000
"""Greatest number of evenly spaced images that a closed form is fitted to; they are held as float32."""


# --- Batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PriorBatch:
    """A process' rows of a global batch, and all the noise that generated images are made of.

    Attributes:
        clean: real images, [B, C, H, W].
        real: the same diffused to T', [B, C, H, W].
        reference: other real x_T' to compare with, [M, C, H, W]; `real` itself where a prior needs no others.
        num_references: number of gathered references and pairs that count.
        latents, noise: of the generated images, [B, latent_dim] and [B, C, H, W].
        pair_latents, pair_noise: of an independent second draw, [M, latent_dim] and [M, C, H, W].
        alpha, sigma: noise level of T', scalars.
        update: number of the update, from 0.
    """

    clean: Tensor
    real: Tensor
    reference: Tensor
    num_references: int
    latents: Tensor
    noise: Tensor
    pair_latents: Tensor
    pair_noise: Tensor
    alpha: Tensor
    sigma: Tensor
    update: int


def prior_batches(
    images: Images, scheduler: Scheduler, config: PriorConfig, schedule: Schedule, accelerator: Accelerator, start: int
) -> Iterator[PriorBatch]:
    """Batches from update `start` on. Every draw is a function of (seed, update); each process takes its rows."""
    alpha, sigma = (level.to(accelerator.device) for level in alpha_sigma(scheduler, config.truncation_timestep - 1))
    for update, indices, part, clean in image_batches(images, config, schedule, accelerator, start):
        epoch = schedule.epoch(update)
        real = truncated_samples(clean, indices[part], scheduler, epoch=epoch, seed=config.seed)
        latents, noise = draw_latents(len(indices), clean, config, "generated", update)
        if config.num_reference_samples is None:
            reference, num_references, pair_rows = real, schedule.forward_batch_size, torch.arange(len(indices))[part]
            pair_latents, pair_noise = draw_latents(len(indices), clean, config, "pair", update)
        else:
            # All processes hold the same number: references repeat after the last, and repeated ones are cut off.
            num_references = config.num_reference_samples
            share = math.ceil(num_references / accelerator.num_processes)
            pair_rows = (torch.arange(share) + share * accelerator.process_index) % num_references
            order = torch.randperm(len(images), generator=keyed_generator("cpu", config.seed, "references", update))
            rows = order[pair_rows % len(images)]
            others = images.fetch(rows).to(accelerator.device)
            reference = truncated_samples(others, rows, scheduler, epoch=update, seed=key(config.seed, "references"))
            pair_latents, pair_noise = draw_latents(num_references, clean, config, "pair", update)
        yield PriorBatch(
            clean=clean,
            real=real,
            reference=reference,
            latents=latents[part],
            noise=noise[part],
            num_references=num_references,
            pair_latents=pair_latents[pair_rows],
            pair_noise=pair_noise[pair_rows],
            alpha=alpha,
            sigma=sigma,
            update=update,
        )


def draw_latents(count: int, images: Tensor, config: PriorConfig, use: str, update: int) -> tuple[Tensor, Tensor]:
    """Latents [count, latent_dim] and noise [count, C, H, W] of a whole update, on the device of `images`."""
    source = keyed_generator(images.device, config.seed, use, update)
    latents = torch.randn((count, config.latent_dim), generator=source, device=images.device)
    return latents, torch.randn((count, *images.shape[1:]), generator=source, device=images.device)


def diffused(images: Tensor, noise: Tensor, batch: PriorBatch, config: PriorConfig) -> Tensor:
    """x_T' from the output of the generator, with the given noise."""
    return images if config.prediction_type == "noisy_sample" else batch.alpha * images + batch.sigma * noise


# --- Objectives -------------------------------------------------------------------------------------------------------


class VariationalPrior(nn.Module):
    """Encoder and generator under one optimizer: images and noise to (reconstruction, mean, log-variance)."""

    def __init__(self, generator: PriorGenerator, encoder: PriorEncoder) -> None:
        super().__init__()
        self.generator, self.encoder = generator, encoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions of images [B, C, H, W], and mean and log-variance of their codes, [B, D]."""
        mean, log_variance = self.encoder(images, return_dict=False)
        latents = mean + (log_variance / 2).exp() * noise
        return self.generator(latents).sample, mean, log_variance


def vae_terms(
    batch: PriorBatch, state: TrainingState, config: PriorConfig, accelerator: Accelerator, record: Record
) -> dict[str, Tensor]:
    """The two terms of the evidence bound, over the batch of all processes."""
    target = batch.clean if config.prediction_type == "sample" else batch.real
    reconstructed, mean, log_variance = state.model(target, batch.latents)
    record.compare_spread(reconstructed, target)
    gathered = (gather_rows(rows, accelerator) for rows in (target, reconstructed, mean, log_variance))
    bound = evidence_bound(*gathered, beta=config.beta)
    return {"reconstruction": bound.reconstruction, "divergence": config.beta * bound.divergence}


@torch.no_grad()
def with_fitted_latents(
    model: VariationalPrior, images: Images, scheduler: Scheduler, config: PriorConfig
) -> PriorGenerator:
    """The generator of a trained VAE with the mixture of Gaussians that fits the codes of its data best.

    The codes are not distributed as N(0, I), which the evidence bound only favours, so the generator was not trained on
    latents from N(0, I). The mixture is fitted after training, to one code of each of at most `MAX_FITTED_IMAGES`
    images.

    Reference: [Ghosh2020].
    """
    generator, device = model.generator, model.generator.device
    source = keyed_generator(device, config.seed, "codes")
    codes = []
    for rows in evenly_spaced(images, MAX_FITTED_IMAGES).split(1024):
        target = images.fetch(rows)
        if config.prediction_type == "noisy_sample":
            target = truncated_samples(target, rows, scheduler, seed=config.seed)
        codes.append(model.encoder(target.to(device)).sample(source))
    components = min(config.latent_components, sum(map(len, codes)))
    mixture = GaussianMixture(components, random_state=folded(config.seed, 32)).fit(
        torch.cat(codes).double().cpu().numpy()
    )
    return generator.with_latents(
        *(torch.from_numpy(values) for values in (mixture.weights_, mixture.means_, mixture.covariances_))
    )


def generated(batch: PriorBatch, state: TrainingState, config: PriorConfig, record: Record) -> Tensor:
    """x_T' from the batch's latents, [B, C, H, W]."""
    made = state.model(batch.latents).sample
    record.compare_spread(made, batch.clean if config.prediction_type == "sample" else batch.real)
    return diffused(made, batch.noise, batch, config)


def discriminator_update(
    batch: PriorBatch, state: TrainingState, discriminator: TrainingState, config: PriorConfig, accelerator: Accelerator
) -> Tensor:
    """One update of the discriminator, with R1 in every `r1_interval`-th; returns its loss without the penalty."""
    with torch.no_grad():
        fake = diffused(state.model(batch.pair_latents).sample, batch.pair_noise, batch, config)
    penalised = config.r1_weight > 0 and batch.update % config.r1_interval == 0
    real = batch.real.clone().requires_grad_(penalised)
    discriminator.model.requires_grad_(True)
    real_logits, fake_logits = discriminator.model(torch.cat([real, fake])).chunk(2)
    loss = discriminator_loss(real_logits, fake_logits)
    penalty = config.r1_weight * config.r1_interval * gradient_penalty(real_logits, real) if penalised else 0.0
    discriminator.backward(accelerator, loss + penalty, config.max_grad_norm)
    return loss


def adversarial_loss(
    batch: PriorBatch,
    state: TrainingState,
    discriminator: TrainingState,
    config: PriorConfig,
    accelerator: Accelerator,
    record: Record,
) -> Tensor:
    """The loss of the generator; the discriminator receives no gradient."""
    network = accelerator.unwrap_model(discriminator.model, keep_torch_compile=False).requires_grad_(False)
    return generator_loss(network(generated(batch, state, config, record)))


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of x_T' at several depths of a frozen network, each in units of its median distance between real images.

    Attributes:
        extract: images [B, C, H, W] to levels, [B, D] each.
        scales: one for each level.
        network: that of the features; None for the denoiser.
    """

    extract: Callable[[Tensor], tuple[Tensor, ...]]
    scales: tuple[float, ...]
    network: nn.Module | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of images [B, C, H, W], [B, D] for each level."""
        return tuple(level / scale for level, scale in zip(self.extract(images), self.scales, strict=True))


def needs_features(config: PriorConfig) -> bool:
    """Whether the objective compares images in features of the denoiser."""
    return config.prior == "ot" and bool({"feature", "sinkhorn"} & set(config.ot_objective.split("+")))


@torch.no_grad()
def frozen_features(config: PriorConfig, images: Images, unet: Any, scheduler: Scheduler) -> FrozenFeatures:
    """The features of the configured network, or of the denoiser at step T'; scales from at most 1,000 real images."""
    extract: Callable[[Tensor], tuple[Tensor, ...]]
    network = None
    if config.feature_extractor is None:
        extract = functools.partial(denoiser_features, unet, timestep=config.truncation_timestep - 1)
    else:
        network = load_feature_extractor(config.feature_extractor).to(unet.device)
        check_trained_on(network, images)
        extract = functools.partial(network_features, network)
    rows = evenly_spaced(images, 1000)
    real = truncated_samples(images.fetch(rows), rows, scheduler, seed=config.seed)
    return FrozenFeatures(extract, tuple(median_distance(level) for level in extract(real.to(unet.device))), network)


def gaussian_map(config: PriorConfig, images: Images, device: torch.device) -> GaussianPrior:
    """The Gaussian with the moments of the data in as many directions as there are latents: μ + Fᵀz is the optimal
    transport map from N(0, I) to it."""
    rows = evenly_spaced(images, MAX_FITTED_IMAGES)
    rank = min(config.latent_dim, len(rows) - 1, math.prod(images.image_shape))
    return GaussianPrior.from_images(images.fetch(rows), config.truncation_timestep, rank=rank).to(device)


def warm_start_terms(
    batch: PriorBatch, state: TrainingState, gaussian: GaussianPrior, record: Record
) -> dict[str, Tensor]:
    """Squared distance to the images of the same latents under the closed-form map."""
    made = state.model(batch.latents).sample
    record.compare_spread(made, batch.clean)
    target = gaussian.mean[0] + batch.latents[:, : gaussian.config.rank] @ gaussian.factor[0]
    return {"warm_start": torch.nn.functional.mse_loss(made.float(), target.clamp(-1, 1).view_as(made))}


def transport_terms(
    batch: PriorBatch,
    state: TrainingState,
    features: FrozenFeatures | None,
    config: PriorConfig,
    accelerator: Accelerator,
    record: Record,
) -> dict[str, Tensor]:
    """The weighted terms of `ot_objective` between generated and real x_T', each one problem over all processes."""
    names = config.ot_objective.split("+")
    fake = generated(batch, state, config, record)
    images, real = gather_rows(fake, accelerator), gather_rows(batch.real, accelerator)
    sliced: dict[str, Any] = {
        "num_projections": config.num_projections,
        "generator": keyed_generator(accelerator.device, config.seed, "directions", batch.update),
    }
    terms = {}
    if "pixel" in names:
        terms["pixel"] = pixel_transport(images, real, **sliced)
    if "patch" in names:
        terms["patch"] = patch_transport(
            images, real, patch_sizes=config.patch_sizes, patch_stride=config.patch_stride, **sliced
        )
    if features is None:
        return _weighted(terms, config)

    fake_features = [gather_rows(level, accelerator) for level in features(fake)]
    if "feature" in names:
        with torch.no_grad():
            expected = [gather_rows(level, accelerator) for level in features(batch.real)]
        terms["feature"] = feature_transport(fake_features, expected, **sliced)
    if "sinkhorn" in names:
        with torch.no_grad():
            other = diffused(state.model(batch.pair_latents).sample, batch.pair_noise, batch, config)
            pair, reference = (
                [gather_rows(level, accelerator)[: batch.num_references] for level in features(images)]
                for images in (other, batch.reference)
            )
        terms["sinkhorn"] = sinkhorn_transport(fake_features, reference, pair, blur=config.blur, scaling=config.scaling)
    return _weighted(terms, config)


def _weighted(terms: dict[str, Tensor], config: PriorConfig) -> dict[str, Tensor]:
    """The terms times `ot_weights`, which stand in the order of `ot_objective`."""
    if not config.ot_weights:
        return terms
    weights = dict(zip(config.ot_objective.split("+"), config.ot_weights, strict=True))
    return {name: weights[name] * term for name, term in terms.items()}
