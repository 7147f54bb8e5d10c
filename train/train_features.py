"""Train a feature network by classification, and save it with the features of a reference set.

    accelerate launch train/train_features.py --config configs/mnist/features.yaml output_dir=runs/mnist-features

`architecture=conv` makes the network for losses and guidance, `architecture=residual` the independent evaluator.
`load_feature_extractor(output_dir)` and `load_reference_bank(output_dir)` of `ot_diffusers.features` open the run's
folder; the test accuracy is in `results.json`. Expected on MNIST: at least 99.0%.

The evaluator of CIFAR-10 needs a GPU (`accelerate launch --dynamo_backend inductor` also compiles it).
"""

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler

from ot_diffusers.config import FeaturesConfig
from ot_diffusers.data import SPLITS, to_unit_range
from ot_diffusers.features import (
    classification_accuracy,
    labels_of,
    make_feature_extractor,
    make_feature_optimizer,
    make_reference_bank,
)
from ot_diffusers.launch import launched, run_script
from ot_diffusers.training import (
    Record,
    TrainingState,
    check_output_dir,
    end_run,
    image_batches,
    load_splits,
    make_accelerator,
    make_schedule,
    open_run,
    resume,
    save_checkpoint,
    save_results,
    saved_model,
)


def main(config: FeaturesConfig) -> None:
    """One run, from the checked configuration to the saved network."""
    # Accelerator and data.
    config = launched(config)
    check_output_dir(config)
    accelerator = make_accelerator(config)
    images, validation_images, test_images = load_splits(config, accelerator, *SPLITS)
    schedule = make_schedule(config, accelerator, images)

    # Model.
    network = make_feature_extractor(config, images).requires_grad_(True)
    labels, *_ = (labels_of(part).to(accelerator.device) for part in (images, validation_images, test_images))

    # Optimizer; resume.
    optimizer = make_feature_optimizer(config, network)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=schedule.num_updates,
    )
    model, optimizer = accelerator.prepare(network.train(), optimizer)
    state = TrainingState(model, optimizer, lr_scheduler)
    open_run(config, accelerator, images)
    resume(state, config, accelerator)
    record = Record(config, schedule, accelerator, state)

    # Loop.
    for _, indices, part, batch in image_batches(images, config, schedule, accelerator, start=state.update):
        batch = batch.contiguous(memory_format=torch.channels_last)  # the layout of tensor cores
        with accelerator.accumulate(state.model):
            _, logits = state.model(to_unit_range(batch), return_dict=False)
            targets = labels[indices[part].to(labels.device, non_blocking=True)]
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
            state.backward(accelerator, loss, config.max_grad_norm)
        record.add(loss=loss)

        if accelerator.sync_gradients and schedule.ends_epoch(state.update):
            validation = classification_accuracy(
                accelerator.unwrap_model(state.model, keep_torch_compile=False), validation_images
            )
            record.end_epoch(validation_accuracy=validation)
        if accelerator.sync_gradients and schedule.wants_checkpoint(state.update, config):
            save_checkpoint(state, config, accelerator)
        if accelerator.sync_gradients and record.should_stop():
            break

    # Save.
    record.close()
    save_checkpoint(state, config, accelerator)
    # Without mixed precision, in which the features of generated images are computed too.
    network = accelerator.unwrap_model(state.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    network.eval().requires_grad_(False)
    test_accuracy = classification_accuracy(network, test_images)
    if accelerator.is_main_process:
        bank = make_reference_bank(network, images, config.num_reference_samples)
        with saved_model(config) as folder:
            network.save_pretrained(folder / "feature_extractor")
            bank.save_pretrained(folder / "reference_bank")
    save_results(state, config, schedule, accelerator, test_accuracy=test_accuracy)
    accelerator.print(f"test accuracy {test_accuracy:.2%}", flush=True)
    end_run(config, accelerator, state.stopped_by)


if __name__ == "__main__":
    run_script(main, FeaturesConfig, __doc__)
