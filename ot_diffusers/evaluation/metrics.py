"""Distances between two sets of feature vectors, each as features → statistics → one number.

Fréchet distance (FID), kernel distance (KID) and precision/recall are torch-fidelity's own, called on features, so that
a number printed here can be compared with theirs digit for digit. Everywhere, `features` are of generated images and
`reference_features` of real ones, float tensors [N, D] and [M, D].
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, require
from ..transport import median_distance, sinkhorn_divergence

BLOCK_SIZE = 4096
"""Rows of either set in one block of pairwise distances: 4096² float64 numbers are 128 MiB."""

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
    """Fréchet distance of the two Gaussian fits, ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), by torch-fidelity in float64.

    It is called FID only with 2048-d Inception features. Its bias grows with D/N: compare values of equal N only.

    Args:
        features: [N, D].
        reference_features: [M, D].

    Raises:
        InputError: fewer than 2 rows, unequal D, NaN or infinite values. Below D rows, a warning names the bias.

    Reference: [Heusel2017].
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    features, reference_features = _checked_pair(features, reference_features)
    rows, dimension = min(len(features), len(reference_features)), features.shape[1]
    if rows < dimension:
        warnings.warn(
            f"Fréchet distance from {rows} samples in {dimension} dimensions: the covariance is singular and the value "
            f"biased upwards; compare it only with values of the same sample count.",
            stacklevel=2,
        )
    statistics = [fid_features_to_statistics(rows.double().cpu()) for rows in (features, reference_features)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel_distance(
    features: Tensor, reference_features: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Kernel distance: unbiased squared MMD, kernel (⟨x, y⟩/D + 1)³, mean over random subsets, by torch-fidelity.

    Unlike the Fréchet distance it is unbiased in N, and may be slightly negative for equal distributions.

    Args:
        features: [N, D].
        reference_features: [M, D].
        num_subsets: subsets drawn.
        subset_size: rows of each subset; lowered to the smaller set's size.
        seed: decides the subsets.

    Reference: [Binkowski2018].
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    features, reference_features = _checked_pair(features, reference_features)
    values = kid_features_to_metric(
        features.double(),
        reference_features.double(),
        kid_subsets=num_subsets,
        kid_subset_size=min(subset_size, len(features), len(reference_features)),
        rng_seed=seed,
        verbose=False,
    )
    return values[KEY_METRIC_KID_MEAN]


def precision_recall(features: Tensor, reference_features: Tensor, *, num_neighbors: int = 3) -> PrecisionRecall:
    """Share of each set inside the union of the other set's k-nearest-neighbour balls, as torch-fidelity computes it.

    Args:
        features: [N, D], N > `num_neighbors`.
        reference_features: [M, D], M > `num_neighbors`.
        num_neighbors: k, which neighbour's distance is a ball's radius.

    Reference: [Kynkaanniemi2019], eqs. 1–2.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    features, reference_features = _checked_pair(features, reference_features)
    _check_neighbors(num_neighbors, features, reference_features)
    values = prc_features_to_metric(
        features,
        reference_features,
        prc_neighborhood=num_neighbors,
        prc_batch_size=BLOCK_SIZE,
        save_cpu_ram=True,
        verbose=False,
    )
    return PrecisionRecall(values[KEY_METRIC_PRECISION], values[KEY_METRIC_RECALL])


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
            features, reference_features = (torch.nn.functional.normalize(x) for x in (features, reference_features))
        case "median":
            scale = median_distance(reference_features)
            require(scale > 0, "reference_features", "hold more than copies of one row", scale)
            features, reference_features = features / scale, reference_features / scale
        case "none":
            pass
        case _:
            raise InputError(f'`normalize` must be "l2", "median" or "none", got {normalize!r}')
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
    features, reference_features = (rows.double() for rows in _checked_pair(features, reference_features))
    _check_neighbors(num_neighbors, features, reference_features)
    counts = []
    for block in reference_features.split(BLOCK_SIZE):
        # Every row is its own nearest neighbour at distance 0, hence k + 1.
        nearest = [
            torch.cdist(block, part).topk(min(num_neighbors + 1, len(part)), largest=False).values
            for part in reference_features.split(BLOCK_SIZE)
        ]
        radius = torch.cat(nearest, dim=1).kthvalue(num_neighbors + 1, dim=1, keepdim=True).values
        inside = [(torch.cdist(block, part) <= radius).sum(dim=1) for part in features.split(BLOCK_SIZE)]
        counts.append(torch.stack(inside).sum(dim=0))
    members = torch.cat(counts)
    density = members.sum().item() / (num_neighbors * len(features))
    return DensityCoverage(density, (members > 0).double().mean().item())


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues, in [1, D]: falls when samples collapse.

    Reference: [Roy2007].
    """
    features = _checked(features, "features").double()
    spectrum = torch.linalg.svdvals(features - features.mean(dim=0)).square()
    require(spectrum.sum().item() > 0, "features", "hold more than copies of one row", 0.0)
    shares = spectrum / spectrum.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def class_histogram_distance(logits: Tensor, reference_logits: Tensor) -> float:
    """Total variation between predicted class histograms, ½ Σ_c |p_c − q_c|: 0 if equal, 1 if disjoint.

    Args:
        logits: a classifier's scores of generated images, [N, classes].
        reference_logits: its scores of real images, [M, classes].
    """
    logits, reference_logits = _checked_pair(logits, reference_logits, "logits", "reference_logits")
    shares = [
        torch.bincount(x.argmax(dim=1), minlength=x.shape[1]).double() / len(x) for x in (logits, reference_logits)
    ]
    return 0.5 * (shares[0] - shares[1]).abs().sum().item()


def nearest_distances(queries: Tensor, points: Tensor) -> Tensor:
    """L2 distance from each query [N, D] to its nearest point [M, D]: [N], float64, exactly 0 for a copy.

    Distances are formed block by block, so memory does not grow with N · M.
    """
    queries, points = queries.double(), points.double()
    distances = []
    for block in queries.split(BLOCK_SIZE):
        blocks = [torch.cdist(block, part).min(dim=1) for part in points.split(BLOCK_SIZE)]
        best = torch.stack([found.values for found in blocks]).argmin(dim=0)
        indices = torch.stack([found.indices for found in blocks]).gather(0, best[None])[0] + best * BLOCK_SIZE
        # `cdist` goes through a matrix product and loses digits near 0; the chosen pairs are measured again.
        distances.append((block - points[indices]).norm(dim=1))
    return torch.cat(distances)


def tensor_summary(value: object) -> object:
    """What an error message shows of a tensor: dtype and shape instead of its numbers; other values as they are."""
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value


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
    features = features.detach().float().cpu()
    bad = int((~features.isfinite()).any(dim=1).sum())
    require(bad == 0, name, "have no row with NaN or infinity", bad)
    return features


def _check_neighbors(num_neighbors: int, *sets: Tensor) -> None:
    rows = min(len(features) for features in sets)
    require(0 < num_neighbors < rows, "num_neighbors", f"be from 1 to {rows - 1} for {rows} rows", num_neighbors)
