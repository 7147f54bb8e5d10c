"""The guided pipeline: diffusers' own where it must be, and at every scheduler the corrected x̂0 is the one it uses."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from makers.draws import seeded as _seeded
from makers.models import make_unet

from ot_diffusers import ConvFeatureExtractor, OTGuidedDDIMPipeline, ReferenceBank
from ot_diffusers.errors import InputError
from ot_diffusers.guidance import OTGuidance
from ot_diffusers.pipelines.pipeline_ot_guided_ddim import ORIGINAL_GUIDANCE
from ot_diffusers.transport import median_distance, sinkhorn_divergence

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddim unclipped": functools.partial(DDIMScheduler, clip_sample=False),
    "ddim trailing": functools.partial(DDIMScheduler, timestep_spacing="trailing"),
    "ddpm": DDPMScheduler,
    "ddpm unclipped": functools.partial(DDPMScheduler, clip_sample=False),
    "dpm-solver++": DPMSolverMultistepScheduler,
    "dpm-solver++ karras": functools.partial(DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "unipc": UniPCMultistepScheduler,
    "unipc karras": functools.partial(UniPCMultistepScheduler, use_karras_sigmas=True),
}


_unet = functools.partial(make_unet, seed=0, block_out_channels=(8, 16))


def _references(count: int = 100) -> torch.Tensor:
    """Bright upper or lower halves, [count, 1, 8, 8] in [-1, 1]."""
    images = torch.full((count, 1, 8, 8), -0.9)
    images[: count // 2, :, :4], images[count // 2 :, :, 4:] = 0.9, 0.9
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    return (images + 0.2 * noise).clamp(-1, 1)


def _parts(with_images: bool = False) -> dict[str, torch.nn.Module]:
    torch.manual_seed(1)
    network = ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=24)
    features = network.extract(_references())
    images = _references() if with_images else None
    bank = ReferenceBank.from_features(features, feature_scale=median_distance(features), images=images)
    return {"feature_extractor": network, "reference_bank": bank}


def _pipeline(scheduler=None, unet=None, parts: bool = True) -> OTGuidedDDIMPipeline:
    pipe = OTGuidedDDIMPipeline(unet or _unet(), scheduler or DDIMScheduler(), **(_parts() if parts else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _images(pipe: OTGuidedDDIMPipeline, **options) -> np.ndarray:
    options = {"batch_size": 4, "num_inference_steps": 5, "generator": _seeded(0)[0], "output_type": "np", **options}
    return pipe(**options).images


# --- without guidance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("per_image", [False, True])
def test_scale_zero_is_ddim_bit_for_bit(steps, eta, per_image):
    unet, scheduler = _unet(), DDIMScheduler()
    stock = DDIMPipeline(unet, scheduler)
    stock.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": steps, "eta": eta, "output_type": "np"}
    ours, theirs = ((_seeded(3, 4) if per_image else _seeded(3)[0]) for _ in range(2))
    found = _pipeline(scheduler, unet)(generator=ours, guidance_scale=0, **options).images
    assert np.array_equal(found, stock(generator=theirs, **options).images)


def test_without_the_parts_sampling_is_plain_by_default():
    assert np.array_equal(_images(_pipeline(parts=False)), _images(_pipeline(), guidance_scale=0))


def test_with_the_parts_guidance_is_on_by_default():
    assert np.array_equal(_images(_pipeline()), _images(_pipeline(), guidance_scale=1.0))
    assert not np.array_equal(_images(_pipeline()), _images(_pipeline(), guidance_scale=0))


def test_an_image_is_the_same_in_any_batch_without_guidance():
    together = _images(_pipeline(), generator=_seeded(0, 1, 2, 3), guidance_scale=0, eta=1.0)
    alone = _images(_pipeline(), generator=_seeded(2), batch_size=1, guidance_scale=0, eta=1.0)
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)  # convolutions may sum in another order


# --- with guidance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_scheduler_uses_the_corrected_image(name, prediction_type, monkeypatch):
    scheduler = SCHEDULERS[name](prediction_type=prediction_type)
    corrected, used = [], []

    def correct(self, images, timestep, class_labels):
        result = original_correct(self, images, timestep)
        corrected.append(result)
        return result

    def convert(model_output, *args, **kwargs):  # what multistep solvers turn a model output into: x̂0
        result = original_convert(model_output, *args, **kwargs)
        used.append(result)
        return result

    def step(model_output, *args, **kwargs):
        result = original_step(model_output, *args, **kwargs)
        used.append(result.pred_original_sample)
        return result

    original_correct = OTGuidance.correct
    monkeypatch.setattr(OTGuidance, "correct", correct)
    if hasattr(scheduler, "convert_model_output"):
        original_convert = scheduler.convert_model_output
        monkeypatch.setattr(scheduler, "convert_model_output", convert)
    else:
        original_step = scheduler.step
        # The pipeline reads the signature of `step` for eta and generator.
        monkeypatch.setattr(scheduler, "step", functools.wraps(original_step)(step))
    images = _images(_pipeline(scheduler), num_inference_steps=5, num_guidance_steps=5)
    assert np.isfinite(images).all() and len(corrected) == len(used) == 5
    for wanted, found in zip(corrected, used, strict=True):
        # ε is divided by α, .006 at the first step, so that float32's 1e-7 of x_t becomes 2e-5.
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++", "unipc"])
def test_the_last_guided_step_ends_in_the_corrected_image(name, monkeypatch):
    # At the last step of these schedules x_0 is x̂0 but for the noise that is left at t = 0.
    pipe = _pipeline(SCHEDULERS[name]())
    wanted, correct = [], OTGuidance.correct
    monkeypatch.setattr(OTGuidance, "correct", lambda *args: wanted.append(correct(*args)) or wanted[-1])
    latents = _images(pipe, num_inference_steps=6, num_guidance_steps=6, output_type="latent")
    assert (latents - wanted[-1]).abs().max() < 0.05


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++", "unipc"])
def test_guidance_brings_the_images_nearer_to_the_references(name):
    # An untrained network that predicts ε ends in saturated pixels; one that predicts x̂0 makes grey images to improve.
    pipe = _pipeline(SCHEDULERS[name](prediction_type="sample"))
    network, bank = pipe.feature_extractor, pipe.reference_bank

    def divergence(**options) -> float:
        images = _images(pipe, batch_size=32, num_inference_steps=10, output_type="latent", **options)
        return sinkhorn_divergence(
            network.extract(images) / bank.config.feature_scale, bank.references(), blur=0.3
        ).item()

    plain, guided = divergence(guidance_scale=0), divergence(guidance_scale=2.0, num_guidance_steps=10)
    assert guided < 0.5 * plain


def test_the_source_studys_preset_runs():
    images = _images(_pipeline(), **{**ORIGINAL_GUIDANCE, "num_inference_steps": 12})
    assert np.isfinite(images).all() and not np.array_equal(
        images, _images(_pipeline(), num_inference_steps=12, guidance_scale=0)
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, range(0, 23)),  # all but the last 8%
        ({"guidance_start_step": 10}, range(10, 23)),
        ({"num_guidance_steps": 4}, range(0, 4)),
        ({"guidance_start_step": 20, "num_guidance_steps": 99}, range(20, 25)),
        ({"num_guidance_steps": 0}, range(0)),
        ({"guidance_start_step": 30}, range(0)),
    ],
)
def test_the_interval_of_guided_steps(options, expected, monkeypatch):
    pipe, steps, guided = _pipeline(), [], []
    original = OTGuidance.correct
    monkeypatch.setattr(OTGuidance, "correct", lambda *arguments: guided.append(len(steps)) or original(*arguments))
    _images(
        pipe,
        num_inference_steps=25,
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(step),
        **options,
    )
    assert steps == list(range(25)) and guided == list(expected)
    assert pipe.num_timesteps == 25


@pytest.mark.parametrize("steps, expected", [(1, 1), (2, 1), (3, 2), (4, 3), (8, 7), (50, 46)])
def test_short_chains_leave_their_last_step_to_the_model(steps, expected):
    """With guidance that cannot see the pixels; a chain of one step has no other to guide."""
    pipe = OTGuidedDDIMPipeline(_unet(), DDIMScheduler(timestep_spacing="trailing"), **_parts())
    pipe.set_progress_bar_config(disable=True)
    field = pipe.record_guidance_field(16, num_inference_steps=steps, num_correction_steps=1)
    assert len(field.config.timesteps) == expected and field.config.timesteps[0] == 999


@pytest.mark.slow
@pytest.mark.parametrize("side, expected", [(8, 10), (16, 10), (20, 9), (32, 9)])
def test_the_model_cleans_up_where_thumbnails_are_coarse(side, expected):
    """Thumbnails are 8×8: of more than 2×2 pixels each, and the last 8% of the chain are not guided."""
    images = torch.nn.functional.interpolate(_references(), size=side)
    network = ConvFeatureExtractor(sample_size=side, block_out_channels=(8, 16), feature_dim=32)
    features = network.extract(images)
    bank = ReferenceBank.from_features(features, feature_scale=median_distance(features), images=images)
    pipe = OTGuidedDDIMPipeline(_unet(sample_size=side), DDIMScheduler(), network, bank)
    pipe.set_progress_bar_config(disable=True)
    chosen = _images(pipe, num_inference_steps=10)
    assert np.array_equal(chosen, _images(pipe, num_inference_steps=10, num_guidance_steps=expected))
    assert not np.array_equal(chosen, _images(pipe, num_inference_steps=10, num_guidance_steps=expected - 1))


# --- saving, devices, dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [False, True])
def test_a_saved_pipeline_draws_the_same_images(parts, tmp_path):
    pipe = _pipeline(parts=parts)
    pipe.save_pretrained(tmp_path)
    # Memory-mapped weights are aligned differently and shift results in the last bit.
    loaded = OTGuidedDDIMPipeline.from_pretrained(tmp_path, disable_mmap=True)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(_images(loaded), _images(pipe))
    assert (loaded.feature_extractor is not None) == parts
    assert not any(p.requires_grad for name in _parts() if parts for p in getattr(loaded, name).parameters())
    stock = DDIMPipeline.from_pretrained(tmp_path, disable_mmap=True)  # the model opens in plain diffusers as well
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(_images(stock), _images(pipe, guidance_scale=0))


def test_parts_can_be_added_to_a_plain_pipeline(tmp_path):
    DDIMPipeline(_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    loaded = OTGuidedDDIMPipeline.from_pretrained(tmp_path, disable_mmap=True, **_parts())
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(_images(loaded), _images(_pipeline()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    pipe = _pipeline().to(dtype)
    latents = _images(pipe, output_type="latent")
    assert latents.dtype == dtype and latents.isfinite().all()
    assert all(model.dtype == dtype for model in (pipe.unet, pipe.feature_extractor, pipe.reference_bank))
    # Neither the noise nor the network is that of float32 exactly, but the images are alike.
    expected = _images(_pipeline(), output_type="pt", generator=_seeded(0)[0])
    found = _images(pipe, output_type="pt").float()
    assert found.min() >= 0 and found.max() <= 1 and found.shape == expected.shape


def test_offloading():
    pipe = _pipeline()
    expected = _images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(_images(pipe), expected)
    assert np.array_equal(_images(pipe), expected)  # the hooks are in place again


def test_components_are_left_as_they_were():
    pipe = _pipeline()
    pipe.unet.train()
    for parameter in pipe.feature_extractor.parameters():
        parameter.requires_grad_(True)
    models = [pipe.unet, pipe.feature_extractor, pipe.reference_bank]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    flags = [[p.requires_grad for p in model.parameters()] for model in models]
    config = dict(pipe.scheduler.config)
    _images(pipe)
    assert pipe.unet.training and not pipe.feature_extractor.training
    assert [[p.requires_grad for p in model.parameters()] for model in models] == flags
    assert all(p.grad is None for model in models for p in model.parameters())
    assert all(
        torch.equal(value, old[name])
        for model, old in zip(models, before, strict=True)
        for name, value in model.state_dict().items()
    )
    assert dict(pipe.scheduler.config) == config


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_graph_is_left_whatever_the_callers_mode(mode):
    expected = _images(_pipeline(), output_type="pt")
    pipe = _pipeline()
    with mode():
        images = _images(pipe, output_type="pt")
    assert not images.requires_grad and images.grad_fn is None
    assert torch.equal(images, expected)


# --- calling conventions --------------------------------------------------------------------------------------------


def test_output_types_show_the_same_images():
    pipe = _pipeline()
    pt, arrays, pil = (_images(pipe, output_type=name) for name in ("pt", "np", "pil"))
    latents = _images(pipe, output_type="latent")
    assert torch.equal(pt, (latents / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), arrays)
    for image, array in zip(pil, arrays, strict=True):
        assert image.mode == "L" and image.size == (8, 8)
        assert np.array_equal(np.asarray(image), (array[..., 0] * 255).round().astype("uint8"))
    (images,) = pipe(batch_size=4, num_inference_steps=5, generator=_seeded(0)[0], output_type="np", return_dict=False)
    assert np.array_equal(images, arrays)


def test_colour_and_oblong_images():
    unet = _unet(sample_size=(8, 16), in_channels=3, out_channels=3)
    assert _images(_pipeline(unet=unet, parts=False)).shape == (4, 8, 16, 3)


def test_a_callback_sees_each_step_and_can_replace_the_latents():
    pipe, seen = _pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape))
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if step == 4 else None

    images = _images(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])
    assert seen == [(step, int(t), (4, 1, 8, 8)) for step, t in enumerate(pipe.scheduler.timesteps)]
    assert (images == 0.75).all()


def test_a_callback_can_change_the_strength():
    def stop(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0 if step == 1 else pipe._guidance_scale
        return tensors

    pipe = _pipeline()
    assert np.array_equal(_images(pipe, callback_on_step_end=stop), _images(pipe, num_guidance_steps=2))


def test_a_small_batch_is_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr("ot_diffusers.pipelines.guided.logger.warning", warnings.append)
    _images(_pipeline(), batch_size=2)
    assert len(warnings) == 1 and "2 images are too few" in warnings[0]
    _images(_pipeline(), batch_size=2, guidance_scale=0)
    _images(_pipeline(), batch_size=16)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": "4"}, "`batch_size` must be an integer, got '4'"),
        ({"batch_size": 2.0}, r"`batch_size` must be an integer, got 2\.0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` must be from 1 to 1000, got 1001"),
        ({"num_inference_steps": "5"}, "`num_inference_steps` must be an integer, got '5'"),
        ({"num_inference_steps": 2.5}, r"`num_inference_steps` must be an integer, got 2\.5"),
        ({"eta": 1.5}, r"`eta` must lie in \[0, 1\], got 1.5"),
        ({"eta": "high"}, r"`eta` must lie in \[0, 1\], got 'high'"),
        ({"eta": float("nan")}, r"`eta` must lie in \[0, 1\], got nan"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a finite number, got inf"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, got nan"),
        ({"guidance_scale": "strong"}, "`guidance_scale` must be a finite number, got 'strong'"),
        ({"num_guidance_steps": 2.5}, r"`num_guidance_steps` must be an integer, got 2\.5"),
        ({"num_correction_steps": "3"}, "`num_correction_steps` must be an integer, got '3'"),
        ({"blur": float("inf")}, "`blur` must be a finite number, got inf"),
        ({"pixel_weight": float("nan")}, "`pixel_weight` must be a finite number, got nan"),
        ({"guidance_scale": -0.5}, "`guidance_scale` must be at least 0, got -0.5"),
        ({"num_guidance_steps": -1}, "`num_guidance_steps` must be at least 0, got -1"),
        ({"guidance_start_step": -1}, "`guidance_start_step` must be at least 0, got -1"),
        ({"num_correction_steps": 0}, "`num_correction_steps` must be at least 1, got 0"),
        ({"blur": 0.0}, "`blur` must be a positive length, got 0.0"),
        ({"output_type": "jpeg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"generator": _seeded(1, 2)}, "`generator` must be one, or one for each of 4 images, got 2"),
        ({"generator": 0}, "`generator` must be a torch.Generator, or one for each image, got 'int'"),
        ({"generator": [0, 1, 2, 3]}, "`generator` must be a torch.Generator, or one for each image, got 'int'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs` must be among"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        _images(_pipeline(), **options)


def test_guidance_needs_its_parts():
    with pytest.raises(InputError, match="`guidance_scale` must be 0 for a pipeline without"):
        _images(_pipeline(parts=False), guidance_scale=0.5)
    with pytest.raises(InputError, match="`reference_bank` must hold features of width 24, got 7"):
        OTGuidedDDIMPipeline(
            _unet(), DDIMScheduler(), _parts()["feature_extractor"], ReferenceBank.from_features(torch.randn(9, 7))
        )


# --- a guidance field -----------------------------------------------------------------------------------------------


def _with_field(steps: int = 5, **options) -> OTGuidedDDIMPipeline:
    pipe = _pipeline()
    pipe.record_guidance_field(32, _seeded(9)[0], num_inference_steps=steps, **options)
    return pipe


def test_with_a_field_an_image_is_the_same_in_any_batch():
    pipe = _with_field()
    together = _images(pipe, generator=_seeded(1, 2, 3, 4))
    alone = np.concatenate([_images(pipe, batch_size=1, generator=_seeded(seed)) for seed in (1, 2, 3, 4)])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-4)
    plain = _images(pipe, generator=_seeded(1, 2, 3, 4), guidance_scale=0)
    assert np.abs(together - plain).max() > 0.01


def test_a_field_guides_the_recorded_steps():
    pipe = _with_field(num_guidance_steps=2, guidance_start_step=1, num_correction_steps=1, blur=None)
    assert pipe.guidance_field.config.blur == 0.6  # that of 100 references
    assert pipe.guidance_field.config.timesteps == (600, 400)
    assert pipe.guidance_field.features.shape == (2, 1, 32, 24)


def test_a_field_is_saved_with_its_pipeline(tmp_path):
    pipe = _with_field()
    pipe.save_pretrained(tmp_path)
    again = OTGuidedDDIMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(_images(again), _images(pipe))


def test_the_joint_batch_is_there_beside_the_field():
    pipe = _with_field()
    np.testing.assert_array_equal(_images(pipe, joint_batch=True), _images(_pipeline()))


def test_a_field_guides_chains_of_other_lengths_at_the_nearest_recorded_level(monkeypatch):
    pipe, moved, correct = _with_field(10, num_guidance_steps=8), [], OTGuidance.correct
    assert tuple(pipe.guidance_field.config.timesteps) == tuple(range(900, 100, -100))
    monkeypatch.setattr(OTGuidance, "correct", lambda *given: moved.append(correct(*given) is not given[1]) or given[1])
    for steps, expected in ((4, [True, True, True, False]), (2, [True, False]), (10, [True] * 8 + [False] * 2)):
        moved.clear()
        _images(pipe, num_inference_steps=steps)
        assert moved == expected


def test_a_field_refuses_other_guidance():
    with pytest.raises(InputError, match=r"`blur` must be 0\.6, as in the recording of the guidance field, got 0\.5"):
        _images(_with_field(), blur=0.5)


def test_a_field_has_to_be_recorded_first():
    with pytest.raises(InputError, match="`joint_batch` must be true without a guidance field"):
        _images(_pipeline(), joint_batch=False)
    with pytest.raises(InputError, match="`num_samples` must be at least 16, got 3"):
        _pipeline().record_guidance_field(3)
    with pytest.raises(InputError, match="`guidance_scale` must guide at least one step, got 0"):
        _pipeline().record_guidance_field(16, num_inference_steps=2, guidance_scale=0)


def test_guidance_that_sees_pixels_goes_on_to_the_last_step():
    pipe = OTGuidedDDIMPipeline(_unet(), DDIMScheduler(), **_parts(with_images=True))
    pipe.set_progress_bar_config(disable=True)
    for weight, timesteps in ((None, (750, 500, 250, 0)), (0.5, (750, 500, 250, 0)), (0.0, (750, 500, 250))):
        field = pipe.record_guidance_field(32, _seeded(9)[0], num_inference_steps=4, pixel_weight=weight)
        assert tuple(field.config.timesteps) == timesteps
        assert field.config.pixel_weight == (1.0 if weight is None else weight)
    assert field.config.feature_dim == 24
    seeing, blind = (_images(pipe, batch_size=16, joint_batch=True, pixel_weight=weight) for weight in (1.0, 0.0))
    assert np.abs(seeing - blind).max() > 0.01
