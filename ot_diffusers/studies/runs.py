"""The training runs of a study: its networks, and the variants that are trained, each a call of a script."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import require
from ..features import load_feature_extractor, weights_fingerprint
from ..launch.commands import training_command
from .config import NETWORKS, StudyConfig, twin
from .study import OutOfTime, Study, read_json, stage

EVALUATOR_SEED = 1000
"""Added to the seed of a study for its evaluation network."""
LOG_LINES = 12


def train_runs(study: Study, seed: int) -> None:
    """Train the networks, once for all seeds, and the variants of this seed; complete runs are not repeated.

    Raises:
        InputError: the evaluator is also the network of losses and guidance.
        OutOfTime: the time ended before all were complete.
        RuntimeError: a script that failed, with the end of its log, or was stopped by a signal.
    """
    networks = [name for name in NETWORKS if study.trains(name)]
    for name in networks:
        train_group(study, group_of(study, name, seed), seed)
    check_independent(study)
    for name in study.config.trained:
        train_group(study, group_of(study, name, seed), seed)


def group_of(study: Study, name: str, seed: int) -> list[str]:
    """The run and those that are trained at the same time, without complete ones; on a GPU there is one at a time."""
    groups = [group for group in study.config.together if name in group and not torch.cuda.is_available()]
    runs = [other for other in (groups[0] if groups else (name,)) if other not in NETWORKS or study.trains(other)]
    return [other for other in runs if not is_trained(study, other, seed)]


def train_group(study: Study, names: Sequence[str], seed: int) -> None:
    """Train these runs at the same time."""
    if not names:
        return
    study.clock.check()
    shared = all(study.config.is_shared(name) for name in names)
    folder = study.output if shared else study.folder(seed)
    title = f"train {' and '.join(names)}"
    with stage(title if shared else study.headed(title, seed), study.log):
        run_side_by_side({name: command(study, name, seed) for name in names}, folder / "logs")
    unfinished = [name for name in names if not is_trained(study, name, seed)]
    if unfinished and study.clock.max_seconds is not None:
        raise OutOfTime
    if unfinished:
        raise RuntimeError(
            f"training {' and '.join(unfinished)} was stopped by a signal; rerun the same command to resume"
        )


def command(study: Study, name: str, seed: int) -> list[str]:
    """The command that trains a network or variant into its folder."""
    config = study.config
    script, preset, own = "features", getattr(config, name, None), [f"seed={network_seed(config, name)}"]
    left, last = study.clock.left, []
    if name in config.arms:
        variant = config.arms[name]
        script, preset, own = str(variant.train), variant.preset, [f"seed={study.seeds[0] if variant.once else seed}"]
        last = [study.resolve(text, seed) for text in variant.overrides]
        last += [f"max_train_steps={equal_time_updates(study, name, seed)}"] if variant.seconds_of else []
        left = min(left, seconds_left(study, name, seed))
    last += [f"max_train_seconds={max(left, 1)}"] if left < math.inf else []
    placed = [f"dataset={config.dataset}", f"output_dir={study.run(name, seed)}", "report_to=none"]
    return training_command(script, [*placed, *own, *config.overrides, *last], config=preset)


def network_seed(config: StudyConfig, name: str) -> int:
    """The random seed of a network that is trained once for all seeds."""
    return (config.seed or 0) + (EVALUATOR_SEED if name == "evaluator" else 0)


def seconds_left(study: Study, name: str, seed: int) -> float:
    """Remaining training time of a run, infinite without a limit."""
    limit = study.config.arms[name].max_train_seconds if name in study.config.arms else None
    record = study.run(name, seed) / "results.json"
    spent = read_json(record)["training_seconds"] if record.is_file() else 0.0
    return math.inf if limit is None else limit - spent


def equal_time_updates(study: Study, name: str, seed: int) -> int:
    """Training steps that the variant makes in the training time of `seconds_of`, at the pace of its twin."""
    same, other = twin(study.config, name), study.config.arms[name].seconds_of
    pace, budget = (read_json(study.run(str(run), seed) / "results.json") for run in (same, other))
    return max(1, round(pace["updates"] * budget["training_seconds"] / pace["training_seconds"]))


def is_trained(study: Study, name: str, seed: int) -> bool:
    """Whether a run is complete or has used up its own time limit; a run stopped by `--max-seconds` has not."""
    record = study.run(name, seed) / "results.json"
    return record.is_file() and (bool(read_json(record)["complete"]) or seconds_left(study, name, seed) <= 0)


def run_side_by_side(commands: Mapping[str, Sequence[str]], logs: Path) -> None:
    """Run the commands at the same time, sharing the cores, with their output in the folder `logs`.

    Raises:
        RuntimeError: a command that failed, with the end of its log; the others are stopped.
    """
    # When all cores are busy, more threads in one process slow down the others.
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    logs.mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, words in commands.items():
            with (logs / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        for name, process in processes.items():
            if process.wait() != 0:
                raise RuntimeError(f"training {name!r} failed:\n{end_of_log(logs / f'{name}.log')}")
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


def end_of_log(file: Path) -> str:
    """The last lines of a log, with the final state of each progress bar only."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    shown = [line.rstrip("\r").split("\r")[-1] for line in lines if line.strip()]
    return "\n".join(f"    {line}" for line in [*shown[-LOG_LINES:], f"(the whole log: {file})"])


def check_independent(study: Study) -> None:
    """Refuse an evaluator that is also the network of losses and guidance."""
    if study.config.features is not None:
        evaluator, features = study.extractor, load_feature_extractor(study.network("features"))
        independent = weights_fingerprint(evaluator) != weights_fingerprint(features)
        require(independent, "evaluator", "be another network than the one that losses see", type(evaluator).__name__)
