"""The whole chain on handwritten digits, on the CPU, in minutes: train, sample, evaluate, report.

The study `configs/digits/demo.yaml` with one random seed: a baseline, the same with the transport term, and guidance.
Then the study of priors, in a short form: the baseline's network walks the last ten steps from noise, Gaussians, a GAN
and an OT prior. A second call with the same folder uses what is there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reporting.report import text_table
from .config import StudyConfig, read_config
from .run import run_study
from .study import Log
from .truncation import TruncationConfig, run_truncation_study


def run_demo(
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    overrides: Sequence[str] = (),
    num_samples: int | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Run the chain and write `results.json`, pictures and `report.html` into `output`, and the same of the priors into
    `output/truncation`; returns the results of the first.

    Args:
        output: folder that is new, empty, or of an earlier call with the same arguments.
        seed: of the models and of the starting noise; the evaluator's is different.
        overrides: `key=value` for all training scripts, such as `max_train_steps=4`.
        num_samples: images of each variant; as many as there are test images by default.
        log: takes the lines that tell how far it is.

    Raises:
        InputError: a folder that holds something else.
        RuntimeError: a training script that failed, with the end of its log.
    """
    started = time.monotonic()
    config = dataclasses.replace(
        read_config("digits/demo.yaml", []),
        output_dir=str(output),
        seed=seed,
        overrides=tuple(overrides),
        num_samples=num_samples,
    )
    results = run_study(config, log=log, table=text_table)
    run_truncation_study(priors_of(config), log, overrides=overrides)
    log(f"{time.monotonic() - started:.0f} s in all. Pictures and numbers: {Path(config.output_dir) / 'report.html'}")
    return results


def priors_of(config: StudyConfig) -> TruncationConfig:
    """The study of priors on the demo's networks: its table without the VAE, without the longest chain and without the
    curves over T'."""
    folder = Path(config.output_dir)
    return TruncationConfig(
        output_dir=str(folder / "truncation"),
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
