"""The run's folder: what it may hold when a run begins, and the record that identifies the run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed

from ..config import DiffusionConfig, TrainingConfig
from ..data import DATA_OPTIONS, SPLITS, ImageSource, StreamedImages, open_images
from ..errors import InputError, TrainingError, missing, require
from ..features import class_counts, labels_of, weights_fingerprint
from ..files import check_folder
from ..launch.commands import launched
from ..outgoing import without_local_paths
from ..sampling import is_emulated, process_state
from ..seeds import folded
from .batches import Images
from .files import damage, delete_partial, placed_in, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""Ways to split a model over processes, from accelerate's variables ACCELERATE_USE_…. They are refused: averages of
weights and checkpoints need whole models, which are small compared with the memory of a GPU."""

TENSORBOARD = "tensorboard"
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}
"""accelerate's name of a tracker to its option for the name of a run."""
LOCK = ".lock"
INDEX = "model_index.json"
CLAIM_SECONDS = 60.0
_CLAIMED: dict[str, IO[str] | None] = {}

# Names that runs of any script write into their folder.
FILES = (LOCK, "run.json", "metrics.jsonl", "results.json", "best.safetensors", INDEX)
FOLDERS = ("checkpoints", "samples", "logs", "unet", "scheduler", "prior", "feature_extractor", "reference_bank")

# Options that may change when a run is resumed; any other difference makes it another run.
RESUMABLE = {
    "max_train_seconds",
    "max_train_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "num_workers",
    "report_to",
    "tracker_project_name",
    "run_name",
    "output_dir",
    "max_skipped_updates",
    # Together with the number of processes, see `check_batch`.
    "train_batch_size",
    "gradient_accumulation_steps",
}


def check_output_dir(config: TrainingConfig) -> None:
    """Refuse a folder that holds anything but this run, before anything is written.

    Raises:
        InputError: naming the option that differs from the run in the folder.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        problem = damage(Path(config.resume_from_checkpoint))
        requirement = f"be latest, none or a checkpoint's folder as it was written ({problem})"
        require(problem is None, "resume_from_checkpoint", requirement, config.resume_from_checkpoint)
    folder = check_folder(config.output_dir, "output_dir")
    if not folder.exists():
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
    for names, kind, is_kind in ((FILES, "file", Path.is_file), (FOLDERS, "folder", Path.is_dir)):
        for path in (folder / name for name in names if os.path.lexists(folder / name)):
            require(is_kind(path), "output_dir", f"hold {path.name} as a {kind}", config.output_dir)
            require(os.access(path, os.W_OK), "output_dir", f"let {path.name} be written to", config.output_dir)
    earlier, now = _read_record(folder)["config"], _as_json(config)
    for name in sorted((earlier.keys() | now.keys()) - RESUMABLE):
        if earlier.get(name) != now.get(name):
            raise InputError(
                f"`output_dir` must be empty or hold this run, got {config.output_dir!r}, which holds a run with "
                f"{name}={earlier.get(name)!r} instead of {now.get(name)!r}"
            )


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """An accelerator for the configuration, with the random seed set alike on every process; in full precision where a
    CPU only emulates bf16.

    Raises:
        InputError: a tracker that is not installed, processes that each hold only a part of the model, or a launcher
            that contradicts the configuration or this machine.
    """
    tracker = _chosen_tracker(config.report_to)
    for name in SHARDING:
        sharded = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
        require(not sharded, "distributed_type", "be one that keeps the whole model in every process", name)
    config = launched(config)
    try:
        device = process_state().device  # accelerate's state from here on
        in_full = config.mixed_precision == "bf16" and is_emulated("bfloat16", device)
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision="no" if in_full else config.mixed_precision,
            log_with=tracker,
            project_dir=str(Path(config.output_dir) / "logs") if tracker else None,
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise InputError(f"accelerate does not accept its settings: {' '.join(str(error).split())}") from error
    scaled = config.mixed_precision != "fp16" or accelerator.scaler is not None
    require(scaled, "mixed_precision", f"be no or bf16 on {accelerator.device}", config.mixed_precision)
    set_seed(folded(config.seed, 32))
    return accelerator


def _chosen_tracker(report_to: str) -> str | None:
    installed = [str(name) for name in get_available_trackers()]
    if report_to == "auto":
        return TENSORBOARD if TENSORBOARD in installed else None
    if report_to == "none":
        return None
    if report_to == TENSORBOARD and report_to not in installed:
        raise missing(TENSORBOARD, "tracking")
    is_installed = report_to in installed
    require(is_installed, "report_to", f"be auto, none or an installed tracker ({', '.join(installed)})", report_to)
    return report_to


def open_run(
    config: TrainingConfig, accelerator: Accelerator, images: Images, **frozen: torch.nn.Module | None
) -> None:
    """Create the folder, write `run.json`, start the trackers; the last place where a run can be refused.

    Args:
        config: configuration of the run.
        accelerator: accelerator of this process.
        images: training images.
        frozen: networks that the run uses but does not train, by the option that names them.

    Raises:
        InputError: the folder holds a run on other images, with another batch or with other frozen networks, or is in
            use.
    """
    folder = Path(config.output_dir)
    record = {
        "script": type(config).__doc__,
        "config": _as_json(config),
        "data": {
            "name": images.name,
            "hub_id": images.hub_id,
            "fingerprint": images.fingerprint,
            "num_samples": len(images),
            "class_counts": None if images.label_problem or images.labels is None else class_counts(images),
        },
        "num_processes": accelerator.num_processes,
        "batch": batch_sizes(config, accelerator.num_processes),
        "pretrained": {"hub_id": source_id(config)} if getattr(config, "pretrained", None) else None,
        "frozen": {name: weights_fingerprint(network) for name, network in frozen.items() if network is not None},
        "dynamo_backend": accelerator.state.dynamo_plugin.backend.value,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    check_record(config, record)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim(folder)
        # Another process may have begun a run here in the meantime.
        check_output_dir(config)
        check_record(config, record)
        delete_partial(folder)
        write_json(folder / "run.json", record)
    accelerator.wait_for_everyone()
    public = without_local_paths(_as_json(config), filter(None, (images.hub_id, source_id(config))))
    flat = {key: str(value) if isinstance(value, list) else value for key, value in public.items()}
    project, options = tracker_names(config, _chosen_tracker(config.report_to) or "none")
    values = {key: value for key, value in flat.items() if value is not None}
    accelerator.init_trackers(project, config=values, init_kwargs=options)


def tracker_names(config: TrainingConfig, tracker: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The project, and the options of the tracker that name the run. TensorBoard has folders only.

    Example:
        >>> config = TrainingConfig(tracker_project_name="digits", run_name="first")
        >>> tracker_names(config, "wandb"), tracker_names(config, "tensorboard")
        (('digits', {'wandb': {'name': 'first'}}), ('digits/first', {}))
    """
    project, name = config.tracker_project_name, config.run_name
    if name is not None and tracker == TENSORBOARD:
        return f"{project}/{name}", {}
    if name is None or tracker not in RUN_NAMES:
        return project, {}
    return project, {tracker: {RUN_NAMES[tracker]: name}}


