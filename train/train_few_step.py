"""Tune a trained denoiser for a few calls, by optimal transport between its finished samples and real images.

    accelerate launch train/train_few_step.py --config configs/digits/few_step.yaml pretrained=runs/digits/ot

The sampler is run to its end in `num_inference_steps` calls, the finished images are compared with real ones by the
Sinkhorn divergence in several levels of features and in pixels, and the gradient flows through all calls. There is no
teacher and no adversary. The images of all accumulated passes and processes are compared as one set, in the memory of
one pass; for a denoiser with classes, it is a set of pairs of image and label. The run's folder opens as the pipeline
it came from, which then takes this number of calls by default. The same command, run again, resumes where it stopped.
"""

import copy
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from ot_diffusers.config import FewStepConfig
from ot_diffusers.launch import launched, run_script
from ot_diffusers.schedules import Chain
from ot_diffusers.seeds import seeded_generator
from ot_diffusers.training import (
    Record,
    TrainingState,
    averaged_weights,
    check_output_dir,
    end_run,
    load_source,
    load_splits,
    make_accelerator,
    open_run,
    resume,
    save_checkpoint,
    save_results,
    saved_model,
    wants_grid,
    with_source,
)
from ot_diffusers.training.few_step import (
    check_prediction,
    compared_levels,
    few_step_batches,
    few_step_pipeline,
    few_step_schedule,
    surrogate,
    tuned_labels,
)
from ot_diffusers.training.pretrained import check_images, deterministic_scheduler
from ot_diffusers.training.records import GRID_COLUMNS, grid_rows, write_grid
from ot_diffusers.training.sample_checks import SampleChecks


def main(config: FewStepConfig) -> None:
    """One run, from the checked configuration to the saved pipeline."""
    # Accelerator and data.
    source = load_source(config.pretrained)
    config = launched(with_source(config, source))
    check_output_dir(config)
    accelerator = make_accelerator(config)
    images, validation_images = load_splits(config, accelerator, "train", "validation")
    schedule = few_step_schedule(config, accelerator, images)

    # The pipeline that is tuned, its chain of few calls, and the network before tuning.
    check_images(source, images.image_shape)
    check_prediction(source.scheduler, config.num_inference_steps)
    labels = tuned_labels(source, images, config, schedule)
    scheduler = deterministic_scheduler(source.scheduler, "trailing")
    unet = source.unet.eval()  # a chain is made twice: without dropout
    frozen = copy.deepcopy(unet).requires_grad_(False).to(accelerator.device)
    chain = Chain.of(scheduler, config.num_inference_steps)
    levels = compared_levels(config, images, frozen, accelerator.device)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)

    # Optimizer; resume.
    state = TrainingState.prepare(accelerator, unet, config, schedule, ema)
    open_run(config, accelerator, images, pretrained=frozen, feature_extractor=levels.network)
    resume(state, config, accelerator)
    record = Record(config, schedule, accelerator, state)
    checks = SampleChecks.of(config, chain, levels, images, validation_images, has_classes=labels is not None)

    # Loop.
    batches = few_step_batches(images, state.model, chain, levels, config, schedule, accelerator, state.update, labels)
    for batch in batches:
        with accelerator.accumulate(state.model):
            made = batch.finished
            finished = chain(state.model, batch.noise, batch.class_labels) if made is None else made
            loss = surrogate(levels(finished), batch, schedule)
            terms = {config.objective: batch.loss}
            if config.anchor_weight > 0:
                with torch.no_grad():
                    before = chain(frozen, batch.noise, batch.class_labels)
                terms["anchor"] = config.anchor_weight * (finished - before).square().mean()
                loss = loss + terms["anchor"]
            state.backward(accelerator, loss, config.max_grad_norm)
        record.add(loss=sum(terms.values(), start=batch.noise.new_zeros(())), **terms)

        if accelerator.sync_gradients and schedule.ends_epoch(state.update):
            checks.check(state, record, accelerator)
        if accelerator.sync_gradients and schedule.wants_checkpoint(state.update, config):
            save_checkpoint(state, config, accelerator)
        if accelerator.sync_gradients and record.should_stop():
            break

    # Save the best state; the grid comes last.
    record.close()
    save_checkpoint(state, config, accelerator)
    if accelerator.is_main_process:
        with averaged_weights(state), saved_model(config) as folder:
            tuned = accelerator.unwrap_model(state.model, keep_torch_compile=False)
            checks.load_best(tuned)
            pipeline = few_step_pipeline(source, tuned, scheduler, config.num_inference_steps)
            pipeline.save_pretrained(folder)
            save_grid(pipeline, state, config, accelerator)
    accelerator.wait_for_everyone()
    save_results(state, config, schedule, accelerator, num_inference_steps=config.num_inference_steps)
    end_run(config, accelerator, state.stopped_by)


def save_grid(pipeline: Any, state: TrainingState, config: FewStepConfig, accelerator: Any) -> None:
    """`samples/update-N.png`: images of the saved pipeline in its number of calls, with a row for each class as those
    of denoisers have."""
    if wants_grid(state, config):
        pipeline.set_progress_bar_config(disable=True)
        generator = seeded_generator(config.seed)
        rows, labels = grid_rows(getattr(pipeline, "classes", None))
        (images,) = pipeline(
            rows * GRID_COLUMNS,
            generator=generator,
            num_inference_steps=config.num_inference_steps,
            return_dict=False,
            **({"guidance_scale": 0} if hasattr(pipeline, "feature_extractor") else {}),
            **labels,
        )
        write_grid(images, rows, f"update-{state.update:08d}", config, accelerator, state.update)


if __name__ == "__main__":
    run_script(main, FewStepConfig, __doc__)
