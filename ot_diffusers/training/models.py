"""UNet, noising chain and optimizer of a configuration, and the pipeline that samples."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from ..config import FLOW, BaselineConfig, DiffusionConfig, TrainingConfig
from ..data import ResidentImages, StreamedImages
from ..errors import require
from ..features import class_counts
from ..models.feature_extractor import FeatureExtractor
from ..models.reference_bank import ReferenceBank
from ..pipelines import FlowMatchPipeline, OTGuidedDDIMPipeline
from ..pipelines.classes import Classes
from ..schedules import Scheduler, matches_flow, record_coupling, unrecorded
from .pretrained import check_classes, check_images, continued_unet, deterministic_scheduler


def make_classes(
    config: DiffusionConfig, images: ResidentImages | StreamedImages, source: Any = None
) -> Classes | None:
    """The classes that the denoiser knows, with their frequencies in these images; None for an unconditional one.
    Without `class_dropout` there is no null label, which would never be trained. Where the run starts from a `source`
    with classes, there is one if the source has one.

    Raises:
        InputError: images without usable labels, or of other classes than those of the source.
    """
    if not config.class_conditional:
        return None
    counts, has_null_label = class_counts(images), config.class_dropout > 0
    if getattr(source, "classes", None) is not None:
        check_classes(source, tuple(counts))
        has_null_label = source.classes.null_label is not None
    return Classes.from_counts(counts, has_null_label=has_null_label)


def make_unet(
    config: BaselineConfig, image_shape: tuple[int, int, int], classes: Classes | None = None, source: Any = None
) -> UNet2DModel:
    """A `UNet2DModel` for images of `image_shape` (C, H, W), which takes the labels of these classes: that of the
    pipeline that the run starts from, or a new one."""
    if source is not None:
        check_images(source, image_shape)
        return continued_unet(source.unet, config.dropout, classes)
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
        num_class_embeds=None if classes is None else classes.size,
    )


def make_noise_scheduler(config: BaselineConfig, source: Any = None) -> Scheduler:
    """The noising chain: that of the pipeline that the run starts from, or a new one, variance-preserving or with the
    straight lines of flow matching."""
    scheduler: Scheduler
    if source is not None:
        scheduler = deterministic_scheduler(source.scheduler, config.timestep_spacing)
        scheduler = type(scheduler).from_config(unrecorded(scheduler))
    elif config.prediction_type == FLOW:
        scheduler = FlowMatchEulerDiscreteScheduler(config.num_train_timesteps)
    else:
        scheduler = DDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            timestep_spacing=config.timestep_spacing,
        )
    if config.noise_coupling != "independent":
        record_coupling(scheduler, config.noise_coupling)
    return scheduler


def make_pipeline(
    unet: UNet2DModel,
    scheduler: Scheduler,
    feature_extractor: FeatureExtractor | None = None,
    reference_bank: ReferenceBank | None = None,
    classes: Classes | None = None,
) -> DiffusionPipeline:
    """The pipeline that samples with a denoiser of this noising chain, by DDIM or along its straight lines, and with
    the classes of the denoiser; with the parts of guidance it is guided."""
    options: dict[str, Any] = {} if classes is None else classes.options
    parts = feature_extractor, reference_bank
    if matches_flow(scheduler):
        return FlowMatchPipeline(unet, type(scheduler).from_config(scheduler.config), *parts, **options)
    ddim = DDIMScheduler.from_config(scheduler.config)
    if feature_extractor is None and classes is None:
        return DDIMPipeline(unet, ddim)
    return OTGuidedDDIMPipeline(unet, ddim, *parts, **options)


def make_optimizer(config: TrainingConfig, model: torch.nn.Module) -> torch.optim.AdamW:
    """Adam with decoupled weight decay."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