def source_id(config: TrainingConfig) -> str | None:
    """Hub id of the pipeline that the run starts from; None for a local one, or none."""
    pretrained = getattr(config, "pretrained", None)
    return None if pretrained is None or os.path.exists(pretrained) else pretrained


def check_record(config: TrainingConfig, record: dict[str, Any]) -> None:
    """Refuse to resume with other images, another batch or other frozen networks than those that the run in the folder
    began with. A run without such a record is resumed.

    Raises:
        InputError: naming what differs.
    """
    earlier = _read_record(Path(config.output_dir))
    data = record["data"]["fingerprint"]
    before = earlier.get("data", {}).get("fingerprint", data)
    require(before == data, "dataset", "hold the images that the run began with", config.dataset)
    check_batch(config, record["batch"], earlier.get("batch", record["batch"]), record["num_processes"])
    frozen = earlier.get("frozen", {})
    for name, fingerprint in record["frozen"].items():
        same = frozen.get(name, fingerprint) == fingerprint
        require(same, name, "hold the weights that the run began with", getattr(config, name))


def batch_sizes(config: TrainingConfig, num_processes: int) -> dict[str, int]:
    """Images that all processes see together: in one update, and in one forward pass."""
    forward = config.train_batch_size * num_processes
    return {"update": forward * (config.gradient_accumulation_steps or 1), "forward": forward}


def check_batch(config: TrainingConfig, batch: dict[str, int], earlier: dict[str, int], num_processes: int) -> None:
    """Refuse to resume with a batch of another size: it belongs to the run, whatever the number of processes.

    An update has the same images on any number of processes. Where a loss compares distributions, so must a forward
    pass.

    Raises:
        InputError: with the value to set.
    """
    part, name, kind = "update", "train_batch_size × gradient_accumulation_steps", "an update"
    if config.compares_distributions:
        part, name, kind = "forward", "train_batch_size", "a forward pass"
    began = f"as the run began with {earlier[part]} images in {kind}"
    per_process, remainder = divmod(earlier[part], num_processes)
    require(remainder == 0, "num_processes", f"be a divisor of {earlier[part]}, {began}", num_processes)
    given = batch[part] // num_processes
    require(given == per_process, name, f"be {per_process} on {num_processes} processes, {began}", given)
    steps = config.gradient_accumulation_steps or 1
    accumulated = earlier["update"] // earlier["forward"]
    same = batch["update"] == earlier["update"]
    require(same, "gradient_accumulation_steps", f"be {accumulated}, as when the run began", steps)


