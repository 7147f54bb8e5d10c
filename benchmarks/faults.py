"""Injects faults into training runs and checks that the runs recover exactly: `python -m benchmarks.faults`.

Every trial is a real training command on the 8×8 digits with tiny networks. After a fault, the same command is run
again until the training is complete. The run has survived if its weights, their average and the moments of the
optimizer are identical to those of an undisturbed run, bit for bit. After a fault that the user must repair, such as a
full disk, the command must also have stopped by itself, with one line on stderr and without a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from ot_diffusers.data import load_images, pixels_of
from ot_diffusers.reporting.page import provenance
from ot_diffusers.training.files import write_json

COMMON = {"dataset": "digits", "report_to": "none", "checkpointing_steps": 4, "train_batch_size": 32}
UNET = {"block_out_channels": "8,16", "norm_num_groups": 4, "attention_levels": "[]", "layers_per_block": 1}
UNET |= {"num_inference_steps": 2, "num_validation_samples": 16}
PRIOR = {"prior": "gan", "latent_dim": 6, "block_out_channels": "16,8", "num_inference_steps": 2}
PATIENCE = 120.0
"""Seconds after which a process that should have stopped counts as hanging."""


@dataclass(frozen=True)
class Job:
    """A training command and the result of an undisturbed run.

    Attributes:
        command: for one process or several, without the folder.
        reference: folder of a complete run.
        seconds: duration of the reference, from the start of its process.
        first_seconds: time until its first checkpoint.
    """

    command: list[str]
    reference: Path
    seconds: float = 0.0
    first_seconds: float = 0.0

    def start(self, folder: Path, *extra: str, limit: int | None = None) -> subprocess.Popen[str]:
        """Start the command; `limit` is the largest size of a file in bytes."""
        resources = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)) if limit else None
        command = [*self.command, f"output_dir={folder}", *extra]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, preexec_fn=resources, **pipes)

    def finish(self, folder: Path) -> bool:
        """Run the command again; returns whether the run is then complete and equal to the reference."""
        process = self.start(folder)
        _, errors = process.communicate()
        if process.returncode != 0:
            sys.stderr.write(errors[-2000:])
            return False
        complete = json.loads((folder / "results.json").read_text(encoding="utf-8"))["complete"]
        return complete and same_end(folder, self.reference)


def same_end(run: Path, other: Path) -> bool:
    """Whether the last checkpoints contain the same tensors, bit for bit."""
    here, there = (max((folder / "checkpoints").glob("update-*")) for folder in (run, other))
    files = sorted(file.relative_to(there) for file in there.rglob("*.safetensors"))
    pairs = [(load_file(here / file), load_file(there / file)) for file in files]
    equal = all(
        first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)
        for first, second in pairs
    )
    return equal and here.name == there.name


# --- Faults -----------------------------------------------------------------------------------------------------------


def kill_at_a_random_moment(job: Job, folder: Path, chance: random.Random) -> bool:
    """kill −9 at a random moment between the imports and the last save, three times in a row."""
    for _ in range(3):
        process = job.start(folder)
        wait(process, chance.uniform(0.3, 1.0) * job.seconds)
        kill(process)
    return job.finish(folder)


def kill_during_a_save(job: Job, folder: Path, chance: random.Random) -> bool:
    """kill −9 while a checkpoint is being written."""
    process = job.start(folder)
    skipped = chance.randrange(3)
    seen: set[Path] = set()
    while process.poll() is None and len(seen) <= skipped:
        seen |= set(folder.glob("checkpoints/.update-*.partial"))
    time.sleep(chance.uniform(0, 0.01))
    kill(process)
    return job.finish(folder)


def kill_one_of_two(job: Job, folder: Path, chance: random.Random) -> bool:
    """kill −9 of one process of two: the other must stop by itself and report the reason in one line."""
    process = job.start(folder)
    wait(process, chance.uniform(0.5, 0.9) * job.seconds)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in environment(child)]
    if ranks:
        chance.choice(ranks).kill()
    return leaves(process) and job.finish(folder)


def terminate(job: Job, folder: Path, chance: random.Random) -> bool:
    """SIGTERM: exit status 0 with all progress saved."""
    process = job.start(folder)
    while not list(folder.glob("checkpoints/update-*")) and process.poll() is None:
        time.sleep(0.01)
    wait(process, chance.uniform(0, job.seconds - job.first_seconds))
    process.send_signal(signal.SIGTERM)
    return leaves(process, status=0) and job.finish(folder)


def full_disk(job: Job, folder: Path, chance: random.Random) -> bool:
    """No file can grow beyond a fraction of the largest file of a checkpoint."""
    largest = max(file.stat().st_size for file in (job.reference / "checkpoints").rglob("*.safetensors"))
    copy_checkpoints(job, folder, chance)
    before = good_checkpoints(folder)
    left = leaves(job.start(folder, limit=int(largest * chance.uniform(0.1, 0.9))), status=1, lines=1)
    return left and before <= good_checkpoints(folder) and job.finish(folder)


def read_only_output(job: Job, folder: Path, chance: random.Random) -> bool:
    """A folder without write permission for anybody."""
    return leaves(job.start(Path("/sys/ot_diffusers")), status=1, lines=1) and job.finish(folder)


def truncated_checkpoint(job: Job, folder: Path, chance: random.Random) -> bool:
    """A file of the last checkpoint is truncated."""
    file = chance.choice(files_of_last(job, folder, chance))
    os.truncate(file, chance.randrange(file.stat().st_size))
    return job.finish(folder)


def flipped_bit(job: Job, folder: Path, chance: random.Random) -> bool:
    """One bit of the last checkpoint is flipped."""
    file = chance.choice(files_of_last(job, folder, chance))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return job.finish(folder)


def corrupt_images(job: Job, folder: Path, chance: random.Random) -> bool:
    """A damaged picture in the data set is refused in one line, and nothing is written; repaired, the run works."""
    baseline = command([sys.executable, "train/train_baseline.py"], COMMON | UNET | {"max_train_steps": 2})
    job = dataclasses.replace(job, command=baseline)
    data = folder.with_name(f"{folder.name}-data")
    write_pictures(data)
    damaged = chance.choice(sorted(data.glob("train/*.png")))
    content = damaged.read_bytes()
    damaged.write_bytes(content[: chance.randrange(40, len(content) - 12)])
    refused = leaves(job.start(folder, f"dataset={data}"), status=2, lines=1) and not folder.exists()
    damaged.write_bytes(content)
    return refused and leaves(job.start(folder, f"dataset={data}"), status=0)


FAULTS: dict[str, tuple[Callable[[Job, Path, random.Random], bool], int]] = {
    "kill −9 at a random moment, three times a run": (kill_at_a_random_moment, 10),
    "kill −9 during a save": (kill_during_a_save, 6),
    "kill −9 of one process of two": (kill_one_of_two, 5),
    "SIGTERM": (terminate, 5),
    "disk full": (full_disk, 4),
    "read-only output": (read_only_output, 2),
    "truncated checkpoint": (truncated_checkpoint, 5),
    "flipped bit in a checkpoint": (flipped_bit, 5),
    "corrupt image": (corrupt_images, 3),
}
"""Title to fault and number of trials."""
NAMES = {fault.__name__: title for title, (fault, _) in FAULTS.items()}


# --- Parts of a trial -------------------------------------------------------------------------------------------------


def wait(process: subprocess.Popen[str], seconds: float) -> None:
    """Let the process run for at most this long."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def leaves(process: subprocess.Popen[str], status: int | None = None, lines: int | None = None) -> bool:
    """Whether the process stops by itself with this exit status and number of error lines, without a traceback."""
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill(process)
        return False
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    as_it_should = (
        "Traceback" not in errors
        and (status is None or process.returncode == status)
        and (lines is None or len(said) == lines)
    )
    if not as_it_should:
        sys.stderr.write(f"exit status {process.returncode}\n{errors[-2000:]}\n")
    return as_it_should


