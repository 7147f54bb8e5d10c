"""The stress tests end to end on real digits: what each metric must see, and what a second call keeps."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ot_diffusers import cli
from ot_diffusers.errors import InputError
from ot_diffusers.evaluation.stress import StressCurve
from ot_diffusers.reporting import plots
from ot_diffusers.studies.stress import AMOUNTS, as_curve, cell, run_stress_study

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Fréchet distance from")]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stress") / "digits"


@pytest.fixture(scope="module")
def results(evaluator: str, output: Path) -> dict[str, Any]:
    return run_stress_study("digits", evaluator, output, num_samples=50, log=lambda line: None)


def test_what_the_metrics_must_see(results: dict[str, Any]) -> None:
    """Random features are enough for these: distances grow with noise, copies of training images are found, and lost
    classes are lost recall."""
    curves = {damage: {name: as_curve(found) for name, found in by.items()} for damage, by in results["curves"].items()}
    assert list(curves) == list(AMOUNTS)
    assert curves["noise"]["patch_sliced_wasserstein"].verdict == "monotone"
    assert curves["noise"]["speckle_share"].means[-1] > curves["noise"]["speckle_share"].means[0]
    for damage in ("missing classes", "mode collapse"):
        assert curves[damage]["recall_distance"].means[-1] > 1.5 * curves[damage]["recall_distance"].means[0]
    copied = curves["memorisation"]["nearest_distance_ratio"]
    assert copied.means[-1] == 0 and copied.verdict == "monotone"
    for by_metric in curves.values():  # undamaged images are the same in every test
        assert by_metric["frechet_distance"].means[0] == curves["noise"]["frechet_distance"].means[0]


def test_the_figures_of_the_original_study_rise(results: dict[str, Any], output: Path) -> None:
    for name, found in results["source figures"].items():
        for curve in map(as_curve, found.values()):
            assert curve.means[-1] > 2 * curve.means[0]
        assert Image.open(output / f"source_{name.replace(' ', '_')}.png").size[0] > 1000
    assert as_curve(results["source figures"]["missing classes"]["sinkhorn_distance"]).amounts == tuple(range(10))


def test_tables_and_pictures(results: dict[str, Any], output: Path) -> None:
    table = (output / "stress.md").read_text("utf-8")
    assert "| Fréchet | rises: " in table and "| Sinkhorn OT distance | rises: " in table
    assert json.loads((output / "stress.json").read_text("utf-8")) == results
    assert len(list(output.glob("*.png"))) == 6
    report = (output / "report.html").read_text("utf-8")
    for file in output.glob("*.png"):
        picture = base64.b64encode(file.read_bytes()).decode()
        assert picture in report
        report = report.replace(picture, "")
    assert "//" not in report and "These metrics do not respond to memorisation: " in report
    # Steady verdicts are marked, the others are not.
    assert re.findall(r"<td class=best>(\w+)", report) == re.findall(r"<td(?: class=best)?>(rises|falls)", report)


def test_second_call_keeps_what_is_there(results: dict[str, Any], evaluator: str, output: Path) -> None:
    record = json.loads((output / "stress.json").read_text("utf-8"))
    del record["source figures"]["noise"]
    (output / "stress.json").write_text(json.dumps(record))
    lines: list[str] = []
    again = run_stress_study("digits", evaluator, output, num_samples=50, log=lines.append)
    assert lines[0] == "original study's figures, noise: done" and len(lines) == 2
    assert again["curves"] == results["curves"] and again["source figures"] == results["source figures"]
    with pytest.raises(InputError, match=r"`output` must be a new folder, or one made with {'repeats': 4}"):
        run_stress_study("digits", evaluator, output, num_samples=50, repeats=4)


def test_command_line_refuses_what_cannot_be_tested(evaluator: str, tmp_path: Path, capfd: Any) -> None:
    command = ["stress", "--dataset", "digits", "--evaluator", evaluator, "--output", str(tmp_path / "new")]
    for option, message in (("--repeats", "`repeats` must be at least 3"), ("--num-samples", "`num_samples` must be")):
        assert cli.main([*command, option, "1"]) == 2
        assert message in capfd.readouterr().err
    # A class without images could be "removed" without any damage.
    assert cli.main([*command, "--num-samples", "5"]) == 2
    assert "`num_samples` must be enough to draw every class, also [" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_cells_say_direction_and_ends() -> None:
    curves = {"rises: 1.00 → 3.00": (1.0, 1.0, 3.0), "falls: 3.00 → 1.00": (3.0, 2.0, 1.0)}
    curves |= {"not monotone: 1.00 → 2.00": (1.0, 3.0, 2.0), "flat: 1.00 → 1.00": (1.0, 1.0, 1.0)}
    for expected, means in curves.items():
        curve = StressCurve((0, 1, 2), tuple((mean, mean) for mean in means))
        values = {"amounts": curve.amounts, "values": curve.values, "verdict": curve.verdict}
        assert cell(values) == expected
    assert cell(None) == "–"
    with pytest.raises(InputError, match="`curves` must hold at least one metric"):
        plots.stress_curves({}, Path("none.png"), xlabel="")


def test_draws_that_overlap_are_flat() -> None:
    """Differences to the first amount of +.1 and −.1: their interval holds 0, whatever the means do."""
    assert StressCurve((0, 1), ((1.0, 1.0), (1.1, 0.9))).verdict == "flat"
    assert StressCurve((0, 1), ((1.0, 1.0), (1.11, 1.1))).verdict == "monotone"
