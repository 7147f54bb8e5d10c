"""Train a prior for the truncated chain and save it with a trained denoiser as a `TruncatedPriorPipeline`.

    accelerate launch train/train_prior.py --config configs/mnist/prior_ot.yaml output_dir=runs/mnist-prior-ot

It builds on a run of `train_baseline.py` (`denoiser=`) and, where it is told to, of `train_features.py`.
`prior=vae`, `gan` and `ot` train the same generator, whose parameters are printed; `prior=gaussian` is a closed form
and takes a moment. Real images diffused to step T' are what a prior is held against. The run's folder opens with
`TruncatedPriorPipeline.from_pretrained(output_dir)`. Started again, the same command goes on where it stopped.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import Tensor, nn

from ot_diffusers import TruncatedPriorPipeline
from ot_diffusers.config import PriorConfig, run_script
from ot_diffusers.errors import InputError, require
from ot_diffusers.features import check_trained_on, labels_of, load_feature_extractor
from ot_diffusers.models.prior import GaussianPrior, PriorGenerator
from ot_diffusers.models.prior_networks import PriorDiscriminator, PriorEncoder
from ot_diffusers.prior_losses import (
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
from ot_diffusers.sampling import load_pipeline
from ot_diffusers.schedules import alpha_sigma, truncated_samples, truncated_scheduler
from ot_diffusers.seeds import key, keyed_generator
from ot_diffusers.training import (
    Images,
    Record,
    Schedule,
    TrainingState,
    averaged_weights,
    check_output_dir,
    checkpoints,
    gather_rows,
    image_batches,
    load_split,
    make_accelerator,
    open_run,
    plan,
    resume,
    save_checkpoint,
    save_results,
    write_json,
)
from ot_diffusers.transport import median_distance

MAX_FITTED_IMAGES = 50_000
"""Evenly spaced images that a closed-form prior is fitted to, at most: they are held as float32."""


def main(config: PriorConfig) -> None:
    # Accelerator and data.
    check_output_dir(config)
    accelerator = make_accelerator(config)
    images = load_split(config, "train", accelerator)

    # Frozen denoiser, and the end of its chain.
    unet, scheduler = load_denoiser(config, images, accelerator)
    if config.prior == "gaussian":
        fit_gaussian(config, images, unet, scheduler, accelerator)
        return
    schedule = plan(config, accelerator, images)

    # Generator, with an encoder in a VAE; averaged weights. The discriminator of a GAN has an optimizer of its own.
    generator = make_generator(config, images)
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    model = VariationalPrior(generator, make_encoder(config, images)) if config.prior == "vae" else generator
    ema = EMAModel(model.parameters(), decay=config.ema_decay, foreach=True)
    state = TrainingState.prepare(accelerator, model, config, schedule, ema)
    opponent = make_opponent(config, images, schedule, accelerator) if config.prior == "gan" else None
    features = frozen_features(config, images, unet, scheduler) if needs_features(config) else None

    # Resume.
    open_run(config, accelerator, images)
    resume(state, config, accelerator)
    if opponent is not None and state.update:
        opponent.load(opponent_folder(config, state.update), accelerator)
    record = Record(config, schedule, accelerator, state)
    accelerator.print(f"generator: {parameters:,} parameters, T' = {config.truncation_timestep}")

    # Loop.
    trained = [state.model] if opponent is None else [state.model, opponent.model]
    for batch in prior_batches(images, scheduler, config, schedule, accelerator, start=state.update):
        with accelerator.accumulate(*trained):
            opposing = {}
            if config.prior == "vae":
                losses = vae_terms(batch, state, config, accelerator)
            elif opponent is not None:
                opposing["discriminator"] = discriminator_update(batch, state, opponent, config, accelerator)
                losses = {"generator": adversarial_loss(batch, state, opponent, config, accelerator)}
            else:
                losses = transport_terms(batch, state, features, config, accelerator)
            loss = sum(losses.values(), start=batch.real.new_zeros(()))
            state.backward(accelerator, loss, config.max_grad_norm)
        record.add(loss=loss, **losses, **opposing)

        if accelerator.sync_gradients and schedule.ends_epoch(state.update):
            record.end_epoch()
            if schedule.epoch(state.update) % config.sample_epochs == 0:
                save_grid(state, unet, scheduler, config, accelerator)
        if accelerator.sync_gradients and schedule.wants_checkpoint(state.update, config):
            save_checkpoints(state, opponent, config, accelerator)
        if accelerator.sync_gradients and record.out_of_time():
            break

    # Save.
    save_checkpoints(state, opponent, config, accelerator)
    save_grid(state, unet, scheduler, config, accelerator)
    if accelerator.is_main_process:
        with averaged_weights(state):
            TruncatedPriorPipeline(trained_prior(state, accelerator), unet, scheduler).save_pretrained(
                config.output_dir
            )
    save_results(state, config, schedule, accelerator, parameters=parameters)
    accelerator.end_training()


# --- Parts ------------------------------------------------------------------------------------------------------------


class VariationalPrior(nn.Module):
    """Encoder and generator under one optimizer: images and noise to (reconstruction, mean, log-variance)."""

    def __init__(self, generator: PriorGenerator, encoder: PriorEncoder) -> None:
        super().__init__()
        self.generator, self.encoder = generator, encoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images, return_dict=False)
        latents = mean + (log_variance / 2).exp() * noise
        return self.generator(latents).sample, mean, log_variance


def load_denoiser(config: PriorConfig, images: Images, accelerator: Accelerator) -> tuple[Any, Any]:
    """The frozen UNet of a saved pipeline, and its scheduler cut to T' steps.

    Raises:
        InputError: no denoiser there, one of other images, or T' beyond the steps it was trained on.
    """
    try:
        pipeline = load_pipeline(config.denoiser)
    except InputError as error:
        raise InputError(str(error).replace("`pipeline`", "`denoiser`")) from error
    unet = pipeline.unet.eval().requires_grad_(False).to(accelerator.device)
    check_denoiser(unet, config, images.image_shape)
    return unet, truncated_scheduler(pipeline.scheduler, config.truncation_timestep)


def check_denoiser(unet: Any, config: PriorConfig, image_shape: tuple[int, int, int]) -> None:
    """Refuse a denoiser of other images, or one that its run trained on fewer steps than T'.

    Raises:
        InputError: naming what it should be.
    """
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    found = (unet.config.in_channels, height, width)
    require(found == image_shape, "denoiser", f"be trained on images of shape {image_shape}", found)
    record = Path(config.denoiser) / "run.json"
    trained = json.loads(record.read_text(encoding="utf-8"))["config"] if record.is_file() else {}
    limit, length = trained.get("max_timestep"), config.truncation_timestep
    enough = limit is None or length <= limit
    require(enough, "truncation_timestep", f"be at most {limit}, the steps the denoiser was trained on", length)


def make_generator(config: PriorConfig, images: Images) -> PriorGenerator:
    """The generator that all learned priors share; group normalisation leaves no statistics that an average or a
    second process would have to keep in step."""
    channels, height, width = images.image_shape
    return PriorGenerator(
        truncation_timestep=config.truncation_timestep,
        sample_size=height if height == width else (height, width),
        out_channels=channels,
        latent_dim=config.latent_dim,
        block_out_channels=config.block_out_channels,
        norm_type="group",
        prediction_type=config.prediction_type,
    )


def make_encoder(config: PriorConfig, images: Images) -> PriorEncoder:
    channels, height, width = images.image_shape
    return PriorEncoder(
        sample_size=(height, width),
        in_channels=channels,
        latent_dim=config.latent_dim,
        block_out_channels=config.block_out_channels,
    )


def make_opponent(config: PriorConfig, images: Images, schedule: Schedule, accelerator: Accelerator) -> TrainingState:
    """The discriminator with its own optimizer."""
    channels, height, width = images.image_shape
    discriminator = PriorDiscriminator(
        sample_size=(height, width),
        in_channels=channels,
        block_out_channels=config.block_out_channels,
        use_spectral_norm=config.spectral_norm,
    )
    own_rate = config.discriminator_learning_rate or config.learning_rate
    own_config = dataclasses.replace(config, learning_rate=own_rate)
    return TrainingState.prepare(accelerator, discriminator, own_config, schedule, ema=None)


def trained_prior(state: TrainingState, accelerator: Accelerator) -> PriorGenerator:
    """The generator inside the prepared model."""
    model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
    return model.generator if isinstance(model, VariationalPrior) else model


# --- Batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PriorBatch:
    """A process' rows of a global batch, and all the noise that generated images are made of.

    Attributes:
        clean: real images, [B, C, H, W].
        real: the same diffused to T', [B, C, H, W].
        reference: other real x_T' to compare with, [M, C, H, W]; `real` itself where a prior asks for no others.
        latents, noise: of the generated images, [B, latent_dim] and [B, C, H, W].
        pair_latents, pair_noise: of an independent second draw, [M, latent_dim] and [M, C, H, W].
        alpha, sigma: noise level of T', scalars.
        update: number of the update, from 0.
    """

    clean: Tensor
    real: Tensor
    reference: Tensor
    latents: Tensor
    noise: Tensor
    pair_latents: Tensor
    pair_noise: Tensor
    alpha: Tensor
    sigma: Tensor
    update: int


def prior_batches(
    images: Images, scheduler: Any, config: PriorConfig, schedule: Schedule, accelerator: Accelerator, start: int
) -> Iterator[PriorBatch]:
    """Batches from update `start` on; every draw is a function of (seed, update), and each process takes its rows."""
    alpha, sigma = (level.to(accelerator.device) for level in alpha_sigma(scheduler, config.truncation_timestep - 1))
    for update, indices, part, clean in image_batches(images, config, schedule, accelerator, start):
        epoch = schedule.epoch(update)
        real = truncated_samples(clean, indices[part], scheduler, epoch=epoch, seed=config.seed)
        latents, noise = draw_latents(len(indices), clean, config, "generated", update)
        if config.num_reference_samples is None:
            reference, pair_part = real, part
            pair_latents, pair_noise = draw_latents(len(indices), clean, config, "pair", update)
        else:
            count, rank = config.num_reference_samples, accelerator.process_index
            total, pair_part = count * accelerator.num_processes, slice(rank * count, (rank + 1) * count)
            order = torch.randperm(len(images), generator=keyed_generator("cpu", config.seed, "references", update))
            rows = order[torch.arange(total) % len(images)][pair_part]
            others = images.fetch(rows).to(accelerator.device)
            reference = truncated_samples(others, rows, scheduler, epoch=update, seed=key(config.seed, "references"))
            pair_latents, pair_noise = draw_latents(total, clean, config, "pair", update)
        yield PriorBatch(
            clean=clean,
            real=real,
            reference=reference,
            latents=latents[part],
            noise=noise[part],
            pair_latents=pair_latents[pair_part],
            pair_noise=pair_noise[pair_part],
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
    """x_T' from what the generator makes, with the given noise."""
    return images if config.prediction_type == "noisy_sample" else batch.alpha * images + batch.sigma * noise


