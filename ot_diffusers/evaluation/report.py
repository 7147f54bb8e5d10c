"""A run's `results.json` as tables and as one self-contained HTML file.

The file's contents:

    {"title": str, "dataset": str, "num_samples": int,
     "extractor": {"name": str, "feature_dim": int, "test_accuracy": float},
     "arms": {arm: {"metrics": {metric: value}, "nfe": int, "seconds": float, "description": str}},
     "floor": {"metrics": {metric: value}},
     "provenance": {…}}

It may name the metrics of its short tables (`"headline"`) and their cost columns (`"costs"`). An arm with
`"bound": true` is what the others cannot beat, and never marked as the best.

A comparison over several seeds adds `"seeds": [int, …]`; its values are then means, and each arm has
`"intervals": {metric: {"low": value, "high": value}}`. `"summary"` (a sentence) and `"notes"` (several) stand with the
table.
"""

from __future__ import annotations

import base64
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ..errors import require
from .plots import arm_colours


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: short column heading.
        better: which direction is better; `"floor"` means nearer to what real images score.
        meaning: one sentence for the reader.
    """

    label: str
    better: Literal["lower", "higher", "floor"]
    meaning: str


METRICS = {
    "frechet_distance": Metric("Fréchet", "lower", "Distance of the Gaussian fits in feature space (FID)."),
    "frechet_distance_infinity": Metric(
        "Fréchet∞", "lower", "The same extrapolated to infinitely many samples; about 0 for equal distributions."
    ),
    "sinkhorn_distance": Metric("Sinkhorn", "lower", "Sinkhorn divergence on the unit sphere, blur 0.05."),
    "sinkhorn_distance_scaled": Metric("Sinkhorn, scaled", "lower", "The same with features at median distance 1."),
    "kernel_distance": Metric("Kernel", "lower", "Squared MMD with a cubic kernel (KID), unbiased."),
    "precision": Metric("Precision", "higher", "Share of the samples that lie near a real image."),
    "recall": Metric("Recall", "higher", "Share of the real images that lie near a sample."),
    "density": Metric("Density", "higher", "How many real neighbourhoods hold a sample, 1 for equal distributions."),
    "coverage": Metric("Coverage", "higher", "Share of real neighbourhoods that hold a sample."),
    "precision_distance": Metric("Precision dist.", "lower", "Mean distance from a sample to the nearest real image."),
    "recall_distance": Metric("Recall dist.", "lower", "Mean distance from a real image to the nearest sample."),
    "nearest_distance_ratio": Metric(
        "Memorisation", "floor", "Distance to the nearest training image over that of fresh real ones; 0 for copies."
    ),
    "effective_rank": Metric("Effective rank", "floor", "How many feature directions the samples use."),
    "class_histogram_distance": Metric("Class histogram", "lower", "Total variation of the predicted class shares."),
    "patch_sliced_wasserstein": Metric("Patch SW", "lower", "Sliced Wasserstein distance of 7×7 pixel patches."),
    "spectrum_distance": Metric("Spectrum", "lower", "Mean difference of log₁₀ power over spatial frequencies."),
    "speckle_share": Metric("Speckle", "floor", "Share of grey pixels away from any stroke."),
    "laplacian_response": Metric("Laplacian", "floor", "Mean local contrast; above real images noise, below blur."),
}  # fmt: skip

HEADLINE = (
    "frechet_distance",
    "sinkhorn_distance",
    "precision",
    "recall",
    "nearest_distance_ratio",
    "patch_sliced_wasserstein",
)
"""The metrics of the short tables, unless the results name others."""

COSTS = {
    "nfe": "NFE",
    "seconds": "seconds",
    "seconds_per_1000": "s per 1,000",
    "parameters": "parameters",
    "training_seconds": "training s",
    "updates": "updates",
}
"""Keys of an arm that are costs, with their headings."""

PACKAGES = (
    "ot-diffusers",
    "torch",
    "diffusers",
    "accelerate",
    "datasets",
    "torch-fidelity",
    "numpy",
    "scipy",
)


def provenance() -> dict[str, Any]:
    """Versions, platform and commit of this process; neither host name nor paths."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


Rows = Sequence[Sequence[str]]
"""A table as text: the header, then the lines, each with its name in front."""


