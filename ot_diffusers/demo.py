"""The whole chain on handwritten digits, on the CPU, in minutes: train, sample, evaluate, report.

Four networks are trained by the scripts a user would call: the feature network and the independent evaluator side by
side, then the baseline and the OT-trained model side by side. Four arms are sampled from the same starting noise and
scored against test images by the evaluator, which no loss has seen. Then the study of priors, in a short form: the
baseline's network walks the last ten steps from noise, Gaussians, a GAN and an OT prior. A second call with the same
folder uses what is there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data import HUB_IDS, load_images, pixels_of
from .errors import require
from .evaluation import plots, report
from .evaluation.evaluate import ImageSet, describe_images, evaluate_images, real_floor
from .evaluation.extractors import evaluator_facts
from .evaluation.page import provenance
from .experiment import Announce, Sampled, claim_folder, read_json, stage, train, write_results
from .features import load_feature_extractor
from .files import user_path
from .launch import training_command
from .outgoing import without_local_paths
from .pipelines.pipeline_ot_guided_ddim import SEED_GUIDANCE
from .sampling import load_pipeline, network_calls, sample_images
from .truncation_study import TruncationConfig, run_study

DATASET = "digits"
NUM_SAMPLES = 540  # as many as there are test images
NUM_INFERENCE_STEPS = 50
EVALUATOR_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """One way to make images.

    Attributes:
        run: folder of the trained model, under the demo's.
        description: a sentence for the report.
        features: whether the feature network and its bank are put beside the model.
        call: arguments of the pipeline's call.
        batch_size: images at once, at most; None for all.
    """

    run: str
    description: str
    features: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None


ARMS = {
    "baseline": Arm("baseline", "Noise prediction alone, plain DDIM."),
    "OT-trained": Arm(
        "ot",
        "Trained with the transport term between features of predicted and of real images, plain DDIM.",
        call={"guidance_scale": 0},
    ),
    "OT-guided": Arm(
        "baseline", "The baseline's network; transport guidance by features and pixels in every step.", features=True
    ),
    "source guidance": Arm(
        "baseline",
        "The baseline's network; the source study's guidance: the first 10 of 50 steps, raw features.",
        features=True,
        call=SEED_GUIDANCE,
        batch_size=135,  # 4 equal batches of about the source's 128; a transport problem in raw features is costly
    ),
}


def run_demo(
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    overrides: Sequence[str] = (),
    num_samples: int = NUM_SAMPLES,
    announce: Announce = print,
) -> dict[str, Any]:
    """Run the chain and write `results.json`, pictures and `report.html` into `output`, and the same of the priors into
    `output/truncation`; returns the results of the first.

    Args:
        output: folder that is new, empty, or of an earlier call with the same arguments.
        seed: of the models and of the starting noise; the evaluator's is different.
        overrides: `key=value` for all training scripts, such as `max_train_steps=4`.
        num_samples: images of each arm.
        announce: takes the lines that tell how far it is.

    Raises:
        InputError: a folder that holds something else.
        RuntimeError: a training script that failed, with the end of its log.
    """
    output = user_path(output)
    require(seed >= 0, "seed", "be at least 0", seed)
    claim_folder(output / "demo.json", {"seed": seed, "overrides": list(overrides)})
    started = time.monotonic()

    # Train.
    runs = training_runs(output, seed, overrides)
    for title, names in {
        "train the feature network and the evaluator": ("features", "evaluator"),
        "train the baseline and the OT model": ("baseline", "ot"),
    }.items():
        train({name: runs[name] for name in names}, output, title, announce)

    # Sample every arm from the same noise.
    with stage(f"sample {len(ARMS)} × {num_samples} images", announce):
        samples = {name: sample_arm(arm, output, num_samples, seed) for name, arm in ARMS.items()}

    # Evaluate with the network that no loss has seen.
    with stage("evaluate", announce):
        evaluator = load_feature_extractor(str(output / "evaluator"))
        test_images = load_images(DATASET, "test")
        test = describe_images(pixels_of(test_images), evaluator, labels=test_images.labels)
        train_images = describe_images(pixels_of(load_images(DATASET, "train")), evaluator)
        described = {name: describe_images(sampled.images, evaluator) for name, sampled in samples.items()}
        metrics = {
            name: evaluate_images(found, reference=test, extractor=evaluator, train=train_images)
            for name, found in described.items()
        }
        floor = real_floor(test, train_images, num_samples, extractor=evaluator)

    # Report.
    with stage("write the report", announce):
        facts = evaluator_facts(evaluator, test)
        results = collect(output, samples, metrics, floor, facts, seed, overrides)
        write_results(results, output)
        pictures = draw(results, samples, described, test, output)
        report.write_report(results, pictures, output / "report.html")
    announce(f"\n{report.text_table(results)}\n")
    run_study(truncation_config(output, num_samples, seed), announce, overrides=overrides)
    announce(f"{time.monotonic() - started:.0f} s in all. Pictures and numbers: {output / 'report.html'}")
    return results


def truncation_config(output: Path, num_samples: int, seed: int) -> TruncationConfig:
    """The study of priors on the demo's networks: its table without the VAE, without the longest chain and without the
    curves over T'."""
    return TruncationConfig(
        output_dir=str(output / "truncation"),
        dataset=DATASET,
        presets=DATASET,
        denoiser=str(output / "baseline"),
        feature_extractor=str(output / "features"),
        evaluator=str(output / "evaluator"),
        priors=("gaussian", "gaussian_classes", "gan", "ot"),
        timesteps=(),
        full_steps=(NUM_INFERENCE_STEPS,),
        num_samples=num_samples,
        batch_size=135,
        seed=seed,
    )


