"""Pictures of results: plain data in, one PNG file out. Every method has one colour in all pictures of a report."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import extra, require
from ..evaluation.intervals import mean_interval
from ..evaluation.metric_table import COST_TITLES, METRICS
from .colours import COLOURS, arm_colours

with extra("plots"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from ..evaluation.stress import StressCurve

PANELS_PER_ROW, SCATTERS_PER_ROW = 4, 5
"""Most grids of images, and most planes of features, in one row."""
SHOWN_SIDE = 96
"""Pixels to which small images are enlarged."""
INK, FAINT = "#1f2937", "#d7dbe0"
MARKERS = "osD^vPX<>p"
WIDE = 10.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
HIGH_SHARE = 0.5
"""Where all shares are above this, their axis does not start at 0."""
REAL = "real vs real"

CURVES = {
    "loss": "Training loss",
    "mse": "Mean squared error",
    "ot": "Weighted OT term",
    "validation_loss": "Validation loss",
}
"""Quantities of `loss_curves`, with the title of their panel."""


TRACKED = {
    "coverage": "Coverage: train – generated",
    "fidelity": "Fidelity: test – generated",
    "gap": "Gap: fidelity − coverage",
}
"""Quantities of `tracking_curves`, with the title of their column."""

DIRECTIONS = {"lower": "lower is better", "higher": "higher is better", "floor": "nearer to real vs real is better"}


def title_of(name: str) -> str:
    """A metric or cost in words."""
    return METRICS[name].title if name in METRICS else COST_TITLES.get(name, name.replace("_", " "))


def direction_of(metric: str) -> str:
    """Which direction is better; lower for costs and unknown metrics."""
    return METRICS[metric].better if metric in METRICS else "lower"


def read_history(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`, one JSON object a line, without the unfinished last line of a killed run."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if lines and not lines[-1].rstrip().endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """Loss, its parts and the validation loss by epoch: a panel for each quantity, a line for each method.

    Args:
        histories: method to records such as `{"epoch": 3, "step": 120, "loss": …, "mse": …, "ot": …}`. Records of one
            epoch are averaged; quantities that no record contains have no panel.
        path: PNG file to write.
    """
    series = {key: {arm: _by_epoch(records, key) for arm, records in histories.items()} for key in CURVES}
    drawn = [key for key, arms in series.items() if any(arms.values())]
    require(bool(drawn), "histories", f"hold one of {', '.join(CURVES)}", list(histories))
    looks = _looks(arm_colours(list(histories)))
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.35), layout="constrained")
    for index, key in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, index + 1)
        for arm, points in series[key].items():
            if points:
                # A single epoch would be an invisible line.
                marker = looks[arm]["marker"] if len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), **looks[arm] | {"marker": marker})
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if all(value > 0 for points in series[key].values() for _, value in points):
            _log_scale(axes)
        _finish(axes, title=CURVES[key], xlabel="epoch" if index >= len(drawn) - columns else "")
    _legend(figure, {arm: look | {"marker": None} for arm, look in looks.items()})
    return _save(figure, path)


def image_panels(panels: Mapping[str, Tensor], path: Path, rows: int = 6, columns: int = 6) -> Path:
    """Labelled grids of images beside each other, such as real | baseline | OT-trained | OT-guided.

    Small images are enlarged with bicubic interpolation.

    Args:
        panels: label to uint8 images [n, C, H, W], C 1 or 3; the first rows · columns of each are shown.
        path: PNG file to write.
        rows, columns: images in one grid.
    """
    require(bool(panels), "panels", "hold at least one set of images", panels)
    colours = arm_colours(list(panels))
    width, lines = 2.7, math.ceil(len(panels) / PANELS_PER_ROW)
    per_line = math.ceil(len(panels) / lines)
    figure = Figure(
        figsize=(width * per_line, (width * rows / columns + 0.4) * lines), layout=ConstrainedLayoutEngine(w_pad=0.09)
    )
    for index, (name, images) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, per_line, index + 1)
        _show(axes, _mosaic(images, rows, columns))
        axes.set_title(textwrap.fill(name, 26), fontsize=12, color=colours[name], fontweight="bold")
        axes.set_axis_off()
    return _save(figure, path)


def image_table(table: Mapping[str, Mapping[str, Tensor]], path: Path, rows: int = 3, columns: int = 4) -> Path:
    """Grids of images in a table, such as methods by numbers of steps; a missing cell stays empty.

    Args:
        table: label of the line to heading of the column to uint8 images [n, C, H, W].
        path: PNG file to write.
        rows, columns: images in one grid.
    """
    require(bool(table), "table", "hold at least one line", table)
    colours, headings = arm_colours(list(table)), list(dict.fromkeys(name for line in table.values() for name in line))
    width = 2.1
    figure = Figure(
        figsize=(width * len(headings) + 1, width * rows / columns * len(table) + 0.4), layout="constrained"
    )
    for index, (label, line) in enumerate(table.items()):
        for place, heading in enumerate(headings):
            axes = figure.add_subplot(len(table), len(headings), index * len(headings) + place + 1)
            if heading in line:
                _show(axes, _mosaic(line[heading], rows, columns))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if index == 0:
                axes.set_title(heading, fontsize=11, color=INK)
            if place == 0:
                axes.set_ylabel(textwrap.fill(label, 16), fontsize=11, color=colours[label], fontweight="bold")
    return _save(figure, path)


def scores(results: Mapping[str, Any], metrics: Sequence[str], path: Path) -> Path:
    """The mean of every method, its value for each seed, and the real-vs-real score: a panel for each metric.

    Args:
        results: the contents of a `results.json`, see `report`.
        metrics: metrics that at least one method has.
        path: PNG file to write.
    """
    entries = results["arms"] | ({REAL: results["floor"]} if results.get("floor", {}).get("metrics") else {})
    colours = arm_colours(list(results["arms"])) | {REAL: COLOURS["real"]}
    for metric in metrics:
        measured = any(metric in entry["metrics"] for entry in results["arms"].values())
        require(measured, "metric", "be a metric of at least one method", metric)
    columns = min(len(metrics), 2)
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(9.2, rows * (0.36 * len(entries) + 1.0)), layout="constrained")
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, index + 1)
        drawn = {name: entry["metrics"][metric] for name, entry in entries.items() if metric in entry["metrics"]}
        by_seed = {name: results.get("per_seed", {}).get(name, {}).get(metric, []) for name in drawn}
        for name, value in drawn.items():
            axes.scatter(
                by_seed[name], [name] * len(by_seed[name]), s=14, color=colours[name], alpha=0.45, linewidths=0
            )
            axes.scatter([value], [name], s=38, color=colours[name], marker="D" if name == REAL else "o", zorder=3)
            # Beside the axes, where no line crosses the number.
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0)}
            place |= {"textcoords": "offset points", "va": "center"}
            axes.annotate(f"{value:#.3g}", (1, name), fontsize=8.5, color=INK, **place)
        if REAL in drawn:
            axes.axvline(drawn[REAL], color=INK, linestyle=":", linewidth=1.2, zorder=1)
        values = [*drawn.values(), *(value for seeds in by_seed.values() for value in seeds)]
        if min(values) > 0 and max(values) > WIDE * min(values):
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis, values)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.06)
        _name_rows(axes, list(entries), labelled=index % columns == 0)
        _finish(axes, title=title_of(metric), xlabel=_arrow(metric))
        axes.grid(axis="y", visible=False)
    return _save(figure, path)


def scatter(features: Mapping[str, Tensor], path: Path, *, basis: str | None = None, max_points: int = 1500) -> Path:
    """Features in the plane of one set's two main directions: a panel for each method, in front of that set in grey.

    Args:
        features: method to [N, D] features.
        path: PNG file to write.
        basis: the set that defines the plane; the first by default. With the real one, no method moves the plane.
        max_points: most points drawn of each set.
    """
    basis = basis or next(iter(features))
    require(basis in features, "basis", f"be one of {', '.join(features)}", basis)
    centre = features[basis].double().mean(dim=0)
    _, _, directions = torch.linalg.svd(features[basis].double() - centre, full_matrices=False)
    planes = {arm: ((x.double() - centre) @ directions[:2].T)[:max_points] for arm, x in features.items()}
    arms = [arm for arm in features if arm != basis] or [basis]
    colours = arm_colours(list(features))
    lines = math.ceil(len(arms) / SCATTERS_PER_ROW)
    per_line = math.ceil(len(arms) / lines)
    figure = Figure(figsize=(3.1 * per_line, 3.2 * lines), layout="constrained")
    shared: Axes | None = None
    for index, arm in enumerate(arms):
        axes = figure.add_subplot(lines, per_line, index + 1, sharex=shared, sharey=shared)
        shared = shared or axes
        axes.scatter(planes[basis][:, 0], planes[basis][:, 1], s=5, color=COLOURS["real"], alpha=0.4, linewidths=0)
        if arm != basis:
            axes.scatter(planes[arm][:, 0], planes[arm][:, 1], s=5, color=colours[arm], alpha=0.45, linewidths=0)
        _finish(axes, title=textwrap.fill(arm, 30), xlabel="first principal direction")
        axes.set_ylabel("second principal direction" if index % per_line == 0 else "", fontsize=9, color=INK)
    return _save(figure, path)


def differences(results: Mapping[str, Any], metrics: Sequence[str], path: Path) -> Path:
    """Ratios of every method to the first one over paired seeds, with their intervals: a panel for each metric.

    A ratio is exp(mean over seeds of log b/a) with Student's 95% interval of that mean; its axis is logarithmic. Where
    a value is not positive, a panel shows differences instead. Hollow markers are differences that are not significant.

    Args:
        results: the contents of a comparison's `results.json`, see `ot_diffusers.studies`.
        metrics: tested metrics.
        path: PNG file to write.
    """
    tested, first = results["differences"], next(iter(results["arms"]))
    require(bool(tested), "results", "hold differences", sorted(results))
    colours = arm_colours(list(results["arms"]))
    columns = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(9.6, rows * (0.34 * len(tested) + 1.15) + 0.3), layout="constrained")
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, index + 1)
        per_seed = {name: results["per_seed"][name].get(metric, []) for name in (first, *tested, REAL)}
        ratios = all(value > 0 for name in (first, *tested) for value in per_seed[name])
        for arm, by_metric in tested.items():
            entry = by_metric[metric]
            ends = (
                _log_ratio(per_seed[arm], per_seed[first]) if ratios else (entry["mean"], entry["low"], entry["high"])
            )
            _interval(axes, arm, ends, colours[arm], filled=entry["shown"])
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        real = per_seed[REAL]
        if real and (not ratios or min(real) > 0):
            pairs = list(zip(real, per_seed[first], strict=True))
            of_real = [math.log(score / base) if ratios else score - base for score, base in pairs]
            axes.axvline(sum(of_real) / len(of_real), color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axes.margins(x=0.06)
        if ratios:
            _ratio_ticks(axes)
        _name_rows(axes, list(tested), labelled=index % columns == 0)
        _finish(axes, title=title_of(metric), xlabel=_arrow(metric) if ratios else f"difference, {_arrow(metric)}")
        axes.grid(axis="y", visible=False)
    hollow: dict[str, Any] = {"marker": "o", "linestyle": "", "color": INK, "markerfacecolor": "white"}
    looks = {"significant difference": hollow | {"markerfacecolor": INK}, "not significant": hollow}
    looks |= {first: {"color": INK, "linewidth": 1}, REAL: {"color": INK, "linestyle": ":"}}
    _legend(figure, looks)
    return _save(figure, path)


def failure_gallery(failures: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> Path:
    """The worst samples of every method, each above the real image nearest to it.

    Args:
        failures: method to (samples, nearest real images), both uint8 [n, C, H, W] in the same order.
        path: PNG file to write.
    """
    require(bool(failures), "failures", "hold at least one method", failures)
    colours = arm_colours(list(failures))
    most = max(len(samples) for samples, _ in failures.values())
    height = 9.2 / most * 2 + 0.4
    figure = Figure(figsize=(9.2, height * len(failures)), layout=ConstrainedLayoutEngine(h_pad=0.06))
    for index, (arm, (samples, nearest)) in enumerate(failures.items()):
        axes = figure.add_subplot(len(failures), 1, index + 1)
        mosaic = _mosaic(torch.cat([samples, nearest]), 2, len(samples))
        _show(axes, mosaic)
        axes.set_title(arm, fontsize=11, color=colours[arm], fontweight="bold", loc="left")
        axes.set_yticks([mosaic.shape[0] * 0.25, mosaic.shape[0] * 0.75], ["sample", "nearest\nreal"])
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=9, labelcolor=INK)
        axes.spines[:].set_visible(False)
    return _save(figure, path)


def stress_curves(
    curves: Mapping[str, StressCurve], path: Path, *, xlabel: str, titles: Mapping[str, str] | None = None
) -> Path:
    """Every metric against the amount of a damage with 95% intervals, a panel for each; grey where it is not monotone.

    The title of a panel states the trend of its curve.

    Args:
        curves: metric to curve.
        path: PNG file to write.
        xlabel: meaning of the amount.
        titles: metric to the title of its panel; the metric in words by default.
    """
    require(bool(curves), "curves", "hold at least one metric", curves)
    columns = min(len(curves), 3)
    rows = math.ceil(len(curves) / columns)
    width = 9.2 / columns if columns > 2 else 4.2
    figure = Figure(figsize=(width * columns, (0.66 if rows > 1 else 0.75) * width * rows), layout="constrained")
    steps = [1, 2, 2.5, 5, 10]  # of the ticks
    for index, (metric, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        colour = COLOURS["baseline"] if curve.verdict == "monotone" else COLOURS["real"]
        ends = curve.intervals
        axes.fill_between(curve.amounts, [e.low for e in ends], [e.high for e in ends], color=colour, alpha=0.22, lw=0)
        axes.plot(curve.amounts, curve.means, color=colour, marker="o", markersize=3.5, linewidth=1.6)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=steps))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=steps))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        title = f"{(titles or {}).get(metric, title_of(metric))}: {curve.trend}"
        _finish(axes, title=title, xlabel=xlabel if index >= len(curves) - columns else "")
    return _save(figure, path)


def tracking_curves(tracks: Mapping[str, Any], path: Path) -> Path:
    """Coverage, fidelity and their gap along training: a column for each, a row for each distance, a line for each run.

    Args:
        tracks: run to its `studies.tracking.Track`.
        path: PNG file to write.
    """
    require(any(track.points for track in tracks.values()), "tracks", "hold at least one checkpoint", list(tracks))
    looks = _looks(arm_colours(list(tracks)))
    distances = list(next(iter(tracks.values())).base_line)
    figure = Figure(figsize=(9.2, 2.7 * len(distances) + 0.35), layout="constrained")
    for row, distance in enumerate(distances):
        shared: Axes | None = None
        for column, (quantity, title) in enumerate(TRACKED.items()):
            is_gap = quantity == "gap"
            axes = figure.add_subplot(len(distances), 3, 3 * row + column + 1, sharey=None if is_gap else shared)
            shared = shared or axes
            for run, track in tracks.items():
                updates, values = zip(
                    *((point.update, getattr(point, quantity)[distance]) for point in track.points), strict=True
                )
                axes.plot(updates, values, **looks[run])
            if is_gap:
                axes.axhline(0, color=FAINT, linewidth=1.1, zorder=1)
            else:
                axes.axhline(next(iter(tracks.values())).base_line[distance], color=INK, linestyle="--", linewidth=1.1)
                _log_scale(axes)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
            _finish(axes, title=title, xlabel="training steps" if row == len(distances) - 1 else "")
            axes.set_ylabel(title_of(distance) if column == 0 else "", fontsize=9, color=INK)
    _legend(figure, looks | {"train – test (real images only)": {"color": INK, "linestyle": "--"}})
    return _save(figure, path)


def line_panels(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]],
    path: Path,
    *,
    xlabel: str,
    logarithmic_x: bool = False,
    variants: Mapping[str, str] | None = None,
    bands: Mapping[str, Mapping[str, Mapping[float, tuple[float, float]]]] | None = None,
    floors: Mapping[str, float] | None = None,
) -> Path:
    """A panel for each quantity, a line with markers for each method, and one legend for all.

    The y axis is logarithmic where the values are positive and differ by a factor of 10 or more, but not for shares
    such as recall; else it starts at 0, unless all values are shares above one half.

    Args:
        panels: metric or cost to method to {x: y}.
        path: PNG file to write.
        xlabel: meaning of x.
        logarithmic_x: make the x axis logarithmic, too.
        variants: method to the method whose colour it shares, with a dashed line.
        bands: metric to method to {x: (low, high)}, the ends of an interval.
        floors: metric to its real-vs-real score, drawn as a dotted line.
    """
    require(bool(panels), "panels", "hold at least one quantity", panels)
    variants, bands, floors = variants or {}, bands or {}, floors or {}
    arms = list(dict.fromkeys(arm for lines in panels.values() for arm in lines))
    own = arm_colours([arm for arm in arms if arm not in variants])
    looks = _looks(own | {arm: own[plain] for arm, plain in variants.items()})
    for arm in variants:
        looks[arm] |= {"linestyle": "--", "markerfacecolor": "white"}
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), layout="constrained")
    for index, (quantity, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for arm, points in lines.items():
            axes.plot(list(points), list(points.values()), **looks[arm])
            ends = bands.get(quantity, {}).get(arm, {})
            lows, highs = [low for low, _ in ends.values()], [high for _, high in ends.values()]
            axes.fill_between(list(ends), lows, highs, color=looks[arm]["color"], alpha=0.14, linewidth=0)
        if quantity in floors:
            axes.axhline(floors[quantity], color=INK, linestyle=":", linewidth=1.2)
        values = [y for points in lines.values() for y in points.values()]
        is_share = direction_of(quantity) == "higher"
        if not is_share and min(values) > 0 and max(values) > WIDE * min(values):
            _log_scale(axes)
        elif not is_share or min(values) <= HIGH_SHARE:
            axes.set_ylim(bottom=min(0, *values))
        if logarithmic_x:
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis, {x for points in lines.values() for x in points})
        title = f"{title_of(quantity)} ({DIRECTIONS[direction_of(quantity)]})"
        _finish(axes, title=title, xlabel=xlabel if index >= len(panels) - columns else "")
    _legend(figure, looks | ({REAL: {"color": INK, "linestyle": ":"}} if floors else {}), columns=4)
    return _save(figure, path)


def _looks(colours: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and width of each method's line; later lines are thinner, so that none hides another."""
    most = max(len(colours) - 1, 1)
    return {
        arm: {
            "color": colour,
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 5.5 - 1.5 * index / most,
            "linewidth": 3.2 - 1.8 * index / most,
        }
        for index, (arm, colour) in enumerate(colours.items())
    }


