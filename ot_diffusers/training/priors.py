"""Batches at step T' and the objectives of the learned priors: VAE, GAN and OT.

Every loss that compares distributions is one problem over all processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    with_labels,
    within_classes,
)
from ..models.prior import GaussianPrior, PriorGenerator, times_factor
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
        class_labels: of real and of generated images, int64 [B]; None for a prior without classes.
        pair_labels: of references and of the second draw, int64 [M], each class with its share of the whole batch.
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
    class_labels: Tensor | None = None
    pair_labels: Tensor | None = None


def prior_batches(
    images: Images,
    scheduler: Scheduler,
    config: PriorConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    start: int,
    labels: Tensor | None = None,
) -> Iterator[PriorBatch]:
    """Batches from update `start` on. Every draw is a function of (seed, update); each process takes its rows.

    With `labels`, those of the data set [N], images are generated in the classes of the real ones.
    """
    alpha, sigma = (level.to(accelerator.device) for level in alpha_sigma(scheduler, config.truncation_timestep - 1))
    for update, indices, part, clean in image_batches(images, config, schedule, accelerator, start):
        epoch = schedule.epoch(update)
        real = truncated_samples(clean, indices[part], scheduler, epoch=epoch, seed=config.seed)
        latents, noise = draw_latents(len(indices), clean, config, "generated", update)
        class_labels = pair_labels = None if labels is None else labels[indices[part]].to(accelerator.device)
        if config.num_reference_samples is None:
            reference, num_references, pair_rows = real, schedule.forward_batch_size, torch.arange(len(indices))[part]
            pair_latents, pair_noise = draw_latents(len(indices), clean, config, "pair", update)
        else:
            # All processes hold the same number: references repeat after the last, and repeated ones are cut off.
            num_references = config.num_reference_samples
            share = math.ceil(num_references / accelerator.num_processes)
            pair_rows = (torch.arange(share) + share * accelerator.process_index) % num_references
            order = torch.randperm(len(images), generator=keyed_generator("cpu", config.seed, "references", update))
            if labels is not None:
                first = part.start - part.start % schedule.forward_batch_size  # of this pass over all processes
                asked = labels[indices[first : first + schedule.forward_batch_size]]
                asked = asked.repeat(num_references // len(asked))
                order = order_of_classes(order, labels, asked)
                pair_labels = asked[pair_rows].to(accelerator.device)
            rows = order[pair_rows % len(order)]
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
            class_labels=class_labels,
            pair_labels=pair_labels,
        )


def order_of_classes(order: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Rows of the classes `asked`, int64 [M], in the given order of all rows [N], whose classes are `labels`; a row
    comes again only after all others of its class."""
    rows = torch.empty_like(asked)
    for label in asked.unique():
        own, places = order[labels[order] == label], (asked == label).nonzero()[:, 0]
        rows[places] = own[torch.arange(len(places)) % len(own)]
    return rows


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

    def forward(
        self, images: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions of images [B, C, H, W], and mean and log-variance of their codes, [B, D].

        With classes, int64 [B], encoder and generator are both told them.
        """
        mean, log_variance = self.encoder(images, return_dict=False, class_labels=class_labels)
        latents = mean + (log_variance / 2).exp() * noise
        return self.generator(latents, class_labels=class_labels).sample, mean, log_variance


def vae_terms(
    batch: PriorBatch, state: TrainingState, config: PriorConfig, accelerator: Accelerator, record: Record
) -> dict[str, Tensor]:
    """The two terms of the evidence bound, over the batch of all processes."""
    target = batch.clean if config.prediction_type == "sample" else batch.real
    reconstructed, mean, log_variance = state.model(target, batch.latents, batch.class_labels)
    record.compare_spread(reconstructed, target)
    gathered = (gather_rows(rows, accelerator) for rows in (target, reconstructed, mean, log_variance))
    bound = evidence_bound(*gathered, beta=config.beta)
    return {"reconstruction": bound.reconstruction, "divergence": config.beta * bound.divergence}


@torch.no_grad()
def with_fitted_latents(
    model: VariationalPrior, images: Images, scheduler: Scheduler, config: PriorConfig, labels: Tensor | None = None
) -> PriorGenerator:
    """The generator of a trained VAE with the mixture of Gaussians that fits the codes of its data best.

    The codes are not distributed as N(0, I), which the evidence bound only favours, so the generator was not trained on
    latents from N(0, I). The mixture is fitted after training, to one code of each of at most `MAX_FITTED_IMAGES`
    images. With `labels`, those of the data set [N], a mixture is fitted to the codes of each class, with an equal part
    of the Gaussians, at least one.

    Reference: [Ghosh2020].
    """
    generator, device = model.generator, model.generator.device
    source = keyed_generator(device, config.seed, "codes")
    groups = [evenly_spaced(images, MAX_FITTED_IMAGES)]
    if labels is not None:
        members = [(labels == label).nonzero()[:, 0] for label in range(generator.config.num_classes)]
        groups = [rows[evenly_spaced(rows, MAX_FITTED_IMAGES // len(members))] for rows in members]
    components = min(max(1, config.latent_components // len(groups)), *map(len, groups))
    fitted = []
    for group in groups:
        codes = []
        for rows in group.split(1024):
            target = images.fetch(rows)
            if config.prediction_type == "noisy_sample":
                target = truncated_samples(target, rows, scheduler, seed=config.seed)
            told = {} if labels is None else {"class_labels": labels[rows].to(device)}
            codes.append(model.encoder(target.to(device), **told).sample(source))
        mixture = GaussianMixture(components, random_state=folded(config.seed, 32))
        mixture.fit(torch.cat(codes).double().cpu().numpy())
        fitted.append((mixture.weights_, mixture.means_, mixture.covariances_))
    return generator.with_latents(*(torch.from_numpy(np.concatenate(values)) for values in zip(*fitted, strict=True)))


def generated(batch: PriorBatch, state: TrainingState, config: PriorConfig, record: Record) -> Tensor:
    """x_T' from the batch's latents, [B, C, H, W]."""
    made = state.model(batch.latents, class_labels=batch.class_labels).sample
    record.compare_spread(made, batch.clean if config.prediction_type == "sample" else batch.real)
    return diffused(made, batch.noise, batch, config)


def discriminator_update(
    batch: PriorBatch, state: TrainingState, discriminator: TrainingState, config: PriorConfig, accelerator: Accelerator
) -> Tensor:
    """One update of the discriminator, with R1 in every `r1_interval`-th; returns its loss without the penalty."""
    with torch.no_grad():
        made = state.model(batch.pair_latents, class_labels=batch.pair_labels).sample
        fake = diffused(made, batch.pair_noise, batch, config)
    penalised = config.r1_weight > 0 and batch.update % config.r1_interval == 0
    real = batch.real.clone().requires_grad_(penalised)
    discriminator.model.requires_grad_(True)
    told = None
    if batch.class_labels is not None and batch.pair_labels is not None:
        told = torch.cat([batch.class_labels, batch.pair_labels])
    real_logits, fake_logits = discriminator.model(torch.cat([real, fake]), told).chunk(2)
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
    return generator_loss(network(generated(batch, state, config, record), batch.class_labels))


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


def gaussian_map(
    config: PriorConfig, images: Images, device: torch.device, labels: Tensor | None = None
) -> GaussianPrior:
    """The Gaussian with the moments of the data in as many directions as there are latents: μ + Fᵀz is the optimal
    transport map from N(0, I) to it. With `labels`, those of the data set [N], there is one for each class."""
    rank = min(config.latent_dim, len(images) - 1, math.prod(images.image_shape))
    return fitted_gaussian(config, images, labels, rank=rank).to(device)


def fitted_gaussian(
    config: PriorConfig, images: Images, labels: Tensor | None, rank: int | None = None
) -> GaussianPrior:
    """The moments of real images, for each class where there are labels."""
    rows = evenly_spaced(images, MAX_FITTED_IMAGES)
    labels = labels[rows] if labels is not None else None
    return GaussianPrior.from_images(images.fetch(rows), config.truncation_timestep, labels=labels, rank=rank)


def warm_start_terms(
    batch: PriorBatch, state: TrainingState, gaussian: GaussianPrior, record: Record
) -> dict[str, Tensor]:
    """Squared distance to the images of the same latents under the closed-form map."""
    made = state.model(batch.latents, class_labels=batch.class_labels).sample
    record.compare_spread(made, batch.clean)
    codes, labels = batch.latents[:, : gaussian.config.rank], batch.class_labels
    component = torch.zeros(len(codes), dtype=torch.long, device=codes.device) if labels is None else labels
    target = gaussian.mean[component] + times_factor(codes, component, gaussian.factor)
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
    labels, pair_labels = (
        None if own is None else gather_rows(own, accelerator) for own in (batch.class_labels, batch.pair_labels)
    )
    sliced: dict[str, Any] = {
        "num_projections": config.num_projections,
        "generator": keyed_generator(accelerator.device, config.seed, "directions", batch.update),
    }
    terms = {}
    if "pixel" in names:
        terms["pixel"] = within_classes(pixel_transport, images, real, labels, **sliced)
    if "patch" in names:
        grid: dict[str, Any] = {"patch_sizes": config.patch_sizes, "patch_stride": config.patch_stride}
        terms["patch"] = within_classes(patch_transport, images, real, labels, **grid, **sliced)
    if features is None:
        return _weighted(terms, config)

    fake_features = with_labels([gather_rows(level, accelerator) for level in features(fake)], labels)
    if "feature" in names:
        with torch.no_grad():
            expected = [gather_rows(level, accelerator) for level in features(batch.real)]
        terms["feature"] = feature_transport(fake_features, with_labels(expected, labels), **sliced)
    if "sinkhorn" in names:
        with torch.no_grad():
            other = state.model(batch.pair_latents, class_labels=batch.pair_labels).sample
            other = diffused(other, batch.pair_noise, batch, config)
            count = batch.num_references
            pair, reference = (
                with_labels(
                    [gather_rows(level, accelerator)[:count] for level in features(images)],
                    None if pair_labels is None else pair_labels[:count],
                )
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
