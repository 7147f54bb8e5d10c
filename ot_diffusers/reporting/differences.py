"""Comparison of methods over paired random seeds: means with intervals, and differences to the first method, in words.

`values` is method → metric → one value per seed, in the same order of seeds everywhere. The primary metric is fixed
before anything is measured and decides by its own 95% interval. A difference in another metric counts as significant
only if Holm's correction over all of them agrees, so that trying many metrics does not make one of them "significant".
Fewer than three seeds are inconclusive. If the evaluator cannot be trusted, verdicts are withheld.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from ..errors import require
from ..evaluation.health import evaluator_doubt
from ..evaluation.intervals import PairedDifference, holm, mean_interval, paired_difference
from ..evaluation.metric_table import METRICS
from .page import Rows
from .report import column_title, format_number

SIGNIFICANCE = 0.05
MIN_SEEDS = 3
NOT_SIGNIFICANT = "not significant"
WITHHELD = "withheld"
WIDE = 0.5
"""Half width of an interval, as a share of the first method's mean, from which a difference is inconclusive."""

Values = Mapping[str, Mapping[str, Sequence[float]]]


def summarise(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """`{"metrics": means, "intervals": 95% intervals}` of metric → one value per seed; no interval for one seed."""
    means = {metric: statistics.fmean(per_seed) for metric, per_seed in values.items()}
    intervals = {
        metric: {"low": interval.low, "high": interval.high}
        for metric, per_seed in values.items()
        if len(per_seed) >= 2
        for interval in [mean_interval(per_seed)]
    }
    return {"metrics": means, "intervals": intervals}


def differences(
    values: Values, *, primary: str, family: Sequence[str], trusted: bool = True
) -> dict[str, dict[str, dict[str, Any]]]:
    """Method → metric → mean paired difference to the first method, its interval, p values and significance.

    Args:
        values: at least two methods, at least two seeds.
        primary: the metric that decides.
        family: the other tested metrics; `primary` may be among them.
        trusted: whether the evaluator can be trusted; otherwise no difference is significant.

    Returns:
        For each method but the first and each tested metric: `mean`, `low`, `high` (95%), `p_value`, `p_holm` (equal to
        `p_value` for the primary metric, corrected for the others) and `shown`, which is true for a significant one.
    """
    require(len(values) >= 2, "values", "hold at least two methods", list(values))
    first, *others = values
    measured = all(primary in by_metric for by_metric in values.values())
    require(measured, "primary_metric", "be one that the images and the evaluator allow", primary)
    tested = list(dict.fromkeys((primary, *family)))
    by_arm = {}
    for arm in others:
        pairs = {metric: paired_difference(values[first][metric], values[arm][metric]) for metric in tested}
        p_values = {metric: pair.p_value for metric, pair in pairs.items()}
        adjusted = holm({metric: p for metric, p in p_values.items() if metric != primary})
        adjusted[primary] = p_values[primary]
        by_arm[arm] = {metric: _entry(pair, adjusted[metric], trusted) for metric, pair in pairs.items()}
    return by_arm


def verdict(metric: str, difference: Mapping[str, Any]) -> str:
    """`"better"`, `"worse"`, `NOT_SIGNIFICANT`, or for metrics without a better direction `"higher"` or `"lower"`."""
    if not difference["shown"]:
        return NOT_SIGNIFICANT
    rises = difference["mean"] > 0
    better = METRICS[metric].better if metric in METRICS else "lower"
    if better == "floor":
        return "higher" if rises else "lower"
    return "better" if rises == (better == "higher") else "worse"


def summary(results: Mapping[str, Any]) -> str:
    """The verdicts of the primary metric on every method, or why there are none, in one sentence."""
    first, metric = next(iter(results["arms"])), results["primary_metric"]
    title, seeds = METRICS[metric].title, len(results["seeds"])
    lead = f"{title} compared with {first} over {seeds} paired random seeds"
    doubt = evaluator_doubt(results.get("extractor", {}))
    if doubt is not None:
        return f"{lead}: there is no verdict, because the evaluator cannot be trusted: {doubt}."
    base = results["arms"][first]["metrics"][metric]
    verdicts = [
        f"{arm}: {verdict_with_size(metric, by_metric[metric], base, seeds)}"
        for arm, by_metric in results["differences"].items()
    ]
    return f"{lead}. {'; '.join(verdicts)}."


def verdict_with_size(metric: str, difference: Mapping[str, Any], base: float, seeds: int) -> str:
    """A verdict with the difference as a share of the compared mean `base`; no share for an inconclusive one."""
    if not difference["shown"]:
        if seeds < MIN_SEEDS:
            return f"inconclusive (only {seeds} seeds)"
        if difference["high"] - difference["low"] > 2 * WIDE * abs(base):
            return f"inconclusive ({seeds} seeds, wide interval)"
        return f"the difference is not significant ({_percent(difference['mean'], base)})"
    return f"{verdict(metric, difference)} ({_percent(difference['mean'], base)})"


def difference_rows(results: Mapping[str, Any], arm: str) -> Rows:
    """One line for each tested metric of a method in the results of a comparison."""
    header = ["", "verdict", "difference", "95% interval", "in %", "p (Holm)"]
    first = next(iter(results["arms"].values()))["metrics"]
    trusted = evaluator_doubt(results.get("extractor", {})) is None
    rows = []
    for metric, difference in results["differences"][arm].items():
        name = METRICS[metric].label if metric in METRICS else metric
        rows.append(
            [
                f"{name} (primary)" if metric == results["primary_metric"] else name,
                verdict(metric, difference) if trusted else WITHHELD,
                _signed(difference["mean"]),
                f"{_signed(difference['low'])} … {_signed(difference['high'])}",
                _percent(difference["mean"], first[metric]),
                "< 0.0001" if difference["p_holm"] < 1e-4 else f"{difference['p_holm']:.2g}",
            ]
        )
    return [header, *rows]


def interval_rows(results: Mapping[str, Any], metrics: Sequence[str]) -> Rows:
    """Methods by metrics as mean ± half of the 95% interval, with the real-vs-real score last."""
    entries = results["arms"] | {"real vs real": results["floor"]}
    header = ["", *map(column_title, metrics)]
    return [header, *([arm, *(_plus_minus(entry, metric) for metric in metrics)] for arm, entry in entries.items())]


def curve_rows(results: Mapping[str, Any], key: str, metric: str, *, title: str) -> Rows:
    """Methods down, values of an axis across, the real-vs-real score below. A significant difference to the first
    method at the same value stands behind the mean, in percent.

    Args:
        results: with curves under `key`: method to value to metrics, intervals and differences.
        key: of the curves, such as `"quality_by_steps"`.
        metric: the quantity of the table.
        title: name of the axis.
    """
    curves, first = results[key], next(iter(results[key].values()))
    values = sorted({value for line in curves.values() for value in line}, key=float)

    def cell(line: Mapping[str, Any], value: str) -> str:
        point = line.get(value, {})
        difference = point.get("differences", {}).get(metric, {})
        percent = f" ({_percent(difference['mean'], first[value][metric])})" if difference.get("shown") else ""
        return _plus_minus({"metrics": point, "intervals": point.get("intervals", {})}, metric) + percent

    rows = [[method, *(cell(line, value) for value in values)] for method, line in curves.items()]
    floor = format_number(results["floor"]["metrics"].get(metric))
    return [[f"{title} =", *values], *rows, ["real vs real", *[floor] * len(values)]]


def _entry(pair: PairedDifference, adjusted: float, trusted: bool) -> dict[str, Any]:
    values = dataclasses.asdict(pair)
    kept = {name: values[name] for name in ("mean", "low", "high", "p_value")}
    shown = trusted and pair.shown and adjusted <= SIGNIFICANCE and pair.pairs >= MIN_SEEDS
    return kept | {"p_holm": adjusted, "shown": shown}


def _plus_minus(entry: Mapping[str, Any], metric: str) -> str:
    mean, interval = entry["metrics"].get(metric), entry.get("intervals", {}).get(metric)
    if mean is None or interval is None:
        return format_number(mean)
    half = Decimal(f"{(interval['high'] - interval['low']) / 2:.2g}")
    return f"{format_number(mean)} ± {half:f}"


def _percent(difference: float, base: float) -> str:
    """A difference as a share of the mean that it is compared with."""
    return f"{100 * difference / abs(base):+.1f}%".replace("-", "−") if base else "–"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + format_number(abs(value))
