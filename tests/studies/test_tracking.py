"""Every checkpoint of a real, tiny run: which weights are measured, against what, and what a second call keeps."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from makers.runs import train
from PIL import Image

from ot_diffusers import cli
from ot_diffusers.errors import InputError
from ot_diffusers.evaluation.evaluate import extract_image_set
from ot_diffusers.evaluation.metrics import frechet_distance
from ot_diffusers.features import load_feature_extractor
from ot_diffusers.reporting import plots
from ot_diffusers.reporting.report import format_number
from ot_diffusers.sampling import load_pipeline, sample_images
from ot_diffusers.studies.tracking import RealImages, Track, load_checkpoint, track_runs

pytestmark = pytest.mark.slow

CALL = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline of the digits with checkpoints after 20, 40 and 60 updates."""
    values = {"train_batch_size": 16, "learning_rate": 3e-3, "max_train_steps": 60}
    values |= {"checkpointing_steps": 20, "checkpoints_total_limit": 10}
    return train("baseline", tmp_path_factory.mktemp("run") / "baseline", **values)


def track(run: Path, output: Path, evaluator: str, lines: list[str] | None = None, **options: Any) -> Track:
    said = lines if lines is not None else []
    options = {"dataset": "digits", "num_samples": 60, "call": CALL, "log": said.append} | options
    return track_runs({"run": run}, output, evaluator=evaluator, **options)["run"]


def test_last_checkpoint_is_the_saved_pipeline(run: Path, evaluator: str, tmp_path: Path) -> None:
    """Its fidelity is the Fréchet distance of the pipeline's own images, and the gap is what it says."""
    found = track(run, tmp_path, evaluator)
    assert [point.update for point in found.points] == [20, 40, 60]
    extractor = load_feature_extractor(evaluator)
    real = RealImages.load("digits", extractor, 60)
    saved, loaded = load_pipeline(run), load_checkpoint(run, run / "checkpoints" / "update-00000060", real.test, None)
    for name, tensor in saved.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor), name
    images = extract_image_set(sample_images(loaded, 60, **CALL), extractor)
    last = found.points[-1]
    assert last.fidelity["frechet_distance"] == frechet_distance(images.features, real.test.features)
    assert last.coverage["frechet_distance"] == frechet_distance(images.features, real.train.features)
    assert found.base_line["frechet_distance"] == frechet_distance(real.train.features, real.test.features)
    assert last.gap == {name: last.fidelity[name] - last.coverage[name] for name in last.fidelity}


def test_second_call_measures_what_is_new_only(run: Path, evaluator: str, tmp_path: Path) -> None:
    copy, lines = tmp_path / "run", list[str]()
    shutil.copytree(run, copy)
    first, second, third = sorted((copy / "checkpoints").iterdir())
    shutil.move(third, tmp_path / third.name)
    before = track(copy, tmp_path / "tracking", evaluator, lines)
    assert [line.split(":")[0] for line in lines] == ["run", "run, update 20", "run, update 40"]
    assert "2 checkpoints; a run with checkpoints_total_limit=1000 keeps them all" in lines[0]

    # The run goes on, drops its oldest checkpoint, and the second has been trained anew.
    shutil.move(tmp_path / third.name, third)
    shutil.rmtree(first)
    shutil.copy(third / "ema.safetensors", second / "ema.safetensors")
    lines.clear()
    after = track(copy, tmp_path / "tracking", evaluator, lines)
    assert [line.split(":")[0] for line in lines[1:]] == ["run, update 40", "run, update 60"]
    assert after.points[0] == before.points[0]
    assert after.points[1].fidelity == after.points[2].fidelity != before.points[1].fidelity

    lines.clear()
    assert track(copy, tmp_path / "tracking", evaluator, lines) == after and len(lines) == 1


def test_other_settings_and_other_folders_are_refused(run: Path, evaluator: str, tmp_path: Path) -> None:
    track(run, tmp_path, evaluator, num_samples=20)
    with pytest.raises(InputError, match=r"`output` must be a new folder, or one made with {'seed': 1}"):
        track(run, tmp_path, evaluator, num_samples=20, seed=1)
    with pytest.raises(InputError, match="`num_samples` must lie in 2 … 540, got 541"):
        track(run, tmp_path / "new", evaluator, num_samples=541)
    with pytest.raises(InputError, match="`run` must be the folder of a train_baseline"):
        track(tmp_path, tmp_path / "new", evaluator)
    assert not (tmp_path / "new").exists()


def test_command_line_draws_several_runs_in_one_picture(run: Path, evaluator: str, tmp_path: Path, capfd: Any) -> None:
    options = ["--dataset", "digits", "--evaluator", evaluator, "--num-samples", "20", "--num-inference-steps", "2"]
    output = tmp_path / "tracking"
    assert cli.main(["track", f"before={run}", f"after={run}", *options, "--output", str(output)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(output / "report.html")
    report = (output / "report.html").read_text("utf-8")
    picture = base64.b64encode((output / "tracking.png").read_bytes()).decode()
    assert picture in report and "Along training: before · after" in report and "//" not in report.replace(picture, "")
    record = json.loads((output / "tracking.json").read_text())
    assert record["runs"]["before"] == record["runs"]["after"]
    gap = record["runs"]["before"]["points"][-1]["gap"]["frechet_distance"]
    assert report.count(f"<td>{format_number(gap)}</td>") == 2  # one line for each run
    assert set(record["runs"]["before"]["points"][0]) == {"update", "coverage", "fidelity", "weights", "gap"}
    assert Image.open(output / "tracking.png").size[0] > 1000
    with pytest.raises(InputError, match="`tracks` must hold at least one checkpoint"):
        plots.tracking_curves({"run": Track({"frechet_distance": 1.0}, ())}, tmp_path / "none.png")
