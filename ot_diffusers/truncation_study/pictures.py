"""Samples, features and the curves over T'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluation import plots
from ..evaluation.evaluate import ImageSet
from ..experiment import Sampled
from ..images import to_uint8
from ..schedules import alpha_sigma, truncated_samples
from ..seeds import keyed_generator
from .config import LABELS, ORACLE, VANILLA
from .sampling import goal_label, make_pipeline, real_rows
from .study import Study


def draw(
    study: Study,
    results: Mapping[str, Any],
    rows: Mapping[str, Sampled],
    described: Mapping[str, ImageSet],
    test: ImageSet,
) -> dict[str, Path]:
    """The report's pictures, caption to file."""
    folder = study.output
    compared = [goal_label(study, name) for name in study.guided] if study.config.goal_timestep else []
    compared += [f"vanilla, full in {min(study.config.full_steps)}"] if compared else []
    shown = [VANILLA, *(LABELS[name] for name in study.priors), *compared, ORACLE]
    samples = {"real": test.images} | {name: rows[name].images for name in shown}
    clouds = {"real": test.features} | {name: described[name].features for name in shown}
    pictures = {
        "Samples": plots.image_panels(samples, folder / "samples.png"),
        "What the chain starts from": plots.image_panels(starts(study), folder / "starts.png"),
        "The evaluator's features in two directions, real images in grey": plots.scatter(
            clouds, folder / "features.png", basis="real"
        ),
    }
    if len(study.config.timesteps) > 1:
        pictures["Fréchet distance and sampling time against T'"] = draw_curves(results["curves"], folder)
    return pictures


def starts(study: Study, count: int = 36) -> dict[str, Tensor]:
    """x_T' of real images and of every prior, uint8, by name."""
    main = study.config.truncation_timestep
    shown = {}
    labels = {"oracle": "real", "vanilla": VANILLA, **{name: LABELS[name] for name in study.priors}}
    for name, label in labels.items():
        pipeline = make_pipeline(study, name, main)
        rows = real_rows(study)[:count]
        if name == "oracle":
            images = truncated_samples(study.train_images.fetch(rows), rows, pipeline.scheduler, seed=study.config.seed)
        else:
            generators = [keyed_generator("cpu", study.config.seed, "image", row) for row in range(count)]
            with torch.no_grad():
                level = alpha_sigma(pipeline.scheduler, main - 1)
                images = pipeline.prior.eval().sample(count, *level, generator=generators)
        shown[label] = to_uint8(images.cpu())
    return shown


def draw_curves(curves: Mapping[str, Mapping[str, Mapping[str, float]]], folder: Path) -> Path:
    """Fréchet distance and seconds per 1,000 images against T', one line for each row."""
    titles = {"frechet_distance": "Fréchet distance", "seconds_per_1000": "seconds per 1,000 images"}
    panels = {
        title: {name: {float(step): values[key] for step, values in points.items()} for name, points in curves.items()}
        for key, title in titles.items()
    }
    guided = {f"{name}, guided": name for name in curves if f"{name}, guided" in curves}
    titled: dict[str, Any] = {"xlabel": "T'", "logarithmic": ["Fréchet distance"]}
    return plots.line_panels(panels, folder / "curves.png", variants=guided, **titled)
