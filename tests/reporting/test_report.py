"""Tables, plots and the report from a small, complete `results.json`."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ot_diffusers.errors import InputError
from ot_diffusers.evaluation.evaluate import ImageSet
from ot_diffusers.evaluation.failures import worst_samples
from ot_diffusers.reporting import page, plots, report
from ot_diffusers.reporting.differences import difference_rows, interval_rows, summary
from ot_diffusers.reporting.quoting import quote
from ot_diffusers.studies import pictures


@pytest.fixture
def results() -> dict[str, Any]:
    def arm(frechet: float, precision: float, rank: float) -> dict[str, Any]:
        metrics = {"frechet_distance": frechet, "precision": precision, "effective_rank": rank}
        return {"metrics": metrics, "nfe": 50, "seconds": 1.5, "description": "A <b> & c"}

    return {
        "title": "Digits & <friends>",
        "dataset": "digits",
        "extractor": {"name": "evaluator", "feature_dim": 128, "test_accuracy": 0.987},
        "num_samples": 1000,
        "arms": {
            "baseline": arm(0.0062, 0.8, 30.0),
            "OT-trained": arm(0.00591, 0.9, 45.0),
            "mine": arm(0.0015, 0.7, 39.0),
        },
        "floor": {"metrics": {"frechet_distance": 0.0007, "precision": 0.95, "effective_rank": 40.0}},
        "provenance": {"commit": None, "packages": {"torch": "2.14"}, "config": {"blur": 0.2}},
    }


class TestNumbers:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0012, "0.00120"),
            (0.99951, "1.00"),
            (12.345, "12.3"),
            (123.4, "123"),
            (12345.6, "12,346"),
            (99809, "99,809"),
            (1.234e7, "1.23e+07"),
            (-0.5, "-0.500"),
            (0.0, "0.00"),
            (50, "50"),
            (None, "–"),
        ],
    )
    def test_three_significant_digits(self, value: float | None, text: str) -> None:
        assert report.format_number(value) == text

    def test_best_follows_the_direction(self, results: dict[str, Any]) -> None:
        assert report.best_arms(results, "frechet_distance") == {"mine"}
        assert report.best_arms(results, "precision") == {"OT-trained"}
        assert report.best_arms(results, "effective_rank") == {"mine"}  # 39 is nearest to the floor's 40

    def test_an_estimate_below_zero_is_not_the_best(self, results: dict[str, Any]) -> None:
        for arm, value in {"baseline": 0.02, "OT-trained": -0.01, "mine": -0.3}.items():
            results["arms"][arm]["metrics"]["kernel_distance"] = value
        assert report.best_arms(results, "kernel_distance") == set()
        for arm in ("OT-trained", "mine"):
            results["arms"][arm]["metrics"]["kernel_distance"] *= -1
        assert report.best_arms(results, "kernel_distance") == {"OT-trained"}

    def test_values_that_print_alike_tie(self, results: dict[str, Any]) -> None:
        results["arms"]["baseline"]["metrics"]["frechet_distance"] = 0.0015001
        assert report.best_arms(results, "frechet_distance") == {"mine", "baseline"}

    def test_nothing_is_best_alone_or_without_its_floor(self, results: dict[str, Any]) -> None:
        del results["floor"]
        assert report.best_arms(results, "effective_rank") == set()
        results["arms"] = {"mine": results["arms"]["mine"]}
        assert report.best_arms(results, "frechet_distance") == set()


class TestTables:
    def test_markdown(self, results: dict[str, Any]) -> None:
        lines = report.markdown_table(results, ["frechet_distance", "precision"]).splitlines()
        assert lines == [
            "|  | Fréchet\N{NO-BREAK SPACE}↓ | Precision\N{NO-BREAK SPACE}↑ | NFE | seconds |",
            "| --- | ---: | ---: | ---: | ---: |",
            "| baseline | 0.00620 | 0.800 | 50 | 1.50 |",
            "| OT-trained | 0.00591 | **0.900** | 50 | 1.50 |",
            "| mine | **0.00150** | 0.700 | 50 | 1.50 |",
            "| real vs real | 0.000700 | 0.950 | – | – |",
        ]

    def test_text_columns_line_up(self, results: dict[str, Any]) -> None:
        lines = report.text_table(results).splitlines()
        ends = [[match.end() for match in re.finditer(r"\d\b(?=[* ]|$)", line)] for line in lines[2:5]]
        assert ends[0] == ends[1] == ends[2]
        assert "0.00150*" in lines[4]

    def test_refuses_results_without_arms(self) -> None:
        with pytest.raises(InputError, match="`results` must hold at least one method"):
            report.text_table({"title": "x"})


class Links(HTMLParser):
    """Collects what a page would load, and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestReport:
    def test_is_self_contained_escaped_and_complete(self, results: dict[str, Any], tmp_path: Path) -> None:
        scores = plots.scores(results, ["frechet_distance"], tmp_path / "scores.png")
        results |= {
            "links": {"Priors": "truncation/report.html"},
            "next": [("Sample & look:", "ot-diffusers sample .")],
        }
        drawn = {"Scores & more": page.Picture(scores, "Lower is <better>.")}
        text = report.write_report(results, drawn, tmp_path / "new" / "report.html").read_text("utf-8")
        links = Links()
        links.feed(text)
        assert links.open == []
        assert [target[:22] for target in links.targets] == ["truncation/report.html", "data:image/png;base64,"]
        assert "<friends>" not in text and "Digits &amp; &lt;friends&gt;" in text and "A &lt;b&gt; &amp; c" in text
        assert "url(" not in text and "<script" not in text and str(tmp_path) not in text
        for part in ("0.000700", "1,000 samples", "98.7% test accuracy", "−76%", "torch 2.14", "not in a checkout"):
            assert part in text, part
        assert "Lower is &lt;better&gt;." in text and "Sample &amp; look:" in text
        assert "A guided method can score below it" in text  # the real-vs-real score is explained where it stands

    def test_metrics_it_does_not_know_are_shown(self, results: dict[str, Any], tmp_path: Path) -> None:
        results["arms"]["mine"]["metrics"]["my_metric"] = 3.14159
        page = report.write_report(results, {}, tmp_path / "report.html").read_text("utf-8")
        assert "my metric" in page and "3.14" in page

    def test_missing_picture(self, results: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="`pictures` must be existing files"):
            report.write_report(results, {"x": page.Picture(tmp_path / "none.png", "")}, tmp_path / "report.html")
        assert not (tmp_path / "report.html").exists()

    def test_provenance_is_json_without_host_or_paths(self) -> None:
        import platform

        found = json.dumps(page.provenance())
        assert {"commit", "python", "platform", "packages"} == set(json.loads(found))
        assert platform.node() not in found and str(Path.home()) not in found and str(Path.cwd()) not in found


