"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation import plots, report
from ..evaluation.evaluate import describe_images
from ..evaluation.failures import worst_samples
from .arms import sampled
from .study import Study

NUM_FAILURES = 12


def draw(study: Study, results: Mapping[str, Any], seed: int) -> dict[str, Path]:
    """The report's pictures, caption to file; images are those of one seed."""
    folder, reference = study.output, study.test_images
    images = {name: sampled(study, name, seed).images for name in study.config.reported}
    described = {name: describe_images(found, study.extractor) for name, found in images.items()}
    clouds = {"real": reference.features} | {name: found.features for name, found in described.items()}
    count = min(NUM_FAILURES, study.num_samples)
    failures = {name: worst_samples(found, reference, count) for name, found in described.items()}
    primary = study.config.primary_metric
    pictures = {
        "Samples from the same noise": plots.image_panels({"real": reference.images} | images, folder / "samples.png"),
        f"{report.METRICS[primary].label}: mean and 95% interval": plots.bars(results, primary, folder / "bars.png"),
    }
    if results["differences"]:
        tested = {metric: report.METRICS[metric].label for metric in next(iter(results["differences"].values()))}
        caption = f"Paired differences to {next(iter(images))} with 95% intervals; hollow where none is shown"
        pictures[caption] = plots.differences(results, tested, folder / "differences.png")
    pictures["The evaluator's features in two directions, real images in grey"] = plots.scatter(
        clouds, folder / "features.png", basis="real"
    )
    pictures["Worst samples by distance to the nearest real image"] = plots.failure_gallery(
        failures, folder / "failures.png"
    )
    histories = {name: study.run(name, seed) / "metrics.jsonl" for name in images}
    found = {name: plots.read_history(file) for name, file in histories.items() if file.is_file()}
    if found:
        pictures["Losses"] = plots.loss_curves(found, folder / "loss_curves.png")
    return pictures
