"""One arm with one seed: trained, sampled, evaluated, and kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluation.evaluate import evaluate_images, real_floor
from ..experiment import EVALUATOR_SEED, Sampled, check_independent, read_json, run_side_by_side, sampled_once, stage
from ..features import load_feature_extractor
from ..launch import preset_path, training_command
from ..pipelines.pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from ..sampling import best_device, load_pipeline, network_calls, networks_in, sample_images
from ..seeds import keyed_generator
from ..training import write_json
from .config import Arm, twin
from .study import OutOfTime, Study


def train_networks(study: Study) -> None:
    """The feature network and the evaluator, once for all seeds, where the configuration names presets.

    Raises:
        InputError: one network for both.
    """
    config = study.config
    for name, seed in (("features", 0), ("evaluator", EVALUATOR_SEED)):
        preset = getattr(config, name)
        if preset is not None and preset_path(preset).is_file():
            train_run(study, study.output, name, "features", preset, [f"seed={seed}", *config.overrides])
    if config.features is not None:
        check_independent(study.extractor, load_feature_extractor(study.network("features")))


def run_seed(study: Study, seed: int) -> None:
    """Train, sample and evaluate every arm with one seed."""
    if (study.folder(seed) / "metrics.json").is_file():
        return
    for name, arm in study.config.arms.items():
        if arm.train is not None:
            train_arm(study, name, arm, seed)
    for name in study.config.arms:
        sampled(study, name, seed)
    study.clock.check()
    with stage(f"seed {seed}: evaluate", study.announce):
        write_json(study.folder(seed) / "metrics.json", evaluate_seed(study, seed))


def train_arm(study: Study, name: str, arm: Arm, seed: int) -> None:
    """The arm's run with this seed, unless it is complete."""
    overrides = [f"seed={seed}", *study.config.overrides, *(study.resolve(text, seed) for text in arm.overrides)]
    if arm.seconds_of is not None:
        overrides.append(f"max_train_steps={equal_time_updates(study, name, seed)}")
    assert arm.train is not None
    train_run(study, study.folder(seed), name, arm.train, arm.preset, overrides)


def equal_time_updates(study: Study, name: str, seed: int) -> int:
    """Updates that take the arm as long as `seconds_of` trained, at the pace of its twin."""
    same, other = twin(study.config, name), study.config.arms[name].seconds_of
    pace, wanted = (read_json(study.run(str(arm), seed) / "results.json") for arm in (same, other))
    return max(1, round(pace["updates"] * wanted["training_seconds"] / pace["training_seconds"]))


def train_run(study: Study, folder: Path, name: str, script: str, preset: str | None, overrides: Sequence[str]) -> None:
    """Train into `folder/name`, one run at a time so that seconds are comparable.

    Raises:
        OutOfTime: before the run was complete.
    """
    if is_trained(folder / name):
        return
    study.clock.check()
    own = [f"dataset={study.config.dataset}", f"output_dir={folder / name}", "report_to=none", *overrides]
    if study.clock.max_seconds is not None:
        own.append(f"max_train_seconds={study.clock.left}")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    title = f"train {name}" if folder == study.output else f"{folder.name.replace('-', ' ')}: train {name}"
    with stage(title, study.announce):
        run_side_by_side({name: training_command(script, own, config=preset)}, folder)
    if not is_trained(folder / name):
        raise OutOfTime


def is_trained(run: Path) -> bool:
    """Whether a run has made all its updates; one that `--max-seconds` stopped has not."""
    return (run / "results.json").is_file() and bool(read_json(run / "results.json")["complete"])


def sampled(study: Study, name: str, seed: int) -> Sampled:
    """The arm's images from the seed's starting noise, from disk if they are there."""

    def sample() -> Sampled:
        study.clock.check()
        with stage(f"seed {seed}: sample {name}", study.announce):
            return sample_arm(study, name, seed)

    return sampled_once(study.folder(seed) / f"{name}.safetensors", sample)


def sample_arm(study: Study, name: str, seed: int) -> Sampled:
    """Image i of every arm starts from the noise that (`seed`, i) gives."""
    arm = study.config.arms[name]
    source = study.resolve(arm.pipeline, seed) if arm.pipeline else str(study.run(name, seed))
    pipeline = load_pipeline(source, study.resolve(arm.features, seed) if arm.features else None).to(best_device())
    pipeline.set_progress_bar_config(disable=True)
    call = study.config.call | arm.call
    unguided = {"guidance_scale": 0} if isinstance(pipeline, OTGuidedDDIMPipeline) else {}
    sample_images(pipeline, 2, seed=seed, **call | unguided)  # first calls are slow
    others: dict[str, float] = {}
    if arm.field_samples is not None:
        started = time.monotonic()
        with networks_in(study.config.dtype, pipeline.device):
            pipeline.record_guidance_field(arm.field_samples, keyed_generator("cpu", seed, "guidance field"), **call)
        others["field_seconds"] = time.monotonic() - started
    started = time.monotonic()
    images = sample_images(
        pipeline, study.num_samples, batch_size=arm.batch_size, seed=seed, dtype=study.config.dtype, **call
    )
    seconds = time.monotonic() - started
    parts = [parameters_of(pipeline, part) for part in ("prior", "unet")]
    others["parameters"] = sum(parameter.numel() for part in parts for parameter in part)
    record = Path(source) / "results.json"
    if record.is_file():
        run = read_json(record)
        others |= {key: run[key] for key in ("training_seconds", "updates") if key in run}
    return Sampled(images, seconds, network_calls(pipeline), others)


def parameters_of(pipeline: Any, part: str) -> list[Tensor]:
    """The parameters of a part of the pipeline that makes images; none where it has no such part."""
    return list(getattr(pipeline, part).parameters()) if hasattr(pipeline, part) else []


def evaluate_seed(study: Study, seed: int) -> dict[str, Any]:
    """Metrics and cost of every arm, and the metrics of real images, with the same random subsets."""
    reference, real = study.test_images, study.train_images
    arms = {}
    for name in study.config.arms:
        found = sampled(study, name, seed)
        metrics = evaluate_images(found.images, reference=reference, extractor=study.extractor, train=real, seed=seed)
        arms[name] = {"metrics": metrics, "cost": found.cost}
    floor = real_floor(reference, real, study.num_samples, extractor=study.extractor, seed=seed)
    return {"arms": arms, "floor": floor}
