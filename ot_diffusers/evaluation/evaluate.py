"""From images to the table of metrics: features once, then every metric.

reference = describe_images(test_images, evaluator)
train = describe_images(train_images, evaluator)
metrics = evaluate_images(samples, reference=reference, extractor=evaluator, train=train)
floor = real_floor(reference, train, len(samples), extractor=evaluator)
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError, require
from ..features import cache_folder, save_aside, weights_fingerprint
from ..images import to_model_range
from . import metrics as feature_metrics
from . import pixels

BATCH_SIZE = 512


@dataclass(frozen=True)
class ImageSet:
    """Images and what the feature network says of them, so that a fixed set passes through it once.

    Attributes:
        images: uint8 [N, C, H, W].
        features: [N, D], on the CPU.
        logits: [N, classes], on the CPU; None for a network without a classifier.
        extractor: fingerprint of the network, so that features of different ones are not compared; None for unknown.
    """

    images: Tensor
    features: Tensor
    logits: Tensor | None
    extractor: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: Tensor | slice) -> ImageSet:
        """Some of the images."""
        logits = None if self.logits is None else self.logits[rows]
        return ImageSet(self.images[rows], self.features[rows], logits, self.extractor)


def describe_images(
    images: Tensor, extractor: Any, *, batch_size: int = BATCH_SIZE, cache: bool = False, name: str = "images"
) -> ImageSet:
    """Pass uint8 images [N, C, H, W] through `extractor`, in evaluation mode and without gradients.

    Args:
        images: uint8 [N, C, H, W].
        extractor: a module with `extract(images in [-1, 1]) -> features [B, D]` and, for class histograms,
            `logits(images)`.
        batch_size: images in one pass; the features do not depend on it.
        cache: for fixed sets: keep what the network says in the cache folder, under a hash of pixels and weights, and
            take it from there when the same images come back.
        name: what an error calls the images.
    """
    _check_images(images, name)
    fingerprint = weights_fingerprint(extractor)
    if cache:
        file = _cache_file(images, fingerprint)
        if not file.is_file():
            save_aside(_run(extractor, images, batch_size), file)
        found = load_file(file)
    else:
        found = _run(extractor, images, batch_size)
    return ImageSet(images.cpu(), found["features"], found.get("logits"), fingerprint)


def _run(extractor: Any, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Features and, where there is a classifier, logits on the CPU; the network's mode is left as it was."""
    parameter = next(extractor.parameters())
    was_training = extractor.training
    extractor.eval()
    outputs: dict[str, list[Tensor]] = {"features": [], "logits": []}
    try:
        with torch.no_grad():
            for batch in images.split(batch_size):
                batch = to_model_range(batch).to(device=parameter.device, dtype=parameter.dtype)
                outputs["features"].append(extractor.extract(batch).float().cpu())
                if hasattr(extractor, "logits"):
                    outputs["logits"].append(extractor.logits(batch).float().cpu())
    finally:
        extractor.train(was_training)
    return {name: torch.cat(parts) for name, parts in outputs.items() if parts}


def _cache_file(images: Tensor, fingerprint: str) -> Path:
    digest = hashlib.sha256(f"{fingerprint} {tuple(images.shape)}".encode())
    digest.update(images.cpu().contiguous().numpy().data)
    return cache_folder() / "descriptions" / f"{digest.hexdigest()}.safetensors"


