"""Numbers and options in README, docs and cards: rendered from their source, never typed.

A Markdown file says where a table belongs by a pair of comments, and everything between them is rendered:

    <!-- results: docs/digits/results.json -->
    <!-- /results -->

    <!-- results: docs/digits/compare.json | rows: baseline; OT-guided | columns: frechet_distance; nfe -->
    <!-- /results -->

    <!-- results: docs/digits/few_calls.json | by: quality_by_steps | columns: frechet_distance -->
    <!-- /results -->

    <!-- options: OTConfig -->
    <!-- /options -->

    python -m ot_diffusers.reporting.quoting README.md            renders
    python -m ot_diffusers.reporting.quoting --check README.md    fails where a page and its source differ
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import config
from ..errors import InputError, require
from ..evaluation.metric_table import COSTS
from .differences import curve_rows, interval_rows, summary
from .page import Rows
from .report import captioned, format_number, markdown_rows, markdown_table

_RESULTS = re.compile(
    r"(<!-- results: (?P<path>\S+)(?: \| by: (?P<by>\w+))?(?: \| rows: (?P<rows>[^|>]+))?"
    r"(?: \| columns: (?P<columns>[^|>]+))? -->\n)"
    r".*?(<!-- /results -->)",
    re.DOTALL,
)
_OPTIONS = re.compile(r"(<!-- options: (?P<name>\w+) -->\n).*?(<!-- /options -->)", re.DOTALL)


def render_quotes(markdown: Path) -> str:
    """The text of a Markdown file with every quoted table rendered from its source; paths are relative to the Markdown
    file.

    Raises:
        InputError: a file of results, a row of it, or a configuration that does not exist.
    """

    def render_results(block: re.Match[str]) -> str:
        file = markdown.parent / block["path"]
        require(file.is_file(), "results", "name an existing file", block["path"])
        results = json.loads(file.read_text(encoding="utf-8"))
        rows, columns = _names(block["rows"]), _names(block["columns"])
        table = quote_curves(results, block["by"], rows, columns) if block["by"] else quote(results, rows, columns)
        return f"{block[1]}\n{table}\n\n<!-- /results -->"

    def render_options(block: re.Match[str]) -> str:
        options = getattr(config, block["name"], None)
        require(dataclasses.is_dataclass(options), "options", "name a configuration", block["name"])
        return f"{block[1]}\n{markdown_options(options)}\n\n<!-- /options -->"

    text = _RESULTS.sub(render_results, markdown.read_text(encoding="utf-8"))
    return _OPTIONS.sub(render_options, text)


def quote(results: Mapping[str, Any], rows: Sequence[str] = (), columns: Sequence[str] = ()) -> str:
    """The table of one run; of a comparison means with their intervals; what a command has already made a table of, as
    it stands; each below its summary where it has one.

    Args:
        results: the contents of a file of results.
        rows: names of the rows to quote; all by default.
        columns: metrics and costs to quote; by default the results' own.
    """
    if rows:
        results = _with_rows(results, rows)
    if "table" in results:
        table = markdown_rows([results["table"]["header"], *results["table"]["rows"]])
    elif results.get("differences"):
        metrics = [name for name in columns if name not in COSTS]
        costs = [name for name in columns if name in COSTS]
        quoted = interval_rows(results, metrics or list(next(iter(results["differences"].values()))))
        table = captioned(markdown_rows(_with_costs(quoted, results, costs)), results)
    else:
        costs = [name for name in columns if name in COSTS]
        chosen = {**results, "costs": costs} if columns else results
        table = markdown_table(chosen, [name for name in columns if name not in COSTS] or None)
    return f"{results['summary']}\n\n{table}" if "summary" in results else table


def quote_curves(results: Mapping[str, Any], key: str, rows: Sequence[str], columns: Sequence[str]) -> str:
    """A table of a metric by the values of an axis: methods down, values across.

    Args:
        results: the contents of a file of results.
        key: of the curves, such as `"quality_by_steps"`.
        rows: names of the methods; all by default.
        columns: the metrics, each with a table; the primary one by default.
    """
    require(key in results, "by", "name curves of the results", key)
    lines = {name: line for name, line in results[key].items() if not rows or name in rows}
    missing = [name for name in rows if name not in lines]
    require(not missing, "rows", f"be among {', '.join(results[key])}", missing)
    title = key.rsplit("_", 1)[-1]
    chosen = {**results, key: lines}
    tables = [curve_rows(chosen, key, metric, title=title) for metric in columns or [results["primary_metric"]]]
    return "\n\n".join(captioned(markdown_rows(table), results) for table in tables)


def markdown_options(config_class: Any) -> str:
    """The options that a configuration adds to those it is based on, or gives another default: a table for each group
    of options."""
    inherited = {entry.name: entry.default for entry in dataclasses.fields(config_class.__base__)}
    groups: dict[str, list[list[str]]] = {}
    for entry in dataclasses.fields(config_class):
        if inherited.get(entry.name, dataclasses.MISSING) != entry.default:
            help = entry.metadata["help"].replace("|", r"\|")
            row = [f"`{entry.name}`", _written(entry.default), _values(entry), help]
            groups.setdefault(entry.metadata.get("group", ""), []).append(row)
    tables = []
    for group, rows in groups.items():
        table = markdown_rows([["option", "default", "values", "meaning"], *rows]).replace("---:", "---", 3)
        tables.append(f"**{group[0].upper()}{group[1:]}**\n\n{table}" if group else table)
    return "\n\n".join(tables)


def _written(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`" if value else "–"
    return f"`{str(value).lower() if value is None or isinstance(value, bool) else value}`"


def _values(entry: dataclasses.Field[Any]) -> str:
    """What an option may be, such as `whole number ≥ 1 or none`."""
    kinds = {"int": "whole number", "float": "number", "str": "text", "bool": "`true`, `false`"}
    kind, _, optional = str(entry.type).partition(" | ")
    items, allowed = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", kind), entry.metadata.get("range")
    text = f"{kinds[items[1]]}s" if items else kinds[kind]
    if allowed is not None and allowed.choices:
        text = ", ".join(f"`{choice}`" for choice in allowed.choices)
    elif allowed is not None:
        bounds = str(allowed)
        text += f" {bounds[1:-1]}" if bounds[1] in "≥>" else f" in {bounds}"
    return f"{text} or `none`" if optional else text


def _names(listed: str | None) -> list[str]:
    return [name.strip() for name in listed.split(";")] if listed else []


def _with_rows(results: Mapping[str, Any], rows: Sequence[str]) -> dict[str, Any]:
    """The results with these rows alone; where the first of them is what the others are compared with, also with the
    verdict on those."""
    present = [row[0] for row in results["table"]["rows"]] if "table" in results else list(results["arms"])
    for row in rows:
        require(row in present, "rows", f"be among {'; '.join(present)}", row)
    kept = {key: value for key, value in results.items() if key != "summary"}
    if "table" in results:
        lines = {row[0]: row for row in results["table"]["rows"]}
        return kept | {"table": {**results["table"], "rows": [lines[row] for row in rows]}}
    kept |= {
        "arms": {row: results["arms"][row] for row in rows},
        "differences": {row: results["differences"][row] for row in rows if row in results.get("differences", {})},
    }
    compared = kept["differences"] and rows[0] == next(iter(results["arms"]))
    return kept | ({"summary": summary(kept)} if compared else {})


def _with_costs(rows: Rows, results: Mapping[str, Any], costs: Sequence[str]) -> Rows:
    """A table of intervals with columns of costs behind them."""
    entries = results["arms"]
    header, *lines = rows
    return [
        [*header, *(COSTS[name] for name in costs)],
        *([*line, *(format_number(entries.get(line[0], {}).get(name)) for name in costs)] for line in lines),
    ]


def main(arguments: Sequence[str]) -> int:
    """Render or check the files named on the command line."""
    check = "--check" in arguments
    for name in (argument for argument in arguments if argument != "--check"):
        markdown = Path(name)
        rendered = render_quotes(markdown)
        if check and rendered != markdown.read_text(encoding="utf-8"):
            raise InputError(f"`{name}` must quote its results as they are; render it again")
        if not check:
            markdown.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
