"""Train a prior for the truncated chain and save it with a trained denoiser as a `TruncatedPriorPipeline`.

    accelerate launch train/train_prior.py --config configs/mnist/prior_ot.yaml output_dir=runs/mnist-prior-ot

The denoiser is a run of `train_baseline.py` (`denoiser=`); `feature_extractor=` may name a run of `train_features.py`.
`prior=vae`, `gan` and `ot` train the same generator, whose parameters are printed. `prior=gaussian` is a closed form,
and `prior=few_step` takes the network that `train_few_step.py` has tuned (`pretrained=`): both take a moment. Priors
are compared with real images diffused to step T'. The run's folder opens with
`TruncatedPriorPipeline.from_pretrained(output_dir)`. The same command, run again, resumes where it stopped.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ot_diffusers import TruncatedPriorPipeline
from ot_diffusers.config import PriorConfig
from ot_diffusers.data import evenly_spaced
from ot_diffusers.errors import InputError, require
from ot_diffusers.features import class_counts, labels_of
from ot_diffusers.launch import launched, run_script
from ot_diffusers.models.prior import FewStepPrior, GaussianPrior, PriorGenerator, PriorMixin
from ot_diffusers.models.prior_networks import PriorDiscriminator, PriorEncoder
from ot_diffusers.pipelines.classes import Classes
from ot_diffusers.pipelines.guided import GuidedPipeline
from ot_diffusers.sampling import load_pipeline
from ot_diffusers.schedules import truncated_scheduler
from ot_diffusers.seeds import seeded_generator
from ot_diffusers.training import (
    Images,
    Record,
    Schedule,
    TrainingState,
    averaged_weights,
    check_output_dir,
    end_run,
    load_splits,
    make_accelerator,
    make_schedule,
    open_run,
    resume,
    save_checkpoint,
    save_results,
    saved_model,
    wants_grid,
    write_json,
)
from ot_diffusers.training.priors import (
    MAX_FITTED_IMAGES,
    VariationalPrior,
    adversarial_loss,
    discriminator_update,
    frozen_features,
    gaussian_map,
    needs_features,
    prior_batches,
    transport_terms,
    vae_terms,
    warm_start_terms,
    with_fitted_latents,
)
from ot_diffusers.training.records import GRID_COLUMNS, write_grid

MakePipeline = Callable[[PriorMixin], TruncatedPriorPipeline]
"""The pipeline of a prior and the denoiser."""


def main(config: PriorConfig) -> None:
    """One run, from the checked configuration to the saved pipeline."""
    # Accelerator and data.
    config = launched(config)
    check_output_dir(config)
    accelerator = make_accelerator(config)
    (images,) = load_splits(config, accelerator, "train")

    # Frozen denoiser, and the last steps of its chain.
    unet, scheduler, classes = load_denoiser(config, images, accelerator)
    options: dict[str, Any] = {"unet": unet, "scheduler": scheduler, **classes}
    make_pipeline: MakePipeline = functools.partial(TruncatedPriorPipeline, **options)
    if config.prior in ("gaussian", "few_step"):
        save_untrained(config, images, unet, make_pipeline, accelerator)
        return
    schedule = make_schedule(config, accelerator, images)

    # Generator, with an encoder in a VAE; averaged weights. The discriminator of a GAN has its own optimizer.
    generator = make_generator(config, images)
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    model = VariationalPrior(generator, make_encoder(config, images)) if config.prior == "vae" else generator
    ema = EMAModel(model.parameters(), decay=config.ema_decay, foreach=True)
    state = TrainingState.prepare(accelerator, model, config, schedule, ema)
    discriminator = make_discriminator(config, images, schedule, accelerator) if config.prior == "gan" else None
    state.discriminator = discriminator
    features = frozen_features(config, images, unet, scheduler) if needs_features(config) else None
    gaussian = gaussian_map(config, images, accelerator.device) if config.ot_warmup_steps else None

    # Resume.
    open_run(config, accelerator, images, denoiser=unet, feature_extractor=features.network if features else None)
    resume(state, config, accelerator)
    record = Record(config, schedule, accelerator, state)
    accelerator.print(f"generator: {parameters:,} parameters, T' = {config.truncation_timestep}")

    # Loop.
    trained = [state.model] if discriminator is None else [state.model, discriminator.model]
    for batch in prior_batches(images, scheduler, config, schedule, accelerator, start=state.update):
        with accelerator.accumulate(*trained):
            recorded = {}
            if config.prior == "vae":
                losses = vae_terms(batch, state, config, accelerator, record)
            elif discriminator is not None:
                recorded["discriminator"] = discriminator_update(batch, state, discriminator, config, accelerator)
                losses = {"generator": adversarial_loss(batch, state, discriminator, config, accelerator, record)}
            elif gaussian is not None and batch.update < config.ot_warmup_steps:
                losses = warm_start_terms(batch, state, gaussian, record)
            else:
                losses = transport_terms(batch, state, features, config, accelerator, record)
            loss = sum(losses.values(), start=batch.real.new_zeros(()))
            state.backward(accelerator, loss, config.max_grad_norm)
        record.add(loss=loss, **losses, **recorded)

        if accelerator.sync_gradients and schedule.ends_epoch(state.update):
            record.end_epoch()
        if accelerator.sync_gradients and schedule.wants_checkpoint(state.update, config):
            save_checkpoint(state, config, accelerator)
        if accelerator.sync_gradients and schedule.wants_samples(state.update, config):
            save_grid(state, trained_prior(state, accelerator), make_pipeline, config, accelerator)
        if accelerator.sync_gradients and record.should_stop():
            break

    # Save; the grid comes last.
    record.close()
    save_checkpoint(state, config, accelerator)
    prior = trained_prior(state, accelerator)
    if accelerator.is_main_process:
        with averaged_weights(state):
            prior = finished_prior(state, images, scheduler, config, accelerator)
            with saved_model(config) as folder:
                make_pipeline(prior).save_pretrained(folder)
    accelerator.wait_for_everyone()
    save_results(state, config, schedule, accelerator, parameters=parameters)
    save_grid(state, prior, make_pipeline, config, accelerator)
    end_run(config, accelerator, state.stopped_by)


# --- Parts ------------------------------------------------------------------------------------------------------------


def load_denoiser(
    config: PriorConfig, images: Images, accelerator: Accelerator
) -> tuple[Any, Any, dict[str, dict[int, Any]]]:
    """The frozen UNet of a saved pipeline, its scheduler cut to T' steps, and the classes of the truncated pipeline:
    those of the denoiser, or of the data where only the prior has some.

    Raises:
        InputError: no denoiser, one of other images, T' beyond the steps it was trained on, or classes without a null
            label, which images of other priors need.
    """
    try:
        pipeline = load_pipeline(config.denoiser)
    except InputError as error:
        raise InputError(str(error).replace("`pipeline`", "`denoiser`")) from error
    unet = pipeline.unet.eval().requires_grad_(False).to(accelerator.device)
    check_denoiser(unet, config, images.image_shape)
    classes = pipeline.classes if isinstance(pipeline, GuidedPipeline) else None
    open_class = unet.config.get("num_class_embeds") is None or (classes is not None and classes.null_label is not None)
    require(open_class, "denoiser", "be unconditional, or know a null label", config.denoiser)
    if classes is None and config.class_wise:
        classes = Classes.from_counts({name: count for name, count in class_counts(images).items() if count})
    scheduler = truncated_scheduler(pipeline.scheduler, config.truncation_timestep)
    return unet, scheduler, {} if classes is None else classes.options


def check_denoiser(unet: Any, config: PriorConfig, image_shape: tuple[int, int, int]) -> None:
    """Refuse a denoiser of other images, or one that was trained on fewer steps than T'.

    Raises:
        InputError: with the requirement.
    """
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    unet_shape = (unet.config.in_channels, height, width)
    require(unet_shape == image_shape, "denoiser", f"be trained on images of shape {image_shape}", unet_shape)
    record = Path(config.denoiser) / "run.json"
    trained = json.loads(record.read_text(encoding="utf-8"))["config"] if record.is_file() else {}
    limit, length = trained.get("max_timestep"), config.truncation_timestep
    enough = limit is None or length <= limit
    require(enough, "truncation_timestep", f"be at most {limit}, the steps the denoiser was trained on", length)


def make_generator(config: PriorConfig, images: Images) -> PriorGenerator:
    """The generator that all learned priors share. Its group normalisation keeps no running statistics, which averaging
    of weights and several processes would have to handle."""
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
    """The VAE's encoder for images of that shape, with new weights."""
    channels, height, width = images.image_shape
    return PriorEncoder(
        sample_size=(height, width),
        in_channels=channels,
        latent_dim=config.latent_dim,
        block_out_channels=config.block_out_channels,
    )


