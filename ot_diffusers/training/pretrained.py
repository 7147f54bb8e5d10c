"""Start from a pipeline that exists: what a run takes from it, and what it cannot change."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from ..config import TrainingConfig, written
from ..errors import InputError, require, shown
from ..pipelines.call import check_networks, unet_image_shape
from ..pipelines.classes import Classes
from ..sampling import check_call_arguments, load_pipeline
from ..schedules import Scheduler, matches_flow, prediction_type_of, preserves_variance

C = TypeVar("C", bound=TrainingConfig)

FREE = ("dropout", "timestep_spacing", "noise_coupling")
"""Options that may differ from those of the pipeline. The others say what its weights mean."""


def load_source(pretrained: str | None) -> Any:
    """The pipeline that a run starts from; None without one.

    Raises:
        InputError: no pipeline there, or one whose denoiser cannot be trained further.
    """
    if pretrained is None:
        return None
    try:
        source: Any = load_pipeline(pretrained)
        check_networks(source.unet, source.scheduler, unet_image_shape(source.unet), may_have_classes=True)
        check_call_arguments(source, {})
    except InputError as error:
        raise InputError(str(error).replace("`pipeline`", "`pretrained`")) from error
    from_noise = "prior" not in source.components
    require(from_noise, "pretrained", "begin with noise, not with a prior", type(source).__name__)
    require(getattr(source, "vae", None) is None, "pretrained", "denoise pixels, not latents", type(source).__name__)
    taken, predicted = source.unet.config.in_channels, source.unet.config.out_channels
    require(predicted == taken, "pretrained", f"predict {taken} channels, without learned variances", predicted)
    return source


def with_source(config: C, source: Any) -> C:
    """The configuration with what it leaves open taken from the pipeline that the run starts from; unchanged without
    one.

    Raises:
        InputError: an option that was given and contradicts the pipeline.
    """
    if source is None:
        return config
    described, taken = description(source), dict[str, Any]()
    for option in (entry for entry in dataclasses.fields(config) if entry.name in described):
        name, value, allowed = option.name, described[option.name], option.metadata["range"]
        own = getattr(config, name)
        if name in config.given and own is not None:
            agrees = own == value or name in FREE
            require(agrees, name, f"be left out or {written(value)}, as in the pipeline of pretrained", own)
        elif allowed is None or allowed.holds(value):  # diffusers has noise schedules that are no choice here
            taken[name] = value
    return dataclasses.replace(config, **taken)


def description(source: Any) -> dict[str, Any]:
    """A pipeline in the words of the training scripts: option to value."""
    unet, scheduler = source.unet.config, source.scheduler
    channels, height, width = unet_image_shape(source.unet)
    classes: Classes | None = getattr(source, "classes", None)
    values = {
        "image_size": height if height == width else None,
        "channels": channels,
        "block_out_channels": tuple(unet.block_out_channels),
        "layers_per_block": unet.layers_per_block,
        "attention_levels": tuple(i for i, block in enumerate(unet.down_block_types) if "Attn" in block),
        "norm_num_groups": unet.norm_num_groups,
        "dropout": unet.dropout,
        "num_train_timesteps": scheduler.config.num_train_timesteps,
        "prediction_type": prediction_type_of(scheduler),
        "beta_schedule": scheduler.config.get("beta_schedule"),
        "timestep_spacing": scheduler.config.get("timestep_spacing"),
        "noise_coupling": scheduler.config.get("_noise_coupling"),
        "class_conditional": None if classes is None else True,
        "class_dropout": 0.0 if classes is not None and classes.null_label is None else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def check_images(source: Any, image_shape: tuple[int, int, int]) -> None:
    """Refuse a pipeline of images of another shape, [C, H, W].

    Raises:
        InputError: with both shapes.
    """
    shape = unet_image_shape(source.unet)
    require(shape == image_shape, "pretrained", f"be trained on images of shape {image_shape}", shape)


def check_classes(source: Any, names: tuple[str, ...]) -> None:
    """Refuse a pipeline of other classes.

    Raises:
        InputError: with the names of both.
    """
    known = source.classes.names
    require(known == names, "pretrained", f"know the classes {shown(names)} of the data set", known)


def continued_unet(unet: UNet2DModel, dropout: float, classes: Classes | None) -> UNet2DModel:
    """A network with the weights of another one, in training mode.

    Where the other one is unconditional and there are classes, the embedding of every label is zero: the network begins
    with the same output for all of them.
    """
    size = None if classes is None else classes.size
    continued = type(unet).from_config(unet.config, dropout=dropout, num_class_embeds=size)
    weights = unet.state_dict()
    if classes is not None and unet.config.num_class_embeds is None:
        weights["class_embedding.weight"] = torch.zeros_like(continued.class_embedding.weight)
    continued.load_state_dict(weights)
    return continued.train()


def deterministic_scheduler(scheduler: Scheduler, timestep_spacing: str) -> Scheduler:
    """DDIM, or flow matching by Euler's method, with the noise levels and the prediction of `scheduler`.

    Raises:
        InputError: a scheduler of another scaling.
    """
    if matches_flow(scheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    name = type(scheduler).__name__
    require(preserves_variance(scheduler), "pretrained", "have a variance-preserving or flow-matching scheduler", name)
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing=timestep_spacing)
