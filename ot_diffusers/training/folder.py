"""The run's folder: what may be in it when a run begins, and what says afterwards which run it was."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed

from ..config import TrainingConfig
from ..data import load_images
from ..errors import InputError, require
from ..outgoing import without_local_paths
from .batches import Images
from .files import damage, delete_partial, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Averages of weights and checkpoints are of whole models, which are small beside the memory of a GPU."""

LOCK = ".lock"
CLAIM_SECONDS = 60.0
_CLAIMED: dict[Path, IO[str]] = {}

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
    "max_skipped_updates",
    # Together with the number of processes, see `check_batch`.
    "train_batch_size",
    "gradient_accumulation_steps",
}


def check_output_dir(config: TrainingConfig) -> None:
    """Refuse a folder that holds something else than this run, before anything is written.

    Raises:
        InputError: naming the option that differs from the run in the folder.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        problem = damage(Path(config.resume_from_checkpoint))
        requirement = f"be latest, none or a checkpoint's folder as it was written ({problem})"
        require(problem is None, "resume_from_checkpoint", requirement, config.resume_from_checkpoint)
    folder = Path(config.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(existing.is_dir(), "output_dir", "be a folder", config.output_dir)
    if existing != folder:
        return
    record = folder / "run.json"
    if not record.is_file() and all(path.name.endswith((".partial", LOCK)) for path in folder.iterdir()):
        return
    require(record.is_file(), "output_dir", "be empty or hold a run of this script", config.output_dir)
    require(
        config.resume_from_checkpoint is not None,
        "output_dir",
        "be empty with resume_from_checkpoint=none",
        config.output_dir,
    )
    earlier, now = _read_record(folder)["config"], _as_json(config)
    for name in sorted((earlier.keys() | now.keys()) - RESUMABLE):
        if earlier.get(name) != now.get(name):
            raise InputError(
                f"`output_dir` must be empty or hold this run, got {config.output_dir!r}, which holds a run with "
                f"{name}={earlier.get(name)!r} instead of {now.get(name)!r}"
            )


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """An accelerator for the configuration, with the random seed set alike on every process.

    Raises:
        InputError: a tracker that is not installed, or processes that each hold a part of the model only.
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
    whole = accelerator.distributed_type not in SHARDED
    require(whole, "distributed_type", "leave the whole model to every process", accelerator.distributed_type.value)
    set_seed(config.seed)
    return accelerator


def open_run(config: TrainingConfig, accelerator: Accelerator, images: Images) -> None:
    """Create the folder, write `run.json`, start the trackers; the last place where a run can be refused.

    Raises:
        InputError: the folder holds a run on other images or with another batch, or is in use.
    """
    folder = Path(config.output_dir)
    batch = batch_sizes(config, accelerator.num_processes)
    earlier = _read_record(folder)
    before = earlier.get("data", {}).get("fingerprint", images.fingerprint)
    require(before == images.fingerprint, "dataset", "hold the images that the run began with", config.dataset)
    check_batch(config, batch, earlier.get("batch", batch), accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        delete_partial(folder)
        record = {
            "script": type(config).__doc__,
            "config": _as_json(config),
            "data": {
                "name": images.name,
                "hub_id": images.hub_id,
                "fingerprint": images.fingerprint,
                "num_samples": len(images),
            },
            "num_processes": accelerator.num_processes,
            "batch": batch,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_json(folder / "run.json", record)
    accelerator.wait_for_everyone()
    public = without_local_paths(_as_json(config), [images.hub_id] if images.hub_id else [])
    flat = {key: str(value) if isinstance(value, list) else value for key, value in public.items()}
    accelerator.init_trackers("ot_diffusers", config={key: value for key, value in flat.items() if value is not None})


def batch_sizes(config: TrainingConfig, num_processes: int) -> dict[str, int]:
    """Images that all processes see together: in one update, and in one forward pass."""
    forward = config.train_batch_size * num_processes
    return {"update": forward * config.gradient_accumulation_steps, "forward": forward}


def check_batch(config: TrainingConfig, batch: dict[str, int], earlier: dict[str, int], num_processes: int) -> None:
    """Refuse to go on with a batch of another size: it belongs to the run, whatever the number of processes.

    An update has the same images on any number of processes. Where a loss compares distributions, a forward pass has
    to have them as well.

    Raises:
        InputError: with the value to give.
    """
    part, name, kind = "update", "train_batch_size × gradient_accumulation_steps", "an update"
    if config.compares_distributions:
        part, name, kind = "forward", "train_batch_size", "a forward pass"
    began = f"as the run began with {earlier[part]} images in {kind}"
    wanted, remainder = divmod(earlier[part], num_processes)
    require(remainder == 0, "num_processes", f"be a divisor of {earlier[part]}, {began}", num_processes)
    given = batch[part] // num_processes
    require(given == wanted, name, f"be {wanted} on {num_processes} processes, {began}", given)
    steps = config.gradient_accumulation_steps
    wanted = earlier["update"] // earlier["forward"]
    same = batch["update"] == earlier["update"]
    require(same, "gradient_accumulation_steps", f"be {wanted}, as when the run began", steps)


def claim(folder: Path) -> None:
    """Keep other processes out of the folder for as long as this one lives, where the file system can.

    An earlier process of the run may be about to end; it is waited for, but not for long.

    Raises:
        InputError: the folder is in use.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _CLAIMED:
        return
    file = (folder / LOCK).open("a")
    until = time.monotonic() + CLAIM_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            require(time.monotonic() < until, "output_dir", "not be in use by another process", str(folder))
            time.sleep(0.2)
            continue
        except OSError:
            logger.warning("%s cannot be locked: take care that one process uses it at a time", folder)
        _CLAIMED[folder] = file
        return


def _as_json(config: TrainingConfig) -> dict[str, Any]:
    """The configuration as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_record(folder: Path) -> dict[str, Any]:
    """`run.json` of the folder; empty where there is none.

    Raises:
        InputError: it is not what a script has written.
    """
    file = folder / "run.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"`output_dir` must hold a readable run.json, got {str(file)!r}") from error
    known = isinstance(record, dict) and isinstance(record.get("config"), dict)
    require(known, "output_dir", "hold a run of this script", str(folder))
    return record


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
