"""The training step with and without the transport term, with and without data loading, and the memory of few-step
tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from ot_diffusers import ConvFeatureExtractor
from ot_diffusers.config import BaselineConfig, FewStepConfig, OTConfig, load_config
from ot_diffusers.data import ResidentImages, load_images
from ot_diffusers.images import to_unit_range
from ot_diffusers.launch.commands import preset_path
from ot_diffusers.losses.denoising import denoising_loss, image_features
from ot_diffusers.losses.priors import network_features
from ot_diffusers.schedules import Chain, to_original_sample
from ot_diffusers.training import (
    DiffusionBatch,
    diffusion_batches,
    make_noise_scheduler,
    make_optimizer,
    make_schedule,
    make_unet,
)
from ot_diffusers.training.few_step import ComparedLevels, few_step_batches, few_step_schedule, surrogate
from ot_diffusers.transport import median_distance
from train.train_ot import ot_term

from .timing import Row, interleave, peak_memory_mib, ratio_row, wait_rows

NUM_IMAGES = 10_000
TERM: dict[str, Any] = {"prediction_type": "epsilon", "noise_coupling": "independent", "ot_weight": 0.03}
"""The transport term beside noise prediction, whose cost is measured."""


def rows(quick: bool, device: torch.device) -> Iterator[Row]:
    yield from step_rows(quick, device)
    yield loading_row(quick, device)
    if device.type == "cpu":
        yield tuning_memory_row(quick)


def configuration(quick: bool) -> OTConfig:
    """UNet and batch size of the MNIST preset, or small ones with `quick`."""
    if quick:
        return OTConfig(
            block_out_channels=(32, 32), attention_levels=(), train_batch_size=16, num_reference_samples=500, **TERM
        )
    return OTConfig(block_out_channels=(64, 128, 256), train_batch_size=128, num_reference_samples=2000, **TERM)


def images_like_mnist(count: int = NUM_IMAGES) -> ResidentImages:
    """Random images in the shape of MNIST: the cost does not depend on their content."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return ResidentImages("random", "train", None, pixels)


