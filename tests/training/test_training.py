"""Training by the real scripts: what a run leaves, and that neither interruptions nor the number of processes and of
forward passes change what is learnt."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMPipeline, DDPMScheduler
from makers import command, snapshot
from makers.runs import (
    TINY,
    assert_same_end,
    last_checkpoint,
    launch,
    main_of,
    metrics,
    reset_accelerate,
    results,
    script_of,
    train,
    train_forked,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ot_diffusers import FlowMatchPipeline, OTGuidedDDIMPipeline, SemidiscreteCoupling, cli, truncated_scheduler
from ot_diffusers.config import BaselineConfig, OTConfig, make_config
from ot_diffusers.data import ResidentImages, load_images
from ot_diffusers.errors import InputError
from ot_diffusers.features import cached_features, load_feature_extractor
from ot_diffusers.launch import run_script, training_command
from ot_diffusers.losses.denoising import disjoint_reference_indices
from ot_diffusers.sampling import load_pipeline
from ot_diffusers.schedules import prediction_type_of
from ot_diffusers.seeds import keyed_generator
from ot_diffusers.training import (
    Schedule,
    diffusion_batches,
    draw_noise,
    image_batches,
    index_batches,
    load_split,
    make_accelerator,
    make_noise_scheduler,
    make_schedule,
    make_unet,
    records,
)
from ot_diffusers.training import coupling as coupling_module
from ot_diffusers.training.coupling import assigned_noise
from ot_diffusers.transport import median_distance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OT_DIFFUSERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    return train("features", tmp_path_factory.mktemp("features") / "run", max_train_steps=20)


@pytest.fixture(scope="module")
def needed(features: Path) -> dict[str, dict[str, Any]]:
    """The runs that each script builds on."""
    return {"baseline": {}, "ot": {"feature_extractor": str(features)}}


# --- The scripts through accelerate launch, and one problem over all processes ---------------------------------------


def first_moments(run: Path, update: int) -> Tensor:
    """Adam's first moments after an update: after the first, (1 − β1) times the clipped gradient."""
    moments = load_file(run / "checkpoints" / f"update-{update:08d}" / "optimizer.safetensors")
    return torch.cat([moments[name].flatten() for name in sorted(moments) if name.endswith("exp_avg")])


