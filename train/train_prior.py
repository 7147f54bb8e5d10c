"""Train a prior for the truncated chain and save it with a trained denoiser as a `TruncatedPriorPipeline`.

    accelerate launch train/train_prior.py --config configs/mnist/prior_ot.yaml output_dir=runs/mnist-prior-ot

The denoiser is a run of `train_baseline.py` (`denoiser=`); `feature_extractor=` may name a run of `train_features.py`.
`prior=vae`, `gan` and `ot` train the same generator, whose parameters are printed. `prior=gaussian` is a closed form,
and `prior=few_step` takes the network that `train_few_step.py` has tuned (`pretrained=`): both take a moment. Priors
are compared with real images diffused to step T'. With `class_conditional=true` the prior makes images of a class that
is asked for. The run's folder opens with `TruncatedPriorPipeline.from_pretrained(output_dir)`. The same command, run
again, resumes where it stopped.
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
from ot_diffusers.errors import InputError, require, shown
from ot_diffusers.features import class_counts, labels_of
from ot_diffusers.launch import launched, run_script
from ot_diffusers.models.prior import FewStepPrior, PriorGenerator, PriorMixin
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
    VariationalPrior,
    adversarial_loss,
    discriminator_update,
    fitted_gaussian,
    frozen_features,
    gaussian_map,
    needs_features,
    prior_batches,
    transport_terms,
    vae_terms,
    warm_start_terms,
    with_fitted_latents,
)
from ot_diffusers.training.records import GRID_COLUMNS, grid_rows, write_grid

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
    unet, scheduler, known = load_denoiser(config, images, accelerator)
    tuned, labels = None, None
    if config.prior == "few_step":
        tuned, classes = tuned_prior(config, images.image_shape, known)
    else:
        classes, labels = prior_classes(config, images, known)
    options: dict[str, Any] = {"unet": unet, "scheduler": scheduler, **({} if classes is None else classes.options)}
    make_pipeline: MakePipeline = functools.partial(TruncatedPriorPipeline, **options)
    if config.prior in ("gaussian", "few_step"):
        save_untrained(config, images, labels, tuned, unet, make_pipeline, accelerator)
        return
    schedule = make_schedule(config, accelerator, images)
    check_references(config, schedule)
    num_classes = None if labels is None or classes is None else len(classes)

    # Generator, with an encoder in a VAE; averaged weights. The discriminator of a GAN has its own optimizer.
    generator = make_generator(config, images, num_classes)
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    encoder = make_encoder(config, images, num_classes) if config.prior == "vae" else None
    model = generator if encoder is None else VariationalPrior(generator, encoder)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, foreach=True)
    state = TrainingState.prepare(accelerator, model, config, schedule, ema)
    is_gan = config.prior == "gan"
    discriminator = make_discriminator(config, images, num_classes, schedule, accelerator) if is_gan else None
    state.discriminator = discriminator
    features = frozen_features(config, images, unet, scheduler) if needs_features(config) else None
    gaussian = gaussian_map(config, images, accelerator.device, labels) if config.ot_warmup_steps else None

    # Resume.
    open_run(config, accelerator, images, denoiser=unet, feature_extractor=features.network if features else None)
    resume(state, config, accelerator)
    record = Record(config, schedule, accelerator, state)
    accelerator.print(f"generator: {parameters:,} parameters, T' = {config.truncation_timestep}")

    # Loop.
    trained = [state.model] if discriminator is None else [state.model, discriminator.model]
    for batch in prior_batches(images, scheduler, config, schedule, accelerator, state.update, labels):
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
            prior = finished_prior(state, images, labels, scheduler, config, accelerator)
            with saved_model(config) as folder:
                make_pipeline(prior).save_pretrained(folder)
    accelerator.wait_for_everyone()
    save_results(state, config, schedule, accelerator, parameters=parameters)
    save_grid(state, prior, make_pipeline, config, accelerator)
    end_run(config, accelerator, state.stopped_by)


# --- Parts ------------------------------------------------------------------------------------------------------------


def load_denoiser(config: PriorConfig, images: Images, accelerator: Accelerator) -> tuple[Any, Any, Classes | None]:
    """The frozen UNet of a saved pipeline, its scheduler cut to T' steps, and its classes, if any.

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
    return unet, truncated_scheduler(pipeline.scheduler, config.truncation_timestep), classes


def prior_classes(config: PriorConfig, images: Images, known: Classes | None) -> tuple[Classes | None, Tensor | None]:
    """The classes of the truncated pipeline, and the labels that its prior is trained with, int64 [N].

    The classes are those that the denoiser has, `known`, or of the data where only the prior has some. There are no
    labels for a prior that makes images of any class.

    Raises:
        InputError: images without usable labels, other classes than those of the denoiser, or a class of one image.
    """
    if not config.class_conditional:
        return known, None
    counts, labels = class_counts(images), labels_of(images)
    if known is None:  # classes without training images are left out
        counts = {name: count for name, count in counts.items() if count}
        labels = labels.unique(return_inverse=True)[1]
    names = tuple(counts)
    same = known is None or known.names == names
    require(same, "denoiser", f"know the classes {shown(names)} of the data set", known and known.names)
    for name, count in counts.items():
        require(count >= 2, "dataset", f"have two training images or more of class {name!r}", count)
    return known or Classes.from_counts(counts), labels


