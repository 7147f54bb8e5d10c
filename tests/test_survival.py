"""Runs that are stopped, damaged or broken: what is left, what is said, and that the same command goes on."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from makers import ROOT, flip
from makers.runs import TINY, assert_same_end, last_checkpoint, metrics, reset_accelerate, results, train
from safetensors.torch import load_file, save_file

from ot_diffusers import cli
from ot_diffusers.config import BaselineConfig, OTConfig, PriorConfig
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError, TrainingError, environment_error
from ot_diffusers.launch import run_script
from ot_diffusers.launch.signals import StopRequest
from ot_diffusers.training import Record, Schedule, TrainingState, open_run, save_checkpoint, save_results, saved_model
from ot_diffusers.training.averages import Averages, effective_rank
from ot_diffusers.training.files import CHECKSUMS, damage, placed_in, write_checksums, written_aside
from ot_diffusers.training.folder import batch_sizes, check_batch

pytestmark = pytest.mark.slow

SEVEN: dict[str, Any] = {"train_batch_size": 384, "max_train_steps": 7, "checkpointing_steps": 1}
SEVEN |= {"checkpoints_total_limit": 9, "logging_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven updates without interruption, three to an epoch, with a checkpoint after each."""
    return train("baseline", tmp_path_factory.mktemp("whole") / "run", **SEVEN)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("features", tmp_path_factory.mktemp("features") / "run", max_train_steps=2)


def copy_until(whole: Path, update: int, folder: Path) -> Path:
    """What a run that was killed after a checkpoint leaves."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("unet", "scheduler", "*.png", "results.json"))
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name[-8:]) > update:
            shutil.rmtree(checkpoint)
    return folder


# --- Damage -----------------------------------------------------------------------------------------------------------


DAMAGE: dict[str, Callable[[Path], None]] = {
    "bit of the weights": lambda folder: flip(folder / "model.safetensors", 1),
    "bit of the moments": lambda folder: flip(folder / "optimizer.safetensors", 2),
    "bit of the record": lambda folder: flip(folder / "state.json", 3),
    "bit of the checksums": lambda folder: flip(folder / CHECKSUMS, 4),
    "cut short": lambda folder: os.truncate(folder / "ema.safetensors", 1000),
    "empty": lambda folder: os.truncate(folder / "state.json", 0),
    "no checksums": lambda folder: (folder / CHECKSUMS).unlink(),
    "empty checksums": lambda folder: os.truncate(folder / CHECKSUMS, 0),
    "missing part": lambda folder: (folder / "model.safetensors").unlink(),
    "unlisted part": lambda folder: (folder / "opponent.safetensors").write_bytes(b""),
    "no part": lambda folder: shutil.rmtree(folder) or folder.mkdir(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(last_checkpoint(whole), tmp_path / "checkpoint")
    assert damage(folder) is None
    DAMAGE[kind](folder)
    assert damage(folder) is not None


def test_any_bit_counts(tmp_path: Path) -> None:
    """The list of checksums covers all files, and itself: no bit of a checkpoint can change unseen."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.bin").write_bytes(b"some weights")
    (tmp_path / "b.json").write_text("{}")
    write_checksums(tmp_path)
    assert damage(tmp_path) is None
    for file in (tmp_path / "part" / "a.bin", tmp_path / "b.json", tmp_path / CHECKSUMS):
        content = file.read_bytes()
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bytes(changed))
            assert damage(tmp_path) is not None, (file.name, bit)
        file.write_bytes(content)
    assert damage(tmp_path) is None