@pytest.mark.parametrize("script", ["baseline", "ot"])
def test_two_processes_compute_what_one_computes(
    script: str, needed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Gradients are compared rather than weights, as Adam's first steps are ±learning rate whatever a gradient's size.

    The two runs add the same numbers in another order. That leaves about 1e-6 of the gradient's norm; the transport
    problem is iterated, which leaves up to a few times as much. A loss per process instead of one over all would
    differ by tenths.
    """
    values: dict[str, Any] = needed[script] | {"max_train_steps": 2, "checkpointing_steps": 1}
    if script == "ot":
        values["ot_weight"] = 3.0  # as strong as the denoising term
    if script == "baseline":
        two = launch(script, tmp_path / "two", "two_cpu_processes", **values, train_batch_size=8)
    else:
        two = train_forked(script, tmp_path / "two", 2, **values, train_batch_size=8)
    one = train(script, tmp_path / "one", **values, train_batch_size=16)
    assert json.loads((two / "run.json").read_text())["num_processes"] == 2
    gradient, expected = first_moments(two, 1), first_moments(one, 1)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    # The records are means over processes.
    for name in ("loss", "mse", "validation_loss"):
        assert metrics(two)[0][name] == pytest.approx(metrics(one)[0][name], rel=1e-4)

    # What the launched run has left opens by the classes that people use.
    generator = torch.Generator().manual_seed(0)
    if script != "ot":
        image = DDIMPipeline.from_pretrained(two)(generator=generator, num_inference_steps=2, output_type="np").images
    else:
        pipeline = OTGuidedDDIMPipeline.from_pretrained(two)
        assert pipeline.reference_bank.config.num_samples == 50
        image = pipeline(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
    assert image.shape[1:] == (8, 8, 1)
    assert np.isfinite(image).all()
    assert results(two)["complete"]
    assert results(two)["updates"] == 2
    assert results(two)["last_epoch"] == metrics(two)[-1]


def process(index: int, count: int) -> Any:
    """What the data order reads of an accelerator."""
    return SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))


def test_processes_and_micro_batches_share_out_one_global_batch() -> None:
    images = ResidentImages("noise", "train", None, torch.zeros(50, 1, 8, 8, dtype=torch.uint8))
    config = BaselineConfig(train_batch_size=3, gradient_accumulation_steps=2)
    schedule = Schedule(global_batch_size=12, forward_batch_size=6, updates_per_epoch=4, num_updates=9)
    seen = [list(index_batches(images, config, schedule, process(index, 2), start=0)) for index in range(2)]
    for update in range(schedule.num_updates):
        batches = [batch for batches in seen for batch in batches if batch[0] == update]
        everything = batches[0][1]
        rows = torch.cat([indices[part] for _, indices, part in batches])
        assert len(everything) == len(everything.unique()) == 12
        assert torch.equal(rows.sort().values, everything.sort().values)
        # References of the update, which every process draws from the same key, are nobody's images.
        generator = keyed_generator(torch.device("cpu"), 0, "references", update)
        references = disjoint_reference_indices(50, everything, 20, generator)
        assert not set(references.tolist()) & set(rows.tolist())
        assert len(references.unique()) == 20


def test_every_forward_pass_has_its_own_dropout() -> None:
    images = ResidentImages("noise", "train", None, torch.zeros(50, 1, 8, 8, dtype=torch.uint8))
    config = BaselineConfig(train_batch_size=3, gradient_accumulation_steps=2)
    schedule = Schedule(global_batch_size=12, forward_batch_size=6, updates_per_epoch=4, num_updates=5)
    seeds = [
        torch.initial_seed()
        for index in range(2)
        for _ in diffusion_batches(images, DDPMScheduler(), config, schedule, process(index, 2))
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 5


# --- What may not change the result -----------------------------------------------------------------------------------


def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    """Four forward passes of 8 and one of 32 average the same gradients in another order: float32 rounding, about 1e-6
    of the norm, and 1e-4 is far below what one exchanged image would change."""
    values: dict[str, Any] = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
    many = train("baseline", tmp_path / "many", **values, train_batch_size=8, gradient_accumulation_steps=4)
    one = train("baseline", tmp_path / "one", **values, train_batch_size=32)
    gradient, expected = first_moments(many, 1), first_moments(one, 1)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    # Later weights agree to a fraction of what three updates of 1e-3 can move them: gradients near 0 decide by their
    # sign, and that may be rounding.
    ends = [load_file(last_checkpoint(run) / "model.safetensors") for run in (many, one)]
    moved = torch.cat([(ends[0][name] - ends[1][name]).flatten().abs() for name in ends[0]])
    assert moved.mean() < 1e-5
    assert metrics(many)[-1]["loss"] == pytest.approx(metrics(one)[-1]["loss"], rel=1e-4)


def test_accumulation_averages_several_transport_problems(features: Path, tmp_path: Path) -> None:
    """The term of an update is the mean over its forward passes, each a problem of its own against the same references;
    to the rounding of float32."""
    values: dict[str, Any] = {"feature_extractor": str(features), "ot_weight": 1.0, "max_train_steps": 1}
    run = train("ot", tmp_path / "many", **values, train_batch_size=8, gradient_accumulation_steps=3)
    one = train("ot", tmp_path / "one", **values, train_batch_size=24)
    config = make_config(OTConfig, TINY["ot"] | values | {"train_batch_size": 8, "gradient_accumulation_steps": 3})
    accelerator = make_accelerator(config)  # seeds the initial weights
    images = load_split(config, "train", accelerator)
    network, scheduler = load_feature_extractor(str(features)), make_noise_scheduler(config)
    unet = make_unet(config, images.image_shape)
    known = cached_features(network, images)
    schedule = make_schedule(config, accelerator, images)
    batches = list(itertools.islice(diffusion_batches(images, scheduler, config, schedule, accelerator), 3))
    ot_term = script_of("ot").ot_term
    with torch.no_grad():
        terms = [
            ot_term(
                unet(batch.noisy, batch.timesteps).sample,
                batch,
                scheduler,
                network,
                known,
                median_distance(known),
                config,
                accelerator,
            )
            for batch in batches
        ]
    assert metrics(run)[0]["ot"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    # Smaller problems are further from the references. The denoising loss does not know the difference.
    assert metrics(run)[0]["ot"] > 1.01 * metrics(one)[0]["ot"]
    assert metrics(run)[0]["mse"] == pytest.approx(metrics(one)[0]["mse"], rel=1e-5)


def test_zero_weight_trains_the_baseline_bit_for_bit(features: Path, tmp_path: Path) -> None:
    baseline = train("baseline", tmp_path / "baseline", max_train_steps=4, dropout=0.1)
    zero = train("ot", tmp_path / "zero", max_train_steps=4, dropout=0.1, ot_weight=0, feature_extractor=str(features))
    assert_same_end(zero, baseline)
    some = train("ot", tmp_path / "some", max_train_steps=4, dropout=0.1, feature_extractor=str(features))
    with pytest.raises(AssertionError):
        assert_same_end(some, baseline)


@pytest.mark.parametrize(
    ("script", "values"),
    [
        ("baseline", {"dropout": 0.2, "gradient_accumulation_steps": 2, "lr_scheduler": "constant_with_warmup"}),
        ("ot", {}),
    ],
)
def test_interrupted_run_ends_like_the_uninterrupted(
    script: str, values: dict[str, Any], needed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    values = values | needed[script]
    whole = train(script, tmp_path / "whole", **values, max_train_steps=5)
    parts = train(script, tmp_path / "parts", **values, max_train_steps=2)
    assert results(parts)["updates"] == 2
    train(script, parts, **values, max_train_steps=5)
    assert_same_end(parts, whole)
    assert metrics(parts)[-1]["validation_loss"] == metrics(whole)[-1]["validation_loss"]


def test_run_that_is_out_of_time_stops_cleanly_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has time for one update; the learning rate falls along a cosine over all four."""
    values: dict[str, Any] = {"max_train_steps": 4, "lr_scheduler": "cosine", "dropout": 0.1}
    whole = train("baseline", tmp_path / "whole", **values)
    parts = tmp_path / "parts"
    for updates in (1, 2, 3):
        # As the command: exit status 0 is that no SystemExit comes.
        arguments = TINY["baseline"] | values | {"output_dir": str(parts), "max_train_seconds": 1e-9}
        monkeypatch.setattr("sys.argv", ["train_baseline.py", *(f"{key}={value}" for key, value in arguments.items())])
        reset_accelerate()
        run_script(main_of("baseline"), BaselineConfig, "")
        assert (results(parts)["updates"], results(parts)["complete"]) == (updates, False)
        assert last_checkpoint(parts).name == f"update-{updates:08d}"
        DDIMPipeline.from_pretrained(parts)
    train("baseline", parts, **values)
    assert results(parts)["complete"]
    assert_same_end(parts, whole)


def test_killed_run_goes_on_from_the_last_complete_checkpoint(tmp_path: Path) -> None:
    """What a kill can leave: no results, no pipeline, records beyond the checkpoint, half a checkpoint."""
    values: dict[str, Any] = {"train_batch_size": 384, "checkpointing_steps": 2}  # 3 updates are an epoch
    whole = train("baseline", tmp_path / "whole", **values, max_train_steps=7)
    parts = train("baseline", tmp_path / "parts", **values, max_train_steps=6)
    for name in ("results.json", "model_index.json"):
        (parts / name).unlink()
    shutil.rmtree(parts / "unet")
    shutil.rmtree(last_checkpoint(parts))
    half = parts / "checkpoints" / ".update-00000006.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(parts).name == "update-00000004"
    train("baseline", parts, **values, max_train_steps=7)
    assert_same_end(parts, whole)
    assert [(line["epoch"], line["step"]) for line in metrics(parts)] == [(1, 3), (2, 6), (2, 7)]
    assert [line["validation_loss"] for line in metrics(parts)] == [line["validation_loss"] for line in metrics(whole)]


def test_finished_run_started_again_stays_as_it_is(tmp_path: Path) -> None:
    run = train("baseline", tmp_path / "run", max_train_steps=3)
    records, weights = metrics(run), load_file(last_checkpoint(run) / "model.safetensors")
    train("baseline", run, max_train_steps=3)
    assert metrics(run) == records
    again = load_file(last_checkpoint(run) / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert results(run)["complete"]


def test_rotation_and_a_second_continuation(tmp_path: Path) -> None:
    run = train("baseline", tmp_path / "run", max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=3)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["update-00000003", "update-00000004", "update-00000005"]
    # From an earlier checkpoint, what came after it is done again.
    checkpoint = str(run / "checkpoints" / "update-00000003")
    train("baseline", run, max_train_steps=4, checkpoints_total_limit=3, resume_from_checkpoint=checkpoint)
    names = sorted(path.name for path in (run / "checkpoints").glob("update-*"))
    assert names == ["update-00000003", "update-00000004"]
    assert [line["step"] for line in metrics(run)] == [4]


def test_run_goes_on_where_the_device_has_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it has for each of several processes on the CPU."""
    run = train("baseline", tmp_path / "run", max_train_steps=1)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu:0")
    train("baseline", run, max_train_steps=2)
    assert results(run)["complete"] and results(run)["updates"] == 2


def test_records_do_not_depend_on_how_often_they_are_taken(tmp_path: Path) -> None:
    """An epoch's loss is the mean over its updates: to the rounding of float32 sums."""
    values: dict[str, Any] = {"train_batch_size": 230, "max_train_steps": 10}  # 5 updates are an epoch
    often = metrics(train("baseline", tmp_path / "often", **values, logging_steps=1))
    seldom = metrics(train("baseline", tmp_path / "seldom", **values, logging_steps=3))
    assert [line["step"] for line in often] == [5, 10]
    for line, other in zip(often, seldom, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_record_of_an_ot_run_adds_up(features: Path, tmp_path: Path) -> None:
    (line,) = metrics(train("ot", tmp_path / "run", max_train_steps=3, feature_extractor=str(features)))
    assert line["ot"] > 0
    assert line["loss"] == pytest.approx(line["mse"] + line["ot"], rel=1e-6)  # float32 sums


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "below"),
    [
        ("uniform", lambda count, length: count / length),
        ("quadratic", lambda count, length: (count / length) ** 0.5),
        ("log_uniform", lambda count, length: count.log() / math.log(length)),
        ("logit_normal", lambda count, length: torch.special.ndtr((count / length).logit())),
    ],
)
def test_timesteps_are_distributed_as_named(sampler: str, below: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """P(t < n) for every n. The largest deviation of 100,000 draws exceeds 1.95/√N once in a thousand seeds, plus a
    timestep's own share of the chain."""
    count, length = 100_000, 1000
    config = BaselineConfig(timestep_sampler=sampler)
    noise, timesteps = draw_noise(count, torch.Size([1]), config, torch.Generator().manual_seed(0))
    edges = torch.arange(1, length + 1)
    reached = torch.searchsorted(timesteps.sort().values, edges) / count
    expected = below(edges.float(), length)
    assert (reached - expected).abs().max() < 1.95 / count**0.5 + 1e-4
    # Flow matching takes the same draws without rounding.
    _, times = draw_noise(
        count,
        torch.Size([1]),
        BaselineConfig(timestep_sampler=sampler, prediction_type="flow_prediction"),
        torch.Generator().manual_seed(0),
    )
    assert times.is_floating_point() and ((times - timesteps).abs() <= 1).all()
    # ε is standard normal: mean and variance within 4 standard errors, √(1/N) and √(2/N).
    assert abs(noise.mean().item()) < 4 / count**0.5
    assert abs(noise.var().item() - 1) < 4 * (2 / count) ** 0.5


def test_denoisers_see_flipped_images_as_well() -> None:
    images = load_images("digits", "train")
    config = BaselineConfig(train_batch_size=64, random_flip=True)
    accelerator = make_accelerator(config)
    schedule = make_schedule(config, accelerator, images)
    ((_, indices, part, batch), *_) = itertools.islice(image_batches(images, config, schedule, accelerator, 0), 1)
    plain = images.fetch(indices[part])
    same, mirrored = ((batch == other).flatten(1).all(1) for other in (plain, plain.flip(3)))
    assert bool((same | mirrored).all())
    assert 16 < int(mirrored.sum()) < 48  # four standard errors of a fair coin


def test_max_timestep_ends_the_chain_early() -> None:
    config = BaselineConfig(max_timestep=10, timestep_sampler="quadratic")
    _, timesteps = draw_noise(10_000, torch.Size([1]), config, torch.Generator().manual_seed(0))
    assert timesteps.unique().tolist() == list(range(10))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow_prediction"])
def test_other_predictions_train_and_are_remembered(prediction_type: str, features: Path, tmp_path: Path) -> None:
    run = train(
        "ot",
        tmp_path / "run",
        prediction_type=prediction_type,
        timestep_sampler="quadratic",
        mixed_precision="bf16",
        max_train_steps=1,
        feature_extractor=str(features),
    )
    pipeline = OTGuidedDDIMPipeline.from_pretrained(run)
    assert prediction_type_of(pipeline.scheduler) == prediction_type
    kind = FlowMatchPipeline if prediction_type == "flow_prediction" else OTGuidedDDIMPipeline
    assert type(load_pipeline(run)) is kind
    assert pipeline.unet.dtype == torch.float32
    assert np.isfinite(metrics(run)[0]["loss"])


def test_assignment_is_the_optimal_one() -> None:
    clean, noise = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    distances = (clean[:, None] - noise[None]).square().flatten(2).sum(2)
    best = min(itertools.permutations(range(5)), key=lambda order: distances[range(5), order].sum().item())
    assert torch.equal(assigned_noise(clean, noise), noise[list(best)])


def test_large_assignments_are_drawn_from_a_plan_that_is_nearly_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.rand(300, 1, 8, 8, generator=generator) * 2 - 1, torch.randn(300, 1, 8, 8, generator=generator)
    exact = (assigned_noise(clean, noise) * clean).sum()
    monkeypatch.setattr(coupling_module, "LARGEST_ASSIGNMENT", 100)
    drawn = assigned_noise(clean, noise, generator)
    assert (drawn * clean).sum() > 0.95 * exact
    known = {tuple(row) for row in noise.flatten(1).tolist()}
    assert all(tuple(row) in known for row in drawn.flatten(1).tolist())
    assert drawn.std().item() == pytest.approx(1, abs=0.03)  # 19,200 values, of which some are there twice


@pytest.mark.parametrize("pool", [32, 64, 70])
def test_assignment_brings_noise_closer_and_leaves_images_and_timesteps(pool: int) -> None:
    """A pool of 64 or 70 images is two updates of 32, which exchange their noise; so are the two processes of each."""
    pixels = torch.randint(0, 256, (64, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ResidentImages("noise", "train", None, pixels)
    schedule = Schedule(32, 32, updates_per_epoch=2, num_updates=4)

    def batches(coupling: str, start: int = 0, rank: int = 0, ranks: int = 1) -> list[Any]:
        config = BaselineConfig(noise_coupling=coupling, coupling_batch_size=pool, train_batch_size=32 // ranks)
        return list(diffusion_batches(images, DDPMScheduler(), config, schedule, process(rank, ranks), start))

    assigned, plain = batches("assignment"), batches("independent")
    for batch, other in zip(assigned, plain, strict=True):
        assert torch.equal(batch.indices, other.indices) and torch.equal(batch.timesteps, other.timesteps)
        clean = images.fetch(batch.indices)
        near, far = (torch.nn.functional.mse_loss(each.target, clean) for each in (batch, other))
        assert near < 0.95 * far
    updates = 1 if pool == 32 else 2
    for first in range(0, 4, updates):  # the same noise, in another order
        sorted_noise = (
            torch.cat([batch.target for batch in run[first : first + updates]]).flatten(1).sort(dim=0).values
            for run in (assigned, plain)
        )
        assert torch.equal(*sorted_noise)
    halves = [batches("assignment", rank=rank, ranks=2) for rank in range(2)]
    for batch, *parts in zip(assigned, *halves, strict=True):
        assert torch.equal(batch.noisy, torch.cat([part.noisy for part in parts]))
    assert torch.equal(assigned[3].noisy, batches("assignment", start=3)[0].noisy)
    assert not BaselineConfig(noise_coupling="assignment").compares_distributions


def coupled_case(random_flip: bool = False) -> tuple[ResidentImages, SemidiscreteCoupling]:
    pixels = torch.randint(0, 256, (64, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ResidentImages("noise", "train", None, pixels)
    return images, SemidiscreteCoupling.from_images(pixels, flips=random_flip, tolerance=0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("random_flip", [False, True])
def test_a_semidiscrete_coupling_pairs_free_noise_with_its_images(random_flip: bool, prediction_type: str) -> None:
    """The noise is that of an uncoupled run, and the images are those that it is assigned to, whatever the split of an
    update over processes and forward passes, and wherever the run resumes."""
    images, coupling = coupled_case(random_flip)
    options = {"random_flip": random_flip, "train_batch_size": 32, "prediction_type": prediction_type}
    config = BaselineConfig(noise_coupling="semidiscrete", **options)
    scheduler = make_noise_scheduler(config)

    def batches(forward: int, start: int = 0, rank: int = 0, ranks: int = 1) -> list[Any]:
        schedule = Schedule(32, forward, updates_per_epoch=2, num_updates=4)
        own = dataclasses.replace(config, train_batch_size=forward // ranks)
        return list(diffusion_batches(images, scheduler, own, schedule, process(rank, ranks), start, coupling))

    whole = batches(32)
    for batch in whole:
        generator = keyed_generator("cpu", 0, "noise", batch.update)
        noise, timesteps = draw_noise(32, images.pixels.shape[1:], config, generator)
        points = coupling.assign(noise)
        clean = coupling.pick(images.fetch(torch.arange(64)), points)
        assert torch.equal(batch.timesteps, timesteps)
        assert torch.equal(batch.indices, points % 64)
        if prediction_type == "flow_prediction":
            time = timesteps[:, None, None, None] / 1000
            assert torch.equal(batch.target, noise - clean)
            assert torch.equal(batch.noisy, (1 - time) * clean + time * noise)
        else:
            assert torch.equal(batch.target, noise)
            assert torch.equal(batch.noisy, scheduler.add_noise(clean, noise, timesteps))
    for others in (batches(8), batches(16)):
        for name in ("noisy", "target", "timesteps", "indices"):
            assert torch.equal(*(torch.cat([getattr(one, name) for one in run]) for run in (whole, others))), name
    halves = [batches(32, rank=rank, ranks=2) for rank in range(2)]
    for one, *two in zip(whole, *halves, strict=True):
        assert torch.equal(one.noisy, torch.cat([half.noisy for half in two]))
    for before, after in zip(whole[2:], batches(32, start=2), strict=True):
        assert torch.equal(before.noisy, after.noisy)


def test_a_coupled_run_keeps_its_coupling_and_resumes(tmp_path: Path) -> None:
    options = {"noise_coupling": "semidiscrete", "prediction_type": "v_prediction", "coupling_tolerance": 0.1}
    run = train("baseline", tmp_path / "run", max_train_steps=4, **options)
    stopped = train("baseline", tmp_path / "stopped", max_train_steps=2, **options)
    train("baseline", stopped, max_train_steps=4, **options)
    assert_same_end(run, stopped)
    coupling = SemidiscreteCoupling.from_pretrained(run / "coupling")
    assert coupling.config.dataset == "digits"
    assert coupling.config.chi_squared <= 0.1
    again = train("baseline", tmp_path / "again", max_train_steps=4, coupling=str(run), **options)
    assert torch.equal(first_moments(again, 4), first_moments(run, 4))
    pipeline = DDIMPipeline.from_pretrained(run)
    with pytest.raises(InputError, match=r"`scheduler` must not be truncated: .* noise_coupling=semidiscrete"):
        truncated_scheduler(pipeline.scheduler, 10)


def test_couplings_that_cannot_be_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`noise_coupling` must be independent or assignment for 1,000,000,000"):
        coupling_module.check_memory(10**9, (3, 64, 64), flips=True)
    coupling_module.check_memory(1000, (1, 8, 8), flips=False)
    options = {"noise_coupling": "semidiscrete", "max_train_steps": 1}
    run = train("baseline", tmp_path / "run", **options, coupling_tolerance=0.5)
    for changed, message in (
        ({"random_flip": True}, "`coupling` must be one with flips for random_flip=True"),
        ({"image_size": 16}, r"`images` must have the shape \(1152, 1, 8, 8\)"),
    ):
        with pytest.raises(InputError, match=message):
            train("baseline", tmp_path / "other", **options, coupling=str(run), **changed)


@pytest.mark.usefixtures("bf16_units")
def test_bf16_changes_rounding_only(tmp_path: Path) -> None:
    """8 bits of mantissa are 4e-3 of each activation; the mean over a batch stays within a percent."""
    half = train("baseline", tmp_path / "half", max_train_steps=1, mixed_precision="bf16")
    full = train("baseline", tmp_path / "full", max_train_steps=1)
    assert metrics(half)[0]["loss"] != metrics(full)[0]["loss"]
    assert metrics(half)[0]["loss"] == pytest.approx(metrics(full)[0]["loss"], rel=1e-2)


def test_the_sources_recipe_trains(features: Path, tmp_path: Path) -> None:
    source = {"squash": "tanh", "normalize_features": False, "snr_weighting": False, "ot_backend": "geomloss"}
    run = train("ot", tmp_path / "run", max_train_steps=2, feature_extractor=str(features), blur=0.2, **source)
    assert metrics(run)[0]["ot"] > 0


def test_steps_of_the_solver_set_in_advance_train_alike(features: Path, tmp_path: Path) -> None:
    """At this blur 20 steps are as good as convergence, so that two updates differ by rounding."""
    options = {"max_train_steps": 2, "feature_extractor": str(features)}
    fixed = train("ot", tmp_path / "fixed", ot_iterations=20, **options)
    converged = train("ot", tmp_path / "converged", **options)
    assert metrics(fixed)[0]["ot"] == pytest.approx(metrics(converged)[0]["ot"], rel=1e-3)


def test_a_backend_that_is_not_there_is_refused_before_anything_is_read(features: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`ot_backend` must be native or geomloss for points that are on cpu"):
        train("ot", tmp_path / "run", feature_extractor=str(features), ot_backend="flash-sinkhorn")


@pytest.mark.parametrize("script", ["features", "baseline", "ot"])
def test_what_a_run_prints_into_a_file(
    script: str,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lines without carriage returns, each loss once, and at the end commands that work as they are printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "SECONDS_BETWEEN_LINES", 0.0)
    more = {"feature_extractor": str(features)} if script == "ot" else {}
    train(script, "a run", max_train_steps=3, **more)
    printed, progress = capsys.readouterr()
    assert "\r" not in printed + progress
    first, training, *_ = printed.splitlines()
    assert (first, training) == ("loading digits", "training: 3 steps of 8 images")
    steps = [line for line in progress.splitlines() if line.startswith("training step ")]
    assert [line.split(",")[0] for line in steps] == [f"training step {step} of 3" for step in (1, 2, 3, 3)]
    assert ("mse" in steps[-1]) == (script == "ot") and "; loss " in steps[-1]
    assert "\neverything is saved in a run\n" in printed
    commands = [shlex.split(line) for line in printed.partition("\nnext:\n")[2].splitlines()]
    assert len(commands) == (1 if script == "features" else 3)
    for _, name, *words in commands:
        if name == "sample":
            assert command(name, *words) == 0 and len(list((tmp_path / "a run-images").glob("0*.png"))) == 64
        elif name == "train":
            parsed, overrides = cli.make_parser().parse_known_args([name, *words])
            training_command(parsed.script, overrides, config=parsed.config)
        else:
            words[words.index("--evaluator") + 1] = str(features)  # in place of the one that is trained before
            assert command(name, *words, "--num-samples", 20, "--num-inference-steps", 2) == 0


def test_sample_grids_and_tensorboard(tmp_path: Path) -> None:
    values = {"train_batch_size": 576, "max_train_steps": 4, "sample_epochs": 1, "report_to": "tensorboard"}
    names = {"tracker_project_name": "my digits", "run_name": "first"}
    run = train("baseline", tmp_path / "run", **values, **names, logging_steps=1)
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["update-00000002.png", "update-00000004.png"]
    events = EventAccumulator(str(run / "logs" / "my digits" / "first")).Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("epoch/loss")[-1].value == pytest.approx(metrics(run)[-1]["loss"])
    for image in events.Images("samples"):
        with PIL.Image.open(run / "samples" / f"update-{image.step:08d}.png") as grid:
            assert grid.size == (6 * 8, 6 * 8)
            assert PIL.Image.open(io.BytesIO(image.encoded_image_string)).tobytes() == grid.tobytes()
    assert [image.step for image in events.Images("samples")] == [2, 4]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image_size": 10, "block_out_channels": [8, 8, 8]}, "`image_size` must be a multiple of 4 for a UNet of 3"),
        ({"train_batch_size": 2000}, "`train_batch_size` must give a global batch of at most 1152 images, got 2000"),
        ({"run_name": "../first"}, "`run_name` must be a name, not a path, got '../first'"),
        ({"report_to": "notes"}, "`report_to` must be auto, none or an installed tracker"),
        ({"dataset": "./absent"}, "`dataset` must be digits, mnist, cifar10, an existing folder or a Hub id"),
        ({"image_column": "img"}, "`image_column` must be one of the columns image, label, got 'img'"),
        (
            {"resume_from_checkpoint": "absent"},
            "`resume_from_checkpoint` must be latest, none or a checkpoint's folder",
        ),
    ],
)
def test_refusal_leaves_nothing(values: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        train("baseline", tmp_path / "run", **values)
    assert str(refusal.value).startswith(expected)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_ot_refuses_a_batch_that_leaves_no_references(features: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`train_batch_size` must leave references in a data set of 1152, got 1152"):
        train("ot", tmp_path / "run", train_batch_size=1152, feature_extractor=str(features))
    assert not list(tmp_path.iterdir())


def test_unet_of_the_configuration() -> None:
    config = BaselineConfig(block_out_channels=(32, 32, 64), attention_levels=(1,), layers_per_block=1)
    unet = make_unet(config, (3, 8, 8))
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    assert unet.config.up_block_types == ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert unet(torch.zeros(2, 3, 8, 8), 0).sample.shape == (2, 3, 8, 8)


# --- The output folder ------------------------------------------------------------------------------------------------


def test_folder_of_another_run_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("baseline", tmp_path / "run", max_train_steps=1)
    before = snapshot(run)
    capsys.readouterr()
    for values, expected in [
        ({"learning_rate": 5e-3}, "which holds a run with learning_rate=0.001 instead of 0.005"),
        ({"block_out_channels": "8,8"}, "which holds a run with block_out_channels=[8, 16] instead of [8, 8]"),
        ({"resume_from_checkpoint": "none"}, "must be empty with resume_from_checkpoint=none"),
    ]:
        arguments = TINY["baseline"] | {"output_dir": str(run), "max_train_steps": 1} | values
        monkeypatch.setattr("sys.argv", ["train_baseline.py", *(f"{key}={value}" for key, value in arguments.items())])
        with pytest.raises(SystemExit) as leaving:
            run_script(main_of("baseline"), BaselineConfig, "")
        assert leaving.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: `output_dir` must be empty")
        assert expected in message
        assert message.count("\n") == 1
    with pytest.raises(InputError, match="which holds a run with architecture=None instead of 'conv'"):
        train("features", run)
    assert snapshot(run) == before


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="`output_dir` must be empty or hold a run of this script"):
        train("baseline", tmp_path)
    with pytest.raises(InputError, match="`output_dir` must be a folder"):
        train("baseline", tmp_path / "thesis.txt")
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    train("baseline", tmp_path / "empty", max_train_steps=1)


# --- Other data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some digits, once as parquet files in a Hub layout and once as an image folder."""
    import datasets

    root = tmp_path_factory.mktemp("data")
    (root / "parquet" / "data").mkdir(parents=True)
    for split, count in {"train": 40, "validation": 8, "test": 8}.items():
        images = load_images("digits", split)
        assert isinstance(images, ResidentImages)
        pictures = [PIL.Image.fromarray(pixels[0].numpy()) for pixels in images.pixels[:count]]
        table = datasets.Dataset.from_dict({"img": pictures}, features=datasets.Features({"img": datasets.Image()}))
        table.to_parquet(root / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
        (root / "pictures" / split).mkdir(parents=True)
        for index, picture in enumerate(pictures):
            picture.save(root / "pictures" / split / f"{index:03d}.png")
    return {"parquet": root / "parquet", "pictures": root / "pictures"}


def test_the_same_pictures_train_the_same_model(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = [
        train("baseline", tmp_path / name, dataset=str(folder), num_train_epochs=1) for name, folder in folders.items()
    ]
    assert_same_end(*runs)
    assert results(runs[0])["updates"] == 5


def test_features_of_other_data_are_refused(features: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"be trained on the training split of .*got \"a network of 'digits'\""):
        train("ot", tmp_path / "run", dataset=str(folders["parquet"]), feature_extractor=str(features))
    with pytest.raises(InputError, match=r"take images of shape \(1, 12, 12\), got \(1, 8, 8\)"):
        train("ot", tmp_path / "run", image_size=12, feature_extractor=str(features))
    with pytest.raises(InputError, match="`label_column` must name a column"):
        train("features", tmp_path / "run", dataset=str(folders["parquet"]))
    assert not list(tmp_path.iterdir())


def test_grey_pictures_as_rgb(folders: dict[str, Path], tmp_path: Path) -> None:
    run = train("baseline", tmp_path / "run", dataset=str(folders["pictures"]), channels=3, max_train_steps=1)
    assert DDIMPipeline.from_pretrained(run).unet.config.in_channels == 3


def test_every_script_on_real_mnist(real_datasets: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"dataset": str(real_datasets / "mnist"), "max_train_steps": 3, "train_batch_size": 32}
    network = train("features", tmp_path / "features", **values)
    baseline = train("baseline", tmp_path / "baseline", **values)
    ot = train("ot", tmp_path / "ot", **values, feature_extractor=str(network), num_reference_samples=500)
    assert json.loads((baseline / "run.json").read_text())["data"]["num_samples"] == 55_000
    assert DDIMPipeline.from_pretrained(baseline).unet.config.sample_size == 28
    assert OTGuidedDDIMPipeline.from_pretrained(ot).reference_bank.config.num_samples == 500
    # The first updates of both start from the same weights, batch and noise.
    assert metrics(ot)[0]["mse"] == pytest.approx(metrics(baseline)[0]["mse"], rel=1e-2)
