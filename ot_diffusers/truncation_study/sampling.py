"""The rows of the table and the points of the curves, sampled once and kept."""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..data import evenly_spaced
from ..experiment import Sampled, is_complete, read_json, sampled_once
from ..images import to_uint8
from ..models.prior import GaussianPrior
from ..pipelines.guided import SMALL_BATCH
from ..pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from ..sampling import MAX_BATCH_SIZE, best_device, load_pipeline, sample_images, with_guidance
from ..schedules import truncated_samples, truncated_scheduler
from .config import LABELS, ORACLE, VANILLA
from .study import Study
from .training import run_name


def sample_rows(study: Study) -> dict[str, Sampled]:
    """Every row of the table, in its order."""
    main = study.config.truncation_timestep
    rows = {VANILLA: sampled(study, "vanilla", main, main)}
    length = int(load_pipeline(study.denoiser).scheduler.config.num_train_timesteps)
    for steps in study.config.full_steps:
        rows[f"vanilla, full in {steps}"] = sampled(study, "vanilla", length, steps)
    for name in study.priors:
        rows[LABELS[name]] = sampled(study, name, main, main)
    for name in study.guided:
        rows[guided_label(name)] = sampled(study, name, main, main, guided=True)
    for name in study.guided if study.config.goal_timestep else ():
        rows[goal_label(study, name)] = goal_row(study, name)
    if study.guided:
        steps = min(study.config.full_steps)
        rows[f"vanilla, full in {steps}, guided"] = sampled(study, "vanilla", length, steps, guided=True)
    return rows | {ORACLE: sampled(study, "oracle", main, main)}


def guided_label(name: str) -> str:
    """Of a guided row from the T' of the table, and of its curve."""
    return f"{LABELS[name]}, guided"


def goal_label(study: Study, name: str) -> str:
    """Of a guided row from the goal's T'."""
    return f"{guided_label(name)}, T' = {study.config.goal_timestep}"


def goal_row(study: Study, name: str) -> Sampled:
    """A guided chain from the goal's T', in as many steps as a point of the curves."""
    goal = study.config.goal_timestep
    assert goal is not None
    return sampled(study, name, goal, min(goal, study.config.curve_steps), guided=True)


def sample_curves(study: Study) -> dict[str, dict[int, Sampled]]:
    """Row name to T' to images, for every T' that the prior can start at."""
    plain = {"vanilla": VANILLA, **{name: LABELS[name] for name in study.priors}, "oracle": ORACLE}
    lines = [(name, label, False) for name, label in plain.items()]
    lines += [(name, guided_label(name), True) for name in study.guided]
    return {
        label: {
            step: sampled(study, name, step, min(step, study.config.curve_steps), guided=guided)
            for step in study.config.timesteps
            if reaches(study, name, step)
        }
        for name, label, guided in lines
    }


def reaches(study: Study, name: str, truncation_timestep: int) -> bool:
    """Whether a prior was trained for this T', or makes clean images that can be diffused to it."""
    if name in ("vanilla", "oracle") or is_complete(study.output / run_name(name, truncation_timestep)):
        return True
    run = read_json(study.output / run_name(name, study.config.truncation_timestep) / "run.json")
    return run["config"]["prediction_type"] == "sample"


def sampled(study: Study, name: str, truncation_timestep: int, steps: int, *, guided: bool = False) -> Sampled:
    """Images by one prior, from disk if they are there."""
    run = f"{name}_guided" if guided else name
    file = study.output / "samples" / f"{run}_{truncation_timestep}_{steps}.safetensors"
    return sampled_once(file, lambda: sample_prior(study, name, truncation_timestep, steps, guided))


def sample_prior(study: Study, name: str, truncation_timestep: int, steps: int, guided: bool) -> Sampled:
    """Image i of every row starts from the noise that (`seed`, i) gives."""
    pipeline = make_pipeline(study, name, truncation_timestep, guided)
    pipeline(batch_size=SMALL_BATCH, num_inference_steps=1, output_type="pt")  # first calls are slow
    started = time.monotonic()
    if name == "oracle":
        return Sampled(sample_oracle(study, pipeline, steps), time.monotonic() - started, steps)
    size = study.config.guided_batch_size if guided else study.config.batch_size
    call: dict[str, Any] = {"batch_size": size, "seed": study.config.seed}
    images = sample_images(pipeline, study.num_samples, num_inference_steps=steps, **call)
    return Sampled(images, time.monotonic() - started, pipeline.nfe)


def make_pipeline(study: Study, name: str, truncation_timestep: int, guided: bool = False) -> TruncatedPriorPipeline:
    """The pipeline that a run has saved, or the prior of the table before a chain of this T'; N(0, I) for `"vanilla"`
    and the oracle."""
    run = study.output / run_name(name, truncation_timestep)
    if is_complete(run):
        pipeline = load_pipeline(run)
    else:
        full = load_pipeline(study.denoiser)
        scheduler = truncated_scheduler(DDIMScheduler.from_config(full.scheduler.config), truncation_timestep)
        pipeline = TruncatedPriorPipeline(make_prior(study, name, truncation_timestep), full.unet.eval(), scheduler)
    if guided:
        pipeline = with_guidance(pipeline, study.feature_extractor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(best_device())


def make_prior(study: Study, name: str, truncation_timestep: int) -> Any:
    """The prior `name` for a T' that no run has been made for."""
    if name not in ("vanilla", "oracle"):
        trained = load_pipeline(study.output / run_name(name, study.config.truncation_timestep)).prior
        return trained.at_truncation_timestep(truncation_timestep)
    channels, height, width = study.train_images.image_shape
    size = height if height == width else (height, width)
    return GaussianPrior(truncation_timestep=truncation_timestep, sample_size=size, out_channels=channels)


def sample_oracle(study: Study, pipeline: TruncatedPriorPipeline, steps: int) -> Tensor:
    """Images from real x_T' of evenly spaced training images, uint8 [N, C, H, W]."""
    made = []
    for rows in real_rows(study).split(study.config.batch_size or MAX_BATCH_SIZE):
        latents = truncated_samples(study.train_images.fetch(rows), rows, pipeline.scheduler, seed=study.config.seed)
        call: dict[str, Any] = {"latents": latents, "num_inference_steps": steps, "output_type": "pt"}
        (images,) = pipeline(batch_size=len(rows), **call, return_dict=False)
        made.append(to_uint8(images.cpu() * 2 - 1))
    return torch.cat(made)


def real_rows(study: Study) -> Tensor:
    """As many training images as a row has, evenly spaced."""
    return evenly_spaced(study.train_images, study.num_samples)
