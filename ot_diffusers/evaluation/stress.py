"""Stress tests of metrics: real images are damaged by increasing amounts, and a good metric responds.

A damage is a function (images, amount, generator) → images of uint8 [N, C, H, W]; amount 0 leaves them unchanged.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import require
from ..seeds import seeded_generator
from .intervals import MeanInterval, mean_interval, paired_difference
from .metrics import tensor_summary

Damage = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class StressCurve:
    """One metric against the amount of one damage.

    Attributes:
        amounts: ascending.
        values: [repeats] of each amount.
    """

    amounts: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def means(self) -> tuple[float, ...]:
        """Mean over the repeats at each amount."""
        return tuple(statistics.fmean(values) for values in self.values)

    @property
    def intervals(self) -> tuple[MeanInterval, ...]:
        """95% interval of each mean over the repeats, at least two of them."""
        return tuple(mean_interval(values) for values in self.values)

    @property
    def verdict(self) -> Literal["monotone", "flat", "not monotone"]:
        """Whether the means only rise or only fall; `"flat"` if no amount differs from the first.

        An amount differs if the 95% interval of the difference over the repeats excludes 0; with a single repeat, any
        difference counts.
        """
        if not any(_differ(self.values[0], values) for values in self.values[1:]):
            return "flat"
        steps = [after - before for before, after in zip(self.means, self.means[1:], strict=False)]
        return "monotone" if all(s >= 0 for s in steps) or all(s <= 0 for s in steps) else "not monotone"

    @property
    def trend(self) -> Literal["rises", "falls", "flat", "not monotone"]:
        """The verdict, with the direction of a monotone curve."""
        if self.verdict != "monotone":
            return self.verdict
        return "rises" if self.means[-1] > self.means[0] else "falls"


def add_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation `sigma`, as a share of the range 0 … 255, clamped and rounded."""
    noise = torch.randn(images.shape, generator=generator)
    return (images.float() + 255 * sigma * noise).round().clamp(0, 255).to(torch.uint8)


def collapse_modes(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a `share` in [0, 1] of the images by copies of the others (by copies of one image for 1)."""
    return _replace(images, share, generator, images)


def memorise(train_images: Tensor) -> Damage:
    """A damage that replaces a share of the images by training images."""

    def damage(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
        return _replace(images, share, generator, train_images)

    return damage


def drop_classes(labels: Tensor) -> Damage:
    """A damage that removes the images of `amount` classes and repeats images of the others to keep N.

    The generator draws an order of the classes, so a larger amount also removes the classes of a smaller one.

    Args:
        labels: int [N] from 0 to K − 1, the labels of the images to be damaged; every class has an image.

    Raises:
        InputError: a class without images, whose removal would be no damage.
    """
    good = isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) > 0 and not labels.is_floating_point()
    require(good, "labels", "be a tensor of integers [N]", tensor_summary(labels))
    classes = labels.unique()
    empty = sorted(set(range(int(classes.max()) + 1)) - set(classes.tolist()))
    require(not empty, "labels", "give every class at least one image", f"none of class {empty}")

    def damage(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
        require(len(labels) == len(images), "labels", f"label all {len(images)} images", len(labels))
        require(0 <= amount < len(classes), "amount", f"leave one of {len(classes)} classes", amount)
        order = torch.randperm(len(classes), generator=generator)
        kept = torch.isin(labels, classes[order[int(amount) :]]).nonzero()[:, 0]
        missing = len(images) - len(kept)
        copies = kept[torch.randint(len(kept), (missing,), generator=generator)]
        return images[torch.cat([kept, copies])]

    return damage


def stress_test(
    images: Tensor,
    damage: Damage,
    amounts: Sequence[float],
    measure: Callable[[Tensor], Mapping[str, float]],
    *,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, StressCurve]:
    """A curve of every metric of `measure` along `amounts` of a damage.

    Args:
        images: real, uint8 [N, C, H, W], disjoint from the reference inside `measure`; or their features [N, D], if
            `damage` and `measure` take those.
        damage: one of this module, or your own.
        amounts: ascending; the first should be 0.
        measure: images to metric values, such as `lambda x: evaluate_images(x, reference=…, extractor=…)`.
        repeats: independent draws of the damage at each amount.
        seed: random seed; repeat r is drawn from `seed + r` at every amount, so the amounts are paired.
    """
    require(len(amounts) >= 2 and list(amounts) == sorted(amounts), "amounts", "be two or more, ascending", amounts)
    measured = []
    for amount in amounts:
        draws = [damage(images, amount, seeded_generator(seed + repeat)) for repeat in range(repeats)]
        alike = all(torch.equal(draw, draws[0]) for draw in draws)  # undamaged: one measurement stands for all
        measured.append([measure(draws[0])] * repeats if alike else [measure(draw) for draw in draws])
    return {
        metric: StressCurve(tuple(amounts), tuple(tuple(run[metric] for run in runs) for runs in measured))
        for metric in measured[0][0]
    }


def _differ(first: Sequence[float], second: Sequence[float]) -> bool:
    return first[0] != second[0] if len(first) == 1 else paired_difference(first, second).shown


def _replace(images: Tensor, share: float, generator: torch.Generator, source: Tensor) -> Tensor:
    """The images with a random `share` replaced by images of `source` or, if that is `images`, by the other images."""
    require(0 <= share <= 1, "share", "lie in [0, 1]", share)
    order = torch.randperm(len(images), generator=generator)
    count = min(round(share * len(images)), len(images) - (source is images))
    gone, left = order[:count], order[count:]
    if source is images:
        copies = left[torch.randint(len(left), (count,), generator=generator)]
    else:
        copies = torch.randperm(len(source), generator=generator)[:count]
        require(len(copies) == count, "train_images", f"hold at least {count} images", len(source))
    damaged = images.clone()
    damaged[gone] = source[copies]
    return damaged
