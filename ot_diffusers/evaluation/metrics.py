"""Distances between two sets of feature vectors, each as features → statistics → one number.

Fréchet distance (FID), kernel distance (KID) and precision/recall are faster ways to torch-fidelity's numbers: the same
definitions, random subsets and defaults, and tests that compare the two. Everywhere, `features` are of generated images
and `reference_features` of real ones, float tensors [N, D] and [M, D].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, require
from ..seeds import folded, seeded_generator
from ..transport import divergence_value, has_stored_solver, median_distance, sinkhorn_divergence
from ..transport.geometry import log_effective_rank
from .neighbors import by_content, count_members, in_each_others_balls, nearest_rows

Normalization = Literal["l2", "median", "none"]


class PrecisionRecall(NamedTuple):
    """Share of generated images near a real one, and of real images near a generated one, both in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density ≥ 0 (1 for equal distributions, may exceed it) and coverage in [0, 1]."""

    density: float
    coverage: float


def frechet_distance(features: Tensor, reference_features: Tensor) -> float:
    """Fréchet distance of the two Gaussian fits, ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), in float64.

    With Σ = RᵀR from a QR factorisation of the centred rows, tr (Σ₁Σ₂)^½ is the sum of the singular values of R₁R₂ᵀ:
    no root of a rounded zero, so a singular covariance costs no digits.

    It is called FID only for 2048-d Inception features. Its bias grows with D/N: compare values of equal N only.

    Args:
        features: [N, D].
        reference_features: [M, D].

    Raises:
        InputError: fewer than 2 rows, unequal D, NaN or infinite values. Below D rows, a warning names the bias.

    Reference: [Heusel2017].
    """
    features, reference_features = _checked_pair(features, reference_features)
    _warn_of_bias(min(len(features), len(reference_features)), features.shape[1])
    return _frechet(_gaussian_fit(features), _gaussian_fit(reference_features))


def frechet_distance_infinity(
    features: Tensor, reference_features: Tensor, *, num_sizes: int = 10, seed: int = 0
) -> float:
    """Fréchet distance extrapolated to infinitely many samples, which removes most of its bias.

    n rows of either set, drawn without replacement, give d(n); the value is the intercept of the least-squares line
    d ≈ d_∞ + slope/n. The sizes n go in even steps from a tenth of the smaller set, at least 2D rows (at most half
    the set), up to the whole. Near 0, of either sign, for equal distributions; its random error is larger than the
    plain distance's.

    Args:
        features: [N, D], N ≥ 4.
        reference_features: [M, D], M ≥ 4. A warning names the bias where either set has fewer than 2D rows.
        num_sizes: points of the line, at least 2.
        seed: decides the draws; sets of equal size are drawn alike, so that a set and itself score 0.

    Reference: [Chong2020], which keeps the reference whole; shrinking it as well removes its bias too.
    """
    features, reference_features = _checked_pair(features, reference_features)
    largest, dimension = min(len(features), len(reference_features)), features.shape[1]
    require(largest >= 4, "features", "have at least 4 rows in either set", largest)
    require(num_sizes >= 2, "num_sizes", "be at least 2", num_sizes)
    smallest = min(largest // 2, max(largest // 10, 2 * dimension))
    _warn_of_bias(smallest, dimension)
    sizes = torch.linspace(smallest, largest, num_sizes).round().long().tolist()
    distances = []
    for step, size in enumerate(sizes):
        draws = (_random_rows(rows, size, seed + step) for rows in (features, reference_features))
        distances.append(_frechet(*(_gaussian_fit(draw) for draw in draws)))
    return float(np.polyfit(1 / np.array(sizes), distances, deg=1)[1])


def kernel_distance(
    features: Tensor, reference_features: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Kernel distance: unbiased squared MMD, kernel (⟨x, y⟩/D + 1)³, mean over random subsets.

    The subsets are torch-fidelity's for the same seed. Unlike the Fréchet distance it is unbiased in N, and may be
    slightly negative for equal distributions.

    Args:
        features: [N, D].
        reference_features: [M, D].
        num_subsets: subsets drawn.
        subset_size: rows of each subset; lowered to the smaller set's size.
        seed: decides the subsets.

    Reference: [Binkowski2018].
    """
    features, reference_features = _checked_pair(features, reference_features)
    size = min(subset_size, len(features), len(reference_features))
    if size == len(features) == len(reference_features):
        num_subsets = 1  # every subset is the whole
    sets = [rows.double() / math.sqrt(rows.shape[1]) for rows in (features, reference_features)]
    draws = np.random.RandomState(folded(seed, 32))
    subsets = ([rows[draws.choice(len(rows), size, replace=False)] for rows in sets] for _ in range(num_subsets))
    return math.fsum(_squared_mmd(*subset) for subset in subsets) / num_subsets


