"""A run's `results.json` as tables and as one self-contained HTML file.

The file's contents:

    {"title": str, "dataset": str, "dataset_hub_id": str or null, "num_samples": int,
     "extractor": {"name": str, "feature_dim": int, "effective_rank": float, "has_classifier": bool,
                   "test_accuracy": float or null, "chance": float},
     "arms": {arm: {"metrics": {metric: value}, "nfe": int, "seconds": float, "description": str}},
     "floor": {"metrics": {metric: value}},
     "provenance": {…}}

It may name the metrics of its short tables (`"headline"`) and their cost columns (`"costs"`). An arm with
`"bound": true` is what the others cannot beat, and never marked as the best. By an evaluator that cannot be trusted
(`health.evaluator_doubt`), nothing is.

A comparison over several seeds adds `"seeds": [int, …]`; its values are then means, and each arm has
`"intervals": {metric: {"low": value, "high": value}}`. `"summary"` (a sentence) and `"notes"` (several) stand with the
table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import require
from ..evaluation.health import evaluator_doubt, evaluator_line, evaluator_properties
from ..evaluation.metric_table import COSTS, HEADLINE, METRICS
from .colours import arm_colours
from .page import Rows, definitions, paragraphs, picture, provenance_list, rows_table, table, write_page


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
    sections = {"Results": _summary(results) + _arms_table(results) + paragraphs(_notes(results))}
    sections |= {caption: rows_table(rows) for caption, rows in tables.items()}
    sections |= {caption: picture(caption, Path(file)) for caption, file in pictures.items()}
    sections["All metrics"] = _metrics_table(results)
    if _has_descriptions(results):
        sections["Arms"] = _arms_list(results)
    sections["Provenance"] = provenance_list(results.get("provenance", {}))
    return write_page(Path(path), results.get("title", "Results"), sections, facts=_facts(results))


def markdown_table(results: Mapping[str, Any], metrics: Sequence[str] | None = None) -> str:
    """Arms by metrics with the best value in bold and the real-vs-real floor last, below the evaluator, in Markdown.

    Args:
        results: the contents of `results.json`, see the module.
        metrics: names of the columns; by default the results' headline.
    """
    header, rows, best = _cells(results, metrics)
    bold = [[f"**{cell}**" if (r, c) in best else cell for c, cell in enumerate(row)] for r, row in enumerate(rows)]
    return captioned(markdown_rows([header, *bold]), results)


def captioned(table: str, results: Mapping[str, Any]) -> str:
    """A table in text or Markdown below what its results say of the evaluator, in as far as that was measured."""
    return f"{evaluators(results)}\n\n{table}" if "effective_rank" in results.get("extractor", {}) else table


def evaluators(results: Mapping[str, Any]) -> str:
    """The evaluator and, where there is one, the second, in a sentence each; "" for none."""
    lines = evaluator_line(results.get("extractor", {})), evaluator_line(results.get("second_extractor", {}), "2nd by")
    return " ".join(filter(None, lines))


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
    return captioned("\n".join(line.rstrip() for line in lines), results)


def format_number(value: float | None) -> str:
    """Three significant digits: 0.00120, 12.3, 1230; counts as they are; `–` for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, int) or 1000 <= abs(value) < 100_000:
        return f"{value:,.0f}" if abs(value) >= 100_000 else f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def column_title(metric: str) -> str:
    """The metric's label, and an arrow for the direction that is better."""
    return f"{_label(metric)}\N{NO-BREAK SPACE}{_arrow(metric)}"


def best_arms(results: Mapping[str, Any], metric: str) -> set[str]:
    """The arms whose printed value of `metric` is the best; empty for fewer than two values, for a missing floor, and
    where the evaluator cannot be trusted. So it is where an unbiased estimate of a distance is below 0: that shows no
    distance, and not how much smaller than the others it is."""
    if evaluator_doubt(results.get("extractor", {})) is not None:
        return set()
    arms = {arm: entry for arm, entry in results["arms"].items() if not entry.get("bound")}
    values = {arm: entry["metrics"][metric] for arm, entry in arms.items() if metric in entry["metrics"]}
    floor = results.get("floor", {}).get("metrics", {}).get(metric)
    better = METRICS[metric].better if metric in METRICS else "lower"
    if len(values) < 2 or (better == "floor" and floor is None):
        return set()
    if metric in METRICS and better == "lower" and min(values.values()) < 0:
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
    names = metrics or results.get("headline", HEADLINE)
    metrics = [name for name in names if any(name in entry["metrics"] for entry in arms.values())]
    costs = results.get("costs", ("nfe", "seconds"))
    header = ["", *map(column_title, metrics), *(COSTS[name] for name in costs)]
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


# --- HTML -------------------------------------------------------------------------------------------------------------


def _facts(results: Mapping[str, Any]) -> list[str]:
    extractor = results.get("extractor", {})
    facts = [
        f"data set {results['dataset']}" if "dataset" in results else "",
        f"{results['num_samples']:,} samples per arm" if "num_samples" in results else "",
        f"{count} seed{'s' if count > 1 else ''}" if (count := len(results.get("seeds", []))) else "",
        f"evaluated by {extractor['name']}" if "name" in extractor else "",
        *evaluator_properties(extractor),
    ]
    return [fact for fact in facts if fact]


def _summary(results: Mapping[str, Any]) -> str:
    """How the best arm compares with the first one, in one sentence of the file's own numbers, or the file's own; or
    why no arm is compared."""
    doubt = evaluator_doubt(results.get("extractor", {}))
    if "summary" in results or doubt is not None:
        return paragraphs([results.get("summary", f"No verdict: the evaluator cannot be trusted: {doubt}.")], "lead")
    metric = "frechet_distance"
    arms = [arm for arm, entry in results["arms"].items() if not entry.get("bound")]
    values = [results["arms"][arm]["metrics"].get(metric) for arm in arms]
    if len(arms) < 2 or None in values or values[0] <= 0:
        return ""
    best = min(range(len(arms)), key=values.__getitem__)
    first, lowest = format_number(values[0]), format_number(values[best])
    if best == 0:
        return f"<p class='lead'>No arm scores a lower Fréchet distance than <b>{escape(arms[0])}</b> ({first}).</p>"
    change = 100 * (values[best] / values[0] - 1)
    return (
        f"<p class='lead'><b>{escape(arms[best])}</b> has a Fréchet distance of {lowest}, against {first} for "
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
    return table(header, lines)


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
    return table(["", *arms, "real vs real"], lines, kind="wide-names")


def _notes(results: Mapping[str, Any]) -> list[str]:
    note = "↓ lower, ↑ higher, ≈ nearer to real images is better; bold is the best value. NFE: network calls per image."
    line = evaluators(results)
    if results.get("floor", {}).get("metrics"):
        note += " “Real vs real” is what as many real images score: the floor that no model is expected to beat."
    seeds = len(results.get("seeds", [0]))
    note += (
        f" Means over {seeds} seeds." if seeds > 1 else " One run is one draw: small differences need several seeds."
    )
    return [*([line] if line else []), note, *results.get("notes", [])]


def _has_descriptions(results: Mapping[str, Any]) -> bool:
    return any(entry.get("description") for entry in results["arms"].values())


def _arms_list(results: Mapping[str, Any]) -> str:
    return definitions({arm: entry.get("description", "") for arm, entry in results["arms"].items()})
