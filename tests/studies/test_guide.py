"""`guide` end to end on a stock pipeline and on the digits: choices, class shares, a pipeline that loads everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from makers import command as run
from makers.models import make_unet, save_features, save_pipeline

from ot_diffusers import DenoiserFeatureExtractor, OTGuidedDDIMPipeline, ResidualFeatureExtractor
from ot_diffusers.data import load_images, pixels_of
from ot_diffusers.evaluation.evaluate import ImageSet
from ot_diffusers.studies import guide
from ot_diffusers.studies.guide import (
    Drawn,
    Real,
    choose_evaluator,
    measured_shares,
    prepared,
    rebalanced,
    share_rows,
)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("stock"), make_unet(seed=0, block_out_channels=(8, 16)))


@pytest.mark.slow
def test_one_command_from_a_stock_pipeline_to_a_guided_one(
    stock: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An untrained denoiser makes noise; guided, it comes nearer to the real images and to the asked shares."""
    evaluator, output = save_features(tmp_path / "evaluator", seed=1), tmp_path / "guided"
    words = ("guide", stock, "digits", "--output", output, "--evaluator", evaluator, "--num-inference-steps", 3)
    options = ("--num-images", 40, "--num-references", 100, "--class-shares", "0=.6,1=.3", "--field", 32, "--json")
    assert run(*words, *options) == 0
    results = json.loads(capfd.readouterr().out)
    assert results == json.loads((output / "results.json").read_text())
    assert list(results["arms"]) == ["plain", "guided", "guidance field"]
    distances = [results["arms"][name]["metrics"]["frechet_distance"] for name in ("plain", "guided")]
    assert distances[1] < distances[0]
    real = results["class_shares"]["real"]
    # Of 54 test images of a class, 90 in these proportions: 54, 27, and 9 of eight classes.
    assert real["0"] == pytest.approx(0.6, abs=0.02) and real["1"] == pytest.approx(0.3, abs=0.02)
    assert "Guidance scale: 2, because shares of classes" in " ".join(results["notes"])
    assert {path.name for path in output.iterdir() if path.suffix} >= {"report.html", "results.json", "samples.png"}
    assert "Shares of classes" in (output / "report.html").read_text() and str(tmp_path) not in str(results)

    loaded = OTGuidedDDIMPipeline.from_pretrained(output / "pipeline")
    assert isinstance(loaded.feature_extractor, DenoiserFeatureExtractor)
    loaded.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    assert loaded(batch_size=1, **call).images.shape == (1, 8, 8, 1)
    assert loaded.guidance_field.config.guidance_scale == 2
    trusted = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    remote = DiffusionPipeline.from_pretrained(output / "pipeline", **trusted)
    assert type(remote).__name__ == "OTGuidedDDIMPipeline" and remote.reference_bank is not None
    assert DDIMPipeline.from_pretrained(output / "pipeline").unet.config == loaded.unet.config

    assert run(*words, *options) == 2
    assert "`output` must be a new or empty folder, unless --overwrite is given" in capfd.readouterr().err
    (output / "pipeline" / "mine.txt").write_text("mine")
    assert run(*words, *options, "--overwrite") == 2
    assert "mine.txt" in capfd.readouterr().err
    (output / "pipeline" / "mine.txt").unlink()
    assert run(*words, "--num-images", 20, "--num-references", 70, "--overwrite") == 0
    assert json.loads((output / "results.json").read_text())["num_samples"] == 20
    assert OTGuidedDDIMPipeline.from_pretrained(output / "pipeline").guidance_field is None


def test_shares_are_counted_by_the_evaluator_or_by_the_nearest_training_image() -> None:
    """Real images as samples, from which a perfect classifier must read their own shares."""
    images = load_images("digits", "test")
    network = ResidualFeatureExtractor(sample_size=8, block_out_channels=(8,), feature_dim=8)
    network.extract = lambda images: images.flatten(1)  # type: ignore[method-assign]
    network.forward = lambda images, return_dict: (images.flatten(1), images.new_empty(len(images), 0))  # type: ignore
    pixels, labels = pixels_of(images), images.labels
    assert labels is not None
    real = ImageSet(pixels, (pixels / 255.0).flatten(1), None, labels=labels)
    only = pixels[(labels == 3) | (labels == 8)]
    said, both = list[str](), {"train": real, "test": real}
    drawn = {"samples": Drawn(only, 1, 1.0)}
    shares = measured_shares(drawn, Real({"test": images}, both, both), network, said.append)
    threes = int((labels == 3).sum()) / len(only)
    assert shares["samples"]["3"] == pytest.approx(threes) and shares["samples"]["8"] == pytest.approx(1 - threes)
    assert said == ["Classes of samples: by the nearest training image, which is right for 100.0% of the test images."]
    rows = share_rows({"class_shares": shares})
    assert rows[0][1:-1] == list("0123456789") and float(rows[1][-1]) == pytest.approx(0.8, abs=0.01)
    part = rebalanced(real, {"0": 0.9}, images)
    counts = part.labels.bincount(minlength=10)  # type: ignore[union-attr]
    assert counts[0] == 54 and len(part) == pytest.approx(60, abs=4)  # nine classes share 6, each rounded


def test_the_evaluator_is_not_the_network_that_guides(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a general network, the denoiser judges another network, and an untrained network the denoiser."""
    monkeypatch.setattr(guide, "find_spec", lambda name: None)
    pipe, said = OTGuidedDDIMPipeline.from_pipe(DDIMPipeline.from_pretrained(stock)), list[str]()
    own = pipe.with_references("digits", num_references=70)
    assert isinstance(choose_evaluator(None, own, said.append), ResidualFeatureExtractor)
    other = pipe.with_references("digits", num_references=70, network=ResidualFeatureExtractor(sample_size=8))
    assert isinstance(choose_evaluator(None, other, said.append), DenoiserFeatureExtractor)
    assert [line.split(",")[0] for line in said] == [
        "Evaluator: an untrained network",
        "Evaluator: the features of the denoiser",
    ]


def test_ddpm_becomes_ddim() -> None:
    scheduler, said = DDPMScheduler(beta_schedule="squaredcos_cap_v2"), list[str]()
    made = prepared(DDPMPipeline(make_unet(), scheduler), said.append)
    assert type(made.scheduler).__name__ == "DDIMScheduler" and "DDIM in place of DDPM" in said[0]
    assert torch.equal(made.scheduler.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--network {wide}", "`network` must take images of shape (1, 8, 8)"),
        ("--evaluator {wide}", "`evaluator` must take images of shape (1, 8, 8)"),
        ("--network {features} --evaluator {features}", "`evaluator` must be another network than the one that guides"),
        ("--class-shares cat=.9", "`weights` must name some of 0, 1, 2"),
        ("--class-shares 0:.9", "`class_shares` must be shares of different classes"),
        ("--class-shares 0=.9,0=.1", "`class_shares` must be shares of different classes"),
        ("--num-images 1", "`num_images` must be at least 2"),
        ("--field 2", "`field` must be at least 16"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    words: str, message: str, stock: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"features": save_features(tmp_path / "features"), "wide": tmp_path / "wide"}
    ResidualFeatureExtractor(sample_size=16, block_out_channels=(8,)).save_pretrained(tmp_path / "wide")
    options = words.format(**places).split()
    assert run("guide", stock, "digits", "--num-references", 70, "--output", tmp_path / "new", *options) == 2
    error = capfd.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "new").exists()
