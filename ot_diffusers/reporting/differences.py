"""What paired seeds say about arms: means with intervals, differences to the first arm, and how to print them.

`values` is arm → metric → one value per seed, in the same order of seeds everywhere. The primary metric is fixed before
anything is measured and decides by its own 95% interval. The other metrics of the family show a difference only where
Holm's correction over all of them agrees, so that trying many metrics does not make one of them "significant". Fewer
than three seeds show nothing. Where the evaluator cannot be trusted, verdicts are withheld.
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
NOT_SHOWN = "no difference shown"
WITHHELD = "withheld"

Values = Mapping[str, Mapping[str, Sequence[float]]]


def summarise(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Metric → one value per seed as `{"metrics": means, "intervals": 95% intervals}`; one seed has no interval."""
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
    """Arm → metric → mean paired difference to the first arm, its interval, p values and whether it is shown.

    Args:
        values: at least two arms, at least two seeds.
        primary: the metric that decides.
        family: the other tested metrics; `primary` may be among them.
        trusted: whether the evaluator is; by one that is not, no difference is shown.

    Returns:
        For each arm but the first and each tested metric: `mean`, `low`, `high` (95%), `p_value`, `p_holm` (of the
        primary metric the same; of the others corrected over them) and `shown`.
    """
    require(len(values) >= 2, "values", "hold at least two arms", list(values))
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
    """`"better"`, `"worse"`, `"higher"` or `"lower"` (for metrics without a better direction), or `NOT_SHOWN`."""
    if not difference["shown"]:
        return NOT_SHOWN
    rises = difference["mean"] > 0
    better = METRICS[metric].better if metric in METRICS else "lower"
    if better == "floor":
        return "higher" if rises else "lower"
    return "better" if rises == (better == "higher") else "worse"


def summary(results: Mapping[str, Any]) -> str:
    """What the primary metric says of every arm, or why it says nothing, in one sentence."""
    first, metric = next(iter(results["arms"])), results["primary_metric"]
    label, seeds = METRICS[metric].label, len(results["seeds"])
    doubt = evaluator_doubt(results.get("extractor", {}))
    if doubt is not None:
        return (
            f"{label}, paired with {first} over {seeds} seeds — no verdict, the evaluator cannot be trusted: {doubt}."
        )
    said = [
        f"{arm}: {verdict(metric, by_metric[metric])} ({_percent(by_metric[metric]['mean'], results, metric)})"
        for arm, by_metric in results["differences"].items()
    ]
    return f"{label}, paired with {first} over {seeds} seeds — {'; '.join(said)}."


def difference_rows(results: Mapping[str, Any], arm: str) -> Rows:
    """One line for each tested metric of an arm in a comparison's results."""
    header = ["", "verdict", "difference", "95% interval", "in %", "p (Holm)"]
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
                _percent(difference["mean"], results, metric),
                "< 0.0001" if difference["p_holm"] < 1e-4 else f"{difference['p_holm']:.2g}",
            ]
        )
    return [header, *rows]


def interval_rows(results: Mapping[str, Any], metrics: Sequence[str]) -> Rows:
    """Arms by metrics as mean ± half of the 95% interval, the real-vs-real floor last."""
    entries = results["arms"] | {"real vs real": results["floor"]}
    header = ["", *map(column_title, metrics)]
    return [header, *([arm, *(_plus_minus(entry, metric) for metric in metrics)] for arm, entry in entries.items())]


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


def _percent(difference: float, results: Mapping[str, Any], metric: str) -> str:
    """A difference as a share of the first arm's mean."""
    base = abs(next(iter(results["arms"].values()))["metrics"][metric])
    return f"{100 * difference / base:+.1f}%".replace("-", "−") if base else "–"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + format_number(abs(value))
