"""State that all parts of a study share: folder, clock, networks and real images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import ResidentImages, StreamedImages, pixels_of
from ..errors import InputError, require, require_same
from ..evaluation.evaluate import ImageSet, extract_image_set, sample_count
from ..evaluation.extractors import load_evaluator, load_real_images
from ..features import weights_fingerprint
from ..files import check_folder, is_name_aside, write_json
from ..launch.commands import preset_path
from ..sampling import best_device
from .config import NETWORKS, StudyConfig

RECORD_NAME = "study.json"

Log = Callable[[str], None]


class OutOfTime(Exception):
    """The time limit of this call is reached; everything complete is on disk."""


@dataclass
class Clock:
    """The time limit of a call.

    Attributes:
        max_seconds: None for no limit.
    """

    max_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Remaining seconds, infinite without a limit."""
        return math.inf if self.max_seconds is None else self.max_seconds - self.seconds

    def check(self) -> None:
        """Raise `OutOfTime` if no time is left."""
        if self.left <= 0:
            raise OutOfTime


@dataclass
class Study:
    """State that all parts of a study share.

    Attributes:
        config: configuration of the study, with a variant for every point of its curves.
        output: folder of the study.
        clock: time limit.
        log: takes the progress messages.
    """

    config: StudyConfig
    output: Path
    clock: Clock
    log: Log

    @property
    def seeds(self) -> list[int]:
        """The random seeds of the study."""
        return list(range(self.config.seeds)) if self.config.seed is None else [self.config.seed]

    def network(self, name: str) -> str:
        """Path of the network `features` or `evaluator`: a run in this folder if its preset is trained here."""
        return str(self.output / name) if self.trains(name) else str(getattr(self.config, name))

    def trains(self, name: str) -> bool:
        """Whether the network is trained here."""
        path = getattr(self.config, name)
        return path is not None and preset_path(path).is_file()

    def resolve(self, text: str, seed: int) -> str:
        """`text` with `{variant}`, `{features}` and `{seed}` replaced by their values."""
        fixed = {"seed": str(seed), "features": self.network("features") if self.config.features else ""}
        return re.sub(r"{([^}]*)}", lambda match: fixed.get(match[1]) or str(self.run(match[1], seed)), text)

    def run(self, name: str, seed: int) -> Path:
        """Folder of the training run of a variant or network."""
        return (self.output if self.config.is_shared(name) else self.folder(seed)) / name

    def source(self, name: str, seed: int) -> str:
        """Path or Hub id of the pipeline of the variant."""
        pipeline = self.config.arms[name].pipeline
        return str(self.run(name, seed)) if pipeline is None else self.resolve(pipeline, seed)

    def folder(self, seed: int) -> Path:
        """Folder of the runs, samples and metrics of a seed."""
        return self.output / f"seed-{seed}" if self.config.seed is None else self.output

    def headed(self, title: str, seed: int) -> str:
        """The title of a stage, with the seed in front if there are several."""
        return f"seed {seed}: {title}" if self.config.seed is None else title

    @cached_property
    def extractor(self) -> Any:
        """The evaluator, loaded once."""
        return load_evaluator(self.network("evaluator")).to(best_device())

    @cached_property
    def second_extractor(self) -> Any:
        """The second evaluator, loaded once; None if the study has none."""
        name = self.config.second_evaluator
        return None if name is None else load_evaluator(self.resolve(name, 0)).to(best_device())

    @cached_property
    def splits(self) -> dict[str, ResidentImages | StreamedImages]:
        """The real images of both splits, in the size and colours of the evaluator."""
        dataset, options = self.config.dataset, self.config.data_options
        return {split: load_real_images(dataset, split, self.extractor, **options) for split in ("train", "test")}

    @cached_property
    def train_images(self) -> ImageSet:
        """The training images with their features."""
        return self.image_set("train")

    @cached_property
    def test_images(self) -> ImageSet:
        """The test images with their features."""
        return self.image_set("test")

    @cached_property
    def second_test_images(self) -> ImageSet:
        """The test images with their features by the second evaluator."""
        images, labels = self.test_images.images, self.test_images.labels
        return extract_image_set(images, self.second_extractor, labels=labels, cache=True)

    def image_set(self, split: str) -> ImageSet:
        """A split with its features by the evaluator."""
        images = self.splits[split]
        return extract_image_set(pixels_of(images), self.extractor, labels=images.labels, cache=True)

    @cached_property
    def num_samples(self) -> int:
        """Images of each variant and random seed."""
        return sample_count(self.config.num_samples, len(self.train_images), len(self.test_images))


@contextmanager
def stage(title: str, log: Log) -> Iterator[None]:
    """Log a stage at its start, and again with its duration at its end; a terminal shows one line for both."""
    started = time.monotonic()
    if sys.stdout.isatty():
        sys.stdout.write(f"{title} …\r")
        sys.stdout.flush()
    else:
        log(f"{title} …")
    yield
    log(f"{title}: {time.monotonic() - started:.0f} s")


# --- The folder -------------------------------------------------------------------------------------------------------


def claim_folder(record: Path, settings: Mapping[str, Any], argument: str = "output") -> None:
    """Create the folder of `record` and write the settings there, unless it has a record of the same settings.

    Raises:
        InputError: the folder contains something else.
    """
    check_study_folder(record, argument)
    if record.is_file():
        require_same(settings, _read_settings(record, argument), argument)
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, dict(settings))


def check_study_folder(record: Path, argument: str = "output") -> None:
    """Refuse, before the work, a folder that cannot be written or that contains files of something else than `record`.

    Raises:
        InputError: naming the folder.
    """
    folder = check_folder(record.parent, argument)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    own = record.is_file() or all(is_name_aside(name, re.escape(record.name)) for name in names)
    require(own, argument, f"be a new or empty folder, or an earlier {record.stem}'s", str(folder))


def _read_settings(record: Path, argument: str) -> dict[str, Any]:
    """The settings that an earlier call wrote.

    Raises:
        InputError: the file was written by something else.
    """
    try:
        settings = read_json(record)
    except ValueError as error:
        raise InputError(f"`{argument}` must hold a readable {record.name}, got {str(record.parent)!r}") from error
    require(isinstance(settings, dict), argument, f"be an earlier {record.stem}'s", str(record.parent))
    return settings


def read_json(file: Path) -> dict[str, Any]:
    """The contents of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def settings_of(config: StudyConfig) -> dict[str, Any]:
    """The settings that two calls of one study share: all but the folder and the number of seeds, with hashes of the
    given networks.

    Raises:
        InputError: a network that does not exist.
    """
    contents = {name: content_hash(Path(variant.pipeline)) for name, variant in config.arms.items() if variant.pipeline}
    for name, load in NETWORKS.items():
        path = getattr(config, name)
        if path is not None and not preset_path(path).is_file():
            contents[name] = weights_fingerprint(load(path))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    kept = {name: value for name, value in values.items() if name not in ("output_dir", "seeds")}
    return kept | {"contents": contents}


def content_hash(folder: Path) -> str | None:
    """SHA-256 over the weights and configurations of a saved pipeline; None for any other path."""
    if not (folder / "model_index.json").is_file():
        return None
    digest = hashlib.sha256()
    components = sorted(file for file in folder.glob("*/*") if file.suffix in (".json", ".safetensors"))
    for file in (folder / "model_index.json", *components):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
