"""Latent diffusion: diffusers' own images without guidance, and guidance of decoded images through the decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from makers.draws import seeded
from makers.models import make_truncated, make_unet, make_vae
from torch import Tensor

from ot_diffusers import (
    ConvFeatureExtractor,
    FlowMatchPipeline,
    OTGuidance,
    OTGuidedDDIMPipeline,
    ReferenceBank,
    TruncatedPriorPipeline,
)
from ot_diffusers.errors import InputError
from ot_diffusers.pipelines import latents as latent_images
from ot_diffusers.sampling import load_pipeline
from ot_diffusers.transport import median_distance, sinkhorn_divergence

NAMES = {label: f"class {label}, alias {label}" for label in range(1000)}  # DiTPipeline takes label 1000 for none


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latent_unet() -> Any:
    return make_unet(UNet2DModel, seed=0, sample_size=4, in_channels=2, out_channels=2)


def unclipped() -> DDIMScheduler:
    """A prediction of x0, with which an untrained denoiser makes latents that are near 0 and can be moved."""
    return DDIMScheduler(clip_sample=False, prediction_type="sample")


def ldm() -> LDMPipeline:
    torch.manual_seed(1)
    return quiet(LDMPipeline(make_vae(VQModel, num_vq_embeddings=32), latent_unet(), unclipped()))


def dit() -> DiTPipeline:
    """With learned variances, in further channels."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
    transformer = DiTTransformer2DModel(**options, in_channels=2, out_channels=4, sample_size=4).eval()
    return quiet(DiTPipeline(transformer, make_vae(AutoencoderKL), unclipped(), NAMES))


def references(count: int = 100) -> Tensor:
    """Bright upper or lower halves, [count, 1, 8, 8] in [-1, 1]."""
    images = torch.full((count, 1, 8, 8), -0.9)
    images[: count // 2, :, :4], images[count // 2 :, :, 4:] = 0.9, 0.9
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    return (images + 0.2 * noise).clamp(-1, 1)


def bank_of(network: ConvFeatureExtractor, images: Tensor) -> ReferenceBank:
    features = network.extract(images)
    return ReferenceBank.from_features(features, feature_scale=median_distance(features), images=images)


def guiding_parts() -> tuple[ConvFeatureExtractor, ReferenceBank]:
    torch.manual_seed(2)
    network = ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=24)
    return network, bank_of(network, references())


def guided(stock: Callable[[], Any] = ldm) -> OTGuidedDDIMPipeline:
    return quiet(OTGuidedDDIMPipeline.from_pipe(stock()).with_references(references(), network=guiding_parts()[0]))


def pixels(pipeline: Any, *seeds: int, **call: Any) -> np.ndarray:
    call = {"num_inference_steps": 3, "output_type": "np", "generator": seeded(*seeds)} | call
    batch = {} if isinstance(pipeline, DiTPipeline) else {"batch_size": len(seeds)}
    return pipeline(**batch, **call).images


# --- without guidance -------------------------------------------------------------------------------------------------


def test_without_guidance_the_images_are_those_of_ldm_pipeline(tmp_path: Path) -> None:
    stock = ldm()
    ours = quiet(OTGuidedDDIMPipeline.from_pipe(stock))
    assert ours.vae is stock.vqvae and ours.image_shape == (1, 8, 8)
    expected = pixels(stock, 0, 1)
    assert np.array_equal(pixels(ours, 0, 1), expected)
    assert pixels(ours, 0, 1, output_type="latent").shape == (2, 2, 4, 4)
    stock.save_pretrained(tmp_path)
    assert np.array_equal(pixels(quiet(load_pipeline(tmp_path)), 0, 1), expected)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_without_guidance_the_images_are_those_of_dit_pipeline(scale: float) -> None:
    stock = dit()
    ours = quiet(OTGuidedDDIMPipeline.from_pipe(stock))
    expected = pixels(stock, 0, 1, class_labels=[3, 7], guidance_scale=scale)
    found = pixels(ours, 0, 1, class_labels=["alias 3, class 3", 7], class_guidance_scale=scale)
    # diffusers multiplies latents by the rounded inverse of the scaling factor.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert ours.nfe == (3 if scale == 1 else 6) and ours.classes.null_label == 1000


def test_a_dit_without_names_has_a_null_label() -> None:
    stock = dit()
    classes = OTGuidedDDIMPipeline(stock.transformer, stock.scheduler, vae=stock.vae).classes
    assert classes is not None and (len(classes), classes.null_label) == (1000, 1000)


def test_flow_matching_offloading_and_half_precision_decode_as_well() -> None:
    pipe = quiet(FlowMatchPipeline.from_pipe(ldm(), scheduler=FlowMatchEulerDiscreteScheduler()))
    expected = pixels(pipe, 0)
    with torch.no_grad():
        latents = pixels(pipe, 0, output_type="latent")
        images = latent_images.decode(pipe.vae, latents).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(expected, (images / 2 + 0.5).clamp(0, 1))
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(pixels(pipe, 0), expected)
    half = guided().to(torch.bfloat16)
    latents = half(16, seeded(0)[0], num_inference_steps=2, output_type="latent").images
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all() and half.vae.dtype == torch.bfloat16


