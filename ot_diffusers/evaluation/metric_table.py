"""What every metric is called, which direction is better, and what it means; and what the costs are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: short column heading.
        better: which direction is better; `"floor"` means nearer to what real images score.
        meaning: one sentence for the reader.
    """

    label: str
    better: Literal["lower", "higher", "floor"]
    meaning: str


METRICS = {
    "frechet_distance": Metric("Fréchet", "lower", "Distance of the Gaussian fits in feature space (FID)."),
    "frechet_distance_infinity": Metric(
        "Fréchet∞", "lower", "The same extrapolated to infinitely many samples; about 0 for equal distributions."
    ),
    "sinkhorn_distance": Metric("Sinkhorn", "lower", "Sinkhorn divergence on the unit sphere, blur 0.05."),
    "sinkhorn_distance_scaled": Metric("Sinkhorn, scaled", "lower", "The same with features at median distance 1."),
    "kernel_distance": Metric("Kernel", "lower", "Squared MMD with a cubic kernel (KID), unbiased."),
    "precision": Metric("Precision", "higher", "Share of the samples that lie near a real image."),
    "recall": Metric("Recall", "higher", "Share of the real images that lie near a sample."),
    "density": Metric("Density", "higher", "How many real neighbourhoods hold a sample, 1 for equal distributions."),
    "coverage": Metric("Coverage", "higher", "Share of real neighbourhoods that hold a sample."),
    "precision_distance": Metric("Precision dist.", "lower", "Mean distance from a sample to the nearest real image."),
    "recall_distance": Metric("Recall dist.", "lower", "Mean distance from a real image to the nearest sample."),
    "nearest_distance_ratio": Metric(
        "Memorisation", "floor", "Distance to the nearest training image over that of fresh real ones; 0 for copies."
    ),
    "effective_rank": Metric("Effective rank", "floor", "How many feature directions the samples use."),
    "principal_spread": Metric(
        "Spread", "floor", "Area in the two leading principal directions of real images, over theirs."
    ),
    "class_histogram_distance": Metric("Class histogram", "lower", "Total variation of the predicted class shares."),
    "patch_sliced_wasserstein": Metric("Patch SW", "lower", "Sliced Wasserstein distance of 7×7 pixel patches."),
    "spectrum_distance": Metric("Spectrum", "lower", "Mean difference of log₁₀ power over spatial frequencies."),
    "speckle_share": Metric("Speckle", "floor", "Share of grey pixels away from any stroke."),
    "laplacian_response": Metric("Laplacian", "floor", "Mean local contrast; above real images noise, below blur."),
}  # fmt: skip

SECOND = {f"second_{name}": name for name in ("frechet_distance", "recall_distance", "precision_distance")}
"""Those of a second evaluator, to what it measures."""
METRICS |= {
    second: Metric(f"{METRICS[name].label}, 2nd", METRICS[name].better, "The same by the second evaluator.")
    for second, name in SECOND.items()
}

HEADLINE = (
    "frechet_distance",
    "sinkhorn_distance",
    "precision",
    "recall",
    "nearest_distance_ratio",
    "patch_sliced_wasserstein",
)
"""The metrics of the short tables, unless the results name others."""

COSTS = {
    "nfe": "NFE",
    "seconds": "seconds",
    "seconds_per_1000": "s per 1,000",
    "parameters": "parameters",
    "training_seconds": "training s",
    "updates": "updates",
}
"""Keys of an arm that are costs, with their headings."""
