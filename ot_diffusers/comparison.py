"""Does one way to make images beat another? Arms over paired seeds, intervals of their differences, and their cost.

    ot-diffusers compare runs/baseline runs/ot --dataset digits --evaluator runs/evaluator --seeds 5
    ot-diffusers compare --config configs/digits/compare.yaml

For every seed, the arms that train see the same initial weights and the same order of the data, all arms are sampled
from the same starting noise, and one evaluator that no loss has seen scores them with the same random subsets. What is
compared is then the difference to the first arm, seed by seed. Real images in place of generated ones give the floor.
Everything finished is kept: the same command goes on where it stopped, and more seeds join those that are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import load_config, option
from .data import load_images, pixels_of
from .errors import require
from .evaluation import plots, report
from .evaluation.differences import MIN_SEEDS, Values, difference_rows, differences, interval_rows, summarise, summary
from .evaluation.evaluate import ImageSet, describe_images, evaluate_images, real_floor
from .evaluation.extractors import evaluator_facts, load_evaluator, load_real_images
from .evaluation.failures import worst_samples
from .evaluation.page import Rows, provenance
from .experiment import (
    EVALUATOR_SEED,
    Announce,
    Sampled,
    as_json,
    check_independent,
    claim_folder,
    read_json,
    run_side_by_side,
    sample_count,
    sampled_once,
    stage,
    write_results,
)
from .features import load_feature_extractor, weights_fingerprint
from .launch import SCRIPTS, preset_path, training_command
from .pipelines.guided import SMALL_BATCH
from .pipelines.pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from .sampling import (
    best_device,
    check_call_arguments,
    check_dtype,
    load_pipeline,
    network_calls,
    networks_in,
    sample_images,
)
from .seeds import keyed_generator
from .training import write_json

NETWORKS: dict[str, Callable[[str], Any]] = {"features": load_feature_extractor, "evaluator": load_evaluator}
RESERVED = (*NETWORKS, "seed", "logs")
NUM_FAILURES = 12


@dataclass
class Arm:
    """One way to make images: a pipeline that exists, or one that is trained anew for every seed.

    In `pipeline`, `features` and `overrides`, `{name}` stands for the run of an earlier arm with the same seed,
    `{features}` for the study's feature network, and `{seed}` for the seed.
    """

    pipeline: str | None = option(None, "folder or Hub id of a saved pipeline; none trains one")
    train: str | None = option(None, "script that trains it: baseline, ot or prior")
    preset: str | None = option(None, "the script's YAML file, or a preset such as digits/ot.yaml")
    overrides: tuple[str, ...] = option((), "key=value for the script")
    seconds_of: str | None = option(None, "train for as long as that arm: equal compute")
    features: str | None = option(None, "run of train_features.py that guides the pipeline")
    call: dict[str, Any] = field(default_factory=dict, metadata={"help": "arguments of the pipeline's call"})
    field_samples: int | None = option(None, "guide images one by one, by a field recorded on this many other samples")
    batch_size: int | None = option(None, "images at once, at most; none for all")
    description: str = option("", "a sentence for the report")

    def __post_init__(self) -> None:
        one = (self.pipeline is None) != (self.train is None)
        require(one, "arms", "have either a pipeline or a script to train", (self.pipeline, self.train))
        known = self.train is None or self.train in SCRIPTS
        require(known, "train", f"be one of {', '.join(SCRIPTS)}", self.train)
        enough = self.field_samples is None or self.field_samples >= SMALL_BATCH
        require(enough, "field_samples", f"be at least {SMALL_BATCH}", self.field_samples)
        guided = self.field_samples is None or self.features is not None
        require(guided, "field_samples", "come with the features that guide", self.field_samples)
        trained_only = self.train is not None or not (self.preset or self.overrides or self.seconds_of)
        require(trained_only, "arms", "have preset, overrides and seconds_of only with train", self.pipeline)
        timed = [text for text in self.overrides if text.startswith("max_train_seconds")]
        require(not timed, "overrides", "leave the time to seconds_of and --max-seconds", timed)


@dataclass
class ComparisonConfig:
    """A comparison of arms."""

    output_dir: str = option("runs/comparison", "folder of the comparison")
    dataset: str = option("digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or an image folder")
    evaluator: str = option(
        "digits/evaluator.yaml", "network no loss sees: of `ot-diffusers evaluate`, or a preset to train once"
    )
    features: str | None = option(None, "network for losses and guidance: a run, a Hub id, or a preset to train once")
    arms: dict[str, Arm] = field(default_factory=dict, metadata={"help": "name to arm, in the order of the work"})
    compare_with: str | None = option(None, "the arm that the others are compared with; none is the first")
    seeds: int = option(5, "how many: 0, 1, 2, …")
    num_samples: int | None = option(None, "images of each arm and seed; none is as many as there are test images")
    call: dict[str, Any] = field(default_factory=dict, metadata={"help": "arguments of every pipeline's call"})
    dtype: str = option("float32", "of the networks' products in sampling: float32, bfloat16 or float16")
    primary_metric: str = option("frechet_distance", "the metric that decides, fixed beforehand")
    metrics: tuple[str, ...] = option(report.HEADLINE, "the family of metrics whose differences are tested")
    overrides: tuple[str, ...] = option((), "key=value for every training script, such as max_train_steps=4")

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", "be at least 1", self.seeds)
        require(self.num_samples is None or self.num_samples >= 2, "num_samples", "be at least 2", self.num_samples)
        check_dtype(self.dtype)
        for name in (self.primary_metric, *self.metrics):
            require(name in report.METRICS, "metrics", f"be among {', '.join(report.METRICS)}", name)
        for name, arm in self.arms.items():
            plain = re.fullmatch(r"[\w][\w .+,=-]*", name) is not None and name not in RESERVED
            require(plain, "arms", "have names of letters, digits, spaces and -_.+,=", name)
            check_references(self, name, arm)
        known = self.compare_with is None or self.compare_with in self.arms
        require(known, "compare_with", f"be one of {', '.join(self.arms)}", self.compare_with)

    @property
    def reported(self) -> dict[str, Arm]:
        """The arms as the report lists them: first the one that the others are compared with."""
        return {name: self.arms[name] for name in sorted(self.arms, key=lambda name: name != self.compare_with)}

    @property
    def family(self) -> tuple[str, ...]:
        """The tested metrics, the primary one first."""
        return tuple(dict.fromkeys((self.primary_metric, *self.metrics)))


def check_references(config: ComparisonConfig, name: str, arm: Arm) -> None:
    """Refuse an arm that builds on what comes later or does not exist.

    Raises:
        InputError: naming the reference.
    """
    names = list(config.arms)
    earlier = [other for other in names[: names.index(name)] if config.arms[other].train is not None]
    known = [*earlier, "seed", *(["features"] if config.features else [])]
    for text in (arm.pipeline, arm.features, *arm.overrides):
        for reference in re.findall(r"{([^}]*)}", text or ""):
            require(reference in known, "arms", f"refer to trained arms before {name!r}, features or seed", reference)
    if arm.seconds_of is not None:
        require(arm.seconds_of in earlier, "seconds_of", f"name a trained arm before {name!r}", arm.seconds_of)
        require(twin(config, name) is not None, "seconds_of", f"have an earlier arm that trains as {name!r} does", None)


def twin(config: ComparisonConfig, name: str) -> str | None:
    """The earlier arm with the same script, preset and overrides, whose run tells how long an update takes."""
    arm = config.arms[name]
    names = list(config.arms)
    for other in names[: names.index(name)]:
        found = config.arms[other]
        if (found.train, found.preset, found.overrides) == (arm.train, arm.preset, arm.overrides):
            return other
    return None


def pipeline_arms(pipelines: Sequence[str]) -> dict[str, Arm]:
    """Arms for saved pipelines, named by their folders, or by their whole paths where two folders have one name."""
    names = [Path(path).name for path in pipelines]
    if len(set(names)) < len(names):
        names = [path.strip("./").replace("/", "-") for path in pipelines]
    require(len(set(names)) == len(names), "arms", "be different pipelines", list(pipelines))
    return {name: Arm(pipeline=path) for name, path in zip(names, pipelines, strict=True)}


def read_config(
    preset: str | None, overrides: Sequence[str], num_inference_steps: int | None = None
) -> ComparisonConfig:
    """The comparison of a YAML file or preset, with `key=value` overrides and the step count of every arm."""
    file = ["--config", str(preset_path(preset))] if preset else []
    config = load_config(ComparisonConfig, [*file, *overrides])
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    return dataclasses.replace(config, call=config.call | steps)


def choose_arms(config: ComparisonConfig, names: Sequence[str]) -> ComparisonConfig:
    """The named arms only, in that order; what is no name of an arm is the folder or Hub id of a pipeline."""
    others = pipeline_arms([name for name in names if name not in config.arms])
    known = {name: config.arms[name] for name in names if name in config.arms}
    chosen = known | others
    reference = config.compare_with if config.compare_with in chosen else None
    return dataclasses.replace(config, arms=chosen, compare_with=reference)


# --- The work ---------------------------------------------------------------------------------------------------------


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
    """

    config: ComparisonConfig
    output: Path
    clock: Clock
    announce: Announce

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
        return self.output / f"seed-{seed}"

    @cached_property
    def extractor(self) -> Any:
        return load_evaluator(self.network("evaluator")).to(best_device())

    @cached_property
    def train_images(self) -> ImageSet:
        return self.real_images("train")

    @cached_property
    def test_images(self) -> ImageSet:
        return self.real_images("test")

    def real_images(self, split: str) -> ImageSet:
        images = load_real_images(self.config.dataset, split, self.extractor)
        return describe_images(pixels_of(images), self.extractor, cache=True)

    @cached_property
    def num_samples(self) -> int:
        return sample_count(self.config.num_samples, len(self.train_images), len(self.test_images))


