"""The truncated chain under every prior, on one data set, in one table: train, sample, evaluate, draw.

    ot-diffusers truncation --config configs/digits/truncation.yaml output_dir=runs/digits-truncation

The scripts train the denoiser, the evaluator and the learned priors. Every way to start the chain is sampled and scored
by the evaluator, which no loss has seen: pure noise in the truncated and in the full chain, closed-form Gaussians, the
learned priors, and real noisy images as the bound of what a prior can reach. Then Fréchet distance and time against T'.
Started again, the command keeps what is complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import option
from .data import ResidentImages, StreamedImages, load_images
from .demo import Sampled, claim_folder, is_complete, read_json, stage, train, write_results
from .errors import require
from .evaluation import plots, report
from .evaluation.evaluate import ImageSet, describe_images, evaluate_images, real_floor
from .evaluation.metrics import frechet_distance
from .features import load_feature_extractor
from .images import to_uint8
from .launch import training_command
from .models.prior import GaussianPrior
from .pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from .sampling import load_pipeline, sample_images
from .schedules import alpha_sigma, truncated_samples, truncated_scheduler
from .seeds import keyed_generator

COLUMNS = ("frechet_distance", "recall_distance", "precision_distance", "precision", "recall")
EVALUATOR_SEED = 1000
LEARNED = ("gan", "ot", "vae")
"""In the order of training: the first two side by side, so that their seconds are comparable."""
SIDE_BY_SIDE = 2
LABELS = {"gaussian": "Gaussian", "gaussian_classes": "Gaussian, class-wise", "vae": "VAE", "gan": "GAN", "ot": "OT"}
SHOWN = ("vanilla, truncated", *LABELS.values(), "oracle")
DESCRIPTIONS = {
    "vanilla, truncated": "N(0, I) fed to the truncated chain.",
    "Gaussian": "One Gaussian with the moments of the training images, in closed form.",
    "Gaussian, class-wise": "One such Gaussian for each class.",
    "VAE": "Encoder and generator under the evidence bound.",
    "GAN": "The generator against a discriminator of its widths.",
    "OT": "The generator by optimal transport alone, no adversary.",
    "oracle": "Real training images, diffused: what a perfect prior would reach.",
}

Announce = Callable[[str], None]
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
    truncation_timestep: int = option(10, "T' of the table")
    timesteps: tuple[int, ...] = option((10, 50, 100, 200, 300), "T' of the curves")
    learned_timesteps: tuple[int, ...] = option((), "those T' of the curves for which learned priors are trained too")
    num_samples: int | None = option(None, "images of each row; none is as many as there are test images")
    full_steps: tuple[int, ...] = option((50, 1000), "reverse steps of the full chains")
    curve_steps: int = option(10, "reverse steps of each point of the curves, at most T'")
    max_train_steps: int | None = option(None, "updates of each prior; none is the preset's")
    seed: int = option(0, "of the models and of the starting noise")

    def __post_init__(self) -> None:
        for name in ("truncation_timestep", "curve_steps"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("timesteps", "full_steps"):
            values = getattr(self, name)
            require(all(value >= 1 for value in values), name, "hold numbers from 1", values)
        known = set(self.learned_timesteps) <= set(self.timesteps)
        require(known, "learned_timesteps", f"be among timesteps {self.timesteps}", self.learned_timesteps)
        require(self.num_samples is None or self.num_samples >= 2, "num_samples", "be at least 2", self.num_samples)
        require(self.seed >= 0, "seed", "be at least 0", self.seed)


@dataclass
class Study:
    """What every part of a study needs.

    Attributes:
        config: of the study.
        output: its folder.
        train_images, test_images: the data.
        announce: takes the lines that tell how far it is.
    """

    config: TruncationConfig
    output: Path
    train_images: Images
    test_images: Images
    announce: Announce
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        limit = min(len(self.test_images), len(self.train_images) - 2)
        self.num_samples = self.config.num_samples or limit
        most = len(self.train_images) - 2
        require(self.num_samples <= most, "num_samples", f"be at most {most}", self.num_samples)

    @property
    def denoiser(self) -> str:
        return self.config.denoiser or str(self.output / "baseline")

    @property
    def feature_extractor(self) -> str:
        return self.config.feature_extractor or str(self.output / "features")

    @property
    def evaluator(self) -> str:
        return self.config.evaluator or str(self.output / "evaluator")


def run_study(config: TruncationConfig, announce: Announce = print) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md`, `report.html` and pictures; returns the results.

    Raises:
        InputError: a folder that holds something else, a preset that does not exist.
        RuntimeError: a training script that failed, with the end of its log.
    """
    output = Path(config.output_dir)
    claim_folder(output / "study.json", settings(config), "output_dir")
    started = time.monotonic()
    data = {split: load_images(config.dataset, split) for split in ("train", "test")}
    study = Study(config, output, data["train"], data["test"], announce)

    # Train.
    train_networks(study)
    train_priors(study)

    # Sample every row of the table from the same seeds, then the curves.
    with stage(f"sample {study.num_samples} images for each row", announce):
        rows = sample_rows(study)
    with stage(f"sample the curves over T' in {config.timesteps}", announce):
        curves = sample_curves(study)

    # Evaluate with the network that no loss has seen.
    with stage("evaluate", announce):
        extractor = load_feature_extractor(study.evaluator).to(best_device())
        test, training = (describe_images(all_pixels(images), extractor) for images in (data["test"], data["train"]))
        described = {name: describe_images(row.images, extractor) for name, row in rows.items()}
        metrics = {
            name: evaluate_images(found, reference=test, extractor=extractor, train=training)
            for name, found in described.items()
        }
        floor = real_floor(test, training, study.num_samples, extractor=extractor)
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


