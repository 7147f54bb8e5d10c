"""Metrics against closed forms, properties, and their peers (SciPy, geomloss, torch-fidelity)."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch_fidelity import metric_fid, metric_kid, metric_prc

from ot_diffusers.errors import InputError
from ot_diffusers.evaluation import metrics, neighbors, pixels
from ot_diffusers.evaluation.evaluate import evaluate_images, extract_image_set, real_floor
from ot_diffusers.evaluation.metric_table import METRICS, SECOND
from ot_diffusers.seeds import seeded_generator
from ot_diffusers.transport.sliced import random_directions, sliced_wasserstein

FEATURE_METRICS = [
    metrics.frechet_distance,
    metrics.frechet_distance_infinity,
    metrics.kernel_distance,
    metrics.precision_recall,
    metrics.sinkhorn_distance,
    metrics.recall_distance,
    metrics.precision_distance,
    metrics.density_coverage,
]


def gaussian(rows: int, columns: int = 6, seed: int = 0, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return mean + scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_images(count: int, side: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    shape = (count, channels, side, side)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class TestClasses:
    def test_accuracy_counts_the_asked_class(self) -> None:
        logits = torch.eye(3)[torch.tensor([0, 1, 1, 2])]
        assert metrics.class_accuracy(logits, torch.tensor([0, 1, 2, 2])) == 0.75
        for labels, message in (
            ([0, 1, 2], r"`class_labels` must be 4 integers"),
            ([0, 1, 2, 3], "`class_labels` must lie in 0 … 2, got 3"),
        ):
            with pytest.raises(InputError, match=message):
                metrics.class_accuracy(logits, torch.tensor(labels))

    def test_the_distance_within_classes_sees_exchanged_classes(self) -> None:
        """Two classes at ±v: the same images with their labels exchanged have the same distribution, and within each
        class are a shift by 2v, which costs 4 ‖v‖². A class of a single image does not count."""
        shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])
        one = gaussian(40)
        features, labels = torch.cat([one + shift, one - shift]), torch.arange(80) // 40
        assert metrics.class_frechet_distance(features, features, labels, labels) == pytest.approx(0, abs=1e-4)
        exchanged = metrics.class_frechet_distance(features, features, 1 - labels, labels)
        assert exchanged == pytest.approx(4 * 14.25, rel=1e-5)  # float32 rows
        alone = torch.cat([labels, torch.tensor([2])])
        more = torch.cat([features, gaussian(1)])
        assert metrics.class_frechet_distance(more, more, alone, alone) == pytest.approx(0, abs=1e-4)
        with pytest.raises(InputError, match="`class_labels` must share a class of two images"):
            metrics.class_frechet_distance(features, features, labels + 5, labels)


class TestFrechetDistance:
    def test_shift_costs_its_squared_length(self) -> None:
        """A translation by v leaves the covariances equal, so the distance is ‖v‖²."""
        features, shift = gaussian(300), torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])
        # float32 features: 1e-7 of ‖v‖² = 14.25, with room for the eigenvalue solve.
        assert metrics.frechet_distance(features + shift, features) == pytest.approx(14.25, abs=1e-4)

    def test_scale(self) -> None:
        """y = c·x about a zero mean: tr(Σ + c²Σ − 2cΣ) = (1 − c)² tr Σ."""
        features = gaussian(300)
        features = features - features.mean(dim=0)
        expected = 0.25 * torch.cov(features.double().T).trace().item()
        assert metrics.frechet_distance(1.5 * features, features) == pytest.approx(expected, rel=1e-5)  # float32 rows

    def test_agrees_with_scipy_square_root(self) -> None:
        x, y = gaussian(200, seed=1).double(), gaussian(150, seed=2, mean=0.3, scale=1.4).double()
        a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
        root = scipy.linalg.sqrtm(a @ b).real
        expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(a + b - 2 * root)
        # Both are float64 eigenvalue methods on a well-conditioned 6×6 product.
        assert metrics.frechet_distance(x.float(), y.float()) == pytest.approx(expected, rel=1e-6)

    def test_warns_of_its_bias_below_full_rank(self) -> None:
        with pytest.warns(UserWarning, match="4 samples in 6 dimensions"):
            metrics.frechet_distance(gaussian(4), gaussian(50, seed=1))


class TestKernelDistance:
    def test_two_point_closed_form(self) -> None:
        """x₁ = x₂ = a, y₁ = y₂ = b in one dimension: MMD² = k(a, a) + k(b, b) − 2k(a, b), k(s, t) = (st + 1)³."""
        a, b = 0.5, -1.0
        expected = (a * a + 1) ** 3 + (b * b + 1) ** 3 - 2 * (a * b + 1) ** 3
        found = metrics.kernel_distance(torch.full((2, 1), a), torch.full((2, 1), b), num_subsets=1)
        assert found == pytest.approx(expected, rel=1e-12)  # float64 of exactly representable numbers

    def test_is_unbiased_and_finds_a_shift(self) -> None:
        same = metrics.kernel_distance(gaussian(400), gaussian(400, seed=1), subset_size=200)
        shifted = metrics.kernel_distance(gaussian(400), gaussian(400, seed=1, mean=0.5), subset_size=200)
        # The standard error of MMD² at 400 rows of this kernel is about .01; the shift's population value is near 1.
        assert abs(same) < 0.05 < shifted

    def test_far_from_the_origin(self) -> None:
        """Kernels of 1e12 that differ by 1e7: float64 sums in another order leave less than a millionth of that."""
        pair = gaussian(300, mean=100.0), gaussian(300, seed=1, mean=100.0)
        found = metrics.kernel_distance(*pair, num_subsets=7, subset_size=50, seed=5)
        assert found == pytest.approx(fidelity_kernel(*pair, 50, 5)[0], rel=1e-6)

    def test_huge_features(self) -> None:
        pair = gaussian(60) * 1e9, gaussian(60, seed=1) * 1e9
        found = metrics.kernel_distance(*pair, num_subsets=7, subset_size=20, seed=5)
        assert found == pytest.approx(fidelity_kernel(*pair, 20, 5)[0], rel=1e-9)

    def test_seed_decides_the_subsets(self) -> None:
        pair = gaussian(100), gaussian(100, seed=1)
        values = [metrics.kernel_distance(*pair, subset_size=20, seed=seed) for seed in (3, 3, 4)]
        assert values[0] == values[1] != values[2]


class TestPrecisionRecall:
    def test_missing_mode_costs_recall_only(self) -> None:
        """Two far clusters of equal size; generated images cover one: precision 1, recall ½."""
        near = gaussian(40)
        reference = torch.cat([near, near + 1000])
        assert metrics.precision_recall(near, reference) == (1.0, 0.5)

    def test_invented_mode_costs_precision_only(self) -> None:
        near = gaussian(40)
        assert metrics.precision_recall(torch.cat([near, near + 1000]), near) == (0.5, 1.0)


class TestFrechetDistanceInfinity:
    @pytest.mark.parametrize("rows", [400, 1000])
    def test_removes_the_bias_between_equal_gaussians(self, rows: int) -> None:
        """Both sets from N(0, I) in 20 dimensions: the distance is 0, the plain estimate far above it."""
        pairs = [(gaussian(rows, 20, seed=2 * i), gaussian(rows, 20, seed=2 * i + 1)) for i in range(8)]
        plain = sum(metrics.frechet_distance(*pair) for pair in pairs) / 8
        values = [metrics.frechet_distance_infinity(*pair) for pair in pairs]
        # What is left of the bias is of second order in D/n, n ≥ 2D, and the error of eight draws.
        assert abs(sum(values) / 8) < 0.15 * plain
        assert min(values) < 0 < max(values) or max(map(abs, values)) < 0.3 * plain

    def test_keeps_a_shift_and_its_seed(self) -> None:
        """A translation by v of every row costs ‖v‖² in addition to the same bias."""
        x, y = gaussian(800, seed=1), gaussian(600, seed=2)
        found = [metrics.frechet_distance_infinity(x + 2, y, seed=seed) for seed in (3, 3, 4)]
        # The means of 600 rows are off by 1/√600 a coordinate: 2·2·6 coordinates·.04 at most.
        assert found[0] == pytest.approx(24, abs=1)
        assert found[0] == found[1] != found[2]

    def test_refuses_sets_too_small_for_a_line(self) -> None:
        with pytest.raises(InputError, match="at least 4 rows in either set, got 3"):
            metrics.frechet_distance_infinity(gaussian(3), gaussian(10))


def fidelity_frechet(x: Tensor, y: Tensor) -> float:
    statistics = [metric_fid.fid_features_to_statistics(rows.double()) for rows in (x, y)]
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


def fidelity_kernel(x: Tensor, y: Tensor, subset_size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of 7 subsets."""
    options = {"kid_subsets": 7, "kid_subset_size": subset_size, "rng_seed": seed, "verbose": False}
    values = metric_kid.kid_features_to_metric(x.double(), y.double(), **options)
    return values[metric_kid.KEY_METRIC_KID_MEAN], values[metric_kid.KEY_METRIC_KID_STD]


