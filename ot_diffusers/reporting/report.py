"""A run's `results.json` as tables and as one self-contained HTML file.

The contents of the file:

    {"title": str, "dataset": str, "dataset_hub_id": str or null, "num_samples": int,
     "extractor": {"name": str, "feature_dim": int, "effective_rank": float, "has_classifier": bool,
                   "test_accuracy": float or null, "chance": float},
     "arms": {method: {"metrics": {metric: value}, "nfe": int, "seconds": float, "description": str}},
     "floor": {"metrics": {metric: value}},
     "provenance": {…}}

`"floor"` holds the real-vs-real score. `"headline"` may name the metrics of the short tables and `"costs"` their cost
columns. A method with `"bound": true` is a bound for the others and is never marked as the best. If the evaluator
cannot be trusted (`health.evaluator_doubt`), no method is.

A comparison over several random seeds adds `"seeds": [int, …]`. Its values are means, and each method has
`"intervals": {metric: {"low": value, "high": value}}`. `"summary"` (a sentence) and `"notes"` (several) are shown with
the table, `"links"` (name to address) above it, and `"next"` (pairs of sentence and command) at the end of the page.
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
from .page import (
    Picture,
    Rows,
    Step,
    definitions,
    figure,
    links,
    next_steps,
    paragraphs,
    provenance_list,
    rows_table,
    table,
    write_page,
)

NEXT = (
    (
        "Compare several methods over paired random seeds, with intervals:",
        "ot-diffusers compare PIPELINE OTHER_PIPELINE --dataset DATASET --evaluator EVALUATOR --seeds 5",
    ),
    (
        "Check how the metrics respond to known damage:",
        "ot-diffusers stress --dataset DATASET --evaluator EVALUATOR",
    ),
)
"""Next steps after results that name none."""

REAL_VS_REAL = (
    "Real vs real is the score of as many real training images, measured in the same way. A guided method can score "
    "below it: guidance moves the samples of a batch together towards the reference set, so they cover the "
    "distribution more evenly than as many random draws of real images. This does not mean that they are better than "
    "real images."
)


def write_report(
    results: Mapping[str, Any],
    pictures: Mapping[str, Picture],
    path: Path,
    *,
    tables: Mapping[str, Rows] = MappingProxyType({}),
) -> Path:
    """Write one HTML file that needs nothing else: pictures and style are inside, no script and no network access.

    Args:
        results: the contents of `results.json`, see the module.
        pictures: heading to picture, in the order shown.
        path: the HTML file.
        tables: heading to further tables, shown after the pictures.

    Raises:
        InputError: no method, or a picture that does not exist.
    """
    _check(results)
    linked = links(results["links"]) if results.get("links") else ""
    sections = {"Results": _summary(results) + linked + _arms_table(results) + paragraphs(_notes(results))}
    sections |= {heading: figure(picture, heading) for heading, picture in pictures.items()}
    sections |= {heading: rows_table(rows) for heading, rows in tables.items()}
    sections["All metrics"] = _metrics_table(results)
    if _has_descriptions(results):
        sections["Methods"] = _arms_list(results)
    steps: list[Step] = [*results.get("next", NEXT)]
    sections["Next steps"] = next_steps(steps)
    sections["Provenance"] = provenance_list(results.get("provenance", {}))
    return write_page(Path(path), results.get("title", "Results"), sections, facts=_facts(results))


def markdown_table(results: Mapping[str, Any], metrics: Sequence[str] | None = None) -> str:
    """Methods by metrics in Markdown, the best values in bold and the real-vs-real score last, below the evaluator.

    Args:
        results: the contents of `results.json`, see the module.
        metrics: columns; by default the headline of the results.
    """
    header, rows, best = _cells(results, metrics)
    bold = [[f"**{cell}**" if (r, c) in best else cell for c, cell in enumerate(row)] for r, row in enumerate(rows)]
    return captioned(markdown_rows([header, *bold]), results)


def captioned(table: str, results: Mapping[str, Any]) -> str:
    """A table in text or Markdown, below a line about the evaluator if its effective rank was measured."""
    return f"{evaluators(results)}\n\n{table}" if "effective_rank" in results.get("extractor", {}) else table


def evaluators(results: Mapping[str, Any]) -> str:
    """A sentence about the evaluator, and one about the second evaluator if there is one; "" for none."""
    lines = (
        evaluator_line(results.get("extractor", {})),
        evaluator_line(results.get("second_extractor", {}), "Second evaluator:"),
    )
    return " ".join(filter(None, lines))


def markdown_rows(rows: Rows) -> str:
    """A table in Markdown."""
    header, *lines = rows
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *lines])


def text_table(results: Mapping[str, Any], metrics: Sequence[str] | None = None) -> str:
    """The same table for a terminal: aligned columns, `*` after the best value."""
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
    """Three significant digits: 0.00120, 12.3, 1230, 12,345; counts unchanged; `–` for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, int) or 1000 <= abs(value) < 100_000:
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def column_title(metric: str) -> str:
    """The metric's label, and an arrow for the direction that is better."""
    return f"{_label(metric)}\N{NO-BREAK SPACE}{_arrow(metric)}"


