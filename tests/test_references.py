"""Your references, no training: every kind of images becomes the same references, and they decide the proportions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from makers.models import make_features, make_truncated, make_unet
from torch import Tensor

from ot_diffusers import ConvFeatureExtractor, DenoiserFeatureExtractor, FlowMatchPipeline, OTGuidedDDIMPipeline
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.images import to_model_range
from ot_diffusers.sampling import save_images

# Rows of random colours that brighten by 4 grey levels from pixel to pixel: a crop that is off by one shows.
ROWS = torch.randint(0, 160, (70, 3, 20, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RGB = ROWS + 4 * torch.arange(24, dtype=torch.uint8)
GOOD = to_model_range(RGB)


def guided(**options: Any) -> OTGuidedDDIMPipeline:
    """The pipeline of a stock one, as its user makes it."""
    return OTGuidedDDIMPipeline.from_pipe(DDIMPipeline(make_unet(seed=0, **options), DDIMScheduler()))


def banks(pipe: OTGuidedDDIMPipeline, kinds: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    return {kind: pipe.with_references(images, **options).reference_bank.thumbnails for kind, images in kinds.items()}


@pytest.mark.parametrize(("channels", "size"), [(3, 8), (1, 8), (1, (8, 16))])
def test_every_kind_of_images_gives_the_same_references(channels: int, size: Any, tmp_path: Path) -> None:
    """A folder, loaded images, pictures of Pillow and a tensor. Pillow rounds to 256 grey levels after each of up to
    three operations, and a thumbnail of two pixels to a block is their mean times √2."""
    save_images(RGB, tmp_path / "pictures")
    (tmp_path / "pictures" / "grid.png").unlink()
    kinds = {
        "folder": str(tmp_path / "pictures"),
        "loaded": load_images(str(tmp_path / "pictures")),
        "pictures": [PIL.Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in RGB],
        "tensor": to_model_range(RGB),
    }
    pipe = guided(in_channels=channels, out_channels=channels, sample_size=size)
    made = banks(pipe, kinds)
    # A folder keeps a sixth of its pictures for its test split, so that its references are fewer.
    assert len(made["folder"]) < 64 < len(made["tensor"]) == 70
    tolerance = 3 / 127.5 * (1 if size == 8 else 2**0.5)
    for one, other in (("folder", "loaded"), ("pictures", "tensor")):
        torch.testing.assert_close(made[one], made[other], atol=tolerance, rtol=0)


def test_the_pipeline_stays_as_it_is_and_the_new_one_is_guided(tmp_path: Path) -> None:
    pipe = guided()
    options = {"batch_size": 16, "num_inference_steps": 3, "output_type": "pt"}
    before = pipe(generator=torch.Generator().manual_seed(0), **options).images
    digits: dict[str, Any] = {"images": load_images("digits"), "num_references": 100}
    made = pipe.with_references(**digits)
    assert pipe.reference_bank is None and made.unet is pipe.unet and len(made.reference_bank.features) == 100
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(0), **options).images, before)
    assert (made(generator=torch.Generator().manual_seed(0), **options).images - before).abs().max() > 0.1
    made.record_guidance_field(16, num_inference_steps=3)
    assert made.guidance_field is not None and made.with_references(**digits).guidance_field is None
    assert isinstance(made.feature_extractor, DenoiserFeatureExtractor)
    network, _ = make_features()
    network.save_pretrained(tmp_path)
    assert isinstance(pipe.with_references(**digits, network=tmp_path).feature_extractor, ConvFeatureExtractor)
    assert pipe.with_references(**digits, network=network).feature_extractor is network
    assert len(make_truncated().with_references(**digits)(batch_size=16, num_inference_steps=2).images) == 16


def test_shares_of_classes_become_the_mass_of_references() -> None:
    images = load_images("digits")
    bank = guided().with_references(images, weights={"0": 0.9, "7": 0}).reference_bank
    shares = torch.zeros(10).index_add(0, bank.labels, bank.masses())
    counts = images.labels.bincount(minlength=10).float()
    counts[[0, 7]] = 0
    # The other classes keep their proportions in the remaining tenth, and there is no reference of class 7 at all.
    torch.testing.assert_close(shares, torch.tensor([0.9] + [0.0] * 9) + 0.1 * counts / counts.sum())
    assert 7 not in bank.labels and len(bank.labels) == len(images) - int((images.labels == 7).sum())
    pair = to_model_range(RGB)
    by_image = guided(in_channels=3, out_channels=3).with_references(pair, weights=[1.0] * 69 + [69.0])
    assert by_image.reference_bank.masses()[-1].item() == pytest.approx(0.5)
    assert by_image.default_guidance_scale == 2 and guided().with_references(images).default_guidance_scale == 1


def test_a_denoiser_with_classes_draws_them_by_the_shares(caplog: pytest.LogCaptureFixture) -> None:
    """The references are numbered as the pipeline numbers its classes, which is backwards here."""
    names = {label: str(9 - label) for label in range(10)}
    unet = make_unet(seed=0, num_class_embeds=11)
    pipe = FlowMatchPipeline(unet, FlowMatchEulerDiscreteScheduler(), id2label=names)
    made = pipe.with_references("digits", weights={"0": 0.9})
    assert made.classes is not None and made.classes.frequencies[9] == pytest.approx(0.9)
    made.record_guidance_field(32, torch.Generator().manual_seed(0), num_inference_steps=1)
    recorded = made.guidance_field.config
    assert (recorded.guidance_scale, recorded.num_correction_steps) == (1, 3)  # the labels have the shares
    train = load_images("digits")
    assert torch.equal(made.reference_bank.labels, 9 - train.labels)
    some = pipe.with_references(GOOD.mean(1, keepdim=True), labels=[3, 5] * 35)  # the other classes are never drawn
    assert set(some(batch_size=16, num_inference_steps=1).images and some.class_labels.tolist()) <= {9 - 3, 9 - 5}
    logging.enable_propagation()
    others = FlowMatchPipeline(unet, pipe.scheduler, id2label={label: f"class {label}" for label in range(10)})
    assert others.with_references("digits", num_references=100).reference_bank.labels is None
    assert "the pipeline has no class '0'" in caplog.text
    logging.disable_propagation()


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "alike": (GOOD[:1].expand(70, -1, -1, -1), {}, "`images` must differ from one another, got '70 copies"),
    "one": (GOOD[:1], {}, "`images` must be at least 2, got 1"),
    "uint8": (RGB, {}, "`images` must be floats in"),
    "nothing of the kind": ([1, 2], {}, "`images` must be a folder, a Hub id, loaded images, a list of PIL images"),
    "no folder": ("./nowhere", {}, "`dataset` must be"),
    "another size": (GOOD, {"network": ConvFeatureExtractor(sample_size=16)}, "`network` must take images of shape"),
    "no network": (GOOD, {"network": "./nowhere"}, "`feature_extractor` must be"),
    "labels": (GOOD, {"labels": [0, 1]}, "`labels` must be 70 integers from 0"),
    "weights": (GOOD, {"weights": [0.5, 0.5]}, "`weights` must be 70 numbers"),
    "negative weights": (GOOD, {"weights": [-1.0] * 70}, "`weights` must be at least 0, and not all 0"),
    "shares without classes": (GOOD, {"weights": {"cat": 0.9}}, "`weights` must be a number for each image"),
    "no such class": ("digits", {"weights": {"cat": 0.9}}, "`weights` must name some of 0, 1, 2"),
    "shares beyond 1": ("digits", {"weights": {"0": 0.9, "1": 0.2}}, "`weights` must be shares whose sum is 1"),
    "shares below 1": (GOOD, {"labels": [0] * 70, "weights": {"0": 0.9}}, "`weights` must be shares whose sum is 1"),
    "options of a data set": (GOOD, {"label_column": "a"}, "`label_column` must be left out for images that"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named(case: str) -> None:
    images, options, message = CASES[case]
    channels = 3 if isinstance(images, Tensor) else 1
    with pytest.raises(InputError) as caught:
        guided(in_channels=channels, out_channels=channels).with_references(images, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
