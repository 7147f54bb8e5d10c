"""Shared by the commands: their process, its device, and the arguments that they pass on."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from ..errors import InputError, require
from ..launch.script import plain_warnings

SAMPLING_ARGUMENTS = (
    "num_inference_steps",
    "class_guidance_scale",
    "guidance_scale",
    "num_guidance_steps",
    "guidance_start_step",
)
"""Options that are passed on to the pipeline's call where they are given."""


def data_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options of `load_images` that the user gave."""
    from ..data import DATA_OPTIONS

    return {name: value for name in DATA_OPTIONS if (value := getattr(arguments, name, None)) is not None}


def call_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call: the original study's guidance, if asked for, and those that the user gave."""
    given = {name: getattr(arguments, name) for name in SAMPLING_ARGUMENTS if getattr(arguments, name) is not None}
    if not arguments.seed_recipe:
        return given
    from ..pipelines.pipeline_ot_guided_ddim import ORIGINAL_GUIDANCE

    return ORIGINAL_GUIDANCE | given


def chosen_dtype(name: str | None) -> str:
    """The named dtype, or that of `accelerate launch --mixed_precision`; float32 without either.

    Raises:
        InputError: the two differ.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    launched = {"no": None, "fp16": "float16", "bf16": "bfloat16"}.get(precision, precision)
    require(
        launched is None or name in (None, launched),
        "dtype",
        f"be left out or {launched}, which the launcher has set",
        name,
    )
    return name or launched or "float32"


def chosen_device(name: str | None) -> Any:
    """The named device, or accelerate's choice for this process."""
    import torch

    from ..sampling import process_state

    if name is None:
        return process_state().device
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device) + 1)  # a device such as meta holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"`device` must be a device of this machine, such as cpu or cuda, got {name!r}") from error
    return device


def stop_on_sigterm() -> None:
    """Let SIGTERM exit like an interrupt, so that the scripts that were started are stopped too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def prepare_libraries() -> None:
    """Settings that must precede the import of libraries; their progress bars are switched off."""
    # Waiting threads that spin take the core from whoever works.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    plain_warnings()
    from diffusers.utils import logging

    logging.disable_progress_bar()