def test_latents_are_scaled_shifted_and_normalised_by_channel() -> None:
    vae = make_vae(
        AutoencoderKL, scaling_factor=0.5, shift_factor=0.25, latents_mean=[1.0, 2.0], latents_std=[3.0, 4.0]
    )
    given = torch.randn(3, 2, 4, 4)
    scale, offset = torch.tensor([6.0, 8.0]).view(1, 2, 1, 1), torch.tensor([1.25, 2.25]).view(1, 2, 1, 1)
    with torch.no_grad():
        # Rounding of float32.
        torch.testing.assert_close(latent_images.decode(vae, given), vae.decode(scale * given + offset).sample)


# --- the step ---------------------------------------------------------------------------------------------------------


def orthogonal(size: int = 64) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(3)))[0]


def correct_latents(latents: Tensor, matrix: Tensor, **options: Any) -> Tensor:
    """Latents corrected through the linear decoder of this matrix."""
    guidance = OTGuidance(*guiding_parts(), decode=lambda z: (z.flatten(1) @ matrix).view(-1, 1, 8, 8), **options)
    return guidance.correct(latents)


@pytest.mark.parametrize("unit", [1.0, 50.0, 0.01])
def test_through_an_orthogonal_decoder_the_correction_is_that_of_pixels(unit: float) -> None:
    """Also in any unit of the latents. Steps are so short that neither pixels nor latents meet a bound."""
    images = 1.2 * torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(4)) - 0.6
    options: dict[str, Any] = {"guidance_scale": 0.05, "num_correction_steps": 2}
    expected = OTGuidance(*guiding_parts(), **options).correct(images)
    latents = unit * (images.flatten(1) @ orthogonal().T).view(32, 4, 4, 4)
    corrected = correct_latents(latents, orthogonal() / unit, **options)
    found = (corrected.flatten(1) @ orthogonal() / unit).view_as(images)
    assert (expected - images).abs().max() > 0.05
    # Float32 through two products with 64 terms; the transport problem of the second step magnifies it.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_first_step_makes_the_progress_of_pixels_through_any_linear_decoder() -> None:
    """With thumbnails alone ψ is linear, so that the displacement d loses ⟨d, ∂ψ⟩ = −η s'² ‖g‖² in both."""
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    latents = 0.05 * torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(6))
    images = (latents.flatten(1) @ matrix).view(-1, 1, 8, 8)
    options: dict[str, Any] = {"guidance_scale": 0.02, "num_correction_steps": 1, "pixel_weight": 1e4}
    in_pixels = OTGuidance(*guiding_parts(), **options).correct(images) - images  # along −g
    corrected = correct_latents(latents, matrix, **options)
    moved = (corrected.flatten(1) @ matrix).view_as(images) - images
    progress, expected = ((step * in_pixels).flatten(1).sum(1) for step in (moved, in_pixels))
    # Differences of float32 images: 1e-7 of 1 in steps of .01.
    torch.testing.assert_close(progress, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("step_rule", ["displacement", "adam"])
def test_parts_of_any_size_give_the_same_latents(step_rule: str) -> None:
    decoded: list[int] = []
    vae, latents = make_vae(AutoencoderKL), torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(7))

    def decode(part: Tensor) -> Tensor:
        decoded.append(len(part))
        return vae.decode(part).sample

    options: dict[str, Any] = {"decode": decode, "step_rule": step_rule, "num_correction_steps": 2}
    whole = OTGuidance(*guiding_parts(), **options).correct(latents)
    in_parts = OTGuidance(*guiding_parts(), decode_batch_size=4, **options).correct(latents)
    assert decoded == [10] * 4 + [4, 4, 2] * 4 and (whole - latents).abs().max() > 1e-3
    # Convolutions may sum in another order in other batches, which Adam magnifies where a gradient is near 0.
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-3)


def test_what_the_decoder_does_not_show_is_left_alone() -> None:
    latents = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(8))
    matrix = torch.zeros(16, 64)
    assert torch.equal(correct_latents(latents, matrix), latents)
    matrix[0, :] = 1e-6  # a step without bound would take the latent a million times too far
    moved = (correct_latents(latents, matrix, num_correction_steps=1) - latents).flatten(1).norm(dim=1)
    longest = 0.25 * latents.flatten(1).norm(dim=1).clamp(min=4)
    torch.testing.assert_close(moved, longest)  # rounding of float32


