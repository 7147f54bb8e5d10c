"""The truncated chain under every prior, on one data set, in one table: train, sample, evaluate, draw.

    ot-diffusers truncation --config configs/digits/truncation.yaml output_dir=runs/digits-truncation

The scripts train the denoiser, the evaluator and the learned priors. Every way to start the chain is sampled and scored
by the evaluator, which no loss has seen: pure noise in the truncated and in the full chain, closed-form Gaussians, the
learned priors, and real noisy images as the bound of what a prior can reach. Then Fréchet distance and time against T':
a learned prior makes clean images, so that the one of the table starts the chain anywhere, or another is trained for
each T'. Some priors are sampled with OT guidance, too, by the feature network of the losses: in the table, on the
curves, and once from the step `goal_timestep`, where a short guided chain is held against a long plain one. Started
again, the command keeps what is complete.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .config import option
from .data import ResidentImages, StreamedImages, evenly_spaced, load_images, pixels_of
from .errors import require
from .evaluation import plots, report
from .evaluation.evaluate import ImageSet, describe_images, evaluate_images, real_floor
from .evaluation.metrics import frechet_distance
from .evaluation.page import provenance
from .experiment import (
    EVALUATOR_SEED,
    Announce,
    Sampled,
    as_json,
    check_independent,
    claim_folder,
    is_complete,
    read_json,
    sample_count,
    sampled_once,
    stage,
    train,
    write_results,
)
from .features import load_feature_extractor, load_reference_bank
from .images import to_uint8
from .launch import training_command
from .models.prior import GaussianPrior
from .pipelines.guided import SMALL_BATCH
from .pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from .sampling import MAX_BATCH_SIZE, best_device, load_pipeline, sample_images, with_guidance
from .schedules import alpha_sigma, truncated_samples, truncated_scheduler
from .seeds import keyed_generator

HEADLINE = (
    "frechet_distance",
    "recall_distance",
    "precision_distance",
    "precision",
    "recall",
    "nearest_distance_ratio",
    "patch_sliced_wasserstein",
)
METRICS = (*HEADLINE, "coverage")
COSTS = ("nfe", "seconds_per_1000", "parameters", "training_seconds")
LABELS = {"gaussian": "Gaussian", "gaussian_classes": "Gaussian, class-wise", "vae": "VAE", "gan": "GAN", "ot": "OT"}
LEARNED = ("gan", "ot", "vae")
"""In the order of training: on the CPU the first two side by side, so that their seconds are comparable."""
VANILLA, ORACLE = "vanilla, truncated", "oracle"
DESCRIPTIONS = {
    VANILLA: "N(0, I) fed to the truncated chain.",
    "Gaussian": "One Gaussian with the moments of the training images, in closed form.",
    "Gaussian, class-wise": "One such Gaussian for each class.",
    "VAE": "Encoder and generator under the evidence bound; latents from a mixture fitted to the codes.",
    "GAN": "The generator against a discriminator of its widths.",
    "OT": "The generator by optimal transport alone, no adversary.",
    ORACLE: "Real training images, diffused: what a perfect prior would reach.",
}
GOAL_METRICS = {
    "frechet_distance": "Fréchet",
    "recall_distance": "recall distance",
    "patch_sliced_wasserstein": "patch SW",
}

Images = ResidentImages | StreamedImages


@dataclass
class TruncationConfig:
    """The study of priors."""

    output_dir: str = option("runs/truncation", "folder of the study")
    dataset: str = option("digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or an image folder")
    presets: str = option("digits", "folder of presets: baseline, evaluator, prior_gaussian, prior_vae, prior_gan, …")
    denoiser: str | None = option(None, "folder or Hub id of a trained pipeline; none trains the baseline preset")
    feature_extractor: str | None = option(None, "folder of a feature network for transport; none trains the preset")
    evaluator: str | None = option(None, "folder of a feature network no loss sees; none trains the evaluator preset")
    priors: tuple[str, ...] = option(tuple(LABELS), "rows of the table beside noise and the oracle")
    truncation_timestep: int = option(10, "T' of the table")
    timesteps: tuple[int, ...] = option((10, 50, 100, 200, 300), "T' of the curves")
    learned_timesteps: tuple[int, ...] = option((), "those T' of the curves for which learned priors are trained anew")
    guided: tuple[str, ...] = option(
        (), "priors that are sampled with OT guidance as well; any adds the noise of a full chain"
    )
    goal_timestep: int | None = option(None, "T' of guided rows beside the table's own; none is no such rows")
    num_samples: int | None = option(None, "images of each row; none is as many as there are test images")
    full_steps: tuple[int, ...] = option((50, 1000), "reverse steps of the full chains")
    curve_steps: int = option(10, "reverse steps of each point of the curves, at most T'")
    batch_size: int | None = option(None, "images sampled at once; none is up to 1,000")
    guided_batch_size: int | None = option(None, "the same where guidance couples them")
    max_train_steps: int | None = option(None, "updates of each learned prior; none is the preset's")
    max_train_seconds: float | None = option(None, "time of each learned prior; none is what its updates take")
    seed: int = option(0, "of the models and of the starting noise")

    def __post_init__(self) -> None:
        for name in ("truncation_timestep", "curve_steps"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("timesteps", "full_steps"):
            values = getattr(self, name)
            require(all(value >= 1 for value in values), name, "hold numbers from 1", values)
        known = set(self.priors) <= set(LABELS)
        require(known, "priors", f"be among {', '.join(LABELS)}", ", ".join(self.priors))
        known = set(self.guided) <= set(self.priors)
        require(known, "guided", f"be among priors {', '.join(self.priors)}", ", ".join(self.guided))
        goal = self.goal_timestep
        require(goal is None or goal >= 1, "goal_timestep", "be at least 1 or none", goal)
        require(goal is None or bool(self.guided), "goal_timestep", "be none without guided priors", goal)
        known = set(self.learned_timesteps) <= set(self.timesteps)
        require(known, "learned_timesteps", f"be among timesteps {self.timesteps}", self.learned_timesteps)
        require(self.num_samples is None or self.num_samples >= 2, "num_samples", "be at least 2", self.num_samples)
        for name in ("batch_size", "guided_batch_size", "max_train_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "be at least 1 or none", value)
        seconds = self.max_train_seconds
        require(seconds is None or seconds > 0, "max_train_seconds", "be positive or none", seconds)
        require(self.seed >= 0, "seed", "be at least 0", self.seed)


@dataclass
class Study:
    """What every part of a study needs.

    Attributes:
        config: of the study.
        output: its folder.
        train_images, test_images: the data.
        announce: takes the lines that tell how far it is.
        overrides: `key=value` for every training script.
    """

    config: TruncationConfig
    output: Path
    train_images: Images
    test_images: Images
    announce: Announce
    overrides: Sequence[str] = ()
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples = sample_count(self.config.num_samples, len(self.train_images), len(self.test_images))

    @property
    def priors(self) -> tuple[str, ...]:
        """The priors of the table; one Gaussian for each class needs classes."""
        labelled = self.train_images.labels is not None
        return tuple(name for name in self.config.priors if labelled or name != "gaussian_classes")

    @property
    def guided(self) -> tuple[str, ...]:
        """Those of them that are guided, too."""
        return tuple(name for name in self.priors if name in self.config.guided)

    @property
    def denoiser(self) -> str:
        return self.config.denoiser or str(self.output / "baseline")

    @property
    def feature_extractor(self) -> str:
        return self.config.feature_extractor or str(self.output / "features")

    @property
    def evaluator(self) -> str:
        return self.config.evaluator or str(self.output / "evaluator")


def run_study(config: TruncationConfig, announce: Announce = print, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md`, `report.html` and pictures; returns the results.

    Args:
        config: of the study.
        announce: takes the lines that tell how far it is.
        overrides: `key=value` for every training script, such as `max_train_steps=4`.

    Raises:
        InputError: a folder that holds something else, a preset that does not exist.
        RuntimeError: a training script that failed, with the end of its log.
    """
    output = Path(config.output_dir)
    started = time.monotonic()
    data = {split: load_images(config.dataset, split) for split in ("train", "test")}
    study = Study(config, output, data["train"], data["test"], announce, overrides)
    check_parts(study)
    claim_folder(output / "study.json", as_json(config, "output_dir"), "output_dir")

    # Train.
    train_networks(study)
    train_priors(study)

    # Sample every row of the table from the same seeds, then the curves.
    with stage(f"sample {study.num_samples} images for each row", announce):
        rows = sample_rows(study)
    curves: dict[str, dict[int, Sampled]] = {}
    if config.timesteps:
        with stage(f"sample the curves over T' in {config.timesteps}", announce):
            curves = sample_curves(study)

    # Evaluate with the network that no loss has seen.
    with stage("evaluate", announce):
        extractor = load_feature_extractor(study.evaluator).to(best_device())
        test, training = (describe_images(pixels_of(images), extractor) for images in (data["test"], data["train"]))
        described = {name: describe_images(row.images, extractor) for name, row in rows.items()}
        metrics = {
            name: evaluate_images(found, reference=test, extractor=extractor, train=training, metrics=METRICS)
            for name, found in described.items()
        }
        floor = real_floor(test, training, study.num_samples, extractor=extractor, metrics=METRICS)
        scored = {
            name: {step: score(sampled, test, extractor) for step, sampled in points.items()}
            for name, points in curves.items()
        }

    # Report.
    with stage("write the report", announce):
        results = collect(study, rows, metrics, floor, scored, extractor)
        write_results(results, output)
        (output / "results.md").write_text(markdown(results), encoding="utf-8")
        pictures = draw(study, results, rows, described, test)
        report.write_report(results, pictures, output / "report.html")
    announce(f"\n{markdown(results)}\n")
    announce(f"{time.monotonic() - started:.0f} s in all. Pictures and numbers: {output / 'report.html'}")
    return results


