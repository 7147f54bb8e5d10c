"""Guidance that changes the proportions of a model's samples: how near they come to a target, by the command `guide`.

Data sets whose evaluation network is missing are left out: `ot-diffusers train features --config digits/evaluator.yaml`
trains the one of digits, a run of `configs/mnist/few_calls.yaml` the one of MNIST at 16×16.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ot_diffusers.data import load_images, pixels_of
from ot_diffusers.evaluation.evaluate import extract_image_set
from ot_diffusers.evaluation.extractors import load_evaluator
from ot_diffusers.launch import training_command
from ot_diffusers.sampling import load_pipeline, sample_images
from ot_diffusers.studies.guide import FIELD, GUIDED, PIPELINE_FOLDER, PLAIN, REAL, GuideOptions, guide

from .timing import Row

MODELS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "digits": ("model_cards/digits-ot-guided", "runs/digits/evaluator", 20, {}),
    "mnist": ("model_cards/mnist16-coupled", "runs/mnist/few-calls/evaluator", 8, {"image_size": 16}),
}
"""Data set: published model, evaluation network, steps, and options of the data."""
MANY = {str(label): 0.18 for label in range(5)}
"""The classes 0 to 4 are asked for nine times as often as the others."""
FIELD_IMAGES = 4000
"""Images of a guidance field whose classes are counted: by chance the shares of 1,000 are .03 from the target."""
MISSING = "3"
"""The class that a network of digits never saw in training."""
SEEDS = range(3)


def rows(quick: bool, device: torch.device) -> Iterator[Row]:
    """Distance of the class shares from the target, precision and Fréchet distance; medians over random seeds."""
    known = [dataset for dataset, (_, evaluator, *_) in MODELS.items() if Path(evaluator).is_dir()]
    for dataset in known[:1] if quick else known:
        seeds = SEEDS[:1] if quick else SEEDS
        transport = [run(dataset, seed, device, quick, field_samples=64 if quick else 1000) for seed in seeds]
        own = [run(dataset, seed, device, quick, network=None) for seed in seeds]
        kernel = [run(dataset, seed, device, quick, call={"metric": "mmd"}) for seed in seeds]
        title = f"{dataset}, 90% of the classes 0 to 4"
        for name, target in ((PLAIN, None), (GUIDED, 0.05), (FIELD, 0.05)):
            yield row(f"{title}: total variation, {name}", [variation(results, name) for results in transport], target)
        by_own = [variation(results, GUIDED) for results in own]
        yield row(f"{title}: total variation, guided by the denoiser's features", by_own, 0.05)
        yield row(f"{title}: total variation, MMD guidance", [variation(results, GUIDED) for results in kernel])
        for name in (GUIDED, FIELD):
            gains = [metric(results, name, "precision") - metric(results, PLAIN, "precision") for results in transport]
            yield row(f"{title}: precision, {name} − plain", gains, -0.02, at_least=True)
        for label, runs in (("OT", transport), ("MMD", kernel)):
            distances = [metric(results, GUIDED, "frechet_distance") for results in runs]
            yield row(f"{title}: Fréchet distance, {label} guidance", distances)
            seconds = [results["arms"][GUIDED]["seconds_per_1000"] for results in runs]
            yield row(f"{title}: seconds per 1,000 images, {label} guidance", seconds)
    if "digits" in known:
        yield from missing_rows(quick, device)


def missing_rows(quick: bool, device: torch.device) -> Iterator[Row]:
    """Share of a class that was missing in training, relative to its share of the references; medians over seeds."""
    shares: dict[str, list[float]] = {PLAIN: [], GUIDED: []}
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        save_without(MISSING, pictures)
        for seed in SEEDS[:1] if quick else SEEDS:
            trained = Path(folder) / f"seed-{seed}"
            options = [f"dataset={pictures}", f"output_dir={trained}", f"seed={seed}", "report_to=none"]
            options += ["max_train_steps=2"] if quick else []
            command = training_command("baseline", options, config="digits/baseline.yaml")
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results = run("digits", seed, device, quick, pipeline=str(trained), class_shares=None)
            by_class = results["class_shares"]
            for name, values in shares.items():
                values.append(by_class[name][MISSING] / by_class[REAL][MISSING])
    title = f"digits without class {MISSING} in training: its share / that of the references"
    yield row(f"{title}, {PLAIN}", shares[PLAIN])
    yield row(f"{title}, {GUIDED}", shares[GUIDED], 0.8, at_least=True)


def save_without(label: str, folder: Path) -> None:
    """The training digits but those of one class, as a folder of pictures for each class."""
    images = load_images("digits", "train")
    names = images.class_names or ()
    assert images.labels is not None
    for index, (pixels, own) in enumerate(zip(pixels_of(images), images.labels.tolist(), strict=True)):
        if names[own] != label:
            (folder / names[own]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(folder / names[own] / f"{index}.png")


def run(dataset: str, seed: int, device: torch.device, quick: bool, **options: Any) -> dict[str, Any]:
    """The results of `guide`, by default with the network of the published model."""
    model, evaluator, steps, data = MODELS[dataset]
    pipeline = options.pop("pipeline", model)
    call = {"num_inference_steps": 2 if quick else steps, **options.pop("call", {})}
    chosen = GuideOptions(
        network=options.pop("network", model),
        evaluator=evaluator,
        class_shares=options.pop("class_shares", MANY),
        num_images=64 if quick else 1000,
        call=call,
        seed=seed,
        data_options=data,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "guided"
        results = guide(pipeline, dataset, output, chosen, device=device, log=lambda line: None)
        if chosen.field_samples is not None:
            guided = load_pipeline(output / PIPELINE_FOLDER).to(device)
            images = sample_images(guided, 64 if quick else FIELD_IMAGES, seed=seed, **call)
            logits, names = extract_image_set(images, load_evaluator(evaluator)).logits, results["class_shares"][REAL]
            assert logits is not None
            shares = logits.argmax(1).bincount(minlength=len(names)) / len(images)
            results["class_shares"][FIELD] = dict(zip(names, shares.tolist(), strict=True))
    return results


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
