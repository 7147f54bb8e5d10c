"""Distances to real images for every checkpoint of a run, which show progress and memorisation.

    coverage   D(train, generated)     fidelity  D(test, generated)
    base line  D(train, test)          generalisation gap = fidelity − coverage

Distances depend on the number of images, so all of them use as many real images of a split as there are generated ones.
If the gap grows while coverage falls below the base line, the model has begun to copy its training images.

    runs = {"before": Path("runs/baseline"), "after": Path("runs/ot")}
    tracks = track_runs(runs, Path("runs/tracking"), dataset="digits", evaluator="runs/evaluator")
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import BaselineConfig, make_config
from ..data import evenly_spaced, pixels_of
from ..errors import require, require_same
from ..evaluation import metrics
from ..evaluation.evaluate import ImageSet, extract_image_set
from ..evaluation.extractors import evaluator_facts, load_evaluator, load_real_images
from ..evaluation.health import evaluator_line, evaluator_properties
from ..evaluation.metric_table import METRICS
from ..features import load_feature_extractor, load_reference_bank, weights_fingerprint
from ..files import sha256, user_path, write_json
from ..pipelines.classes import Classes
from ..reporting import plots
from ..reporting.page import (
    Picture,
    Rows,
    figure,
    next_steps,
    paragraphs,
    provenance,
    provenance_list,
    rows_table,
    write_page,
)
from ..reporting.report import NEXT, format_number
from ..sampling import sample_images
from ..training import make_noise_scheduler, make_pipeline, make_unet
from .study import Log, check_study_folder

RECORD_NAME = "tracking.json"
FEW_CHECKPOINTS = 3
DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frechet_distance": metrics.frechet_distance,
    "sinkhorn_distance": metrics.sinkhorn_distance,
}

Distances = dict[str, float]


@dataclass(frozen=True)
class Point:
    """Distances of one checkpoint, by name.

    Attributes:
        update: number of training steps.
        coverage: train – generated.
        fidelity: test – generated.
        weights: SHA-256 of the measured weights.
    """

    update: int
    coverage: Distances
    fidelity: Distances
    weights: str

    @property
    def gap(self) -> Distances:
        """Fidelity minus coverage."""
        return {name: self.fidelity[name] - self.coverage[name] for name in self.fidelity}


@dataclass(frozen=True)
class Track:
    """The checkpoints of a run.

    Attributes:
        base_line: train – test.
        points: checkpoints in the order of training.
    """

    base_line: Distances
    points: tuple[Point, ...]


@dataclass(frozen=True)
class RealImages:
    """Equally many training and test images of the data set `name`, with their features."""

    train: ImageSet
    test: ImageSet
    name: str

    @classmethod
    def load(cls, dataset: str, extractor: Any, num_samples: int | None, **options: Any) -> RealImages:
        """`num_samples` evenly spaced images of each split; by default the size of the smaller split."""
        splits = {split: load_real_images(dataset, split, extractor, **options) for split in ("train", "test")}
        most = min(map(len, splits.values()))
        count = num_samples or most
        require(2 <= count <= most, "num_samples", f"lie in 2 … {most}", count)
        image_sets = {}
        for split, images in splits.items():
            rows = evenly_spaced(images, count)
            labels = None if images.labels is None else images.labels[rows]
            image_sets[split] = extract_image_set(pixels_of(images, rows), extractor, labels=labels)
        return cls(**image_sets, name=splits["test"].name)


def track_runs(
    runs: Mapping[str, Path],
    output: Path,
    *,
    dataset: str,
    evaluator: str,
    num_samples: int | None = None,
    features: str | None = None,
    call: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: Any = "cpu",
    data_options: Mapping[str, Any] | None = None,
    log: Log = print,
) -> dict[str, Track]:
    """Measure every checkpoint of every run from the same starting noise, and write `tracking.json` and a report.

    Checkpoints of an earlier call are not measured again and stay in the report after they have been deleted, so a run
    can be tracked while it trains.

    Args:
        runs: name to folder of a `train_baseline.py` or `train_ot.py` run.
        output: folder for `tracking.json`, written after every checkpoint, `tracking.png` and `report.html`.
        dataset: real images.
        evaluator: see `load_evaluator`; a network that is not used in training or guidance.
        num_samples: number of generated images and of real images of each split; by default the size of the smaller
            split.
        features: run of `train_features.py` whose network and reference set guide every checkpoint.
        call: arguments of the pipeline call.
        batch_size, seed: see `sample_images`.
        device: device of the pipelines and the evaluator.
        data_options: options of `load_images`, such as `image_size`.
        log: takes the progress messages.

    Raises:
        InputError: a folder that is no such run, or an `output` with other settings.
    """
    file = user_path(output) / RECORD_NAME
    check_study_folder(file)
    output, runs = file.parent, {name: user_path(run) for name, run in runs.items()}
    checkpoints = {name: find_checkpoints(run) for name, run in runs.items()}
    extractor = load_evaluator(evaluator).to(device)
    real = RealImages.load(dataset, extractor, num_samples, **(data_options or {}))
    settings = {
        "dataset": real.name,
        "evaluator": weights_fingerprint(extractor),
        "num_samples": len(real.test),
        "features": weights_fingerprint(load_feature_extractor(features)) if features else None,
        "call": dict(call or {}),
        "seed": seed,
        "data_options": dict(data_options or {}) or None,
    }
    tracks = read_tracks(file, settings)
    base_line = measure(real.train, real.test)
    for name, folders in checkpoints.items():
        if len(folders) < FEW_CHECKPOINTS:
            log(f"{name}: {len(folders)} checkpoints; a run with checkpoints_total_limit=1000 keeps them all")
        points = {point.update: point for point in tracks[name].points} if name in tracks else {}
        for folder in folders:
            update, weights = int(folder.name.removeprefix("update-")), sha256(folder / "ema.safetensors")
            if update not in points or points[update].weights != weights:
                pipeline = load_checkpoint(runs[name], folder, real.test, features).to(device)
                images = sample_images(pipeline, len(real.test), batch_size=batch_size, seed=seed, **(call or {}))
                image_set = extract_image_set(images, extractor)
                points[update] = Point(update, measure(image_set, real.train), measure(image_set, real.test), weights)
                log(f"{name}, update {update}: {summary(points[update])}")
            tracks[name] = Track(base_line, tuple(points[update] for update in sorted(points)))
            write_tracks(file, settings, tracks)
    tracks = {name: tracks[name] for name in runs}
    write_report(tracks, output, settings, evaluator_facts(extractor, real.test))
    return tracks


def find_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first.

    Raises:
        InputError: no checkpoint with averaged weights, or a run without its own UNet and noise schedule.
    """
    folders = sorted(run.glob(f"checkpoints/update-{'[0-9]' * 8}/ema.safetensors"))
    record = run / "run.json"
    options = json.loads(record.read_text(encoding="utf-8"))["config"] if record.is_file() else {}
    own = "beta_schedule" in options
    require(own, "run", "be the folder of a train_baseline.py or train_ot.py run", str(run))
    require(bool(folders), "run", "hold checkpoints with averaged weights", str(run))
    return [file.parent for file in folders]