# --- Training ---------------------------------------------------------------------------------------------------------


def check_parts(study: Study) -> None:
    """Refuse networks that do not exist and presets that cannot be trained, before anything is written."""
    config = study.config
    if config.denoiser is not None:
        load_pipeline(config.denoiser)
    for path in (config.feature_extractor, config.evaluator):
        if path is not None:
            load_feature_extractor(path)
    if config.guided and config.feature_extractor is not None:
        load_reference_bank(config.feature_extractor)
    network_runs(study)
    prior_runs(study, config.truncation_timestep, study.priors)


def train_networks(study: Study) -> None:
    """The denoiser, the feature network and the evaluator, where the configuration names none.

    Raises:
        InputError: one network for losses and evaluation.
    """
    runs = network_runs(study)
    if runs:
        train(runs, study.output, "train the denoiser, the feature network and the evaluator", study.announce)
    check_independent(load_feature_extractor(study.evaluator), load_feature_extractor(study.feature_extractor))


def network_runs(study: Study) -> dict[str, list[str]]:
    """Folder of each network's run to the command that trains it."""
    config = study.config
    runs = {}
    for name, script, given, seed in (
        ("baseline", "baseline", config.denoiser, config.seed),
        ("features", "features", config.feature_extractor, config.seed),
        ("evaluator", "features", config.evaluator, EVALUATOR_SEED + config.seed),
    ):
        if given is None:
            own = [f"dataset={config.dataset}", "report_to=none", *study.overrides]
            own += [f"seed={seed}", f"output_dir={study.output / name}"]
            runs[name] = training_command(script, own, config=f"{config.presets}/{name}.yaml")
    return runs