def best_arms(results: Mapping[str, Any], metric: str) -> set[str]:
    """The methods whose printed value of `metric` is the best.

    Empty for fewer than two values, for a missing real-vs-real score that the metric needs, and if the evaluator cannot
    be trusted. Also empty if an unbiased estimate of a distance is negative: such an estimate is noise around 0, and a
    lower one is not better.
    """
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
    """Header, rows of text, and the (row, column) of the best values, without the metrics that no method has."""
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
    require(bool(results.get("arms")), "results", "hold at least one method", sorted(results))


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
        f"{results['num_samples']:,} samples per method" if "num_samples" in results else "",
        f"{count} random seed{'s' if count > 1 else ''}" if (count := len(results.get("seeds", []))) else "",
        f"evaluated by {extractor['name']}" if "name" in extractor else "",
        *evaluator_properties(extractor),
    ]
    return [fact for fact in facts if fact]


def _summary(results: Mapping[str, Any]) -> str:
    """The summary of the results; without one, a sentence that compares the best method with the first, or the reason
    why there is no verdict."""
    doubt = evaluator_doubt(results.get("extractor", {}))
    if "summary" in results or doubt is not None:
        no_verdict = f"There is no verdict, because the evaluator cannot be trusted: {doubt}."
        return paragraphs([results.get("summary", no_verdict)], "lead")
    metric = "frechet_distance"
    arms = [arm for arm, entry in results["arms"].items() if not entry.get("bound")]
    values = [results["arms"][arm]["metrics"].get(metric) for arm in arms]
    if len(arms) < 2 or None in values or values[0] <= 0:
        return ""
    best = min(range(len(arms)), key=values.__getitem__)
    first, lowest = format_number(values[0]), format_number(values[best])
    if best == 0:
        return f"<p class='lead'>No method has a lower Fréchet distance than <b>{escape(arms[0])}</b> ({first}).</p>"
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
    """One row for each metric and one column for each method."""
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
    return table(["", *arms, "real vs real"], lines)


def _notes(results: Mapping[str, Any]) -> list[str]:
    line = evaluators(results)
    note = (
        "Lower values are better in columns marked ↓, higher values in columns marked ↑, and values nearer to real vs "
        "real in columns marked ≈. The best value is bold; an estimate below 0 is never marked. NFE is the number of "
        "function evaluations (network calls) for one image."
    )
    seeds = len(results.get("seeds", [0]))
    if seeds > 1:
        note += f" Values are means over {seeds} random seeds."
    else:
        note += " These values come from one random seed: small differences need several seeds."
    real = [REAL_VS_REAL] if results.get("floor", {}).get("metrics") else []
    return [*([line] if line else []), note, *real, *results.get("notes", [])]


def _has_descriptions(results: Mapping[str, Any]) -> bool:
    return any(entry.get("description") for entry in results["arms"].values())


def _arms_list(results: Mapping[str, Any]) -> str:
    return definitions({arm: entry.get("description", "") for arm, entry in results["arms"].items()})
