"""The truncated set on disk equals the samples of training, and opens like any data set."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DDPMScheduler

from ot_diffusers.cli import main
from ot_diffusers.data import load_images, truncated_set
from ot_diffusers.schedules import truncated_samples, truncated_scheduler


def test_rows_are_the_samples_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncated_set, "CHUNK", 30)
    monkeypatch.setattr(truncated_set, "SHARD_SIZE", 50)
    folder = tmp_path / "set"
    assert (
        main(f"truncated-set --dataset digits --split validation --num-epochs 2 --seed 3 --output {folder}".split())
        == 0
    )
    table = datasets.load_dataset(str(folder), split="validation", cache_dir=str(tmp_path)).with_format("numpy")
    images, scheduler = load_images("digits", "validation"), truncated_scheduler(DDPMScheduler(), 10)
    assert (
        table["index"][:].tolist() == 2 * list(range(105)) and table["label"][:105].tolist() == images.labels.tolist()
    )
    for epoch in (0, 1):
        rows = torch.arange(105)
        expected = truncated_samples(images.fetch(rows), rows, scheduler, epoch=epoch, seed=3)
        stored = torch.from_numpy(table["sample"][:][105 * epoch : 105 * (epoch + 1)])
        # float16 has 11 significant bits: the rounding error of values below 2 is at most 2^-11.
        assert torch.allclose(stored.float(), expected, rtol=0, atol=2**-11)


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = ["truncated-set", "--dataset", "digits", "--split", "validation", "--output"]
    (tmp_path / "full").mkdir()
    assert main([*export, str(tmp_path / "full")]) == 2
    assert "`output` must be a new folder" in capsys.readouterr().err
    assert main([*export, str(tmp_path / "set"), "--truncation-timestep", "2000"]) == 2
    assert "`truncation_timestep` must be an integer from 1 to 1000, got 2000" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["full"]