def make_discriminator(
    config: PriorConfig, images: Images, schedule: Schedule, accelerator: Accelerator
) -> TrainingState:
    """The discriminator with its own optimizer."""
    channels, height, width = images.image_shape
    model = PriorDiscriminator(
        sample_size=(height, width),
        in_channels=channels,
        block_out_channels=config.block_out_channels,
        use_spectral_norm=config.spectral_norm,
    )
    own_rate = config.discriminator_learning_rate or config.learning_rate
    own_config = dataclasses.replace(config, learning_rate=own_rate)
    return TrainingState.prepare(accelerator, model, own_config, schedule, ema=None)


def trained_prior(state: TrainingState, accelerator: Accelerator) -> PriorGenerator:
    """The generator inside the prepared model."""
    model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
    return model.generator if isinstance(model, VariationalPrior) else model


def finished_prior(
    state: TrainingState, images: Images, scheduler: Any, config: PriorConfig, accelerator: Accelerator
) -> PriorGenerator:
    """The generator as it is saved; for a VAE, with the fitted distribution of its latents."""
    if config.prior != "vae" or not config.latent_components:
        return trained_prior(state, accelerator)
    accelerator.print("fitting the distribution of the latents", flush=True)
    model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
    return with_fitted_latents(model, images, scheduler, config)