def fidelity_precision_recall(x: Tensor, y: Tensor, num_neighbors: int) -> tuple[float, float]:
    options = {"prc_neighborhood": num_neighbors, "prc_batch_size": 10000, "save_cpu_ram": False, "verbose": False}
    values = metric_prc.prc_features_to_metric(x.double(), y.double(), **options)
    return values["precision"], values["recall"]


class TestAgainstTorchFidelity:
    """torch-fidelity's own functions on the same features, in float64."""

    sizes = pytest.mark.parametrize(("rows", "reference_rows"), [(200, 200), (70, 300), (300, 40)])

    @sizes
    @pytest.mark.parametrize("columns", [5, 30])
    def test_frechet_distance(self, rows: int, reference_rows: int, columns: int) -> None:
        x, y = gaussian(rows, columns, seed=1, mean=0.2, scale=1.3), gaussian(reference_rows, columns, seed=2)
        # Both float64; theirs takes the eigenvalues of a matrix that is not symmetric.
        assert metrics.frechet_distance(x, y) == pytest.approx(fidelity_frechet(x, y), rel=1e-9)

    @pytest.mark.filterwarnings("ignore:Fréchet distance from 20 samples")
    def test_frechet_distance_of_singular_covariances(self) -> None:
        x, y = gaussian(20, 40, seed=1, mean=0.2), gaussian(300, 40, seed=2)
        # Theirs takes roots of eigenvalues that are 0 up to rounding, √1e-16 each.
        assert metrics.frechet_distance(x, y) == pytest.approx(fidelity_frechet(x, y), rel=1e-6)

    @sizes
    @pytest.mark.parametrize("subset_size", [20, 1000])
    def test_kernel_distance(self, rows: int, reference_rows: int, subset_size: int) -> None:
        x, y = gaussian(rows, seed=1, mean=0.2), gaussian(reference_rows, seed=2)
        x[: len(x) // 2] = x[0]
        size = min(subset_size, rows, reference_rows)  # theirs refuses subsets larger than a set
        expected, deviation = fidelity_kernel(x, y, size, 5)
        found = metrics.kernel_distance(x, y, num_subsets=7, subset_size=subset_size, seed=5)
        # Float64 sums in another order.
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * deviation)

    @sizes
    @pytest.mark.parametrize("num_neighbors", [1, 3, 7])
    def test_precision_recall(self, rows: int, reference_rows: int, num_neighbors: int) -> None:
        x, y = gaussian(rows, seed=1, mean=0.5), gaussian(reference_rows, seed=2)
        expected = fidelity_precision_recall(x, y, num_neighbors)
        # No ties between continuous draws: the same counts; theirs are divided in float32.
        assert metrics.precision_recall(x, y, num_neighbors=num_neighbors) == pytest.approx(expected, rel=1e-6)

    def test_precision_recall_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pair = gaussian(60, seed=1, mean=0.5), gaussian(80, seed=2)
        whole = metrics.precision_recall(*pair)
        monkeypatch.setattr(neighbors, "BLOCK_ENTRIES", 900)
        assert metrics.precision_recall(*pair) == whole