class Step:
    """Model, optimizer and an endless stream of batches, as in train_ot.py."""

    def __init__(self, config: OTConfig, device: torch.device) -> None:
        self.config = config
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        torch.manual_seed(0)
        self.images = images_like_mnist().to(device)
        self.unet: UNet2DModel = make_unet(config, self.images.image_shape).to(device)
        self.optimizer = make_optimizer(config, self.unet)
        self.scheduler: DDPMScheduler = make_noise_scheduler(config)
        self.network = ConvFeatureExtractor().to(device)
        with torch.no_grad():
            everything = self.images.fetch(torch.arange(len(self.images)))
            self.features = image_features(self.network, everything, config.squash)
        self.feature_scale = median_distance(self.features)
        self.schedule = make_schedule(config, self.accelerator, self.images)
        self.batches = self.new_batches()

    def new_batches(self) -> Iterator[DiffusionBatch]:
        return diffusion_batches(self.images, self.scheduler, self.config, self.schedule, self.accelerator)

    def run(self, term: Callable[..., Tensor] | None = None) -> None:
        """One training step on the next batch."""
        batch = next(self.batches)
        output = self.unet(batch.noisy, batch.timesteps).sample
        loss = denoising_loss(output, batch.target)
        if term is not None:
            loss = loss + self.config.ot_weight * term(output, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ours(self, output: Tensor, batch: DiffusionBatch, num_iterations: int | None = None) -> Tensor:
        """The term of train_ot.py, converged or with a fixed number of iterations."""
        config = dataclasses.replace(self.config, ot_iterations=num_iterations)
        common = (self.scheduler, self.network, self.features, self.feature_scale, config, self.accelerator)
        return ot_term(output, batch, *common)

    def original(self, output: Tensor, batch: DiffusionBatch) -> Tensor:
        """The term of the original study: references drawn through a Python set and passed through the network at every
        step, geomloss on raw features at its default scaling."""
        import random

        from geomloss import SamplesLoss

        left = list(set(range(len(self.images))) - set(batch.global_indices.tolist()))
        rows = torch.tensor(random.sample(left, self.config.num_reference_samples))
        with torch.no_grad():
            references = self.network(to_unit_range(self.images.fetch(rows).tanh())).features
        clean = to_original_sample(output, batch.noisy, batch.alpha, batch.sigma, "epsilon")
        features = self.network(to_unit_range(clean.tanh())).features
        return SamplesLoss("sinkhorn", p=2, blur=0.2)(features.float(), references.float())


def step_rows(quick: bool, device: torch.device) -> Iterator[Row]:
    """Training steps with noise prediction alone, with our term, and with the term of the original study."""
    step = Step(configuration(quick), device)
    candidates = {
        "plain": step.run,
        "with our term": lambda: step.run(step.ours),
        "with 20 steps": lambda: step.run(partial(step.ours, num_iterations=20)),
        "with the original study's term": lambda: step.run(step.original),
    }
    seconds = interleave(candidates, 3 if quick or device.type == "cpu" else 20)
    target = 1.05 if device.type == "cuda" else 1.15
    yield ratio_row("OT training step / plain step", seconds, "with our term", "plain", target=target)
    yield ratio_row("OT training step with ot_iterations=20 / plain step", seconds, "with 20 steps", "plain")
    yield ratio_row(
        "the original study's training step / plain step", seconds, "with the original study's term", "plain"
    )
    yield from wait_rows({f"training step, {name}": run for name, run in candidates.items()})


def loading_row(quick: bool, device: torch.device) -> Row:
    """Training steps on a stream of batches compared with steps on one resident batch.

    On a CPU with a small UNet, which is the harder case; on a GPU with the UNet of the MNIST preset, because kernel
    launches would leave it idle with a small one.
    """
    small = OTConfig(block_out_channels=(32, 32), attention_levels=(), layers_per_block=1, train_batch_size=128, **TERM)
    step = Step(small if device.type == "cpu" else configuration(quick), device)
    resident = next(step.batches)

    def updates(batches: Iterator[DiffusionBatch]) -> None:
        for _ in range(1 if quick else 3):
            batch = next(batches)
            F.mse_loss(step.unet(batch.noisy, batch.timesteps).sample, batch.target).backward()
            step.optimizer.step()
            step.optimizer.zero_grad()

    def repeated() -> Iterator[DiffusionBatch]:
        while True:
            yield resident

    candidates = {"streamed": lambda: updates(step.batches), "one batch": lambda: updates(repeated())}
    seconds = interleave(candidates, 3 if quick else 7)
    return ratio_row("images/s streamed / on one batch", seconds, "one batch", "streamed", target=0.97, at_least=True)


def tuning_memory_row(quick: bool) -> Row:
    """The peak memory of few-step tuning by many images, in passes of a small batch, compared with a plain training
    step of that batch: a fresh process each, with all that it imports, and the UNet of the digits."""
    generated, batch = (64, 16) if quick else (4096, 256)
    mib = {
        name: peak_memory_mib(f"from benchmarks.training import digits_step\ndigits_step({arguments})")
        for name, arguments in {"plain": f"{batch}", "tuning": f"{batch}, {generated}"}.items()
    }
    name = f"peak memory of tuning by {generated:,} images in passes of {batch} / of a plain step of {batch}, digits"
    ratio = mib["tuning"] / mib["plain"]
    return Row(name, ratio, (ratio, ratio), target=1.2, details={f"MiB, {key}": round(mib[key]) for key in mib})


def digits_step(batch: int, generated: int = 0) -> None:
    """One update of the digits' UNet: few-step tuning by `generated` images in passes of `batch`, or without any a
    plain step on `batch` images."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=max(1, generated // batch))
    images = load_images("digits", "train")
    config = FewStepConfig(train_batch_size=batch, max_train_steps=1)
    preset = load_config(BaselineConfig, ["--config", str(preset_path("digits/baseline.yaml"))])
    unet = make_unet(preset, images.image_shape)
    optimizer = make_optimizer(config, unet)
    if generated:
        chain, schedule = Chain.of(FlowMatchEulerDiscreteScheduler(), 1), few_step_schedule(config, accelerator, images)
        levels = digits_levels(config, images.fetch(torch.arange(1000)))
        for part in few_step_batches(images, unet, chain, levels, config, schedule, accelerator, 0):
            surrogate(levels(chain(unet, part.noise)), part, schedule).backward()
    else:
        clean = images.fetch(torch.arange(batch))
        F.mse_loss(unet(torch.randn_like(clean), torch.arange(batch)).sample, clean).backward()
    optimizer.step()


@torch.no_grad()
def digits_levels(config: FewStepConfig, images: Tensor) -> ComparedLevels:
    """The levels of a feature network like that of the digits, without its training."""
    network = ConvFeatureExtractor(sample_size=8).requires_grad_(False)
    weights = (config.shallow_weight, config.pixel_weight)
    unscaled = ComparedLevels(partial(network_features, network), (), *weights, torch.device("cpu"))
    return dataclasses.replace(unscaled, scales=tuple(median_distance(level) for level in unscaled.raw(images)))
