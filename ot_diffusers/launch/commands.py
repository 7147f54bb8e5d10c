"""The training scripts as commands: paths of scripts and presets, how a script is started, and the settings that a
launcher has made for it.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import yaml

from ..config import (
    PRECISIONS,
    BaselineConfig,
    FeaturesConfig,
    FewStepConfig,
    OTConfig,
    PriorConfig,
    TrainingConfig,
    load_config,
)
from ..errors import InputError, require
from ..files import expand_home

C = TypeVar("C", bound=TrainingConfig)

SCRIPTS: dict[str, tuple[str, type[Any]]] = {
    "features": ("train_features.py", FeaturesConfig),
    "baseline": ("train_baseline.py", BaselineConfig),
    "ot": ("train_ot.py", OTConfig),
    "prior": ("train_prior.py", PriorConfig),
    "few_step": ("train_few_step.py", FewStepConfig),
}
"""Name on the command line to script and configuration class."""

PACKAGE = Path(__file__).parent.parent
CHECKOUT = PACKAGE.parent


def script_path(name: str) -> Path:
    """The script called `name`: `train/` in a checkout, `scripts/` inside an installed package."""
    file = SCRIPTS[name][0]
    in_checkout = CHECKOUT / "train" / file
    return in_checkout if in_checkout.is_file() else PACKAGE / "scripts" / file


def preset_path(name: str) -> Path:
    """A file as it is; otherwise the preset of that name, such as `digits/ot.yaml` or `configs/mnist/ot.yaml`."""
    name = expand_home(name)
    if os.path.isfile(name):
        return Path(name)
    preset = presets_folder() / name.removeprefix("configs/")
    return preset if os.path.isfile(preset) else Path(name)


def presets_folder() -> Path:
    """`configs/` of a checkout or of an installed package."""
    checkout = (CHECKOUT / "configs").is_dir() and (CHECKOUT / "train").is_dir()
    return (CHECKOUT if checkout else PACKAGE) / "configs"


def presets_of(command: str) -> list[str]:
    """The presets of a training script or study, such as `digits/ot.yaml`, in order."""
    words = {"features": ("features", "evaluator")}.get(command, (command,))
    folder = presets_folder()
    files = [file for file in sorted(folder.rglob("*.yaml")) if file.parent.name != "accelerate"]
    studies = {file for file in files if "\narms:" in file.read_text(encoding="utf-8")}
    of_scripts = [file for file in files if file not in studies and file.stem.split("_")[0] in words]
    chosen = sorted(studies) if command == "compare" else of_scripts
    return [file.relative_to(folder).as_posix() for file in chosen]


def training_command(
    name: str,
    overrides: Sequence[str] = (),
    *,
    config: str | None = None,
    num_processes: int = 1,
    accelerate_config: str | None = None,
) -> list[str]:
    """The command line that trains: this Python for one process, `ot_diffusers.launch.workers` for several.

    Args:
        name: a key of `SCRIPTS`.
        overrides: `key=value`.
        config: YAML file, or a preset's name.
        num_processes: on this machine.
        accelerate_config: file of `accelerate config`; it then decides about processes.

    Raises:
        InputError: a configuration that the script would refuse, or a missing file.
    """
    require(num_processes >= 1, "num_processes", "be at least 1", num_processes)
    arguments = (["--config", str(preset_path(config))] if config else []) + list(overrides)
    values = load_config(SCRIPTS[name][1], arguments)
    script = [str(script_path(name)), *arguments]
    if accelerate_config is not None:
        accelerate_config = expand_home(accelerate_config)
        launched(values, _environment_of(accelerate_config))
        count = ["--num_processes", str(num_processes)] if num_processes > 1 else []
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate_config]
        return [*launcher, *count, *script]
    if num_processes > 1:
        return [sys.executable, "-m", "ot_diffusers.launch.workers", str(num_processes), *script]
    return [sys.executable, *script]


def _environment_of(accelerate_config: str) -> dict[str, str]:
    """The environment that a file of `accelerate config` gives to scripts, as far as it concerns their options."""
    require(Path(accelerate_config).is_file(), "accelerate_config", "be an existing file", accelerate_config)
    try:
        decided = yaml.safe_load(Path(accelerate_config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"`accelerate_config` must be valid YAML, got {accelerate_config!r}") from error
    require(isinstance(decided, dict), "accelerate_config", "be a file of `accelerate config`", accelerate_config)
    precision = decided.get("mixed_precision") or "no"  # YAML reads a bare `no` as False
    return {"ACCELERATE_MIXED_PRECISION": str(precision)}


def launched(config: C, environment: Mapping[str, str] = os.environ) -> C:
    """The configuration with the launcher's mixed precision and gradient accumulation where it leaves them open;
    without a launcher, in full precision and with one forward pass for an update.

    `accelerate launch` sets mixed precision to "no" by default. So "no" is not taken for a decision, and the
    configuration's value applies.

    Raises:
        InputError: launcher and configuration differ, or the launcher has a setting that no script supports.
    """
    precision = (environment.get("ACCELERATE_MIXED_PRECISION") or "no").lower()
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or None
    require(precision in PRECISIONS, "ACCELERATE_MIXED_PRECISION", f"be one of {', '.join(PRECISIONS)}", precision)
    counted = steps is None or (steps.isdecimal() and int(steps) >= 1)
    require(counted, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "be a whole number of at least 1", steps)
    decided_precision = None if precision == "no" else precision
    decided_steps = None if steps is None else int(steps)
    own_precision, own_steps = config.mixed_precision, config.gradient_accumulation_steps
    for name, decided, own in (
        ("mixed_precision", decided_precision, own_precision),
        ("gradient_accumulation_steps", decided_steps, own_steps),
    ):
        agreed = decided is None or own in (None, decided)
        require(agreed, name, f"be left out or {decided}, which the launcher has set", own)
    return dataclasses.replace(
        config,
        mixed_precision=decided_precision or own_precision or "no",
        gradient_accumulation_steps=decided_steps or own_steps or 1,
    )


def run_command(command: Sequence[str]) -> int:
    """Run a training command to its end and return its exit status. SIGTERM and SIGINT are passed on to it: it saves
    and exits with status 0."""
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"OT_DIFFUSERS_LAUNCHED": "1"})
    passed_on: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.add(number)
        process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # A process that still imports its libraries is ended by the signal, and has nothing to save.
    stopped = any(status in (-number, 128 + number) for number in passed_on)
    return 0 if stopped else status