class TestNeighborTies:
    """Copies put points exactly on the surfaces of balls, where rounding must not decide."""

    def test_copies_of_the_reference_are_inside(self) -> None:
        """The reference in another order: each of its k-balls holds exactly the point itself and its k neighbours."""
        reference = gaussian(300, 20) * 10 + 100
        order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
        pair = reference[order], reference
        assert metrics.precision_recall(*pair) == (1, 1)
        assert metrics.density_coverage(*pair) == ((5 + 1) / 5, 1)
        assert metrics.precision_distance(*pair) == metrics.recall_distance(*pair) == 0

    def test_balls_of_radius_zero_hold_copies_only(self) -> None:
        """One generated image repeated, a copy of one real image: recall is that image's share."""
        real = gaussian(50, 20) + 30
        assert metrics.precision_recall(real[:1].repeat(40, 1), real) == (1, 1 / 50)


class BruteForce:
    """Balls of k neighbours by differences in float64; near ties count as inside."""

    def __init__(self, x: Tensor, y: Tensor, num_neighbors: int) -> None:
        x, y = (rows.double() - y.double().mean(dim=0) for rows in (x, y))
        self.tie = neighbors.TIE * max(rows.square().sum(dim=1).max() for rows in (x, y))
        x_radii, y_radii = (self.squared(rows, rows).sort(dim=1).values[:, num_neighbors] for rows in (x, y))
        self.distances = self.squared(x, y)
        self.in_y_balls = self.distances <= y_radii + self.tie
        self.in_x_balls = self.distances <= x_radii[:, None] + self.tie

    @staticmethod
    def squared(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def tight_clusters(offset: float, rows: int, seed: int) -> Tensor:
    return gaussian(rows, 4, seed) + offset * torch.arange(rows)[:, None].remainder(3)


class TestNeighbors:
    """Distances by matrix products decide as differences do."""

    @pytest.mark.parametrize(
        ("x", "y"),
        [
            pytest.param(gaussian(700, 20, 1), gaussian(500, 20, 2), id="gaussian"),
            pytest.param(tight_clusters(1e3, 300, 1), tight_clusters(1e3, 400, 2), id="clusters 1e3 apart"),
            pytest.param(tight_clusters(1e6, 300, 1), tight_clusters(1e6, 200, 2), id="clusters 1e6 apart"),
            pytest.param(gaussian(200, 20, 1) * 1e-25, gaussian(200, 20, 2) * 1e-25, id="squares underflow"),
            pytest.param(gaussian(200, 20, 1) * 1e25, gaussian(200, 20, 2) * 1e25, id="squares overflow"),
            pytest.param(gaussian(90, 7, 1).repeat(3, 1), gaussian(90, 7, 1)[:60].repeat(4, 1), id="copies"),
            pytest.param(gaussian(200, 9, 1).round(), gaussian(300, 9, 2).round(), id="a lattice"),
            pytest.param(torch.ones(9, 3), torch.ones(12, 3), id="constant and equal"),
            pytest.param(torch.ones(9, 3), torch.zeros(12, 3), id="constant and different"),
            pytest.param(gaussian(4, 3, 1), gaussian(5, 3, 2), id="no more rows than neighbours"),
            pytest.param(gaussian(900, 1, 1), gaussian(900, 1, 2), id="one dimension"),
            pytest.param(gaussian(200, 2048, 1).exp(), gaussian(150, 2048, 2).exp(), id="2048 dimensions"),
        ],
    )
    def test_is_what_differences_say(self, x: Tensor, y: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = BruteForce(x, y, 3)
        for entries in (neighbors.BLOCK_ENTRIES, 6000):  # in one block, and in many
            monkeypatch.setattr(neighbors, "BLOCK_ENTRIES", entries)
            neighbors.results_by_content.clear()
            in_y, in_x = neighbors.in_each_others_balls(x, y, 3)
            assert torch.equal(in_y, expected.in_y_balls.any(dim=1))
            assert torch.equal(in_x, expected.in_x_balls.any(dim=0))
            assert torch.equal(neighbors.count_members(x, y, 3), expected.in_y_balls.sum(dim=0))
            nearest = expected.distances.gather(1, neighbors.nearest_rows(x, y)[:, None])[:, 0]
            assert (nearest - expected.distances.amin(dim=1)).max() <= expected.tie

    @pytest.mark.parametrize("size", [2, 5, 16, 17, 99, 1000])
    @pytest.mark.parametrize("num_neighbors", [1, 4])
    def test_radii_of_any_number_of_rows(self, size: int, num_neighbors: int) -> None:
        num_neighbors = min(num_neighbors, size - 1)
        x = gaussian(size, 3).double()
        expected = BruteForce.squared(x, x).sort(dim=1).values[:, num_neighbors]
        # A product in float64 of rows of squared length at most 30.
        assert torch.allclose(neighbors.squared_radii(x, num_neighbors), expected, rtol=0, atol=1e-13)


class TestByContent:
    def test_computes_once_for_equal_contents(self) -> None:
        computed = []

        @neighbors.by_content
        def doubled(values: Tensor, factor: int) -> Tensor:
            computed.append((values.clone(), factor))
            return values * factor

        values = gaussian(5)
        assert torch.equal(doubled(values, 2), doubled(values.clone(), 2))
        doubled(values, 2).zero_()  # a caller may change what it was given
        assert torch.equal(doubled(values, 2), values * 2)
        assert len(computed) == 1
        values += 1
        assert torch.equal(doubled(values, 2), values * 2)
        assert torch.equal(doubled(values.double(), 3), values.double() * 3)
        assert len(computed) == 3

    def test_keeps_no_more_than_the_last_results(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(neighbors, "KEPT_RESULTS", 3)
        for seed in range(5):
            neighbors.squared_radii(gaussian(9, seed=seed), 2)
        assert len(neighbors.results_by_content) == 3


class TestSinkhornDistance:
    @pytest.mark.parametrize(("normalize", "blur"), [("l2", 0.05), ("median", 0.3), ("none", 0.5)])
    def test_agrees_with_geomloss(self, normalize: metrics.Normalization, blur: float) -> None:
        geomloss = pytest.importorskip("geomloss")
        x, y = gaussian(60, seed=1, mean=0.4), gaussian(90, seed=2)
        found = metrics.sinkhorn_distance(x, y, blur=blur, normalize=normalize)
        if normalize == "l2":
            x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        if normalize == "median":
            scale = torch.pdist(y).median()
            x, y = x / scale, y / scale
        expected = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.99, backend="tensorized")(x, y).item()
        # geomloss at its finest usual annealing is within .5% of the solution; at scaling .9 it can be 3% below it.
        assert found == pytest.approx(expected, rel=0.01)

    def test_geomloss_backend_gives_its_number(self) -> None:
        geomloss = pytest.importorskip("geomloss")
        x, y = (nn.functional.normalize(gaussian(rows, seed=rows)) for rows in (60, 90))
        expected = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.9, backend="tensorized")(x, y).item()
        # The same call on rows that are normalised twice: one float32 rounding.
        assert metrics.sinkhorn_distance(x, y, backend="geomloss") == pytest.approx(expected, rel=1e-4)

    def test_diracs(self) -> None:
        """Copies of one point against copies of another: ½‖x − y‖², whatever the blur."""
        x, y = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]).repeat(5, 1)
        # float32 log-sum-exp over equal terms.
        assert metrics.sinkhorn_distance(x, y, normalize="none", blur=1.0) == pytest.approx(12.5, rel=1e-4)

    def test_two_points_of_unequal_mass(self) -> None:
        """One dimension, rows normalised to ±1 with p = 19/40 and q = 18/40 at +1: at eps = .0025 and a cost of 2 no
        mass moves in vain, so the plan is diag(q, 1 − p) and p − q across, and S = 2(p − q) + eps (KL(P | p ⊗ q) −
        (H(p) + H(q))/2)."""
        x, y = (torch.tensor([[3.0]] * n + [[-0.1]] * (40 - n)) for n in (19, 18))
        p, q, eps = 19 / 40, 18 / 40, 0.05**2
        mass = np.array([q, p - q, 1 - p])
        divergence = (mass * np.log(mass / np.array([p * q, p * (1 - q), (1 - p) * (1 - q)]))).sum()
        entropies = [-r * math.log(r) - (1 - r) * math.log(1 - r) for r in (p, q)]
        expected = 2 * (p - q) + eps * (divergence - sum(entropies) / 2)
        # Float32 sums of terms near 1.
        assert metrics.sinkhorn_distance(x, y) == pytest.approx(expected, abs=1e-6)

    def test_median_scaling_ignores_units(self) -> None:
        x, y = gaussian(40, seed=1), gaussian(50, seed=2)
        values = [metrics.sinkhorn_distance(unit * x, unit * y, blur=0.3, normalize="median") for unit in (1, 70)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)  # float32 division by another scale

    def test_refuses_unknown_normalisation(self) -> None:
        with pytest.raises(InputError, match='`normalize` must be "l2", "median" or "none", got \'unit\''):
            metrics.sinkhorn_distance(gaussian(4), gaussian(4), normalize="unit")  # type: ignore[arg-type]

    @pytest.mark.parametrize("exponent", [-37, -30, -20, -12, 12, 20, 30, 37])
    def test_unit_of_the_features_does_not_count(self, exponent: int) -> None:
        """Squares of float32 overflow from 1e19 on and vanish from 1e-23 on."""
        x, y = gaussian(30, seed=1), gaussian(40, seed=2, mean=0.5)
        for normalize in ("l2", "median"):
            expected = metrics.sinkhorn_distance(x, y, normalize=normalize)
            found = metrics.sinkhorn_distance(x * 10.0**exponent, y * 10.0**exponent, normalize=normalize)
            assert found == pytest.approx(expected, rel=1e-4)  # the product rounds the features

    def test_rows_of_zeros_stay_zero(self) -> None:
        x, y = gaussian(30, seed=1), gaussian(40, seed=2)
        x[0] = y[0] = 0
        expected = metrics.sinkhorn_distance(*map(torch.nn.functional.normalize, (x, y)), normalize="none")
        assert metrics.sinkhorn_distance(x, y) == expected


