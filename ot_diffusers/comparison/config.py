"""What is compared: the arms, and the YAML file or command line that names them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..config import Options, load_config, option
from ..data import DATA_OPTIONS
from ..errors import require
from ..evaluation import report
from ..evaluation.extractors import load_evaluator
from ..features import load_feature_extractor
from ..launch import SCRIPTS, preset_path
from ..outgoing import distinct_names
from ..pipelines.guided import SMALL_BATCH
from ..sampling import check_dtype

NETWORKS: dict[str, Callable[[str], Any]] = {"features": load_feature_extractor, "evaluator": load_evaluator}
RESERVED = (*NETWORKS, "seed", "logs")


@dataclass
class Arm(Options):
    """One way to make images: a pipeline that exists, or one that is trained anew for every seed.

    In `pipeline`, `features` and `overrides`, `{name}` stands for the run of an earlier arm with the same seed,
    `{features}` for the study's feature network, and `{seed}` for the seed.
    """

    pipeline: str | None = option(None, "folder or Hub id of a saved pipeline; none trains one")
    train: str | None = option(None, f"script that trains it: {', '.join(SCRIPTS)}")
    preset: str | None = option(None, "the script's YAML file, or a preset such as digits/ot.yaml")
    overrides: tuple[str, ...] = option((), "key=value for the script")
    seconds_of: str | None = option(None, "train for as long as that arm: equal compute")
    features: str | None = option(None, "run of train_features.py that guides the pipeline")
    call: dict[str, Any] = field(default_factory=dict, metadata={"help": "arguments of the pipeline's call"})
    field_samples: int | None = option(None, "guide images one by one, by a field recorded on this many other samples")
    batch_size: int | None = option(None, "images at once, at most; none for all")
    description: str = option("", "a sentence for the report")

    def __post_init__(self) -> None:
        super().__post_init__()
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
class ComparisonConfig(Options):
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
    overrides: tuple[str, ...] = option((), "key=value for every training script, such as image_size=32")

    def __post_init__(self) -> None:
        super().__post_init__()
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
    def data_options(self) -> dict[str, Any]:
        """The overrides that say how the data set is read, which hold for the real images as well."""
        given = (override.partition("=") for override in self.overrides)
        return {name: yaml.safe_load(value) for name, _, value in given if name in DATA_OPTIONS}

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
    """Arms for saved pipelines, named by their folders, and by those above where two have one name."""
    names = distinct_names(pipelines)
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