def settings(config: TruncationConfig) -> dict[str, Any]:
    """The configuration as it reads back from JSON, without its folder."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name != "output_dir"}


def train_networks(study: Study) -> None:
    """The denoiser, the feature network and the evaluator, where the configuration names none."""
    config = study.config
    common = [f"dataset={config.dataset}", "report_to=none"]
    runs = {}
    if config.denoiser is None:
        own = [*common, f"seed={config.seed}", f"output_dir={study.denoiser}"]
        runs["baseline"] = training_command("baseline", own, config=f"{config.presets}/baseline.yaml")
    if config.feature_extractor is None:
        own = [*common, f"seed={config.seed}", f"output_dir={study.feature_extractor}"]
        runs["features"] = training_command("features", own, config=f"{config.presets}/features.yaml")
    if config.evaluator is None:
        own = [*common, f"seed={EVALUATOR_SEED + config.seed}", f"output_dir={study.evaluator}"]
        runs["evaluator"] = training_command("features", own, config=f"{config.presets}/evaluator.yaml")
    if runs:
        train(runs, study.output, "train the denoiser, the feature network and the evaluator", study.announce)


def train_priors(study: Study) -> None:
    """The priors of the table, then those of the curves."""
    config = study.config
    main = config.truncation_timestep
    closed_form = prior_runs(study, main, ("gaussian", *(["gaussian_classes"] if has_classes(study) else [])))
    train(closed_form, study.output, "fit the closed-form priors", study.announce)
    learned: dict[str, list[str]] = {}
    for step in dict.fromkeys((main, *config.learned_timesteps)):
        learned |= prior_runs(study, step, LEARNED)
    names = list(learned)
    for first in range(0, len(names), SIDE_BY_SIDE):
        group = {name: learned[name] for name in names[first : first + SIDE_BY_SIDE]}
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
        if name in LEARNED and config.max_train_steps is not None:
            options.append(f"max_train_steps={config.max_train_steps}")
        preset = f"{config.presets}/prior_{name.removesuffix('_classes')}.yaml"
        commands[run] = training_command("prior", options, config=preset)
    return commands


def run_name(name: str, truncation_timestep: int) -> str:
    """Folder of a prior's run."""
    return f"prior_{name}_{truncation_timestep}"


def has_classes(study: Study) -> bool:
    """Whether the data has labels."""
    return study.train_images.labels is not None


# --- Sampling ---------------------------------------------------------------------------------------------------------


def sample_rows(study: Study) -> dict[str, Sampled]:
    """Every row of the table, in its order."""
    main = study.config.truncation_timestep
    rows = {"vanilla, truncated": sampled(study, "vanilla", main, main)}
    length = int(load_pipeline(study.denoiser).scheduler.config.num_train_timesteps)
    for steps in study.config.full_steps:
        rows[f"vanilla, full in {steps}"] = sampled(study, "vanilla", length, steps)
    for name, label in LABELS.items():
        if is_complete(study.output / run_name(name, main)):
            rows[label] = sampled(study, name, main, main)
    return rows | {"oracle": sampled(study, "oracle", main, main)}