def check_references(config: PriorConfig, schedule: Schedule) -> None:
    """Refuse a number of references in which classes cannot have the shares that they have in the batch.

    Raises:
        InputError: with the requirement.
    """
    size, count = schedule.forward_batch_size, config.num_reference_samples
    equal = f"be a multiple of the {size} images of a forward pass, for equal shares of each class"
    fits = count is None or not config.class_conditional or count % size == 0
    require(fits, "num_reference_samples", equal, count)


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


def make_generator(config: PriorConfig, images: Images, num_classes: int | None) -> PriorGenerator:
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
        num_classes=num_classes,
    )


def make_encoder(config: PriorConfig, images: Images, num_classes: int | None) -> PriorEncoder:
    """The VAE's encoder for images of that shape, with new weights."""
    channels, height, width = images.image_shape
    return PriorEncoder(
        sample_size=(height, width),
        in_channels=channels,
        latent_dim=config.latent_dim,
        block_out_channels=config.block_out_channels,
        num_classes=num_classes,
    )


def make_discriminator(
    config: PriorConfig, images: Images, num_classes: int | None, schedule: Schedule, accelerator: Accelerator
) -> TrainingState:
    """The discriminator with its own optimizer."""
    channels, height, width = images.image_shape
    model = PriorDiscriminator(
        sample_size=(height, width),
        in_channels=channels,
        block_out_channels=config.block_out_channels,
        use_spectral_norm=config.spectral_norm,
        num_classes=num_classes,
    )
    own_rate = config.discriminator_learning_rate or config.learning_rate
    own_config = dataclasses.replace(config, learning_rate=own_rate)
    return TrainingState.prepare(accelerator, model, own_config, schedule, ema=None)


def trained_prior(state: TrainingState, accelerator: Accelerator) -> PriorGenerator:
    """The generator inside the prepared model."""
    model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
    return model.generator if isinstance(model, VariationalPrior) else model


def finished_prior(
    state: TrainingState,
    images: Images,
    labels: Tensor | None,
    scheduler: Any,
    config: PriorConfig,
    accelerator: Accelerator,
) -> PriorGenerator:
    """The generator as it is saved; for a VAE, with the fitted distribution of its latents."""
    if config.prior != "vae" or not config.latent_components:
        return trained_prior(state, accelerator)
    accelerator.print("fitting the distribution of the latents", flush=True)
    model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
    return with_fitted_latents(model, images, scheduler, config, labels)


def tuned_prior(
    config: PriorConfig, image_shape: tuple[int, int, int], known: Classes | None
) -> tuple[FewStepPrior, Classes | None]:
    """The network of a tuned pipeline, and the classes of the truncated pipeline: those of the tuned one or, where it
    has none, those of the denoiser.

    Raises:
        InputError: no such pipeline, one that was not tuned for a few calls, or one of other images or classes.
    """
    try:
        pipeline = load_pipeline(str(config.pretrained))
        prior = FewStepPrior.from_pipeline(pipeline, config.truncation_timestep)
    except InputError as error:
        raise InputError(str(error).replace("`pipeline`", "`pretrained`")) from error
    shape = prior.image_shape
    require(shape == image_shape, "pretrained", f"be trained on images of shape {image_shape}", shape)
    if prior.num_classes is None:
        unasked = not config.class_conditional
        require(unasked, "pretrained", "be tuned with classes for class_conditional=true", config.pretrained)
        return prior, known
    names = pipeline.classes.names
    if known is not None:
        require(known.names == names, "pretrained", f"know the classes {shown(known.names)} of the denoiser", names)
    return prior, pipeline.classes


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
    """A grid of samples, see `write_grid`, with a row for each class of the prior."""
    pipeline.set_progress_bar_config(disable=True)
    generator = seeded_generator(config.seed)
    rows, call = grid_rows(pipeline.classes if pipeline.prior.num_classes is not None else None)
    call |= {"generator": generator, "num_inference_steps": config.num_inference_steps}
    (images,) = pipeline(rows * GRID_COLUMNS, **call, return_dict=False)
    write_grid(images, rows, name, config, accelerator, step)


def save_untrained(
    config: PriorConfig,
    images: Images,
    labels: Tensor | None,
    tuned: FewStepPrior | None,
    unet: Any,
    make_pipeline: MakePipeline,
    accelerator: Accelerator,
) -> None:
    """A closed form, or a network that is tuned already; saved like a trained prior."""
    open_run(config, accelerator, images, denoiser=unet, pretrained=tuned)
    if accelerator.is_main_process:
        started = time.monotonic()
        prior: Any = fitted_gaussian(config, images, labels) if tuned is None else tuned
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
