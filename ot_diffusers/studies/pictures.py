"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.evaluate import extract_image_set
from ..evaluation.failures import worst_samples
from ..evaluation.metric_table import COSTS, METRICS
from ..reporting import plots
from .axes import AXES, Axis
from .sampling import sampled
from .study import Study

NUM_FAILURES = 12


def draw(study: Study, results: Mapping[str, Any], seed: int) -> dict[str, Path]:
    """The report's pictures, caption to file; images are those of one seed."""
    folder, reference, config = study.output, study.test_images, study.config
    shown = config.pictured or tuple(config.reported)
    images = {name: sampled(study, name, seed).images for name in shown}
    image_sets = {name: extract_image_set(pixels, study.extractor) for name, pixels in images.items()}
    clouds = {"real": reference.features} | {name: image_set.features for name, image_set in image_sets.items()}
    count = min(NUM_FAILURES, study.num_samples)
    failures = {name: worst_samples(image_set, reference, count) for name, image_set in image_sets.items()}
    primary = config.primary_metric
    several = ": mean and 95% interval" if len(results["seeds"]) > 1 else ""
    pictures = {
        "Samples from the same noise": plots.image_panels({"real": reference.images} | images, folder / "samples.png"),
        f"{METRICS[primary].label}{several}": plots.bars(results, primary, folder / "bars.png"),
    }
    if results["differences"]:
        tested = {metric: METRICS[metric].label for metric in results["headline"]}
        caption = f"Paired differences to {next(iter(images))} with 95% intervals; hollow where none is shown"
        pictures[caption] = plots.differences(results, tested, folder / "differences.png")
    for axis in AXES.values():
        if results.get(axis.key):
            caption = f"Quality by {'network calls' if axis.calls else axis.title}"
            pictures[caption] = draw_curves(results, axis, folder / f"{axis.key}.png")
    pictures["The evaluator's features in two directions, real images in grey"] = plots.scatter(
        clouds, folder / "features.png", basis="real"
    )
    pictures["Worst samples by distance to the nearest real image"] = plots.failure_gallery(
        failures, folder / "failures.png"
    )
    files = {Path(study.source(name, seed)) / "metrics.jsonl": name for name in reversed(shown)}
    histories = {name: plots.read_history(file) for file, name in reversed(files.items()) if file.is_file()}
    if histories:
        pictures["Losses"] = plots.loss_curves(histories, folder / "loss_curves.png")
    return pictures


def draw_curves(results: Mapping[str, Any], axis: Axis, path: Path) -> Path:
    """A panel for each quantity, a line with its interval for each method, the real-vs-real score dashed."""
    curves, floor = results[axis.key], results["floor"]["metrics"]
    panels: dict[str, dict[str, dict[float, float]]] = {}
    bands: dict[str, dict[str, dict[float, tuple[float, float]]]] = {}
    for quantity in axis.drawn or results["headline"]:
        panels[quantity], bands[quantity] = {}, {}
        for method, line in curves.items():
            points = {float(point["nfe"] if axis.calls else value): point for value, point in line.items()}
            panels[quantity][method] = {x: point[quantity] for x, point in points.items() if quantity in point}
            ends = {x: point["intervals"].get(quantity) for x, point in points.items()}
            bands[quantity][method] = {x: (end["low"], end["high"]) for x, end in ends.items() if end}
    titles = {name: METRICS[name].label if name in METRICS else COSTS[name] for name in panels}
    return plots.line_panels(
        panels,
        path,
        xlabel="network calls" if axis.calls else axis.title,
        titles=titles,
        logarithmic=["frechet_distance", "sinkhorn_distance", "patch_sliced_wasserstein"],
        logarithmic_x=axis.calls,
        variants={f"{name}, guided": name for name in curves if f"{name}, guided" in curves},
        bands=bands,
        floors={name: floor[name] for name in panels if name in floor},
    )