def sample_curves(study: Study) -> dict[str, dict[int, Sampled]]:
    """Row name to T' to images: the closed forms for every T', learned priors where they were trained."""
    curves: dict[str, dict[int, Sampled]] = {}
    names = {"vanilla": "vanilla, truncated", **LABELS, "oracle": "oracle"}
    for step in study.config.timesteps:
        for name, label in names.items():
            closed_form = name not in LEARNED and (name != "gaussian_classes" or has_classes(study))
            if closed_form or is_complete(study.output / run_name(name, step)):
                curves.setdefault(label, {})[step] = sampled(study, name, step, min(step, study.config.curve_steps))
    return curves


def sampled(study: Study, name: str, truncation_timestep: int, steps: int) -> Sampled:
    """Images by one prior, from disk if they are there."""
    file = study.output / "samples" / f"{name}_{truncation_timestep}_{steps}.safetensors"
    if file.is_file():
        with safe_open(file, framework="pt") as stored:
            cost = json.loads(stored.metadata()["cost"])
            return Sampled(stored.get_tensor("images"), cost["seconds"], cost["nfe"])
    pipeline = make_pipeline(study, name, truncation_timestep)
    pipeline(batch_size=2, num_inference_steps=1, output_type="pt")  # first calls are slow
    started = time.monotonic()
    if name == "oracle":
        images, nfe = sample_oracle(study, pipeline, steps), steps
    else:
        images = sample_images(pipeline, study.num_samples, seed=study.config.seed, num_inference_steps=steps)
        nfe = pipeline.nfe
    found = Sampled(images, time.monotonic() - started, nfe)
    file.parent.mkdir(exist_ok=True)
    cost = json.dumps({"seconds": found.seconds, "nfe": nfe})
    partial = file.with_suffix(".partial")
    save_file({"images": images.contiguous()}, partial, metadata={"cost": cost})
    partial.replace(file)
    return found


