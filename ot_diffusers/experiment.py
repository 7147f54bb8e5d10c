"""What the demo and the studies share: a folder of one's own, scripts side by side, lines that tell how far it is."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import InputError, require
from .features import weights_fingerprint
from .files import check_folder, is_name_aside, write_json, write_text

LOG_LINES = 12

Announce = Callable[[str], None]


EVALUATOR_SEED = 1000
"""Added to a study's seed for the network that no loss sees."""


@dataclass
class Sampled:
    """Images of an arm and what they cost.

    Attributes:
        images: uint8 [N, C, H, W].
        seconds: that sampling them took.
        nfe: network calls for each.
        others: further keys of `report.COSTS`.
    """

    images: Tensor
    seconds: float
    nfe: int
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def cost(self) -> dict[str, float]:
        """By the keys of `report.COSTS`."""
        per_1000 = round(1000 * self.seconds / len(self.images), 3)
        return {"nfe": self.nfe, "seconds": round(self.seconds, 2), "seconds_per_1000": per_1000, **self.others}


def sampled_once(file: Path, sample: Callable[[], Sampled]) -> Sampled:
    """What an earlier call left in a safetensors file, or what `sample` makes, left there whole."""
    if not file.is_file():
        found = sample()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        cost = {"seconds": found.seconds, "nfe": found.nfe, **found.others}
        save_file({"images": found.images.contiguous()}, partial, metadata={"cost": json.dumps(cost)})
        partial.replace(file)
        return found
    with safe_open(file, framework="pt") as stored:
        cost = json.loads(stored.metadata()["cost"])
        return Sampled(stored.get_tensor("images"), cost.pop("seconds"), cost.pop("nfe"), cost)


def sample_count(requested: int | None, num_train: int, num_test: int) -> int:
    """Images of each arm: as many as asked for, or as there are test images.

    Raises:
        InputError: more than the training images can be held against, see `real_floor`.
    """
    most = num_train - 2
    count = requested or min(num_test, most)
    require(count <= most, "num_samples", f"be at most {most}, two fewer than the training images", count)
    return count


def check_independent(evaluator: nn.Module, features: nn.Module) -> None:
    """Refuse an evaluator that is the network losses and guidance see."""
    independent = weights_fingerprint(evaluator) != weights_fingerprint(features)
    require(independent, "evaluator", "be another network than the one that losses see", type(evaluator).__name__)


def as_json(config: Any, *without: str) -> dict[str, Any]:
    """A configuration as it reads back from JSON, without some of its options."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name not in without}


def claim_folder(record: Path, settings: Mapping[str, Any], argument: str = "output") -> None:
    """Create the folder of `record` and write the settings there, or find it with the same settings.

    Raises:
        InputError: the folder holds something else.
    """
    check_study_folder(record, argument)
    folder, kind = record.parent, record.stem
    if record.is_file():
        earlier = _read_settings(record, argument)
        differing = {name: earlier.get(name) for name, value in settings.items() if earlier.get(name) != value}
        wanted = {name: settings[name] for name in differing}
        require(
            not differing,
            argument,
            f"be a new folder, or of a {kind} with {wanted}",
            f"{folder} of one with {differing}",
        )
        (folder / "logs").mkdir(exist_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, dict(settings))
    (folder / "logs").mkdir()


def check_study_folder(record: Path, argument: str = "output") -> None:
    """Refuse, before the work, a folder that cannot be written into, or that holds something else than what belongs to
    `record`.

    Raises:
        InputError: naming the folder.
    """
    folder = check_folder(record.parent, argument)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    own = record.is_file() or all(is_name_aside(name, re.escape(record.name)) for name in names)
    require(own, argument, f"be a new or empty folder, or an earlier {record.stem}'s", str(folder))


def _read_settings(record: Path, argument: str) -> dict[str, Any]:
    """What an earlier call wrote.

    Raises:
        InputError: somebody else wrote it.
    """
    try:
        settings = read_json(record)
    except ValueError as error:
        raise InputError(f"`{argument}` must hold a readable {record.name}, got {str(record.parent)!r}") from error
    require(isinstance(settings, dict), argument, f"be an earlier {record.stem}'s", str(record.parent))
    return settings


def train(runs: Mapping[str, Sequence[str]], output: Path, title: str, announce: Announce) -> None:
    """Run the commands side by side, each with its share of the cores; runs that are complete are left alone."""
    waiting = {name: command for name, command in runs.items() if not is_complete(output / name)}
    if not waiting:
        announce(f"{title}: done before")
        return
    with stage(title, announce):
        run_side_by_side(waiting, output)


def run_side_by_side(commands: Mapping[str, Sequence[str]], output: Path) -> None:
    """Run the commands at once, their output in `output/logs`.

    Raises:
        RuntimeError: one that failed, with the end of its log; the others are stopped.
    """
    # With every core busy, a second thread in a process only gets in the other process' way.
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (output / "logs" / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        for name, process in processes.items():
            if process.wait() != 0:
                raise RuntimeError(f"training {name!r} failed:\n{end_of_log(output / 'logs' / f'{name}.log')}")
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


def is_complete(run: Path) -> bool:
    """Whether the folder holds a finished run: one that made all its updates, or used up the time it was given."""
    if not (run / "results.json").is_file():
        return False
    results = read_json(run / "results.json")
    return bool(results["complete"]) or results.get("stopped_by") == "max_train_seconds"


def end_of_log(file: Path) -> str:
    """The last lines of a log, without the states that a progress bar has overwritten."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    shown = [line.rstrip("\r").split("\r")[-1] for line in lines if line.strip()]
    return "\n".join(f"    {line}" for line in [*shown[-LOG_LINES:], f"(all of it: {file})"])


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """`results.json`, written aside and renamed."""
    write_text(output / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """The contents of a JSON file in UTF-8."""
    return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def stage(title: str, announce: Announce) -> Iterator[None]:
    """One line for a stage with its seconds; on a terminal, its title from the start."""
    started = time.monotonic()
    rewrites = sys.stdout.isatty()
    if rewrites:
        sys.stdout.write(f"{title} …\r")
        sys.stdout.flush()
    yield
    announce(f"{title}: {time.monotonic() - started:.0f} s")
