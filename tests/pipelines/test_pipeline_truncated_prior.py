"""The truncated pipeline: diffusers' own where it must be, exact for a perfect denoiser, and leaving nothing behind."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from makers.draws import seeded as _seeded
from makers.models import make_unet

from ot_diffusers import ConvFeatureExtractor, FlowMatchPipeline, OTGuidance, OTGuidedDDIMPipeline, ReferenceBank
from ot_diffusers.errors import InputError
from ot_diffusers.models.prior import FewStepPrior, GaussianPrior, PriorGenerator
from ot_diffusers.pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from ot_diffusers.schedules import (
    alpha_sigma,
    record_calls,
    record_coupling,
    set_timesteps,
    truncated_samples,
    truncated_scheduler,
)
from ot_diffusers.transport import median_distance, sinkhorn_divergence

_unet = functools.partial(make_unet, seed=0, block_out_channels=(8, 16))


def _prior(truncation_timestep: int = 10, **options) -> PriorGenerator:
    torch.manual_seed(1)
    shape = {"sample_size": 8, "out_channels": 1, "latent_dim": 6, "block_out_channels": (16, 8)}
    return PriorGenerator(truncation_timestep=truncation_timestep, **{**shape, **options}).eval()


def _pipeline(prior=None, unet=None, scheduler=None, truncation_timestep: int = 10) -> TruncatedPriorPipeline:
    scheduler = scheduler or truncated_scheduler(DDIMScheduler(), truncation_timestep)
    pipe = TruncatedPriorPipeline(prior or _prior(truncation_timestep), unet or _unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("per_image", [False, True])
def test_standard_gaussian_at_full_length_is_ddim_bit_for_bit(steps, eta, per_image):
    unet, scheduler = _unet(), DDIMScheduler(num_train_timesteps=100)
    stock = DDIMPipeline(unet, scheduler)
    stock.set_progress_bar_config(disable=True)
    ours = _pipeline(
        GaussianPrior(truncation_timestep=100, sample_size=8, out_channels=1), unet, truncated_scheduler(scheduler, 100)
    )
    options = {"batch_size": 2, "num_inference_steps": steps, "eta": eta, "output_type": "np"}
    generators = [_seeded(3, 4) if per_image else _seeded(3)[0] for _ in range(2)]
    assert np.array_equal(
        ours(generator=generators[0], **options).images, stock(generator=generators[1], **options).images
    )
    assert ours.nfe == steps


def test_standard_gaussian_at_full_length_is_ddpm_bit_for_bit():
    unet, scheduler = _unet(), DDPMScheduler(num_train_timesteps=20)
    stock = DDPMPipeline(unet, scheduler)
    stock.set_progress_bar_config(disable=True)
    ours = _pipeline(
        GaussianPrior(truncation_timestep=20, sample_size=8, out_channels=1), unet, truncated_scheduler(scheduler, 20)
    )
    images = ours(batch_size=2, generator=_seeded(0)[0], output_type="np").images
    expected = stock(batch_size=2, generator=_seeded(0)[0], num_inference_steps=20, output_type="np").images
    assert np.array_equal(images, expected)


@pytest.mark.slow
def test_a_saved_pipeline_loads_in_a_fresh_interpreter(tmp_path):
    # diffusers finds the classes of components only in modules that are imported already.
    _pipeline().save_pretrained(tmp_path)
    load = "from ot_diffusers import TruncatedPriorPipeline as P; print(type(P.from_pretrained({!r}).prior).__name__)"
    code = [sys.executable, "-c", load.format(str(tmp_path))]
    assert subprocess.run(code, check=True, capture_output=True, text=True).stdout.strip() == "PriorGenerator"


class _PointDenoiser(UNet2DModel):
    """The exact ε-predictor when all data are one image of value .5: ε = (x − α/2)/σ."""

    def forward(self, sample, timestep, **_):
        alphas_cumprod = DDIMScheduler().alphas_cumprod[timestep]
        noise = (sample - 0.5 * alphas_cumprod.sqrt()) / (1 - alphas_cumprod).sqrt()
        return type(super().forward(sample, timestep))(sample=noise)


def _point_denoiser() -> _PointDenoiser:
    return _PointDenoiser.from_config(_unet().config)


@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize(("truncation_timestep", "steps"), [(1, 1), (10, 10), (10, 2), (100, 10)])
def test_perfect_denoiser_recovers_the_data(scheduler_class, truncation_timestep, steps):
    """With data concentrated on one image every solver and every start ends there."""
    scheduler = truncated_scheduler(scheduler_class(), truncation_timestep)
    pipe = _pipeline(_prior(truncation_timestep), _point_denoiser(), scheduler)
    images = pipe(batch_size=3, num_inference_steps=steps, generator=_seeded(0, 1, 2), output_type="pt").images
    # (.5 + 1)/2, to the float32 round-off of ε divided by σ_0 = .01 and multiplied back.
    torch.testing.assert_close(images, torch.full_like(images, 0.75), rtol=0, atol=1e-4)
    assert pipe.nfe == steps + 1


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize(("truncation_timestep", "steps"), [(15, 13), (17, 14), (30, 26)])
def test_surplus_step_of_trailing_spacing_is_dropped(scheduler_class, truncation_timestep, steps):
    """Here rounding makes diffusers append the timestep −1; the chain has the steps asked for and ends at the data."""
    scheduler = truncated_scheduler(scheduler_class(), truncation_timestep)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[-1] == -1  # the defect; remove the work-around when this fails
    assert len(set_timesteps(scheduler, steps)) == len(scheduler.timesteps) == steps
    pipe = _pipeline(_prior(truncation_timestep), _point_denoiser(), scheduler)
    images = pipe(num_inference_steps=steps, output_type="pt").images
    # As above.
    torch.testing.assert_close(images, torch.full_like(images, 0.75), rtol=0, atol=1e-4)
    assert pipe.nfe == steps + 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_does_not_depend_on_its_batch(eta):
    pipe = _pipeline()
    together = pipe(batch_size=4, generator=_seeded(0, 1, 2, 3), eta=eta, output_type="pt").images
    alone = pipe(batch_size=1, generator=_seeded(2), eta=eta, output_type="pt").images
    # Convolutions of another batch size sum in another order: float32 round-off over ten steps.
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-5)


def test_the_same_parts_start_at_another_timestep():
    pipe, full = _pipeline(), DDIMScheduler()
    for truncation_timestep, scheduler in ((4, None), (20, full)):
        moved = pipe.at_truncation_timestep(truncation_timestep, scheduler)
        moved.set_progress_bar_config(disable=True)
        expected = _pipeline(
            pipe.prior.at_truncation_timestep(truncation_timestep),
            pipe.unet,
            truncated_scheduler(full, truncation_timestep),
        )
        options = {"batch_size": 2, "num_inference_steps": 2, "output_type": "pt"}
        images = [one(generator=_seeded(3)[0], **options).images for one in (moved, expected)]
        assert torch.equal(*images) and moved.unet is pipe.unet
    assert pipe.truncation_timestep == 10
    with pytest.raises(InputError, match="`truncation_timestep` must be an integer from 1 to 10, got 20"):
        pipe.at_truncation_timestep(20)


def test_components_are_left_as_they_were():
    pipe = _pipeline()
    pipe.prior.train()
    pipe.prior.blocks[1].eval()
    pipe.unet.train()

    def state():
        modes = [module.training for model in (pipe.prior, pipe.unet) for module in model.modules()]
        tensors = [t.clone() for model in (pipe.prior, pipe.unet) for t in model.state_dict().values()]
        frozen = [p.requires_grad for model in (pipe.prior, pipe.unet) for p in model.parameters()]
        return modes, frozen, tensors, pipe.scheduler.timesteps.tolist(), copy.deepcopy(dict(pipe.scheduler.config))

    before = state()
    images = pipe(batch_size=2, num_inference_steps=5, output_type="pt").images
    after = state()
    assert not images.requires_grad
    assert before[:2] == after[:2] and before[3:] == after[3:]
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert pipe.scheduler.num_inference_steps is None


def test_modes_come_back_after_an_error():
    pipe = _pipeline()
    pipe.unet.train()

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe(callback_on_step_end=fail)
    assert pipe.unet.training


def test_training_mode_does_not_change_the_images():
    pipe = _pipeline()
    expected = pipe(generator=_seeded(0), output_type="np").images
    pipe.prior.train()
    pipe.unet.train()
    assert np.array_equal(pipe(generator=_seeded(0), output_type="np").images, expected)


def test_saved_pipeline_loads_and_makes_the_same_images(tmp_path):
    pipe = _pipeline()
    pipe.save_pretrained(tmp_path)
    restored = TruncatedPriorPipeline.from_pretrained(tmp_path)
    restored.set_progress_bar_config(disable=True)
    assert type(restored.prior) is PriorGenerator
    assert torch.equal(restored.scheduler.alphas_cumprod, DDIMScheduler().alphas_cumprod[:10])
    images = [p(batch_size=2, generator=_seeded(0, 1), output_type="np").images for p in (pipe, restored)]
    # Memory-mapped weights may be aligned differently: float32 round-off.
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-5)


def test_a_tuned_network_starts_the_chain_of_another(tmp_path):
    tuned = FlowMatchEulerDiscreteScheduler()
    record_calls(tuned, 2)
    record_coupling(tuned, "semidiscrete")
    prior = FewStepPrior.from_pipeline(FlowMatchPipeline(_unet(seed=3), tuned), 10)
    pipe = _pipeline(prior)
    pipe.save_pretrained(tmp_path)
    restored = DiffusionPipeline.from_pretrained(tmp_path)
    restored.set_progress_bar_config(disable=True)
    images = [p(2, _seeded(0, 1), num_inference_steps=5, output_type="np").images for p in (pipe, restored)]
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-5)  # float32 round-off, as above
    assert type(restored.prior) is FewStepPrior and restored.nfe == 7  # two calls of the prior, five of the denoiser
    moved = restored.at_truncation_timestep(4)
    assert moved(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1) and moved.nfe == 4
    # The denoiser behind it may not be coupled.
    behind = DDIMScheduler()
    record_coupling(behind, "semidiscrete")
    with pytest.raises(InputError, match="`scheduler` must not be truncated: this denoiser was trained with"):
        _pipeline(prior, scheduler=truncated_scheduler(behind, 10))


def test_scheduler_can_be_swapped_for_another_class():
    pipe = _pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(pipe.scheduler.alphas_cumprod, DDIMScheduler().alphas_cumprod[:10])
    pipe(num_inference_steps=5)
    assert pipe.nfe == 6


def test_given_latents_replace_the_prior():
    """The oracle: real images diffused to T' and denoised; the start is the oracle's and the prior is not called."""
    pipe = _pipeline()
    real = torch.rand(3, 1, 8, 8) * 2 - 1
    noisy = truncated_samples(real, torch.arange(3), pipe.scheduler)
    first = pipe(batch_size=3, latents=noisy, output_type="np").images
    assert np.array_equal(pipe(batch_size=3, latents=noisy, generator=_seeded(0, 1, 2), output_type="np").images, first)
    assert pipe.nfe == 10


def test_callback_sees_and_may_replace_the_latents():
    pipe = _pipeline()
    seen = []

    def clear(_pipe, index, timestep, tensors):
        seen.append((index, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 4 else None

    images = pipe(num_inference_steps=5, callback_on_step_end=clear, output_type="pt").images
    assert seen == [(index, timestep, (1, 1, 8, 8)) for index, timestep in enumerate([9, 7, 5, 3, 1])]
    assert (images == 0.5).all()


def test_output_types_agree():
    pipe = _pipeline()
    outputs = {kind: pipe(generator=_seeded(0), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    # 8-bit rounding: half a level.
    np.testing.assert_allclose(np.asarray(outputs["pil"][0]) / 255, outputs["np"][0, ..., 0], rtol=0, atol=0.5 / 255)
    assert np.array_equal(pipe(generator=_seeded(0), output_type="np", return_dict=False)[0], outputs["np"])


def test_bfloat16_pipeline_follows_the_float32_one():
    pipe = _pipeline()
    options = {"batch_size": 2, "output_type": "np"}
    pipe.to(torch.bfloat16)
    images = pipe(generator=_seeded(0, 1), **options).images
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    pipe.prior.to(torch.float32)  # a mixed pair works as well
    assert pipe(generator=_seeded(0, 1), **options).images.shape == images.shape


def test_model_offload_gives_the_same_images():
    pipe = _pipeline()
    expected = pipe(generator=_seeded(0), output_type="np").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(pipe(generator=_seeded(0), output_type="np").images, expected)


def test_steps_that_do_not_divide_are_announced_for_ddim(caplog):
    import diffusers.utils.logging as diffusers_logging

    diffusers_logging.enable_propagation()
    _pipeline()(num_inference_steps=4)
    diffusers_logging.disable_propagation()
    assert "4 steps do not divide 10" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 11}, "`num_inference_steps` must be from 1 to 10, got 11"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"num_inference_steps": 2.0}, r"`num_inference_steps` must be an integer, got 2\.0"),
        ({"batch_size": "4"}, "`batch_size` must be an integer, got '4'"),
        ({"generator": 0}, "`generator` must be a torch.Generator, or one for each image, got 'int'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": 3, "generator": _seeded(0, 1)}, "`generator` must be one, or one for each of 3 images, got 2"),
        ({"eta": 1.5}, "`eta` must lie in"),
        ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpg'"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "`latents` must have shape"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs` must be among"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        _pipeline()(**options)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"prior": _prior(20)}, "`prior` must be made for the scheduler's 10 steps, got 20"),
        ({"prior": _prior(sample_size=16)}, "`prior` must make images of size"),
        ({"prior": _prior(out_channels=3)}, "`prior` must make 1 channels, got 3"),
        ({"scheduler": EulerDiscreteScheduler(num_train_timesteps=10)}, "`scheduler` must be variance-preserving"),
    ],
)
def test_components_that_do_not_fit_are_refused(components, message):
    with pytest.raises(InputError, match=message):
        _pipeline(**components)


def test_swapped_component_is_checked_at_the_call():
    pipe = _pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="`prior` must be made for the scheduler's 1000 steps, got 10"):
        pipe()


# --- with guidance ----------------------------------------------------------------------------------------------------


def _parts() -> dict[str, torch.nn.Module]:
    """A feature network and features of bright upper or lower halves."""
    torch.manual_seed(2)
    network = ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=24)
    images = torch.full((100, 1, 8, 8), -0.9)
    images[:50, :, :4], images[50:, :, 4:] = 0.9, 0.9
    features = network.extract((images + 0.2 * torch.randn(images.shape)).clamp(-1, 1))
    return {
        "feature_extractor": network,
        "reference_bank": ReferenceBank.from_features(features, feature_scale=median_distance(features)),
    }


def _guided(**options) -> TruncatedPriorPipeline:
    plain = _pipeline(**options)
    pipe = TruncatedPriorPipeline(plain.prior, plain.unet, plain.scheduler, **_parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe, batch_size: int = 32, **options) -> torch.Tensor:
    return pipe(batch_size, generator=_seeded(*range(batch_size)), output_type="latent", **options).images


def test_parts_at_scale_zero_change_nothing():
    assert torch.equal(_draw(_guided(), guidance_scale=0), _draw(_pipeline()))


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler])
def test_guided_chain_from_noise_is_the_guided_pipeline(scheduler_class):
    """With N(0, I) and T' = T both pipelines are one: nothing clean to correct before the chain."""
    prior, unet = GaussianPrior(truncation_timestep=1000, sample_size=8, out_channels=1), _unet()
    ours = _guided(prior=prior, unet=unet, scheduler=truncated_scheduler(scheduler_class(), 1000))
    theirs = OTGuidedDDIMPipeline(unet, ours.scheduler, **_parts())
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "num_correction_steps": 2, "guidance_start_step": 1}
    assert torch.equal(_draw(ours, **options), _draw(theirs, **options))


