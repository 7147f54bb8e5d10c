"""Significance of differences between methods: t intervals over seeds, Holm's correction over metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import require


@dataclass(frozen=True)
class MeanInterval:
    """A mean over seeds with its two-sided interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> MeanInterval:
    """Student's interval of a mean: mean ± t · s/√n with n − 1 degrees of freedom.

    Args:
        values: one per seed, at least 2.
        level: coverage of the interval, in (0, 1).

    Raises:
        InputError: fewer than 2 values, or one that is not finite.

    Reference: [Student1908].
    """
    difference = paired_difference([0.0] * len(values), values, level=level)
    return MeanInterval(difference.mean, difference.low, difference.high)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of b − a over paired seeds, with its interval.

    Attributes:
        mean: mean difference.
        low, high: ends of the two-sided interval.
        p_value: two-sided p of "no difference", uncorrected.
        pairs: number of seeds.
        level: coverage of the interval.
    """

    mean: float
    low: float
    high: float
    p_value: float
    pairs: int
    level: float

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        interval = f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"
        return interval if self.shown else f"not significant ({interval})"


def paired_difference(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> PairedDifference:
    """Student's paired interval of b − a: mean ± t · s/√n with n − 1 degrees of freedom.

    Args:
        a, b: one value per seed, in the same order of seeds; at least 2 (with 2 or 3 the interval is very wide).
        level: coverage of the interval, in (0, 1).

    Raises:
        InputError: unequal lengths, fewer than 2 pairs, values that are not finite.

    Reference: [Student1908].
    """
    from scipy import stats

    require(len(a) == len(b), "b", f"hold one value for each of the {len(a)} of `a`", len(b))
    require(len(a) >= 2, "a", "hold at least 2 values", len(a))
    require(all(map(math.isfinite, [*a, *b])), "a, b", "be finite", (list(a), list(b)))
    require(0 < level < 1, "level", "lie between 0 and 1", level)
    differences = [y - x for x, y in zip(a, b, strict=True)]
    pairs = len(differences)
    mean = math.fsum(differences) / pairs
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (pairs - 1) / pairs)
    if error == 0:
        return PairedDifference(mean, mean, mean, float(mean == 0), pairs, level)
    half = stats.t.ppf((1 + level) / 2, pairs - 1) * error
    p_value = 2 * stats.t.sf(abs(mean) / error, pairs - 1)
    return PairedDifference(mean, float(mean - half), float(mean + half), float(p_value), pairs, level)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values, to be compared with the error rate for the whole family of metrics.

    p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)) over the m ascending p values.

    Reference: [Holm1979].

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
