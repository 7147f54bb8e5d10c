"""The parts of `__call__` that both pipelines share: input checks, scheduler arguments, pictures."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor

from ..errors import require

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def initial_shape(
    unet: UNet2DModel,
    batch_size: int,
    generator: torch.Generator | list[torch.Generator] | None,
    num_inference_steps: int,
    output_type: str,
) -> tuple[int, int, int, int]:
    """[B, C, H, W] of the latents, after the checks that every call needs."""
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    require(num_inference_steps >= 1, "num_inference_steps", "be at least 1", num_inference_steps)
    require(output_type in OUTPUT_TYPES, "output_type", f"be one of {', '.join(OUTPUT_TYPES)}", output_type)
    if isinstance(generator, list):
        require(
            len(generator) == batch_size, "generator", f"hold one generator per image ({batch_size})", len(generator)
        )
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return batch_size, unet.config.in_channels, height, width


def preserves_variance(scheduler: Any) -> bool:
    """Whether x_t = α_t x0 + σ_t ε and x_T ~ N(0, I); Euler, Heun and flow schedulers scale otherwise."""
    return hasattr(scheduler, "alphas_cumprod") and float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0


def extra_step_arguments(scheduler: Any, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that `scheduler.step` knows."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in arguments.items() if name in known}


def finish_images(latents: Tensor, output_type: str) -> Any:
    """Latents in [-1, 1] as `"pt"` [B, C, H, W] or `"np"` [B, H, W, C] in [0, 1], or as a list of `"pil"` images.

    `"latent"` gives them back as they are.
    """
    if output_type == "latent":
        return latents
    images = (latents / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    pixels = images.cpu().permute(0, 2, 3, 1).float().numpy()
    return DiffusionPipeline.numpy_to_pil(pixels) if output_type == "pil" else pixels