def test_guidance_of_the_prior_comes_before_the_noise():
    pipe = _guided()
    start = {}

    def first(_pipe, index, _timestep, tensors):
        start.setdefault("latents", tensors["latents"])

    options = {"num_guidance_steps": 0, "num_inference_steps": 1, "num_prior_guidance_steps": 2}
    _draw(pipe, callback_on_step_end=first, **options)
    generators = _seeded(*range(32))
    images = pipe.prior.draw(32, generator=generators)
    with OTGuidance(**_parts()).chain() as guidance:
        corrected = guidance.correct(guidance.correct(images))
    latents = pipe.prior.diffuse(corrected, *alpha_sigma(pipe.scheduler, 9), generator=generators)
    expected = _draw(_pipeline(), latents=latents, num_inference_steps=1)
    assert torch.equal(start["latents"], expected)


def test_guidance_brings_the_images_nearer_to_the_references():
    pipe = _guided()
    guidance = OTGuidance(**_parts())
    references = pipe.reference_bank.features / guidance.feature_scale

    def distance(**options) -> float:
        return float(sinkhorn_divergence(guidance.features(_draw(pipe, **options)), references, blur=0.3))

    # Each of the two alone helps, and both together more.
    plain, chain = distance(guidance_scale=0), distance(num_prior_guidance_steps=0)
    prior, both = distance(num_guidance_steps=0), distance()
    assert both < min(chain, prior) and max(chain, prior) < 0.9 * plain


