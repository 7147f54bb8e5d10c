"""Train a baseline diffusion model (DDPM) and save a plain diffusers pipeline.

    accelerate launch train/train_baseline.py --config configs/mnist/baseline.yaml output_dir=runs/mnist-baseline

The run's folder opens with `DDIMPipeline.from_pretrained(output_dir)`, or with `FlowMatchPipeline` after
`prediction_type=flow_prediction`, or `OTGuidedDDIMPipeline` after `class_conditional=true`; it also holds the losses
per epoch (`metrics.jsonl`), sample grids, checkpoints and TensorBoard logs. The same command, run again, resumes where
it stopped.

`pretrained` names a pipeline to start from, a folder or a Hub id.
"""

from diffusers.training_utils import EMAModel

from ot_diffusers.config import BaselineConfig
from ot_diffusers.launch import launched, run_script
from ot_diffusers.losses.denoising import denoising_loss
from ot_diffusers.training import (
    Record,
    TrainingState,
    averaged_weights,
    check_output_dir,
    diffusion_batches,
    end_run,
    load_source,
    load_splits,
    make_accelerator,
    make_classes,
    make_coupling,
    make_noise_scheduler,
    make_pipeline,
    make_schedule,
    make_unet,
    open_run,
    resume,
    save_checkpoint,
    save_results,
    save_sample_grid,
    saved_model,
    validation_loss,
    with_source,
)


def main(config: BaselineConfig) -> None:
    """One run, from the checked configuration to the saved pipeline."""
    # Accelerator and data.
    source = load_source(config.pretrained)
    config = launched(with_source(config, source))
    check_output_dir(config)
    accelerator = make_accelerator(config)
    images, validation_images = load_splits(config, accelerator, "train", "validation")
    schedule = make_schedule(config, accelerator, images)
    classes = make_classes(config, images, source)
    coupling = make_coupling(config, images, accelerator)

    # Model, averaged weights, noising chain.
    unet = make_unet(config, images.image_shape, classes, source)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    scheduler = make_noise_scheduler(config, source)

    # Optimizer; resume.
    state = TrainingState.prepare(accelerator, unet, config, schedule, ema)
    open_run(config, accelerator, images, pretrained=source and source.unet, coupling=coupling)
    resume(state, config, accelerator)
    record = Record(config, schedule, accelerator, state)

    # Loop.
    for batch in diffusion_batches(images, scheduler, config, schedule, accelerator, state.update, coupling):
        with accelerator.accumulate(state.model):
            model_output = state.model(batch.noisy, batch.timesteps, batch.class_labels).sample
            terms = {"mse": denoising_loss(model_output, batch.target)}
            loss = sum(terms.values(), start=batch.noisy.new_zeros(()))
            state.backward(accelerator, loss, config.max_grad_norm)
        record.add(loss=loss, **terms)

        if accelerator.sync_gradients and schedule.ends_epoch(state.update):
            held_out = images if coupling else validation_images
            validation = validation_loss(state, held_out, scheduler, config, accelerator, coupling)
            record.end_epoch(validation_loss=validation)
        if accelerator.sync_gradients and schedule.wants_checkpoint(state.update, config):
            save_checkpoint(state, config, accelerator)
        if accelerator.sync_gradients and schedule.wants_samples(state.update, config):
            save_sample_grid(state, scheduler, config, accelerator, classes)
        if accelerator.sync_gradients and record.should_stop():
            break

    # Save; the grid comes last.
    record.close()
    save_checkpoint(state, config, accelerator)
    if accelerator.is_main_process:
        with averaged_weights(state), saved_model(config) as folder:
            unet = accelerator.unwrap_model(state.model, keep_torch_compile=False)
            make_pipeline(unet, scheduler, classes=classes).save_pretrained(folder)
            if coupling is not None:
                coupling.save_pretrained(folder / "coupling")
    save_results(state, config, schedule, accelerator)
    save_sample_grid(state, scheduler, config, accelerator, classes)
    end_run(config, accelerator, state.stopped_by)


if __name__ == "__main__":
    run_script(main, BaselineConfig, __doc__)