# --- Objectives -------------------------------------------------------------------------------------------------------


def vae_terms(
    batch: PriorBatch, state: TrainingState, config: PriorConfig, accelerator: Accelerator
) -> dict[str, Tensor]:
    """The two terms of the evidence bound, over the batch of all processes."""
    target = batch.clean if config.prediction_type == "sample" else batch.real
    reconstructed, mean, log_variance = state.model(target, batch.latents)
    gathered = (gather_rows(rows, accelerator) for rows in (target, reconstructed, mean, log_variance))
    bound = evidence_bound(*gathered, beta=config.beta)
    return {"reconstruction": bound.reconstruction, "divergence": config.beta * bound.divergence}


def discriminator_update(
    batch: PriorBatch, state: TrainingState, opponent: TrainingState, config: PriorConfig, accelerator: Accelerator
) -> Tensor:
    """One update of the discriminator, with R1 in every `r1_interval`-th; returns its loss without the penalty."""
    with torch.no_grad():
        fake = diffused(state.model(batch.pair_latents).sample, batch.pair_noise, batch, config)
    penalised = config.r1_weight > 0 and batch.update % config.r1_interval == 0
    real = batch.real.clone().requires_grad_(penalised)
    opponent.model.requires_grad_(True)
    real_logits, fake_logits = opponent.model(torch.cat([real, fake])).chunk(2)
    loss = discriminator_loss(real_logits, fake_logits)
    penalty = config.r1_weight * config.r1_interval * gradient_penalty(real_logits, real) if penalised else 0.0
    opponent.backward(accelerator, loss + penalty, config.max_grad_norm)
    return loss