def test_damaged_checkpoints_are_passed_over_and_kept(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = copy_until(whole, 5, tmp_path / "run")
    flip(parts / "checkpoints" / "update-00000005" / "model.safetensors", 0)
    os.truncate(parts / "checkpoints" / "update-00000004" / "state.json", 10)
    with caplog.at_level(logging.WARNING):
        train("baseline", parts, **SEVEN)
    warned = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert ["model.safetensors has changed" in warned[0], "state.json has changed" in warned[1]] == [True, True]
    assert all(line.endswith("the run resumes from update-00000003") for line in warned)
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert names[:2] == ["damaged-00000004", "damaged-00000005"] and names[-1] == "update-00000007"
    assert_same_end(parts, whole)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_without_any_good_checkpoint_is_refused_as_often_as_it_is_tried(
    updates: int, whole: Path, tmp_path: Path
) -> None:
    """What has been trained is not begun again before somebody has looked."""
    parts = copy_until(whole, updates, tmp_path / "run")
    for checkpoint in (parts / "checkpoints").iterdir():
        flip(checkpoint / "ema.safetensors", 0)
    before = sorted(path.name for path in (parts / "checkpoints").iterdir())
    records = (parts / "metrics.jsonl").read_text()
    for _ in range(2):
        with pytest.raises(InputError) as refusal:
            train("baseline", parts, **SEVEN)
        assert f"all {updates} are damaged (update-0000000{updates}: ema.safetensors has changed" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == before
        assert (parts / "metrics.jsonl").read_text() == records
    (parts / "checkpoints").rename(tmp_path / "damaged")  # as the message says
    if updates == 1:
        train("baseline", parts, **SEVEN)
        assert_same_end(parts, whole)


def test_a_named_checkpoint_that_is_damaged_is_refused(whole: Path, tmp_path: Path) -> None:
    parts = copy_until(whole, 3, tmp_path / "run")
    checkpoint = parts / "checkpoints" / "update-00000002"
    flip(checkpoint / "optimizer.safetensors", 0)
    with pytest.raises(InputError, match=r"`resume_from_checkpoint` must be .* as it was written \(optimizer"):
        train("baseline", parts, **SEVEN, resume_from_checkpoint=str(checkpoint))
    assert len(list((parts / "checkpoints").iterdir())) == 3


def test_an_earlier_checkpoint_puts_the_later_ones_aside(whole: Path, tmp_path: Path) -> None:
    parts = copy_until(whole, 5, tmp_path / "run")
    checkpoint = str(parts / "checkpoints" / "update-00000003")
    before = load_file(parts / "checkpoints" / "update-00000005" / "model.safetensors")
    for times in (1, 2):
        train("baseline", parts, **SEVEN, resume_from_checkpoint=checkpoint)
        assert_same_end(parts, whole)
        assert len(list((parts / "checkpoints").glob("replaced-*"))) == times
    kept = load_file(parts / "checkpoints" / "replaced-1" / "update-00000005" / "model.safetensors")
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_what_fails_while_it_is_written_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    with written_aside(tmp_path / "old") as partial:
        (partial / "a").write_text("old")
    with pytest.raises(OSError), written_aside(tmp_path / "new") as partial:
        (partial / "a").write_text("new")
        raise OSError("disk")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and damage(tmp_path / "old") is None
    line = f"{hashlib.sha256(b'old').hexdigest()}  a\n"  # as `sha256sum` writes and checks
    assert (tmp_path / "old" / CHECKSUMS).read_text() == line


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 3}'])
def test_a_record_that_cannot_be_read_is_one_line(content: str, whole: Path, tmp_path: Path) -> None:
    parts = copy_until(whole, 2, tmp_path / "run")
    (parts / "run.json").write_text(content)
    with pytest.raises(InputError, match="`output_dir` must hold"):
        train("baseline", parts, **SEVEN)