# --- Training ---------------------------------------------------------------------------------------------------------


def training_runs(output: Path, seed: int, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Name of each run to the command that trains it into the demo's folder."""

    def command(script: str, name: str, *own: str) -> list[str]:
        placed = [f"output_dir={output / name}", "report_to=none", *own, *overrides]
        return training_command(script, placed, config=f"{DATASET}/{name}.yaml")

    return {
        "features": command("features", "features", f"seed={seed}"),
        "evaluator": command("features", "evaluator", f"seed={EVALUATOR_SEED + seed}"),
        "baseline": command("baseline", "baseline", f"seed={seed}"),
        "ot": command("ot", "ot", f"seed={seed}", f"feature_extractor={output / 'features'}"),
    }


# --- Sampling and results ---------------------------------------------------------------------------------------------


def sample_arm(arm: Arm, output: Path, num_samples: int, seed: int) -> Sampled:
    """Images of one arm; image i of every arm starts from the same noise."""
    pipeline = load_pipeline(output / arm.run, features=output / "features" if arm.features else None)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": NUM_INFERENCE_STEPS, **arm.call}
    started = time.monotonic()
    images = sample_images(pipeline, num_samples, batch_size=arm.batch_size, seed=seed, **call)
    return Sampled(images, time.monotonic() - started, network_calls(pipeline))


def collect(
    output: Path,
    samples: Mapping[str, Sampled],
    metrics: Mapping[str, Mapping[str, float]],
    floor: Mapping[str, float],
    evaluator: Mapping[str, Any],
    seed: int,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """The contents of `results.json`."""
    runs = {name: read_json(output / name / "results.json") for name in training_runs(output, seed, overrides)}
    configs = {f"{name} run": read_json(output / name / "run.json")["config"] for name in runs}
    arms = {
        name: {"metrics": metrics[name], **sampled.cost, "description": ARMS[name].description}
        for name, sampled in samples.items()
    }
    return {
        "title": "Optimal transport in diffusion models: handwritten digits",
        "dataset": DATASET,
        "dataset_hub_id": HUB_IDS[DATASET],
        "num_samples": len(next(iter(samples.values())).images),
        "extractor": dict(evaluator),
        "arms": arms,
        "floor": {"metrics": floor},
        "provenance": provenance()
        | {
            "seed": seed,
            "evaluator's seed": configs["evaluator run"]["seed"],
            "training seconds": ", ".join(f"{name} {run['training_seconds']:.0f}" for name, run in runs.items()),
            "sampling": {name: {"num_inference_steps": NUM_INFERENCE_STEPS, **arm.call} for name, arm in ARMS.items()},
        }
        | without_local_paths(configs),
    }


def draw(
    results: Mapping[str, Any],
    samples: Mapping[str, Sampled],
    described: Mapping[str, ImageSet],
    test: ImageSet,
    output: Path,
) -> dict[str, Path]:
    """The report's pictures, caption to file."""
    panels = {"real": test.images} | {name: samples[name].images for name in ("baseline", "OT-trained", "OT-guided")}
    losses = {"baseline": "baseline", "OT-trained": "ot"}
    histories = {arm: plots.read_history(output / run / "metrics.jsonl") for arm, run in losses.items()}
    clouds = {"real": test.features} | {name: found.features for name, found in described.items()}
    return {
        "Samples": plots.image_panels(panels, output / "grid.png"),
        "Fréchet distance": plots.bars(results, "frechet_distance", output / "frechet_distance.png"),
        "Patch sliced Wasserstein distance, in pixels": plots.bars(
            results, "patch_sliced_wasserstein", output / "patch_sliced_wasserstein.png"
        ),
        "The evaluator's features in two directions, real images in grey": plots.scatter(
            clouds, output / "features.png", basis="real"
        ),
        "Losses": plots.loss_curves(histories, output / "loss_curves.png"),
    }
