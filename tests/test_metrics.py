"""Metrics against closed forms, properties, and their peers (SciPy, geomloss, torch-fidelity)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from ot_diffusers.errors import InputError
from ot_diffusers.evaluation import metrics, pixels
from ot_diffusers.evaluation.evaluate import describe_images, evaluate_images, real_floor
from ot_diffusers.evaluation.report import METRICS

FEATURE_METRICS = [
    metrics.frechet_distance,
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

    def test_median_scaling_ignores_units(self) -> None:
        x, y = gaussian(40, seed=1), gaussian(50, seed=2)
        values = [metrics.sinkhorn_distance(unit * x, unit * y, blur=0.3, normalize="median") for unit in (1, 70)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)  # float32 division by another scale

    def test_refuses_unknown_normalisation(self) -> None:
        with pytest.raises(InputError, match='`normalize` must be "l2", "median" or "none", got \'unit\''):
            metrics.sinkhorn_distance(gaussian(4), gaussian(4), normalize="unit")  # type: ignore[arg-type]


class TestNearestDistances:
    def test_closed_form_in_one_dimension(self) -> None:
        """Generated {0, 10}, real {1, 2, 4}: real → generated 1, 2, 4; generated → real 1, 6."""
        generated, real = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [2.0], [4.0]])
        assert metrics.recall_distance(generated, real) == pytest.approx(7 / 3)
        assert metrics.precision_distance(generated, real) == 3.5

    def test_blocks_do_not_change_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        queries, points = gaussian(50, seed=1), gaussian(70, seed=2)
        whole = metrics.nearest_distances(queries, points)
        monkeypatch.setattr(metrics, "BLOCK_SIZE", 7)
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
        monkeypatch.setattr(metrics, "BLOCK_SIZE", 13)
        assert metrics.density_coverage(*pair) == whole

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

    def test_unequal_sizes_interpolate_quantiles(self) -> None:
        """1×1 patches {0, 1} against {0, 0, 1, 1}: the two midpoint quantiles of both are 0 and 1."""
        x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        assert pixels.patch_sliced_wasserstein(x, x.repeat(2, 1, 1, 1), num_projections=1) == 0

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
        with pytest.raises(InputError, match=r"`images` must have its smallest and largest value in \[-1, 1\]"):
            pixels.patch_sliced_wasserstein(images, images / 255)
        with pytest.raises(InputError, match="`reference_images` must have its smallest"):
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
        for name in ("frechet_distance", "sinkhorn_distance", "sinkhorn_distance_scaled"):
            assert values[name] == pytest.approx(0, abs=1e-5), name  # float32 potentials, float64 eigenvalues
        for name in ("recall_distance", "precision_distance", "patch_sliced_wasserstein", "spectrum_distance"):
            assert values[name] == 0, name
        assert values["precision"] == values["recall"] == values["coverage"] == 1
        assert values["class_histogram_distance"] == 0

    def test_batches_and_described_sets_change_nothing(self, network: TinyClassifier) -> None:
        images, reference = random_images(40), random_images(50, seed=1)
        whole = evaluate_images(images, reference=reference, extractor=network)
        described = describe_images(reference, network, batch_size=7)
        parts = evaluate_images(images, reference=described, extractor=network, batch_size=7)
        assert parts == pytest.approx(whole, rel=1e-3, abs=1e-6)  # matrix products of other sizes round differently
        assert network.training

    def test_named_metrics_are_those_of_the_whole_table(self, network: TinyClassifier) -> None:
        images, reference, train = random_images(40), random_images(50, seed=1), random_images(60, seed=2)
        whole = evaluate_images(images, reference=reference, extractor=network, train=train)
        assert set(whole) == set(METRICS)
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

    def test_mode_of_the_network_is_restored_after_an_error(self, network: TinyClassifier) -> None:
        with pytest.raises(RuntimeError):
            describe_images(random_images(4, side=5), network)
        assert network.training

    def test_floor_is_near_zero_and_the_same_each_time(self, network: TinyClassifier) -> None:
        test, train = random_images(100), random_images(300, seed=1)
        floor = real_floor(test, train, 100, extractor=network)
        assert floor == real_floor(test, train, 100, extractor=network)
        noise = evaluate_images(random_images(100, seed=2) // 2, reference=test, extractor=network, train=train)
        assert floor["frechet_distance"] < noise["frechet_distance"] / 5
        # Fresh draws of one distribution; the median of 100 nearest distances has a few percent of error.
        assert floor["nearest_distance_ratio"] == pytest.approx(1, abs=0.2)

    def test_refusals(self, network: TinyClassifier) -> None:
        images = random_images(10)
        with pytest.raises(InputError, match=r"`images` must be a uint8 tensor \[N, C, H, W\], got \(torch.float32"):
            evaluate_images(images.float(), reference=images, extractor=network)
        with pytest.raises(InputError, match="`images` must not be constant, got 0"):
            evaluate_images(torch.zeros_like(images), reference=images, extractor=network)
        with pytest.raises(InputError, match="`num_samples` must be from 2 to 8"):
            real_floor(images, images, 9, extractor=network)
