"""A study as a whole: train, sample, evaluate, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data import load_images
from ..errors import require
from ..evaluation.evaluate import FEWEST_REAL
from ..features import load_reference_bank
from ..files import write_json, write_text
from ..launch.commands import preset_path, training_command
from ..reporting import report
from ..sampling import check_call_arguments, load_pipeline
from .config import StudyConfig, with_step_curves
from .pictures import captioned, draw
from .results import collect, evaluate_seed, markdown, tables, text
from .runs import train_runs
from .sampling import sampled, samples_file
from .study import (
    RECORD_NAME,
    Clock,
    Log,
    OutOfTime,
    Study,
    check_study_folder,
    claim_folder,
    read_json,
    settings_of,
    stage,
)

Extend = Callable[[Study, dict[str, Any]], tuple[dict[str, Any], dict[str, Path]]]


def run_study(
    config: StudyConfig,
    *,
    max_seconds: float | None = None,
    log: Log = print,
    extend: Extend | None = None,
) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md`, `report.html` and pictures for the completed seeds.

    Args:
        config: the study; at least two variants.
        max_seconds: stop cleanly after about this time; the next call resumes the study.
        log: takes the progress messages.
        extend: adds results and pictures (file name to path) to those of every study.

    Returns:
        The contents of `results.json`, see `collect`; `"complete"` tells whether all seeds are done.

    Raises:
        InputError: a folder that holds another study, a variant that does not exist.
        RuntimeError: a training script that failed, with the end of its log.
    """
    require(len(config.reported) >= 2, "arms", "be at least two", list(config.reported))
    require(max_seconds is None or max_seconds > 0, "max_seconds", "be positive", max_seconds)
    study = open_study(config, Clock(max_seconds), log)
    before, record = done_seeds(study), study.output / "results.json"
    try:
        for seed in study.seeds:
            run_seed(study, seed)
    except OutOfTime:
        log(f"stopped after {study.clock.seconds:.0f} s (--max-seconds); rerun the same command to resume")
    done = done_seeds(study)
    if not done:
        return {"complete": False, "seeds": []}
    if done == before and len(done) < len(study.seeds) and record.is_file():  # nothing new to report
        return read_json(record) | {"complete": False}
    output = study.output
    with stage("write the report", log):
        results = collect(study, done)
        more, more_files = extend(study, results) if extend is not None else ({}, {})
        results |= more
        write_json(record, results)
        write_text(output / "results.md", markdown(results))
        pictures = captioned(results, draw(study, results, done[-1]) | more_files)
        report.write_report(results, pictures, output / "report.html", tables=tables(results))
    log(f"\n{text(results)}\n\nThe report: {output / 'report.html'}")
    return results


def done_seeds(study: Study) -> list[int]:
    """The random seeds whose variants have been scored."""
    return [seed for seed in study.seeds if (study.folder(seed) / "metrics.json").is_file()]


def open_study(config: StudyConfig, clock: Clock, log: Log) -> Study:
    """Check everything that can be checked, then claim the folder.

    Raises:
        InputError: see `check_study_folder`, `check_variants`, `check_images` and `claim_folder`.
    """
    output = Path(config.output_dir)
    check_study_folder(output / RECORD_NAME, "output_dir")
    study = Study(with_step_curves(config), output, clock, log)
    check_variants(config)
    check_images(study)
    claim_folder(output / RECORD_NAME, settings_of(config), "output_dir")
    return study


def check_variants(config: StudyConfig) -> None:
    """Refuse variants that cannot be sampled or trained, before anything is written.

    Raises:
        InputError: naming the pipeline, the argument of its call, or the key of its configuration.
    """
    own = config.features if config.features and not preset_path(config.features).is_file() else None
    for variant in config.arms.values():
        if variant.pipeline is not None and "{" not in variant.pipeline + (variant.features or ""):
            pipeline = load_pipeline(variant.pipeline, None if variant.start else variant.features)
            if variant.start is None:
                check_call_arguments(pipeline, config.call | variant.call)
        features = own if variant.features == "{features}" else variant.features
        if features is not None and "{" not in features:
            load_reference_bank(features)
        if variant.train is not None:
            training_command(variant.train, [*config.overrides, *variant.overrides], config=variant.preset)


def check_images(study: Study) -> None:
    """Refuse real images that the samples cannot be compared with, before anything is written.

    Raises:
        InputError: naming the data set, which may have too few images, or the evaluator that does not fit it.
    """
    config = study.config
    if study.trains("evaluator"):
        splits = {split: load_images(config.dataset, split, **config.data_options) for split in ("train", "test")}
    else:
        splits = study.splits
    count = len(splits["train"])
    require(count >= FEWEST_REAL, "dataset", f"have {FEWEST_REAL} training images for the real-vs-real score", count)


def run_seed(study: Study, seed: int) -> None:
    """Train, sample and evaluate every variant with one seed."""
    record = study.folder(seed) / "metrics.json"
    if record.is_file():
        return
    train_runs(study, seed)
    stages = {f"sample {name}": [name] for name in study.config.reported}
    points = [name for name in study.config.sampled if name not in study.config.reported]
    stages |= {"sample the points of the curves": points} if points else {}
    for title, names in stages.items():
        if not all(samples_file(study, name, seed).is_file() for name in names):
            with stage(study.headed(title, seed), study.log):
                for name in names:
                    sampled(study, name, seed)
    study.clock.check()
    with stage(study.headed("evaluate", seed), study.log):
        write_json(record, evaluate_seed(study, seed))
