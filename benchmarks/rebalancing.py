"""Guidance that changes the proportions of a model's samples: how near they come to a target, by the command `guide`.

Data sets whose evaluation network is missing are left out: `ot-diffusers train features --config digits/evaluator.yaml`
trains the one of digits, a run of `configs/mnist/few_calls.yaml` the one of MNIST at 16×16.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ot_diffusers.studies.guide import FIELD, GUIDED, PLAIN, REAL, GuideOptions, guide

from .timing import Row

MODELS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "digits": ("model_cards/digits-ot-guided", "runs/digits/evaluator", 20, {}),
    "mnist": ("model_cards/mnist16-coupled", "runs/mnist/few-calls/evaluator", 8, {"image_size": 16}),
}
"""Data set: published model, evaluation network, steps, and options of the data."""
MANY = {str(label): 0.18 for label in range(5)}
"""The classes 0 to 4 are asked for nine times as often as the others."""
SEEDS = range(3)


def rows(quick: bool, device: torch.device) -> Iterator[Row]:
    """Distance of the class shares from the target, precision and Fréchet distance; medians over random seeds."""
    known = [dataset for dataset, (_, evaluator, *_) in MODELS.items() if Path(evaluator).is_dir()]
    for dataset in known[:1] if quick else known:
        seeds = SEEDS[:1] if quick else SEEDS
        transport = [run(dataset, seed, device, quick, field_samples=64 if quick else 1000) for seed in seeds]
        own = [run(dataset, seed, device, quick, network=None) for seed in seeds]
        twice = {
            "metric": "mmd",
            "num_correction_steps": 6,
        }  # at least as many seconds as three corrections by transport
        kernel = [run(dataset, seed, device, quick, call=twice) for seed in seeds]
        title = f"{dataset}, 90% of the classes 0 to 4"
        for name, target in ((PLAIN, None), (GUIDED, 0.05), (FIELD, 0.05)):
            yield row(f"{title}: total variation, {name}", [variation(results, name) for results in transport], target)
        yield row(
            f"{title}: total variation, guided by the denoiser's features",
            [variation(results, GUIDED) for results in own],
            0.05,
        )
        yield row(f"{title}: total variation, MMD guidance", [variation(results, GUIDED) for results in kernel])
        for name in (GUIDED, FIELD):
            gains = [metric(results, name, "precision") - metric(results, PLAIN, "precision") for results in transport]
            yield row(f"{title}: precision, {name} − plain", gains, -0.02, at_least=True)
        for label, runs in (("OT", transport), ("MMD", kernel)):
            distances = [metric(results, GUIDED, "frechet_distance") for results in runs]
            yield row(f"{title}: Fréchet distance, {label} guidance", distances)
            seconds = [results["arms"][GUIDED]["seconds_per_1000"] for results in runs]
            yield row(f"{title}: seconds per 1,000 images, {label} guidance", seconds)


def run(dataset: str, seed: int, device: torch.device, quick: bool, **options: Any) -> dict[str, Any]:
    """The results of `guide`, by default with the network of the published model."""
    model, evaluator, steps, data = MODELS[dataset]
    call = {"num_inference_steps": 2 if quick else steps, **options.pop("call", {})}
    chosen = GuideOptions(
        network=options.pop("network", model),
        evaluator=evaluator,
        class_shares=MANY,
        num_images=64 if quick else 1000,
        call=call,
        seed=seed,
        data_options=data,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        return guide(model, dataset, Path(folder) / "guided", chosen, device=device, log=lambda line: None)


def variation(results: dict[str, Any], name: str) -> float:
    """Total variation between the class shares of samples and those of the real images in the asked proportions."""
    own, real = results["class_shares"][name], results["class_shares"][REAL]
    return sum(abs(own[label] - real[label]) for label in real) / 2


def metric(results: dict[str, Any], name: str, key: str) -> float:
    """A metric of one kind of samples."""
    return float(results["arms"][name]["metrics"][key])


def row(name: str, values: list[float], target: float | None = None, at_least: bool = False) -> Row:
    """The median and the range of a figure."""
    return Row(name, statistics.median(values), (min(values), max(values)), target, at_least, unit="")
