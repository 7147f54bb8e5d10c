"""Teach a trained diffusion model what OT guidance does to it, so that it samples that way without guidance.

    accelerate launch train/train_distilled.py --config configs/digits/distilled.yaml output_dir=runs/digits/distilled

It builds on runs of `train_baseline.py` (`teacher=`) and `train_features.py` (`feature_extractor=`). The teacher
samples one large batch with guidance; its UNet then goes on training on two terms: the baseline's, on noised data, and
the error to the guided outputs along those chains. `distillation_weight=0` is the first term alone. The run's folder
opens with `DDIMPipeline.from_pretrained(output_dir)`. Started again, the same command goes on where it stopped.
"""

import copy
import itertools
from collections.abc import Iterator

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from ot_diffusers.config import DistilledConfig, run_script
from ot_diffusers.launch import launched
from ot_diffusers.losses import denoising_loss
from ot_diffusers.training import (
    Record,
    TrainingState,
    averaged_weights,
    check_output_dir,
    diffusion_batches,
    load_splits,
    make_accelerator,
    open_run,
    plan,
    resume,
    save_checkpoint,
    save_results,
    save_sample_grid,
    saved_model,
    validation_loss,
)
from ot_diffusers.training.distillation import chain_batches, guided_chains, load_teacher


def main(config: DistilledConfig) -> None:
    # Accelerator and data.
    config = launched(config)
    check_output_dir(config)
    accelerator = make_accelerator(config)
    images, validation_images = load_splits(config, accelerator, "train", "validation")
    schedule = plan(config, accelerator, images)

    # Guided teacher; model, averaged weights, noising chain.
    teacher = load_teacher(config, images, accelerator)
    unet = copy.deepcopy(teacher.unet).train()
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    scheduler = DDPMScheduler.from_config(teacher.scheduler.config)

    # Optimizer; resume.
    state = TrainingState.prepare(accelerator, unet, config, schedule, ema)
    open_run(config, accelerator, images, teacher=teacher.unet, feature_extractor=teacher.feature_extractor)
    resume(state, config, accelerator)
    guided: Iterator[tuple[Tensor, Tensor, Tensor] | None] = itertools.repeat(None)
    if config.distillation_weight > 0:
        chains = guided_chains(teacher, config, accelerator)
        guided = chain_batches(chains, images, config, schedule, accelerator, start=state.update)
    record = Record(config, schedule, accelerator, state)

    # Loop.
    batches = diffusion_batches(images, scheduler, config, schedule, accelerator, start=state.update)
    for batch, steps in zip(batches, guided, strict=False):
        with accelerator.accumulate(state.model):
            noisy, timesteps, target = batch.noisy, batch.timesteps, batch.target
            if steps is not None:  # one forward pass for both terms
                noisy, timesteps, target = map(torch.cat, zip((noisy, timesteps, target), steps, strict=True))
            model_output = state.model(noisy, timesteps).sample
            count = len(batch.noisy)
            terms = {"mse": denoising_loss(model_output[:count], target[:count])}
            if steps is not None:
                distillation = denoising_loss(model_output[count:], target[count:])
                terms["distillation"] = config.distillation_weight * distillation
            loss = sum(terms.values(), start=batch.noisy.new_zeros(()))
            state.backward(accelerator, loss, config.max_grad_norm)
        record.add(loss=loss, **terms)

        if accelerator.sync_gradients and schedule.ends_epoch(state.update):
            validation = validation_loss(state, validation_images, scheduler, config, accelerator)
            record.end_epoch(validation_loss=validation)
            if schedule.epoch(state.update) % config.sample_epochs == 0:
                save_sample_grid(state, scheduler, config, accelerator)
        if accelerator.sync_gradients and schedule.wants_checkpoint(state.update, config):
            save_checkpoint(state, config, accelerator)
        if accelerator.sync_gradients and record.should_stop():
            break

    # Save.
    save_checkpoint(state, config, accelerator)
    if accelerator.is_main_process:
        with averaged_weights(state), saved_model(config) as folder:
            pipeline = DDIMPipeline(
                accelerator.unwrap_model(state.model, keep_torch_compile=False),
                DDIMScheduler.from_config(teacher.scheduler.config),
            )
            pipeline.save_pretrained(folder)
    save_sample_grid(state, scheduler, config, accelerator)
    save_results(state, config, schedule, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, DistilledConfig, __doc__)