def test_what_a_kill_leaves_before_the_record_is_no_obstacle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.123.partial").write_text("{")
    train("baseline", run, max_train_steps=1)
    assert not list(run.glob(".*.partial"))


# --- Records over an interruption -------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [1, 2, 4, 5])
def test_an_epoch_that_was_interrupted_is_averaged_as_a_whole(update: int, whole: Path, tmp_path: Path) -> None:
    """Bit for bit: the sums of float32 losses in float64 do not tell where they were parted."""
    parts = copy_until(whole, update, tmp_path / "run")
    lines = (parts / "metrics.jsonl").read_text().splitlines(keepends=True)
    done = "".join(line for line in lines if json.loads(line)["step"] <= update)
    (parts / "metrics.jsonl").write_text(done + '{"epoch": 2, "st')  # a line that was cut short
    train("baseline", parts, **SEVEN)
    assert [line["step"] for line in metrics(parts)] == [3, 6, 7]
    for line, expected in zip(metrics(parts), metrics(whole), strict=True):
        for name in ("loss", "mse", "gradient_norm", "validation_loss"):
            assert line[name] == expected[name]


def test_a_finished_run_that_is_extended_is_not_called_complete(tmp_path: Path) -> None:
    """By whoever reads its results while it trains, or after it was killed."""
    told = {"updates": 4, "complete": True, "stopped_by": "max_train_seconds", "test_accuracy": 0.9}
    state, accelerator = tiny_state()
    config = BaselineConfig(output_dir=str(tmp_path))
    for update, changed in ((8, {}), (4, {"complete": False, "stopped_by": None})):
        (tmp_path / "results.json").write_text(json.dumps(told))
        state.update = update
        Record(config, Schedule(4, 4, 2, 8), accelerator, state)
        assert results(tmp_path) == told | changed


# --- The end of a run -------------------------------------------------------------------------------------------------


def test_a_run_that_is_asked_to_stop_saves_its_model_and_draws_nothing(tmp_path: Path) -> None:
    run = train("baseline", tmp_path / "run", max_train_steps=2, sample_epochs=1, max_train_seconds=1e-9)
    DDIMPipeline.from_pretrained(run)
    assert results(run)["stopped_by"] == "max_train_seconds" and not (run / "samples").exists()
    train("baseline", run, max_train_steps=2, sample_epochs=1)
    (grid,) = (run / "samples").iterdir()
    assert (run / "model_index.json").stat().st_mtime_ns < grid.stat().st_mtime_ns


def test_the_last_grid_waits_until_everything_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last update ends an epoch that has a grid."""
    saved: list[bool] = []
    sample = DDIMPipeline.__call__

    def look_and_sample(pipeline: DDIMPipeline, *arguments: Any, **options: Any) -> Any:
        files = ("model_index.json", "unet/diffusion_pytorch_model.safetensors", "results.json")
        saved.append(all((tmp_path / file).is_file() for file in files))
        return sample(pipeline, *arguments, **options)

    monkeypatch.setattr(DDIMPipeline, "__call__", look_and_sample)
    train("baseline", tmp_path, train_batch_size=576, max_train_steps=4, sample_epochs=1)
    assert saved == [False, True]


def test_half_a_model_is_never_taken_for_a_whole(tmp_path: Path) -> None:
    """Killed while the parts of a pipeline are written for the first time, or once more."""
    run = train("baseline", tmp_path / "run", max_train_steps=1)
    for again in (False, True):
        before = {path: path.read_bytes() for path in [run / "model_index.json", *(run / "unet").iterdir()]}
        if not again:
            for path in before:
                path.unlink()
        kill_while_saving(run, ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
        for path, content in before.items():
            assert path.read_bytes() == content if again else not path.exists()
        train("baseline", run, max_train_steps=1)
        assert not list(run.glob(".*.partial")) and all(path.is_file() for path in before)
        DDIMPipeline.from_pretrained(run)


def kill_while_saving(run: Path, names: list[str]) -> None:
    """Another process writes half of each file and is killed."""
    ready, started = multiprocessing.get_context("fork").Pipe(duplex=False)

    def save() -> None:
        with placed_in(run, last="model_index.json") as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("half")
            started.send(None)
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    ready.recv()
    process.kill()
    process.join()


def test_files_take_their_places_and_leave_others_alone(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("unet/notes.txt", "unet/config.json", "index.json"):
        (tmp_path / name).write_text("old")
    with placed_in(tmp_path, last="index.json") as folder:
        (folder / "unet").mkdir()
        for name in ("unet/config.json", "index.json"):
            (folder / name).write_text("new")
        assert (tmp_path / "index.json").read_text() == "old"
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"unet/notes.txt": "old", "unet/config.json": "new", "index.json": "new"}
    with pytest.raises(OSError), placed_in(tmp_path, last="index.json") as folder:
        (folder / "index.json").write_text("half")
        raise OSError("disk")
    assert (tmp_path / "index.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "unet"]


# --- The folder while a run goes on -----------------------------------------------------------------------------------


def test_a_run_whose_folder_is_gone_stops_and_does_not_make_it_again(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def take_away() -> None:
        while not list(run.glob("checkpoints/update-*")):
            time.sleep(0.01)
        run.rename(tmp_path / "gone")  # deleting takes a moment, in which the run writes

    meddler = threading.Thread(target=take_away)
    meddler.start()
    with pytest.raises(TrainingError, match=r"the folder .* was deleted or moved during the run"):
        train("baseline", run, max_train_steps=5000, checkpointing_steps=3)
    meddler.join()
    assert not run.exists()


@pytest.mark.parametrize("given", [False, True], ids=["gone", "given to another run"])
def test_nothing_is_written_into_a_folder_that_is_not_the_runs_own(given: bool, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config, schedule = BaselineConfig(output_dir=str(run), report_to="none"), Schedule(4, 4, 2, 8)
    state, accelerator = tiny_state()
    open_run(config, accelerator, load_images("digits", "train"))
    record = Record(config, schedule, accelerator, state)
    save_checkpoint(state, config, accelerator)
    run.rename(tmp_path / "gone")
    if given:
        shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    state.update = 2
    for write in (
        lambda: save_checkpoint(state, config, accelerator),
        lambda: record.end_epoch(validation_loss=1.0),
        lambda: save_results(state, config, schedule, accelerator),
        lambda: saved_model(config).__enter__(),
    ):
        with pytest.raises(TrainingError, match="nothing more is written there"):
            write()
    assert run.exists() == given
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_another_run_takes_meanwhile_is_refused(whole: Path, tmp_path: Path) -> None:
    """Both found it empty. The other one, which holds the lock, has written its record by the time it ends."""
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-c", HOLD, str(run / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"

    def end() -> None:
        time.sleep(1.0)
        shutil.copy(whole / "run.json", run / "run.json")
        holder.communicate()

    other = threading.Thread(target=end)
    other.start()
    started = time.monotonic()
    with pytest.raises(InputError, match=r"which holds a run with learning_rate=0.001 instead of 0.002"):
        train("baseline", run, **SEVEN | {"learning_rate": 2e-3})
    other.join()
    assert time.monotonic() - started > 0.5  # it did come to the lock
    assert (run / "run.json").read_bytes() == (whole / "run.json").read_bytes()
    assert sorted(path.name for path in run.iterdir()) == [".lock", "run.json"]


WRITTEN = {
    "file": ("run.json", "metrics.jsonl", "results.json", "model_index.json", ".lock"),
    "folder": ("checkpoints", "samples", "logs", "unet", "scheduler"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in WRITTEN.items() for name in names])
def test_what_stands_in_the_way_is_found_before_training(kind: str, name: str, whole: Path, tmp_path: Path) -> None:
    parts = copy_until(whole, 2, tmp_path / "run")
    place = parts / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.mkdir() if kind == "file" else place.write_text("mine")
    with pytest.raises(InputError) as refusal:
        train("baseline", parts, **SEVEN)
    assert str(refusal.value).startswith("`output_dir` must ") and "\n" not in str(refusal.value)
    assert place.is_dir() if kind == "file" else place.read_text() == "mine"


# --- The batch belongs to the run -------------------------------------------------------------------------------------


def refusal(config: Any, processes: int, earlier: dict[str, int]) -> str | None:
    try:
        check_batch(config, batch_sizes(config, processes), earlier, processes)
    except InputError as error:
        return str(error)
    return None


def test_a_run_goes_on_with_the_same_images_in_an_update_on_any_number_of_processes() -> None:
    began = batch_sizes(BaselineConfig(train_batch_size=12), 1)
    for processes, batch, accumulation in [(1, 12, 1), (2, 6, 1), (4, 3, 1), (1, 4, 3), (3, 2, 2)]:
        config = BaselineConfig(train_batch_size=batch, gradient_accumulation_steps=accumulation)
        assert refusal(config, processes, began) is None
    message = refusal(BaselineConfig(train_batch_size=12), 2, began)
    assert message == (
        "`train_batch_size × gradient_accumulation_steps` must be 6 on 2 processes, as the run began with 12 images in "
        "an update, got 12"
    )
    message = refusal(BaselineConfig(train_batch_size=2), 5, began)
    assert message is not None and message.startswith("`num_processes` must be a divisor of 12")


@pytest.mark.parametrize("config_class", [functools.partial(OTConfig, ot_weight=0.03), PriorConfig])
def test_where_distributions_are_compared_a_forward_pass_keeps_its_images(config_class: Any) -> None:
    began = batch_sizes(config_class(train_batch_size=12, gradient_accumulation_steps=2), 1)
    again = config_class(train_batch_size=6, gradient_accumulation_steps=2)
    assert refusal(again, 2, began) is None
    message = refusal(config_class(train_batch_size=6, gradient_accumulation_steps=4), 1, began)
    assert message is not None and "`train_batch_size` must be 12 on 1 processes" in message
    message = refusal(config_class(train_batch_size=12), 1, began)
    assert message == "`gradient_accumulation_steps` must be 2, as when the run began, got 1"


def test_a_run_goes_on_with_another_split_of_its_batch(whole: Path, tmp_path: Path) -> None:
    parts = copy_until(whole, 5, tmp_path / "run")
    split = {"train_batch_size": 128, "gradient_accumulation_steps": 3}
    train("baseline", parts, **SEVEN | split)
    # The same gradients, added in another order.
    assert metrics(parts)[-1]["loss"] == pytest.approx(metrics(whole)[-1]["loss"], rel=1e-4)
    with pytest.raises(InputError, match="must be 384 on 1 processes"):
        train("baseline", parts, **SEVEN | {"train_batch_size": 192})


# --- Numbers that are none --------------------------------------------------------------------------------------------


def test_a_run_that_breaks_names_update_and_part_and_keeps_what_was_good(tmp_path: Path) -> None:
    """The first step of 1e30 leaves finite weights, with which nothing finite can be computed."""
    values: dict[str, Any] = {"learning_rate": 1e30, "checkpoints_total_limit": 1, "max_train_steps": 40}
    with pytest.raises(
        TrainingError, match=r"`mse` is not finite in training step 2; .* lower learning_rate"
    ) as failure:
        train("baseline", tmp_path / "late", **values)  # found at the first record, after 20 updates
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "late" / "checkpoints").exists() and not (tmp_path / "late" / "results.json").exists()
    with pytest.raises(TrainingError, match="in training step 2;"):
        train("baseline", tmp_path / "saving", **values, checkpointing_steps=1)
    (only,) = (tmp_path / "saving" / "checkpoints").iterdir()
    assert only.name == "update-00000001" and damage(only) is None


def tiny_state(**values: Any) -> tuple[TrainingState, Accelerator]:
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    config = BaselineConfig(**values)
    model, schedule = torch.nn.Linear(3, 1), Schedule(4, 4, 10, 10)
    return TrainingState.prepare(accelerator, model, config, schedule, EMAModel(model.parameters())), accelerator


def test_updates_without_a_finite_gradient_are_left_out_as_often_as_allowed() -> None:
    state, accelerator = tiny_state(max_skipped_updates=2)
    inputs = torch.ones(4, 3)
    weights: list[torch.Tensor] = []
    for factor in (1.0, math.nan, math.inf, 1.0):
        state.backward(accelerator, state.model(inputs).sum() * factor, 1.0)
        weights.append(state.model.weight.detach().clone())
        assert state.update_was_skipped is not math.isfinite(factor)
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])
    assert (state.update, state.skipped_updates) == (4, 2) and state.ema is not None
    assert state.ema.optimization_step == 2
    with pytest.raises(TrainingError, match="the gradient is not finite in training step 5, and 2 steps have already"):
        state.backward(accelerator, state.model(inputs).sum() * math.nan, 1.0)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    state, accelerator = tiny_state()
    state.save(tmp_path / "good", accelerator)
    state.model.bias.data.fill_(math.inf)
    with pytest.raises(TrainingError, match="the weights are not finite after training step 0"):
        state.save(tmp_path / "bad", accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_the_part_that_broke_first_is_named() -> None:
    _, accelerator = tiny_state()
    averages = Averages()
    for update in range(1, 7):
        ot = torch.tensor(math.nan if update >= 5 else 1.0)
        norm = torch.tensor(math.inf if update >= 4 else 1.0)
        averages.add(update, {"loss": 1 + ot, "mse": torch.tensor(1.0), "ot": ot, "gradient_norm": norm})
    with pytest.raises(TrainingError, match="`gradient_norm` is not finite in training step 4"):
        averages.record(accelerator)
    averages.forget(4)
    averages.recent.pop("gradient_norm")
    with pytest.raises(TrainingError, match="`ot` is not finite in training step 5"):
        averages.epoch_so_far(accelerator)


def test_features_that_are_not_finite_are_refused(features: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(features / "feature_extractor", tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.fill_(math.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="`feature_extractor` must give finite features"):
        train("ot", tmp_path / "run", feature_extractor=str(broken))


@given(st.integers(1, 6), st.integers(7, 30), st.integers(0, 99))
def test_effective_rank_is_the_number_of_equal_directions(rank: int, count: int, seed: int) -> None:
    """Rows with `rank` orthogonal directions of equal length after centring; float32 rounding of the lengths."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.cat([torch.ones(count, 1), torch.randn(count, rank, generator=generator)], dim=1))
    right, _ = torch.linalg.qr(torch.randn(8, rank, generator=generator))
    rows = 3 * left[:, 1:] @ right.T + torch.randn(8, generator=generator)
    assert effective_rank(rows).item() == pytest.approx(rank, rel=1e-3)


def test_a_collapsing_prior_is_warned_of_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = BaselineConfig(logging_steps=1, output_dir=str(tmp_path))
    state, accelerator = tiny_state()
    record = Record(config, Schedule(4, 4, 2, 8), accelerator, state)
    real = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    collapsed = real[:1] + 1e-3 * torch.arange(32)[:, None, None, None] * real[1:2]
    for update in range(1, 9):
        record.compare_spread(collapsed, real)
        state.update = update
        if update % 2 == 0:
            with caplog.at_level(logging.WARNING):
                record.end_epoch()
    (warning,) = [entry.getMessage() for entry in caplog.records if "collapse" in entry.getMessage()]
    assert warning.startswith("generated images collapse: their effective rank is ")
    # One direction, of at most 31.
    assert metrics(tmp_path)[0]["effective_rank"] == pytest.approx(1 / effective_rank(real).item(), rel=1e-3)


# --- Signals ----------------------------------------------------------------------------------------------------------


def start(command: list[str], folder: Path, **values: Any) -> subprocess.Popen[str]:
    """A long run, once its first checkpoint is there."""
    options = TINY["baseline"] | {"output_dir": folder, "max_train_steps": 5000, "checkpointing_steps": 1} | values
    arguments = [f"{key}={value}" for key, value in options.items()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *command, *arguments], **pipes)
    until = time.monotonic() + 120
    while not list(folder.glob("checkpoints/update-*")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("command", "processes", "number"),
    [
        ([str(ROOT / "train" / "train_baseline.py")], 1, signal.SIGINT),
        (["-m", "ot_diffusers.cli", "train", "baseline", "--num-processes", "2"], 2, signal.SIGTERM),
    ],
    ids=["script", "two processes"],
)
def test_a_signal_saves_and_leaves_with_status_0(
    command: list[str], processes: int, number: int, tmp_path: Path
) -> None:
    process = start(command, tmp_path / "run")
    process.send_signal(number)
    process.send_signal(number)  # as `timeout` and terminals do, to the process and to its group
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by a signal after training step" in output
    assert output.rstrip().endswith("rerun the same command to resume")
    assert "Traceback" not in errors
    left = results(tmp_path / "run")
    assert left["stopped_by"] == "a signal" and not left["complete"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_processes"] == processes
    assert not (tmp_path / "run" / "samples").exists()
    assert last_checkpoint(tmp_path / "run").name == f"update-{left['updates']:08d}"
    assert damage(last_checkpoint(tmp_path / "run")) is None


def test_before_training_a_signal_ends_a_process_at_once(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["train_baseline.py"])
    with pytest.raises(SystemExit) as leaving:
        run_script(lambda config: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1), BaselineConfig, "")
    assert leaving.value.code == 0
    assert (
        capsys.readouterr().err
        == "stopped by SIGTERM before the first training step; rerun the same command to start\n"
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_command_that_is_done_stays_done(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["train_baseline.py"])
    run_script(lambda config: None, BaselineConfig, "")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert capsys.readouterr().err == ""


def test_an_interrupt_that_insists_interrupts() -> None:
    request = StopRequest()
    request.heeded = True
    request.note(signal.SIGINT, None)
    request.note(signal.SIGINT, None)
    request._since -= 60
    request.note(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        request.note(signal.SIGINT, None)


def test_bad_input_to_several_processes_is_one_line_and_status_2(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = copy_until(whole, 2, tmp_path / "run")
    arguments = [f"{key}={value}" for key, value in (TINY["baseline"] | SEVEN | {"output_dir": parts}).items()]
    assert cli.main(["train", "baseline", "--num-processes", "2", *arguments]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: `train_batch_size × gradient_accumulation_steps` must be 192 on 2 processes")
    assert errors.count("\n") == 1


# --- Environment ------------------------------------------------------------------------------------------------------


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_waited_for_and_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ot_diffusers.training.folder.CLAIM_SECONDS", 0.5)
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="`output_dir` must not be in use by another process"):
        train("baseline", tmp_path / "run", max_train_steps=1)
    holder.communicate()
    train("baseline", tmp_path / "run", max_train_steps=1)


def leave(main: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[Any, str]:
    monkeypatch.setattr("sys.argv", ["train_baseline.py"])
    with pytest.raises(SystemExit) as leaving:
        run_script(main, BaselineConfig, "")
    return leaving.value.code, capsys.readouterr().err


def test_too_little_memory_names_the_setting_to_lower(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for allocate in (lambda _: torch.empty(2**60), lambda _: bytearray(2**62)):
        status, error = leave(allocate, monkeypatch, capsys)
        assert status == 1
        assert error.startswith("error: out of memory: lower train_batch_size") and error.count("\n") == 1


def test_a_disk_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fill(_: Any) -> None:
        with open("/dev/full", "w") as file:
            file.write("results")

    status, error = leave(fill, monkeypatch, capsys)
    assert status == 1
    assert error == (
        "error: cannot write: No space left on device; rerun the same command to resume from the last checkpoint\n"
    )


def test_errors_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for error in (KeyError("weights"), FileNotFoundError(2, "No such file"), RuntimeError("shapes do not match")):
        assert environment_error(error) is None
    with pytest.raises(ZeroDivisionError):
        leave(lambda _: 1 / 0, monkeypatch, capsys)
