"""From images to the table of metrics: features once, then every metric.

reference = extract_image_set(test_images, evaluator)
train = extract_image_set(train_images, evaluator)
metrics = evaluate_images(samples, reference=reference, extractor=evaluator, train=train)
floor = real_floor(reference, train, len(samples), extractor=evaluator)
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..cache import remembered
from ..errors import InputError, require
from ..features import weights_fingerprint
from ..images import to_model_range, to_unit_range
from ..models.feature_extractor import FeatureExtractor
from ..seeds import seeded_generator
from . import metrics as feature_metrics
from . import pixels
from .health import warn_of_doubt

BATCH_SIZE = 512
FEWEST_REAL = 8
"""Training images of which nine tenths are enough for every metric of the real-vs-real score, and some are left."""
ONE_DIRECTION = 1.001
"""Effective rank below which features lie on a line."""


@dataclass(frozen=True)
class ImageSet:
    """Images with their features and logits, so that a fixed set passes through the network only once.

    Attributes:
        images: uint8 [N, C, H, W].
        features: [N, D], on the CPU.
        logits: [N, classes], on the CPU; None for a network without a classifier.
        extractor: fingerprint of the network, so that features of different networks are not compared; None if unknown.
        labels: classes of real images, int64 [N], to measure the accuracy of the network; None if unknown.
        whole: the set of which these images are a part, if any.
    """

    images: Tensor
    features: Tensor
    logits: Tensor | None
    extractor: str | None = None
    labels: Tensor | None = None
    whole: ImageSet | None = None

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: Tensor | slice) -> ImageSet:
        """Some of the images."""
        logits, labels = (None if values is None else values[rows] for values in (self.logits, self.labels))
        return ImageSet(self.images[rows], self.features[rows], logits, self.extractor, labels, self.whole or self)

    @cached_property
    def health(self) -> dict[str, Any]:
        """Facts about the network, measured on this set of real images, or on the whole of which it is a part, as a
        part may have fewer classes; see `evaluator_doubt`.

        `effective_rank` and, if logits and labels are known, `test_accuracy` and `chance`, the share of the commonest
        class.
        """
        if self.whole is not None:
            return self.whole.health
        alike = bool((self.features == self.features[:1]).all())
        facts: dict[str, Any] = {"effective_rank": 1.0 if alike else feature_metrics.effective_rank(self.features)}
        labels, logits = self.labels, self.logits
        if labels is not None and logits is not None and labels.min() >= 0 and labels.max() < logits.shape[1]:
            facts["test_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
            facts["chance"] = labels.bincount().max().item() / len(labels)
        return facts


def extract_image_set(
    images: Tensor,
    extractor: Any,
    *,
    labels: Tensor | None = None,
    batch_size: int = BATCH_SIZE,
    cache: bool = False,
    name: str = "images",
) -> ImageSet:
    """Pass uint8 images [N, C, H, W] through `extractor`, in evaluation mode and without gradients.

    Args:
        images: uint8 [N, C, H, W].
        extractor: a module with `extract(images in [-1, 1]) -> features [B, D]` and, for class histograms,
            `logits(images)`.
        labels: classes of real images, int64 [N], to measure the accuracy of the network.
        batch_size: images in one pass; the features do not depend on it.
        cache: for fixed sets: keep the features in the cache folder under a hash of pixels and weights, and reuse them
            for the same images.
        name: name of the images in errors.
    """
    _check_images(images, name)
    fingerprint = weights_fingerprint(extractor)
    if cache:
        outputs = remembered("descriptions", _key(images, fingerprint), lambda: _run(extractor, images, batch_size))
    else:
        outputs = _run(extractor, images, batch_size)
    return ImageSet(images.cpu(), outputs["features"], outputs.get("logits"), fingerprint, labels)


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
                for name, values in _outputs(extractor, batch).items():
                    outputs[name].append(values.float().cpu())
    finally:
        extractor.train(was_training)
    return {name: torch.cat(parts) for name, parts in outputs.items() if parts}


def _outputs(extractor: Any, images: Tensor) -> dict[str, Tensor]:
    """Features and, where there is a classifier, logits of images in [-1, 1]: an own network gives both in one pass."""
    if isinstance(extractor, FeatureExtractor):
        features, logits = extractor(to_unit_range(images), return_dict=False)
        return {"features": features} | ({"logits": logits} if logits.shape[1] else {})
    logits = {"logits": extractor.logits(images)} if hasattr(extractor, "logits") else {}
    return {"features": extractor.extract(images)} | logits


def _key(images: Tensor, fingerprint: str) -> str:
    digest = hashlib.sha256(f"{fingerprint} {tuple(images.shape)}".encode())
    digest.update(images.cpu().contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Comparison:
    """Generated and real images, with intermediate results that several metrics share.

    Attributes:
        images: generated.
        reference: real and held out.
        train: the training images of the model, if they are known.
        seed: random seed for subsets, patches and directions.
        class_labels: classes that the images were asked to be of, int64 [N]; None if they are not known.
    """

    images: ImageSet
    reference: ImageSet
    train: ImageSet | None
    seed: int
    class_labels: Tensor | None = None

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of the images and of the reference set."""
        return self.images.features, self.reference.features

    @property
    def logits(self) -> tuple[Tensor, Tensor] | None:
        """Logits of the same; None without a classifier."""
        images, reference = self.images.logits, self.reference.logits
        return None if images is None or reference is None else (images, reference)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Both sets as floats in [-1, 1]."""
        return to_model_range(self.images.images), to_model_range(self.reference.images)

    @cached_property
    def precision_recall(self) -> feature_metrics.PrecisionRecall:
        """Both from one search for neighbours."""
        return feature_metrics.precision_recall(*self.features)

    @cached_property
    def density_coverage(self) -> feature_metrics.DensityCoverage:
        """Both from one search for neighbours."""
        return feature_metrics.density_coverage(*self.features)

    def principal_spread(self) -> float | None:
        """None if the real images have fewer than two principal directions."""
        if self.images.features.shape[1] < 2 or self.reference.health["effective_rank"] < ONE_DIRECTION:
            return None
        return feature_metrics.principal_spread(*self.features)

    def class_histogram_distance(self) -> float | None:
        """None without a classifier."""
        return None if self.logits is None else feature_metrics.class_histogram_distance(*self.logits)

    def class_accuracy(self) -> float | None:
        """None without labels, or without a classifier that knows them."""
        labels, logits = self.class_labels, self.images.logits
        if labels is None or logits is None or int(labels.max()) >= logits.shape[1]:
            return None
        return feature_metrics.class_accuracy(logits, labels)

    def class_frechet_distance(self) -> float | None:
        """None without labels of both sets, or where no class has two images of either."""
        labels, real = self.class_labels, self.reference.labels
        if labels is None or real is None:
            return None
        counts = [each.bincount(minlength=int(torch.cat([labels, real]).max()) + 1) for each in (labels, real)]
        if not bool((torch.stack(counts).amin(0) >= 2).any()):
            return None
        return feature_metrics.class_frechet_distance(*self.features, labels, real)

    def nearest_distance_ratio(self) -> float | None:
        """None without training images."""
        if self.train is None:
            return None
        return feature_metrics.nearest_distance_ratio(
            self.images.features, self.train.features, self.reference.features
        )


# In the order of the results. None: the metric cannot be measured without a classifier or training images.
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
    "principal_spread": Comparison.principal_spread,
    "class_histogram_distance": Comparison.class_histogram_distance,
    "nearest_distance_ratio": Comparison.nearest_distance_ratio,
    "class_accuracy": Comparison.class_accuracy,
    "class_frechet_distance": Comparison.class_frechet_distance,
    "patch_sliced_wasserstein": lambda pair: pixels.patch_sliced_wasserstein(*pair.pixels, seed=pair.seed),
    "spectrum_distance": lambda pair: pixels.spectrum_distance(*pair.pixels),
    "speckle_share": lambda pair: pixels.speckle_share(pair.pixels[0]),
    "laplacian_response": lambda pair: pixels.laplacian_response(pair.pixels[0]),
}
_NEEDS = {
    "class_histogram_distance": "an extractor with `logits`",
    "principal_spread": "features of several directions",
    "nearest_distance_ratio": "`train`",
    "class_accuracy": "`class_labels` and an extractor whose `logits` know them",
    "class_frechet_distance": "`class_labels` and labels of the reference",
}
# Smallest number of images in each set, for metrics that need more than 2.
_FEWEST = {
    "frechet_distance_infinity": 4,
    "precision": 4,
    "recall": 4,
    "density": 6,
    "coverage": 6,
    "principal_spread": 3,
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
    class_labels: Tensor | None = None,
) -> dict[str, float]:
    """Every metric, or the named ones, of generated images against real ones.

    Args:
        images: generated, uint8 [N, C, H, W], N ≥ 2.
        reference: real and held out, uint8 [M, C, H, W], M ≥ 2. Hand in `extract_image_set(…)` to score several sets
            against it; with labels, it tells whether the network can be trusted.
        extractor: the evaluation network, see `extract_image_set`; not used in training or guidance.
        train: the training images of the model; adds the memorisation check `nearest_distance_ratio`.
        metrics: names of the metrics to compute, keys of `METRICS`; by default all that can be measured, which with
            fewer than 6 images are not all.
        batch_size: images in one pass of the network.
        seed: random seed for subsets, patches and directions; keep it equal for all methods that are compared.
        class_labels: classes that the images were asked to be of, int64 [N], as the extractor and the labels of the
            reference number them; adds the metrics of classes.

    Returns:
        Metric name to value, always in the same order; `metric_table` explains each name and its better direction.

    Raises:
        InputError: images that are not uint8, differ in shape from the reference, or are all one constant; sets that
            were described by different networks; a metric that is not known, or was named and cannot be measured.
    """
    names = _chosen(metrics)
    images = _image_set(images, extractor, batch_size, "images")
    reference = _image_set(reference, extractor, batch_size, "reference")
    shape = tuple(reference.images.shape[1:])
    require(tuple(images.images.shape[1:]) == shape, "images", f"have the reference's shape {shape}", _shape(images))
    if train is not None and "nearest_distance_ratio" in names:
        train = _image_set(train, extractor, batch_size, "train")
    else:
        train = None
    _check_extractors(images=images, reference=reference, train=train)
    warn_of_doubt(reference.health)
    pair, smaller = Comparison(images, reference, train, seed, class_labels), min(len(images), len(reference))
    values = {name: _MEASURES[name](pair) if smaller >= _FEWEST.get(name, 2) else None for name in names}
    if metrics is not None:
        for name in (name for name, value in values.items() if value is None):
            needed = _NEEDS.get(name) or f"{_FEWEST[name]} images on either side"
            raise InputError(f"`metrics` must leave out {name!r} or be given {needed}")
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
    """The real-vs-real score: the metrics of `num_samples` different training images in place of generated ones.

    The memorisation check compares them with the training images that were not drawn, see `floor_count`. Metrics of
    classes have to be named.

    Args:
        test: the reference of `evaluate_images`.
        train: real images to draw from.
        num_samples: the number of images that each method generates, because every metric depends on it.
        extractor, metrics, batch_size, seed: as in `evaluate_images`; `seed` also determines the draw.
    """
    train = _image_set(train, extractor, batch_size, "train")
    require(num_samples >= 2, "num_samples", "be at least 2", num_samples)
    enough = f"hold {FEWEST_REAL} images, to draw some and compare them with the others"
    require(len(train) >= FEWEST_REAL, "train", enough, len(train))
    order = _random_order(len(train), seed).tensor_split([floor_count(num_samples, len(train))])
    drawn, rest = (train.rows(rows) for rows in order)
    options: dict[str, Any] = {"metrics": metrics, "batch_size": batch_size, "seed": seed}
    options |= {} if metrics is None else {"class_labels": drawn.labels}
    return evaluate_images(drawn, reference=test, extractor=extractor, train=rest, **options)


def random_rows(train: ImageSet, num_samples: int, seed: int) -> ImageSet:
    """The images that `real_floor` draws with this seed."""
    return train.rows(_random_order(len(train), seed)[: floor_count(num_samples, len(train))])


def floor_count(num_samples: int, num_train: int) -> int:
    """Training images that the real-vs-real score draws: as many as are generated, which leaves at least two of them;
    of fewer training images nine tenths.

    Example:
        >>> floor_count(1000, 1200), floor_count(3000, 1200)
        (1000, 1080)
    """
    return num_samples if num_samples <= num_train - 2 else num_train * 9 // 10


def _random_order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=seeded_generator(seed))


def sample_count(requested: int | None, num_train: int, num_test: int) -> int:
    """Number of images to generate: the requested number, or that of the test images and at most two fewer than there
    are training images, so that the real-vs-real score is that of as many."""
    return requested or min(num_test, num_train - 2)


def _chosen(metrics: Collection[str] | None) -> list[str]:
    """The named metrics in the order of the results, all for None."""
    if metrics is None:
        return list(_MEASURES)
    # A single string would be read as a collection of letters.
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    require(bool(names), "metrics", "name at least one metric", names)
    for name in names:
        require(name in _MEASURES, "metrics", f"be among {', '.join(_MEASURES)}", name)
    return [name for name in _MEASURES if name in names]


def _image_set(images: Tensor | ImageSet, extractor: Any, batch_size: int, name: str) -> ImageSet:
    if isinstance(images, ImageSet):
        return images
    return extract_image_set(images, extractor, batch_size=batch_size, name=name)


def _shape(images: ImageSet) -> tuple[int, ...]:
    return tuple(images.images.shape[1:])


def _check_extractors(**sets: ImageSet | None) -> None:
    fingerprints = {name: images.extractor for name, images in sets.items() if images is not None and images.extractor}
    expected = fingerprints.get("reference")
    for name, fingerprint in fingerprints.items():
        agrees = expected in (None, fingerprint)
        require(agrees, name, "be described by the network that described `reference`", fingerprint[:12])


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
