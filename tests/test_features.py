"""Feature networks on real digits: training by the script, caching by content, and the reference set."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from makers import ROOT
from makers.runs import main_of, reset_accelerate
from safetensors.torch import load_file
from torch import Tensor

from ot_diffusers.cache import save_aside
from ot_diffusers.config import FeaturesConfig, load_config
from ot_diffusers.data import ResidentImages, load_images
from ot_diffusers.errors import InputError
from ot_diffusers.features import (
    cached_features,
    check_trained_on,
    classification_accuracy,
    extract_features,
    load_feature_extractor,
    load_reference_bank,
    make_feature_extractor,
    make_feature_optimizer,
    make_reference_bank,
    weights_fingerprint,
)
from ot_diffusers.images import random_crop_and_flip
from ot_diffusers.models.feature_extractor import ConvFeatureExtractor, FeatureExtractor
from ot_diffusers.transport import median_distance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images() -> ResidentImages:
    loaded = load_images("digits", "train")
    assert isinstance(loaded, ResidentImages)
    return loaded


@pytest.fixture
def network(images: ResidentImages) -> FeatureExtractor:
    torch.manual_seed(0)
    return make_feature_extractor(FeaturesConfig(block_out_channels=(4, 8), feature_dim=16), images)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training run, started as in the README."""
    folder = tmp_path_factory.mktemp("features")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / "one_process.yaml")]
    command += [
        str(ROOT / "train" / "train_features.py"),
        "--config",
        str(ROOT / "configs" / "digits" / "features.yaml"),
    ]
    command += [
        f"output_dir={folder / 'run'}",
        "num_train_epochs=10",
        "block_out_channels=[16,32]",
        "learning_rate=4e-3",
        "mixed_precision=bf16",
        "report_to=none",
    ]
    environment = os.environ | {"OT_DIFFUSERS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "run"


# --- Training by the script -------------------------------------------------------------------------------------------


def test_script_trains_a_network_that_reads_digits(trained: Path) -> None:
    """Chance level is 10% accuracy; ten epochs reach 95%, and .9 leaves room for other builds of torch."""
    results = json.loads((trained / "results.json").read_text())
    assert results["test_accuracy"] > 0.9
    assert results["complete"]
    assert results["updates"] == 10 * (1152 // 64)
    # The saved network has the measured accuracy.
    loaded = load_feature_extractor(str(trained))
    assert classification_accuracy(loaded, load_images("digits", "test")) == results["test_accuracy"]


def test_script_writes_a_line_for_every_epoch(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines] == [18 * epoch for epoch in range(1, 11)]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["validation_accuracy"] > lines[0]["validation_accuracy"]


def test_loaded_network_is_frozen_and_knows_its_data(trained: Path, images: ResidentImages) -> None:
    loaded = load_feature_extractor(str(trained))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.config.dataset, loaded.config.data_fingerprint) == ("digits", images.fingerprint)
    check_trained_on(loaded, images)


def test_features_of_classes_lie_apart(trained: Path, images: ResidentImages) -> None:
    """Distances within a class are shorter than between classes, so that transport in feature space depends on
    content."""
    features = extract_features(load_feature_extractor(str(trained)), images)
    distances = torch.cdist(features, features)
    same = images.labels[:, None] == images.labels[None, :]
    off_diagonal = ~torch.eye(len(features), dtype=torch.bool)
    assert distances[same & off_diagonal].mean() < 0.8 * distances[~same].mean()


def test_bank_of_the_script_is_the_training_set_in_its_own_unit(trained: Path, images: ResidentImages) -> None:
    """2,000 rows are requested and 1,152 exist, so that the set contains them all and its median distance is 1."""
    bank = load_reference_bank(str(trained))
    assert bank.config.data_fingerprint == images.fingerprint
    features = extract_features(load_feature_extractor(str(trained)), images)
    # Both sides are batched float32 products: only the order of sums may differ.
    torch.testing.assert_close(bank.features, features, rtol=1e-4, atol=1e-5)
    assert torch.pdist(bank.references()).median().item() == pytest.approx(1, rel=1e-5)


# --- The settings of the CIFAR-10 evaluator ---------------------------------------------------------------------------


def test_sgd_is_nesterovs_and_decays_no_bias(network: FeatureExtractor) -> None:
    """v ← μ v + g, w ← w − η (g + μ v), with g = ∂L/∂w + decay · w for kernels and matrices only; here ∂L/∂w = 1."""
    config = FeaturesConfig(optimizer="sgd", learning_rate=0.1, sgd_momentum=0.8, sgd_weight_decay=0.5)
    optimizer = make_feature_optimizer(config, network.requires_grad_(True))
    parameters = list(network.parameters())
    expected = [parameter.detach().clone() for parameter in parameters]
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(3):
        for row, weight in enumerate(expected):
            gradient = 1 + (0.5 if weight.dim() > 1 else 0) * weight
            velocity[row] = 0.8 * velocity[row] + gradient
            expected[row] = weight - 0.1 * (gradient + 0.8 * velocity[row])
        optimizer.zero_grad()
        sum(parameter.sum() for parameter in parameters).backward()
        optimizer.step()
    assert len(parameters) == sum(len(group["params"]) for group in optimizer.param_groups)
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_its_recipe_learns_and_goes_on_where_it_was_interrupted(cache: Path, tmp_path: Path) -> None:
    """A checkpoint contains the momentum, the position in the learning-rate schedule and the running statistics."""

    def train(name: str, updates: int) -> dict[str, Tensor]:
        reset_accelerate()
        overrides = [f"output_dir={tmp_path / name}", f"max_train_steps={updates}", "dataset=digits", "report_to=none"]
        overrides += ["block_out_channels=8,16", "layers_per_block=1", "train_batch_size=64", "crop_padding=1"]
        overrides += ["random_flip=false", "lr_scheduler=constant_with_warmup", "lr_warmup_steps=4", "seed=0"]
        preset = ["--config", str(ROOT / "configs" / "cifar10" / "evaluator.yaml")]
        main_of("features")(load_config(FeaturesConfig, preset + overrides))
        return load_file(tmp_path / name / "checkpoints" / f"update-{updates:08d}" / "model.safetensors")

    whole = train("whole", 40)
    train("parts", 15)
    parts = train("parts", 40)
    assert whole.keys() == parts.keys() and any("running_mean" in name for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # Chance level is .1 with ten classes; this seed reaches .75 with torch 2.14 and .37 with torch 2.6.
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["test_accuracy"] > 0.25


def test_batches_leave_the_augmentation_with_channels_last() -> None:
    """Half-precision convolutions on a GPU need this memory layout, which they inherit from their input."""
    images, draws = torch.rand(4, 3, 8, 8), torch.rand(4, 3)
    for padding in (0, 2):
        batch = random_crop_and_flip(images, padding=padding, flip=True, draws=draws)
        assert batch.is_contiguous(memory_format=torch.channels_last)


# --- The reference set ------------------------------------------------------------------------------------------------


def test_bank_takes_evenly_spaced_rows(network: FeatureExtractor, images: ResidentImages, cache: Path) -> None:
    bank = make_reference_bank(network, images, 100)
    features = extract_features(network, images)
    positions = torch.tensor([int(torch.nonzero((features == row).all(1))[0]) for row in bank.features])
    assert positions[0] == 0
    assert positions[-1] == len(images) - 1
    # The spacing is 1,151 / 99 = 11.6…, rounded to whole rows.
    assert set(positions.diff().tolist()) == {11, 12}
    assert bank.config.feature_scale == median_distance(features)


def test_median_distance_is_a_length() -> None:
    """The points 0, 1 and 3 on a line have distances 1, 2 and 3; scaling them by two doubles the median."""
    points = torch.tensor([[0.0], [1.0], [3.0]])
    assert median_distance(points) == 2
    assert median_distance(2 * points) == 4
    with pytest.raises(InputError, match="differ from one another"):
        median_distance(torch.ones(5, 3))


# --- The cache --------------------------------------------------------------------------------------------------------


def marked(cache: Path) -> Tensor:
    """Replace the only file in the cache by features that no network gives; returns them."""
    (file,) = (cache / "features").iterdir()
    mark = load_file(file)["features"] + 1000
    save_aside({"features": mark}, file)
    return mark


def test_cached_features_are_those_of_the_network(
    network: FeatureExtractor, images: ResidentImages, cache: Path
) -> None:
    expected = extract_features(network, images)
    assert torch.equal(cached_features(network, images), expected)
    assert torch.equal(cached_features(network, images), expected)
    mark = marked(cache)
    assert torch.equal(cached_features(network, images), mark)  # the second call must read the file


@pytest.mark.parametrize("change", ["weight", "image", "squash"])
def test_cache_is_keyed_by_content(change: str, network: FeatureExtractor, images: ResidentImages, cache: Path) -> None:
    cached_features(network, images)
    marked(cache)
    pixels, squash = images.pixels.clone(), "clamp"
    if change == "weight":
        network.classifier.bias.data[0] += 1e-3
    elif change == "image":
        pixels[17, 0, 3, 3] ^= 1
    else:
        squash = "tanh"
    other = ResidentImages(images.name, images.split, images.labels, pixels)
    assert torch.equal(cached_features(network, other, squash=squash), extract_features(network, other, squash=squash))
    assert len(list((cache / "features").iterdir())) == 2


def test_fingerprint_is_of_the_function(network: FeatureExtractor, tmp_path: Path) -> None:
    fingerprint = weights_fingerprint(network)
    assert weights_fingerprint(copy.deepcopy(network).to(torch.float64)) == fingerprint
    network.save_pretrained(tmp_path)
    assert weights_fingerprint(load_feature_extractor(str(tmp_path))) == fingerprint
    network.backbone[0].weight.data[0, 0, 0, 0] += 1e-6
    assert weights_fingerprint(network) != fingerprint


def test_features_do_not_depend_on_the_batch_size(network: FeatureExtractor, images: ResidentImages) -> None:
    """Only the order of float32 sums may change, which is about 1e-6 for features near 1."""
    torch.testing.assert_close(
        extract_features(network, images, batch_size=7), extract_features(network, images), rtol=1e-5, atol=1e-6
    )


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_network_of_other_data_is_refused(network: FeatureExtractor, images: ResidentImages) -> None:
    other = ResidentImages("mine", "train", images.labels, 255 - images.pixels)
    with pytest.raises(InputError, match=r"`feature_extractor` .*training split of 'mine'.*network of 'digits'"):
        check_trained_on(network, other)
    larger = ResidentImages("mine", "train", None, torch.zeros(2, 1, 12, 12, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"take images of shape \(1, 12, 12\), got \(1, 8, 8\)"):
        check_trained_on(network, larger)


def test_network_of_unknown_data_is_taken(images: ResidentImages) -> None:
    """A network without a fingerprint is accepted if the image shape fits."""
    check_trained_on(ConvFeatureExtractor(sample_size=8), images)


def test_data_without_labels_or_square_images_is_refused(images: ResidentImages) -> None:
    unlabelled = ResidentImages("mine", "train", None, images.pixels)
    with pytest.raises(InputError, match="`label_column` must name a column"):
        make_feature_extractor(FeaturesConfig(dataset="mine"), unlabelled)
    oblong = ResidentImages("mine", "train", images.labels, images.pixels[..., :4])
    with pytest.raises(InputError, match="`image_size` must be given for images that are not square"):
        make_feature_extractor(FeaturesConfig(), oblong)


def test_folder_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`feature_extractor` must be a folder or Hub id of a feature network"):
        load_feature_extractor(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(
        InputError, match="must be a feature network of this package or a vision backbone, got 'UNet2DModel'"
    ):
        load_feature_extractor(str(tmp_path))
    with pytest.raises(InputError, match="`features` must hold a network and its `reference_bank`"):
        load_reference_bank(str(tmp_path))


def test_pictures_are_seen_as_saved(network: FeatureExtractor, images: ResidentImages, tmp_path: Path) -> None:
    """Saving an image as PNG does not change its features: uint8 → [-1, 1] → [0, 1] is consistent."""
    PIL.Image.fromarray(images.pixels[0, 0].numpy()).save(tmp_path / "digit.png")
    again = torch.from_numpy(np.array(PIL.Image.open(tmp_path / "digit.png")))[None, None].float() / 255
    # Float32 rounding of x / 127.5 − 1 and its inverse, 1e-7 of the range, after two convolutions.
    torch.testing.assert_close(extract_features(network, images)[:1], network(again).features, rtol=1e-4, atol=1e-6)