def tuned_prior(config: PriorConfig, image_shape: tuple[int, int, int]) -> FewStepPrior:
    """The network of a tuned pipeline.

    Raises:
        InputError: no such pipeline, one that was not tuned for a few calls, or one of other images.
    """
    try:
        prior = FewStepPrior.from_pipeline(load_pipeline(str(config.pretrained)), config.truncation_timestep)
    except InputError as error:
        raise InputError(str(error).replace("`pipeline`", "`pretrained`")) from error
    shape = prior.image_shape
    require(shape == image_shape, "pretrained", f"be trained on images of shape {image_shape}", shape)
    return prior


def fitted_prior(config: PriorConfig, images: Images, labels: Tensor | None) -> GaussianPrior:
    """The closed form: moments of real images, for each class where there are labels."""
    rows = evenly_spaced(images, MAX_FITTED_IMAGES)
    labels = labels[rows] if labels is not None else None
    return GaussianPrior.from_images(images.fetch(rows), config.truncation_timestep, labels=labels)


def tuning_seconds(pretrained: str) -> float:
    """Training time of the run that tuned this network; 0 where its record is not at hand."""
    record = Path(pretrained) / "results.json"
    return float(json.loads(record.read_text(encoding="utf-8"))["training_seconds"]) if record.is_file() else 0.0


# --- Saving -----------------------------------------------------------------------------------------------------------


def save_grid(
    state: TrainingState, prior: Any, make_pipeline: MakePipeline, config: PriorConfig, accelerator: Accelerator
) -> None:
    """`samples/update-N.png`: images with the averaged weights, from the same latents every time. There is none where
    the run is asked to stop."""
    if accelerator.is_main_process and wants_grid(state, config):
        with averaged_weights(state):
            draw_grid(make_pipeline(prior), config, f"update-{state.update:08d}", accelerator, state.update)
    accelerator.wait_for_everyone()


def draw_grid(
    pipeline: TruncatedPriorPipeline,
    config: PriorConfig,
    name: str,
    accelerator: Accelerator,
    step: int = 0,
) -> None:
    """A square grid of samples, see `write_grid`."""
    pipeline.set_progress_bar_config(disable=True)
    generator = seeded_generator(config.seed)
    call: dict[str, Any] = {"generator": generator, "num_inference_steps": config.num_inference_steps}
    (images,) = pipeline(GRID_COLUMNS**2, **call, return_dict=False)
    write_grid(images, GRID_COLUMNS, name, config, accelerator, step)


def save_untrained(
    config: PriorConfig, images: Images, unet: Any, make_pipeline: MakePipeline, accelerator: Accelerator
) -> None:
    """A closed form, or a network that is tuned already; saved like a trained prior."""
    labels = labels_of(images) if config.class_wise else None
    tuned = tuned_prior(config, images.image_shape) if config.prior == "few_step" else None
    open_run(config, accelerator, images, denoiser=unet, pretrained=tuned)
    if accelerator.is_main_process:
        started = time.monotonic()
        prior: Any = fitted_prior(config, images, labels) if tuned is None else tuned
        seconds = time.monotonic() - started if tuned is None else tuning_seconds(str(config.pretrained))
        prior.to(accelerator.device)
        with saved_model(config) as folder:
            make_pipeline(prior).save_pretrained(folder)
        parameters = sum(parameter.numel() for parameter in prior.parameters())
        results = {"updates": 0, "complete": True, "training_seconds": round(seconds, 2), "parameters": parameters}
        write_json(Path(config.output_dir) / "results.json", results)
        accelerator.print(f"everything is saved in {config.output_dir}", flush=True)
        draw_grid(make_pipeline(prior), config, "closed-form" if tuned is None else "few-step", accelerator)
    accelerator.wait_for_everyone()
    end_run(config, accelerator)


if __name__ == "__main__":
    run_script(main, PriorConfig, __doc__)
