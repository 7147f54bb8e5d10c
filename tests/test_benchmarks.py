"""The benchmark's arithmetic and its yardstick; no test depends on time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import scaling, solver, timing

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def test_ratios_are_taken_repeat_by_repeat() -> None:
    row = timing.ratio_row("r", {"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b", target=2.0)
    assert (row.value, row.spread, row.seconds) == (2.0, (1.0, 3.0), {"a": 4.0, "b": 3.0})
    assert row.reached and not timing.ratio_row("r", {"a": [3.0], "b": [1.0]}, "a", "b", target=2.0).reached
    assert timing.Row("r", 6.0, (6.0, 6.0), target=5.0, at_least=True).reached
    assert timing.Row("r", 6.0, (6.0, 6.0)).reached is None


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    seconds = timing.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert calls == ["a", "b"] * 3  # the first round does not count
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("blur", [0.3, 0.05])
def test_the_yardstick_agrees_with_ours_and_with_converged_peers(blur: float) -> None:
    """Plain Sinkhorn in float64 is the yardstick; ours solves the problem in float32, so 1 − cos is its rounding."""
    x, y = solver.clouds(20, 40, 6, CPU)
    exact = solver.exact_gradient(x, y, blur, rounds=20_000)
    assert solver.cosine(solver.ours(x, y, blur), exact) > 1 - 1e-6
    if blur == 0.3:  # at the other one geomloss stays below at any scaling
        assert solver.cosine(solver.geomloss_gradient(x, y, blur, 0.99), exact) > 0.999


def test_peers_that_take_too_long_or_are_wrong_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = solver.clouds(5, 6, 2, CPU)
    exact = solver.exact_gradient(x, y, 0.3)

    def endless(*_: object) -> torch.Tensor:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(solver, "PEER_SECONDS", 1)
    assert solver.first_good_setting("geomloss", endless, x, y, 0.3, exact) == (None, "no setting in 1 s")
    wrong = solver.first_good_setting("geomloss", lambda *_: -exact, x, y, 0.3, exact)
    assert wrong == (None, "no setting reaches 0.999")
    assert solver.first_good_setting("geomloss", lambda *_: exact, x, y, 0.3, exact) == (0.5, "")


def test_a_power_law_has_its_exponent() -> None:
    assert solver.slope([0.0, 1.0, 2.0], [1.0, 2.5, 4.0]) == pytest.approx(1.5, rel=1e-12)


def test_rows_are_written_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Part:
        @staticmethod
        def rows(quick: bool, device: torch.device) -> Iterator[timing.Row]:
            yield timing.Row("fixed", 2.0 if quick else 3.0, (1.0, 4.0), target=2.5)

    monkeypatch.setattr(command, "PARTS", {"one": Part, "two": Part})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--only", "one", "--output", str(tmp_path / "r.json")])
    assert command.main() == 0
    sys.argv[3] = "two"
    assert command.main() == 0
    written = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert {name: rows[0]["reached"] for name, rows in written["parts"].items()} == {"one": True, "two": True}
    assert written["table"]["rows"] == [["fixed", "**2.00×**", "1.00 … 4.00", "≤ 2.5"]] * 2

    # What is there from this commit is not measured again.
    capsys.readouterr()
    sys.argv[2:4] = ["--resume", "--only", "one", "two"]
    assert command.main() == 0 and capsys.readouterr().out == ""
    written["provenance"]["commit"] = "another"
    (tmp_path / "r.json").write_text(json.dumps(written), "utf-8")
    assert command.main() == 0 and capsys.readouterr().out.count("fixed: 2.00") == 2


def results_with(**values: object) -> dict[str, object]:
    return {"parts": {"one": [{"name": name, **row} for name, row in values.items()]}}  # type: ignore[dict-item]


def test_the_estimate_follows_from_its_constants() -> None:
    """A term of 10 ms that grows with N alone: 8 times as long at most for a batch of 1,024 in place of 128; at least
    the same and 10 passes of 4·1,024·10,000 bytes at 2 TB/s, .2 ms."""
    found = scaling.case(1024, 10_000, 0.01, {"N": 1.0, "M": 0.0, "D": 0.0}, passes=10)
    assert found["plain step"] == "192 ms"  # 3·200e9·128/400e12
    assert found["OT term"] == "10.2 … 80.0 ms"
    assert found["OT step / plain step"] == "1.05 … 1.42×"
    assert found["features gathered by a process"] == "1.84 MB"  # 7/8·4·1,024·512
    assert found["memory of the plan"] == "41.0 MB"
    assert scaling.case(2048, 50_000, 0.01, {"N": 0.0, "M": 0.0, "D": 0.0}, 10)["memory of the plan"] == "blocks of it"


def test_the_estimate_takes_its_figures_from_the_results() -> None:
    step = {"seconds": {"plain": 0.05, "with our term": 0.07}}
    exponents = {f"exponent of the loss' time in {name}": {"value": 0.5} for name in "NMD"}
    found = scaling.estimate(results_with(**{"OT training step / plain step": step}), results_with(**exponents))
    assert "the 20.0 ms measured at 128×2000×128" in found["summary"] and "N^0.50, M^0.50, D^0.50" in found["summary"]
    # 20 ms · √(1024/128 · 10,000/2,000 · 512/128)
    assert found["table"]["rows"][1][1].endswith(" … 253 ms")
    assert all(len(row) == len(found["table"]["header"]) for row in found["table"]["rows"])
