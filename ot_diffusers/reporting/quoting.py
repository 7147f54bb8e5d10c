"""Numbers in README, docs and cards: rendered from `results.json`, never typed.

A Markdown file says where a table belongs by a pair of comments, and everything between them is rendered:

    <!-- results: docs/digits/results.json -->
    <!-- /results -->

    python -m ot_diffusers.reporting.quoting README.md            renders
    python -m ot_diffusers.reporting.quoting --check README.md    fails where a quoted number and its file differ
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, require
from .differences import interval_rows
from .report import captioned, markdown_rows, markdown_table

_BLOCK = re.compile(r"(<!-- results: (?P<path>\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def render_quotes(markdown: Path) -> str:
    """The text of a Markdown file with every quoted table rendered from its file; paths are relative to the Markdown
    file.

    Raises:
        InputError: a file of results that does not exist.
    """

    def render(block: re.Match[str]) -> str:
        file = markdown.parent / block["path"]
        require(file.is_file(), "results", "name an existing file", block["path"])
        return f"{block[1]}\n{quote(json.loads(file.read_text(encoding='utf-8')))}\n\n{block[3]}"

    return _BLOCK.sub(render, markdown.read_text(encoding="utf-8"))


def quote(results: Mapping[str, Any]) -> str:
    """The table of one run; of a comparison means with their intervals; what a command has already made a table of, as
    it stands; each below its summary where it has one."""
    if "table" in results:
        table = markdown_rows([results["table"]["header"], *results["table"]["rows"]])
    elif results.get("differences"):
        rows = interval_rows(results, list(next(iter(results["differences"].values()))))
        table = captioned(markdown_rows(rows), results)
    else:
        table = markdown_table(results)
    return f"{results['summary']}\n\n{table}" if "summary" in results else table


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
