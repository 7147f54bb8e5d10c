"""What the demo and the studies share: a folder of one's own, scripts side by side, lines that tell how far it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import require

LOG_LINES = 12

Announce = Callable[[str], None]


@dataclass
class Sampled:
    """Images of an arm, uint8 [N, C, H, W], and what they cost."""

    images: Tensor
    seconds: float
    nfe: int


def claim_folder(record: Path, settings: Mapping[str, Any], argument: str = "output") -> None:
    """Create the folder of `record` and write the settings there, or find it with the same settings.

    Raises:
        InputError: the folder holds something else.
    """
    folder, kind = record.parent, record.stem
    if record.is_file():
        earlier = read_json(record)
        differing = {name: earlier.get(name) for name, value in settings.items() if earlier.get(name) != value}
        wanted = {name: settings[name] for name in differing}
        require(
            not differing,
            argument,
            f"be a new folder, or of a {kind} with {wanted}",
            f"{folder} of one with {differing}",
        )
        return
    require(not folder.exists() or folder.is_dir(), argument, "be a folder", str(folder))
    empty = not folder.exists() or not any(folder.iterdir())
    require(empty, argument, f"be a new or empty folder, or an earlier {kind}'s", str(folder))
    (folder / "logs").mkdir(parents=True)
    record.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


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
    timed = read_json(run / "run.json")["config"]["max_train_seconds"] is not None
    return timed or bool(read_json(run / "results.json")["complete"])


def end_of_log(file: Path) -> str:
    """The last lines of a log, without the states that a progress bar has overwritten."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    shown = [line.rstrip("\r").split("\r")[-1] for line in lines if line.strip()]
    return "\n".join(f"    {line}" for line in [*shown[-LOG_LINES:], f"(all of it: {file})"])


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """`results.json`, written aside and renamed."""
    partial = output / ".results.json"
    partial.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(output / "results.json")


def read_json(file: Path) -> dict[str, Any]:
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
