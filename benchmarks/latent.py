"""The memory of guidance through the decoder of a VAE, by the number of latents that are decoded at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL

from ot_diffusers import ConvFeatureExtractor, OTGuidance, ReferenceBank
from ot_diffusers.pipelines.latents import decode

from .timing import Row, peak_memory_mib

SMALL, LARGE = (32, 64, 64), (128, 256, 512, 512)
"""Widths of a small VAE, and of the one of published DiT and Stable Diffusion models."""


def rows(quick: bool, device: torch.device) -> list[Row]:
    """A correction of 64 latents by a small decoder, and of one by a large one; a fresh process on the CPU each."""
    if quick:
        return [memory_row(SMALL, 16, 4, at_once) for at_once in (4, 2)]
    small = [memory_row(SMALL, 64, 64, at_once) for at_once in (64, 16, 4)]
    return [*small, memory_row(LARGE, 256, 1, 1)]


def memory_row(widths: tuple[int, ...], image_size: int, count: int, at_once: int) -> Row:
    """The growth of memory in one correction of `count` latents, of which `at_once` are decoded together."""
    code = f"from benchmarks.latent import correct\ncorrect({widths}, {image_size}, {count}, {at_once}, start)"
    mib = peak_memory_mib(code)
    decoder = "a large decoder" if widths == LARGE else "a small decoder"
    images = "one image" if count == 1 else f"{count} images, {at_once} at once"
    name = f"peak memory of guidance through {decoder}, {image_size}×{image_size}, {images}"
    return Row(name, mib, (mib, mib), unit=" MiB")


def correct(widths: tuple[int, ...], image_size: int, count: int, at_once: int, start: Callable[[], None]) -> None:
    """One correction with untrained networks and 256 references."""
    options: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    vae = AutoencoderKL(**options, block_out_channels=widths, layers_per_block=2, latent_channels=4).eval()
    side = image_size // 2 ** (len(widths) - 1)
    network = ConvFeatureExtractor(sample_size=image_size, in_channels=3)
    images = torch.rand(256, 3, image_size, image_size) * 2 - 1
    bank = ReferenceBank.from_features(torch.rand(256, network.config.feature_dim), images=images)
    options = {"decode": partial(decode, vae), "decode_batch_size": at_once, "num_correction_steps": 1}
    guidance = OTGuidance(network, bank, **options)
    latents = torch.randn(count, 4, side, side)
    start()
    guidance.correct(latents)