def make_pipeline(study: Study, name: str, truncation_timestep: int) -> TruncatedPriorPipeline:
    """The trained or fitted pipeline of a prior; N(0, I) before the same denoiser for `"vanilla"` and the oracle."""
    run = study.output / run_name(name, truncation_timestep)
    if is_complete(run):
        pipeline = load_pipeline(run)
    else:
        full = load_pipeline(study.denoiser)
        scheduler = truncated_scheduler(DDIMScheduler.from_config(full.scheduler.config), truncation_timestep)
        prior = closed_form_prior(study, name, truncation_timestep)
        pipeline = TruncatedPriorPipeline(prior, full.unet.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(best_device())


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def closed_form_prior(study: Study, name: str, truncation_timestep: int) -> GaussianPrior:
    """The Gaussian `name` for a T' that no run has been made for."""
    if name in ("vanilla", "oracle"):
        channels, height, width = study.train_images.image_shape
        size = height if height == width else (height, width)
        return GaussianPrior(truncation_timestep=truncation_timestep, sample_size=size, out_channels=channels)
    images = study.train_images.fetch(torch.arange(len(study.train_images)))
    labels = study.train_images.labels if name == "gaussian_classes" else None
    return GaussianPrior.from_images(images, truncation_timestep, labels=labels)


def sample_oracle(study: Study, pipeline: TruncatedPriorPipeline, steps: int) -> Tensor:
    """Images from real x_T' of evenly spaced training images, uint8 [N, C, H, W]."""
    made = []
    for rows in real_rows(study).split(1000):
        latents = truncated_samples(study.train_images.fetch(rows), rows, pipeline.scheduler, seed=study.config.seed)
        call: dict[str, Any] = {"latents": latents, "num_inference_steps": steps, "output_type": "pt"}
        (images,) = pipeline(batch_size=len(rows), **call, return_dict=False)
        made.append(to_uint8(images.cpu() * 2 - 1))
    return torch.cat(made)


def real_rows(study: Study) -> Tensor:
    """As many training images as a row has, evenly spaced."""
    return torch.linspace(0, len(study.train_images) - 1, study.num_samples).round().long()


def all_pixels(images: Images) -> Tensor:
    """A whole split, uint8 [N, C, H, W]."""
    return torch.cat([to_uint8(batch) for _, batch in images.stream(torch.arange(len(images)).split(1000))]).cpu()


# --- Results ----------------------------------------------------------------------------------------------------------


def score(row: Sampled, test: ImageSet, extractor: Any) -> dict[str, float]:
    """One point of the curves: Fréchet distance and cost."""
    found = describe_images(row.images, extractor).features
    return {
        "frechet_distance": frechet_distance(found, test.features),
        "seconds_per_1000": round(1000 * row.seconds / len(row.images), 3),
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
            "nfe": row.nfe,
            "seconds": round(row.seconds, 2),
            "seconds_per_1000": round(1000 * row.seconds / len(row.images), 3),
            "description": DESCRIPTIONS.get(name, "N(0, I) and the whole chain, by DDIM."),
        }
        for name, row in rows.items()
    }
    for name, label in LABELS.items():
        run = study.output / run_name(name, main)
        if label in arms:
            results, config = read_json(run / "results.json"), read_json(run / "run.json")["config"]
            arms[label] |= {key: results[key] for key in ("parameters", "training_seconds", "updates")}
            arms[label]["config"] = config
    evaluator = Path(study.evaluator) / "results.json"
    accuracy = {"test_accuracy": read_json(evaluator)["test_accuracy"]} if evaluator.is_file() else {}
    return {
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
        "arms": arms,
        "floor": {"metrics": dict(floor)},
        "curves": {
            name: {str(step): dict(values) for step, values in points.items()} for name, points in scored.items()
        },
        "provenance": report.provenance() | {"study": settings(study.config)},
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The table and the curves in Markdown, with extractor, dimension and N of the Fréchet distance."""
    extractor = results["extractor"]
    lead = (
        f"Fréchet distance in the {extractor['feature_dim']} features of {extractor['name']}, "
        f"{results['num_samples']} generated against {results['num_test_images']} test images of "
        f"{results['dataset']}; T' = {results['truncation_timestep']}."
    )
    headings = [report.METRICS[name].label for name in COLUMNS]
    header = ["", *headings, "NFE", "s per 1,000", "parameters", "training s"]
    costs = ("nfe", "seconds_per_1000", "parameters", "training_seconds")
    lines = [
        [name, *_cells(entry["metrics"], COLUMNS), *_cells(entry, costs)] for name, entry in results["arms"].items()
    ]
    lines.append(["real vs real", *_cells(results["floor"]["metrics"], COLUMNS), *["–"] * len(costs)])
    steps = sorted({int(step) for points in results["curves"].values() for step in points})
    curve_header = ["Fréchet at T' =", *map(str, steps)]
    curves = [
        [name, *_cells({step: point["frechet_distance"] for step, point in points.items()}, [str(s) for s in steps])]
        for name, points in results["curves"].items()
    ]
    return f"{lead}\n\n{_table(header, lines)}\n\n{_table(curve_header, curves)}\n"


def _cells(values: Mapping[str, Any], names: Any) -> list[str]:
    return [report.format_number(values.get(name)) for name in names]


def _table(header: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *rows])


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
    shown = [name for name in SHOWN if name in rows]
    samples = {"real": test.images} | {name: rows[name].images for name in shown}
    clouds = {"real": test.features} | {name: described[name].features for name in shown}
    return {
        "Samples": plots.image_panels(samples, folder / "samples.png"),
        "What the chain starts from": plots.image_panels(starts(study), folder / "starts.png"),
        "The evaluator's features in two directions, real images in grey": plots.scatter(
            clouds, folder / "features.png", basis="real"
        ),
        "Fréchet distance and sampling time against T'": draw_curves(results["curves"], folder / "curves.png"),
    }


def starts(study: Study, count: int = 36) -> dict[str, Tensor]:
    """x_T' of real images and of every prior, uint8, by name."""
    main = study.config.truncation_timestep
    shown = {}
    for name, label in {"oracle": "real x_T'", "vanilla": "vanilla", **LABELS}.items():
        if name in LABELS and not is_complete(study.output / run_name(name, main)):
            continue
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


def draw_curves(curves: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> Path:
    """Fréchet distance and seconds per 1,000 images against T', one line for each row."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    colours = plots.arm_colours(list(curves))
    panels = {"frechet_distance": "Fréchet distance", "seconds_per_1000": "seconds per 1,000 images"}
    for index, (key, label) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        for name, points in curves.items():
            values = [point[key] for point in points.values()]
            axes.plot([int(step) for step in points], values, marker="o", label=name, color=colours[name])
        axes.set_xlabel("T'")
        axes.set_title(label, loc="left", fontsize=10.5)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "frechet_distance":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = math.ceil(len(labels) / 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    return path
