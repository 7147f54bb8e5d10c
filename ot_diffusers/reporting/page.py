"""One HTML file that contains its tables, pictures and style: no script and no network access."""

from __future__ import annotations

import base64
import json
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
"""Pages are recorded under this name, so that `report` may replace its own pages and nothing else."""

Rows = Sequence[Sequence[str]]
"""A table as text: the header, then the lines, each with its name in front."""

Step = Sequence[str]
"""What a reader may do next: a sentence and a command line."""


@dataclass(frozen=True)
class Picture:
    """A PNG file and what a reader must know to read it."""

    path: Path
    caption: str


def write_page(path: Path, title: str, sections: Mapping[str, str], *, facts: Sequence[str] = ()) -> Path:
    """Write a page of titled sections.

    Args:
        path: the HTML file.
        title: title of the page.
        sections: heading to HTML, as `paragraphs`, `rows_table`, `figure` and `provenance_list` make it.
        facts: plain text shown below the title.
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
    """Plain text as paragraphs: `"note"` in small print, `"lead"` in the size of the page."""
    return "".join(f"<p class='{kind}'>{escape(text)}</p>" for text in texts)


def rows_table(rows: Rows, *, best: Collection[tuple[int, int]] = (), kind: str = "") -> str:
    """A table of plain text, with the cells at `best` marked (line and column from 0, without header and names).

    With `kind="sentences"`, the text of cells may wrap.
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
    """A table of HTML lines, which scrolls sideways where the page is narrow while its first column stays in place."""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    rows = "\n".join(lines)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def figure(picture: Picture, title: str) -> str:
    """A PNG file inside the page, above its caption.

    Raises:
        InputError: no such file.
    """
    require(picture.path.is_file(), "pictures", "be existing files", str(picture.path))
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    image = f"<img alt='{escape(title, quote=True)}' src='data:image/png;base64,{data}'>"
    return f"<figure><div class='picture'>{image}</div><figcaption>{escape(picture.caption)}</figcaption></figure>"


def links(targets: Mapping[str, str]) -> str:
    """Links to other pages, by name; the addresses are relative to this page."""
    items = (f"<a href='{escape(target, quote=True)}'>{escape(name)}</a>" for name, target in targets.items())
    return f"<p>{' · '.join(items)}</p>"


def next_steps(steps: Sequence[Step]) -> str:
    """What a reader may do next, each sentence above its command."""
    return "".join(f"<p class='step'>{escape(text)}</p><pre>{escape(command)}</pre>" for text, command in steps)


def definitions(entries: Mapping[str, Any]) -> str:
    """Names and their values as a list of definitions, in plain text."""
    items = "\n".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
    return f"<dl>{items}</dl>"


def provenance_list(provenance: Mapping[str, Any]) -> str:
    """Where the numbers come from; configurations are folded."""
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
    """Versions, platform and commit of this process, without host name and paths."""
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
:root { --shade: rgb(31 41 55 / 28%); --link: #2457a6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181d; --card: #1c2229; --ink: #e5e9ee; --soft: #9aa5b3; --line: #303843; --best: #4fd1a5; }
  :root { --shade: rgb(0 0 0 / 70%); --link: #8ab4f0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 14px; }
a { color: var(--link); }
.facts { color: var(--soft); margin: 0 0 28px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; }
section { margin: 0 0 18px; }
.lead { margin: 0 0 14px; }
.note { color: var(--soft); font-size: 0.85rem; margin: 12px 0 0; max-width: 110ch; }
.scroll, .picture, pre { overflow-x: auto; scrollbar-width: thin; scrollbar-color: var(--soft) transparent; }
.scroll { background: linear-gradient(to left, var(--card) 24px, transparent) right / 60px 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 0 8px 16px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--card); z-index: 1; }
thead th { color: var(--soft); font-weight: 500; font-size: 0.85rem; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; white-space: normal; min-width: 8.5rem; max-width: 17rem; padding-right: 8px; }
tbody tr:last-child > * { border-bottom: 0; }
.sentences td { white-space: normal; }
small { display: block; color: var(--soft); font-weight: 400; font-size: 0.8rem; line-height: 1.35; }
.best { color: var(--best); font-weight: 700; }
.floor, tr.floor th { color: var(--soft); font-weight: 400; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin: 0 9px 0 1px; }
.dot { box-shadow: 0 0 0 1px var(--soft); }
figure { margin: 0; }
.picture { background: #fff; border-radius: 6px; padding: 6px; }
figcaption { color: var(--soft); font-size: 0.9rem; margin: 10px 0 0; max-width: 90ch; }
img { display: block; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; margin: 0; font-size: 0.9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 10px; font-size: 0.9rem; }
summary { cursor: pointer; color: var(--soft); }
pre { font-size: 0.85rem; margin: 4px 0 0; padding: 8px 12px; border: 1px solid var(--line); border-radius: 6px; }
.step { margin: 14px 0 0; }
.step:first-of-type { margin-top: 0; }
@media (max-width: 600px) {
  main { padding: 24px 12px 40px; }
  section { padding: 16px; }
  img { min-width: 720px; }
  figcaption::before { content: "Scroll the picture sideways to see all of it. "; }
  th, td { padding-left: 12px; }
  tbody th { min-width: 7.5rem; max-width: 9rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 10px; }
}
"""
