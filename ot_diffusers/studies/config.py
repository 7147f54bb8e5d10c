"""Configuration of a study: the variants and the curves, from a YAML file or the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..config import Options, TrainingConfig, data_option, load_config, network_option, option_of
from ..data import DATA_OPTIONS
from ..errors import require
from ..evaluation.extractors import load_evaluator
from ..evaluation.metric_table import COSTS, HEADLINE, METRICS
from ..features import load_feature_extractor
from ..launch.commands import SCRIPTS, preset_path
from ..outgoing import distinct_names
from ..pipelines.guided import SMALL_BATCH
from ..sampling import check_dtype

NETWORKS: dict[str, Callable[[str], Any]] = {"features": load_feature_extractor, "evaluator": load_evaluator}
RESERVED = (*NETWORKS, "seed", "logs", "samples")
NOISE, REAL = "noise", "real"
TABLE, CURVE, TRAINING = "table", "curve", "training"
STEPS = "steps"
"""The axis of the curves of `steps`, see `axes.AXES`."""

study_option, variant_option, training_option, sampling_option, report_option = map(
    option_of, ("study", "variant", "training", "sampling", "report")
)


@dataclass
class Variant(Options):
    """A method of sampling: an existing pipeline, or one that is trained for every seed.

    In `pipeline`, `start`, `features` and `overrides`, `{name}` stands for the run of an earlier variant with the same
    seed, `{features}` for the feature network of the study, and `{seed}` for the seed.
    """

    pipeline: str | None = variant_option(None, "folder or Hub id of a saved pipeline; none trains one")
    train: str | None = training_option(None, f"script that trains the pipeline: {', '.join(SCRIPTS)}")
    preset: str | None = training_option(None, "the script's YAML file, or a preset such as digits/ot.yaml")
    overrides: tuple[str, ...] = training_option((), "key=value for the script")
    once: bool = training_option(False, "train once, for the first seed, and use the result for all seeds")
    seconds_of: str | None = training_option(None, "variant whose training time this one gets (equal compute)")
    max_train_seconds: float | None = training_option(None, "training time in seconds; none for no limit")
    start: str | None = variant_option(
        None,
        "start of the chain: noise, real (noised training images, a bound for all priors), or a pipeline with a prior; "
        "none leaves the pipeline unchanged",
    )
    truncation_timestep: int | None = variant_option(None, "T' at which the chain starts; none is the full chain")
    features: str | None = sampling_option(
        None, "run of train_features.py whose network and reference set guide the pipeline"
    )
    call: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "arguments of the pipeline call", "group": "sampling"}
    )
    steps: tuple[int, ...] = sampling_option(
        (), "numbers of denoising steps for its curve; none are those of the study"
    )
    field_samples: int | None = sampling_option(
        None, "guide images one at a time by a guidance field recorded on this many other samples"
    )
    batch_size: int | None = sampling_option(None, "largest batch size; none for all images at once")
    role: str = variant_option(
        TABLE, "table, curve (only a point of a curve) or training (only trained, for other variants)"
    )
    description: str = variant_option("", "sentence for the report")

    def __post_init__(self) -> None:
        super().__post_init__()
        one = (self.pipeline is None) != (self.train is None)
        require(one, "arms", "have either a pipeline or a script to train", (self.pipeline, self.train))
        exists = self.train is None or self.train in SCRIPTS
        require(exists, "train", f"be one of {', '.join(SCRIPTS)}", self.train)
        require(self.role in (TABLE, CURVE, TRAINING), "role", "be table, curve or training", self.role)
        enough = self.field_samples is None or self.field_samples >= SMALL_BATCH
        require(enough, "field_samples", f"be at least {SMALL_BATCH}", self.field_samples)
        guided = self.field_samples is None or self.features is not None
        require(guided, "field_samples", "come with the features that guide", self.field_samples)
        of_training = ("preset", "overrides", "once", "seconds_of", "max_train_seconds")
        trained_only = self.train is not None or not any(getattr(self, name) for name in of_training)
        require(trained_only, "arms", f"have {', '.join(of_training)} only with train", self.pipeline)
        started = self.start is None or self.pipeline is not None
        require(started, "start", "come with the pipeline of the denoiser", self.start)
        length = self.truncation_timestep
        require(length is None or length >= 1, "truncation_timestep", "be at least 1 or none", length)
        require(length is None or self.start is not None, "truncation_timestep", "come with a start", length)
        check_steps(self.steps)
        seconds = self.max_train_seconds
        require(seconds is None or seconds > 0, "max_train_seconds", "be positive or none", seconds)
        timed = [text for text in self.overrides if text.startswith("max_train_seconds")]
        require(not timed, "overrides", "leave the time to max_train_seconds, seconds_of and --max-seconds", timed)


@dataclass
class StudyConfig(Options):
    """A study of variants, each sampled and scored with the same random seeds."""

    output_dir: str = study_option("runs/comparison", "folder of the study")
    title: str | None = study_option(None, "title of the report, without the data set; none names up to four variants")
    dataset: str = data_option(
        "digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or an image folder"
    )
    evaluator: str = network_option(
        "digits/evaluator.yaml", "evaluation network, not used in training or guidance; or a preset to train once"
    )
    second_evaluator: str | None = network_option(
        None, "another evaluator, such as efficientnet-lite0 or {features}: adds its distances to the table"
    )
    features: str | None = network_option(
        None, "feature network for losses and guidance: a run, a Hub id, or a preset to train once"
    )
    arms: dict[str, Variant] = field(
        default_factory=dict, metadata={"help": "name to variant, in the order of training", "group": "study"}
    )
    compare_with: str | None = study_option(None, "variant that the others are compared with; none is the first")
    seeds: int = study_option(5, "number of random seeds: 0, 1, 2, …")
    seed: int | None = study_option(None, "a single random seed, whose runs are placed beside the results")
    num_samples: int | None = sampling_option(
        None, "images of each variant and seed; none is the number of test images"
    )
    call: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "arguments of every pipeline call", "group": "sampling"}
    )
    steps: tuple[int, ...] = sampling_option(
        (), "numbers of denoising steps at which every variant is also sampled and scored"
    )
    curves: dict[str, dict[str, dict[str, str]]] = field(
        default_factory=dict,
        metadata={"help": "axis to method to value to the variant at that point", "group": "sampling"},
    )
    dtype: str = sampling_option("float32", "precision of sampling: float32, bfloat16 or float16")
    primary_metric: str = report_option("frechet_distance", "metric that decides, fixed beforehand")
    metrics: tuple[str, ...] = report_option(HEADLINE, "metrics whose differences are tested")
    measured: tuple[str, ...] = report_option((), "metrics to compute for the variants of the table; none is all")
    costs: tuple[str, ...] = report_option(("nfe", "seconds_per_1000"), f"columns of the table: {', '.join(COSTS)}")
    pictured: tuple[str, ...] = report_option(
        (), "variants whose images and features are shown; none are those of the table"
    )
    together: tuple[tuple[str, ...], ...] = study_option(
        (), "groups of runs (variants, features, evaluator) that a CPU trains at the same time, sharing its cores"
    )
    overrides: tuple[str, ...] = study_option((), "key=value for every training script, such as image_size=32")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seeds >= 1, "seeds", "be at least 1", self.seeds)
        require(self.seed is None or self.seed >= 0, "seed", "be at least 0", self.seed)
        require(self.num_samples is None or self.num_samples >= 2, "num_samples", "be at least 2", self.num_samples)
        check_dtype(self.dtype)
        check_steps(self.steps)
        for name in (self.primary_metric, *self.metrics, *self.measured):
            require(name in METRICS, "metrics", f"be among {', '.join(METRICS)}", name)
        for name in self.costs:
            require(name in COSTS, "costs", f"be among {', '.join(COSTS)}", name)
        for reference in re.findall(r"{([^}]*)}", self.second_evaluator or ""):
            usable = reference == "features" and self.features is not None
            require(usable, "second_evaluator", "refer to the features of the study alone", self.second_evaluator)
        for name, variant in self.arms.items():
            plain = re.fullmatch(r"[\w][\w .+,='-]*", name) is not None and name not in RESERVED
            require(plain, "arms", "have names of letters, digits, spaces and -_.+,='", name)
            check_references(self, name, variant)
        reported = self.compare_with is None or self.compare_with in self.reported
        require(reported, "compare_with", f"be one of {', '.join(self.reported)}", self.compare_with)
        for option_name, names, known_names in (
            ("pictured", self.pictured, (*self.arms,)),
            ("together", [name for group in self.together for name in group], (*NETWORKS, *self.arms)),
            ("curves", [name for line in self.lines for name in line.values()], (*self.arms,)),
        ):
            for name in names:
                require(name in known_names, option_name, f"name some of {', '.join(known_names)}", name)

    @property
    def reported(self) -> dict[str, Variant]:
        """The variants of the table, beginning with the one that the others are compared with."""
        rows = [name for name, variant in self.arms.items() if variant.role == TABLE]
        return {name: self.arms[name] for name in sorted(rows, key=lambda name: name != self.compare_with)}

    @property
    def sampled(self) -> dict[str, Variant]:
        """The variants that are sampled: rows of the table and points of curves."""
        return {name: variant for name, variant in self.arms.items() if variant.role != TRAINING}

    @property
    def trained(self) -> dict[str, Variant]:
        """The variants that a script trains."""
        return {name: variant for name, variant in self.arms.items() if variant.train is not None}

    def is_shared(self, name: str) -> bool:
        """Whether a network or variant is trained once for all seeds."""
        return name in NETWORKS or self.arms[name].once

    @property
    def data_options(self) -> dict[str, Any]:
        """The overrides that concern reading the data set; they also apply to the real images of the evaluation."""
        return data_options(self.overrides)

    @property
    def family(self) -> tuple[str, ...]:
        """The tested metrics, the primary one first."""
        return tuple(dict.fromkeys((self.primary_metric, *self.metrics)))

    @property
    def lines(self) -> list[dict[str, str]]:
        """The curves of all axes, value to variant."""
        return [line for lines in self.curves.values() for line in lines.values()]


def data_options(overrides: Sequence[str]) -> dict[str, Any]:
    """The `key=value` among these that are options of `load_images`."""
    given = [override for override in overrides if override.partition("=")[0] in DATA_OPTIONS]
    options = load_config(TrainingConfig, given)
    return {name: getattr(options, name) for name in DATA_OPTIONS if name in options.given}


def check_steps(steps: Sequence[int]) -> None:
    """Refuse numbers of steps below 1."""
    require(all(count >= 1 for count in steps), "steps", "hold numbers from 1", steps)


def check_references(config: StudyConfig, name: str, variant: Variant) -> None:
    """Refuse a variant that refers to a later or missing one.

    Raises:
        InputError: naming the reference.
    """
    names = list(config.arms)
    earlier = [other for other in names[: names.index(name)] if config.arms[other].train is not None]
    usable = [*earlier, "seed", *(["features"] if config.features else [])]
    together = {other for group in config.together if name in group for other in group}
    for text in (variant.pipeline, variant.start, variant.features, *variant.overrides):
        for reference in re.findall(r"{([^}]*)}", text or ""):
            require(
                reference in usable, "arms", f"refer to trained variants before {name!r}, features or seed", reference
            )
            apart = variant.train is None or reference not in together
            require(apart, "together", f"not hold {name!r} with a run that it builds on", reference)
    if variant.seconds_of is not None:
        require(
            variant.seconds_of in earlier, "seconds_of", f"name a trained variant before {name!r}", variant.seconds_of
        )
        require(
            twin(config, name) is not None, "seconds_of", f"have an earlier variant that trains as {name!r} does", None
        )
        require(len(together) < 2, "together", "leave out variants with seconds_of", name)


def twin(config: StudyConfig, name: str) -> str | None:
    """The earlier variant with the same script, preset and overrides, whose run tells how long an update takes."""
    variant = config.arms[name]
    names = list(config.arms)
    for other in names[: names.index(name)]:
        earlier = config.arms[other]
        if (earlier.train, earlier.preset, earlier.overrides) == (variant.train, variant.preset, variant.overrides):
            return other
    return None


# --- Curves -----------------------------------------------------------------------------------------------------------


def with_step_curves(config: StudyConfig) -> StudyConfig:
    """The study with a variant for every point of the curves of `steps`.

    A truncated chain has at most T' steps, so it has no points at larger numbers.
    """
    arms, lines = dict(config.arms), dict[str, dict[str, str]]()
    for name, variant in config.reported.items():
        steps = [count for count in variant.steps or config.steps if count <= (variant.truncation_timestep or count)]
        points = {str(count): point_of(name, variant, num_inference_steps=count) for count in sorted(set(steps))}
        line = {count: place(arms, f"{name}, steps={count}", point, config.call) for count, point in points.items()}
        lines |= {name: line} if line else {}
    curves = {STEPS: lines} if lines else {}
    return dataclasses.replace(config, arms=arms, steps=(), curves=curves | config.curves)


def point_of(name: str, variant: Variant, **call: Any) -> Variant:
    """The variant with other call arguments as a point of a curve; it uses the trained network of the variant."""
    source: dict[str, Any] = {"pipeline": f"{{{name}}}", "train": None, "preset": None, "overrides": ()}
    source |= {"once": False, "seconds_of": None, "max_train_seconds": None}
    changes = source if variant.train is not None else {}
    return dataclasses.replace(variant, **changes, call=variant.call | call, steps=(), role=CURVE)


def place(arms: dict[str, Variant], name: str, point: Variant, call: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The name of a variant with the same images as `point`; if there is none, `point` is added under `name`.

    Args:
        arms: name to variant.
        name: name of the point.
        point: a variant.
        call: arguments of every pipeline call.
    """

    def images(name: str, variant: Variant) -> tuple[Any, ...]:
        source = variant.pipeline or f"{{{name}}}", variant.start, variant.truncation_timestep, variant.features
        return *source, dict(call) | variant.call, variant.field_samples, variant.batch_size

    for other, variant in arms.items():
        if variant.role != TRAINING and images(other, variant) == images(name, point):
            return other
    require(name not in arms, "arms", "leave the names of the curves' points free", name)
    arms[name] = point
    return name