def write_report(
    results: Mapping[str, Any],
    pictures: Mapping[str, Path],
    path: Path,
    *,
    tables: Mapping[str, Rows] = MappingProxyType({}),
) -> Path:
    """Write one HTML file that needs nothing else: pictures and style are inside, no script and no network.

    Args:
        results: the contents of `results.json`, see the module.
        pictures: caption to PNG file, in the order shown.
        path: the HTML file.
        tables: caption to further tables, shown between the results and the pictures.

    Raises:
        InputError: no arm, or a picture that does not exist.
    """
    _check(results)
    for picture in pictures.values():
        require(Path(picture).is_file(), "pictures", "be existing files", str(picture))
    title = escape(results.get("title", "Results"))
    sections = [
        f"<header><h1>{title}</h1>{_subtitle(results)}</header>",
        _section("Results", _summary(results) + _arms_table(results) + _note(results)),
        *(_section(caption, _rows_table(rows)) for caption, rows in tables.items()),
        *(_section(caption, _picture(caption, Path(picture))) for caption, picture in pictures.items()),
        _section("All metrics", _metrics_table(results)),
        _section("Arms", _arms_list(results)) if _has_descriptions(results) else "",
        _section("Provenance", _provenance_list(results)),
    ]
    body = "\n".join(section for section in sections if section)
    page = _PAGE.replace("{{title}}", title).replace("{{style}}", _STYLE).replace("{{body}}", body)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def markdown_table(results: Mapping[str, Any], metrics: Sequence[str] | None = None) -> str:
    """Arms by metrics with the best value in bold and the real-vs-real floor last, in Markdown.

    Args:
        results: the contents of `results.json`, see the module.
        metrics: names of the columns; by default the results' headline.
    """
    header, rows, best = _cells(results, metrics)
    bold = [[f"**{cell}**" if (r, c) in best else cell for c, cell in enumerate(row)] for r, row in enumerate(rows)]
    return markdown_rows([header, *bold])


def markdown_rows(rows: Rows) -> str:
    """A table as it stands, in Markdown."""
    header, *lines = rows
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *lines])


def text_table(results: Mapping[str, Any], metrics: Sequence[str] | None = None) -> str:
    """The same for a terminal: aligned columns, `*` behind the best value."""
    header, rows, best = _cells(results, metrics)
    starred = [
        [cell + ("*" if (r, c) in best else " " if c else "") for c, cell in enumerate(row)]
        for r, row in enumerate(rows)
    ]
    header = [header[0], *(f"{cell} " for cell in header[1:])]
    widths = [max(len(row[c]) for row in [header, *starred]) for c in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if c else cell.ljust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, ["-" * width for width in widths], *starred]
    ]
    return "\n".join(line.rstrip() for line in lines)


def format_number(value: float | None) -> str:
    """Three significant digits: 0.00120, 12.3, 1230; counts as they are; `–` for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, int) or 1000 <= abs(value) < 100_000:
        return f"{value:,.0f}" if abs(value) >= 100_000 else f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def best_arms(results: Mapping[str, Any], metric: str) -> set[str]:
    """The arms whose printed value of `metric` is the best; empty for fewer than two values or a missing floor."""
    arms = {arm: entry for arm, entry in results["arms"].items() if not entry.get("bound")}
    values = {arm: entry["metrics"][metric] for arm, entry in arms.items() if metric in entry["metrics"]}
    floor = results.get("floor", {}).get("metrics", {}).get(metric)
    better = METRICS[metric].better if metric in METRICS else "lower"
    if len(values) < 2 or (better == "floor" and floor is None):
        return set()
    cost = {"lower": lambda x: x, "higher": lambda x: -x, "floor": lambda x: abs(x - floor)}[better]
    # Two values that print alike are alike.
    winner = format_number(values[min(values, key=lambda arm: cost(values[arm]))])
    return {arm for arm, value in values.items() if format_number(value) == winner}


def _cells(
    results: Mapping[str, Any], metrics: Sequence[str] | None
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Header, rows of text, and the (row, column) of the best values; metrics that no arm has are left out."""
    _check(results)
    arms, floor = results["arms"], results.get("floor", {}).get("metrics", {})
    wanted = metrics or results.get("headline", HEADLINE)
    metrics = [name for name in wanted if any(name in entry["metrics"] for entry in arms.values())]
    costs = results.get("costs", ("nfe", "seconds"))
    labels = [f"{_label(name)}\N{NO-BREAK SPACE}{_arrow(name)}" for name in metrics]
    header = ["", *labels, *(COSTS[name] for name in costs)]
    rows = [
        [
            arm,
            *(format_number(entry["metrics"].get(name)) for name in metrics),
            *(format_number(entry.get(name)) for name in costs),
        ]
        for arm, entry in arms.items()
    ]
    best = {
        (r, c + 1) for c, name in enumerate(metrics) for r, arm in enumerate(arms) if arm in best_arms(results, name)
    }
    if floor:
        rows.append(["real vs real", *(format_number(floor.get(name)) for name in metrics), *["–"] * len(costs)])
    return header, rows, best