class TestNearestDistances:
    def test_closed_form_in_one_dimension(self) -> None:
        """Generated {0, 10}, real {1, 2, 4}: real → generated 1, 2, 4; generated → real 1, 6."""
        generated, real = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [2.0], [4.0]])
        assert metrics.recall_distance(generated, real) == pytest.approx(7 / 3)
        assert metrics.precision_distance(generated, real) == 3.5

    def test_blocks_do_not_change_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        queries, points = gaussian(50, seed=1), gaussian(70, seed=2)
        whole = metrics.nearest_distances(queries, points)
        monkeypatch.setattr(neighbors, "BLOCK_ENTRIES", 500)
        neighbors.results_by_content.clear()
        assert torch.equal(metrics.nearest_distances(queries, points), whole)
        direct = (queries.double()[:, None] - points.double()).norm(dim=2).min(dim=1).values
        assert torch.allclose(whole, direct, rtol=1e-12)  # float64, another order of summation

    def test_copies_are_exactly_zero_far_from_the_origin(self) -> None:
        points = gaussian(100) + 1000  # a matrix-product distance would show about 1e-2 here in float32
        assert metrics.nearest_distances(points[::3], points).max() == 0

    def test_memorisation(self) -> None:
        """Training images returned: 0. Fresh draws: near 1. Half as far away as fresh data: ½ exactly."""
        train, held_out = gaussian(500, 16), gaussian(400, 16, seed=1)
        assert metrics.nearest_distance_ratio(train[:100], train, held_out) == 0
        # Median of 400 nearest distances with a spread of about 10%: a few percent.
        assert metrics.nearest_distance_ratio(gaussian(400, 16, seed=2), train, held_out) == pytest.approx(1, abs=0.05)
        zero = torch.zeros(2, 1)
        assert metrics.nearest_distance_ratio(torch.full((2, 1), 1.0), zero, torch.full((3, 1), 2.0)) == 0.5