def run_comparison(
    config: ComparisonConfig, *, max_seconds: float | None = None, announce: Announce = print
) -> dict[str, Any]:
    """Run the comparison; write `results.json`, `results.md`, `report.html` and pictures for the seeds that are done.

    Args:
        config: the comparison; at least two arms.
        max_seconds: stop cleanly about then; the next call goes on.
        announce: takes the lines that tell how far it is.

    Returns:
        The contents of `results.json`, see `collect`; `"complete"` tells whether all seeds are done.

    Raises:
        InputError: a folder that holds another comparison, an arm that does not exist.
        RuntimeError: a training script that failed, with the end of its log.
    """
    require(len(config.arms) >= 2, "arms", "be at least two", list(config.arms))
    require(max_seconds is None or max_seconds > 0, "max_seconds", "be positive", max_seconds)
    check_arms(config)
    output = Path(config.output_dir)
    claim_folder(output / "comparison.json", settings(config), "output_dir")
    study = Study(config, output, Clock(max_seconds), announce)
    try:
        train_networks(study)
        for seed in range(config.seeds):
            run_seed(study, seed)
    except OutOfTime:
        announce(f"stopped after {study.clock.seconds:.0f} s (--max-seconds); the same command goes on")
    done = [seed for seed in range(config.seeds) if (study.folder(seed) / "metrics.json").is_file()]
    if not done:
        return {"complete": False, "seeds": []}
    with stage("write the report", announce):
        results = collect(study, done)
        write_results(results, output)
        (output / "results.md").write_text(markdown(results), encoding="utf-8")
        pictures = draw(study, results, done[0])
        report.write_report(results, pictures, output / "report.html", tables=tables(results))
    announce(f"\n{markdown(results)}\nPictures and numbers: {output / 'report.html'}")
    return results


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


