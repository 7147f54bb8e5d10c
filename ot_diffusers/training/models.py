"""UNet, noising chain and optimizer of a configuration."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ..config import BaselineConfig, TrainingConfig
from ..errors import require
from ..schedules import record_coupling


def make_unet(config: BaselineConfig, image_shape: tuple[int, int, int]) -> UNet2DModel:
    """A `UNet2DModel` for images of `image_shape` (C, H, W)."""
    channels, height, width = image_shape
    levels = len(config.block_out_channels)
    require(height == width, "image_size", "be given for images that are not square", image_shape)
    divisor = 2 ** (levels - 1)
    require(
        height % divisor == 0, "image_size", f"be a multiple of {divisor} for a UNet of {levels} resolutions", height
    )
    in_range = all(0 <= level < levels for level in config.attention_levels)
    require(in_range, "attention_levels", f"lie in 0 … {levels - 1} for {levels} resolutions", config.attention_levels)
    attention = [level in config.attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attention),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attention)),
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        add_attention=bool(config.attention_levels),
    )


def make_noise_scheduler(config: BaselineConfig) -> DDPMScheduler:
    """The noising chain."""
    scheduler = DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
    )
    if config.noise_coupling != "independent":
        record_coupling(scheduler, config.noise_coupling)
    return scheduler


def make_optimizer(config: TrainingConfig, model: torch.nn.Module) -> torch.optim.AdamW:
    """Adam with decoupled weight decay."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