def precision_recall(features: Tensor, reference_features: Tensor, *, num_neighbors: int = 3) -> PrecisionRecall:
    """Share of each set inside the union of the other set's k-nearest-neighbour balls.

    Args:
        features: [N, D], N > `num_neighbors`.
        reference_features: [M, D], M > `num_neighbors`.
        num_neighbors: k, which neighbour's distance is a ball's radius.

    Reference: [Kynkaanniemi2019], eqs. 1–2.
    """
    features, reference_features = _checked_pair(features, reference_features)
    _check_neighbors(num_neighbors, features, reference_features)
    inside = in_each_others_balls(features, reference_features, num_neighbors)
    return PrecisionRecall(*(share.double().mean().item() for share in inside))


def sinkhorn_distance(
    features: Tensor,
    reference_features: Tensor,
    *,
    blur: float = 0.05,
    scaling: float = 0.9,
    normalize: Normalization = "l2",
    backend: Literal["native", "geomloss"] = "native",
) -> float:
    """Debiased Sinkhorn divergence between the two sets, cost ½‖x − y‖², temperature blur².

    From N·M = 2²² to 2²⁸ it is `divergence_value`, whose error is below a thousandth and which needs 4NM bytes.

    Args:
        features: [N, D].
        reference_features: [M, D].
        blur: resolution, a length in the units of the normalised features.
        scaling: ratio of successive blurs on the way down, in (0, 1); closer to 1 is closer to convergence.
        normalize: `"l2"` puts every row on the unit sphere (rows of zeros stay zero); `"median"` divides both
            sets by the median pairwise distance of the reference set, so that `blur` is a share of it; `"none"`
            leaves the features as they are.
        backend: `"native"` solves to convergence; `"geomloss"` gives the value of its `SamplesLoss`, which at this blur
            and scaling stops up to 3% below it.

    Reference: [Feydy2019].
    """
    features, reference_features = _checked_pair(features, reference_features)
    match normalize:
        case "l2":
            pair = (_shrunk(x, x.abs().amax(1, keepdim=True)) for x in (features, reference_features))
            features, reference_features = (torch.nn.functional.normalize(x) for x in pair)
        case "median":
            largest = reference_features.abs().max()
            features, reference_features = (_shrunk(x, largest) for x in (features, reference_features))
            scale = median_distance(reference_features)
            features, reference_features = features / scale, reference_features / scale
        case "none":
            pass
        case _:
            raise InputError(f'`normalize` must be "l2", "median" or "none", got {normalize!r}')
    if backend == "native" and has_stored_solver(len(features), len(reference_features)):
        return divergence_value(features, reference_features, blur=blur)
    return float(
        sinkhorn_divergence(features, reference_features, blur=blur, scaling=scaling, debias=True, backend=backend)
    )


def recall_distance(features: Tensor, reference_features: Tensor) -> float:
    """Mean over the real images of the L2 distance to the nearest generated one: large where modes are missing."""
    features, reference_features = _checked_pair(features, reference_features)
    return nearest_distances(reference_features, features).mean().item()


def precision_distance(features: Tensor, reference_features: Tensor) -> float:
    """Mean over the generated images of the L2 distance to the nearest real one: large for implausible samples."""
    features, reference_features = _checked_pair(features, reference_features)
    return nearest_distances(features, reference_features).mean().item()


def nearest_distance_ratio(features: Tensor, train_features: Tensor, held_out_features: Tensor) -> float:
    """Memorisation check: median distance generated → nearest training image, over that of held-out real images.

    About 1 for a model as new as fresh data, near 0 for one that returns training images.

    Args:
        features: generated, [N, D].
        train_features: what the model was trained on, [M, D].
        held_out_features: real and never trained on, [K, D].
    """
    features, train_features = _checked_pair(features, train_features, "features", "train_features")
    held_out_features, _ = _checked_pair(held_out_features, train_features, "held_out_features", "train_features")
    typical = nearest_distances(held_out_features, train_features).median().item()
    require(typical > 0, "held_out_features", "differ from the training features", typical)
    return nearest_distances(features, train_features).median().item() / typical