def environment(process: psutil.Process) -> dict[str, str]:
    """The environment of another process; empty if it has ended."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def copy_checkpoints(job: Job, folder: Path, chance: random.Random) -> Path:
    """Create the folder of a run that was killed after one of its checkpoints; returns that checkpoint."""
    shutil.copytree(job.reference, folder, ignore=shutil.ignore_patterns("results.json", "model_index.json"))
    checkpoints = sorted((folder / "checkpoints").glob("update-*"))
    last = chance.randrange(1, len(checkpoints) - 1)
    for checkpoint in checkpoints[last + 1 :]:
        shutil.rmtree(checkpoint)
    return checkpoints[last]


def files_of_last(job: Job, folder: Path, chance: random.Random) -> list[Path]:
    return sorted(path for path in copy_checkpoints(job, folder, chance).rglob("*") if path.is_file())


def good_checkpoints(folder: Path) -> set[str]:
    """Names of the intact checkpoints."""
    from ot_diffusers.training.files import damage

    return {path.name for path in folder.glob("checkpoints/update-*") if damage(path) is None}


def write_pictures(folder: Path) -> None:
    """The digits as PNG files."""
    from torchvision.transforms.functional import to_pil_image

    for split, count in (("train", 64), ("validation", 8), ("test", 8)):
        (folder / split).mkdir(parents=True)
        for index, pixels in enumerate(pixels_of(load_images("digits", split), torch.arange(count))):
            to_pil_image(pixels).save(folder / split / f"{index:03d}.png")


# --- The whole --------------------------------------------------------------------------------------------------------


def make_jobs(folder: Path) -> tuple[list[Job], Job]:
    """Reference runs: OT and a GAN prior (two optimizers in one run) with one process, and OT with two."""
    train = [sys.executable, "-m", "ot_diffusers.cli", "train"]
    features = command([sys.executable, "train/train_features.py"], COMMON | {"max_train_steps": 8})
    denoiser = command([sys.executable, "train/train_baseline.py"], COMMON | UNET | {"max_train_steps": 4})
    for base, name in ((features, "features"), (denoiser, "denoiser")):
        subprocess.run([*base, f"output_dir={folder / name}"], check=True, capture_output=True)
    steps = {"max_train_steps": 24, "checkpoints_total_limit": 9}
    ot = COMMON | UNET | steps | {"feature_extractor": folder / "features", "num_reference_samples": 100}
    gan = COMMON | PRIOR | steps | {"denoiser": folder / "denoiser"}
    one = [command([sys.executable, "train/train_ot.py"], ot), command([sys.executable, "train/train_prior.py"], gan)]
    two = command([*train, "ot", "--num-processes", "2"], ot | {"train_batch_size": 16})
    jobs = [measured(Job(words, folder / f"reference-{index}")) for index, words in enumerate([*one, two])]
    return jobs[:2], jobs[2]


def command(words: list[str], options: dict[str, Any]) -> list[str]:
    return [*words, *(f"{name}={value}" for name, value in options.items())]


def measured(job: Job) -> Job:
    """Run the reference of the job; returns the job with its duration."""
    started = time.monotonic()
    process = job.start(job.reference)
    while not list(job.reference.glob("checkpoints/update-*")) and process.poll() is None:
        time.sleep(0.01)
    first = time.monotonic() - started
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(errors)
    return dataclasses.replace(job, seconds=time.monotonic() - started, first_seconds=first)


def trials(
    jobs: list[Job], two: Job, folder: Path, divisor: int, seed: int
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Pairs (title of the fault, trial) in an order that mixes the faults."""
    for title, (fault, count) in FAULTS.items():
        for index in range(max(1, count // divisor)):
            job = two if fault is kill_one_of_two else jobs[index % 2]
            name = f"{fault.__name__}-{index}"
            yield title, functools.partial(fault, job, folder / name, random.Random(f"{seed} {name}"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the trials")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="some faults; the others keep their rows in the file")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places (%(default)s)")
    parser.add_argument("--output", default="docs/faults.json", help="file (%(default)s)")
    arguments = parser.parse_args()
    titles = [NAMES[name] for name in arguments.only or NAMES]
    counts = {title: [0, 0] for title in titles}
    with tempfile.TemporaryDirectory(prefix="ot_diffusers_faults_") as name, ThreadPoolExecutor(2) as pool:
        os.environ["OT_DIFFUSERS_CACHE"] = f"{name}/cache"
        jobs, two = make_jobs(Path(name))
        waiting = [
            (title, pool.submit(trial))
            for title, trial in trials(jobs, two, Path(name), 4 if arguments.quick else 1, arguments.seed)
            if title in titles
        ]
        for title, outcome in waiting:
            counts[title][0 if outcome.result() else 1] += 1
            survived, lost = counts[title]
            sys.stdout.write(f"{title}: {survived} survived, {lost} lost\n")
            sys.stdout.flush()
    file = Path(arguments.output)
    earlier = json.loads(file.read_text(encoding="utf-8"))["table"]["rows"] if arguments.only and file.is_file() else []
    by_title = {row[0]: row for row in earlier}
    by_title |= {title: [title, str(sum(both)), *map(str, both)] for title, both in counts.items()}
    rows = [by_title[title] for title in FAULTS if title in by_title]
    table = {"header": ["fault", "trials", "survived", "lost"], "rows": rows}
    write_json(file, {"table": table, "seed": arguments.seed, "provenance": provenance()})
    return int(any(lost for _, lost in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
