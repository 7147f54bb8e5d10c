"""`demo`, `train` and the studies: commands that run for minutes or hours and leave a folder."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import require
from ..files import expand_home
from ..launch.commands import run_command, training_command
from .process import call_arguments, chosen_device, data_options, prepare_libraries, stop_on_sigterm


def run_demo(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """All methods on the embedded digits."""
    stop_on_sigterm()
    prepare_libraries()
    from ..studies.demo import run_demo as run

    run(arguments.output, seed=arguments.seed)
    return 0


def run_train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check the configuration here, then hand over to the script; its exit status is ours."""
    command = training_command(
        arguments.script,
        overrides,
        config=arguments.config,
        num_processes=arguments.num_processes,
        accelerate_config=arguments.accelerate_config,
    )
    print(f"train {arguments.script}: importing libraries, then loading the data set", flush=True)
    return run_command(command)


def run_guide(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """A pipeline that exists, guided towards a data set, beside the plain one."""
    stop_on_sigterm()
    prepare_libraries()
    from ..studies.guide import GuideOptions, guide

    passed_on = ("num_inference_steps", "class_guidance_scale", "guidance_scale")
    call = {name: getattr(arguments, name) for name in passed_on if getattr(arguments, name) is not None}
    same = ("network", "evaluator", "class_shares", "num_images", "num_references", "batch_size", "seed")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in same}
    results = guide(
        arguments.pipeline,
        arguments.dataset,
        arguments.output,
        GuideOptions(**given, field_samples=arguments.field, call=call, data_options=data_options(arguments)),
        device=chosen_device(arguments.device),
        overwrite=arguments.overwrite,
        log=(lambda line: None) if arguments.json else partial(print, flush=True),
    )
    if arguments.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    return 0


def study_options(name: str) -> type:
    """The configuration of `compare` or `truncation`, which is imported with its libraries."""
    prepare_libraries()
    if name == "compare":
        from ..studies.config import StudyConfig

        return StudyConfig
    from ..studies.truncation import TruncationConfig

    return TruncationConfig


def run_compare(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """Variants over paired random seeds; the exit status is 3 where time ran out before all seeds were done."""
    words = [expand_home(word) for word in (*arguments.variants, *unknown)]
    options = [word for word in words if word.startswith("-")]
    require(not options, "variants", "be pipelines, names or key=value", "".join(options[:1]))
    names = [word for word in words if not _is_override(word)]
    given = {name: getattr(arguments, name) for name in ("dataset", "evaluator", "seeds", "num_samples")}
    given["output_dir"] = arguments.output
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    overrides += [word for word in words if word not in names]
    stop_on_sigterm()
    prepare_libraries()
    from ..studies.config import choose_variants, read_config
    from ..studies.run import run_study

    config = read_config(arguments.config, overrides, arguments.num_inference_steps)
    results = run_study(choose_variants(config, names) if names else config, max_seconds=arguments.max_seconds)
    return 0 if results["complete"] else 3


def _is_override(word: str) -> bool:
    """Whether a word is a `key=value`, and not the name of a variant or a pipeline.

    Example:
        >>> _is_override("seeds=3"), _is_override("guided, w=2")
        (True, False)
    """
    key, equals, _ = word.partition("=")
    return bool(equals) and key.isidentifier() and not os.path.exists(word)


def run_track(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Metrics of every checkpoint of the runs, in one report."""
    prepare_libraries()
    from ..studies.tracking import track_runs

    output: Path = arguments.output
    track_runs(
        _named_folders(arguments.runs),
        output,
        dataset=arguments.dataset,
        evaluator=arguments.evaluator,
        num_samples=arguments.num_samples,
        features=arguments.features,
        call=call_arguments(arguments),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=chosen_device(arguments.device),
        data_options=data_options(arguments),
    )
    print(output / "report.html")
    return 0


def _named_folders(runs: Sequence[str]) -> dict[str, Path]:
    """Name to folder: `NAME=FOLDER` gives both; a folder alone is named by the end of its path."""
    from ..outgoing import distinct_names

    pairs = [run.partition("=") if "=" in run and not os.path.exists(run) else ("", "", run) for run in runs]
    by_folder = distinct_names([folder for *_, folder in pairs])
    names = [name or distinct for (name, _, _), distinct in zip(pairs, by_folder, strict=True)]
    require(len(set(names)) == len(names), "runs", "be different", list(runs))
    return {name: Path(folder) for name, (_, _, folder) in zip(names, pairs, strict=True)}


def run_stress(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Every metric on damaged real images."""
    prepare_libraries()
    from ..studies.stress import run_stress_study

    run_stress_study(
        arguments.dataset,
        arguments.evaluator,
        arguments.output,
        num_samples=arguments.num_samples,
        repeats=arguments.repeats,
        seed=arguments.seed,
        device=chosen_device(arguments.device),
        data_options=data_options(arguments),
    )
    return 0


def run_truncation(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The study of priors; the exit status is 3 where time ran out before it was done."""
    stop_on_sigterm()
    prepare_libraries()
    from ..config import load_config
    from ..launch.commands import preset_path
    from ..studies.truncation import TruncationConfig, run_truncation_study

    preset = ["--config", str(preset_path(arguments.config))] if arguments.config else []
    config = load_config(TruncationConfig, [*preset, *overrides])
    return 0 if run_truncation_study(config, max_seconds=arguments.max_seconds)["complete"] else 3


def run_truncated_set(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """x_T' of every image of a split, as parquet files."""
    output: Path = arguments.output
    require(not os.path.lexists(output), "output", "be a new folder", str(output))
    prepare_libraries()
    from diffusers import DDPMScheduler

    from ..data import load_images
    from ..data.truncated_set import export_truncated_set
    from ..sampling import load_pipeline
    from ..schedules import truncated_scheduler

    full = load_pipeline(arguments.denoiser).scheduler if arguments.denoiser else DDPMScheduler()
    scheduler = truncated_scheduler(full, arguments.truncation_timestep)
    images = load_images(arguments.dataset, arguments.split, **data_options(arguments))
    options = {"num_epochs": arguments.num_epochs, "seed": arguments.seed}
    print(export_truncated_set(images, scheduler, output, **options))
    return 0
