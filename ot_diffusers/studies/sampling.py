"""The images of a variant: its pipeline, the start of its chain, and the file that keeps them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..cache import read_verified, save_aside
from ..evaluation.extractors import labels_by_name
from ..images import to_model_range, to_uint8
from ..models.prior import GaussianPrior
from ..pipelines.classes import class_options
from ..pipelines.guided import SMALL_BATCH
from ..pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from ..sampling import (
    MAX_BATCH_SIZE,
    best_device,
    chosen_labels,
    load_pipeline,
    network_calls,
    networks_in,
    sample_images,
    with_guidance,
)
from ..schedules import truncated_samples, truncated_scheduler
from ..seeds import keyed_generator
from .config import NOISE, REAL, Variant
from .study import Study, read_json


@dataclass
class Sampled:
    """Images of a variant and their cost.

    Attributes:
        images: uint8 [N, C, H, W].
        seconds: sampling time of all images.
        nfe: number of function evaluations for each image.
        others: further costs, keys of `metric_table.COSTS`.
        labels: classes that the images were asked to be of, as the data set numbers them, int64 [N]; None if they have
            none.
    """

    images: Tensor
    seconds: float
    nfe: int
    others: Mapping[str, float] = field(default_factory=dict)
    labels: Tensor | None = None

    @property
    def cost(self) -> dict[str, float]:
        """The costs by the keys of `metric_table.COSTS`."""
        per_1000 = round(1000 * self.seconds / len(self.images), 3)
        return {"nfe": self.nfe, "seconds": round(self.seconds, 2), "seconds_per_1000": per_1000, **self.others}


def samples_file(study: Study, name: str, seed: int) -> Path:
    """The file that keeps the images of the variant."""
    return study.folder(seed) / "samples" / f"{name}.safetensors"


def sampled(study: Study, name: str, seed: int) -> Sampled:
    """The images of the variant from the starting noise of the seed; read from disk if they were sampled before."""

    def sample() -> Sampled:
        study.clock.check()
        return sample_variant(study, name, seed)

    return sampled_once(samples_file(study, name, seed), sample)


def sampled_once(file: Path, sample: Callable[[], Sampled]) -> Sampled:
    """The contents of a file of an earlier call if it is intact, else the result of `sample`, which is then kept."""
    kept = read_verified(file)
    if kept is None:
        drawn = sample()
        cost = json.dumps({"seconds": drawn.seconds, "nfe": drawn.nfe, **drawn.others}).encode()
        labels = {} if drawn.labels is None else {"labels": drawn.labels}
        save_aside({"images": drawn.images, "cost": torch.tensor(list(cost), dtype=torch.uint8)} | labels, file)
        return drawn
    cost = json.loads(bytes(kept["cost"].tolist()))
    return Sampled(kept["images"], cost.pop("seconds"), cost.pop("nfe"), cost, kept.get("labels"))


def sample_variant(study: Study, name: str, seed: int) -> Sampled:
    """Image i of every variant starts from the noise that (`seed`, i) gives."""
    config, variant = study.config, study.config.arms[name]
    pipeline = make_pipeline(study, name, seed)
    call = config.call | variant.call
    asked = call.pop("class_labels", None)
    unguided = {"guidance_scale": 0} if hasattr(pipeline, "feature_extractor") else {}
    steps = {"num_inference_steps": 1}
    sample_images(pipeline, SMALL_BATCH, seed=seed, **call | unguided | steps)  # first calls are slow
    others: dict[str, float] = {}
    if variant.field_samples is not None:
        started = time.monotonic()
        generator = keyed_generator("cpu", seed, "guidance field")
        with networks_in(config.dtype, pipeline.device):
            pipeline.record_guidance_field(variant.field_samples, generator, **call)
        others["field_seconds"] = time.monotonic() - started
    labels = None if variant.start == REAL else chosen_labels(pipeline, study.num_samples, asked, seed)
    started = time.monotonic()
    if variant.start == REAL:
        images = sample_from_real(study, pipeline, seed, variant.batch_size, call)
    else:
        batches: dict[str, Any] = {"batch_size": variant.batch_size, "dtype": config.dtype}
        images = sample_images(pipeline, study.num_samples, seed=seed, class_labels=labels, **batches, **call)
    seconds, costs = time.monotonic() - started, others | costs_of_training(study, name, seed, pipeline)
    if labels is not None:
        names = [pipeline.classes.names[label] for label in labels.tolist()]
        labels = labels_by_name(names, study.splits["test"])
    return Sampled(images, seconds, network_calls(pipeline), costs, labels)


# --- Pipelines --------------------------------------------------------------------------------------------------------


def make_pipeline(study: Study, name: str, seed: int) -> Any:
    """The pipeline of the variant, ready to sample: the saved one, or its denoiser with another start of the chain."""
    variant = study.config.arms[name]
    source = study.source(name, seed)
    features = study.resolve(variant.features, seed) if variant.features else None
    if variant.start is None:
        pipeline = load_pipeline(source, features)
    else:
        pipeline = started_pipeline(study, variant, load_pipeline(source), seed)
        pipeline = pipeline if features is None else with_guidance(pipeline, features)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(best_device())


def started_pipeline(study: Study, variant: Variant, full: Any, seed: int) -> TruncatedPriorPipeline:
    """The denoiser of a full chain, run by DDIM from T' after the start of the variant."""
    whole = DDIMScheduler.from_config(full.scheduler.config)
    scheduler = truncated_scheduler(whole, variant.truncation_timestep or whole.config.num_train_timesteps)
    length = scheduler.config.num_train_timesteps
    if variant.start in (NOISE, REAL):
        channels, height, width = study.train_images.images.shape[1:]
        size = height if height == width else (height, width)
        prior: Any = GaussianPrior(truncation_timestep=length, sample_size=size, out_channels=channels)
    else:
        prior = load_pipeline(study.resolve(str(variant.start), seed)).prior.at_truncation_timestep(length)
    return TruncatedPriorPipeline(prior, full.unet.eval(), scheduler, **class_options(full))