def density_coverage(features: Tensor, reference_features: Tensor, *, num_neighbors: int = 5) -> DensityCoverage:
    """Precision and recall made robust to outliers: only the real set's k-nearest-neighbour balls count.

    density = 1/(kN) Σ_j #{i : y_j ∈ B_i},  coverage = 1/M #{i : some y_j ∈ B_i}, with B_i the ball of real row i.

    Reference: [Naeem2020], eqs. 3–4.
    """
    features, reference_features = _checked_pair(features, reference_features)
    _check_neighbors(num_neighbors, features, reference_features)
    members = count_members(features, reference_features, num_neighbors)
    density = members.sum().item() / (num_neighbors * len(features))
    return DensityCoverage(density, (members > 0).double().mean().item())


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues, in [1, D]: falls when samples collapse.

    Reference: [Roy2007].
    """
    features = _checked(features, "features").double()
    differ = bool((features != features.mean(dim=0)).any())
    require(differ, "features", "hold more than copies of one row", 0.0)
    return math.exp(log_effective_rank(features).item())


def principal_spread(features: Tensor, reference_features: Tensor) -> float:
    """Area of the samples over that of real images in the plane of the two leading principal directions of the latter:
    √(det Cov / det Cov_real), 1 for equal distributions, less where the samples cluster.

    Args:
        features: of generated images, [N, D], D ≥ 2.
        reference_features: of real images, [M, D].

    Example:
        >>> real = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> round(principal_spread(real / 2, real), 6)
        0.25
    """
    features, reference_features = _checked_pair(features, reference_features)
    require(features.shape[1] >= 2, "features", "have at least 2 columns", tuple(features.shape))
    (_, factor), (_, real) = _gaussian_fit(features), _gaussian_fit(reference_features)
    _, deviations, directions = torch.linalg.svd(real, full_matrices=False)
    require(bool(deviations[:2].all()), "reference_features", "vary in two directions or more", deviations[:2].tolist())
    return (torch.linalg.svdvals(factor @ directions[:2].T).prod() / deviations[:2].prod()).item()


def class_histogram_distance(logits: Tensor, reference_logits: Tensor) -> float:
    """Total variation between predicted class histograms, ½ Σ_c |p_c − q_c|: 0 if equal, 1 if disjoint.

    Args:
        logits: a classifier's scores of generated images, [N, classes].
        reference_logits: its scores of real images, [M, classes]. A warning names the classes that none of them is in.
    """
    logits, reference_logits = _checked_pair(logits, reference_logits, "logits", "reference_logits")
    counts = [torch.bincount(x.argmax(dim=1), minlength=x.shape[1]) for x in (logits, reference_logits)]
    empty = (counts[1] == 0).nonzero().flatten().tolist()
    if empty:
        warnings.warn(
            f"Class histogram against a reference without images of class {', '.join(map(str, empty))}: it cannot tell "
            f"whether those are missing among the samples.",
            stacklevel=2,
        )
    shares = [count.double() / count.sum() for count in counts]
    return 0.5 * (shares[0] - shares[1]).abs().sum().item()


def class_accuracy(logits: Tensor, class_labels: Tensor) -> float:
    """Share of generated images that a classifier puts into the class that was asked for.

    Args:
        logits: its scores, [N, classes].
        class_labels: the classes, integers [N].
    """
    logits = _checked(logits, "logits")
    _check_labels(class_labels, logits, "class_labels", below=logits.shape[1])
    return (logits.argmax(dim=1) == class_labels.cpu()).double().mean().item()


def class_frechet_distance(
    features: Tensor, reference_features: Tensor, class_labels: Tensor, reference_labels: Tensor
) -> float:
    """Mean over the classes of the Fréchet distance within each class: large where images of a class resemble others.

    A class counts if two images or more of either set are in it. As in `frechet_distance`, the bias grows with D/N,
    where N is now the number of images of a class.

    Args:
        features: [N, D].
        reference_features: [M, D].
        class_labels: what was asked for, integers [N].
        reference_labels: classes of the real images, integers [M].

    Raises:
        InputError: no class with two images on either side, or labels of another number.
    """
    features, reference_features = _checked_pair(features, reference_features)
    _check_labels(class_labels, features, "class_labels")
    _check_labels(reference_labels, reference_features, "reference_labels")
    pairs = []
    for label in reference_labels.unique():
        pair = features[class_labels.cpu() == label], reference_features[reference_labels.cpu() == label]
        if min(map(len, pair)) >= 2:
            pairs.append(pair)
    require(bool(pairs), "class_labels", "share a class of two images or more with the real images", "none")
    _warn_of_bias(min(len(rows) for pair in pairs for rows in pair), features.shape[1])
    return sum(_frechet(*map(_gaussian_fit, pair)) for pair in pairs) / len(pairs)


@by_content
def nearest_distances(queries: Tensor, points: Tensor) -> Tensor:
    """L2 distance from each query [N, D] to its nearest point [M, D]: [N], float64, exactly 0 for a copy."""
    # A matrix product loses digits near 0; the chosen pairs are measured again.
    return (queries.double() - points[nearest_rows(queries, points)].double()).norm(dim=1)


def tensor_summary(value: object) -> object:
    """What an error message shows of a tensor or array: dtype and shape instead of its numbers; of a list or another
    collection its type and length; other values as they are."""
    if isinstance(value, Tensor | np.ndarray):
        return (value.dtype, tuple(value.shape))
    return (type(value), len(value)) if isinstance(value, Collection) and not isinstance(value, str) else value


def _shrunk(features: Tensor, largest: Tensor) -> Tensor:
    """Features over the power of 2 next to `largest`: without rounding, so that squares neither overflow nor vanish."""
    return torch.ldexp(features.double(), -torch.frexp(largest).exponent).float()


def _checked_pair(
    first: Tensor, second: Tensor, first_name: str = "features", second_name: str = "reference_features"
) -> tuple[Tensor, Tensor]:
    """Both sets checked, float32, detached and on the CPU, with equal D."""
    first, second = _checked(first, first_name), _checked(second, second_name)
    same = first.shape[1] == second.shape[1]
    require(same, first_name, f"have the {second.shape[1]} columns of `{second_name}`", tuple(first.shape))
    return first, second


def _checked(features: Tensor, name: str) -> Tensor:
    """`features` as a detached float32 matrix on the CPU, or an `InputError` that names it."""
    matrix = isinstance(features, Tensor) and features.ndim == 2 and features.is_floating_point()
    require(matrix, name, "be a float tensor [N, D]", tensor_summary(features))
    require(len(features) >= 2, name, "have at least 2 rows", len(features))
    require(features.shape[1] >= 1, name, "have at least 1 column", tuple(features.shape))
    features = features.detach().float().cpu()
    bad = int((~features.isfinite()).any(dim=1).sum())
    require(bad == 0, name, "have no row with NaN or infinity", bad)
    return features


def _check_labels(labels: Tensor, rows: Tensor, name: str, below: int | None = None) -> None:
    fits = isinstance(labels, Tensor) and tuple(labels.shape) == (len(rows),) and not labels.is_floating_point()
    require(fits, name, f"be {len(rows)} integers", tensor_summary(labels))
    in_range = int(labels.min()) >= 0 and (below is None or int(labels.max()) < below)
    require(in_range, name, f"lie in 0 … {'' if below is None else below - 1}", int(labels.max()))


def _warn_of_bias(rows: int, dimension: int) -> None:
    """Name the bias of a Gaussian fit to fewer rows than dimensions, at the caller of the metric."""
    if rows < dimension:
        warnings.warn(
            f"Fréchet distance from {rows} samples in {dimension} dimensions: the covariance is singular and the value "
            f"biased upwards; compare it only with values of the same sample count.",
            stacklevel=3,
        )


def _check_neighbors(num_neighbors: int, *sets: Tensor) -> None:
    rows = min(len(features) for features in sets)
    require(0 < num_neighbors < rows, "num_neighbors", f"be from 1 to {rows - 1} for {rows} rows", num_neighbors)


def _gaussian_fit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and R [min(N, D), D] with RᵀR the covariance, float64."""
    features = features.double()
    mean = features.mean(dim=0)
    return mean, torch.linalg.qr(features - mean, mode="r").R / math.sqrt(len(features) - 1)


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    (mean, root), (reference_mean, reference_root) = first, second
    overlap = torch.linalg.svdvals(root @ reference_root.T).sum()
    spread = root.square().sum() + reference_root.square().sum()
    return ((mean - reference_mean).square().sum() + spread - 2 * overlap).item()


def _random_rows(features: Tensor, count: int, seed: int) -> Tensor:
    return features[torch.randperm(len(features), generator=seeded_generator(seed))[:count]]


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of equally many rows [S, D], kernel (⟨x, y⟩ + 1)³; the diagonals of K_xx, K_yy stay out."""
    size = len(x)
    within = sum((rows @ rows.T).add_(1).pow_(3).fill_diagonal_(0).sum().item() for rows in (x, y))
    across = (x @ y.T).add_(1).pow_(3).sum().item()
    return within / (size * (size - 1)) - 2 * across / size**2
