"""Draws docs/hero.png from the models in this repository and their recorded scores: `make hero`, minutes on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from torch import Tensor

from ot_diffusers.evaluation.metric_table import METRICS
from ot_diffusers.reporting.report import format_number
from ot_diffusers.sampling import load_pipeline, sample_images

ROOT = Path(__file__).parents[1]
JOINT_BATCH = 100
ROWS, COLUMNS, PIXELS, GAP = 3, 6, 112, 6
METRIC = "frechet_distance"


class Row(NamedTuple):
    """A model, and the two rows of a file of results that hold its scores without and with guidance."""

    title: str
    pipeline: str
    features: str | None
    results: str
    plain: str
    guided: str
    num_inference_steps: int = 50


PICTURE = (
    Row("MNIST", "model_cards/mnist-ot-guided", None, "docs/mnist/compare.json", "baseline", "OT-guided"),
    Row(
        "CIFAR-10", "docs/cifar10/study/baseline_full", "docs/cifar10/study/features", "docs/cifar10/truncation.json",
        "vanilla, full in 50", "vanilla, full in 50, guided",
    ),
)  # fmt: skip


def main() -> None:
    figure = Figure(figsize=(13, 3.75 * len(PICTURE)), layout=ConstrainedLayoutEngine(wspace=0.04))
    for line, row in enumerate(PICTURE):
        scores = json.loads((ROOT / row.results).read_text(encoding="utf-8"))["arms"]
        for column, (name, arm, options) in enumerate(
            (("plain", row.plain, {"guidance_scale": 0}), ("guided", row.guided, {}))
        ):
            axes = figure.add_subplot(len(PICTURE), 2, 2 * line + column + 1)
            axes.imshow(mosaic(draw(row, options)), interpolation="none")
            axes.set_axis_off()
            score = format_number(scores[arm]["metrics"][METRIC])
            axes.set_title(f"{row.title}, {name}", fontsize=19, fontweight="bold", loc="left")
            axes.set_title(f"{METRICS[METRIC].label} {score} (lower is better)", fontsize=14, loc="right")
    figure.savefig(ROOT / "docs/hero.png", dpi=110)


def draw(row: Row, options: dict[str, Any]) -> Tensor:
    """The first images of a joint batch from the noise of random seed 0, uint8."""
    pipeline = load_pipeline(ROOT / row.pipeline, ROOT / row.features if row.features else None)
    call = {"num_inference_steps": row.num_inference_steps, **options}
    images = sample_images(pipeline, JOINT_BATCH, batch_size=JOINT_BATCH, dtype="bfloat16", **call)
    return images[: ROWS * COLUMNS]


def mosaic(images: Tensor) -> np.ndarray:
    """Images side by side, each enlarged smoothly."""
    side = PIXELS + GAP
    canvas = Image.new("RGB", (COLUMNS * side - GAP, ROWS * side - GAP), "white")
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        picture = Image.fromarray(image.repeat(3, axis=2) if image.shape[2] == 1 else image)
        place = (index % COLUMNS * side, index // COLUMNS * side)
        canvas.paste(picture.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS), place)
    return np.asarray(canvas)


if __name__ == "__main__":
    main()