# --- From the command line --------------------------------------------------------------------------------------------


def pipeline_variants(pipelines: Sequence[str]) -> dict[str, Variant]:
    """Variants for saved pipelines, named after their folders and, where two names are equal, the folders above."""
    names = distinct_names(pipelines)
    require(len(set(names)) == len(names), "arms", "be different pipelines", list(pipelines))
    return {name: Variant(pipeline=path) for name, path in zip(names, pipelines, strict=True)}


def read_config(preset: str | None, overrides: Sequence[str], num_inference_steps: int | None = None) -> StudyConfig:
    """The study of a YAML file or preset, with `key=value` overrides and a number of steps for every variant."""
    file = ["--config", str(preset_path(preset))] if preset else []
    config = load_config(StudyConfig, [*file, *overrides])
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    return dataclasses.replace(config, call=config.call | steps)


def choose_variants(config: StudyConfig, names: Sequence[str]) -> StudyConfig:
    """Only the named variants, in that order; any other name is the folder or Hub id of a pipeline."""
    others = pipeline_variants([name for name in names if name not in config.arms])
    named = {name: config.arms[name] for name in names if name in config.arms}
    chosen = named | others
    reference = config.compare_with if config.compare_with in chosen else None
    pictured = tuple(name for name in config.pictured if name in chosen)
    together = tuple(tuple(name for name in group if name in (*NETWORKS, *chosen)) for group in config.together)
    changes: dict[str, Any] = {"compare_with": reference, "pictured": pictured, "together": together, "curves": {}}
    return dataclasses.replace(config, arms=chosen, **changes)
