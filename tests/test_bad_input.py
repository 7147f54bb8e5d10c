"""Bad input of every kind, in one table: a line that names what is wrong, exit status 2, and nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler
from makers import flip
from makers.models import save_features, save_pipeline
from makers.runs import exit_status

from ot_diffusers import ConvFeatureExtractor, OTGuidance, ReferenceBank, cli
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.models.prior import GaussianPrior, PriorGenerator
from ot_diffusers.schedules import truncated_scheduler
from ot_diffusers.training.files import write_checksums
from ot_diffusers.transport import median_distance, sinkhorn_divergence
from ot_diffusers.transport.sliced import patch_sliced_wasserstein, sliced_wasserstein


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files by the names that the table uses, most of them not as they should be."""
    root = tmp_path_factory.mktemp("places")
    save_pipeline(root / "pipeline")
    save_features(root / "features")
    for make in (broken_pipelines, broken_features, broken_data, broken_runs):
        make(root)
    return {path.stem: path for path in root.iterdir()}


def broken_pipelines(root: Path) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    for name in ("cut_weights", "no_weights", "pickled_weights", "no_index", "bad_index", "other_class", "foreign"):
        shutil.copytree(root / "pipeline", root / name)
    file = root / "cut_weights" / weights
    file.write_bytes(file.read_bytes()[:1000])
    (root / "no_weights" / weights).unlink()
    (root / "pickled_weights" / weights).unlink()
    (root / "pickled_weights" / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weights": 1}))
    (root / "no_index" / "model_index.json").unlink()
    (root / "bad_index" / "model_index.json").write_text("{")
    edit(root / "other_class" / "model_index.json", _class_name="StableDiffusionPipeline")
    edit(root / "foreign" / "model_index.json", unet=["payload", "Payload"])
    (root / "foreign" / "unet" / "payload.py").write_text("raise SystemExit('executed')")


def broken_features(root: Path) -> None:
    for name in ("cut_features", "odd_features", "no_bank", "other_data"):
        shutil.copytree(root / "features", root / name)
    file = root / "cut_features" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    edit(root / "odd_features" / "config.json", _class_name="UNet2DModel")
    shutil.rmtree(root / "no_bank" / "reference_bank")
    edit(root / "other_data" / "config.json", data_fingerprint="of something else")


def broken_data(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "text.txt").write_text("no picture")
    for name in ("cut_image", "no_picture", "sizes", "deep", "tiny"):
        for split in ("train", "validation", "test"):
            (root / name / split).mkdir(parents=True)
            for index in range(3 if name == "tiny" else 12):
                picture = PIL.Image.new("L", (8, 8), index)
                picture.save(root / name / split / f"{index:02d}.png")
    file = root / "cut_image" / "train" / "05.png"
    file.write_bytes(file.read_bytes()[:50])
    (root / "no_picture" / "train" / "05.png").write_bytes(b"GIF89a but no more")
    PIL.Image.new("L", (9, 8)).save(root / "sizes" / "train" / "05.png")
    PIL.Image.new("F", (8, 8)).save(root / "deep" / "train" / "05.tif")
    for split, size in (("validation", 100), ("test", 60)):
        shutil.copytree(root / "tiny" / "train", root / f"cut_{split}" / "train")
        for other in ("validation", "test"):
            shutil.copytree(root / "tiny" / "train", root / f"cut_{split}" / other)
        picture = PIL.Image.effect_noise((8, 8), 90)
        picture.save(root / f"cut_{split}" / split / "last.jpg", quality=100)
        file = root / f"cut_{split}" / split / "last.jpg"
        file.write_bytes(file.read_bytes()[:-size])
    for split in ("train", "test"):
        for index in range(12):
            (root / "larger_test" / split).mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (8, 8) if split == "train" else (9, 9)).save(
                root / "larger_test" / split / f"{index}.png"
            )
    (root / "twins").mkdir()
    pictures = [PIL.Image.new("L", (8, 8))] * 20
    datasets.Dataset.from_dict({"mask": pictures, "photo": pictures}).to_parquet(root / "twins" / "train.parquet")
    (root / "words").mkdir()
    datasets.Dataset.from_dict({"text": ["a"] * 20}).to_parquet(root / "words" / "train.parquet")
    (root / "torn").mkdir()
    (root / "torn" / "train.parquet").write_bytes(b"PAR1 and then nothing")


