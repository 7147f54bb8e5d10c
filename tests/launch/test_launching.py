"""What a launcher decides is what a run does, or one line; and any seed starts one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers.runs import last_checkpoint, metrics, reset_accelerate, results, train
from safetensors.torch import load_file, save_file

from ot_diffusers import sampling
from ot_diffusers.cli.process import chosen_dtype
from ot_diffusers.config import BaselineConfig, load_config
from ot_diffusers.errors import InputError
from ot_diffusers.evaluation.metrics import frechet_distance_infinity, kernel_distance
from ot_diffusers.evaluation.pixels import patch_sliced_wasserstein
from ot_diffusers.evaluation.stress import stress_test
from ot_diffusers.launch.commands import launched, training_command
from ot_diffusers.schedules import truncated_samples
from ot_diffusers.seeds import folded, seeded_generator
from ot_diffusers.training import make_accelerator

pytestmark = pytest.mark.slow

PRECISION, STEPS = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OT_DIFFUSERS_CACHE", str(tmp_path / "cache"))


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


# --- Launcher and configuration ---------------------------------------------------------------------------------------


def either(launcher: Any, own: Any, absent: Any) -> Any:
    """What holds where one of the two has said something, or both the same; a refusal elsewhere."""
    said = {value for value in (launcher, own) if value is not None}
    return {0: absent, 1: next(iter(said), None)}.get(len(said), InputError)


@pytest.mark.parametrize(
    ("launcher", "own"),
    list(itertools.product([None, "no", "fp16", "BF16"], [None, "float32", "float16", "bfloat16"])),
)
def test_the_dtype_of_sampling_is_the_launchers_or_the_commands(
    launcher: str | None, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launcher is not None:
        monkeypatch.setenv(PRECISION, launcher)
    decided = {"fp16": "float16", "BF16": "bfloat16"}.get(launcher or "")
    expected = either(decided, own, "float32")
    if expected is InputError:
        with pytest.raises(
            InputError, match=f"`dtype` must be left out or {decided}, which the launcher has set, got '{own}'"
        ):
            chosen_dtype(own)
    else:
        assert chosen_dtype(own) == expected


@pytest.mark.parametrize(
    ("launcher", "own"),
    list(itertools.product([None, "", "no", "NO", "fp16", "bf16", "BF16"], [None, "no", "fp16", "bf16"])),
)
def test_precision_is_the_launchers_or_the_configurations(launcher: str | None, own: str | None) -> None:
    """`accelerate launch` says "no" where it was told nothing, which decides nothing."""
    environment = {} if launcher is None else {PRECISION: launcher}
    told = (launcher or "no").lower()
    expected = either(None if told == "no" else told, own, "no")
    if expected is InputError:
        with pytest.raises(InputError) as refusal:
            launched(BaselineConfig(mixed_precision=own), environment)
        assert str(refusal.value) == (
            f"`mixed_precision` must be left out or {told}, which the launcher has set, got {own!r}"
        )
    else:
        assert launched(BaselineConfig(mixed_precision=own), environment).mixed_precision == expected


@pytest.mark.parametrize(("launcher", "own"), list(itertools.product([None, "", "1", "2", "4"], [None, 1, 2, 3])))
def test_accumulation_is_the_launchers_or_the_configurations(launcher: str | None, own: int | None) -> None:
    environment = {} if launcher is None else {STEPS: launcher}
    expected = either(int(launcher) if launcher else None, own, 1)
    config = BaselineConfig(gradient_accumulation_steps=own)
    if expected is InputError:
        with pytest.raises(InputError, match=rf"must be left out or {launcher}, which the launcher .*, got {own}$"):
            launched(config, environment)
    else:
        assert launched(config, environment).gradient_accumulation_steps == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({PRECISION: "fp8"}, "`ACCELERATE_MIXED_PRECISION` must be one of no, fp16, bf16, got 'fp8'"),
        ({PRECISION: "fp16"}, "`mixed_precision` must be no or bf16 on cpu, got 'fp16'"),
        *[
            ({STEPS: steps}, f"`{STEPS}` must be a whole number of at least 1, got {steps!r}")
            for steps in ("0", "-4", "2.5", "auto", "four")
        ],
        *[
            (
                {f"ACCELERATE_USE_{name}": "true"},
                "`distributed_type` must be one that keeps the whole model in every process",
            )
            for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
        ],
        ({"ACCELERATE_DYNAMO_BACKEND": "nonsense"}, "accelerate does not accept its settings: 'NONSENSE'"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "accelerate does not accept its settings: invalid truth value"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    environment: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available() and environment == {PRECISION: "fp16"}:
        pytest.skip("a GPU can")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refusal:
        train("baseline", tmp_path / "run", max_train_steps=1)
    assert str(refusal.value).startswith(expected) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_launcher_makes_all_updates_and_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever decides, the run is the same, bit for bit."""
    values = {"max_train_steps": 3, "logging_steps": 1}
    own = train("baseline", tmp_path / "own", **values, mixed_precision="bf16", gradient_accumulation_steps=4)
    monkeypatch.setenv(PRECISION, "bf16")
    monkeypatch.setenv(STEPS, "4")
    told = train("baseline", tmp_path / "told", **values)
    assert record(told)["config"] | {"output_dir": str(own)} == record(own)["config"]
    assert record(told)["config"]["mixed_precision"] == "bf16"
    assert record(told)["config"]["gradient_accumulation_steps"] == 4
    assert record(told)["batch"] == {"update": 32, "forward": 8}
    assert record(told)["dynamo_backend"] == "NO"
    assert (results(told)["updates"], results(told)["complete"]) == (3, True)
    first, second = (load_file(last_checkpoint(run) / "model.safetensors") for run in (own, told))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics(own)[-1]["loss"] == metrics(told)[-1]["loss"]

    # Another precision is another run.
    monkeypatch.delenv(PRECISION)
    with pytest.raises(InputError, match="which holds a run with mixed_precision='bf16' instead of 'no'"):
        train("baseline", told, **values | {"max_train_steps": 4})
    train("baseline", told, **values | {"max_train_steps": 4}, mixed_precision="bf16")
    assert results(told)["updates"] == 4


