"""The pictures of a report and their captions.

Pictures of numbers need nothing but `results.json`, so that those of a recorded study can be drawn again:

    python -m ot_diffusers.studies.pictures docs/digits/compare.json differences docs/digits/compare.png
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, require
from ..evaluation.evaluate import extract_image_set
from ..evaluation.failures import worst_samples
from ..reporting import plots
from ..reporting.page import Picture
from ..reporting.report import HEADLINE
from .axes import AXES, Axis
from .config import STEPS
from .sampling import sampled
from .study import Study, read_json

NUM_SHOWN, NUM_FAILURES = 36, 12
BESIDE = ("samples", "samples_by_steps", "starts", "features", "failures", "loss_curves")
"""Pictures that are drawn from images and features, by file name; the others are drawn from the results."""


def draw(study: Study, results: Mapping[str, Any], seed: int) -> dict[str, Path]:
    """The pictures of a study in its folder, by file name; those of images show one random seed."""
    folder, reference, config = study.output, study.test_images, study.config
    shown = config.pictured or tuple(config.reported)
    images = {name: sampled(study, name, seed).images for name in shown}
    image_sets = {name: extract_image_set(pixels, study.extractor) for name, pixels in images.items()}
    clouds = {"real": reference.features} | {name: image_set.features for name, image_set in image_sets.items()}
    count = min(NUM_FAILURES, study.num_samples)
    failures = {name: worst_samples(image_set, reference, count) for name, image_set in image_sets.items()}
    files = {
        "samples": draw_samples(reference.images, images, folder / "samples.png"),
        "features": plots.scatter(clouds, folder / "features.png", basis="real"),
        "failures": plots.failure_gallery(failures, folder / "failures.png"),
    }
    if config.curves.get(STEPS):
        table = {
            method: {heading_of(steps): sampled(study, name, seed).images for steps, name in line.items()}
            for method, line in config.curves[STEPS].items()
            if len(line) > 1 and method in shown
        }
        files["samples_by_steps"] = plots.image_table(table, folder / "samples_by_steps.png")
    records = {Path(study.source(name, seed)) / "metrics.jsonl": name for name in reversed(shown)}
    histories = {name: plots.read_history(file) for file, name in reversed(records.items()) if file.is_file()}
    if histories:
        files["loss_curves"] = plots.loss_curves(histories, folder / "loss_curves.png")
    return files | draw_numbers(results, folder)


def heading_of(steps: str) -> str:
    """Heading of a column.

    Example:
        >>> heading_of("1"), heading_of("50")
        ('1 step', '50 steps')
    """
    return f"{steps} step{'' if steps == '1' else 's'}"


def draw_samples(real: Tensor, images: Mapping[str, Tensor], path: Path) -> Path:
    """Real images, evenly spaced over their set, beside the first images of every method; all uint8 [N, C, H, W]."""
    return plots.image_panels({"real": real[evenly_spaced_rows(len(real), NUM_SHOWN)], **images}, path)


def evenly_spaced_rows(total: int, count: int) -> Tensor:
    """At most `count` row numbers, evenly spaced over `total` rows: int64."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def draw_numbers(results: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The pictures that need nothing but the results, by file name."""
    return {name: draw_number(folder / f"{name}.png") for name, draw_number in number_pictures(results).items()}


def number_pictures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], Path]]:
    """What draws each of these pictures into a file, by its name."""
    pictures: dict[str, Callable[[Path], Path]] = {"scores": partial(plots.scores, results, scored(results))}
    if results.get("differences"):
        pictures["differences"] = partial(plots.differences, results, results["headline"])
    drawn = [axis for axis in AXES.values() if results.get(axis.key)]
    return pictures | {axis.key: partial(draw_curves, results, axis) for axis in drawn}


def scored(results: Mapping[str, Any]) -> list[str]:
    """The metrics in the picture of scores: the primary one of several methods, the headline of a single one."""
    arms = results["arms"].values()
    measured = [metric for metric in results.get("headline", HEADLINE) if any(metric in arm["metrics"] for arm in arms)]
    return measured if len(arms) == 1 else [results.get("primary_metric", measured[0])]


def draw_curves(results: Mapping[str, Any], axis: Axis, path: Path) -> Path:
    """A panel for each quantity that points have, a line with its interval for each method, the real-vs-real score as a
    dotted line."""
    curves, floor = results[axis.key], results["floor"]["metrics"]
    panels: dict[str, dict[str, dict[float, float]]] = {}
    bands: dict[str, dict[str, dict[float, tuple[float, float]]]] = {}
    for quantity in axis.drawn or results["headline"]:
        panels[quantity], bands[quantity] = {}, {}
        for method, line in curves.items():
            points = {float(point["nfe"] if axis.calls else value): point for value, point in line.items()}
            panels[quantity][method] = {x: point[quantity] for x, point in points.items() if quantity in point}
            ends = {x: point.get("intervals", {}).get(quantity) for x, point in points.items()}
            bands[quantity][method] = {x: (end["low"], end["high"]) for x, end in ends.items() if end}
    panels = {quantity: lines for quantity, lines in panels.items() if any(lines.values())}
    return plots.line_panels(
        panels,
        path,
        xlabel=axis.label,
        logarithmic_x=axis.calls,
        variants={f"{name}, guided": name for name in curves if f"{name}, guided" in curves},
        bands=bands,
        floors={name: floor[name] for name in panels if name in floor},
    )


