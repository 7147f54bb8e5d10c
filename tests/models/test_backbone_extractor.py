"""Backbones of transformers as feature networks: their features are unchanged, also in a saved guided pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler
from makers.models import make_unet

from ot_diffusers import BackboneFeatureExtractor, OTGuidedDDIMPipeline
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.features import check_trained_on, load_feature_extractor, make_reference_bank
from ot_diffusers.images import to_unit_range
from ot_diffusers.losses.priors import network_features
from ot_diffusers.sampling import load_pipeline

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIDE = 32


@pytest.fixture(params=["dinov2", "clip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a tiny random backbone and its image processor, saved by transformers."""
    torch.manual_seed(0)
    vision = SMALL | {"image_size": SIDE, "patch_size": 8}
    if request.param == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
    else:
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=SMALL, vision_config=vision))
    model.save_pretrained(tmp_path / "backbone")
    processor = transformers.CLIPImageProcessor if request.param == "clip" else transformers.BitImageProcessor
    size = {"shortest_edge": SIDE, "height": SIDE, "width": SIDE}
    processor(
        size={"shortest_edge": SIDE}, crop_size={name: size[name] for name in ("height", "width")}
    ).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_features_are_those_of_transformers(folder: Path) -> None:
    images = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    network = BackboneFeatureExtractor.from_transformers(str(folder))
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    steps = {"do_resize": False, "do_center_crop": False, "do_rescale": False}
    pixels = processor(np.asarray(to_unit_range(images)), **steps, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output
    # Without resizing, only the normalisation causes rounding errors.
    torch.testing.assert_close(network.extract(images), expected, atol=1e-5, rtol=1e-5)


def test_a_pipeline_is_guided_by_a_backbone_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    images = load_images("digits", "validation")
    network = BackboneFeatureExtractor.from_transformers(str(folder))
    bank = make_reference_bank(network, images, num_samples=50)
    pipeline = OTGuidedDDIMPipeline(make_unet(), DDIMScheduler(), network, bank)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "guided")

    def pixels(pipe: OTGuidedDDIMPipeline, **call: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=16, num_inference_steps=2, generator=generator, output_type="pt", **call).images

    assert not torch.equal(pixels(pipeline), pixels(pipeline, guidance_scale=0))
    folder.rename(folder.with_name("gone"))  # the saved pipeline must not need the original folder
    loaded = load_pipeline(tmp_path / "guided")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.feature_extractor) is BackboneFeatureExtractor
    # Memory-mapped weights may be aligned differently, which changes the last bit of sums.
    torch.testing.assert_close(pixels(loaded), pixels(pipeline), atol=1e-3, rtol=0)


def test_the_training_scripts_take_a_backbone_by_its_folder_or_id(folder: Path) -> None:
    network, images = load_feature_extractor(str(folder)), load_images("digits", "validation")
    check_trained_on(network, images)
    assert torch.equal(
        network.extract(images.fetch(torch.arange(2))),
        BackboneFeatureExtractor.from_transformers(str(folder)).extract(images.fetch(torch.arange(2))),
    )
    (level,) = network_features(network, images.fetch(torch.arange(2)).requires_grad_())
    assert torch.equal(level.detach(), network.extract(images.fetch(torch.arange(2)))) and level.requires_grad


def test_a_folder_without_a_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`backbone` must be a folder or Hub id with a vision backbone"):
        BackboneFeatureExtractor.from_transformers(str(tmp_path))


def test_a_damaged_backbone_is_refused_in_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="`backbone` must be a folder or Hub id with a vision backbone") as refusal:
        BackboneFeatureExtractor.from_transformers(str(folder))
    assert "\n" not in str(refusal.value)