@pytest.mark.usefixtures("bf16_units")
def test_a_script_of_ones_own_accumulates_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEPS, "4")
    monkeypatch.setenv(PRECISION, "bf16")
    reset_accelerate()
    accelerator = make_accelerator(BaselineConfig(report_to="none"))
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (4, "bf16")
    reset_accelerate()


def test_a_processor_that_only_emulates_bf16_computes_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On which a training step takes ten times as long. The record has the precision that was asked for, so that the
    run goes on in it elsewhere."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    told = "this processor only emulates bfloat16: the networks compute in float32"
    options = {"max_train_steps": 1, "logging_steps": 1}
    full = train("baseline", tmp_path / "full", **options)
    with pytest.warns(UserWarning, match=told):
        half = train("baseline", tmp_path / "half", **options, mixed_precision="bf16")
    assert metrics(half)[0]["loss"] == metrics(full)[0]["loss"]
    assert record(half)["config"]["mixed_precision"] == "bf16"
    with pytest.warns(UserWarning, match=told), sampling.networks_in("bfloat16", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    assert not sampling.is_emulated("bfloat16", torch.device("cuda"))


def test_a_run_of_the_version_before_goes_on(tmp_path: Path) -> None:
    """Which wrote "no", and no fingerprints of frozen networks."""
    features = train("features", tmp_path / "features", max_train_steps=1)
    run = train("ot", tmp_path / "run", max_train_steps=1, feature_extractor=str(features))
    earlier = record(run)
    assert earlier["config"]["mixed_precision"] == "no"
    for name in ("frozen", "dynamo_backend"):
        earlier.pop(name)
    (run / "run.json").write_text(json.dumps(earlier))
    train("ot", run, max_train_steps=2, feature_extractor=str(features))
    assert results(run)["updates"] == 2 and record(run)["frozen"].keys() == {"feature_extractor"}

    # From here on, the network is known by its weights.
    file = next((features / "feature_extractor").glob("*.safetensors"))
    tensors = load_file(file)
    shutil.copy(file, tmp_path / "kept")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"`feature_extractor` must hold the weights that the run began with, got '.*"):
        train("ot", run, max_train_steps=3, feature_extractor=str(features))
    assert results(run)["updates"] == 2
    shutil.copy(tmp_path / "kept", file)
    train("ot", run, max_train_steps=3, feature_extractor=str(features))
    assert results(run)["updates"] == 3


