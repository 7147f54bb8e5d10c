"""The denoiser's own features: those that it computes itself, for every family, saved with a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from makers.models import make_unet

from ot_diffusers import DenoiserFeatureExtractor, OTGuidedDDIMPipeline
from ot_diffusers.errors import InputError
from ot_diffusers.features import load_feature_extractor
from ot_diffusers.models.denoiser_extractor import pooled
from ot_diffusers.models.reference_bank import ReferenceBank
from ot_diffusers.sampling import load_pipeline

IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
UNETS: dict[str, dict[str, Any]] = {
    "plain": {"block_out_channels": (8, 16)},
    "with classes": {"num_class_embeds": 4},
    "centred, 8 by 16": {"center_input_sample": True, "sample_size": (8, 16)},
    "skips": {
        "block_out_channels": (32, 32),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "in_channels": 3,
        "out_channels": 3,
        "time_embedding_type": "fourier",
        "norm_num_groups": 32,
    },
    "without a mid block": {"mid_block_type": None},
}


@pytest.mark.parametrize("name", UNETS)
def test_features_are_what_the_denoiser_computes(name: str) -> None:
    unet = make_unet(seed=1, **UNETS[name])
    trainable = [parameter.requires_grad for parameter in unet.parameters()]
    scheduler = FlowMatchEulerDiscreteScheduler() if name == "skips" else DDIMScheduler()  # log(t) needs t > 0
    network = DenoiserFeatureExtractor.from_denoiser(unet, scheduler)
    assert network.image_shape is not None
    images = torch.rand(2, *network.image_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seen: list[Any] = []
    innermost = unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block
    hook = innermost.register_forward_hook(lambda module, inputs, output: seen.append(output))
    labels = {"class_labels": torch.tensor([3, 3])} if "num_class_embeds" in UNETS[name] else {}
    with torch.no_grad():
        unet(images * network.config.image_scale, torch.tensor(network.config.timestep), **labels)
    hook.remove()
    expected = pooled(seen[0][0] if isinstance(seen[0], tuple) else seen[0])
    # The same computation, after one rounding of the images to [0, 1] and back.
    torch.testing.assert_close(network.extract(images), expected, atol=1e-4, rtol=1e-4)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(network.extract(images).square().sum(), images)
    assert (gradient != 0).float().mean() > 0.9
    assert [parameter.requires_grad for parameter in unet.parameters()] == trainable  # the denoiser is left as it was


@pytest.mark.parametrize(
    ("scheduler", "timestep", "scale"),
    [
        # 50 steps of 1,000: leading spacing ends at 0, with ᾱ = 1 − .0001; trailing at 19.
        (DDIMScheduler(), 0.0, 0.9999**0.5),
        (DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"), 19.0, None),
        # σ = 1/50, α = 1 − σ, and t = 1,000 σ.
        (FlowMatchEulerDiscreteScheduler(), 20.0, 0.98),
        # c_noise = log(σ)/4, and images in units of their deviation .5, with the noise scaled to unit variance.
        (EDMEulerScheduler(), 0.25 * torch.tensor(0.002).log().item(), 2 / (1 + 0.004**2) ** 0.5),
    ],
)
def test_the_denoiser_is_asked_at_its_lowest_noise(scheduler: Any, timestep: float, scale: float | None) -> None:
    config = DenoiserFeatureExtractor.from_denoiser(make_unet(seed=0), scheduler).config
    assert config.timestep == pytest.approx(timestep, rel=1e-3)
    if scale is not None:
        assert config.image_scale == pytest.approx(scale, rel=1e-5)


def test_a_pipeline_keeps_them_without_the_expanding_half(tmp_path: Path) -> None:
    unet = make_unet(seed=1, block_out_channels=(8, 16))
    network = DenoiserFeatureExtractor.from_denoiser(unet, DDIMScheduler())
    bank = ReferenceBank.from_features(network.extract(IMAGES), feature_scale=0.5, images=IMAGES)
    pipe = OTGuidedDDIMPipeline(unet, DDIMScheduler(), network, bank)
    pipe.save_pretrained(tmp_path)
    loaded: Any = load_pipeline(tmp_path)
    options = {"batch_size": 16, "num_inference_steps": 3, "output_type": "pt"}
    guided, plain = (
        one(generator=torch.Generator().manual_seed(0), **options, **more).images
        for one, more in ((pipe, {}), (loaded, {"guidance_scale": 0}))
    )
    assert torch.equal(loaded(generator=torch.Generator().manual_seed(0), **options).images, guided)
    assert (guided - plain).abs().max() > 0.1
    stored = sum(parameter.numel() for parameter in network.parameters())
    assert stored < 0.7 * sum(parameter.numel() for parameter in unet.parameters())
    torch.testing.assert_close(load_feature_extractor(tmp_path).extract(IMAGES), network.extract(IMAGES))


def test_bad_input_is_named() -> None:
    network = DenoiserFeatureExtractor.from_denoiser(make_unet(), DDIMScheduler())
    with pytest.raises(InputError, match=r"`images` must have shape \[B, 1, 8, 8\], got \(2, 3, 8, 8\)"):
        network.extract(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="`unet` must be a UNet2DModel, got 'Linear'"):
        DenoiserFeatureExtractor.from_denoiser(torch.nn.Linear(1, 1), DDIMScheduler())  # type: ignore[arg-type]