def train_priors(study: Study) -> None:
    """The priors of the table, then those of the curves."""
    config = study.config
    main = config.truncation_timestep
    closed_form = tuple(name for name in study.priors if name not in LEARNED)
    learned = tuple(name for name in LEARNED if name in study.priors)
    train(prior_runs(study, main, closed_form), study.output, "fit the closed-form priors", study.announce)
    runs: dict[str, list[str]] = {}
    for step in dict.fromkeys((main, *config.learned_timesteps)):
        runs |= prior_runs(study, step, learned)
    names, side_by_side = list(runs), 1 if torch.cuda.is_available() else 2
    for first in range(0, len(names), side_by_side):
        group = {name: runs[name] for name in names[first : first + side_by_side]}
        train(group, study.output, f"train {' and '.join(group)}", study.announce)


def prior_runs(study: Study, truncation_timestep: int, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Folder of each prior's run, under the study's, to the command that trains it."""
    config = study.config
    commands = {}
    for name in names:
        run = run_name(name, truncation_timestep)
        options = [
            f"dataset={config.dataset}",
            f"denoiser={study.denoiser}",
            f"truncation_timestep={truncation_timestep}",
            f"output_dir={study.output / run}",
            f"seed={config.seed}",
            "report_to=none",
        ]
        if name == "ot":
            options.append(f"feature_extractor={study.feature_extractor}")
        if name == "gaussian_classes":
            options.append("class_wise=true")
        limits = {"max_train_steps": config.max_train_steps, "max_train_seconds": config.max_train_seconds}
        if name in LEARNED:
            options += [f"{key}={value}" for key, value in limits.items() if value is not None]
        options += study.overrides
        preset = f"{config.presets}/prior_{name.removesuffix('_classes')}.yaml"
        commands[run] = training_command("prior", options, config=preset)
    return commands


def run_name(name: str, truncation_timestep: int) -> str:
    """Folder of a prior's run."""
    return f"prior_{name}_{truncation_timestep}"


# --- Sampling ---------------------------------------------------------------------------------------------------------


def sample_rows(study: Study) -> dict[str, Sampled]:
    """Every row of the table, in its order."""
    main = study.config.truncation_timestep
    rows = {VANILLA: sampled(study, "vanilla", main, main)}
    length = int(load_pipeline(study.denoiser).scheduler.config.num_train_timesteps)
    for steps in study.config.full_steps:
        rows[f"vanilla, full in {steps}"] = sampled(study, "vanilla", length, steps)
    for name in study.priors:
        rows[LABELS[name]] = sampled(study, name, main, main)
    for name in study.guided:
        rows[guided_label(name)] = sampled(study, name, main, main, guided=True)
    for name in study.guided if study.config.goal_timestep else ():
        rows[goal_label(study, name)] = goal_row(study, name)
    if study.guided:
        steps = min(study.config.full_steps)
        rows[f"vanilla, full in {steps}, guided"] = sampled(study, "vanilla", length, steps, guided=True)
    return rows | {ORACLE: sampled(study, "oracle", main, main)}


def guided_label(name: str) -> str:
    """Of a guided row from the T' of the table, and of its curve."""
    return f"{LABELS[name]}, guided"


def goal_label(study: Study, name: str) -> str:
    """Of a guided row from the goal's T'."""
    return f"{guided_label(name)}, T' = {study.config.goal_timestep}"


def goal_row(study: Study, name: str) -> Sampled:
    """A guided chain from the goal's T', in as many steps as a point of the curves."""
    goal = study.config.goal_timestep
    assert goal is not None
    return sampled(study, name, goal, min(goal, study.config.curve_steps), guided=True)


def sample_curves(study: Study) -> dict[str, dict[int, Sampled]]:
    """Row name to T' to images, for every T' that the prior can start at."""
    plain = {"vanilla": VANILLA, **{name: LABELS[name] for name in study.priors}, "oracle": ORACLE}
    lines = [(name, label, False) for name, label in plain.items()]
    lines += [(name, guided_label(name), True) for name in study.guided]
    return {
        label: {
            step: sampled(study, name, step, min(step, study.config.curve_steps), guided=guided)
            for step in study.config.timesteps
            if reaches(study, name, step)
        }
        for name, label, guided in lines
    }


def reaches(study: Study, name: str, truncation_timestep: int) -> bool:
    """Whether a prior was trained for this T', or makes clean images that can be diffused to it."""
    if name in ("vanilla", "oracle") or is_complete(study.output / run_name(name, truncation_timestep)):
        return True
    run = read_json(study.output / run_name(name, study.config.truncation_timestep) / "run.json")
    return run["config"]["prediction_type"] == "sample"


def sampled(study: Study, name: str, truncation_timestep: int, steps: int, *, guided: bool = False) -> Sampled:
    """Images by one prior, from disk if they are there."""
    run = f"{name}_guided" if guided else name
    file = study.output / "samples" / f"{run}_{truncation_timestep}_{steps}.safetensors"
    return sampled_once(file, lambda: sample_prior(study, name, truncation_timestep, steps, guided))


def sample_prior(study: Study, name: str, truncation_timestep: int, steps: int, guided: bool) -> Sampled:
    """Image i of every row starts from the noise that (`seed`, i) gives."""
    pipeline = make_pipeline(study, name, truncation_timestep, guided)
    pipeline(batch_size=SMALL_BATCH, num_inference_steps=1, output_type="pt")  # first calls are slow
    started = time.monotonic()
    if name == "oracle":
        return Sampled(sample_oracle(study, pipeline, steps), time.monotonic() - started, steps)
    size = study.config.guided_batch_size if guided else study.config.batch_size
    call: dict[str, Any] = {"batch_size": size, "seed": study.config.seed}
    images = sample_images(pipeline, study.num_samples, num_inference_steps=steps, **call)
    return Sampled(images, time.monotonic() - started, pipeline.nfe)


def make_pipeline(study: Study, name: str, truncation_timestep: int, guided: bool = False) -> TruncatedPriorPipeline:
    """The pipeline that a run has saved, or the prior of the table before a chain of this T'; N(0, I) for `"vanilla"`
    and the oracle."""
    run = study.output / run_name(name, truncation_timestep)
    if is_complete(run):
        pipeline = load_pipeline(run)
    else:
        full = load_pipeline(study.denoiser)
        scheduler = truncated_scheduler(DDIMScheduler.from_config(full.scheduler.config), truncation_timestep)
        pipeline = TruncatedPriorPipeline(make_prior(study, name, truncation_timestep), full.unet.eval(), scheduler)
    if guided:
        pipeline = with_guidance(pipeline, study.feature_extractor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(best_device())


def make_prior(study: Study, name: str, truncation_timestep: int) -> Any:
    """The prior `name` for a T' that no run has been made for."""
    if name not in ("vanilla", "oracle"):
        trained = load_pipeline(study.output / run_name(name, study.config.truncation_timestep)).prior
        return trained.at_truncation_timestep(truncation_timestep)
    channels, height, width = study.train_images.image_shape
    size = height if height == width else (height, width)
    return GaussianPrior(truncation_timestep=truncation_timestep, sample_size=size, out_channels=channels)


def sample_oracle(study: Study, pipeline: TruncatedPriorPipeline, steps: int) -> Tensor:
    """Images from real x_T' of evenly spaced training images, uint8 [N, C, H, W]."""
    made = []
    for rows in real_rows(study).split(study.config.batch_size or MAX_BATCH_SIZE):
        latents = truncated_samples(study.train_images.fetch(rows), rows, pipeline.scheduler, seed=study.config.seed)
        call: dict[str, Any] = {"latents": latents, "num_inference_steps": steps, "output_type": "pt"}
        (images,) = pipeline(batch_size=len(rows), **call, return_dict=False)
        made.append(to_uint8(images.cpu() * 2 - 1))
    return torch.cat(made)


def real_rows(study: Study) -> Tensor:
    """As many training images as a row has, evenly spaced."""
    return evenly_spaced(study.train_images, study.num_samples)


# --- Results ----------------------------------------------------------------------------------------------------------


def score(row: Sampled, test: ImageSet, extractor: Any) -> dict[str, float]:
    """One point of the curves: Fréchet distance and cost."""
    found = describe_images(row.images, extractor).features
    return {
        "frechet_distance": frechet_distance(found, test.features),
        "seconds_per_1000": row.cost["seconds_per_1000"],
        "nfe": row.nfe,
    }


def collect(
    study: Study,
    rows: Mapping[str, Sampled],
    metrics: Mapping[str, Mapping[str, float]],
    floor: Mapping[str, float],
    scored: Mapping[str, Mapping[int, Mapping[str, float]]],
    extractor: Any,
) -> dict[str, Any]:
    """The contents of `results.json`: those of `evaluation.report`, with costs of training and the curves over T'."""
    main = study.config.truncation_timestep
    arms = {
        name: {
            "metrics": metrics[name],
            **row.cost,
            "description": describe(name),
            "bound": name == ORACLE,
        }
        for name, row in rows.items()
    }
    for name in study.priors:
        run = study.output / run_name(name, main)
        results = read_json(run / "results.json")
        costs = {key: results[key] for key in ("parameters", "training_seconds", "updates")}
        for label in (LABELS[name], guided_label(name), goal_label(study, name)):
            if label in arms:
                arms[label] |= costs
        arms[LABELS[name]]["config"] = read_json(run / "run.json")["config"]
    evaluator = Path(study.evaluator) / "results.json"
    accuracy = {"test_accuracy": read_json(evaluator)["test_accuracy"]} if evaluator.is_file() else {}
    results = {
        "title": f"Priors of the truncated chain, T' = {main}: {study.train_images.name}",
        "dataset": study.train_images.name,
        "num_samples": study.num_samples,
        "num_test_images": len(study.test_images),
        "truncation_timestep": main,
        "extractor": {
            "name": f"an independent {type(extractor).__name__}",
            "feature_dim": extractor.config.feature_dim,
            **accuracy,
        },
        "headline": list(HEADLINE),
        "costs": list(COSTS),
        "arms": arms,
        "floor": {"metrics": dict(floor)},
        "curves": {
            name: {str(step): dict(values) for step, values in points.items()} for name, points in scored.items()
        },
        "notes": unfinished(study),
        "provenance": provenance() | {"study": as_json(study.config, "output_dir")},
    }
    return results | ({"summary": goal(study, arms)} if study.config.goal_timestep else {})


def describe(name: str) -> str:
    """A sentence for a row."""
    plain, guided, _ = name.partition(", guided")
    sentence = DESCRIPTIONS.get(plain, "N(0, I) and the whole chain, by DDIM.")
    return f"{sentence} With OT guidance." if guided else sentence


def goal(study: Study, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the guided chains from the goal's T' are at least as good as the plain full one, a sentence for each."""
    steps = min(study.config.full_steps)
    full = arms[f"vanilla, full in {steps}"]
    sentences = []
    for name in study.guided:
        label = goal_label(study, name)
        met = all(arms[label]["metrics"][metric] <= full["metrics"][metric] for metric in GOAL_METRICS)
        values = [
            f"{title} {report.format_number(arms[label]['metrics'][metric])} "
            f"against {report.format_number(full['metrics'][metric])}"
            for metric, title in GOAL_METRICS.items()
        ]
        short, long = (arm["seconds_per_1000"] for arm in (arms[label], full))
        values.append(f"{short:.1f} s against {long:.1f} s per 1,000 images")
        verdict = "at least as good as" if met else "not as good in all as"
        sentences.append(
            f"{label}, {arms[label]['nfe']} network calls: {verdict} {steps} calls from noise ({', '.join(values)})."
        )
    return " ".join(sentences)


def unfinished(study: Study) -> list[str]:
    """A sentence for each prior that its time limit stopped."""
    found = []
    for name in study.priors:
        run = read_json(study.output / run_name(name, study.config.truncation_timestep) / "results.json")
        if not run["complete"]:
            spent = f"{run['training_seconds']:.0f} s and {run['updates']} updates"
            found.append(f"{LABELS[name]} was stopped after {spent}; its preset has more.")
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The table and the curves in Markdown, with extractor, dimension and N of the Fréchet distance."""
    extractor = results["extractor"]
    lead = (
        f"Fréchet distance in the {extractor['feature_dim']} features of {extractor['name']}, "
        f"{results['num_samples']} generated against {results['num_test_images']} test images of "
        f"{results['dataset']}; T' = {results['truncation_timestep']}."
    )
    steps = list(dict.fromkeys(step for points in results["curves"].values() for step in points))
    curves = [f"| Fréchet at T' = | {' | '.join(steps)} |", f"| --- |{' ---: |' * len(steps)}"]
    for name, points in results["curves"].items():
        values = (report.format_number(points.get(step, {}).get("frechet_distance")) for step in steps)
        curves.append(f"| {name} | {' | '.join(values)} |")
    notes = [f"* {note}" for note in results["notes"]]
    summary = [f"**{results['summary']}**"] if "summary" in results else []
    blocks = [[lead], summary, [report.markdown_table(results)], curves if steps else [], notes]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


# --- Pictures ---------------------------------------------------------------------------------------------------------


def draw(
    study: Study,
    results: Mapping[str, Any],
    rows: Mapping[str, Sampled],
    described: Mapping[str, ImageSet],
    test: ImageSet,
) -> dict[str, Path]:
    """The report's pictures, caption to file."""
    folder = study.output
    compared = [goal_label(study, name) for name in study.guided] if study.config.goal_timestep else []
    compared += [f"vanilla, full in {min(study.config.full_steps)}"] if compared else []
    shown = [VANILLA, *(LABELS[name] for name in study.priors), *compared, ORACLE]
    samples = {"real": test.images} | {name: rows[name].images for name in shown}
    clouds = {"real": test.features} | {name: described[name].features for name in shown}
    pictures = {
        "Samples": plots.image_panels(samples, folder / "samples.png"),
        "What the chain starts from": plots.image_panels(starts(study), folder / "starts.png"),
        "The evaluator's features in two directions, real images in grey": plots.scatter(
            clouds, folder / "features.png", basis="real"
        ),
    }
    if len(study.config.timesteps) > 1:
        pictures["Fréchet distance and sampling time against T'"] = draw_curves(results["curves"], folder)
    return pictures


def starts(study: Study, count: int = 36) -> dict[str, Tensor]:
    """x_T' of real images and of every prior, uint8, by name."""
    main = study.config.truncation_timestep
    shown = {}
    labels = {"oracle": "real", "vanilla": VANILLA, **{name: LABELS[name] for name in study.priors}}
    for name, label in labels.items():
        pipeline = make_pipeline(study, name, main)
        rows = real_rows(study)[:count]
        if name == "oracle":
            images = truncated_samples(study.train_images.fetch(rows), rows, pipeline.scheduler, seed=study.config.seed)
        else:
            generators = [keyed_generator("cpu", study.config.seed, "image", row) for row in range(count)]
            with torch.no_grad():
                level = alpha_sigma(pipeline.scheduler, main - 1)
                images = pipeline.prior.eval().sample(count, *level, generator=generators)
        shown[label] = to_uint8(images.cpu())
    return shown


def draw_curves(curves: Mapping[str, Mapping[str, Mapping[str, float]]], folder: Path) -> Path:
    """Fréchet distance and seconds per 1,000 images against T', one line for each row."""
    titles = {"frechet_distance": "Fréchet distance", "seconds_per_1000": "seconds per 1,000 images"}
    panels = {
        title: {name: {float(step): values[key] for step, values in points.items()} for name, points in curves.items()}
        for key, title in titles.items()
    }
    guided = {f"{name}, guided": name for name in curves if f"{name}, guided" in curves}
    titled: dict[str, Any] = {"xlabel": "T'", "logarithmic": ["Fréchet distance"]}
    return plots.line_panels(panels, folder / "curves.png", variants=guided, **titled)