@pytest.mark.parametrize(("content", "agrees"), [("bf16", True), ("fp16", False), ("no", True), ('"no"', True)])
def test_a_file_of_accelerate_is_compared_before_anything_is_started(
    content: str, agrees: bool, tmp_path: Path
) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(f"num_processes: 1\nmixed_precision: {content}\n")
    arguments: dict[str, Any] = {"overrides": ["mixed_precision=bf16"], "accelerate_config": str(file)}
    if agrees:
        assert "mixed_precision=bf16" in training_command("ot", **arguments)
    else:
        with pytest.raises(InputError, match="must be left out or fp16, which the launcher has set, got 'bf16'"):
            training_command("ot", **arguments)


@pytest.mark.parametrize("content", ["- a list", "{", "\xff"])
def test_a_file_that_is_not_accelerates_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="`accelerate_config` must be"):
        training_command("ot", accelerate_config=str(tmp_path / "machine.yaml"))


# --- Seeds ------------------------------------------------------------------------------------------------------------

SEEDS = [0, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, 10**30])
def test_every_seed_is_taken_and_is_another(seed: int, tmp_path: Path) -> None:
    assert load_config(BaselineConfig, [f"seed={seed}"]).seed == seed
    run = train("baseline", tmp_path / "run", max_train_steps=1, seed=seed, report_to="tensorboard")
    assert record(run)["config"]["seed"] == seed
    assert np.isfinite(metrics(run)[-1]["loss"])
    with pytest.raises(InputError, match=f"seed={seed} instead of {seed + 1}"):
        train("baseline", run, max_train_steps=2, seed=seed + 1)


def test_small_seeds_are_themselves_and_large_ones_differ() -> None:
    for seed in (0, 1, 2**32 - 1):
        assert folded(seed, 32) == seed and seeded_generator(seed).initial_seed() == seed
        assert torch.equal(
            torch.randn(3, generator=seeded_generator(seed)),
            torch.randn(3, generator=torch.Generator().manual_seed(seed)),
        )
    large = [2**32 + offset for offset in range(50)] + [2**64 + offset for offset in range(50)] + [10**30]
    assert len({folded(seed, 32) for seed in large}) == len(large)
    assert all(0 <= folded(seed, bits) < 2**bits for seed in large for bits in (32, 64))


@pytest.mark.parametrize("seed", [*SEEDS, -1])
def test_every_measure_takes_every_seed(seed: int) -> None:
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = torch.arange(12 * 64).remainder(251).to(torch.uint8).view(12, 1, 8, 8)
    calls = [
        lambda: frechet_distance_infinity(features, features.flip(1), seed=seed),
        lambda: kernel_distance(features, features.flip(1), num_subsets=2, subset_size=10, seed=seed),
        lambda: patch_sliced_wasserstein(images, images.flip(3), seed=seed),
        lambda: stress_test(pixels, add_nothing, [0.0, 1.0], mean_of, repeats=3, seed=seed),
        lambda: truncated_samples(images, torch.arange(20), chain(), seed=seed),
    ]
    for call in calls:
        if seed >= 0:
            call()
        else:
            with pytest.raises(InputError, match="`seed` must be at least 0, got -1"):
                call()


def add_nothing(images: torch.Tensor, amount: float, generator: torch.Generator) -> torch.Tensor:
    return images


def mean_of(images: torch.Tensor) -> dict[str, float]:
    return {"frechet_distance": images.float().mean().item()}


def chain() -> Any:
    from diffusers import DDPMScheduler

    from ot_diffusers.schedules import truncated_scheduler

    return truncated_scheduler(DDPMScheduler(), 10)


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("007", 7), ("+3", 3), ("1_000", 1000), ("1.0", 1), ("9007199254740993", 9007199254740993)],
)
def test_whole_numbers_stay_exact(text: str, value: int) -> None:
    assert load_config(BaselineConfig, [f"seed={text}"]).seed == value


@pytest.mark.parametrize("text", ["-1", "1.5", "1e-3", "true", "two", "[1]", "inf", "nan"])
def test_other_seeds_are_one_line(text: str) -> None:
    with pytest.raises(InputError, match="`seed` must"):
        load_config(BaselineConfig, [f"seed={text}"])
