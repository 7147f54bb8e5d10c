"""One self-contained HTML file: tables, pictures and style inside, no script and no network."""

from __future__ import annotations

import base64
import json
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import require
from ..files import write_own

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

REPORT = "report"
"""Under this name pages are listed as written, so that `report` may replace them."""

Rows = Sequence[Sequence[str]]
"""A table as text: the header, then the lines, each with its name in front."""


def write_page(path: Path, title: str, sections: Mapping[str, str], *, facts: Sequence[str] = ()) -> Path:
    """Write a page of titled sections.

    Args:
        path: the HTML file.
        title: of the page.
        sections: heading to HTML, such as `paragraphs`, `rows_table`, `picture` and `provenance_list` make it.
        facts: shown below the title, as plain text.
    """
    shown = f"<p class='facts'>{' · '.join(escape(fact) for fact in facts)}</p>"
    body = "\n".join(
        [
            f"<header><h1>{escape(title)}</h1>{shown}</header>",
            *(f"<section><h2>{escape(heading)}</h2>\n{html}\n</section>" for heading, html in sections.items()),
        ]
    )
    page = _PAGE.replace("{{title}}", escape(title)).replace("{{style}}", _STYLE).replace("{{body}}", body)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_own(path, page, REPORT)
    return path


def paragraphs(texts: Sequence[str], kind: str = "note") -> str:
    """Plain text as paragraphs: `"note"` in small print, `"lead"` as the text's own."""
    return "".join(f"<p class='{kind}'>{escape(text)}</p>" for text in texts)


def rows_table(rows: Rows, *, best: Collection[tuple[int, int]] = (), kind: str = "") -> str:
    """A table as it stands, the cells at `best` (line and column from 0, without header and names) marked.

    `kind="wide-names"` lets the names break, `kind="sentences"` the cells.
    """
    header, *lines = rows
    body = []
    for r, (name, *row) in enumerate(lines):
        cells = "".join(
            f"<td{' class=best' if (r, c) in best else ''}>{escape(cell)}</td>" for c, cell in enumerate(row)
        )
        body.append(f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>")
    return table(header, body, kind)


def table(header: Sequence[str], lines: Sequence[str], kind: str = "") -> str:
    """A table of finished lines that scrolls by itself where the page is narrow."""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    rows = "\n".join(lines)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def picture(caption: str, path: Path) -> str:
    """A PNG file inside the page.

    Raises:
        InputError: no such file.
    """
    require(path.is_file(), "pictures", "be existing files", str(path))
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"<figure><img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'></figure>"


def definitions(entries: Mapping[str, Any]) -> str:
    """Names with what belongs to them, as plain text."""
    items = "\n".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
    return f"<dl>{items}</dl>"


def provenance_list(provenance: Mapping[str, Any]) -> str:
    """Where the numbers come from; what is a mapping folds."""
    entries = dict(provenance)
    packages = entries.pop("packages", None)
    config = {name: value for name, value in entries.items() if isinstance(value, Mapping)}
    plain = {
        name: "not in a checkout" if value is None else value for name, value in entries.items() if name not in config
    }
    if packages:
        plain["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    details = "".join(
        f"<details><summary>{escape(name)}</summary>"
        f"<pre>{escape(json.dumps(value, indent=2, default=str))}</pre></details>"
        for name, value in config.items()
    )
    return definitions(plain) + details


def provenance() -> dict[str, Any]:
    """Versions, platform and commit of this process; neither host name nor paths."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


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
        subprocess.run([*git, "ls-files", "--error-unmatch", "page.py"], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")


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
.sentences td { white-space: normal; }
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