def load_checkpoint(run: Path, checkpoint: Path, images: ImageSet, features: str | None) -> Any:
    """A pipeline with the averaged weights of a checkpoint, for the image shape of `images`; guided with `features`."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    options, counts = record["config"], record.get("data", {}).get("class_counts")
    names = {field.name for field in dataclasses.fields(BaselineConfig)}
    config = make_config(BaselineConfig, {name: value for name, value in options.items() if name in names})
    channels, height, width = images.images.shape[1:]
    classes = None
    if config.class_conditional:
        classes = Classes.from_counts(counts, has_null_label=config.class_dropout > 0)
    unet = make_unet(config, (channels, height, width), classes).eval()
    averaged = load_file(checkpoint / "ema.safetensors")
    with torch.no_grad():
        for index, parameter in enumerate(unet.parameters()):
            parameter.copy_(averaged[str(index)])
    network = None if features is None else load_feature_extractor(features)
    bank = None if features is None else load_reference_bank(features)
    pipeline = make_pipeline(unet, make_noise_scheduler(config), network, bank, classes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(images: ImageSet, reference: ImageSet) -> Distances:
    """Every distance between two sets."""
    return {name: distance(images.features, reference.features) for name, distance in DISTANCES.items()}


def summary(point: Point) -> str:
    """The fidelity, for a progress message."""
    return ", ".join(f"{name.replace('_', ' ')} to test images {value:.3g}" for name, value in point.fidelity.items())


def read_tracks(file: Path, settings: Mapping[str, Any]) -> dict[str, Track]:
    """The tracks of an earlier call with the same settings.

    Raises:
        InputError: an earlier call had other settings.
    """
    if not file.is_file():
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    require_same(settings, record["settings"], "output")
    return {
        name: Track(track["base_line"], tuple(Point(**_without_gap(point)) for point in track["points"]))
        for name, track in record["runs"].items()
    }


def write_tracks(file: Path, settings: Mapping[str, Any], tracks: Mapping[str, Track]) -> None:
    """`tracking.json`, written aside and renamed."""
    runs = {
        name: {
            "base_line": track.base_line,
            "points": [dataclasses.asdict(point) | {"gap": point.gap} for point in track.points],
        }
        for name, track in tracks.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": dict(settings), "runs": runs})


def write_report(
    tracks: Mapping[str, Track], output: Path, settings: Mapping[str, Any], extractor: Mapping[str, Any]
) -> Path:
    """The curves of all runs as `tracking.png`, and `report.html` with that picture and a table for each distance."""
    heading = "Distances along training"
    caption = (
        f"Each marker is a checkpoint, measured on {settings['num_samples']:,} images from the same starting noise. "
        "Lower distances are better. The dashed line is the distance between real training images and real test images."
    )
    curves = Picture(plots.tracking_curves(tracks, output / "tracking.png"), caption)
    sections = {heading: figure(curves, heading)}
    sections |= {METRICS[name].title: rows_table(stand_rows(tracks, name)) for name in DISTANCES}
    notes = [
        evaluator_line(extractor),
        "Fidelity is the distance from generated images to test images, and coverage is the distance to training "
        "images. The gap is fidelity minus coverage. Every distance uses as many real images of a split as there are "
        "generated images.",
        "If the gap grows while coverage falls below the dashed line, the model has begun to copy its training images.",
    ]
    sections["How to read this page"] = paragraphs(notes)
    sections["Next steps"] = next_steps(NEXT)
    sections["Provenance"] = provenance_list(provenance() | {"settings": settings})
    facts = [
        f"data set {settings['dataset']}",
        f"{settings['num_samples']:,} images per checkpoint and split",
        f"evaluated by {extractor['name']}",
        *evaluator_properties(extractor),
    ]
    return write_page(output / "report.html", f"Along training: {' · '.join(tracks)}", sections, facts=facts)


def stand_rows(tracks: Mapping[str, Track], distance: str) -> Rows:
    """Every run with its best checkpoint by fidelity and its last one; the base line below."""
    header = ["", "best fidelity", "at step", "last fidelity", "at step", "last coverage", "last gap"]
    rows = []
    for name, track in tracks.items():
        best, last = min(track.points, key=lambda point: point.fidelity[distance]), track.points[-1]
        numbers = [best.fidelity[distance], best.update, last.fidelity[distance], last.update]
        numbers += [last.coverage[distance], last.gap[distance]]
        rows.append([name, *map(format_number, numbers)])
    base_line = format_number(next(iter(tracks.values())).base_line[distance])
    return [header, *rows, ["train – test", base_line, "–", base_line, "–", base_line, "–"]]


def _without_gap(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != "gap"}