@dataclass(frozen=True)
class Comparison:
    """Generated images beside real ones, with what several metrics share computed once, when it is first asked for.

    Attributes:
        images: generated.
        reference: real and held out.
        train: what the model was trained on, if that is known.
        seed: decides the random subsets, patches and directions.
    """

    images: ImageSet
    reference: ImageSet
    train: ImageSet | None
    seed: int

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        return self.images.features, self.reference.features

    @property
    def logits(self) -> tuple[Tensor, Tensor] | None:
        found = self.images.logits, self.reference.logits
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Both sets as floats in [-1, 1]."""
        return to_model_range(self.images.images), to_model_range(self.reference.images)

    @cached_property
    def precision_recall(self) -> feature_metrics.PrecisionRecall:
        return feature_metrics.precision_recall(*self.features)

    @cached_property
    def density_coverage(self) -> feature_metrics.DensityCoverage:
        return feature_metrics.density_coverage(*self.features)

    def class_histogram_distance(self) -> float | None:
        return None if self.logits is None else feature_metrics.class_histogram_distance(*self.logits)

    def nearest_distance_ratio(self) -> float | None:
        if self.train is None:
            return None
        return feature_metrics.nearest_distance_ratio(
            self.images.features, self.train.features, self.reference.features
        )


# In the order of the results. None stands for what cannot be measured: no classifier, or no training images.
_MEASURES: dict[str, Callable[[Comparison], float | None]] = {
    "frechet_distance": lambda pair: feature_metrics.frechet_distance(*pair.features),
    "frechet_distance_infinity": lambda pair: feature_metrics.frechet_distance_infinity(*pair.features, seed=pair.seed),
    "sinkhorn_distance": lambda pair: feature_metrics.sinkhorn_distance(*pair.features),
    "sinkhorn_distance_scaled": lambda pair: feature_metrics.sinkhorn_distance(*pair.features, normalize="median"),
    "kernel_distance": lambda pair: feature_metrics.kernel_distance(*pair.features, seed=pair.seed),
    "precision": lambda pair: pair.precision_recall.precision,
    "recall": lambda pair: pair.precision_recall.recall,
    "density": lambda pair: pair.density_coverage.density,
    "coverage": lambda pair: pair.density_coverage.coverage,
    "precision_distance": lambda pair: feature_metrics.precision_distance(*pair.features),
    "recall_distance": lambda pair: feature_metrics.recall_distance(*pair.features),
    "effective_rank": lambda pair: feature_metrics.effective_rank(pair.images.features),
    "class_histogram_distance": Comparison.class_histogram_distance,
    "nearest_distance_ratio": Comparison.nearest_distance_ratio,
    "patch_sliced_wasserstein": lambda pair: pixels.patch_sliced_wasserstein(*pair.pixels, seed=pair.seed),
    "spectrum_distance": lambda pair: pixels.spectrum_distance(*pair.pixels),
    "speckle_share": lambda pair: pixels.speckle_share(pair.pixels[0]),
    "laplacian_response": lambda pair: pixels.laplacian_response(pair.pixels[0]),
}
_NEEDS = {
    "class_histogram_distance": "an extractor with `logits`",
    "nearest_distance_ratio": "`train`",
}


def evaluate_images(
    images: Tensor | ImageSet,
    *,
    reference: Tensor | ImageSet,
    extractor: Any,
    train: Tensor | ImageSet | None = None,
    metrics: Collection[str] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> dict[str, float]:
    """Every metric, or the named ones, of generated images against real ones.

    Args:
        images: generated, uint8 [N, C, H, W].
        reference: real and held out, uint8 [M, C, H, W]. Hand in `describe_images(…)` to score several sets against it.
        extractor: the evaluation network, see `describe_images`; one that no loss has seen.
        train: what the model was trained on; adds the memorisation check `nearest_distance_ratio`.
        metrics: names of the metrics to compute, keys of `report.METRICS`; all that can be measured by default.
        batch_size: images in one pass of the network.
        seed: decides the random subsets, patches and directions; keep it equal across arms.

    Returns:
        Metric name to value, in one order whichever are named; `report.METRICS` says what each name means and which
        direction is better.

    Raises:
        InputError: images that are not uint8, differ in shape from the reference, or are all one constant; sets that
            were described by different networks; a metric that is not known, or was named and cannot be measured.
    """
    names = _chosen(metrics)
    images = _described(images, extractor, batch_size, "images")
    reference = _described(reference, extractor, batch_size, "reference")
    shape = tuple(reference.images.shape[1:])
    require(tuple(images.images.shape[1:]) == shape, "images", f"have the reference's shape {shape}", _shape(images))
    if train is not None and "nearest_distance_ratio" in names:
        train = _described(train, extractor, batch_size, "train")
    else:
        train = None
    _check_extractors(images=images, reference=reference, train=train)
    pair = Comparison(images, reference, train, seed)
    values = {name: _MEASURES[name](pair) for name in names}
    if metrics is not None:
        for name in (name for name, value in values.items() if value is None):
            raise InputError(f"`metrics` must leave out {name!r} or be given {_NEEDS[name]}")
    return {name: value for name, value in values.items() if value is not None}


def real_floor(
    test: Tensor | ImageSet,
    train: Tensor | ImageSet,
    num_samples: int,
    *,
    extractor: Any,
    metrics: Collection[str] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> dict[str, float]:
    """What real images score: `num_samples` different training images, as if a model had generated them.

    The memorisation check measures them against the training images that were not drawn.

    Args:
        test: the reference of `evaluate_images`.
        train: real images to draw from, more than `num_samples` of them.
        num_samples: as many as the arms generate, because every metric depends on it.
        extractor, metrics, batch_size, seed: as in `evaluate_images`; `seed` also decides the draw.
    """
    train = _described(train, extractor, batch_size, "train")
    enough = 2 <= num_samples <= len(train) - 2
    require(enough, "num_samples", f"be from 2 to {len(train) - 2}, two fewer than the training images", num_samples)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    drawn, rest = (train.rows(rows) for rows in order.tensor_split([num_samples]))
    return evaluate_images(
        drawn, reference=test, extractor=extractor, train=rest, metrics=metrics, batch_size=batch_size, seed=seed
    )


def sample_count(requested: int | None, num_train: int, num_test: int) -> int:
    """Images to generate: as many as asked for, or as there are test images.

    Raises:
        InputError: more than the training images can be held against, see `real_floor`.
    """
    most = num_train - 2
    count = requested or min(num_test, most)
    require(count <= most, "num_samples", f"be at most {most}, two fewer than the training images", count)
    return count


def _chosen(metrics: Collection[str] | None) -> list[str]:
    """The named metrics in the order of the results, all for None."""
    if metrics is None:
        return list(_MEASURES)
    # A lone string is a collection of letters.
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    require(bool(wanted), "metrics", "name at least one metric", wanted)
    for name in wanted:
        require(name in _MEASURES, "metrics", f"be among {', '.join(_MEASURES)}", name)
    return [name for name in _MEASURES if name in wanted]


def _described(images: Tensor | ImageSet, extractor: Any, batch_size: int, name: str) -> ImageSet:
    if isinstance(images, ImageSet):
        return images
    return describe_images(images, extractor, batch_size=batch_size, name=name)


def _shape(images: ImageSet) -> tuple[int, ...]:
    return tuple(images.images.shape[1:])


def _check_extractors(**sets: ImageSet | None) -> None:
    described = {name: images.extractor for name, images in sets.items() if images is not None and images.extractor}
    expected = described.get("reference")
    for name, found in described.items():
        require(expected in (None, found), name, "be described by the network that described `reference`", found[:12])


def _check_images(images: Tensor, name: str) -> None:
    good = isinstance(images, Tensor) and images.ndim == 4 and images.dtype == torch.uint8
    hint = _conversion_hint(images) if isinstance(images, Tensor) and images.is_floating_point() else ""
    require(good, name, f"be a uint8 tensor [N, C, H, W]{hint}", feature_metrics.tensor_summary(images))
    require(len(images) >= 2, name, "hold at least 2 images", len(images))
    first, highest = int(images[0, 0, 0, 0]), int(images.max())
    require(bool((images != first).any()), name, "not be constant", first)
    require(bool((images != images[:1]).any()), name, "hold more than copies of one image", len(images))
    require(highest > 1, name, "reach beyond 1 in 0 … 255 (floats in [0, 1] need 255 * images)", highest)
    blank = int((images == images[:, :1, :1, :1]).flatten(1).all(dim=1).sum())
    if blank:
        warnings.warn(f"{blank} of {len(images)} `{name}` are blank: one value everywhere.", stacklevel=4)


def _conversion_hint(images: Tensor) -> str:
    """How float images of the range that these seem to have become uint8."""
    if not images.isfinite().all():
        return " (they hold NaN or infinity)"
    low, high = (images.min().item(), images.max().item()) if images.numel() else (0.0, 0.0)
    if low < -1 or high > 255:
        return f" (they range from {low:.3g} to {high:.3g})"
    if high > 1:
        return " (for floats in [0, 255]: images.round().to(torch.uint8))"
    if low < 0:
        return " (for floats in [-1, 1]: ot_diffusers.images.to_uint8(images))"
    return " (for floats in [0, 1]: (255 * images).round().to(torch.uint8))"
