"""Times of pipelines and bare loops, of guided and plain sampling, and of truncated and full chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from ot_diffusers import ConvFeatureExtractor, OTGuidedDDIMPipeline, ReferenceBank, TruncatedPriorPipeline
from ot_diffusers.config import BaselineConfig
from ot_diffusers.evaluation.metrics import frechet_distance
from ot_diffusers.models.prior import PriorGenerator
from ot_diffusers.sampling import accelerate_networks, is_emulated, load_pipeline, sample_images
from ot_diffusers.schedules import truncated_scheduler
from ot_diffusers.training import make_unet

from .timing import Row, interleave, ratio_row, wait_rows
from .training import images_like_mnist

DIGITS = Path(__file__).parents[1] / "model_cards" / "digits-ot-guided"
BATCH_SIZE = 4
"""Length of the long chains, with small UNets, where the overhead around the network weighs most."""

SHORT_CHAINS = 10
"""Truncated chains for each long one: the time of a single short chain varies too much."""


def rows(quick: bool, device: torch.device) -> Iterator[Row]:
    for part in (guidance_rows, precision_rows, quality_rows, chain_rows):
        yield from part(quick, device)


def unet_of(widths: tuple[int, ...], device: torch.device, **options: object) -> UNet2DModel:
    torch.manual_seed(0)
    config = BaselineConfig(block_out_channels=widths, **options)  # type: ignore[arg-type]
    return make_unet(config, (1, 28, 28)).to(device).eval()


def guidance_rows(quick: bool, device: torch.device) -> Iterator[Row]:
    """Joint guidance and a guidance field with the UNet of the MNIST preset and 2,000 references.

    On a CPU with a smaller batch and fewer steps, of which the same share is guided.
    """
    unet = unet_of((32, 32), device, attention_levels=()) if quick else unet_of((64, 128, 256), device)
    network = ConvFeatureExtractor().to(device)
    references = images_like_mnist(2000).to(device).fetch(torch.arange(2000))
    features = network.extract(references)
    scale = float(torch.pdist(features[:500]).median())
    bank = ReferenceBank.from_features(features, feature_scale=scale, images=references).to(device)
    guided = OTGuidedDDIMPipeline(unet, DDIMScheduler(), network, bank)
    fast = device.type == "cuda"
    call: dict[str, Any] = {
        "batch_size": 500 if fast else 16 if quick else 64,
        "num_inference_steps": 50 if fast else 12,
        "output_type": "pt",
    }
    guided.set_progress_bar_config(disable=True)
    guided.record_guidance_field(500 if fast else 64, num_inference_steps=call["num_inference_steps"])
    candidates: dict[str, Callable[[], object]] = {
        "plain": lambda: guided(guidance_scale=0, **call),
        "joint batch": lambda: guided(joint_batch=True, **call),
        "guidance field": lambda: guided(**call),
    }
    seconds = interleave(candidates, 2 if fast or quick else 3)
    title = f"{call['batch_size']} images, {call['num_inference_steps']} steps"
    for name in ("joint batch", "guidance field"):
        yield ratio_row(f"OT-guided DDIM, {name} / plain DDIM, {title}", seconds, name, "plain", target=1.1)
    yield from wait_rows({f"DDIM, {name}, {title}": run for name, run in candidates.items()})


def precision_rows(quick: bool, device: torch.device) -> list[Row]:
    """On a GPU: the UNet of the MNIST preset under autocast, in both memory layouts."""
    if device.type != "cuda" or quick:
        return []
    candidates: dict[str, Callable[[], object]] = {}
    for name, dtype, channels_last in (
        ("float32", "float32", False),
        ("bfloat16", "bfloat16", False),
        ("bfloat16, channels last", "bfloat16", True),
        ("float16, channels last", "float16", True),
    ):
        pipe = OTGuidedDDIMPipeline(unet_of((64, 128, 256), device), DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        accelerate_networks(pipe, channels_last=channels_last)
        candidates[name] = partial(sample_images, pipe, 500, dtype=dtype, num_inference_steps=20)
    seconds = interleave(candidates, 3)
    return [
        ratio_row(f"DDIM-20 with float32 networks / {name}", seconds, "float32", name)
        for name in candidates
        if name != "float32"
    ]


def quality_rows(quick: bool, device: torch.device) -> list[Row]:
    """The effect of a lower precision on the images of a trained model, from the same noise."""
    pipe = load_pipeline(DIGITS).to(device)
    pipe.set_progress_bar_config(disable=True)
    count = 50 if quick else 200
    draw = partial(sample_images, pipe, count, num_inference_steps=20, guidance_scale=0)
    exact, other = draw(), draw(seed=1)
    differences = []
    dtypes = ("bfloat16",) if device.type == "cpu" else ("bfloat16", "float16")
    for dtype in (name for name in dtypes if not is_emulated(name, device)):
        images = draw(dtype=dtype)
        difference = (images.int() - exact.int()).abs().float()
        figure = difference.mean().item()
        details = {
            "largest difference of a grey level": difference.max().item(),
            "Fréchet distance of pixels to float32": pixel_distance(images, exact),
            "Fréchet distance of pixels between two draws in float32": pixel_distance(other, exact),
        }
        name = f"{dtype} against float32, {count} digits in 20 steps: mean difference of a pixel"
        differences.append(Row(name, figure, (figure, figure), unit=" of 255", details=details))
    return differences


def pixel_distance(images: Tensor, reference: Tensor) -> float:
    """Fréchet distance of uint8 images, as vectors of grey levels in [0, 1]."""
    return frechet_distance(images.flatten(1) / 255, reference.flatten(1) / 255)


def chain_rows(quick: bool, device: torch.device) -> list[Row]:
    """Our pipeline without guidance compared with a bare loop of UNet and scheduler calls, and ten steps from a prior
    compared with the full chain; with a small UNet on one CPU thread, where the overhead weighs most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _chain_rows(100 if quick else 1000, device)
    finally:
        torch.set_num_threads(threads)


