"""Tiny untrained networks and pipelines for images like the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from ot_diffusers import (
    ConvFeatureExtractor,
    OTGuidedDDIMPipeline,
    PriorGenerator,
    ReferenceBank,
    TruncatedPriorPipeline,
    truncated_scheduler,
)
from ot_diffusers.data import load_images


def make_unet(kind: type = UNet2DModel, *, seed: int | None = None, **options: Any) -> Any:
    """A UNet of one block, or of one for each of `block_out_channels`."""
    if seed is not None:
        torch.manual_seed(seed)
    options = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,)} | options
    blocks: dict[str, Any] = {"norm_num_groups": 4, "layers_per_block": 1}
    for way in ("Down", "Up"):
        blocks[f"{way.lower()}_block_types"] = (f"{way}Block2D",) * len(options["block_out_channels"])
    return kind(**blocks | options).eval()


def save_pipeline(folder: Path, unet: UNet2DModel | None = None) -> Path:
    """A stock pipeline as diffusers saves it."""
    DDIMPipeline(unet or make_unet(seed=0), DDIMScheduler()).save_pretrained(folder)
    return folder


def digits() -> dict[str, str]:
    """What a network that was trained on the digits knows of its data."""
    return {"dataset": "digits", "data_fingerprint": load_images("digits", "train").fingerprint}


def make_features(feature_dim: int = 16, **origin: str) -> tuple[ConvFeatureExtractor, ReferenceBank]:
    network = ConvFeatureExtractor(sample_size=8, block_out_channels=(4, 8), feature_dim=feature_dim, **origin)
    features = network.extract(torch.rand(50, 1, 8, 8) * 2 - 1)
    return network, ReferenceBank.from_features(features, feature_scale=0.1, **origin)


def save_features(folder: Path, seed: int = 0, **options: Any) -> Path:
    """What train_features.py leaves in its folder."""
    torch.manual_seed(seed)
    network, bank = make_features(**digits() | options)
    network.save_pretrained(folder)
    bank.save_pretrained(folder / "reference_bank")
    return folder


def make_guided(seed: int = 0, **origin: str) -> OTGuidedDDIMPipeline:
    torch.manual_seed(seed)
    network, bank = make_features(**origin)
    return OTGuidedDDIMPipeline(make_unet(), DDIMScheduler(), network, bank)


def make_truncated() -> TruncatedPriorPipeline:
    torch.manual_seed(1)
    options: dict[str, Any] = {"out_channels": 1, "latent_dim": 4, "block_out_channels": (8, 4)}
    prior = PriorGenerator(truncation_timestep=10, sample_size=8, **options)
    return TruncatedPriorPipeline(prior, make_unet(), truncated_scheduler(DDIMScheduler(), 10))


def make_vae(kind: type, **options: Any) -> Any:
    """A VAE of two resolutions for 8×8 images, with latents of 2 channels of 4×4."""
    options = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": (8, 16)} | options
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return kind(layers_per_block=1, norm_num_groups=4, **blocks, **options).eval()