# --- with guidance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [ldm, dit])
def test_guidance_brings_decoded_images_nearer_to_the_references(stock: Callable[[], Any]) -> None:
    """The references are images that the untrained decoder can make. Its codebook would make all latents alike."""
    pipe, generator = guided(stock), torch.Generator().manual_seed(1)

    @torch.no_grad()
    def distance(latents: Tensor) -> float:
        return sinkhorn_divergence(decoded(latents), wanted, blur=0.5).item()

    @torch.no_grad()
    def decoded(latents: Tensor) -> Tensor:
        return latent_images.decode(pipe.vae, latents, quantize=False).clamp(-1, 1).flatten(1)

    wanted = decoded(torch.randn(100, 2, 4, 4, generator=generator) + 1)
    pipe.register_modules(reference_bank=bank_of(pipe.feature_extractor, wanted.view(100, 1, 8, 8)))
    call: dict[str, Any] = {"num_inference_steps": 3, "num_correction_steps": 10, "output_type": "latent"}
    plain, moved = (distance(pipe(32, seeded(0)[0], guidance_scale=scale, **call).images) for scale in (0, 1))
    floor = distance(torch.randn(32, 2, 4, 4, generator=generator) + 1)  # of as many images of the same law
    assert moved - floor < 0.3 * (plain - floor)


def test_a_latent_pipeline_with_its_field_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = guided()
    field = pipe.record_guidance_field(16, seeded(9)[0], num_inference_steps=3)
    assert field.config.feature_dim == 24 + 64
    together = pixels(pipe, 1, 2)
    np.testing.assert_allclose(pixels(pipe, 2), together[1:], rtol=0, atol=1e-4)  # convolutions in another batch
    assert np.abs(together - pixels(pipe, 1, 2, guidance_scale=0)).max() > 0.001
    pipe.save_pretrained(tmp_path)
    for kind in (OTGuidedDDIMPipeline, DiffusionPipeline):
        loaded = quiet(kind.from_pretrained(tmp_path, disable_mmap=True))
        assert type(loaded) is OTGuidedDDIMPipeline and type(loaded.vae) is VQModel
        assert np.array_equal(pixels(loaded, 1, 2), together)
    # diffusers alone takes the parts by its own name for the VAE.
    plain = quiet(LDMPipeline.from_pretrained(tmp_path, vqvae=pipe.vae, disable_mmap=True))
    assert np.array_equal(pixels(plain, 1, 2), pixels(pipe, 1, 2, guidance_scale=0))


def test_latents_are_bounded_only_as_the_scheduler_bounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, largest = guided(), []
    monkeypatch.setattr(OTGuidance, "correct", lambda self, x, *rest: largest.append(x.abs().max().item()) or x)
    noise = {"latents": 100 * torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0)), "batch_size": 16}
    for options, bound in (({}, torch.inf), ({"clip_sample": True, "clip_sample_range": 2.0}, 2.0)):
        largest.clear()
        pipe.scheduler = DDIMScheduler(**{"clip_sample": False, **options})
        pipe(num_inference_steps=1, num_guidance_steps=1, output_type="latent", **noise)
        assert largest[0] <= bound and (bound < torch.inf or largest[0] > 100)


# --- bad input --------------------------------------------------------------------------------------------------------


class TextToImage(DiffusionPipeline):
    """The parts of a text-conditioned pipeline."""

    def __init__(self, text_encoder: Any, vae: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, vae=vae, unet=unet, scheduler=scheduler)


def test_pipelines_and_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    stock, network_and_bank = ldm(), guiding_parts()
    take = OTGuidedDDIMPipeline.from_pipe
    text = TextToImage(torch.nn.Linear(1, 1), stock.vqvae, stock.unet, stock.scheduler)
    stock.save_pretrained(tmp_path / "ldm")
    reads_text = "`pipeline` must be unconditional or conditioned on classes, not on text, got "
    (tmp_path / "text").mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "text" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: take(stock, vae=None), "`vae` must be given for the latents of a LDMPipeline, got None"),
        (lambda: take(take(stock), vae=None), "`vae` must be given for the latents of a OTGuidedDDIMPipeline, got N"),
        (
            lambda: take(stock, vae=make_vae(AutoencoderKL, latent_channels=4)),
            "`vae` must have latents of 2 channels, as the denoiser has, got 4",
        ),
        (
            lambda: take(stock).with_references(references()),
            "`network` must be given for a latent model, whose denoiser sees no images, got None",
        ),
        (lambda: take(text), f"{reads_text}'TextToImage'"),
        (lambda: OTGuidedDDIMPipeline.from_pretrained(tmp_path / "text"), f"{reads_text}'StableDiffusionPipeline'"),
        (lambda: load_pipeline(tmp_path / "text"), f"{reads_text}'StableDiffusionPipeline'"),
        (
            lambda: OTGuidedDDIMPipeline.from_pretrained(tmp_path / "ldm"),
            "`pipeline` must be loaded as it is and given to OTGuidedDDIMPipeline.from_pipe, got 'LDMPipeline'",
        ),
        (
            lambda: TruncatedPriorPipeline.from_pipe(stock, prior=make_truncated().prior),
            "`pipeline` must generate pixels, not latents, for a TruncatedPriorPipeline, got 'LDMPipeline'",
        ),
        (
            lambda: pixels(OTGuidedDDIMPipeline(stock.unet, stock.scheduler, *network_and_bank), 0),
            r"`feature_extractor` must take images of shape \(2, 4, 4\), as the pipeline generates them \(latents need",
        ),
        (lambda: OTGuidance(*network_and_bank, decode_batch_size=0), "`decode_batch_size` must be at least 1, got 0"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=f"^{message}"):
            call()