# --- Captions ---------------------------------------------------------------------------------------------------------


def captioned(results: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Picture]:
    """Heading → picture with its caption, in the order of the report, for the files that `draw` names."""
    about = captions(results)
    return {about[name][0]: Picture(files[name], about[name][1]) for name in about if name in files}


def captions(results: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Heading and caption of every picture, by file name."""
    count, first = results.get("num_samples", NUM_SHOWN), next(iter(results["arms"]))
    seeds, several = len(results.get("seeds", [0])), len(results["arms"]) > 1
    of_seed = f" of random seed {results['seeds'][-1]}" if seeds > 1 else ""
    dots = f" Large markers are means over {seeds} random seeds, and small ones are single seeds." if seeds > 1 else ""
    of_seeds = f" for each of {seeds} random seeds" if seeds > 1 else ""
    noise = " The same place in two grids means the same starting noise." if several else ""
    metrics = scored(results)
    direction = (
        plots.DIRECTIONS[plots.direction_of(metrics[0])] if len(metrics) == 1 else "the arrows point to better values"
    )
    about = {
        "samples": (
            "Samples",
            f"The first {min(NUM_SHOWN, count)} images of each method{of_seed}, beside real test images that are "
            f"evenly spaced over their set.{noise}",
        ),
        "samples_by_steps": (
            "Samples by number of steps",
            f"The first images of each method{of_seed} at each number of steps. The same place in two grids means the "
            "same starting noise.",
        ),
        "starts": (
            "Starting points of the chain",
            f"{min(NUM_SHOWN, count)} starting points of each prior{of_seed}, which the denoiser turns into images. "
            '"Real" shows noised training images, evenly spaced over their set.',
        ),
        "scores": (
            "Scores",
            f"The value of each method from {count:,} images ({direction}).{dots} The dotted line is the real-vs-real "
            "score.",
        ),
        "differences": (
            f"Comparison with {first}",
            f"Each method divided by {first}: geometric mean over {seeds} paired random seeds with 95% intervals, on "
            f"logarithmic axes. ×0.5 is half the value of {first}, and the arrows show which side is better. Filled "
            "markers are significant by the tests in the tables. These test differences, not ratios: the interval of "
            "a hollow marker can exclude ×1. The dotted line is the real-vs-real score.",
        ),
    }
    for axis in AXES.values():
        bands = " Bands are 95% intervals." if seeds > 1 else ""
        about[axis.key] = (
            f"Quality by {axis.label if axis.calls else axis.title}",
            f"Every marker is a method at one value of {axis.label}, measured on {count:,} images{of_seeds}.{bands} "
            "Dashed lines with hollow markers are guided variants of the method in the same colour. The dotted line is "
            "the real-vs-real score.",
        )
    return about | {
        "features": (
            "Features",
            f"Features of real test images (grey) and of samples{of_seed} (coloured) by the evaluator, in the plane of "
            "the two main principal directions of the real ones. Good samples cover the grey points evenly.",
        ),
        "failures": (
            "Worst samples",
            f"For each method the {min(NUM_FAILURES, count)} of {count:,} samples{of_seed} that are furthest from all "
            "real test images in the features of the evaluator, the worst on the left. Below each is the nearest real "
            "image.",
        ),
        "loss_curves": (
            "Training losses",
            f"Losses along training{of_seed}; lower is better within one method. Losses with different terms cannot be "
            "compared.",
        ),
    }


def pictures_beside(results: Mapping[str, Any], file: Path, scratch: Path) -> dict[str, Picture]:
    """The pictures of recorded results: those of images that lie beside the file, those of numbers drawn anew.

    Beside `FILE.json` they are named `FILE_samples.png` and so on; in the folder of a study, `samples.png`.

    Args:
        results: the contents of `file`.
        file: recorded results.
        scratch: folder for new pictures.
    """
    prefixes = ["", f"{file.stem}_"] if file.stem == "results" else [f"{file.stem}_"]
    beside = [(name, file.with_name(f"{prefix}{name}.png")) for prefix in prefixes for name in BESIDE]
    files = {name: picture for name, picture in beside if picture.is_file()}
    return captioned(results, files | draw_numbers(results, scratch))


# --- From the command line --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Draw one picture of recorded results: file of the results, name of the picture, PNG file to write."""
    require(len(arguments) == 3, "arguments", "be RESULTS PICTURE FILE", " ".join(arguments))
    file, name, output = arguments
    require(Path(file).is_file(), "results", "be an existing file", file)
    pictures = number_pictures(read_json(Path(file)))
    require(name in pictures, "picture", f"be one of {', '.join(pictures)}", name)
    pictures[name](Path(output))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
