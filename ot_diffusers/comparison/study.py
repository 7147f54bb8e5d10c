"""What every part of a comparison needs: its folder, its clock, its networks and its real images."""

from __future__ import annotations

import hashlib
import math
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import pixels_of
from ..evaluation.evaluate import ImageSet, describe_images
from ..evaluation.extractors import dataset_facts, load_evaluator, load_real_images
from ..experiment import Announce, as_json, sample_count
from ..features import weights_fingerprint
from ..launch import preset_path
from ..sampling import best_device
from .config import NETWORKS, ComparisonConfig


class OutOfTime(Exception):
    """The time of this call is over; what is finished is on disk."""


@dataclass
class Clock:
    """The time that a call may take.

    Attributes:
        max_seconds: None for no limit.
    """

    max_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds left, infinite without a limit."""
        return math.inf if self.max_seconds is None else self.max_seconds - self.seconds

    def check(self) -> None:
        """Raise `OutOfTime` where no time is left."""
        if self.left <= 0:
            raise OutOfTime


@dataclass
class Study:
    """What every part of a comparison needs.

    Attributes:
        config: of the comparison.
        output: its folder.
        clock: when to stop.
        announce: takes the lines that tell how far it is.
        data: what the results say of the data set, once it is loaded.
    """

    config: ComparisonConfig
    output: Path
    clock: Clock
    announce: Announce
    data: dict[str, Any] = field(default_factory=dict)

    def network(self, name: str) -> str:
        """Where the network `features` or `evaluator` is: the study's own folder if its preset is trained here."""
        path = getattr(self.config, name)
        return str(self.output / name) if preset_path(path).is_file() else path

    def resolve(self, text: str, seed: int) -> str:
        """`text` with what `{arm}`, `{features}` and `{seed}` stand for."""
        fixed = {"seed": str(seed), "features": self.network("features") if self.config.features else ""}
        return re.sub(r"{([^}]*)}", lambda found: fixed.get(found[1]) or str(self.run(found[1], seed)), text)

    def run(self, arm: str, seed: int) -> Path:
        """Folder of the arm's training run."""
        return self.folder(seed) / arm

    def folder(self, seed: int) -> Path:
        """Where a seed's runs and samples lie."""
        return self.output / f"seed-{seed}"

    @cached_property
    def extractor(self) -> Any:
        """The evaluator, loaded once."""
        return load_evaluator(self.network("evaluator")).to(best_device())

    @cached_property
    def train_images(self) -> ImageSet:
        """What the data's training images are to the evaluator."""
        return self.real_images("train")

    @cached_property
    def test_images(self) -> ImageSet:
        """What the data's test images are to the evaluator."""
        return self.real_images("test")

    def real_images(self, split: str) -> ImageSet:
        """Features, and pixels where they are needed, of a split."""
        images = load_real_images(self.config.dataset, split, self.extractor, **self.config.data_options)
        self.data = dataset_facts(images)
        return describe_images(pixels_of(images), self.extractor, labels=images.labels, cache=True)

    @cached_property
    def num_samples(self) -> int:
        """Images of an arm and seed: as many as asked for, or as there are real ones to compare with."""
        return sample_count(self.config.num_samples, len(self.train_images), len(self.test_images))


def settings(config: ComparisonConfig) -> dict[str, Any]:
    """What makes two calls one comparison: all but the folder and the number of seeds, and the content of what exists.

    Raises:
        InputError: a network that is not there.
    """
    contents = {name: content_hash(Path(arm.pipeline)) for name, arm in config.arms.items() if arm.pipeline}
    for name, load in NETWORKS.items():
        path = getattr(config, name)
        if path is not None and not preset_path(path).is_file():
            contents[name] = weights_fingerprint(load(path))
    return as_json(config, "output_dir", "seeds") | {"contents": contents}


def content_hash(folder: Path) -> str | None:
    """SHA-256 over the weights and configurations in a folder; None for what is not one."""
    if not (folder / "model_index.json").is_file():
        return None
    digest = hashlib.sha256()
    components = sorted(file for file in folder.glob("*/*") if file.suffix in (".json", ".safetensors"))
    for file in (folder / "model_index.json", *components):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
