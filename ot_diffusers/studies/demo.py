"""Train, sample, evaluate and report on handwritten digits, on the CPU, in minutes.

The first study is `configs/digits/demo.yaml` with one random seed: a baseline in fifty calls, a network of coupled
pairs in four calls, and guidance of both. The second is a short study of priors: the baseline's network runs the last
ten steps from noise, Gaussians, a GAN and an OT prior. A second call with the same folder reuses everything that is
complete.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import StudyConfig, read_config
from .run import run_study
from .study import Log, Study
from .truncation import TruncationConfig, run_truncation_study

PRIORS = "truncation"
"""Folder of the study of priors."""


def run_demo(
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    overrides: Sequence[str] = (),
    num_samples: int | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Write `results.json`, pictures and `report.html` into `output`, and those of the priors into `output/truncation`;
    returns the results of the first study.

    Args:
        output: a new or empty folder, or the folder of an earlier call with the same arguments.
        seed: random seed for models and starting noise; the seed of the evaluator is different.
        overrides: `key=value` for all training scripts, such as `max_train_steps=4`.
        num_samples: number of images of each variant; by default the number of test images.
        log: takes the progress messages.

    Raises:
        InputError: a folder that contains something else.
        RuntimeError: a training script that failed, with the end of its log.
    """

    def link_priors(_: Study, __: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
        return {"links": {"The study of priors": f"{PRIORS}/report.html"}}, {}

    started = time.monotonic()
    config = dataclasses.replace(
        read_config("digits/demo.yaml", []),
        output_dir=str(output),
        seed=seed,
        overrides=tuple(overrides),
        num_samples=num_samples,
    )
    results = run_study(config, log=log, extend=link_priors)
    run_truncation_study(priors_of(config), log, overrides=overrides)
    log(f"{time.monotonic() - started:.0f} s in total. The report: {Path(config.output_dir) / 'report.html'}")
    return results


def priors_of(config: StudyConfig) -> TruncationConfig:
    """The study of priors on the networks of the demo, without the VAE, the longest chain and the curves over T'."""
    folder = Path(config.output_dir)
    return TruncationConfig(
        output_dir=str(folder / PRIORS),
        denoiser=str(folder / "baseline"),
        feature_extractor=str(folder / "features"),
        evaluator=str(folder / "evaluator"),
        priors=("gaussian", "gaussian_classes", "gan", "ot"),
        timesteps=(),
        full_steps=(50,),
        num_samples=config.num_samples,
        batch_size=135,
        seed=config.seed or 0,
    )