class TestCounts:
    def test_density_and_coverage_of_a_half_covered_line(self) -> None:
        """Reals at 0, 1, …, 9, k = 1 (radius 1); two generated points at 0, each in the balls of 0 and 1."""
        real, generated = torch.arange(10.0)[:, None], torch.zeros(2, 1)
        assert metrics.density_coverage(generated, real, num_neighbors=1) == (2.0, 0.2)

    def test_density_coverage_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pair = gaussian(60, seed=1), gaussian(80, seed=2)
        whole = metrics.density_coverage(*pair)
        monkeypatch.setattr(neighbors, "BLOCK_ENTRIES", 900)
        assert metrics.density_coverage(*pair) == whole

    def test_spread_is_the_area_in_the_principal_plane(self) -> None:
        real = gaussian(500, 5) * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])
        assert metrics.principal_spread(real, real) == pytest.approx(1, rel=1e-9)
        assert metrics.principal_spread(real / 3 + 7, real) == pytest.approx(1 / 9, rel=1e-6)
        # Beyond the plane nothing counts, and a line in it has no area.
        assert metrics.principal_spread(real * torch.tensor([1.0, 1, 0, 0, 9]), real) == pytest.approx(1, rel=0.02)
        assert metrics.principal_spread(real * torch.tensor([1.0, 0, 0, 0, 0]), real) < 0.05

    def test_effective_rank_counts_equal_directions(self) -> None:
        """±e₁, …, ±e_k in D dimensions: k equal eigenvalues, so rank k."""
        axes = torch.eye(8)[:5]
        assert metrics.effective_rank(torch.cat([axes, -axes])) == pytest.approx(5, rel=1e-9)  # float64 SVD

    def test_class_histogram(self) -> None:
        """Shares (½, ½, 0) against (0, ½, ½): total variation ½. Equal sets: 0."""
        x, y = torch.eye(3)[[0, 1, 0, 1]], torch.eye(3)[[1, 2]]
        assert metrics.class_histogram_distance(x, y) == 0.5
        assert metrics.class_histogram_distance(x, x) == 0