def claim(folder: Path) -> None:
    """Create the folder and lock it for as long as this process lives, where the file system supports locks.

    An earlier process of the run may be about to end, so the lock is waited for, up to `CLAIM_SECONDS`.

    Raises:
        InputError: the folder is in use.
    """
    until = time.monotonic() + CLAIM_SECONDS
    while not _is_claimed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = None if fcntl is None else (folder / LOCK).open("a")
        try:
            if file is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            require(time.monotonic() < until, "output_dir", "not be in use by another process", str(folder))
            time.sleep(0.2)
            continue
        except OSError:
            logger.warning("%s cannot be locked: make sure that only one process uses it at a time", folder)
        _CLAIMED[os.path.abspath(folder)] = file


def check_claim(config: TrainingConfig) -> None:
    """Refuse to write where the folder that this process has claimed is gone, or now belongs to another run.

    Raises:
        TrainingError: in that case.
    """
    folder = Path(config.output_dir)
    if os.path.abspath(folder) not in _CLAIMED:
        return
    if not (folder / "run.json").is_file() or ((folder / LOCK).exists() and not _is_claimed(folder)):
        raise TrainingError(
            f"the folder {config.output_dir!r} was deleted or moved during the run; nothing more is written there"
        )


def _is_claimed(folder: Path) -> bool:
    """Whether the folder exists, and this process holds its lock where locks are supported."""
    path = os.path.abspath(folder)
    file = _CLAIMED.get(path)
    if path not in _CLAIMED or file is None:
        return path in _CLAIMED and folder.is_dir()
    lock = folder / LOCK
    return lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())


@contextmanager
def saved_model(config: TrainingConfig) -> Iterator[Path]:
    """A folder to save the run's model into. When the block ends, the files move into the run's folder, the index of a
    pipeline last, so that an interrupted save is never taken for a complete pipeline.

    Raises:
        TrainingError: as `check_claim`.
    """
    check_claim(config)
    with placed_in(Path(config.output_dir), last=INDEX) as folder:
        yield folder
        check_claim(config)


def _as_json(config: TrainingConfig) -> dict[str, Any]:
    """The configuration as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_record(folder: Path) -> dict[str, Any]:
    """`run.json` of the folder; empty where there is none.

    Raises:
        InputError: the file was not written by a script.
    """
    file = folder / "run.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"`output_dir` must hold a readable run.json, got {str(file)!r}") from error
    is_run = isinstance(record, dict) and isinstance(record.get("config"), dict)
    require(is_run, "output_dir", "hold a run of this script", str(folder))
    return record


def load_split(config: TrainingConfig, split: str, accelerator: Accelerator) -> Images:
    """One split of the configured data set, on the training device if it is small enough to be held decoded."""
    return _open_images(config).load(split).to(accelerator.device)


def load_splits(config: TrainingConfig, accelerator: Accelerator, *needed: str) -> list[Images]:
    """The needed splits, as `load_split` gives them. All other splits are decoded too, so that a damaged image is found
    before training.

    Raises:
        InputError: an unreadable image in any split, needed splits with images of different shape, or without the
            labels that a model with classes is trained on.
    """
    accelerator.print(f"loading {config.dataset}", flush=True)
    source = _open_images(config)
    splits = {split: source.load(split) for split in SPLITS if split in needed or source.has(split)}
    for split, images in splits.items():
        if isinstance(images, StreamedImages) and split != "train":  # which is decoded for its fingerprint
            for _ in images.stream(torch.arange(len(images)).split(config.train_batch_size), config.num_workers):
                pass
    first, *others = (splits[split].to(accelerator.device) for split in needed)
    for images in others:
        shapes = f"{first.image_shape} in {first.split}, {images.image_shape} in {images.split}"
        argument = "channels" if first.image_shape[1:] == images.image_shape[1:] else "image_size"
        require(first.image_shape == images.image_shape, argument, "be given for splits of different shape", shapes)
    if isinstance(config, DiffusionConfig) and config.class_conditional:
        for images in (first, *others):
            labels_of(images)
    return [first, *others]


def _open_images(config: TrainingConfig) -> ImageSource:
    return open_images(config.dataset, **{name: getattr(config, name) for name in DATA_OPTIONS})
