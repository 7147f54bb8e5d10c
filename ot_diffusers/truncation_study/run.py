"""The study as a whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import load_images, pixels_of
from ..evaluation import report
from ..evaluation.evaluate import describe_images, evaluate_images, real_floor
from ..evaluation.extractors import load_evaluator
from ..experiment import Announce, Sampled, as_json, check_study_folder, claim_folder, stage, write_results
from ..sampling import best_device
from .config import METRICS, TruncationConfig
from .pictures import draw
from .results import collect, markdown, score
from .sampling import sample_curves, sample_rows
from .study import Study
from .training import check_parts, train_networks, train_priors


def run_study(config: TruncationConfig, announce: Announce = print, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md`, `report.html` and pictures; returns the results.

    Args:
        config: of the study.
        announce: takes the lines that tell how far it is.
        overrides: `key=value` for every training script, such as `max_train_steps=4`.

    Raises:
        InputError: a folder that holds something else, a preset that does not exist.
        RuntimeError: a training script that failed, with the end of its log.
    """
    output = Path(config.output_dir)
    check_study_folder(output / "study.json", "output_dir")
    started = time.monotonic()
    data = {split: load_images(config.dataset, split) for split in ("train", "test")}
    study = Study(config, output, data["train"], data["test"], announce, overrides)
    check_parts(study)
    claim_folder(output / "study.json", as_json(config, "output_dir"), "output_dir")

    # Train.
    train_networks(study)
    train_priors(study)

    # Sample every row of the table from the same seeds, then the curves.
    with stage(f"sample {study.num_samples} images for each row", announce):
        rows = sample_rows(study)
    curves: dict[str, dict[int, Sampled]] = {}
    if config.timesteps:
        with stage(f"sample the curves over T' in {config.timesteps}", announce):
            curves = sample_curves(study)

    # Evaluate with the network that no loss has seen.
    with stage("evaluate", announce):
        extractor = load_evaluator(study.evaluator).to(best_device())
        test, training = (
            describe_images(pixels_of(images), extractor, labels=images.labels)
            for images in (data["test"], data["train"])
        )
        described = {name: describe_images(row.images, extractor) for name, row in rows.items()}
        metrics = {
            name: evaluate_images(found, reference=test, extractor=extractor, train=training, metrics=METRICS)
            for name, found in described.items()
        }
        floor = real_floor(test, training, study.num_samples, extractor=extractor, metrics=METRICS)
        scored = {
            name: {step: score(sampled, test, extractor) for step, sampled in points.items()}
            for name, points in curves.items()
        }

    # Report.
    with stage("write the report", announce):
        results = collect(study, rows, metrics, floor, scored, test, extractor)
        write_results(results, output)
        (output / "results.md").write_text(markdown(results), encoding="utf-8")
        pictures = draw(study, results, rows, described, test)
        report.write_report(results, pictures, output / "report.html")
    announce(f"\n{markdown(results)}\n")
    announce(f"{time.monotonic() - started:.0f} s in all. Pictures and numbers: {output / 'report.html'}")
    return results