def test_field_guides_each_image_alone_before_the_chain_too():
    pipe = _guided()
    field = pipe.record_guidance_field(48, generator=torch.Generator().manual_seed(7), num_inference_steps=5)
    # Five corrections of the prior, and all steps of the chain but the last.
    assert field.config.timesteps == (14, 13, 12, 11, 10, 9, 7, 5, 3)
    together = _draw(pipe, num_inference_steps=5)
    alone = pipe(1, _seeded(3), num_inference_steps=5, output_type="latent").images
    # Convolutions and products of another batch size sum in another order, and Adam's first step is a sign.
    torch.testing.assert_close(alone[0], together[3], rtol=0, atol=1e-3)
    longer = {"num_inference_steps": 10, "num_prior_guidance_steps": 4}  # along the nearest recorded steps
    assert (_draw(pipe, **longer) - _draw(pipe, **longer, guidance_scale=0)).abs().max() > 0.01


def test_guided_pipeline_loads_with_its_parts_and_plain_without_them(tmp_path):
    pipe = _guided()
    pipe.save_pretrained(tmp_path)
    restored = TruncatedPriorPipeline.from_pretrained(tmp_path)
    restored.set_progress_bar_config(disable=True)
    # Memory-mapped weights may be aligned differently: float32 round-off, and Adam's first step is a sign.
    torch.testing.assert_close(_draw(restored), _draw(pipe), rtol=0, atol=1e-3)
    plain = TruncatedPriorPipeline.from_pretrained(tmp_path, feature_extractor=None, reference_bank=None)
    plain.set_progress_bar_config(disable=True)
    torch.testing.assert_close(_draw(plain), _draw(_pipeline()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1}, "`guidance_scale` must be at least 0, got -1"),
        ({"num_guidance_steps": -1}, "`num_guidance_steps` must be at least 0, got -1"),
        ({"num_prior_guidance_steps": -1}, "`num_prior_guidance_steps` must be at least 0, got -1"),
        (
            {"latents": torch.zeros(1, 1, 8, 8), "num_prior_guidance_steps": 1},
            "`num_prior_guidance_steps` must be 0 where the prior does not generate clean images, got 1",
        ),
        ({"joint_batch": False}, "`joint_batch` must be true without a guidance field"),
    ],
)
def test_bad_guidance_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        _guided()(**options)


def test_guidance_without_the_parts_is_refused():
    with pytest.raises(InputError, match="`guidance_scale` must be 0 for a pipeline without `feature_extractor`"):
        _pipeline()(guidance_scale=1.0)
