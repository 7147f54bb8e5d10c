"""Evaluators that can be trusted and those that cannot: what is measured, what is said, and what is withheld."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from ot_diffusers import ConvFeatureExtractor, cli
from ot_diffusers.data import load_images, pixels_of
from ot_diffusers.errors import InputError
from ot_diffusers.evaluation.evaluate import ImageSet, evaluate_images, extract_image_set
from ot_diffusers.evaluation.extractors import evaluator_facts, load_real_images
from ot_diffusers.evaluation.health import evaluator_doubt, evaluator_line, warn_of_doubt
from ot_diffusers.features import classification_accuracy
from ot_diffusers.reporting.report import text_table


def classifier(updates: int) -> ConvFeatureExtractor:
    """A network of the digits after so many updates."""
    torch.manual_seed(0)
    images = load_images("digits", "train")
    network = ConvFeatureExtractor(sample_size=8, data_fingerprint=images.fingerprint)
    optimizer = torch.optim.AdamW(network.requires_grad_(True).parameters(), 1e-3)
    for _ in range(updates):
        rows = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(network.logits(images.fetch(rows)), images.labels[rows]).backward()
        optimizer.step()
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def weak() -> ConvFeatureExtractor:
    return classifier(40)


@pytest.fixture(scope="module")
def good() -> ConvFeatureExtractor:
    return classifier(200)


def reference(network: ConvFeatureExtractor, *, labelled: bool = True) -> ImageSet:
    images = load_images("digits", "test")
    return extract_image_set(pixels_of(images), network, labels=images.labels if labelled else None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, None),
        ({"name": "older results", "feature_dim": 128}, None),
        ({"test_accuracy": 0.978}, None),
        ({"effective_rank": 6.2, "has_classifier": True, "test_accuracy": 0.978, "chance": 0.1}, None),
        ({"effective_rank": 13.4, "has_classifier": True, "test_accuracy": 0.75, "chance": 0.1}, None),
        ({"effective_rank": 91.0, "has_classifier": False}, None),
        ({"effective_rank": 4.4, "has_classifier": False}, "effective rank of 4.4, below 5"),
        (
            {"effective_rank": 1.19, "has_classifier": True, "test_accuracy": 0.6, "chance": 0.34},
            "effective rank of 1.2",
        ),
        (
            {"effective_rank": 13.4, "has_classifier": True, "test_accuracy": 0.1, "chance": 0.1},
            "test accuracy is 10.0%",
        ),
        ({"effective_rank": 13.4, "has_classifier": True, "test_accuracy": 0.6, "chance": 0.34}, "34.0% is chance"),
        # Nine images in ten are of one class.
        ({"effective_rank": 13.4, "has_classifier": True, "test_accuracy": 0.92, "chance": 0.9}, "90.0% is chance"),
        ({"effective_rank": 13.4, "has_classifier": True, "test_accuracy": None}, "test accuracy is unknown"),
    ],
)
def test_doubts(facts: dict[str, Any], words: str | None) -> None:
    doubt = evaluator_doubt(facts)
    assert doubt is None if words is None else words in str(doubt)
    assert ("No verdict" in evaluator_line({"name": "x"} | facts)) == (words is not None)


def test_a_part_of_the_classes_does_not_doubt_the_evaluator(weak: ConvFeatureExtractor) -> None:
    real = reference(weak)
    assert real.labels is not None
    part = real.rows(real.labels == 3).rows(slice(20))
    assert part.health == real.health and len(part) == 20


@pytest.mark.slow
def test_a_weak_evaluator_takes_static_for_digits_and_is_found_out(weak: ConvFeatureExtractor) -> None:
    real = reference(weak)
    generator = torch.Generator().manual_seed(0)
    static = torch.randint(0, 256, (270, 1, 8, 8), generator=generator, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="The evaluator cannot be trusted: its features of real images have an effe"):
        values = evaluate_images(static, reference=real.rows(slice(270)), extractor=weak, metrics=["precision"])
    assert values["precision"] > 0.3
    with pytest.warns(UserWarning, match="The evaluator cannot be trusted"):
        facts = evaluator_facts(weak, real)
    assert facts["effective_rank"] < 5 and 0.5 < facts["test_accuracy"] < 0.9


@pytest.mark.slow
def test_a_good_evaluator_is_not_doubted_and_its_accuracy_is_measured(good: ConvFeatureExtractor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = evaluator_facts(good, reference(good))
    assert facts["test_accuracy"] == classification_accuracy(good, load_images("digits", "test")) > 0.95
    assert facts["chance"] == pytest.approx(0.1, abs=0.01) and facts["effective_rank"] > 5
    assert f"{facts['test_accuracy']:.1%} test accuracy" in evaluator_line(facts)


def test_without_labels_that_it_knows_the_accuracy_is_unknown(good: ConvFeatureExtractor) -> None:
    for labels in (None, torch.full((540,), 10), torch.full((540,), -1)):
        images = load_images("digits", "test")
        with pytest.warns(UserWarning, match="its test accuracy is unknown"):
            facts = evaluator_facts(good, extract_image_set(pixels_of(images), good, labels=labels))
        assert facts["test_accuracy"] is None and "test accuracy unknown" in evaluator_line(facts)
    with warnings.catch_warnings():  # in Python a reference without labels is nothing unusual
        warnings.simplefilter("error")
        real = reference(good, labelled=False)
        assert evaluate_images(real.images[:50], reference=real, extractor=good, metrics=["recall"])


def test_each_doubt_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for rank in (1.0, 1.0, 2.0, 1.0):
            warn_of_doubt({"effective_rank": rank})
    assert len(said) == 2


def save_pictures(images: Tensor, folder: Path) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{number:05d}.png")


@pytest.mark.slow
def test_evaluate_tells_the_accuracy_and_the_doubt(
    weak: ConvFeatureExtractor, good: ConvFeatureExtractor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_pictures(pixels_of(load_images("digits", "validation"), torch.arange(40)), tmp_path / "pictures")
    for name, network in (("weak", weak), ("good", good)):
        network.save_pretrained(tmp_path / name)
        command = ["evaluate", str(tmp_path / "pictures"), "--dataset", "digits", "--evaluator", str(tmp_path / name)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert cli.main([*command, "--output", str(tmp_path / f"{name}.json")]) == 0
        results = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        shown = capfd.readouterr().out
        assert f"{results['extractor']['test_accuracy']:.1%} test accuracy" in shown
        assert shown.strip() == text_table(results).strip()
        doubted = [str(warning.message) for warning in said if "cannot be trusted" in str(warning.message)]
        assert bool(doubted) == ("No verdict should rest on it" in shown) == (name == "weak")


def test_a_network_of_other_data_is_called_the_evaluator(good: ConvFeatureExtractor) -> None:
    other = ConvFeatureExtractor(sample_size=8, dataset="others", data_fingerprint="other data")
    with pytest.raises(
        InputError, match=r"`evaluator` must be trained on the training split of 'digits', got .*others"
    ):
        load_real_images("digits", "train", other)
    assert len(load_real_images("digits", "train", good)) > 0