def adversarial_loss(
    batch: PriorBatch,
    state: TrainingState,
    opponent: TrainingState,
    config: PriorConfig,
    accelerator: Accelerator,
) -> Tensor:
    """What the generator learns from the discriminator, which keeps no gradient of it."""
    fake = diffused(state.model(batch.latents).sample, batch.noise, batch, config)
    discriminator = accelerator.unwrap_model(opponent.model, keep_torch_compile=False).requires_grad_(False)
    return generator_loss(discriminator(fake))


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of x_T' at several depths of a frozen network, each in units of its median distance between real images.

    Attributes:
        extract: images [B, C, H, W] to levels, [B, D] each.
        scales: one for each level.
    """

    extract: Callable[[Tensor], tuple[Tensor, ...]]
    scales: tuple[float, ...]

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(level / scale for level, scale in zip(self.extract(images), self.scales, strict=True))


def needs_features(config: PriorConfig) -> bool:
    return config.prior == "ot" and bool({"feature", "sinkhorn"} & set(config.ot_objective.split("+")))


@torch.no_grad()
def frozen_features(config: PriorConfig, images: Images, unet: Any, scheduler: Any) -> FrozenFeatures:
    """The features of the configured network, or of the denoiser at step T'; scales from at most 1,000 real images."""
    extract: Callable[[Tensor], tuple[Tensor, ...]]
    if config.feature_extractor is None:
        extract = functools.partial(denoiser_features, unet, timestep=config.truncation_timestep - 1)
    else:
        network = load_feature_extractor(config.feature_extractor).to(unet.device)
        check_trained_on(network, images)
        extract = functools.partial(network_features, network)
    rows = torch.linspace(0, len(images) - 1, min(1000, len(images))).round().long()
    real = truncated_samples(images.fetch(rows), rows, scheduler, seed=config.seed)
    return FrozenFeatures(extract, tuple(median_distance(level) for level in extract(real.to(unet.device))))