def broken_runs(root: Path) -> None:
    used = root / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    for name, content in {"torn_run": "{", "list_run": "[]"}.items():
        (root / name).mkdir()
        (root / name / "run.json").write_text(content)
    checkpoint = root / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    write_checksums(checkpoint)
    flip(checkpoint / "state.json", 0)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- Commands ---------------------------------------------------------------------------------------------------------

# What is given, and what the line has to name. `train …` runs the script in this process with tiny networks.
COMMANDS: dict[str, tuple[str, str]] = {
    # Configuration.
    "unknown key": ("train ot ot_wieght=1", "'ot_weight'"),
    "key of another script": ("train baseline ot_weight=1", "ot_weight"),
    "no value": ("train baseline seed=", "seed"),
    "words for a number": ("train baseline train_batch_size=many", "'many'"),
    "a fraction of an image": ("train baseline train_batch_size=2.5", "2.5"),
    "a list for a number": ("train baseline seed=[1,2]", "seed"),
    "a mapping for a list": ("train baseline block_out_channels={{a:1}}", "block_out_channels"),
    "not a number": ("train baseline learning_rate=nan", "learning_rate"),
    "an infinite number": ("train baseline max_grad_norm=.inf", "max_grad_norm"),
    "a huge number": ("train baseline train_batch_size=" + "9" * 400, "train_batch_size"),
    "no learning": ("train baseline learning_rate=0", "learning_rate"),
    "a negative count": ("train baseline max_train_steps=-1", "max_train_steps"),
    "no time": ("train baseline max_train_seconds=-3", "max_train_seconds"),
    "negative skips": ("train baseline max_skipped_updates=-1", "max_skipped_updates"),
    "no groups": ("train baseline norm_num_groups=0", "norm_num_groups"),
    "channels without groups": ("train baseline block_out_channels=6,16", "block_out_channels"),
    "attention nowhere": ("train baseline attention_levels=7", "attention_levels"),
    "too many levels": ("train baseline block_out_channels=8,8,8,8,8", "image_size"),
    "an unknown tracker": ("train baseline report_to=paper", "report_to"),
    "an unknown precision": ("train baseline mixed_precision=fp4", "mixed_precision"),
    "more updates than a schedule can warm up": ("train baseline lr_warmup_steps=-2", "lr_warmup_steps"),
    "a batch beyond the data": ("train baseline train_batch_size=1153", "train_batch_size"),
    "a batch of all the data": ("train ot train_batch_size=1152 feature_extractor={features}", "train_batch_size"),
    "two kinds of colours": ("train baseline channels=2", "channels"),
    "a column that is not there": ("train baseline image_column=picture", "image_column"),
    "no configuration file": ("train baseline --config {empty}/none.yaml", "none.yaml"),
    "a configuration that is a folder": ("train baseline --config {empty}", "empty"),
    "a configuration that is text": ("train baseline --config {text}", "text.txt"),
    "a configuration in bytes": ("train baseline --config {cut_image}/train/05.png", "05.png"),
    "a prior of no kind": ("train prior prior=flow denoiser={pipeline}", "prior"),
    "T' beyond the chain": ("train prior denoiser={pipeline} truncation_timestep=5000", "truncation_timestep"),
    # Data sets.
    "no such folder": ("train baseline dataset=./nowhere", "./nowhere"),
    "no such name on the Hub": ("train baseline dataset=no/such-set", "no/such-set"),
    "no name at all": ("train baseline dataset=../../etc", "../../etc"),
    "an empty folder": ("train baseline dataset={empty}", "empty"),
    "a file": ("train baseline dataset={text}", "text.txt"),
    "a damaged picture": ("train baseline dataset={cut_image}", "05.png"),
    "a file that is no picture": ("train baseline dataset={no_picture}", "05.png"),
    "pictures of two sizes": ("train baseline dataset={sizes}", "image_size"),
    "pictures of any numbers": ("train baseline dataset={deep}", "05.tif"),
    "a damaged validation picture": ("train baseline dataset={cut_validation} train_batch_size=2", "last.jpg"),
    "a damaged test picture": ("train features dataset={cut_test} train_batch_size=2", "last.jpg"),
    "a damaged test picture that training never reads": ("train ot dataset={cut_test} train_batch_size=2", "last.jpg"),
    "test pictures of another size": ("train features dataset={larger_test} train_batch_size=2", "image_size"),
    "two columns of pictures": ("train baseline dataset={twins}", "mask, photo"),
    "less than a batch": ("train baseline dataset={tiny}", "train_batch_size"),
    "words for pictures": ("train baseline dataset={words}", "image_column"),
    "a torn table": ("train baseline dataset={torn}", "torn"),
    "no labels": ("train features dataset={tiny} train_batch_size=2", "label_column"),
    # Folders and checkpoints.
    "somebody's folder": ("train baseline output_dir={used}", "output_dir"),
    "a file for a folder": ("train baseline output_dir={text}", "output_dir"),
    "a folder in a file": ("train baseline output_dir={text}/run", "output_dir"),
    "a torn record": ("train baseline output_dir={torn_run}", "run.json"),
    "a record that is none": ("train baseline output_dir={list_run}", "output_dir"),
    "no such checkpoint": ("train baseline resume_from_checkpoint={empty}", "resume_from_checkpoint"),
    "a damaged checkpoint": ("train baseline resume_from_checkpoint={checkpoint}", "resume_from_checkpoint"),
    "no feature network": ("train ot feature_extractor={empty}", "feature_extractor"),
    "half a feature network": ("train ot feature_extractor={cut_features}", "feature_extractor"),
    "another kind of network": ("train ot feature_extractor={odd_features}", "feature_extractor"),
    "a network of other data": ("train ot feature_extractor={other_data}", "feature_extractor"),
    "no denoiser": ("train prior denoiser={empty}", "denoiser"),
    "half a denoiser": ("train prior denoiser={cut_weights}", "denoiser"),
    # Pipelines.
    "cut weights": ("sample {cut_weights} --output {new}", "pipeline"),
    "no weights": ("sample {no_weights} --output {new}", "pipeline"),
    "pickled weights": ("sample {pickled_weights} --output {new}", "pipeline"),
    "no index": ("sample {no_index} --output {new}", "model_index.json"),
    "a torn index": ("sample {bad_index} --output {new}", "pipeline"),
    "a pipeline of another kind": ("sample {other_class} --output {new}", "StableDiffusionPipeline"),
    "code beside the weights": ("sample {foreign} --output {new}", "pipeline"),
    "no such pipeline on the Hub": ("sample no/such-pipeline --output {new}", "no/such-pipeline"),
    "a Hub id that is a path": ("sample no/such/pipeline --output {new}", "no/such/pipeline"),
    "no bank": ("sample {pipeline} --features {no_bank} --output {new}", "reference_bank"),
    "half of the features": ("sample {pipeline} --features {cut_features} --output {new}", "feature"),
    "an evaluator of other data": ("evaluate {pipeline} --dataset digits --evaluator {other_data}", "digits"),
    "half an evaluator": ("evaluate {pipeline} --dataset digits --evaluator {cut_features}", "cut_features"),
    "a data set of words": ("evaluate {pipeline} --dataset {words} --evaluator {features}", "image_column"),
    "T' of nothing": ("truncated-set --dataset digits --truncation-timestep 0 --output {new}", "truncation_timestep"),
    "epochs of nothing": ("truncated-set --dataset digits --num-epochs 0 --output {new}", "num_epochs"),
    "no command": ("dance", "dance"),
}


