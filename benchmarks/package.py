"""The time of imports."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from .timing import Row, fresh_process_seconds, ratio_row


def rows(quick: bool, device: torch.device) -> list[Row]:
    repeats = 3 if quick else 5
    plain = [sys.executable, "-c", "from diffusers import DiffusionPipeline, ModelMixin"]
    ours = [sys.executable, "-c", "from ot_diffusers import OTGuidedDDIMPipeline, TruncatedPriorPipeline"]
    bare = [sys.executable, "-c", "import ot_diffusers"]
    seconds = {
        name: fresh_process_seconds(command, repeats + 1)[1:]
        for name, command in {"diffusers": plain, "both pipelines": ours, "import ot_diffusers": bare}.items()
    }
    command = str(Path(sys.executable).parent / "ot-diffusers")
    shown = fresh_process_seconds([command, "--help"], repeats)
    return [
        ratio_row("importing our pipelines / importing diffusers'", seconds, "both pipelines", "diffusers", target=1.1),
        ratio_row(
            "import ot_diffusers / importing diffusers' pipeline",
            seconds,
            "import ot_diffusers",
            "diffusers",
            target=1.1,
        ),
        Row("ot-diffusers --help", statistics.median(shown), (min(shown), max(shown)), target=0.5, unit=" s"),
    ]
