"""Latent diffusion: the images that a VAE decodes latents to, and the pipelines of diffusers that work on latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..schedules import Scheduler

SAME_PARTS = {"transformer": "unet", "vqvae": "vae"}
"""Names of parts in diffusers' `DiTPipeline` and `LDMPipeline`, and here."""
TEXT_PARTS = ("text_encoder", "tokenizer")
"""Beginnings of the names of parts that read a text."""
ABSENT = (None, [None, None], (None, None))
"""Parts that a pipeline does without, as they are in its components and in its `model_index.json`."""
DECODED_VALUES = 4 * 3 * 256 * 256
"""Pixel values that are decoded at once: 4 images of 256 × 256 in colour."""


def check_has_no_text(parts: Mapping[str, Any], class_name: str) -> None:
    """Refuse a pipeline if one of its parts reads a text.

    Args:
        parts: parts by name, or the entries of a `model_index.json`.
        class_name: name of the pipeline's class.

    Raises:
        InputError: such a part.
    """
    reads_text = any(name.startswith(TEXT_PARTS) for name, part in parts.items() if part not in ABSENT)
    require(not reads_text, "pipeline", "be unconditional or conditioned on classes, not on text", class_name)


def check_vae(vae: Any, latent_shape: Sequence[int]) -> None:
    """Refuse a VAE whose latents have other channels than those of the denoiser, [c, h, w].

    Raises:
        InputError: naming both.
    """
    channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
    requirement = f"have latents of {latent_shape[0]} channels, as the denoiser has"
    require(channels == latent_shape[0], "vae", requirement, channels)


def decoded_shape(vae: Any, latent_shape: Sequence[int]) -> tuple[int, int, int]:
    """[C, H, W] of the images that latents of shape [c, h, w] are decoded to."""
    enlargement = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (enlargement * side for side in latent_shape[1:])
    return vae.config.out_channels, height, width


def decode(vae: Any, latents: Tensor, *, quantize: bool = True) -> Tensor:
    """Images of the latents of a denoiser, [B, C, H, W], nominally in [-1, 1], in the dtype of the VAE.

    Args:
        vae: `VQModel` or `AutoencoderKL`.
        latents: [B, c, h, w], in the units of the denoiser.
        quantize: whether a `VQModel` replaces latents by those of its codebook. Without it the images are a smooth
            function of the latents.
    """
    config = vae.config
    latents = latents.to(vae.dtype) / config.scaling_factor
    if config.get("latents_std") is not None:
        latents = latents * _per_channel(config.latents_std, latents)
    if config.get("latents_mean") is not None:
        latents = latents + _per_channel(config.latents_mean, latents)
    if config.get("shift_factor"):
        latents = latents + config.shift_factor
    options = {} if quantize or "num_vq_embeddings" not in config else {"force_not_quantize": True}
    return vae.decode(latents, **options).sample


def decode_batch_size(vae: Any, image_shape: Sequence[int]) -> int:
    """Images of this shape that are decoded at once: as `DECODED_VALUES` allows, or 1 after `vae.enable_slicing()`."""
    return 1 if getattr(vae, "use_slicing", False) else max(1, DECODED_VALUES // math.prod(image_shape))


def latent_bound(scheduler: Scheduler) -> float:
    """Bound of |x̂0| that the scheduler sets on latents; infinite without `clip_sample`."""
    clips = scheduler.config.get("clip_sample", False)
    return float(scheduler.config.get("clip_sample_range", 1.0)) if clips else math.inf


def _per_channel(values: Sequence[float], latents: Tensor) -> Tensor:
    return torch.tensor(values).to(latents).view(1, -1, 1, 1)
