"""Tiny runs of the real training scripts, and what they leave."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from makers import ROOT
from ot_diffusers.config import make_config
from ot_diffusers.launch import run_script
from ot_diffusers.launch.commands import SCRIPTS
from ot_diffusers.studies import runs as study_runs

# A UNet of 30,000 parameters on the real digits: an update takes a few hundredths of a second.
COMMON: dict[str, Any] = {"dataset": "digits", "train_batch_size": 8, "report_to": "none"}
TINY_UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "attention_levels": [],
    "layers_per_block": 1,
    "num_inference_steps": 2,
    "num_validation_samples": 16,
    "learning_rate": 1e-3,
}
TINY: dict[str, dict[str, Any]] = {
    "features": COMMON | {"block_out_channels": [4, 8], "feature_dim": 16, "num_reference_samples": 50},
    "baseline": COMMON | TINY_UNET,
    "ot": COMMON
    | TINY_UNET
    | {"num_reference_samples": 50, "ot_weight": 0.1, "prediction_type": "epsilon", "noise_coupling": "independent"},
    "few_step": COMMON
    | {"num_validation_samples": 16, "validation_steps": 2, "learning_rate": 1e-3, "max_train_steps": 2},
    # A generator of 4,000 parameters.
    "prior": COMMON
    | {
        "truncation_timestep": 10,
        "latent_dim": 6,
        "block_out_channels": [16, 8],
        "num_inference_steps": 2,
        "num_projections": 8,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
    },
}


def reset_accelerate() -> None:
    """accelerate keeps its settings for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@functools.cache
def script_of(script: str) -> Any:
    """train/train_SCRIPT.py, which is no package."""
    spec = importlib.util.spec_from_file_location(f"train_{script}", ROOT / "train" / f"train_{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main_of(script: str) -> Callable[[Any], None]:
    return script_of(script).main


def train(script: str, folder: Path | str, **values: Any) -> Path:
    """A run in this process, tiny but for `values`."""
    reset_accelerate()
    main_of(script)(make_config(SCRIPTS[script][1], TINY[script] | {"output_dir": str(folder)} | values))
    return Path(folder)


def launch(script: str, folder: Path, processes: str, **values: Any) -> Path:
    """The same by `accelerate launch`, as a user would."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{processes}.yaml")]
    command += [str(ROOT / "train" / f"train_{script}.py")]
    command += [f"{key}={value}" for key, value in (TINY[script] | {"output_dir": folder} | values).items()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def train_forked(script: str, folder: Path, processes: int, **values: Any) -> Path:
    """The same in several processes, as a launcher starts them, but forked from this one, which saves their imports."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start_processes(_train_as, (processes, port, script, folder, values), nprocs=processes, start_method="fork")
    return folder


def _train_as(rank: int, processes: int, port: int, script: str, folder: Path, values: dict[str, Any]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    train(script, folder, **values)


class ForkedScript:
    """A training script of a study in a process of its own, forked from this one, which saves its imports; it has the
    part of `subprocess.Popen` that studies use."""

    def __init__(self, words: Sequence[str], stdout: BinaryIO, stderr: BinaryIO, env: Mapping[str, str]) -> None:
        python, *self.words = words
        assert python == sys.executable and Path(self.words[0]).is_file()
        self.process = get_context("fork").Process(target=self._run, args=(stdout.fileno(), dict(env)))
        self.process.start()

    def _run(self, log: int, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        reset_accelerate()
        sys.argv = self.words
        with open(log, "w", closefd=False) as text, redirect_stdout(text), redirect_stderr(text):
            runpy.run_path(self.words[0], run_name="__main__")

    def wait(self) -> int:
        self.process.join()
        return int(self.process.exitcode or 0)

    def terminate(self) -> None:
        self.process.terminate()


def fork_runs_of_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies start their training scripts as `ForkedScript`."""
    monkeypatch.setattr(study_runs, "subprocess", SimpleNamespace(Popen=ForkedScript))


def exit_status(script: str, words: list[str], output: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of the script, run here: what `ot-diffusers train` starts as a process of its own."""
    reset_accelerate()
    tiny = TINY[script] | ({"prior": "vae"} if script == "prior" else {"max_train_steps": 1})
    given = {word.split("=")[0] for word in words}
    values = {"output_dir": output} | {name: value for name, value in tiny.items() if name not in given}
    monkeypatch.setattr("sys.argv", [script, *(f"{name}={value}" for name, value in values.items()), *words])
    with pytest.raises(SystemExit) as leaving:
        run_script(main_of(script), SCRIPTS[script][1], "")
    return int(leaving.value.code or 0)


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint and of the models that were trained."""
    folders = (last_checkpoint(run), run / "unet", run / "prior")
    files = [file for folder in folders for file in folder.rglob("*.safetensors")]
    return {f"{file.relative_to(run)}:{name}": value for file in files for name, value in load_file(file).items()}


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, their average, the optimizer's moments and the saved models are equal bit for bit."""
    first, second = tensors(run), tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())
