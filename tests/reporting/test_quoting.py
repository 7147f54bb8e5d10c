"""Quoted tables: rendered from their files, and the README's are up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from makers import ROOT

from ot_diffusers.errors import InputError
from ot_diffusers.reporting.differences import differences, summarise, summary
from ot_diffusers.reporting.quoting import main, quote, render_quotes
from ot_diffusers.reporting.report import markdown_table

RESULTS = {
    "title": "t",
    "dataset": "digits",
    "num_samples": 10,
    "extractor": {"name": "e", "feature_dim": 4},
    "arms": {"baseline": {"metrics": {"frechet_distance": 1.25}, "nfe": 50, "seconds": 1.0, "description": "d"}},
    "floor": {"metrics": {"frechet_distance": 0.5}},
    "provenance": {},
}
PAGE = "before\n<!-- results: r.json -->\nold\n<!-- /results -->\nafter\n"


def test_a_block_is_replaced_by_its_table_and_the_rest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    (tmp_path / "page.md").write_text(PAGE)
    main([str(tmp_path / "page.md")])
    table = markdown_table(RESULTS)
    assert "1.25" in table
    assert (tmp_path / "page.md").read_text() == PAGE.replace("old", f"\n{table}\n")
    assert main(["--check", str(tmp_path / "page.md")]) == 0


def test_a_summary_stands_above_its_table() -> None:
    assert quote(RESULTS | {"summary": "Met."}) == f"Met.\n\n{markdown_table(RESULTS)}"


def test_a_changed_number_is_found(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    (tmp_path / "page.md").write_text(PAGE)
    main([str(tmp_path / "page.md")])
    typed = (tmp_path / "page.md").read_text().replace("1.25", "1.20")
    (tmp_path / "page.md").write_text(typed)
    with pytest.raises(InputError, match=r"page\.md.*render it again"):
        main(["--check", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == typed


def test_a_comparison_is_quoted_with_its_verdict_and_intervals() -> None:
    values = {"a": {"frechet_distance": [1.0, 1.2, 1.1, 0.9]}, "b": {"frechet_distance": [0.5, 0.7, 0.6, 0.5]}}
    results = {
        "arms": {arm: summarise(found) for arm, found in values.items()},
        "floor": summarise({"frechet_distance": [0.1, 0.1, 0.2, 0.2]}),
        "differences": differences(values, primary="frechet_distance", family=()),
        "primary_metric": "frechet_distance",
        "seeds": [0, 1, 2, 3],
    }
    quoted = quote(results | {"summary": summary(results)})
    # Means 1.05 and .575: −.475 is −45% of the first.
    assert "b: better (−45.2%)" in quoted
    assert "| a | 1.05 ± 0.21 |" in quoted and "| b | 0.575 ± 0.15 |" in quoted


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(InputError, match=r"r\.json"):
        render_quotes(tmp_path / "page.md")


@pytest.mark.parametrize("page", ["README.md", "docs/launch.md", "docs/benchmarks.md"])
def test_a_page_quotes_its_results_as_they_are(page: str) -> None:
    assert "<!-- results: " in (ROOT / page).read_text(encoding="utf-8")
    assert main(["--check", str(ROOT / page)]) == 0