def check_arms(config: ComparisonConfig) -> None:
    """Refuse what cannot be sampled, trained or compared with, before anything is written.

    Raises:
        InputError: naming the pipeline, the argument of its call, the key of its configuration, or the data set.
    """
    for arm in config.arms.values():
        if arm.pipeline is not None and "{" not in arm.pipeline + (arm.features or ""):
            check_call_arguments(load_pipeline(arm.pipeline, arm.features), config.call | arm.call)
        if arm.train is not None:
            training_command(arm.train, [*config.overrides, *arm.overrides], config=arm.preset)
    load_images(config.dataset, "test")


def content_hash(folder: Path) -> str | None:
    """SHA-256 over the weights and configurations in a folder; None for what is not one."""
    if not (folder / "model_index.json").is_file():
        return None
    digest = hashlib.sha256()
    components = sorted(file for file in folder.glob("*/*") if file.suffix in (".json", ".safetensors"))
    for file in (folder / "model_index.json", *components):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


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


# --- Results ----------------------------------------------------------------------------------------------------------


def collect(study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    """The contents of `results.json`: those of `evaluation.report`, with differences, costs and every seed's values."""
    config = study.config
    found = [read_json(study.folder(seed) / "metrics.json") for seed in seeds]
    values: Values = {name: by_metric([run["arms"][name]["metrics"] for run in found]) for name in config.reported}
    floor = by_metric([run["floor"] for run in found])
    costs = {name: by_metric([run["arms"][name]["cost"] for run in found]) for name in config.reported}
    arms = {
        name: summarise(values[name])
        | {key: mean_cost(costs[name][key]) for key in costs[name]}
        | {"description": describe_arm(arm)}
        for name, arm in config.reported.items()
    }
    paired = len(seeds) >= 2
    tested = [metric for metric in config.family if all(metric in found for found in values.values())]
    results = {
        "title": f"{' · '.join(config.reported)}: {config.dataset}",
        "dataset": config.dataset,
        "num_samples": study.num_samples,
        "num_test_images": len(study.test_images),
        "seeds": list(seeds),
        "complete": len(seeds) == config.seeds,
        "extractor": evaluator_facts(study.extractor, study.test_images.features.shape[1]),
        "primary_metric": config.primary_metric,
        "headline": tested,
        "costs": ["nfe", "seconds_per_1000"],
        "arms": arms,
        "floor": summarise(floor),
        "differences": differences(values, primary=config.primary_metric, family=tested) if paired else {},
        "notes": notes(config, len(seeds)),
        "per_seed": {name: dict(found) for name, found in values.items()} | {"real vs real": floor},
        "provenance": provenance() | {"comparison": settings(config)},
    }
    return results | ({"summary": summary(results)} if results["differences"] else {})


def by_metric(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name → one value per seed, for what every seed has."""
    return {name: [run[name] for run in runs] for name in runs[0] if all(name in run for run in runs)}


def mean_cost(values: Sequence[float]) -> float:
    """The mean; counts that are alike stay counts."""
    return values[0] if len(set(values)) == 1 else round(statistics.fmean(values), 3)


def describe_arm(arm: Arm) -> str:
    """The arm's own sentence, or what it is."""
    if arm.description:
        return arm.description
    what = f"trained by {SCRIPTS[arm.train][0]} for every seed" if arm.train else f"the pipeline {arm.pipeline}"
    settings = "".join(f", {name}={value}" for name, value in arm.call.items())
    return f"{what[0].upper()}{what[1:]}{settings}{f', guided by {arm.features}' if arm.features else ''}."


def notes(config: ComparisonConfig, num_seeds: int) -> list[str]:
    """What a reader must know to read the tables."""
    fixed = [name for name, arm in config.arms.items() if arm.pipeline is not None and "{" not in arm.pipeline]
    primary = report.METRICS[config.primary_metric].label
    found = [
        f"{primary} is the primary metric, fixed beforehand: it decides by its own 95% interval. The others show a "
        "difference where the interval leaves out 0 and Holm's correction over them agrees.",
        "All arms of a seed share the starting noise, the data order, the initial weights and the evaluation's random "
        "subsets.",
    ]
    if fixed:
        found.append(
            f"{', '.join(fixed)}: trained before, so the seeds vary the starting noise only. The intervals speak of "
            "these networks, not of how they were trained."
        )
    if num_seeds < MIN_SEEDS:
        found.append(f"Fewer than {MIN_SEEDS} seeds show no difference, whatever it is.")
    return found


def tables(results: Mapping[str, Any]) -> dict[str, Rows]:
    """Caption to table, for the report and the Markdown file."""
    tested = next(iter(results["differences"].values()), dict.fromkeys(report.HEADLINE))
    first = next(iter(results["arms"]))
    found = {f"{arm} against {first}": difference_rows(results, arm) for arm in results["differences"]}
    found[f"Mean ± 95% interval over {len(results['seeds'])} seeds"] = interval_rows(results, list(tested))
    costs = [key for key in report.COSTS if any(key in entry for entry in results["arms"].values())]
    rows = [[name, *(report.format_number(entry.get(key)) for key in costs)] for name, entry in results["arms"].items()]
    return found | {"Cost": [["", *(report.COSTS[key] for key in costs)], *rows]}


def markdown(results: Mapping[str, Any]) -> str:
    """The tables in Markdown, with extractor, dimension, N and seeds of the distances."""
    extractor = results["extractor"]
    lead = (
        f"{results['num_samples']} generated against {results['num_test_images']} test images of {results['dataset']}, "
        f"in the {extractor['feature_dim']} features of {extractor['name']}; seeds {results['seeds']}."
    )
    lead = f"{lead}\n\n**{results['summary']}**" if "summary" in results else lead
    parts = [f"## {caption}\n\n{report.markdown_rows(rows)}" for caption, rows in tables(results).items()]
    remarks = "\n".join(f"* {note}" for note in results["notes"])
    return "\n\n".join([f"# {results['title']}", lead, *parts, remarks]) + "\n"


# --- Pictures ---------------------------------------------------------------------------------------------------------


def draw(study: Study, results: Mapping[str, Any], seed: int) -> dict[str, Path]:
    """The report's pictures, caption to file; images are those of one seed."""
    folder, reference = study.output, study.test_images
    images = {name: sampled(study, name, seed).images for name in study.config.reported}
    described = {name: describe_images(found, study.extractor) for name, found in images.items()}
    clouds = {"real": reference.features} | {name: found.features for name, found in described.items()}
    count = min(NUM_FAILURES, study.num_samples)
    failures = {name: worst_samples(found, reference, count) for name, found in described.items()}
    primary = study.config.primary_metric
    pictures = {
        "Samples from the same noise": plots.image_panels({"real": reference.images} | images, folder / "samples.png"),
        f"{report.METRICS[primary].label}: mean and 95% interval": plots.bars(results, primary, folder / "bars.png"),
    }
    if results["differences"]:
        tested = {metric: report.METRICS[metric].label for metric in next(iter(results["differences"].values()))}
        caption = f"Paired differences to {next(iter(images))} with 95% intervals; hollow where none is shown"
        pictures[caption] = plots.differences(results, tested, folder / "differences.png")
    pictures["The evaluator's features in two directions, real images in grey"] = plots.scatter(
        clouds, folder / "features.png", basis="real"
    )
    pictures["Worst samples by distance to the nearest real image"] = plots.failure_gallery(
        failures, folder / "failures.png"
    )
    histories = {name: study.run(name, seed) / "metrics.jsonl" for name in images}
    found = {name: plots.read_history(file) for name, file in histories.items() if file.is_file()}
    if found:
        pictures["Losses"] = plots.loss_curves(found, folder / "loss_curves.png")
    return pictures
