"""From images to the table of metrics: features once, then every metric.

reference = describe_images(test_images, evaluator)
train = describe_images(train_images, evaluator)
metrics = evaluate_images(samples, reference=reference, extractor=evaluator, train=train)
floor = real_floor(reference, train, len(samples), extractor=evaluator)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..images import to_model_range
from . import metrics, pixels

BATCH_SIZE = 512


@dataclass(frozen=True)
class ImageSet:
    """Images and what the feature network says of them, so that a fixed set passes through it once.

    Attributes:
        images: uint8 [N, C, H, W].
        features: [N, D], on the CPU.
        logits: [N, classes], on the CPU; None for a network without a classifier.
    """

    images: Tensor
    features: Tensor
    logits: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


def describe_images(images: Tensor, extractor: Any, *, batch_size: int = BATCH_SIZE, name: str = "images") -> ImageSet:
    """Pass uint8 images [N, C, H, W] through `extractor`, in evaluation mode and without gradients.

    Args:
        images: uint8 [N, C, H, W].
        extractor: a module with `extract(images in [-1, 1]) -> features [B, D]` and, for class histograms,
            `logits(images)`.
        batch_size: images in one pass; the features do not depend on it.
        name: what an error calls the images.
    """
    _check_images(images, name)
    parameter = next(extractor.parameters())
    was_training = extractor.training
    extractor.eval()
    features, logits = [], []
    try:
        with torch.no_grad():
            for batch in images.split(batch_size):
                batch = to_model_range(batch).to(device=parameter.device, dtype=parameter.dtype)
                features.append(extractor.extract(batch).float().cpu())
                if hasattr(extractor, "logits"):
                    logits.append(extractor.logits(batch).float().cpu())
    finally:
        extractor.train(was_training)
    return ImageSet(images.cpu(), torch.cat(features), torch.cat(logits) if logits else None)


def evaluate_images(
    images: Tensor | ImageSet,
    *,
    reference: Tensor | ImageSet,
    extractor: Any,
    train: Tensor | ImageSet | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> dict[str, float]:
    """Every metric of generated images against real ones.

    Args:
        images: generated, uint8 [N, C, H, W].
        reference: real and held out, uint8 [M, C, H, W]. Hand in `describe_images(…)` to score several sets against it.
        extractor: the evaluation network, see `describe_images`; one that no loss has seen.
        train: what the model was trained on; adds the memorisation check `nearest_distance_ratio`.
        batch_size: images in one pass of the network.
        seed: decides the random subsets, patches and directions; keep it equal across arms.

    Returns:
        Metric name to value; `report.METRICS` says what each name means and which direction is better.

    Raises:
        InputError: images that are not uint8, differ in shape from the reference, or are all one constant.
    """
    images = _described(images, extractor, batch_size, "images")
    reference = _described(reference, extractor, batch_size, "reference")
    shape = tuple(reference.images.shape[1:])
    require(tuple(images.images.shape[1:]) == shape, "images", f"have the reference's shape {shape}", _shape(images))
    values = feature_metrics(images, reference, seed=seed)
    if train is not None:
        train = _described(train, extractor, batch_size, "train")
        values["nearest_distance_ratio"] = metrics.nearest_distance_ratio(
            images.features, train.features, reference.features
        )
    return values | pixel_metrics(images.images, reference.images, seed=seed)


def feature_metrics(images: ImageSet, reference: ImageSet, *, seed: int = 0) -> dict[str, float]:
    """The metrics that need features and logits only."""
    pair = images.features, reference.features
    precision, recall = metrics.precision_recall(*pair)
    density, coverage = metrics.density_coverage(*pair)
    values = {
        "frechet_distance": metrics.frechet_distance(*pair),
        "sinkhorn_distance": metrics.sinkhorn_distance(*pair),
        "sinkhorn_distance_scaled": metrics.sinkhorn_distance(*pair, normalize="median"),
        "kernel_distance": metrics.kernel_distance(*pair, seed=seed),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        "precision_distance": metrics.precision_distance(*pair),
        "recall_distance": metrics.recall_distance(*pair),
        "effective_rank": metrics.effective_rank(images.features),
    }
    if images.logits is not None and reference.logits is not None:
        values["class_histogram_distance"] = metrics.class_histogram_distance(images.logits, reference.logits)
    return values


def pixel_metrics(images: Tensor, reference: Tensor, *, seed: int = 0) -> dict[str, float]:
    """The pixel-space checks of uint8 images against uint8 real ones."""
    images, reference = to_model_range(images), to_model_range(reference)
    return {
        "patch_sliced_wasserstein": pixels.patch_sliced_wasserstein(images, reference, seed=seed),
        "spectrum_distance": pixels.spectrum_distance(images, reference),
        "speckle_share": pixels.speckle_share(images),
        "laplacian_response": pixels.laplacian_response(images),
    }


def real_floor(
    test: Tensor | ImageSet,
    train: Tensor | ImageSet,
    num_samples: int,
    *,
    extractor: Any,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> dict[str, float]:
    """What real images score: `num_samples` different training images, as if a model had generated them.

    The memorisation check measures them against the training images that were not drawn.

    Args:
        test: the reference of `evaluate_images`.
        train: real images to draw from, more than `num_samples` of them.
        num_samples: as many as the arms generate, because every metric depends on it.
        extractor, batch_size, seed: as in `evaluate_images`; `seed` also decides the draw.
    """
    train = _described(train, extractor, batch_size, "train")
    enough = 2 <= num_samples <= len(train) - 2
    require(enough, "num_samples", f"be from 2 to {len(train) - 2}, two fewer than the training images", num_samples)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    drawn, rest = (_rows(train, rows) for rows in order.tensor_split([num_samples]))
    return evaluate_images(drawn, reference=test, extractor=extractor, train=rest, batch_size=batch_size, seed=seed)


def _described(images: Tensor | ImageSet, extractor: Any, batch_size: int, name: str) -> ImageSet:
    if isinstance(images, ImageSet):
        return images
    return describe_images(images, extractor, batch_size=batch_size, name=name)


def _rows(images: ImageSet, rows: Tensor) -> ImageSet:
    logits = None if images.logits is None else images.logits[rows]
    return ImageSet(images.images[rows], images.features[rows], logits)


def _shape(images: ImageSet) -> tuple[int, ...]:
    return tuple(images.images.shape[1:])


def _check_images(images: Tensor, name: str) -> None:
    good = isinstance(images, Tensor) and images.ndim == 4 and images.dtype == torch.uint8
    require(good, name, "be a uint8 tensor [N, C, H, W]", metrics.tensor_summary(images))
    require(len(images) >= 2, name, "hold at least 2 images", len(images))
    first = images[0, 0, 0, 0]
    require(bool((images != first).any()), name, "not be constant", int(first))
