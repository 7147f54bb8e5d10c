"""Quoted tables: rendered from their files, and the README's are up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from makers import ROOT

from ot_diffusers.config import BaselineConfig, DiffusionConfig, FeaturesConfig
from ot_diffusers.errors import InputError
from ot_diffusers.reporting.differences import differences, summarise, summary
from ot_diffusers.reporting.quoting import main, markdown_options, quote, quote_curves, render_quotes
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


def test_curves_are_quoted_with_the_differences_that_are_significant(tmp_path: Path) -> None:
    values = {"a": {"frechet_distance": [1.0, 1.2, 1.1, 0.9]}, "b": {"frechet_distance": [0.5, 0.7, 0.6, 0.5]}}
    found = differences(values, primary="frechet_distance", family=())["b"]

    def point(name: str) -> dict[str, Any]:
        summarised = summarise(values[name])
        return summarised["metrics"] | {"intervals": summarised["intervals"]}

    curves = {"a": {"1": point("a"), "8": point("a")}, "b": {"8": point("b") | {"differences": found}}}
    results = RESULTS | {"primary_metric": "frechet_distance", "quality_by_steps": curves}
    (tmp_path / "r.json").write_text(json.dumps(results))
    (tmp_path / "page.md").write_text(PAGE.replace("r.json -->", "r.json | by: quality_by_steps | rows: a; b -->"))
    main([str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "| steps = | 1 | 8 |" in page and "| a | 1.05 ± 0.21 | 1.05 ± 0.21 |" in page
    assert "| b | – | 0.575 ± 0.15 (−45.2%) |" in page.replace("**", "")
    with pytest.raises(InputError, match="`by` must name curves of the results, got 'curves'"):
        quote_curves(results, "curves", [], [])
    with pytest.raises(InputError, match=r"`rows` must be among a, b, got \['c'\]"):
        quote_curves(results, "quality_by_steps", ["c"], [])


def test_some_rows_are_quoted_with_the_verdict_on_them_alone(tmp_path: Path) -> None:
    values = {
        name: {"frechet_distance": [shift, shift + 0.1, shift]} for name, shift in (("a", 1.0), ("b", 3.0), ("c", 2.0))
    }
    results = {
        "arms": {arm: summarise(found) | {"nfe": 50} for arm, found in values.items()},
        "floor": summarise({"frechet_distance": [0.1, 0.1, 0.2]}),
        "differences": differences(values, primary="frechet_distance", family=()),
        "primary_metric": "frechet_distance",
        "seeds": [0, 1, 2],
    }
    (tmp_path / "r.json").write_text(json.dumps(results | {"summary": summary(results)}))
    page = PAGE.replace("r.json", "r.json | rows: a; c | columns: frechet_distance; nfe")
    (tmp_path / "page.md").write_text(page)
    rendered = render_quotes(tmp_path / "page.md")
    assert "c: worse" in rendered and "b: worse" not in rendered and "| b |" not in rendered
    assert "| c | 2.03 ± 0.14 | 50 |" in rendered and rendered.count("\n| ") == 5  # header, ruler, a, c, real vs real
    (tmp_path / "page.md").write_text(page.replace("a; c", "a; d"))
    with pytest.raises(InputError, match="`rows` must be among a; b; c"):
        render_quotes(tmp_path / "page.md")


def test_rows_of_a_table_are_quoted_as_they_stand() -> None:
    results = {"table": {"header": ["figure", "median"], "rows": [["one", "1×"], ["two", "2×"]]}}
    assert quote(results, ["two"]).splitlines()[2:] == ["| two | 2× |"]


def test_the_columns_of_one_run_are_chosen() -> None:
    assert quote(RESULTS, columns=["frechet_distance"]).splitlines()[0].count("|") == 3


def test_a_configuration_is_a_table_of_what_it_adds_or_changes() -> None:
    rows = markdown_options(FeaturesConfig)
    assert "| `num_train_epochs` | `10` | whole number ≥ 1 |" in rows  # 35 elsewhere
    assert "| `block_out_channels` | `32,64` | whole numbers |" in rows
    assert "| `label_smoothing` | `0.0` | number in [0, 1) |" in rows and "train_batch_size" not in rows
    assert "| `max_timestep` | `none` | whole number ≥ 1 or `none` |" in markdown_options(DiffusionConfig)
    assert "`linear`, `scaled_linear`" in markdown_options(BaselineConfig)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(InputError, match=r"r\.json"):
        render_quotes(tmp_path / "page.md")


@pytest.mark.parametrize("page", ["README.md", "docs/launch.md", "docs/benchmarks.md", "docs/configuration.md"])
def test_a_page_quotes_its_results_as_they_are(page: str) -> None:
    assert re.search("<!-- (results|options): ", (ROOT / page).read_text(encoding="utf-8"))
    assert main(["--check", str(ROOT / page)]) == 0
