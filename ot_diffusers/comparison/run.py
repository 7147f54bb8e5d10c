"""The comparison as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import load_images
from ..errors import require
from ..evaluation import report
from ..experiment import Announce, check_study_folder, claim_folder, stage, write_results
from ..launch import training_command
from ..sampling import check_call_arguments, load_pipeline
from .arms import run_seed, train_networks
from .config import ComparisonConfig
from .pictures import draw
from .results import collect, markdown, tables
from .study import Clock, OutOfTime, Study, settings


def run_comparison(
    config: ComparisonConfig, *, max_seconds: float | None = None, announce: Announce = print
) -> dict[str, Any]:
    """Run the comparison; write `results.json`, `results.md`, `report.html` and pictures for the seeds that are done.

    Args:
        config: the comparison; at least two arms.
        max_seconds: stop cleanly about then; the next call goes on.
        announce: takes the lines that tell how far it is.

    Returns:
        The contents of `results.json`, see `collect`; `"complete"` tells whether all seeds are done.

    Raises:
        InputError: a folder that holds another comparison, an arm that does not exist.
        RuntimeError: a training script that failed, with the end of its log.
    """
    require(len(config.arms) >= 2, "arms", "be at least two", list(config.arms))
    require(max_seconds is None or max_seconds > 0, "max_seconds", "be positive", max_seconds)
    output = Path(config.output_dir)
    check_study_folder(output / "comparison.json", "output_dir")
    check_arms(config)
    claim_folder(output / "comparison.json", settings(config), "output_dir")
    study = Study(config, output, Clock(max_seconds), announce)
    try:
        train_networks(study)
        for seed in range(config.seeds):
            run_seed(study, seed)
    except OutOfTime:
        announce(f"stopped after {study.clock.seconds:.0f} s (--max-seconds); the same command goes on")
    done = [seed for seed in range(config.seeds) if (study.folder(seed) / "metrics.json").is_file()]
    if not done:
        return {"complete": False, "seeds": []}
    with stage("write the report", announce):
        results = collect(study, done)
        write_results(results, output)
        (output / "results.md").write_text(markdown(results), encoding="utf-8")
        pictures = draw(study, results, done[0])
        report.write_report(results, pictures, output / "report.html", tables=tables(results))
    announce(f"\n{markdown(results)}\nPictures and numbers: {output / 'report.html'}")
    return results


def check_arms(config: ComparisonConfig) -> None:
    """Refuse what cannot be sampled, trained or compared with, before anything is written.

    Raises:
        InputError: naming the pipeline, the argument of its call, the key of its configuration, or the data set.
    """
    for arm in config.arms.values():
        if arm.pipeline is not None and "{" not in arm.pipeline + (arm.features or ""):
            check_call_arguments(load_pipeline(arm.pipeline, arm.features), config.call | arm.call)
        if arm.train is not None:
            training_command(arm.train, [*config.overrides, *arm.overrides], config=arm.preset)
    load_images(config.dataset, "test", **config.data_options)