def _log_ratio(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of log(value / base) over paired seeds."""
    interval = mean_interval([math.log(value / other) for value, other in zip(values, base, strict=True)])
    return interval.mean, interval.low, interval.high


def _interval(axes: Axes, name: str, ends: tuple[float, float, float], colour: str, *, filled: bool) -> None:
    """A marker at the mean with a whisker from low to high, in the row of that name."""
    mean, low, high = ends
    style: dict[str, Any] = {"color": colour, "fmt": "o", "capsize": 3 if high > low else 0}
    axes.errorbar(
        mean, name, xerr=[[mean - low], [high - mean]], markerfacecolor=colour if filled else "white", **style
    )


def _name_rows(axes: Axes, names: Sequence[str], *, labelled: bool) -> None:
    """One row for each name from the top, with the names on the left if `labelled`."""
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 28) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    if not labelled:
        axes.tick_params(axis="y", labelleft=False)


def _arrow(metric: str) -> str:
    """The better direction of a horizontal axis."""
    better = {"lower": "← better", "higher": "better →"}
    return better.get(direction_of(metric), "nearer to the dotted line is better")


def _ratio_ticks(axes: Axes) -> None:
    """Ticks of an axis of log ratios: percentages for ratios near 1, else factors."""
    low, high = map(math.exp, axes.get_xlim())
    if high / low > 2:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) <= 5:
                break
        labels = [f"×{tick:g}" for tick in ticks]
    else:
        ticks = [1 + change for change in MaxNLocator(4).tick_values(low - 1, high - 1) if low <= 1 + change <= high]
        labels = [f"{100 * (tick - 1):+.3g}%".replace("-", "−").replace("+0%", "0") for tick in ticks]
    axes.set_xticks([math.log(tick) for tick in ticks], labels)


def _by_epoch(records: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """(epoch, mean of `key` over the records of that epoch), in order; by step where records have no epoch."""
    values: dict[float, list[float]] = {}
    for record in records:
        position = record.get("epoch", record.get("step"))
        if position is not None and record.get(key) is not None:
            values.setdefault(position, []).append(float(record[key]))
    return [(position, sum(entries) / len(entries)) for position, entries in sorted(values.items())]


def _mosaic(images: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows · columns images with a gap of about a tenth of their side, on white: uint8 [height, width, C]."""
    require(images.dtype == torch.uint8 and images.ndim == 4, "panels", "hold uint8 [n, C, H, W]", images.dtype)
    require(images.shape[1] in (1, 3), "panels", "hold images of 1 or 3 channels", images.shape[1])
    images = images[: rows * columns].cpu()
    scale = SHOWN_SIDE // max(images.shape[2:])
    if scale > 1:
        enlarged = torch.nn.functional.interpolate(images.float(), scale_factor=float(scale), mode="bicubic")
        images = enlarged.round().clamp(0, 255).to(torch.uint8)
    _, channels, height, width = images.shape
    gap = max(2, max(height, width) // 12)
    mosaic = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        mosaic[:, top : top + height, left : left + width] = image
    return mosaic.permute(1, 2, 0)


def _show(axes: Axes, mosaic: Tensor) -> None:
    """The mosaic, reduced to the size of the picture without aliasing."""
    axes.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="antialiased")


def _finish(axes: Axes, *, title: str, xlabel: str) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK, which="both")
    axes.grid(color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def _log_scale(axes: Axes) -> None:
    """Logarithmic y axis with plain numbers (0.05, not 5 × 10⁻²) at 1, 2 and 5 of every decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_numbers(axis: Any, values: Iterable[float]) -> None:
    """Plain numbers on a logarithmic x axis: at the values where these are few, else at 1 and 3 of every decade."""
    few = sorted(set(values))
    whole = len(few) <= 8 and all(float(value).is_integer() for value in few)
    axis.set_major_locator(FixedLocator(few) if whole else LogLocator(subs=(1, 3), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]], columns: int | None = None) -> None:
    """One legend for the whole figure, above it: label to the style of its line."""
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    columns = columns or min(len(handles), 4)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=10, handlelength=3
    )


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return path
