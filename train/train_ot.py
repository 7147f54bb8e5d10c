"""Train a diffusion model with optimal transport and save a pipeline that can be guided.

    accelerate launch train/train_ot.py --config configs/mnist/ot.yaml output_dir=runs/mnist-ot

By default noise and images are paired by optimal transport between noise and the whole data set
(`noise_coupling=semidiscrete`), and the network learns the straight paths between them (`flow_prediction`), so that a
few calls are enough to sample. The run's folder opens with `FlowMatchPipeline.from_pretrained(output_dir)`, or with
`OTGuidedDDIMPipeline` for the other predictions; its feature network and reference set guide it.

With `ot_weight` λ > 0 the loss has one more term than in `train_baseline.py`: λ·S, where S is the Sinkhorn divergence
between frozen features of the predicted clean images and of real images that are not in the batch, as in the original
study (`configs/mnist/ot_original.yaml`). Without it and with the same pairs and prediction, the weights are those of
`train_baseline.py` bit for bit. The same command, run again, resumes where it stopped.

`pretrained` names a pipeline to start from, a folder or a Hub id.
"""

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ot_diffusers.config import OTConfig
from ot_diffusers.errors import require
from ot_diffusers.features import cached_features, check_trained_on, load_feature_extractor, make_reference_bank
from ot_diffusers.launch import launched, run_script
from ot_diffusers.losses.denoising import denoising_loss, disjoint_reference_indices, image_features, ot_loss
from ot_diffusers.models.feature_extractor import FeatureExtractor
from ot_diffusers.schedules import Scheduler, min_snr_weight, prediction_type_of, to_original_sample
from ot_diffusers.seeds import keyed_generator
from ot_diffusers.training import (
    DiffusionBatch,
    Record,
    TrainingState,
    averaged_weights,
    check_output_dir,
    diffusion_batches,
    end_run,
    gather_rows,
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
from ot_diffusers.transport import check_backend, median_distance


def main(config: OTConfig) -> None:
    """One run, from the checked configuration to the saved pipeline."""
    # Accelerator and data.
    source = load_source(config.pretrained)
    config = launched(with_source(config, source))
    check_output_dir(config)
    accelerator = make_accelerator(config)
    check_backend(config.ot_backend, accelerator.device, "ot_backend")
    images, validation_images = load_splits(config, accelerator, "train", "validation")
    schedule = make_schedule(config, accelerator, images)
    classes = make_classes(config, images, source)
    coupling = make_coupling(config, images, accelerator)

    # Model, averaged weights, noising chain.
    unet = make_unet(config, images.image_shape, classes, source)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    scheduler = make_noise_scheduler(config, source)

    # Frozen feature network, and for the transport term its features of the training set.
    feature_extractor = load_feature_extractor(config.feature_extractor).to(accelerator.device)
    check_trained_on(feature_extractor, images)
    if config.ot_weight > 0:
        left, size = len(images) - schedule.global_batch_size, config.train_batch_size
        require(left > 0, "train_batch_size", f"leave references in a data set of {len(images)}", size)
        training_features = cached_features(feature_extractor, images, squash=config.squash)
        finite = bool(training_features.isfinite().all())
        require(finite, "feature_extractor", "give finite features of the training images", config.feature_extractor)
        feature_scale = median_distance(training_features) if config.normalize_features else 1.0

    # Optimizer; resume.
    state = TrainingState.prepare(accelerator, unet, config, schedule, ema)
    frozen = {"pretrained": source and source.unet, "feature_extractor": feature_extractor, "coupling": coupling}
    open_run(config, accelerator, images, **frozen)
    resume(state, config, accelerator)
    record = Record(config, schedule, accelerator, state)

    # Loop.
    for batch in diffusion_batches(images, scheduler, config, schedule, accelerator, state.update, coupling):
        with accelerator.accumulate(state.model):
            model_output = state.model(batch.noisy, batch.timesteps, batch.class_labels).sample
            terms = {"mse": denoising_loss(model_output, batch.target)}
            if config.ot_weight > 0:
                transport = ot_term(
                    model_output,
                    batch,
                    scheduler,
                    feature_extractor,
                    training_features,
                    feature_scale,
                    config,
                    accelerator,
                    record,
                )
                terms["ot"] = config.ot_weight * transport
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
            bank = make_reference_bank(feature_extractor, images, config.num_reference_samples)
            unet = accelerator.unwrap_model(state.model, keep_torch_compile=False)
            make_pipeline(unet, scheduler, feature_extractor, bank, classes).save_pretrained(folder)
            if coupling is not None:
                coupling.save_pretrained(folder / "coupling")
    save_results(state, config, schedule, accelerator)
    save_sample_grid(state, scheduler, config, accelerator, classes)
    end_run(config, accelerator, state.stopped_by)


def ot_term(
    model_output: Tensor,
    batch: DiffusionBatch,
    scheduler: Scheduler,
    feature_extractor: FeatureExtractor,
    training_features: Tensor,
    feature_scale: float,
    config: OTConfig,
    accelerator: Accelerator,
    record: Record | None = None,
) -> Tensor:
    """S(features of x̂0, features of references), one problem over all processes."""
    # 1. The clean images that the model's output implies, and their features.
    prediction_type = prediction_type_of(scheduler)
    pred_original_sample = to_original_sample(
        model_output.float(), batch.noisy, batch.alpha, batch.sigma, prediction_type
    )
    features = image_features(feature_extractor, pred_original_sample, config.squash)

    # 2. References that no process has in its batch.
    generator = keyed_generator(training_features.device, config.seed, "references", batch.update)
    references = training_features[
        disjoint_reference_indices(
            len(training_features), batch.global_indices, config.num_reference_samples, generator
        )
    ]

    if record is not None:
        record.compare_spread(features, references)

    # 3. The divergence; images are weighted by their clipped signal-to-noise ratio.
    weights = min_snr_weight(batch.alpha, batch.sigma) if config.snr_weighting else None
    return ot_loss(
        gather_rows(features, accelerator) / feature_scale,
        references / feature_scale,
        blur=config.blur,
        scaling=config.scaling,
        sample_weights=gather_rows(weights, accelerator) if weights is not None else None,
        backend=config.ot_backend,
        num_iterations=config.ot_iterations,
    )


if __name__ == "__main__":
    run_script(main, OTConfig, __doc__)
