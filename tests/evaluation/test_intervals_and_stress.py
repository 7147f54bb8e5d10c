"""Intervals and stress tests in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ot_diffusers.errors import InputError
from ot_diffusers.evaluation import stress
from ot_diffusers.evaluation.intervals import holm, mean_interval, paired_difference


class TestIntervals:
    def test_interval_of_a_mean(self) -> None:
        values = [1.0, 2.0, 4.0, 3.0]
        found = mean_interval(values)
        expected = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-12) and found.mean == 2.5

    def test_agrees_with_scipy(self) -> None:
        a, b = [1.0, 2.0, 4.0, 3.0, 5.0], [0.5, 1.0, 3.5, 2.0, 4.0]
        found, expected = paired_difference(a, b), scipy.stats.ttest_rel(b, a)
        interval = expected.confidence_interval(0.95)
        assert (found.low, found.high, found.p_value) == pytest.approx((*interval, expected.pvalue), rel=1e-12)
        assert found.shown and found.mean == -0.8

    def test_two_pairs_closed_form(self) -> None:
        """n = 2: one degree of freedom, t₀.₉₇₅ = tan(.475 π); differences 0 and 2 have standard error 1."""
        found = paired_difference([0, 0], [0, 2])
        assert found.high == pytest.approx(1 + math.tan(0.475 * math.pi), rel=1e-9)
        assert str(found) == "not significant (+1 [-11.7, +13.7])"

    def test_coverage(self) -> None:
        """Of 400 studies without a difference, 5% should show one: 20 ± 3 standard deviations of 4.4."""
        draws = np.random.default_rng(0).normal(size=(400, 2, 5))
        assert 7 <= sum(paired_difference(a.tolist(), b.tolist()).shown for a, b in draws) <= 33

    def test_equal_differences(self) -> None:
        assert paired_difference([1, 2], [1, 2]).p_value == 1 and not paired_difference([1, 2], [1, 2]).shown
        assert paired_difference([1, 2], [2, 3]).shown

    def test_holm(self) -> None:
        """Sorted .01, .02, .03, .9 times 4, 3, 2, 1, made ascending: .04, .06, .06, .9, in the order given."""
        found = holm({"c": 0.03, "a": 0.01, "d": 0.9, "b": 0.02})
        assert list(found) == ["c", "a", "d", "b"]
        assert list(found.values()) == pytest.approx([0.06, 0.04, 0.9, 0.06])

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="`b` must hold one value for each of the 2 of `a`, got 3"):
            paired_difference([1, 2], [1, 2, 3])
        with pytest.raises(InputError, match="`a` must hold at least 2 values, got 1"):
            paired_difference([1], [2])
        with pytest.raises(InputError, match="must be finite"):
            paired_difference([1, float("nan")], [2, 2])


class TestStress:
    IMAGES = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1).expand(200, 1, 4, 4).contiguous()

    def test_amount_zero_changes_nothing(self) -> None:
        labels = torch.arange(200) % 10
        for damage in (
            stress.add_noise,
            stress.collapse_modes,
            stress.memorise(self.IMAGES),
            stress.drop_classes(labels),
        ):
            assert torch.equal(damage(self.IMAGES, 0, torch.Generator()), self.IMAGES)

    def test_noise_has_its_standard_deviation(self) -> None:
        grey = torch.full((100, 1, 10, 10), 128, dtype=torch.uint8)
        noisy = stress.add_noise(grey, 0.1, torch.Generator().manual_seed(0))
        # 10,000 draws: .7% standard error of the deviation, rounding adds 1/12.
        assert noisy.float().std().item() == pytest.approx(25.5, rel=0.03)

    def test_collapse_keeps_the_share_left(self) -> None:
        for share, left in ((0.5, 100), (0.9, 20), (1.0, 1)):
            damaged = stress.collapse_modes(self.IMAGES, share, torch.Generator().manual_seed(0))
            assert len(damaged) == 200 and len(damaged.unique()) == left

    def test_memorise_takes_different_training_images(self) -> None:
        train = self.IMAGES[:50] + 205  # levels 205 … 254, none of which the images have
        damaged = stress.memorise(train)(self.IMAGES, 0.25, torch.Generator().manual_seed(0))
        levels = damaged[:, 0, 0, 0]
        assert sorted(levels[levels > 204].tolist()) == list(range(205, 255))
        assert len(levels[levels < 200].unique()) == 150

    def test_dropped_classes_are_gone(self) -> None:
        labels = self.IMAGES[:, 0, 0, 0].long() % 10
        draws = {
            amount: stress.drop_classes(labels)(self.IMAGES, amount, torch.Generator().manual_seed(0))
            for amount in (3, 5)
        }
        left = {amount: set((damaged[:, 0, 0, 0] % 10).tolist()) for amount, damaged in draws.items()}
        assert all(len(damaged) == 200 for damaged in draws.values())
        assert len(left[3]) == 7 and len(left[5]) == 5 and left[5] < left[3]
        with pytest.raises(InputError, match="`amount` must leave one of 10 classes, got 10"):
            stress.drop_classes(labels)(self.IMAGES, 10, torch.Generator())

    def test_an_empty_class_cannot_be_dropped(self) -> None:
        with pytest.raises(InputError, match=r"`labels` must give every class at least one image, .* class \[1\]"):
            stress.drop_classes(torch.tensor([0, 2, 2]))
        with pytest.raises(InputError, match="`labels` must be a tensor of integers"):
            stress.drop_classes(torch.tensor([]))

    def test_verdicts(self) -> None:
        def measure(images: torch.Tensor) -> dict[str, float]:
            unique = float(len(images.unique()))
            return {"unique": unique, "blind": 1.0, "wrong": (unique - 100) ** 2}

        curves = stress.stress_test(self.IMAGES, stress.collapse_modes, [0, 0.5, 1], measure, repeats=2)
        assert {name: curve.verdict for name, curve in curves.items()} == {
            "unique": "monotone",
            "blind": "flat",
            "wrong": "not monotone",
        }
        assert curves["unique"].means == (200, 100, 1)
        with pytest.raises(InputError, match="`amounts` must be two or more, ascending"):
            stress.stress_test(self.IMAGES, stress.collapse_modes, [0.5, 0], measure)
