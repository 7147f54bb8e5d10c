"""The study of priors: the truncated chain with every prior on one data set, in one table and in curves over T'.

    ot-diffusers truncation --config configs/digits/truncation.yaml output_dir=runs/digits-truncation

The training scripts train the denoiser, the evaluator and the learned priors. The chain is then started in several
ways, and all samples are scored by the evaluator, which is not used in training or guidance: pure noise in the
truncated and in the full chain, closed-form Gaussians, the learned priors, and noised real images as a bound for every
prior. Curves show Fréchet distance and time against T'. A learned prior generates clean images, so the prior of the
table can start the chain at any T'; alternatively a prior is trained for each T'. Some priors are also sampled with OT
guidance by the feature network of the losses: in the table, on the curves, and from the step `goal_timestep`, where a
short guided chain is compared with a long plain one.

`expand` turns this configuration into the variants of a `StudyConfig`; the engine does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Options, PriorConfig, data_option, load_config, network_option
from ..data import load_images
from ..errors import require
from ..evaluation.health import evaluator_doubt
from ..evaluation.metric_table import METRICS
from ..images import to_uint8
from ..launch.commands import preset_path
from ..reporting import plots, report
from ..reporting.differences import verdict_with_size
from ..sampling import check_dtype
from ..schedules import alpha_sigma
from ..seeds import keyed_generator
from .axes import AXES, TIMESTEPS
from .config import (
    CURVE,
    NOISE,
    REAL,
    TRAINING,
    StudyConfig,
    Variant,
    data_options,
    place,
    sampling_option,
    study_option,
    training_option,
)
from .pictures import NUM_SHOWN, evenly_spaced_rows
from .run import run_study
from .sampling import make_pipeline, real_latents, real_rows
from .study import RECORD_NAME, Log, Study, check_study_folder

HEADLINE = (
    "frechet_distance",
    "recall_distance",
    "precision_distance",
    "precision",
    "recall",
    "nearest_distance_ratio",
    "patch_sliced_wasserstein",
)
SECOND_HEADLINE = ("second_frechet_distance", "second_recall_distance")
MEASURED = (*HEADLINE, "coverage", "effective_rank", "principal_spread")
COSTS = ("nfe", "seconds_per_1000", "parameters", "training_seconds")
LABELS = {
    "gaussian": "Gaussian",
    "gaussian_classes": "Gaussian, class-wise",
    "vae": "VAE",
    "few_step": "Few-step",
    "gan": "GAN",
    "ot_original": "OT, original",
    "ot": "OT",
}
CLOSED_FORM, LEARNED = ("gaussian", "gaussian_classes"), ("gan", "ot", "vae", "ot_original")
"""On a CPU, learned priors are trained in pairs, so that the training times of the first two are comparable."""
FEW_STEP, COUPLED, TUNED = "few_step", "coupled", "tuned"
"""The prior that is a tuned network, and the runs that train and tune this network."""
OPTIONS = {
    "ot": ("feature_extractor={features}",),
    "gaussian_classes": ("class_conditional=true",),
    FEW_STEP: (f"pretrained={{{TUNED}}}",),
}
"""Options of the script that trains the prior, in addition to those of its preset."""
DENOISER, FULL_DENOISER, FULL = "baseline", "baseline_full", "full"
VANILLA, ORACLE = "vanilla, truncated", "oracle"
DESCRIPTIONS = {
    NOISE: "N(0, I) fed to the truncated chain.",
    FULL: "N(0, I) and the whole chain, by DDIM.",
    "gaussian": "One Gaussian with the moments of the training images, in closed form.",
    "gaussian_classes": "One such Gaussian for each class.",
    "vae": "Encoder and generator under the evidence bound; latents from a mixture fitted to the codes.",
    FEW_STEP: "A coupled denoiser, tuned for one call on its finished images; the training time is that of the tuning.",
    "gan": "The generator against a discriminator of its widths.",
    "ot_original": "The generator by the original study's loss: sliced Wasserstein on whole pixels, x_T' made at once.",
    "ot": "The generator by optimal transport alone, no adversary.",
    REAL: "Real training images, diffused: what a perfect prior would reach.",
}
GOAL_METRICS = ("frechet_distance", "recall_distance", "patch_sliced_wasserstein", *SECOND_HEADLINE)
DUEL_METRICS = ("frechet_distance", "recall_distance", "patch_sliced_wasserstein", "second_frechet_distance")


@dataclass
class TruncationConfig(Options):
    """Configuration of the study of priors."""

    output_dir: str = study_option("runs/truncation", "folder of the study")
    dataset: str = data_option(
        "digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or an image folder"
    )
    presets: str = study_option(
        "digits", "folder of presets: baseline, evaluator, prior_gaussian, prior_vae, prior_gan, …"
    )
    denoiser: str | None = network_option(
        None, "folder or Hub id of a trained pipeline; none trains the baseline preset"
    )
    full_denoiser: str | None = network_option(
        None,
        "pipeline or preset for the full chains, if the denoiser was trained on low noise only; none is the denoiser",
    )
    feature_extractor: str | None = network_option(
        None, "folder of a feature network for transport; none trains the preset"
    )
    evaluator: str | None = network_option(
        None, "evaluation network, not used in training or guidance; none trains the preset"
    )
    second_evaluator: str | None = network_option(
        None, "another evaluator, not trained here, such as efficientnet-lite0: adds its distances to the table"
    )
    priors: tuple[str, ...] = study_option(
        ("gaussian", "gaussian_classes", "vae", "gan", "ot"),
        f"priors of the table, some of {', '.join(LABELS)}",
    )
    truncation_timestep: int = sampling_option(10, "T' of the table")
    timesteps: tuple[int, ...] = sampling_option((10, 50, 100, 200, 300), "T' of the curves")
    learned_timesteps: tuple[int, ...] = sampling_option(
        (), "T' of the curves for which learned priors are trained again"
    )
    guided: tuple[str, ...] = sampling_option(
        (), "priors that are also sampled with OT guidance; any adds a guided full chain"
    )
    guided_curves: tuple[str, ...] | None = sampling_option(None, "guided priors with a curve; none is all of them")
    goal_timestep: int | None = sampling_option(None, "a second T' for guided rows; none adds no such rows")
    goal_priors: tuple[str, ...] | None = sampling_option(None, "guided priors with such a row; none is all of them")
    num_samples: int | None = sampling_option(None, "images of each row; none is the number of test images")
    full_steps: tuple[int, ...] = sampling_option((50, 1000), "denoising steps of the full chains")
    curve_steps: int = sampling_option(10, "denoising steps at each point of the curves, at most T'")
    dtype: str = sampling_option("float32", "precision of sampling: float32, bfloat16 or float16")
    batch_size: int | None = sampling_option(None, "images sampled at once; none is up to 1,000")
    guided_batch_size: int | None = sampling_option(None, "batch size of guided rows, which guidance moves together")
    max_train_steps: int | None = training_option(
        None, "training steps of each learned prior; none is the number in its preset"
    )
    max_train_seconds: float | None = training_option(
        None, "training time of each learned prior in seconds; none for no limit"
    )
    seed: int = study_option(0, "random seed for models and starting noise", minimum=0, must="be at least 0")
    seeds: int | None = study_option(None, "number of random seeds 0, 1, 2, …, instead of the one", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtype(self.dtype)
        for name in ("truncation_timestep", "curve_steps"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("timesteps", "full_steps"):
            values = getattr(self, name)
            require(all(value >= 1 for value in values), name, "hold numbers from 1", values)
        valid = set(self.priors) <= set(LABELS)
        require(valid, "priors", f"be among {', '.join(LABELS)}", ", ".join(self.priors))
        valid = set(self.guided) <= set(self.priors)
        require(valid, "guided", f"be among priors {', '.join(self.priors)}", ", ".join(self.guided))
        for name in ("guided_curves", "goal_priors"):
            chosen = getattr(self, name)
            valid = chosen is None or set(chosen) <= set(self.guided)
            require(valid, name, f"be among guided {', '.join(self.guided)}", ", ".join(chosen or ()))
        goal = self.goal_timestep
        require(goal is None or goal >= 1, "goal_timestep", "be at least 1 or none", goal)
        require(goal is None or bool(self.guided), "goal_timestep", "be none without guided priors", goal)
        valid = set(self.learned_timesteps) <= set(self.timesteps)
        require(valid, "learned_timesteps", f"be among timesteps {self.timesteps}", self.learned_timesteps)
        require(self.num_samples is None or self.num_samples >= 2, "num_samples", "be at least 2", self.num_samples)
        for name in ("batch_size", "guided_batch_size", "max_train_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "be at least 1 or none", value)
        seconds = self.max_train_seconds
        require(seconds is None or seconds > 0, "max_train_seconds", "be positive or none", seconds)


def run_truncation_study(
    config: TruncationConfig,
    log: Log = print,
    *,
    overrides: Sequence[str] = (),
    max_seconds: float | None = None,
) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md`, `report.html` and pictures; returns the results.

    Args:
        config: of the study.
        log: takes the progress messages.
        overrides: `key=value` for every training script, such as `max_train_steps=4`.
        max_seconds: stop cleanly after about this time; the next call resumes the study.

    Raises:
        InputError: a folder that contains something else, a preset that does not exist.
        RuntimeError: a training script that failed, with the end of its log.
    """

    def extend(study: Study, results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
        more: dict[str, Any] = {"truncation_timestep": config.truncation_timestep}
        conclusion = conclusions(config, results | more)
        pictured = starts(study, config, results["seeds"][-1])
        files = {"starts": plots.image_panels(pictured, study.output / "starts.png")}
        return more | ({"summary": conclusion} if conclusion else {}), files

    check_study_folder(Path(config.output_dir) / RECORD_NAME, "output_dir")
    return run_study(expand(config, overrides), max_seconds=max_seconds, log=log, extend=extend)


# --- The variants -----------------------------------------------------------------------------------------------------


def expand(config: TruncationConfig, overrides: Sequence[str] = ()) -> StudyConfig:
    """The training runs, the variants of the table in their order, and the variants of the curves over T'.

    Raises:
        InputError: a data set or a preset that does not exist.
    """
    images = load_images(config.dataset, "train", **data_options(overrides))
    # One Gaussian for each class needs classes.
    labelled = images.labels is not None and images.label_problem is None
    priors = [name for name in config.priors if labelled or name != "gaussian_classes"]
    guided = [name for name in priors if name in config.guided]
    runs = training_runs(config, priors)
    rows = {label: variant_at(config, runs, *row) for label, row in table_rows(config, priors, guided).items()}
    arms = runs | rows
    lines = curves(config, arms, priors, guided)
    compared = [label for label in rows if label.endswith(f"T' = {config.goal_timestep}")]
    compared += [full_label(min(config.full_steps))]
    return StudyConfig(
        output_dir=config.output_dir,
        title=f"Priors of the truncated chain, T' = {config.truncation_timestep}",
        dataset=config.dataset,
        evaluator=config.evaluator or f"{config.presets}/evaluator.yaml",
        second_evaluator=config.second_evaluator,
        features=config.feature_extractor or f"{config.presets}/features.yaml",
        arms=arms,
        compare_with=LABELS["gan"] if config.seeds and "gan" in priors else None,
        seeds=config.seeds or 1,
        seed=None if config.seeds else config.seed,
        num_samples=config.num_samples,
        dtype=config.dtype,
        curves={TIMESTEPS: lines if config.timesteps else {}},
        metrics=(*HEADLINE, *(SECOND_HEADLINE if config.second_evaluator else ())),
        measured=MEASURED,
        costs=COSTS,
        pictured=(VANILLA, *(LABELS[name] for name in priors), *compared, ORACLE),
        together=groups(runs),
        overrides=tuple(overrides),
    )


def training_runs(config: TruncationConfig, priors: Sequence[str]) -> dict[str, Variant]:
    """The denoiser if none is given, the network that is tuned to be a prior, every prior for the T' of the table, and
    learned priors for `learned_timesteps`."""
    runs = {}
    if config.denoiser is None:
        runs[DENOISER] = Variant(train="baseline", preset=f"{config.presets}/baseline.yaml", once=True, role=TRAINING)
    if config.full_denoiser is not None and preset_path(config.full_denoiser).is_file():
        runs[FULL_DENOISER] = Variant(train="baseline", preset=config.full_denoiser, once=True, role=TRAINING)
    limits = [f"max_train_steps={config.max_train_steps}"] if config.max_train_steps else []
    if FEW_STEP in priors:
        shared: dict[str, Any] = {"max_train_seconds": config.max_train_seconds, "role": TRAINING}
        options = ["feature_extractor={features}", *limits]
        runs[COUPLED] = Variant(train="ot", preset=f"{config.presets}/ot.yaml", overrides=tuple(options), **shared)
        options.append(f"pretrained={{{COUPLED}}}")
        runs[TUNED] = Variant(
            train="few_step", preset=f"{config.presets}/few_step.yaml", overrides=tuple(options), **shared
        )
    for timestep in dict.fromkeys((config.truncation_timestep, *config.learned_timesteps)):
        for name in (*CLOSED_FORM, FEW_STEP, *LEARNED):
            learned = name in LEARNED
            if name in priors and (learned or timestep == config.truncation_timestep):
                options = [f"denoiser={denoiser(config)}", f"truncation_timestep={timestep}", *OPTIONS.get(name, ())]
                runs[run_name(name, timestep)] = Variant(
                    train="prior",
                    preset=prior_preset(config, name),
                    overrides=(*options, *(limits if learned else ())),
                    max_train_seconds=config.max_train_seconds if learned else None,
                    role=TRAINING,
                )
    return runs


def groups(runs: Mapping[str, Variant]) -> tuple[tuple[str, ...], ...]:
    """Runs that are trained side by side: the networks, the closed forms, and the learned priors in pairs."""
    denoisers = [name for name in runs if name in (DENOISER, FULL_DENOISER)]
    learned = [run for run in runs if prior_of(run) in LEARNED]
    closed = tuple(run for run in runs if prior_of(run) in CLOSED_FORM)
    networks = ("features", "evaluator", *denoisers)
    pairs = [tuple(learned[first : first + 2]) for first in range(0, len(learned), 2)]
    return tuple(group for group in (networks, closed, *pairs) if group)


def prior_of(run: str) -> str:
    """The prior that a run makes; no known name for other runs."""
    return run.removeprefix("prior_").rpartition("_")[0]


Row = tuple[str, int | None, int, bool]
"""Start (noise, real or the name of a prior), T' (None for the full chain), steps, and whether it is guided."""


def table_rows(config: TruncationConfig, priors: Sequence[str], guided: Sequence[str]) -> dict[str, Row]:
    """Label to row, in the order of the table."""
    main, goal_timestep, shortest = config.truncation_timestep, config.goal_timestep, min(config.full_steps)
    rows: dict[str, Row] = {VANILLA: (NOISE, main, main, False)}
    rows |= {full_label(steps): (NOISE, None, steps, False) for steps in config.full_steps}
    rows |= {LABELS[name]: (name, main, main, False) for name in priors}
    rows |= {guided_label(name): (name, main, main, True) for name in guided}
    if goal_timestep is not None:
        steps = min(goal_timestep, config.curve_steps)
        chosen = guided if config.goal_priors is None else [name for name in guided if name in config.goal_priors]
        rows |= {goal_label(config, name): (name, goal_timestep, steps, True) for name in chosen}
    rows |= {f"{full_label(shortest)}, guided": (NOISE, None, shortest, True)} if guided else {}
    return rows | {ORACLE: (REAL, main, main, False)}


def curves(
    config: TruncationConfig, arms: dict[str, Variant], priors: Sequence[str], guided: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Method → T' → variant, for every T' at which the prior can start; the variants are added to `arms`."""
    methods = [(VANILLA, NOISE, False), *((LABELS[name], name, False) for name in priors), (ORACLE, REAL, False)]
    drawn = guided if config.guided_curves is None else config.guided_curves
    methods += [(guided_label(name), name, True) for name in guided if name in drawn]
    lines: dict[str, dict[str, str]] = {label: {} for label, _, _ in methods}
    for label, start, is_guided in methods:
        for timestep in config.timesteps:
            if start in (NOISE, REAL) or run_name(start, timestep) in arms or makes_clean_images(config, start):
                row = start, timestep, min(timestep, config.curve_steps), is_guided
                point = dataclasses.replace(variant_at(config, arms, *row), role=CURVE)
                lines[label][str(timestep)] = place(arms, f"{label}, T'={timestep}", point)
    return lines


def variant_at(
    config: TruncationConfig, runs: Mapping[str, Variant], start: str, timestep: int | None, steps: int, guided: bool
) -> Variant:
    """A chain that starts at T': the run of a prior for this T', or the denoiser after noise, real images, or the prior
    of the table, whose clean images can be diffused to any T'."""
    run = run_name(start, timestep)
    if run in runs:
        source: dict[str, Any] = {"pipeline": f"{{{run}}}"}
    else:
        other = start if start in (NOISE, REAL) else f"{{{run_name(start, config.truncation_timestep)}}}"
        walker = denoiser(config) if timestep is not None else full_denoiser(config)
        source = {"pipeline": walker, "start": other, "truncation_timestep": timestep}
    description = DESCRIPTIONS[FULL if timestep is None else start]
    return Variant(
        **source,
        features="{features}" if guided else None,
        call={"num_inference_steps": steps},
        batch_size=config.guided_batch_size if guided else config.batch_size,
        description=f"{description} With OT guidance." if guided else description,
    )


def makes_clean_images(config: TruncationConfig, name: str) -> bool:
    """Whether the preset of the prior trains it on clean images, which can be diffused to any T'."""
    preset = str(preset_path(prior_preset(config, name)))
    return load_config(PriorConfig, ["--config", preset]).prediction_type == "sample"


def prior_preset(config: TruncationConfig, name: str) -> str:
    """The preset that trains a prior."""
    return f"{config.presets}/prior_{name.removesuffix('_classes')}.yaml"


def denoiser(config: TruncationConfig) -> str:
    """The denoiser of the configuration, or the run that this study trains."""
    return config.denoiser or f"{{{DENOISER}}}"


def full_denoiser(config: TruncationConfig) -> str:
    """The denoiser of the full chains: the pipeline of the configuration, a run of this study, or the denoiser."""
    if config.full_denoiser is None:
        return denoiser(config)
    return f"{{{FULL_DENOISER}}}" if preset_path(config.full_denoiser).is_file() else config.full_denoiser


def run_name(name: str, timestep: int | None) -> str:
    """The name of the run that trains a prior for this T'."""
    return f"prior_{name}_{timestep}"


def full_label(steps: int) -> str:
    """The label of the full chain with this number of steps."""
    return f"vanilla, full in {steps}"


def guided_label(name: str) -> str:
    """The label of a guided row at the T' of the table, and of its curve."""
    return f"{LABELS[name]}, guided"


def goal_label(config: TruncationConfig, name: str) -> str:
    """The label of a guided row at `goal_timestep`."""
    return f"{guided_label(name)}, T' = {config.goal_timestep}"


# --- Results ----------------------------------------------------------------------------------------------------------


def conclusions(config: TruncationConfig, results: Mapping[str, Any]) -> str:
    """The answers of the study to its questions, a sentence for each, or why there is no verdict.

    Over several seeds: is the OT prior better than the GAN, at every T' and for both evaluators? Are the learned priors
    better than the Gaussian? Are the guided chains from `goal_timestep` at least as good as the plain full chain?

    Args:
        config: of the study.
        results: the contents of `results.json`.
    """
    doubt = evaluator_doubt(results["extractor"])
    if doubt is not None:
        return f"There is no verdict, because the evaluator cannot be trusted: {doubt}."
    paired = LABELS["ot"] in results.get("differences", {})
    sentences = [duel(results, metric) for metric in DUEL_METRICS] if paired else []
    return " ".join(
        [*sentences, *beside_gaussian(config, results["arms"]), *beside_full_chain(config, results["arms"])]
    )


def duel(results: Mapping[str, Any], metric: str) -> str:
    """OT compared with GAN by one metric, at every T' of the curve or, without a curve, at the T' of the table."""
    ot, gan = LABELS["ot"], LABELS["gan"]
    curves = results.get(AXES[TIMESTEPS].key, {})
    points = {value: (point, curves[gan][value]) for value, point in curves.get(ot, {}).items() if metric in point}
    if not points:
        points = {str(results["truncation_timestep"]): (results["differences"][ot], results["arms"][gan]["metrics"])}
    said = []
    for value, (point, of_gan) in points.items():
        difference = point.get("differences", point)[metric]
        said.append(f"T' = {value} {verdict_with_size(metric, difference, of_gan[metric], len(results['seeds']))}")
    return f"{ot} compared with {gan}, {METRICS[metric].title}: {'; '.join(said)}."


def beside_gaussian(config: TruncationConfig, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The learned priors with a lower Fréchet distance than the Gaussian, a sentence for each evaluator."""
    learned = [LABELS[name] for name in config.priors if name not in CLOSED_FORM]
    if LABELS["gaussian"] not in arms or not learned:
        return []
    bounds = arms[LABELS["gaussian"]]["metrics"]
    sentences = []
    for metric in (metric for metric in ("frechet_distance", "second_frechet_distance") if metric in bounds):
        nearer = [label for label in learned if arms[label]["metrics"][metric] < bounds[metric]]
        than = f"a lower {METRICS[metric].title} than the Gaussian at T' = {config.truncation_timestep}"
        named = f"Learned priors with {than}: {'; '.join(nearer)}."
        sentences.append(named if nearer else f"No learned prior has {than}.")
    return sentences


def beside_full_chain(config: TruncationConfig, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether each guided chain from `goal_timestep` is at least as good as the shortest plain full chain."""
    full, steps = arms[full_label(min(config.full_steps))], min(config.full_steps)
    sentences = []
    for label in (goal_label(config, name) for name in config.guided):
        if label not in arms:
            continue
        metrics = [metric for metric in GOAL_METRICS if metric in full["metrics"]]
        pairs = {metric: (arms[label]["metrics"][metric], full["metrics"][metric]) for metric in metrics}
        met = all(short <= long for short, long in pairs.values())
        values = [
            f"{METRICS[metric].title} {report.format_number(short)} instead of {report.format_number(long)}"
            for metric, (short, long) in pairs.items()
        ]
        short, long = (arm["seconds_per_1000"] for arm in (arms[label], full))
        values.append(f"{short:.1f} s instead of {long:.1f} s per 1,000 images")
        said = "is at least as good as" if met else "is not in every metric as good as"
        sentences.append(
            f'"{label}" with {arms[label]["nfe"]} function evaluations {said} the plain full chain with {steps} '
            f"({', '.join(values)})."
        )
    return sentences


def starts(study: Study, config: TruncationConfig, seed: int) -> dict[str, Tensor]:
    """x_T' of real images and of every prior: label to uint8 images."""
    labels = [label for label in (ORACLE, VANILLA, *LABELS.values()) if label in study.config.arms]
    shown = {}
    for label in labels:
        pipeline = make_pipeline(study, label, seed)
        rows = real_rows(study)
        rows = rows[evenly_spaced_rows(len(rows), NUM_SHOWN)]
        if label == ORACLE:
            images = real_latents(study, pipeline, rows, seed)
        else:
            generators = [keyed_generator("cpu", seed, "image", row) for row in range(NUM_SHOWN)]
            with torch.no_grad():
                level = alpha_sigma(pipeline.scheduler, config.truncation_timestep - 1)
                images = pipeline.prior.eval().sample(NUM_SHOWN, *level, generator=generators)
        shown["real" if label == ORACLE else label] = to_uint8(images.cpu())
    return shown
