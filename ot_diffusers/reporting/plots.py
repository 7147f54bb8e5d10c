"""Pictures of a run: plain data in, one PNG file out. Every arm keeps its colour in all of them."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import extra, require
from .colours import COLOURS, arm_colours

with extra("plots"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from ..evaluation.stress import StressCurve

PANELS_PER_ROW, SCATTERS_PER_ROW = 8, 5
"""Grids of images, and planes of features, beside each other at most."""
INK, FAINT = "#1f2937", "#d7dbe0"

CURVES = {
    "loss": "training loss",
    "mse": "mean squared error",
    "ot": "weighted OT term",
    "validation_loss": "validation loss",
}
"""What `loss_curves` draws, one panel each, where a history has it."""


TRACKED = {
    "coverage": "coverage: train – generated",
    "fidelity": "fidelity: test – generated",
    "gap": "gap: fidelity − coverage",
}
"""What `tracking_curves` draws, a column each."""


def read_history(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`: one JSON object a line; an unfinished last line of a killed run is left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if lines and not lines[-1].rstrip().endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """Loss, its parts and the validation loss by epoch, one panel each and one line per arm.

    Args:
        histories: arm to records like `{"epoch": 3, "step": 120, "loss": …, "mse": …, "ot": …, "validation_loss": …}`.
            Records of one epoch are averaged; quantities that no record holds get no panel.
        path: PNG file to write.
    """
    series = {key: {arm: _by_epoch(records, key) for arm, records in histories.items()} for key in CURVES}
    drawn = [key for key, arms in series.items() if any(arms.values())]
    require(bool(drawn), "histories", f"hold one of {', '.join(CURVES)}", list(histories))
    colours = arm_colours(list(histories))
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.35), layout="constrained")
    for index, key in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, index + 1)
        for arm, points in series[key].items():
            if points:
                # A single epoch would be an invisible line.
                marker = "o" if len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), color=colours[arm], label=arm, linewidth=1.8, marker=marker)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if all(value > 0 for points in series[key].values() for _, value in points):
            _log_scale(axes)
        _finish(axes, title=CURVES[key], xlabel="epoch" if index >= len(drawn) - columns else "")
    _legend(figure, colours)
    return _save(figure, path)


def image_panels(panels: Mapping[str, Tensor], path: Path, rows: int = 6, columns: int = 6) -> Path:
    """Labelled grids side by side, such as real | baseline | OT-trained | OT-guided; many of them in several rows.

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
        mosaic = _mosaic(images, rows, columns)
        axes.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(textwrap.fill(name, 26), fontsize=12, color=colours[name], fontweight="bold")
        axes.set_axis_off()
    return _save(figure, path)