def sample_from_real(study: Study, pipeline: Any, seed: int, batch_size: int | None, call: Mapping[str, Any]) -> Tensor:
    """Images sampled from x_T' of evenly spaced training images, uint8 [N, C, H, W]."""
    made = []
    for rows in real_rows(study).split(batch_size or MAX_BATCH_SIZE):
        latents = real_latents(study, pipeline, rows, seed)
        with networks_in(study.config.dtype, pipeline.device):
            images = pipeline(batch_size=len(rows), latents=latents, output_type="pt", **call).images
        made.append(to_uint8(images.cpu() * 2 - 1))
    return torch.cat(made)


def real_rows(study: Study) -> Tensor:
    """Row numbers of evenly spaced training images, as many as a variant has samples."""
    return torch.linspace(0, len(study.train_images) - 1, study.num_samples).round().long()


def real_latents(study: Study, pipeline: Any, rows: Tensor, seed: int) -> Tensor:
    """x_T' of these training images, [B, C, H, W]."""
    images = to_model_range(study.train_images.images[rows])
    return truncated_samples(images, rows, pipeline.scheduler, seed=seed)


def costs_of_training(study: Study, name: str, seed: int, pipeline: Any) -> dict[str, float]:
    """Parameters, training time and training steps of the run that made the pipeline, or the prior of its start; only
    parameters for a pipeline without such a run."""
    variant = study.config.arms[name]
    if variant.start in (NOISE, REAL):
        return {}
    made = study.resolve(variant.start, seed) if variant.start else study.source(name, seed)
    record = Path(made) / "results.json"
    run = read_json(record) if record.is_file() else {}
    parts = [getattr(pipeline, part) for part in ("prior", "unet") if hasattr(pipeline, part)]
    counted = {"parameters": sum(parameter.numel() for part in parts for parameter in part.parameters())}
    return counted | {key: run[key] for key in ("parameters", "training_seconds", "updates") if key in run}