class TestPlots:
    HISTORY = tuple({"epoch": epoch, "loss": 1 / (epoch + 1), "mse": 0.5} for epoch in range(4))

    def test_epochs_are_averaged_and_missing_keys_skipped(self) -> None:
        records: list[dict[str, float]] = [
            {"epoch": 1, "loss": 2.0},
            {"epoch": 0, "loss": 1.0},
            {"epoch": 1, "loss": 4.0},
            {"epoch": 2},
        ]
        assert plots._by_epoch(records, "loss") == [(0, 1.0), (1, 3.0)]
        assert plots._by_epoch([{"step": 7, "ot": 0.5}], "ot") == [(7, 0.5)]

    def test_only_what_was_measured_gets_a_panel(self, tmp_path: Path) -> None:
        plots.loss_curves({"baseline": self.HISTORY}, tmp_path / "two.png")
        with_ot = [record | {"ot": 0.1, "validation_loss": 0.3} for record in self.HISTORY]
        plots.loss_curves({"baseline": self.HISTORY, "OT-trained": with_ot}, tmp_path / "four.png")
        two, four = (Image.open(tmp_path / name).size for name in ("two.png", "four.png"))
        assert two[0] == pytest.approx(four[0], rel=0.02) and two[1] < 0.7 * four[1]  # one row of panels against two
        with pytest.raises(InputError, match="`histories` must hold one of loss, mse, ot, validation_loss"):
            plots.loss_curves({"baseline": [{"epoch": 1}]}, tmp_path / "none.png")

    def test_history_of_a_killed_run(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"epoch": 0, "loss": 1.0}\n{"epoch": 1, "lo')
        assert plots.read_history(path) == [{"epoch": 0, "loss": 1.0}]

    def test_colours_stay_with_their_arm(self) -> None:
        assert plots.arm_colours(["ot_guided"])["ot_guided"] == plots.COLOURS["OT-guided"]
        colours = plots.arm_colours(["x", "baseline", "y"])
        assert colours["baseline"] == plots.COLOURS["baseline"] and len(set(colours.values())) == 3

    def test_small_images_are_enlarged_smoothly(self) -> None:
        """Two 8×8 images, each pixel 12×12 large, gap 8: one colour stays one colour, an edge becomes a ramp."""
        images = torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 255)]).to(torch.uint8)
        mosaic = plots._mosaic(images, 1, 2)
        assert mosaic.shape == (96, 200, 1)
        assert (mosaic[:, :96] == 0).all() and (mosaic[:, 96:] == 255).all()
        images[0, :, :, 4:] = 255
        row = plots._mosaic(images[:1], 1, 1)[48, :, 0].int()
        assert (row.diff() >= 0).all() and len(row.unique()) > 8  # blocks would have two grey levels
        large = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        assert torch.equal(plots._mosaic(large, 1, 1).permute(2, 0, 1), large[0])

    def test_guided_variants_share_a_colour_and_others_have_their_own(self) -> None:
        colours = plots.arm_colours(["VAE", "plain", "VAE, guided, T' = 9"])
        assert colours["VAE"] == colours["VAE, guided, T' = 9"] != colours["plain"]

    def test_panels_of_colour_and_scatter_are_written(self, tmp_path: Path) -> None:
        images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
        images[:, 0] = 255
        picture = np.asarray(Image.open(plots.image_panels({"real": images}, tmp_path / "p.png", 2, 2)).convert("RGB"))
        assert (picture == (255, 0, 0)).all(axis=2).mean() > 0.4  # three red images of four places
        table = {"plain": {"1 step": images, "2 steps": images}, "guided": {"2 steps": images}}
        picture = np.asarray(Image.open(plots.image_table(table, tmp_path / "t.png", 1, 3)).convert("RGB"))
        red = (picture == (255, 0, 0)).all(axis=2)
        assert red[:, red.shape[1] // 2 :].mean() > 1.5 * red[:, : red.shape[1] // 2].mean()  # one cell is empty
        features = {"real": torch.randn(20, 5), "baseline": torch.randn(30, 5)}
        assert Image.open(plots.scatter(features, tmp_path / "s.png")).size[0] > 300

    def test_refusals(self, results: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="`panels` must hold uint8"):
            plots.image_panels({"real": torch.zeros(2, 1, 8, 8)}, tmp_path / "x.png")
        with pytest.raises(InputError, match="`metric` must be a metric of at least one method, got 'fid'"):
            plots.scores(results, ["fid"], tmp_path / "x.png")


class TestComparisons:
    """What a comparison over seeds adds to the results: intervals, differences, further tables."""

    @pytest.fixture
    def compared(self, results: dict[str, Any]) -> dict[str, Any]:
        for entry in results["arms"].values():
            mean = entry["metrics"]["frechet_distance"]
            entry["intervals"] = {"frechet_distance": {"low": mean - 0.001, "high": mean + 0.001}}
        found = {"mean": -0.0047, "low": -0.006, "high": -0.0034, "p_holm": 0.001, "shown": True}
        none = {"mean": -0.0003, "low": -0.002, "high": 0.0014, "p_holm": 0.7, "shown": False}
        results["differences"] = {"OT-trained": {"frechet_distance": none}, "mine": {"frechet_distance": found}}
        per_seed = {arm: {"frechet_distance": [0.001, 0.002, 0.004]} for arm in (*results["arms"], "real vs real")}
        changes = {"seeds": [0, 1, 2], "primary_metric": "frechet_distance", "headline": ["frechet_distance"]}
        return results | changes | {"per_seed": per_seed}

    def test_summary_and_rows(self, compared: dict[str, Any]) -> None:
        verdicts = "OT-trained: the difference is not significant (−4.8%); mine: better (−75.8%)"
        assert summary(compared) == f"Fréchet distance compared with baseline over 3 paired random seeds. {verdicts}."
        compared["differences"]["OT-trained"]["frechet_distance"] |= {"low": -0.01, "high": 0.01}
        assert "OT-trained: inconclusive (3 seeds, wide interval); mine" in summary(compared)
        header, row = difference_rows(compared, "mine")
        assert header[1:3] == ["verdict", "difference"]
        assert row[:4] == ["Fréchet (primary)", "better", "−0.00470", "−0.00600 … −0.00340"]
        assert interval_rows(compared, ["frechet_distance"])[1:3] == [
            ["baseline", "0.00620 ± 0.001"],
            ["OT-trained", "0.00591 ± 0.001"],
        ]

    def test_a_doubtful_evaluator_gives_no_verdict(self, compared: dict[str, Any], tmp_path: Path) -> None:
        compared["extractor"] |= {"effective_rank": 1.19, "has_classifier": True, "test_accuracy": 0.6, "chance": 0.34}
        caption = (
            "Evaluated by evaluator: 128 features, effective rank 1.2 on real images, 60.0% test accuracy. No verdict "
            "should rest on it: its features of real images have an effective rank of 1.2, below 5"
        )
        reason = "there is no verdict, because the evaluator cannot be trusted: its features"
        assert f"over 3 paired random seeds: {reason}" in summary(compared)
        assert difference_rows(compared, "mine")[1][1] == "withheld"
        assert report.best_arms(compared, "precision") == set()
        tables = {"Against baseline": difference_rows(compared, "mine")}
        page = report.write_report(compared, {}, tmp_path / "report.html", tables=tables).read_text("utf-8")
        single = {name: value for name, value in compared.items() if name != "differences"}
        texts = [report.text_table(compared), report.markdown_table(compared), quote(compared), quote(single)]
        assert caption in page and "class=best" not in page and "−76%" not in page
        for text in texts:
            assert text.startswith(caption) and "*" not in text

    def test_report_shows_tables_notes_and_the_summary(self, compared: dict[str, Any], tmp_path: Path) -> None:
        compared |= {"summary": "Nothing <new>.", "notes": ["Read with care."]}
        page = report.write_report(
            compared, {}, tmp_path / "report.html", tables={"Against baseline": difference_rows(compared, "mine")}
        ).read_text("utf-8")
        for text in ("Nothing &lt;new&gt;.", "Read with care.", "Against baseline", "means over 3 random seeds"):
            assert text in page, text
        assert "−76%" not in page and "one random seed" not in page

    def test_ratios_of_paired_seeds(self) -> None:
        """Half of every value has the log ratio −log 2 without an interval; e^±1 has the mean 0 and an interval."""
        assert plots._log_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx([-math.log(2)] * 3)
        mean, low, high = plots._log_ratio([math.e, 1 / math.e], [1.0, 1.0])
        assert mean == pytest.approx(0) and low < -1 and high > 1

    def test_pictures_of_recorded_numbers(self, compared: dict[str, Any], tmp_path: Path) -> None:
        file = tmp_path / "recorded.json"
        file.write_text(json.dumps(compared))
        for name in ("scores", "differences"):
            assert pictures.main([str(file), name, str(tmp_path / f"{name}.png")]) == 0
            assert Image.open(tmp_path / f"{name}.png").size[0] > 1000
        with pytest.raises(InputError, match="`picture` must be one of scores, differences, got 'curves'"):
            pictures.main([str(file), "curves", str(tmp_path / "none.png")])
        with pytest.raises(InputError, match="`results` must hold differences"):
            plots.differences(compared | {"differences": {}}, ["frechet_distance"], tmp_path / "none.png")

    def test_a_report_takes_the_pictures_beside_its_results(self, compared: dict[str, Any], tmp_path: Path) -> None:
        drawn = plots.image_panels({"real": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, tmp_path / "one_samples.png")
        (tmp_path / "scratch").mkdir()
        for name, taken in (("one", True), ("two", False)):
            beside = pictures.pictures_beside(compared, tmp_path / f"{name}.json", tmp_path / "scratch")
            assert ("Samples" in beside) == taken and "Comparison with baseline" in beside
            assert not taken or beside["Samples"].path == drawn


class TestFailures:
    def test_worst_first_with_the_nearest_real_image_beside(self, tmp_path: Path) -> None:
        """On a line, real images at 0, 10, 20 and samples at 1, 14, 26, 9: distances 1, 4, 6, 1."""
        real, made = torch.tensor([[0.0], [10.0], [20.0]]), torch.tensor([[1.0], [14.0], [26.0], [9.0]])
        sets = [
            ImageSet(x.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), x, None)
            for x in (made, real)
        ]
        worst, nearest = worst_samples(*sets, 2)
        assert worst[:, 0, 0, 0].tolist() == [26, 14] and nearest[:, 0, 0, 0].tolist() == [20, 10]
        gallery = plots.failure_gallery({"baseline": (worst, nearest)}, tmp_path / "failures.png")
        assert Image.open(gallery).size[0] > 1000
        with pytest.raises(InputError, match="`count` must lie in 1 … 4, got 5"):
            worst_samples(*sets, 5)