class TestBadInput:
    def test_class_histogram_without_classes(self) -> None:
        with pytest.raises(InputError, match=r"`logits` must have at least 1 column, got \(4, 0\)"):
            metrics.class_histogram_distance(torch.zeros(4, 0), torch.zeros(5, 0))

    def test_class_histogram_names_classes_that_the_reference_lacks(self, recwarn: pytest.WarningsRecorder) -> None:
        """A sample in such a class counts, ½ (|1/4| + |1/4|), but missing ones cannot; an empty class of the samples is
        what the metric is for."""
        samples, real = torch.eye(4)[[0, 1, 1, 2]], torch.eye(4)[[0, 0, 1, 1]]
        with pytest.warns(UserWarning, match="a reference without images of class 2, 3: it cannot tell"):
            assert metrics.class_histogram_distance(samples, real) == 0.25
        metrics.class_histogram_distance(samples, torch.eye(4))
        assert not recwarn

    def test_extrapolation_from_singular_covariances_warns(self) -> None:
        """The smallest of the sizes is half of 18 rows, fewer than 10 dimensions; of 20 rows it is 10."""
        x, y = torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), torch.eye(20, 10)
        with pytest.warns(UserWarning, match="Fréchet distance from 9 samples in 10 dimensions"):
            metrics.frechet_distance_infinity(x[:18], y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metrics.frechet_distance_infinity(x, y)

    @pytest.mark.parametrize("metric", FEATURE_METRICS)
    def test_one_line_names_the_argument(self, metric: Callable[[Tensor, Tensor], object]) -> None:
        good, bad = gaussian(10), gaussian(10)
        bad[3, 2] = float("nan")
        with pytest.raises(InputError, match="`features` must have no row with NaN or infinity, got 1"):
            metric(bad, good)
        with pytest.raises(InputError, match="`reference_features` must have no row with NaN"):
            metric(good, bad)
        with pytest.raises(
            InputError, match=r"`features` must have the 6 columns of `reference_features`, got \(10, 5\)"
        ):
            metric(good[:, :5], good)
        with pytest.raises(InputError, match="`features` must have at least 2 rows"):
            metric(good[:1], good)
        with pytest.raises(InputError, match="must be a float tensor"):
            metric(good.long(), good)

    def test_too_few_rows_for_neighbours(self) -> None:
        with pytest.raises(InputError, match="`num_neighbors` must be from 1 to 2 for 3 rows, got 3"):
            metrics.precision_recall(gaussian(3), gaussian(10))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.zeros((300, 4)), "(dtype('float64'), (300, 4))"),
        (torch.zeros(300), "(torch.float32, (300,))"),
        ([[0.5] * 4] * 300, "(<class 'list'>, 300)"),
        ("features.pt", "'features.pt'"),
        (None, "None"),
    ],
)
def test_messages_show_no_numbers(value: object, shown: str) -> None:
    for call in (metrics.effective_rank, lambda x: metrics.frechet_distance(gaussian(9), x)):
        with pytest.raises(InputError, match=re.escape(f"must be a float tensor [N, D], got {shown}")):
            call(value)  # type: ignore[operator]
    with pytest.raises(InputError, match=re.escape(f"got {shown}")):
        extract_image_set(value, nn.Linear(1, 1))  # type: ignore[arg-type]


class TestPatchSlicedWasserstein:
    def test_constant_images(self) -> None:
        """Every patch shifted by (a − b)·1: ‖v‖²/D = (a − b)² when D = 16 divides the 128 directions."""
        a, b = torch.full((5, 1, 8, 8), 0.5), torch.full((9, 1, 8, 8), -0.25)
        # float32 projections onto an orthogonal basis.
        assert pixels.patch_sliced_wasserstein(a, b, patch_size=4) == pytest.approx(0.75**2, rel=1e-5)

    def test_shifted_copies_and_identity(self) -> None:
        images = 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        found = pixels.patch_sliced_wasserstein(images + 0.5, images, patch_size=4, num_projections=96)
        assert found == pytest.approx(0.25, rel=1e-4)  # D = 48 divides 96; float32 sums of 48 terms
        assert pixels.patch_sliced_wasserstein(images, images) == 0

    def test_copies_of_every_patch_change_nothing(self) -> None:
        """1×1 patches {0, 1} against {0, 0, 1, 1}: every quantile of both is the same."""
        x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        assert pixels.patch_sliced_wasserstein(x, x.repeat(2, 1, 1, 1), num_projections=1) == 0

    def test_is_twice_the_loss_on_the_same_directions(self) -> None:
        """W₂², where transport costs are ½ W₂²: of all 4×4 patches, in unequal numbers, the loss doubled."""
        x, y = (torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(n)) for n in (5, 8))
        directions = random_directions(32, 16, orthogonal=True, generator=seeded_generator(3))
        patches = [a.unfold(2, 4, 1).unfold(3, 4, 1).reshape(-1, 16) for a in (x, y)]
        loss = sliced_wasserstein(*patches, projections=directions).item()
        found = pixels.patch_sliced_wasserstein(x, y, patch_size=4, num_projections=32, seed=3)
        assert found == pytest.approx(2 * loss, rel=1e-5)  # float32 sums in another order

    def test_patch_is_capped_at_the_image(self) -> None:
        a, b = torch.zeros(4, 1, 3, 5), torch.ones(4, 1, 3, 5)
        assert pixels.patch_sliced_wasserstein(a, b, num_projections=9) == pytest.approx(1, rel=1e-5)

    def test_sees_texture_that_a_mean_does_not(self) -> None:
        generator = torch.Generator().manual_seed(0)
        flat = torch.zeros(50, 1, 8, 8)
        noisy = 0.2 * torch.randn(flat.shape, generator=generator).clamp(-3, 3)
        # The variance of the noise is .04 and every projection of it has that variance.
        assert pixels.patch_sliced_wasserstein(noisy, flat) == pytest.approx(0.04, rel=0.05)


class TestPixelStatistics:
    def test_speckle_counts_lonely_grey(self) -> None:
        """One lonely grey pixel of 64 counts; grey beside a stroke does not."""
        image = torch.full((1, 1, 8, 8), -1.0)
        image[0, 0, 1, 1] = -0.5
        image[0, 0, 5, 5], image[0, 0, 5, 6] = 1.0, -0.5
        assert pixels.speckle_share(image) == 1 / 64

    def test_laplacian_of_ramp_and_checkerboard(self) -> None:
        ramp = torch.linspace(-1, 1, 9).expand(1, 1, 9, 9)
        checkerboard = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
        assert pixels.laplacian_response(ramp) == pytest.approx(0, abs=1e-6)  # float32 ramp
        assert pixels.laplacian_response(checkerboard[None, None]) == 8

    def test_spectrum_of_scaled_images(self) -> None:
        images = random_images(5).float() / 127.5 - 1
        expected = 2 * math.log10(2)
        assert pixels.spectrum_distance(images / 2, images) == pytest.approx(expected, rel=1e-9)  # exact halving

    def test_refuses_the_wrong_range(self) -> None:
        images = random_images(4).float()
        with pytest.raises(InputError, match=r"`images` must lie in \[-1, 1\] \(from 0 … 255"):
            pixels.patch_sliced_wasserstein(images, images / 255)
        with pytest.raises(InputError, match="`reference_images` must be finite"):
            pixels.spectrum_distance(images / 255, images * float("nan"))
        with pytest.raises(InputError, match=r"`images` must have the shape \(1, 8, 8\) of the reference"):
            pixels.spectrum_distance(images[..., :4] / 255, images / 255)


