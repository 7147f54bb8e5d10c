"""The pipelines against bare loops, guidance against none, the truncated chain against the full one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from ot_diffusers import ConvFeatureExtractor, OTGuidedDDIMPipeline, ReferenceBank, TruncatedPriorPipeline
from ot_diffusers.config import BaselineConfig
from ot_diffusers.models.prior import PriorGenerator
from ot_diffusers.schedules import truncated_scheduler
from ot_diffusers.training import make_unet

from .timing import Row, interleave, ratio_row
from .training import images_like_mnist

BATCH_SIZE = 4
"""Of the long chains, on small UNets: what surrounds the network weighs most there."""


def rows(quick: bool, device: torch.device) -> list[Row]:
    return [*guidance_rows(quick, device), *pipeline_rows(quick, device), truncation_row(quick, device)]


def unet_of(widths: tuple[int, ...], device: torch.device, **options: object) -> UNet2DModel:
    torch.manual_seed(0)
    config = BaselineConfig(block_out_channels=widths, **options)  # type: ignore[arg-type]
    return make_unet(config, (1, 28, 28)).to(device).eval()


def guidance_rows(quick: bool, device: torch.device) -> list[Row]:
    """A joint batch of 64 (1,000 on a GPU) with the MNIST preset's UNet and 2,000 references; fewer steps on the CPU,
    where the share of guided ones is the same."""
    unet = unet_of((32, 32), device, attention_levels=()) if quick else unet_of((64, 128, 256), device)
    network = ConvFeatureExtractor().to(device)
    features = network.extract(images_like_mnist(2000).to(device).fetch(torch.arange(2000)))
    bank = ReferenceBank.from_features(features, feature_scale=float(torch.pdist(features[:500]).median())).to(device)
    guided = OTGuidedDDIMPipeline(unet, DDIMScheduler(), network, bank)
    plain = DDIMPipeline(unet, DDIMScheduler())
    fast = device.type == "cuda"
    call: dict[str, Any] = {
        "batch_size": 1000 if fast else 16 if quick else 64,
        "num_inference_steps": 50 if fast else 12,
    }
    for pipe in (guided, plain):
        pipe.set_progress_bar_config(disable=True)
    candidates = {"plain": lambda: plain(**call), "guided": lambda: guided(**call)}
    seconds = interleave(candidates, 3)
    name = f"OT-guided DDIM / plain DDIM, {call['batch_size']} images, {call['num_inference_steps']} steps"
    return [ratio_row(name, seconds, "guided", "plain", target=1.1)]


def pipeline_rows(quick: bool, device: torch.device) -> list[Row]:
    """Our pipeline without guidance against a loop of UNet and scheduler calls only."""
    unet = unet_of((32, 32), device, attention_levels=(), layers_per_block=1)
    pipe = OTGuidedDDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def bare(steps: int) -> None:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(steps)
        sample = torch.randn((BATCH_SIZE, 1, 28, 28), device=device)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(unet(sample, timestep).sample, timestep, sample).prev_sample

    found = []
    for steps in (10,) if quick else (10, 1000):
        candidates: dict[str, Callable[[], object]] = {
            "bare loop": partial(bare, steps),
            "pipeline": partial(pipe, batch_size=BATCH_SIZE, num_inference_steps=steps, output_type="pt"),
        }
        seconds = interleave(candidates, 3 if steps > 10 else 7)
        found.append(ratio_row(f"pipeline / bare loop, {steps} steps", seconds, "pipeline", "bare loop", target=1.03))
    return found


def truncation_row(quick: bool, device: torch.device) -> Row:
    """Ten steps from a learned prior against the thousand of the full chain."""
    unet = unet_of((32, 32), device, attention_levels=(), layers_per_block=1)
    prior = PriorGenerator(
        truncation_timestep=10, sample_size=28, out_channels=1, latent_dim=256, block_out_channels=(256, 128, 64)
    )
    short = TruncatedPriorPipeline(prior.to(device), unet, truncated_scheduler(DDIMScheduler(), 10))
    full = DDIMPipeline(unet, DDIMScheduler())
    for pipe in (short, full):
        pipe.set_progress_bar_config(disable=True)
    batch_size, steps = BATCH_SIZE, 100 if quick else 1000
    candidates = {
        "T' = 10": lambda: short(batch_size=batch_size, output_type="pt"),
        f"{steps} steps": lambda: full(batch_size=batch_size, num_inference_steps=steps, output_type="np"),
    }
    seconds = interleave(candidates, 3)
    name = f"full chain of {steps} steps / truncated at T' = 10"
    return ratio_row(name, seconds, f"{steps} steps", "T' = 10", target=steps / 1000 * 90, at_least=True)
