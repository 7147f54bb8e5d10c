"""Guided chains as training data: what a guided sampler gave its scheduler, for the network to predict by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import Tensor

from ..cache import read_verified, save_aside
from ..config import DistilledConfig
from ..errors import InputError, TrainingError, require
from ..features import check_trained_on, load_feature_extractor, make_reference_bank
from ..pipelines.pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from ..sampling import load_pipeline
from ..seeds import keyed_generator
from .batches import Images, Schedule, index_batches

CHAINS = "guided_chains.safetensors"
"""Name of the recorded chains in the run's folder."""


class RecordingScheduler(DDIMScheduler):
    """DDIM that keeps what its steps were given: x_t, t and the model output."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **arguments: Any) -> Any:
        self.recorded.append((sample, int(timestep), model_output))
        return super().step(model_output, timestep, sample, **arguments)

    def set_timesteps(self, *arguments: Any, **named: Any) -> None:
        self.recorded: list[tuple[Tensor, int, Tensor]] = []
        super().set_timesteps(*arguments, **named)


@dataclass(frozen=True)
class GuidedChains:
    """N guided chains of S steps.

    Attributes:
        samples: x_t before each step, [S, N, C, H, W].
        timesteps: t of each step, [S].
        targets: the model output after the correction of x̂0, in the scheduler's prediction type, [S, N, C, H, W].
    """

    samples: Tensor
    timesteps: Tensor
    targets: Tensor


def load_teacher(config: DistilledConfig, images: Images, accelerator: Accelerator) -> OTGuidedDDIMPipeline:
    """The trained pipeline, with the feature network and the references that guide it where that is to be learnt.

    Raises:
        InputError: no such pipeline or network, one of other images, or another length of the chain.
    """
    try:
        pipeline = load_pipeline(config.teacher)
    except InputError as error:
        raise InputError(str(error).replace("`pipeline`", "`teacher`")) from error
    length = pipeline.scheduler.config.num_train_timesteps
    fits = config.num_train_timesteps == length
    require(fits, "num_train_timesteps", f"be {length}, as in the teacher's chain", config.num_train_timesteps)
    size = pipeline.unet.config.sample_size
    shape = (pipeline.unet.config.in_channels, size, size)
    require(shape == images.image_shape, "teacher", f"be trained on images of shape {images.image_shape}", shape)
    scheduler = RecordingScheduler.from_config(pipeline.scheduler.config)
    if config.distillation_weight == 0:
        return OTGuidedDDIMPipeline(pipeline.unet, scheduler).to(accelerator.device)
    network = load_feature_extractor(config.feature_extractor).to(accelerator.device)
    check_trained_on(network, images)
    bank = make_reference_bank(network, images, config.num_reference_samples)
    return OTGuidedDDIMPipeline(pipeline.unet, scheduler, network, bank).to(accelerator.device)


def guided_chains(teacher: OTGuidedDDIMPipeline, config: DistilledConfig, accelerator: Accelerator) -> GuidedChains:
    """The chains of the run, on the training device: recorded by its first process, kept in its folder, read by all.

    Raises:
        TrainingError: the file does not keep what is written to it.
    """
    file = Path(config.output_dir) / CHAINS
    if accelerator.is_main_process and read_verified(file) is None:
        chains = record_chains(teacher, config)
        save_aside({name: getattr(chains, name) for name in GuidedChains.__annotations__}, file)
    accelerator.wait_for_everyone()
    found = read_verified(file)
    if found is None:
        raise TrainingError(f"the guided chains in {str(file)!r} are not as they were written")
    return GuidedChains(**{name: tensor.to(accelerator.device) for name, tensor in found.items()})


@torch.no_grad()
def record_chains(teacher: OTGuidedDDIMPipeline, config: DistilledConfig) -> GuidedChains:
    """Sample the teacher with guidance, as one joint batch from noise of the run's seed."""
    teacher.set_progress_bar_config(disable=True)
    teacher(
        batch_size=config.num_distilled_samples,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        pixel_weight=config.pixel_weight,
        generator=keyed_generator("cpu", config.seed, "guided chains"),
        output_type="latent",
    )
    samples, timesteps, targets = zip(*teacher.scheduler.recorded, strict=True)
    return GuidedChains(torch.stack(samples), torch.tensor(timesteps), torch.stack(targets))


def chain_batches(
    chains: GuidedChains,
    images: Images,
    config: DistilledConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x_t, t, target) for each forward pass from update `start` on: as many rows as it has images, each a random step
    of a random chain. As with the data, the draws are those of a global batch, of which a process takes its share."""
    device = chains.samples.device
    for update, indices, part in index_batches(images, config, schedule, accelerator, start):
        generator = keyed_generator(device, config.seed, "distillation", update)
        steps, rows = (
            torch.randint(count, (len(indices),), generator=generator, device=device)[part]
            for count in chains.samples.shape[:2]
        )
        yield chains.samples[steps, rows], chains.timesteps[steps], chains.targets[steps, rows]
