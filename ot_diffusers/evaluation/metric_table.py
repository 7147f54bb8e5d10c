"""What every metric is called, which direction is better, and what it means; and what the costs are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: short column heading.
        title: full name, for pictures.
        better: which direction is better; `"floor"` means nearer to the real-vs-real score.
        meaning: one sentence for the reader.
    """

    label: str
    title: str
    better: Literal["lower", "higher", "floor"]
    meaning: str


METRICS = {
    "frechet_distance": Metric(
        "Fréchet", "Fréchet distance", "lower", "Distance between Gaussian fits in feature space (as in FID)."
    ),
    "frechet_distance_infinity": Metric(
        "Fréchet∞",
        "Fréchet distance, extrapolated",
        "lower",
        "The same, extrapolated to infinitely many samples: about 0, of either sign, for equal distributions.",
    ),
    "sinkhorn_distance": Metric(
        "Sinkhorn", "Sinkhorn divergence", "lower", "Sinkhorn divergence of features on the unit sphere, blur 0.05."
    ),
    "sinkhorn_distance_scaled": Metric(
        "Sinkhorn, scaled",
        "Sinkhorn divergence, scaled features",
        "lower",
        "The same, with features scaled to a median distance of 1.",
    ),
    "kernel_distance": Metric(
        "Kernel",
        "Kernel distance",
        "lower",
        "Unbiased squared MMD with a cubic kernel (as in KID): about 0, of either sign, for equal distributions.",
    ),
    "precision": Metric("Precision", "Precision", "higher", "Share of the samples that lie near a real image."),
    "recall": Metric("Recall", "Recall", "higher", "Share of the real images that lie near a sample."),
    "density": Metric(
        "Density", "Density", "higher", "Mean number of real neighbourhoods around a sample; 1 for equal distributions."
    ),
    "coverage": Metric(
        "Coverage", "Coverage", "higher", "Share of the real neighbourhoods that contain at least one sample."
    ),
    "precision_distance": Metric(
        "Precision dist.", "Precision distance", "lower", "Mean distance from a sample to the nearest real image."
    ),
    "recall_distance": Metric(
        "Recall dist.", "Recall distance", "lower", "Mean distance from a real image to the nearest sample."
    ),
    "nearest_distance_ratio": Metric(
        "Memorisation",
        "Memorisation ratio",
        "floor",
        "Median distance to the nearest training image, over that of unseen real images; 0 for copies.",
    ),
    "effective_rank": Metric(
        "Effective rank", "Effective rank", "floor", "Number of feature directions that the samples use."
    ),
    "principal_spread": Metric(
        "Spread",
        "Spread",
        "floor",
        "Area in the two main principal directions of real images, over that of real images.",
    ),
    "class_histogram_distance": Metric(
        "Class histogram", "Class histogram distance", "lower", "Total variation between the predicted class shares."
    ),
    "class_accuracy": Metric(
        "Class accuracy", "Class accuracy", "higher", "Share of the samples that the evaluator puts into their class."
    ),
    "class_frechet_distance": Metric(
        "Class Fréchet",
        "Fréchet distance within classes",
        "lower",
        "Mean over the classes of the distance within each.",
    ),
    "patch_sliced_wasserstein": Metric(
        "Patch SW", "Patch sliced-Wasserstein", "lower", "Squared sliced Wasserstein distance of 7×7 pixel patches."
    ),
    "spectrum_distance": Metric(
        "Spectrum", "Spectrum distance", "lower", "Mean difference of log₁₀ power over spatial frequencies."
    ),
    "speckle_share": Metric("Speckle", "Speckle share", "floor", "Share of grey pixels that belong to no stroke."),
    "laplacian_response": Metric(
        "Laplacian",
        "Laplacian response",
        "floor",
        "Mean local contrast; more than in real images means noise, less means blur.",
    ),
}

SECOND = {f"second_{name}": name for name in ("frechet_distance", "recall_distance", "precision_distance")}
"""Metrics by the second evaluator, to the metric that each of them repeats."""
METRICS |= {
    second: Metric(
        f"{METRICS[name].label}, 2nd",
        f"{METRICS[name].title} by the second evaluator",
        METRICS[name].better,
        "The same by the second evaluator.",
    )
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

OF_CLASSES = ("class_accuracy", "class_frechet_distance")
"""Metrics of images whose classes are known; short tables of such images have them too."""

COSTS = {
    "nfe": "NFE",
    "seconds": "seconds",
    "seconds_per_1000": "s per 1,000",
    "parameters": "parameters",
    "training_seconds": "training s",
    "updates": "training steps",
}
"""Costs of a method, with their column headings."""

COST_TITLES = COSTS | {
    "nfe": "Number of function evaluations",
    "seconds": "Seconds of sampling",
    "seconds_per_1000": "Seconds per 1,000 images",
    "training_seconds": "Seconds of training",
}
"""The same in full, for pictures."""