BARS = ("Generating", "Downloading", "Resolving", "Loading")  # of the libraries underneath


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_refuses_in_one_line(
    case: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    line, expected = COMMANDS[case]
    before = snapshot(places)
    monkeypatch.chdir(tmp_path)
    words = [word.format(**places, new=tmp_path / "new") for word in line.split()]
    status = exit_status(words[1], words[2:], tmp_path / "new", monkeypatch) if words[0] == "train" else cli.main(words)
    errors = capfd.readouterr().err
    assert status == 2, errors
    said = [text for text in errors.splitlines() if not text.startswith(BARS)]
    said = [text for text in said if text.strip()]
    assert len(said) == 1 and said[0].startswith("error: ") and expected in said[0], errors
    assert not list(tmp_path.iterdir()) and snapshot(places) == before


def snapshot(places: dict[str, Path]) -> dict[str, int]:
    """Every file and its size."""
    return {str(path): path.stat().st_size for place in places.values() for path in [place, *place.rglob("*")]}


# --- Tensors ----------------------------------------------------------------------------------------------------------

CLOUD = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
IMAGES = torch.zeros(4, 1, 8, 8)
NETWORK = ConvFeatureExtractor(sample_size=8, feature_dim=16, block_out_channels=(4, 8))
BANK = ReferenceBank.from_features(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)))
PRIOR = PriorGenerator(
    truncation_timestep=10, sample_size=8, out_channels=1, latent_dim=4, block_out_channels=(8, 8), norm_type="group"
)

TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "no points": (lambda: sinkhorn_divergence(CLOUD[:0], CLOUD, blur=1), "x"),
    "points without a list": (lambda: sinkhorn_divergence(CLOUD[0], CLOUD, blur=1), "x"),
    "whole numbers": (lambda: sinkhorn_divergence(CLOUD.long(), CLOUD, blur=1), "x"),
    "another width": (lambda: sinkhorn_divergence(CLOUD, CLOUD[:, :2], blur=1), "y"),
    "not finite": (lambda: sinkhorn_divergence(CLOUD / 0, CLOUD, blur=1), "x"),
    "no blur": (lambda: sinkhorn_divergence(CLOUD, CLOUD, blur=0), "blur"),
    "a negative reach": (lambda: sinkhorn_divergence(CLOUD, CLOUD, blur=1, reach=-1), "reach"),
    "scaling that grows": (lambda: sinkhorn_divergence(CLOUD, CLOUD, blur=1, scaling=2), "scaling"),
    "weights of nothing": (lambda: sinkhorn_divergence(CLOUD, CLOUD, blur=1, x_weights=torch.zeros(6)), "x_weights"),
    "too few weights": (lambda: sinkhorn_divergence(CLOUD, CLOUD, blur=1, y_weights=torch.ones(1)), "y_weights"),
    "one point has no distance": (lambda: median_distance(CLOUD[:1]), "features"),
    "one place has no distance": (lambda: median_distance(torch.zeros(5, 2)), "features"),
    "sliced, another width": (lambda: sliced_wasserstein(CLOUD, CLOUD[:, :2]), "y"),
    "sliced, not finite": (lambda: sliced_wasserstein(CLOUD, CLOUD / 0), "y"),
    "sliced, no directions": (lambda: sliced_wasserstein(CLOUD, CLOUD, num_projections=0), "num_projections"),
    "patches of points": (lambda: patch_sliced_wasserstein(CLOUD, CLOUD, patch_sizes=(1,)), "images"),
    "a bank of one": (lambda: ReferenceBank.from_features(CLOUD[:1]), "num_samples"),
    "a bank that is not finite": (lambda: ReferenceBank.from_features(CLOUD / 0), "features"),
    "a bank of another width": (lambda: OTGuidance(NETWORK, ReferenceBank.from_features(CLOUD)), "reference_bank"),
    "negative guidance": (lambda: OTGuidance(NETWORK, BANK, guidance_scale=-1), "guidance_scale"),
    "a prior of one image": (lambda: GaussianPrior.from_images(IMAGES[:1], 10), "images"),
    "labels for some": (lambda: GaussianPrior.from_images(IMAGES, 10, labels=torch.zeros(3)), "labels"),
    "latents of another width": (lambda: PRIOR(torch.zeros(2, 5)), "latents"),
    "T' of a fraction": (lambda: truncated_scheduler(DDIMScheduler(), 2.5), "truncation_timestep"),  # type: ignore
    "a negative image size": (lambda: load_images("digits", image_size=-8), "image_size"),
    "no such split": (lambda: load_images("digits", "all"), "split"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_function_refuses_in_one_line(case: str) -> None:
    call, argument = TENSORS[case]
    with pytest.raises(InputError) as refusal:
        call()
    assert str(refusal.value).startswith(f"`{argument}` must ") and "\n" not in str(refusal.value)


def test_there_are_enough_cases() -> None:
    assert len(COMMANDS) >= 60 and len(TENSORS) >= 20