class TinyClassifier(nn.Module):
    """A real network of 12 features; its dropout would reveal training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(12, 4)

    def extract(self, images: Tensor) -> Tensor:
        return self.features(images)

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self.extract(images))


@pytest.fixture
def network() -> TinyClassifier:
    torch.manual_seed(0)
    return TinyClassifier()


class TestEvaluateImages:
    def test_equal_sets_score_zero(self, network: TinyClassifier) -> None:
        images = random_images(60)
        values = evaluate_images(images, reference=images, extractor=network)
        for name in ("frechet_distance", "frechet_distance_infinity", "sinkhorn_distance", "sinkhorn_distance_scaled"):
            assert values[name] == pytest.approx(0, abs=1e-5), name  # float32 potentials, float64 eigenvalues
        for name in ("recall_distance", "precision_distance", "patch_sliced_wasserstein", "spectrum_distance"):
            assert values[name] == 0, name
        assert values["precision"] == values["recall"] == values["coverage"] == 1
        assert values["class_histogram_distance"] == 0

    def test_batches_and_described_sets_change_nothing(self, network: TinyClassifier) -> None:
        images, reference = random_images(40), random_images(50, seed=1)
        whole = evaluate_images(images, reference=reference, extractor=network)
        image_set = extract_image_set(reference, network, batch_size=7)
        parts = evaluate_images(images, reference=image_set, extractor=network, batch_size=7)
        assert parts == pytest.approx(whole, rel=1e-3, abs=1e-6)  # matrix products of other sizes round differently
        assert network.training

    def test_named_metrics_are_those_of_the_whole_table(self, network: TinyClassifier) -> None:
        images, reference, train = random_images(40), random_images(50, seed=1), random_images(60, seed=2)
        labelled = extract_image_set(reference, network, labels=torch.arange(50) % 2)
        asked = torch.arange(40) % 2
        whole = evaluate_images(images, reference=labelled, extractor=network, train=train, class_labels=asked)
        assert set(whole) == set(METRICS) - set(SECOND)
        chosen = ["speckle_share", "recall", "nearest_distance_ratio", "kernel_distance"]
        some = evaluate_images(images, reference=reference, extractor=network, train=train, metrics=chosen)
        assert some == {name: whole[name] for name in whole if name in chosen}
        assert list(some) == ["kernel_distance", "recall", "nearest_distance_ratio", "speckle_share"]
        floor = real_floor(reference, train, 20, extractor=network, metrics={"precision"})
        assert floor == {"precision": real_floor(reference, train, 20, extractor=network)["precision"]}

    def test_refuses_unknown_metrics_and_those_it_cannot_measure(self, network: TinyClassifier) -> None:
        images = random_images(20)
        with pytest.raises(InputError, match=r"`metrics` must be among frechet_distance, .*, got 'fid'"):
            evaluate_images(images, reference=images, extractor=network, metrics=["recall", "fid"])
        with pytest.raises(InputError, match="`metrics` must name at least one metric"):
            evaluate_images(images, reference=images, extractor=network, metrics=[])
        with pytest.raises(InputError, match="'nearest_distance_ratio' or be given `train`"):
            evaluate_images(images, reference=images, extractor=network, metrics=["nearest_distance_ratio"])
        with pytest.raises(InputError, match="'class_frechet_distance' or be given `class_labels` and labels of the"):
            labels = torch.zeros(20, dtype=torch.long)
            names = ["class_frechet_distance"]
            evaluate_images(images, reference=images, extractor=network, metrics=names, class_labels=labels)

    @pytest.mark.filterwarnings("ignore")  # of few images
    def test_few_images_are_measured_as_far_as_they_go(self, network: TinyClassifier) -> None:
        lost = {"frechet_distance_infinity", "precision", "recall", "density", "coverage"}
        for count in range(2, 8):
            images, reference = random_images(count), random_images(20, seed=1)
            for pair in ((images, reference), (reference, images)):
                values = evaluate_images(pair[0], reference=pair[1], extractor=network)
                missing = lost if count < 4 else {"density", "coverage"} if count < 6 else set()
                missing = missing | {"principal_spread"} if count < 3 else missing
                missing = missing | {"nearest_distance_ratio", "class_accuracy", "class_frechet_distance"}
                assert set(values) == set(METRICS) - set(SECOND) - missing
                assert all(math.isfinite(value) for value in values.values())
        with pytest.raises(InputError, match="`metrics` must leave out 'density' or be given 6 images on either side"):
            evaluate_images(random_images(5), reference=reference, extractor=network, metrics=["recall", "density"])

    def test_a_reference_in_which_all_is_alike_is_doubted(self, network: TinyClassifier) -> None:
        with torch.no_grad():
            network.features[1].weight[1:] = 0
        with pytest.warns(UserWarning, match="The evaluator cannot be trusted: .* effective rank of 1.0, below 5"):
            evaluate_images(random_images(20), reference=random_images(20, seed=1), extractor=network)

    def test_mode_of_the_network_is_restored_after_an_error(self, network: TinyClassifier) -> None:
        with pytest.raises(RuntimeError):
            extract_image_set(random_images(4, side=5), network)
        assert network.training

    def test_floor_is_near_zero_and_the_same_each_time(self, network: TinyClassifier) -> None:
        test, train = random_images(100), random_images(300, seed=1)
        floor = real_floor(test, train, 100, extractor=network)
        assert floor == real_floor(test, train, 100, extractor=network)
        noise = evaluate_images(random_images(100, seed=2) // 2, reference=test, extractor=network, train=train)
        assert floor["frechet_distance"] < noise["frechet_distance"] / 5
        # Fresh draws of one distribution; the median of 100 nearest distances has a few percent of error.
        assert floor["nearest_distance_ratio"] == pytest.approx(1, abs=0.2)

    def test_floor_of_more_images_than_there_are_draws_nine_tenths(self, network: TinyClassifier) -> None:
        test, train = random_images(50), random_images(100, seed=1)
        assert real_floor(test, train, 500, extractor=network) == real_floor(test, train, 90, extractor=network)

    def test_refusals(self, network: TinyClassifier) -> None:
        images = random_images(10)
        with pytest.raises(InputError, match="`images` must not be constant, got 0"):
            evaluate_images(torch.zeros_like(images), reference=images, extractor=network)
        with pytest.raises(InputError, match="`images` must hold more than copies of one image, got 10"):
            evaluate_images(images[:1].expand(10, -1, -1, -1), reference=images, extractor=network)
        with pytest.raises(InputError, match=r"`reference` must reach beyond 1 in 0 … 255 \(floats in \[0, 1\] need"):
            evaluate_images(images, reference=(images / 255).round().to(torch.uint8), extractor=network)
        with pytest.warns(UserWarning, match="2 of 10 `images` are blank"):
            images = images.clone()
            images[3:5] = 77
            extract_image_set(images, network)
        with pytest.raises(InputError, match="`num_samples` must be at least 2, got 1"):
            real_floor(images, images, 1, extractor=network)
        with pytest.raises(InputError, match="`train` must hold 8 images"):
            real_floor(images, images[:7], 2, extractor=network)

    @pytest.mark.parametrize(
        ("convert", "advice"),
        [
            (lambda x: x.float(), r"for floats in [0, 255]: images.round()"),
            (lambda x: x / 255, r"for floats in [0, 1]: (255 * images)"),
            (lambda x: x / 127.5 - 1, r"for floats in [-1, 1]: ot_diffusers.images.to_uint8"),
            (lambda x: x.float() * torch.nan, "they hold NaN or infinity"),
            (lambda x: x.float() - 300, "they range from -3"),
        ],
    )
    def test_float_images_are_told_their_range(
        self, network: TinyClassifier, convert: Callable[[Tensor], Tensor], advice: str
    ) -> None:
        images = random_images(10)
        message = r"`images` must be a uint8 tensor \[N, C, H, W\] \(" + re.escape(advice)
        with pytest.raises(InputError, match=message):
            evaluate_images(convert(images), reference=images, extractor=network)

    def test_sets_of_different_networks_are_not_compared(self, network: TinyClassifier) -> None:
        other = copy.deepcopy(network)
        with torch.no_grad():
            other.head.bias += 1
        images, reference = random_images(20), extract_image_set(random_images(20, seed=1), other)
        with pytest.raises(InputError, match="`images` must be described by the network that described `reference`"):
            evaluate_images(images, reference=reference, extractor=network)
        train = extract_image_set(random_images(20, seed=2), network)
        with pytest.raises(InputError, match="`train` must be described by the network"):
            evaluate_images(images, reference=reference, extractor=other, train=train)
        same = extract_image_set(images, copy.deepcopy(other))
        assert evaluate_images(same, reference=reference, extractor=other, metrics=["recall"])

    def test_features_that_are_not_numbers(self, network: TinyClassifier) -> None:
        with torch.no_grad():
            network.features[1].bias[0] = torch.nan
        images = random_images(10)
        with pytest.raises(InputError, match="`features` must have no row with NaN or infinity, got 10"):
            evaluate_images(images, reference=images, extractor=network)


class TestCachedDescriptions:
    @pytest.fixture
    def calls(self, network: TinyClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Batch sizes that have gone through the network, with an empty cache folder."""
        monkeypatch.setenv("OT_DIFFUSERS_CACHE", str(tmp_path))
        seen: list[int] = []
        network.features.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        return seen

    def test_second_call_does_not_run_the_network(self, network: TinyClassifier, calls: list[int]) -> None:
        first = extract_image_set(random_images(9), network, cache=True)
        assert sum(calls) == 18  # features, and logits
        second = extract_image_set(random_images(9), copy.deepcopy(network), cache=True)
        assert sum(calls) == 18
        assert torch.equal(first.features, second.features)
        assert first.logits is not None and second.logits is not None and torch.equal(first.logits, second.logits)
        assert first.extractor == second.extractor

    def test_other_pixels_shapes_and_weights_miss(self, network: TinyClassifier, calls: list[int]) -> None:
        images = random_images(9)
        extract_image_set(images, network, cache=True)
        images[3, 0, 2, 2] ^= 1
        extract_image_set(images, network, cache=True)
        assert sum(calls) == 36
        extract_image_set(images.reshape(9, 1, 4, 16), network, cache=True)
        assert sum(calls) == 54
        with torch.no_grad():
            network.head.weight[0, 0] += 1
        image_set = extract_image_set(images, network, cache=True)
        assert sum(calls) == 72
        assert torch.equal(image_set.features, extract_image_set(images, network).features)

    def test_nothing_is_kept_without_being_asked(
        self, network: TinyClassifier, calls: list[int], tmp_path: Path
    ) -> None:
        extract_image_set(random_images(9), network)
        assert not list(tmp_path.iterdir())
