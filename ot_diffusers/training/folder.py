"""The run's folder: what may be in it when a run begins, and what says afterwards which run it was."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed

from ..config import TrainingConfig
from ..data import load_images
from ..errors import InputError, require
from .batches import Images

# Options that may change when a run goes on; any other difference makes it another run.
RESUMABLE = {
    "max_train_seconds",
    "max_train_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "num_workers",
    "report_to",
    "output_dir",
}


def check_output_dir(config: TrainingConfig) -> None:
    """Refuse a folder that holds something else than this run, before anything is written.

    Raises:
        InputError: naming the option that differs from the run in the folder.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        complete = (Path(config.resume_from_checkpoint) / "state.json").is_file()
        require(
            complete,
            "resume_from_checkpoint",
            "be latest, none or a checkpoint's folder",
            config.resume_from_checkpoint,
        )
    folder = Path(config.output_dir)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    require(folder.is_dir(), "output_dir", "be a folder", config.output_dir)
    record = folder / "run.json"
    require(record.is_file(), "output_dir", "be empty or hold a run of this script", config.output_dir)
    require(
        config.resume_from_checkpoint is not None,
        "output_dir",
        "be empty with resume_from_checkpoint=none",
        config.output_dir,
    )
    earlier, now = json.loads(record.read_text(encoding="utf-8"))["config"], _as_json(config)
    for name in sorted((earlier.keys() | now.keys()) - RESUMABLE):
        if earlier.get(name) != now.get(name):
            raise InputError(
                f"`output_dir` must be empty or hold this run, got {config.output_dir!r}, which holds a run with "
                f"{name}={earlier.get(name)!r} instead of {now.get(name)!r}"
            )


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """An accelerator for the configuration, with the random seed set alike on every process.

    Raises:
        InputError: a tracker that is not installed.
    """
    tracker = None if config.report_to == "none" else config.report_to
    installed = [str(name) for name in get_available_trackers()]
    known = tracker is None or tracker in installed
    require(known, "report_to", f"be none or an installed tracker ({', '.join(installed)})", config.report_to)
    # Without a GPU, accelerate joins a process group only where it is told to use the CPU.
    in_group = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = Accelerator(
        cpu=in_group and not (torch.cuda.is_available() or torch.xpu.is_available()),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_dir=str(Path(config.output_dir) / "logs") if tracker else None,
    )
    set_seed(config.seed)
    return accelerator


def open_run(config: TrainingConfig, accelerator: Accelerator, images: Images) -> None:
    """Create the folder, write `run.json`, start the trackers; the last place where a run can be refused.

    Raises:
        InputError: the folder holds a run on other images.
    """
    folder = Path(config.output_dir)
    before = _read_json(folder / "run.json").get("data", {}).get("fingerprint", images.fingerprint)
    require(before == images.fingerprint, "dataset", "hold the images that the run began with", config.dataset)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "script": type(config).__doc__,
            "config": _as_json(config),
            "data": {"name": images.name, "fingerprint": images.fingerprint, "num_samples": len(images)},
            "num_processes": accelerator.num_processes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_json(folder / "run.json", record)
    accelerator.wait_for_everyone()
    flat = {key: str(value) if isinstance(value, list) else value for key, value in _as_json(config).items()}
    accelerator.init_trackers("ot_diffusers", config={key: value for key, value in flat.items() if value is not None})


def _as_json(config: TrainingConfig) -> dict[str, Any]:
    """The configuration as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_json(file: Path) -> dict[str, Any]:
    """Its content; empty where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_json(file: Path, content: Any) -> None:
    """Write aside, then rename, so that a reader never meets half a file."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def load_split(config: TrainingConfig, split: str, accelerator: Accelerator) -> Images:
    """One split of the configured data set, on the training device if it is small enough to be held decoded."""
    images = load_images(
        config.dataset,
        split,
        image_column=config.image_column,
        label_column=config.label_column,
        image_size=config.image_size,
        channels=config.channels,
    )
    return images.to(accelerator.device)