def _chain_rows(length: int, device: torch.device) -> list[Row]:
    unet = unet_of((32, 32), device, attention_levels=(), layers_per_block=1)
    pipe = OTGuidedDDIMPipeline(unet, DDIMScheduler())
    prior = PriorGenerator(
        truncation_timestep=10, sample_size=28, out_channels=1, latent_dim=256, block_out_channels=(256, 128, 64)
    )
    short = TruncatedPriorPipeline(prior.to(device), unet, truncated_scheduler(DDIMScheduler(), 10))
    for pipeline in (pipe, short):
        pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def bare(steps: int) -> None:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(steps)
        sample = torch.randn((BATCH_SIZE, 1, 28, 28), device=device)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(unet(sample, timestep).sample, timestep, sample).prev_sample

    def whole(steps: int) -> object:
        return pipe(batch_size=BATCH_SIZE, num_inference_steps=steps, output_type="pt")

    brief = interleave({"bare loop": partial(bare, 10), "pipeline": partial(whole, 10)}, 15)
    candidates: dict[str, Callable[[], object]] = {
        "bare loop": partial(bare, length),
        "pipeline": partial(whole, length),
        "T' = 10": lambda: [short(batch_size=BATCH_SIZE, output_type="pt") for _ in range(SHORT_CHAINS)],
    }
    long = interleave(candidates, 4)
    long["T' = 10"] = [seconds / SHORT_CHAINS for seconds in long["T' = 10"]]
    return [
        ratio_row("pipeline / bare loop, 10 steps", brief, "pipeline", "bare loop", target=1.03),
        ratio_row(f"pipeline / bare loop, {length} steps", long, "pipeline", "bare loop", target=1.03),
        ratio_row(
            f"full chain of {length} steps / truncated at T' = 10",
            long,
            "pipeline",
            "T' = 10",
            target=length / 1000 * 90,
            at_least=True,
        ),
    ]