def bars(results: Mapping[str, Any], metric: str, path: Path) -> Path:
    """One metric of every arm as bars with their intervals, if there are any; the real-vs-real floor as a dashed line.

    Args:
        results: the contents of a `results.json`, see `report`.
        metric: a key of the arms' `metrics`.
        path: PNG file to write.
    """
    values = {arm: entry["metrics"][metric] for arm, entry in results["arms"].items() if metric in entry["metrics"]}
    require(bool(values), "metric", "be a metric of at least one arm", metric)
    colours = arm_colours(list(values))
    figure = Figure(figsize=(9.2, 0.45 * len(values) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(list(values), list(values.values()), color=[colours[arm] for arm in values], height=0.62)
    ends = _draw_intervals(axes, results, metric, values)
    for arm, bar in zip(values, drawn, strict=True):
        place = (max(values[arm], ends.get(arm, 0)), bar.get_y() + bar.get_height() / 2)
        text = f"{values[arm]:#.3g}"
        axes.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.09)
    floor = results.get("floor", {}).get("metrics", {}).get(metric)
    if floor is not None:
        axes.axvline(floor, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"real vs real {floor:#.3g}",
            (floor, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    _finish(axes, title="", xlabel=metric.replace("_", " "))
    axes.grid(axis="y", visible=False)
    return _save(figure, path)


def scatter(features: Mapping[str, Tensor], path: Path, *, basis: str | None = None, max_points: int = 1500) -> Path:
    """Features in the plane of one set's two main directions: a panel per arm over that set in grey.

    Args:
        features: arm to [N, D] features.
        path: PNG file to write.
        basis: which set defines the plane; the first by default. With the real one, no arm moves the plane.
        max_points: points drawn of each set.
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
        _finish(axes, title=arm, xlabel="first direction")
        axes.set_ylabel("second direction" if index % per_line == 0 else "", fontsize=9, color=INK)
    return _save(figure, path)


def differences(results: Mapping[str, Any], metrics: Mapping[str, str], path: Path) -> Path:
    """Paired differences to the first arm with their intervals, a panel per metric; hollow where none is shown.

    Args:
        results: the contents of a comparison's `results.json`, see `ot_diffusers.studies`.
        metrics: metric to title. Values are shares of the first arm's mean.
        path: PNG file to write.
    """
    by_arm, arms = results["differences"], results["arms"]
    require(bool(by_arm), "results", "hold differences", sorted(results))
    colours = arm_colours(list(arms))
    scale = {metric: abs(next(iter(arms.values()))["metrics"][metric]) or 1.0 for metric in metrics}
    columns = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(9.2, rows * (0.34 * len(by_arm) + 0.95)), layout="constrained")
    for index, (metric, title) in enumerate(metrics.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.axvline(0, color=INK, linewidth=1)
        for arm, by_metric in by_arm.items():
            mean, low, high = (100 * by_metric[metric][end] / scale[metric] for end in ("mean", "low", "high"))
            fill = colours[arm] if by_metric[metric]["shown"] else "white"
            style: dict[str, Any] = {"color": colours[arm], "fmt": "o", "capsize": 3, "markerfacecolor": fill}
            axes.errorbar(mean, arm, xerr=[[mean - low], [high - mean]], **style)
        axes.set_ylim(len(by_arm) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}%" if value else "0"))
        _finish(axes, title=title, xlabel="")
        axes.grid(axis="y", visible=False)
        if index % columns:
            axes.tick_params(axis="y", labelleft=False)
    return _save(figure, path)


def failure_gallery(failures: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> Path:
    """The worst samples of every arm, each above the real image nearest to it.

    Args:
        failures: arm to (samples, nearest real images), both uint8 [n, C, H, W] in the same order.
        path: PNG file to write.
    """
    require(bool(failures), "failures", "hold at least one arm", failures)
    colours = arm_colours(list(failures))
    most = max(len(samples) for samples, _ in failures.values())
    height = 9.2 / most * 2 + 0.4
    figure = Figure(figsize=(9.2, height * len(failures)), layout=ConstrainedLayoutEngine(h_pad=0.06))
    for index, (arm, (samples, nearest)) in enumerate(failures.items()):
        axes = figure.add_subplot(len(failures), 1, index + 1)
        mosaic = _mosaic(torch.cat([samples, nearest]), 2, len(samples))
        axes.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(arm, fontsize=11, color=colours[arm], fontweight="bold", loc="left")
        axes.set_yticks([mosaic.shape[0] * 0.25, mosaic.shape[0] * 0.75], ["sample", "nearest\nreal"])
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=9, labelcolor=INK)
        axes.spines[:].set_visible(False)
    return _save(figure, path)


def stress_curves(
    curves: Mapping[str, StressCurve], path: Path, *, xlabel: str, titles: Mapping[str, str] | None = None
) -> Path:
    """Metrics against the amount of a damage, a panel each, with 95% intervals; grey where the curve is not monotone.

    Each panel's title tells the trend of its curve.

    Args:
        curves: metric to curve.
        path: PNG file to write.
        xlabel: what the amount is.
        titles: metric to title of its panel; the metric's name by default.
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
        title = f"{(titles or {}).get(metric, metric)}: {curve.trend}"
        _finish(axes, title=title, xlabel=xlabel if index >= len(curves) - columns else "")
    return _save(figure, path)


def tracking_curves(tracks: Mapping[str, Any], path: Path, *, titles: Mapping[str, str] | None = None) -> Path:
    """Coverage, fidelity and their gap along training: a column each, a row per distance, a line per run.

    Args:
        tracks: run to its `studies.tracking.Track`.
        path: PNG file to write.
        titles: distance to its name beside the row; its own by default.
    """
    require(any(track.points for track in tracks.values()), "tracks", "hold at least one checkpoint", list(tracks))
    colours = arm_colours(list(tracks))
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
                axes.plot(updates, values, color=colours[run], marker="o", markersize=3.5, linewidth=1.7)
            if is_gap:
                axes.axhline(0, color=FAINT, linewidth=1.1, zorder=1)
            else:
                axes.axhline(next(iter(tracks.values())).base_line[distance], color=INK, linestyle="--", linewidth=1.1)
                _log_scale(axes)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
            _finish(axes, title=title, xlabel="updates" if row == len(distances) - 1 else "")
            axes.set_ylabel((titles or {}).get(distance, distance) if column == 0 else "", fontsize=9, color=INK)
    _legend(figure, colours, others={"train – test": {"color": INK, "linestyle": "--"}})
    return _save(figure, path)


def line_panels(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]],
    path: Path,
    *,
    xlabel: str,
    titles: Mapping[str, str] | None = None,
    logarithmic: Sequence[str] = (),
    logarithmic_x: bool = False,
    variants: Mapping[str, str] | None = None,
    bands: Mapping[str, Mapping[str, Mapping[float, tuple[float, float]]]] | None = None,
    floors: Mapping[str, float] | None = None,
) -> Path:
    """One panel for each quantity, one line with points for each arm, one legend for all.

    Args:
        panels: quantity to arm to {x: y}.
        path: PNG file to write.
        xlabel: what x is.
        titles: quantity to the title of its panel; its own name by default.
        logarithmic: quantities with a logarithmic y axis; the others start at 0.
        logarithmic_x: make the x axis logarithmic, too.
        variants: arm to the arm whose colour it has, dashed.
        bands: quantity to arm to {x: (low, high)}, the ends of an interval.
        floors: quantity to what real images score, a dashed line.
    """
    require(bool(panels), "panels", "hold at least one quantity", panels)
    variants, titles, bands, floors = variants or {}, titles or {}, bands or {}, floors or {}
    arms = list(dict.fromkeys(arm for lines in panels.values() for arm in lines))
    own = arm_colours([arm for arm in arms if arm not in variants])
    colours = own | {arm: own[plain] for arm, plain in variants.items()}
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), layout="constrained")
    for index, (quantity, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for arm, points in lines.items():
            look: dict[str, Any] = {"color": colours[arm], "linestyle": "--" if arm in variants else "-"}
            axes.plot(list(points), list(points.values()), marker="o", markersize=4, linewidth=1.8, **look)
            ends = bands.get(quantity, {}).get(arm, {})
            lows, highs = [low for low, _ in ends.values()], [high for _, high in ends.values()]
            axes.fill_between(list(ends), lows, highs, color=colours[arm], alpha=0.18, linewidth=0)
        if quantity in floors:
            axes.axhline(floors[quantity], color=INK, linestyle=":", linewidth=1.2)
        if quantity in logarithmic:
            _log_scale(axes)
        else:
            axes.set_ylim(bottom=0)
        if logarithmic_x:
            axes.set_xscale("log")
            axes.set_xticks(sorted({x for points in lines.values() for x in points}), minor=False)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        _finish(axes, title=titles.get(quantity, quantity), xlabel=xlabel if index >= len(panels) - columns else "")
    others: dict[str, Any] = {arm: {"color": colours[arm], "linestyle": "--", "linewidth": 2.4} for arm in variants}
    others |= {"real vs real": {"color": INK, "linestyle": ":"}} if floors else {}
    _legend(figure, own, columns=4, others=others)
    return _save(figure, path)


def _draw_intervals(
    axes: Axes, results: Mapping[str, Any], metric: str, values: Mapping[str, float]
) -> dict[str, float]:
    """A whisker on each bar whose arm has an interval; returns the upper ends."""
    intervals = {arm: results["arms"][arm].get("intervals", {}).get(metric) for arm in values}
    intervals = {arm: interval for arm, interval in intervals.items() if interval}
    for arm, interval in intervals.items():
        below, above = values[arm] - interval["low"], interval["high"] - values[arm]
        axes.errorbar(values[arm], arm, xerr=[[below], [above]], color=INK, capsize=3, linewidth=1.2)
    return {arm: interval["high"] for arm, interval in intervals.items()}


def _by_epoch(records: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """(epoch, mean of `key` over its records that have it), in order; without epochs, by step."""
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
    count, channels, height, width = images.shape
    scale = max(1, 48 // max(height, width))
    images = images.cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    height, width, gap = height * scale, width * scale, max(2, max(height, width) * scale // 12)
    mosaic = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for index in range(min(count, rows * columns)):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        mosaic[:, top : top + height, left : left + width] = images[index]
    return mosaic.permute(1, 2, 0)


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


def _legend(
    figure: Figure,
    colours: Mapping[str, str],
    columns: int | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """One legend for the whole figure, above it: a line per arm, then `others` with their own styles."""
    handles = [Line2D([], [], color=colour, linewidth=2.4, label=arm) for arm, colour in colours.items()]
    handles += [Line2D([], [], label=label, **style) for label, style in (others or {}).items()]
    columns = columns or len(handles)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=10)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return path