def _check(results: Mapping[str, Any]) -> None:
    require(bool(results.get("arms")), "results", "hold at least one arm", sorted(results))


def _label(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")


def _arrow(metric: str) -> str:
    better = METRICS[metric].better if metric in METRICS else "lower"
    return {"lower": "↓", "higher": "↑", "floor": "≈"}[better]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package runs from, with `+` for uncommitted changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed copy can lie inside someone else's checkout (a virtual environment in it, say).
        subprocess.run([*git, "ls-files", "--error-unmatch", "report.py"], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")


# --- HTML -------------------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def _subtitle(results: Mapping[str, Any]) -> str:
    extractor = results.get("extractor", {})
    accuracy = extractor.get("test_accuracy")
    facts = [
        f"data set {results['dataset']}" if "dataset" in results else "",
        f"{results['num_samples']:,} samples per arm" if "num_samples" in results else "",
        f"{len(results['seeds'])} seeds" if "seeds" in results else "",
        f"evaluated by {extractor['name']}" if "name" in extractor else "",
        f"{extractor['feature_dim']} features" if "feature_dim" in extractor else "",
        f"{100 * accuracy:.1f}% test accuracy" if accuracy is not None else "",
    ]
    return f"<p class='facts'>{' · '.join(escape(fact) for fact in facts if fact)}</p>"


def _summary(results: Mapping[str, Any]) -> str:
    """How the best arm compares with the first one, in one sentence of the file's own numbers, or the file's own."""
    if "summary" in results:
        return f"<p class='lead'>{escape(results['summary'])}</p>"
    metric = "frechet_distance"
    arms = [arm for arm, entry in results["arms"].items() if not entry.get("bound")]
    values = [results["arms"][arm]["metrics"].get(metric) for arm in arms]
    if len(arms) < 2 or None in values or values[0] <= 0:
        return ""
    best = min(range(len(arms)), key=values.__getitem__)
    first, found = format_number(values[0]), format_number(values[best])
    if best == 0:
        return f"<p class='lead'>No arm scores a lower Fréchet distance than <b>{escape(arms[0])}</b> ({first}).</p>"
    change = 100 * (values[best] / values[0] - 1)
    return (
        f"<p class='lead'><b>{escape(arms[best])}</b> has a Fréchet distance of {found}, against {first} for "
        f"<b>{escape(arms[0])}</b> ({change:+.0f}%).</p>".replace("(-", "(−")
    )


def _arms_table(results: Mapping[str, Any]) -> str:
    header, rows, best = _cells(results, None)
    colours = arm_colours(list(results["arms"]))
    lines = []
    for r, row in enumerate(rows):
        cells = "".join(
            f"<td{' class=best' if (r, c) in best else ''}>{escape(cell)}</td>" for c, cell in enumerate(row) if c
        )
        dot = f"<i class='dot' style='background:{colours[row[0]]}'></i>" if row[0] in colours else ""
        lines.append(f"<tr{'' if dot else ' class=floor'}><th scope='row'>{dot}{escape(row[0])}</th>{cells}</tr>")
    return _table(header, lines)


def _metrics_table(results: Mapping[str, Any]) -> str:
    """Metrics down, arms across: the full table stays narrow enough for a phone."""
    arms, floor = results["arms"], results.get("floor", {}).get("metrics", {})
    present = {name for entry in arms.values() for name in entry["metrics"]}
    metrics = [name for name in METRICS if name in present] + sorted(present - set(METRICS))
    lines = []
    for name in metrics:
        best = best_arms(results, name)
        cells = "".join(
            f"<td{' class=best' if arm in best else ''}>{format_number(entry['metrics'].get(name))}</td>"
            for arm, entry in arms.items()
        )
        meaning = f"<small>{escape(METRICS[name].meaning)}</small>" if name in METRICS else ""
        heading = f"<th scope='row'>{escape(_label(name))}&nbsp;{_arrow(name)}{meaning}</th>"
        lines.append(f"<tr>{heading}{cells}<td class='floor'>{format_number(floor.get(name))}</td></tr>")
    return _table(["", *arms, "real vs real"], lines, kind="wide-names")


def _table(header: Sequence[str], lines: Sequence[str], kind: str = "") -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    rows = "\n".join(lines)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _note(results: Mapping[str, Any]) -> str:
    note = "↓ lower, ↑ higher, ≈ nearer to real images is better; bold is the best value. NFE: network calls per image."
    if results.get("floor", {}).get("metrics"):
        note += " “Real vs real” is what as many real images score: the floor that no model is expected to beat."
    seeds = len(results.get("seeds", [0]))
    note += (
        f" Means over {seeds} seeds." if seeds > 1 else " One run is one draw: small differences need several seeds."
    )
    return "".join(f"<p class='note'>{escape(text)}</p>" for text in [note, *results.get("notes", [])])


def _rows_table(rows: Rows) -> str:
    header, *lines = rows
    cells = [
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for name, *row in lines
    ]
    return _table(header, cells)


def _picture(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"<figure><img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'></figure>"


def _has_descriptions(results: Mapping[str, Any]) -> bool:
    return any(entry.get("description") for entry in results["arms"].values())


def _arms_list(results: Mapping[str, Any]) -> str:
    return _definitions({arm: entry.get("description", "") for arm, entry in results["arms"].items()})


def _provenance_list(results: Mapping[str, Any]) -> str:
    found = dict(results.get("provenance", {}))
    packages = found.pop("packages", None)
    config = {name: value for name, value in found.items() if isinstance(value, Mapping)}
    plain = {
        name: "not in a checkout" if value is None else value for name, value in found.items() if name not in config
    }
    if packages:
        plain["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    details = "".join(
        f"<details><summary>{escape(name)}</summary>"
        f"<pre>{escape(json.dumps(value, indent=2, default=str))}</pre></details>"
        for name, value in config.items()
    )
    return _definitions(plain) + details


def _definitions(entries: Mapping[str, Any]) -> str:
    items = "\n".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
    return f"<dl>{items}</dl>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>{{style}}</style>
</head>
<body>
<main>
{{body}}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ground: #f7f8fa; --card: #fff; --ink: #1f2937; --soft: #5b6675; --line: #e3e6ea; --best: #0b7a5b; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181d; --card: #1c2229; --ink: #e5e9ee; --soft: #9aa5b3; --line: #303843; --best: #4fd1a5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.05rem; margin: 0 0 14px; }
.facts { color: var(--soft); margin: 0 0 28px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; }
section { margin: 0 0 18px; }
.lead { margin: 0 0 14px; }
.note { color: var(--soft); font-size: 0.85rem; margin: 12px 0 0; }
.scroll { overflow-x: auto; margin: 0 -22px; padding: 0 22px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 0 8px 18px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--card); }
thead th { color: var(--soft); font-weight: 500; font-size: 0.85rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
.wide-names tbody th { white-space: normal; min-width: 9.5rem; padding-right: 8px; }
small { display: block; color: var(--soft); font-weight: 400; font-size: 0.8rem; line-height: 1.35; }
.best { color: var(--best); font-weight: 700; }
.floor, tr.floor th { color: var(--soft); font-weight: 400; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
figure { margin: 0; background: #fff; border-radius: 6px; padding: 6px; overflow-x: auto; }
img { display: block; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; margin: 0; font-size: 0.9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 10px; font-size: 0.9rem; }
summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; font-size: 0.8rem; }
@media (max-width: 600px) {
  main { padding: 24px 12px 40px; }
  section { padding: 16px; }
  img { min-width: 640px; }
  .scroll { margin: 0 -16px; padding: 0 16px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 10px; }
}
"""