def transport_terms(
    batch: PriorBatch,
    state: TrainingState,
    features: FrozenFeatures | None,
    config: PriorConfig,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """The terms of `ot_objective` between generated and real x_T', each one problem over all processes."""
    wanted = config.ot_objective.split("+")
    fake = diffused(state.model(batch.latents).sample, batch.noise, batch, config)
    images, real = gather_rows(fake, accelerator), gather_rows(batch.real, accelerator)
    sliced: dict[str, Any] = {
        "num_projections": config.num_projections,
        "generator": keyed_generator(accelerator.device, config.seed, "directions", batch.update),
    }
    terms = {}
    if "pixel" in wanted:
        terms["pixel"] = pixel_transport(images, real, **sliced)
    if "patch" in wanted:
        terms["patch"] = patch_transport(images, real, patch_sizes=config.patch_sizes, **sliced)
    if features is None:
        return terms

    found = [gather_rows(level, accelerator) for level in features(fake)]
    if "feature" in wanted:
        with torch.no_grad():
            expected = [gather_rows(level, accelerator) for level in features(batch.real)]
        terms["feature"] = feature_transport(found, expected, **sliced)
    if "sinkhorn" in wanted:
        with torch.no_grad():
            other = diffused(state.model(batch.pair_latents).sample, batch.pair_noise, batch, config)
            pair = [gather_rows(level, accelerator) for level in features(other)]
            reference = [gather_rows(level, accelerator) for level in features(batch.reference)]
        terms["sinkhorn"] = sinkhorn_transport(found, reference, pair, blur=config.blur, scaling=config.scaling)
    return terms


# --- Saving -----------------------------------------------------------------------------------------------------------


def opponent_folder(config: PriorConfig, update: int) -> Path:
    """The discriminator's part of the checkpoint after `update` updates."""
    resumed = config.resume_from_checkpoint
    folder = Path(config.output_dir) / "checkpoints" if resumed in (None, "latest") else Path(resumed).parent
    return folder / "opponent" / f"update-{update:08d}"


def save_checkpoints(
    state: TrainingState, opponent: TrainingState | None, config: PriorConfig, accelerator: Accelerator
) -> None:
    """The opponent first and its old parts last: a checkpoint finds its opponent whenever the run is killed."""
    folder = Path(config.output_dir) / "checkpoints" / "opponent"
    if opponent is not None:
        opponent.save(folder / f"update-{state.update:08d}", accelerator)
    save_checkpoint(state, config, accelerator)
    if accelerator.is_main_process:
        kept = {checkpoint.name for checkpoint in checkpoints(config)}
        for old in folder.glob("update-*"):
            if old.name not in kept:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_grid(
    state: TrainingState, unet: Any, scheduler: Any, config: PriorConfig, accelerator: Accelerator, rows: int = 6
) -> None:
    """`samples/update-N.png`: rows² images with the averaged weights, from the same latents every time."""
    if accelerator.is_main_process:
        with averaged_weights(state):
            draw_grid(trained_prior(state, accelerator), unet, scheduler, config, f"update-{state.update:08d}", rows)
    accelerator.wait_for_everyone()


def draw_grid(prior: Any, unet: Any, scheduler: Any, config: PriorConfig, name: str, rows: int = 6) -> None:
    pipeline = TruncatedPriorPipeline(prior, unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(config.seed)
    call: dict[str, Any] = {"generator": generator, "num_inference_steps": config.num_inference_steps}
    (images,) = pipeline(rows**2, **call, return_dict=False)
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    make_image_grid(images, rows, rows).save(folder / f"{name}.png")


def fit_gaussian(config: PriorConfig, images: Images, unet: Any, scheduler: Any, accelerator: Accelerator) -> None:
    """The closed form: moments of real images, for each class if `class_wise`; saved like a trained prior."""
    labels = labels_of(images) if config.class_wise else None
    open_run(config, accelerator, images)
    if accelerator.is_main_process:
        started = time.monotonic()
        rows = torch.linspace(0, len(images) - 1, min(MAX_FITTED_IMAGES, len(images))).round().long()
        labels = labels[rows] if labels is not None else None
        prior = GaussianPrior.from_images(images.fetch(rows), config.truncation_timestep, labels=labels)
        seconds = time.monotonic() - started
        prior.to(accelerator.device)
        TruncatedPriorPipeline(prior, unet, scheduler).save_pretrained(config.output_dir)
        draw_grid(prior, unet, scheduler, config, "closed-form")
        parameters = sum(parameter.numel() for parameter in prior.parameters())
        results = {"updates": 0, "complete": True, "training_seconds": round(seconds, 2), "parameters": parameters}
        write_json(Path(config.output_dir) / "results.json", results)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, PriorConfig, __doc__)
