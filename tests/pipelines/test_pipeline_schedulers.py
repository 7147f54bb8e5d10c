"""What holds of a chain with every kind of scheduler: variance-preserving, Euler and Heun, EDM, flow matching."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from makers.draws import seeded
from makers.models import make_unet
from torch import Tensor

from ot_diffusers import ConvFeatureExtractor, FlowMatchPipeline, OTGuidance, OTGuidedDDIMPipeline, ReferenceBank
from ot_diffusers.errors import InputError
from ot_diffusers.schedules import alpha_sigma, record_coupling, set_timesteps

FLOW_SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "DDIM": DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    "DDIM v": DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False),
    "DPM++ Karras": DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "Euler": EulerDiscreteScheduler(timestep_spacing="linspace"),
    "Euler Karras v": EulerDiscreteScheduler(use_karras_sigmas=True, prediction_type="v_prediction"),
    "Heun": HeunDiscreteScheduler(),
    "LMS": LMSDiscreteScheduler(),
    "EDM Euler": EDMEulerScheduler(),
    "EDM Euler v": EDMEulerScheduler(prediction_type="v_prediction", sigma_data=0.7),
    "EDM DPM++": EDMDPMSolverMultistepScheduler(),
    "flow Euler": FlowMatchEulerDiscreteScheduler(),
    "flow Euler, shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow Heun": FlowMatchHeunDiscreteScheduler(),
    "flow UniPC": UniPCMultistepScheduler(**FLOW_SOLVER),
    "flow DPM++": DPMSolverMultistepScheduler(**FLOW_SOLVER),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
MEAN, SPREAD = 0.2, 0.3


class _GaussianDenoiser(UNet2DModel):
    """The exact predictor of N(.2, .3²) data: E[prediction | z], with the noise level read from the time alone."""

    scheduler: Any = None

    def levels(self, timestep: Tensor) -> tuple[float, float]:
        """α and σ of z, for EDM of data in units of `sigma_data`."""
        name, time = type(self.scheduler).__name__, float(timestep)
        if name.startswith("FlowMatch") or self.scheduler.config.get("use_flow_sigmas"):
            return 1 - time / 1000, time / 1000
        if name.startswith("EDM"):
            ratio = math.exp(4 * time) / self.scheduler.config.sigma_data
        else:  # between timesteps, log(σ/α) is linear
            cumulative = self.scheduler.alphas_cumprod
            logarithms = 0.5 * ((1 - cumulative) / cumulative).log()
            low = min(int(time), len(logarithms) - 2)
            ratio = math.exp(torch.lerp(logarithms[low], logarithms[low + 1], time - low).item())
        return 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> UNet2DOutput:
        alpha, sigma = self.levels(timestep)
        config = self.scheduler.config
        unit = config.get("sigma_data", 1.0) if type(self.scheduler).__name__.startswith("EDM") else 1.0
        mean, variance = MEAN / unit, (SPREAD / unit) ** 2
        total = alpha**2 * variance + sigma**2
        centred = sample - alpha * mean
        clean, noise = mean + alpha * variance / total * centred, sigma / total * centred
        kind = config.get("prediction_type", "flow_prediction")
        velocity = alpha * noise - sigma * clean
        if unit != 1.0:
            return UNet2DOutput(velocity if kind == "v_prediction" else -velocity)
        return UNet2DOutput({"epsilon": noise, "v_prediction": velocity}.get(kind, noise - clean))


def _pipe(scheduler: Any, exact: bool = True, guided: bool = False) -> OTGuidedDDIMPipeline:
    unet = make_unet(_GaussianDenoiser if exact else UNet2DModel, seed=0, block_out_channels=(8, 16))
    unet.scheduler = scheduler
    parts: dict[str, Any] = {}
    if guided:
        torch.manual_seed(1)
        network = ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=24)
        images = torch.rand(60, 1, 8, 8) * 2 - 1
        bank = ReferenceBank.from_features(network.extract(images), feature_scale=1.0, images=images)
        parts = {"feature_extractor": network, "reference_bank": bank}
    pipe = OTGuidedDDIMPipeline(unet, scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe: OTGuidedDDIMPipeline, **options: Any) -> Tensor:
    defaults = {"batch_size": 4, "generator": seeded(0)[0], "num_inference_steps": 8, "output_type": "latent"}
    return pipe(**defaults | options).images


@every_scheduler
def test_all_schedulers_follow_one_path_from_noise_to_gaussian_data(scheduler: Any) -> None:
    """The probability-flow ODE of a Gaussian is solved by x0 = mean + spread · ε, whatever the parametrisation. 200
    steps of a first-order solver leave an error of a few hundredths, mostly at the low noise where the chains end."""
    noise = torch.randn(64, 1, 8, 8, generator=seeded(0)[0])
    found = _latents(_pipe(scheduler), batch_size=64, latents=noise, num_inference_steps=200)
    assert (found - (MEAN + SPREAD * noise)).abs().mean() < 0.02


@every_scheduler
@pytest.mark.parametrize("steps", [2, 8])
def test_guidance_sees_and_sets_the_clean_image(scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The x̂0 that guidance receives is the posterior mean, so all of them average to the mean of the data; the last
    x̂0 that it returns is where the chain ends, for every solver that goes down to σ = 0."""
    pipe, seen = _pipe(scheduler, guided=True), []
    chosen = torch.full((4, 1, 8, 8), -0.4)
    monkeypatch.setattr(OTGuidance, "correct", lambda self, images, *_: seen.append(images) or chosen)
    found = _latents(pipe, num_inference_steps=steps)
    assert len(seen) == len(pipe.scheduler.timesteps)
    level = pipe.unet.levels(pipe.scheduler.timesteps[0])
    # At the first step the posterior is the prior, N(.2, .3²), narrowed by what z tells: α²s²/(α²s² + σ²).
    narrowed = SPREAD * level[0] * SPREAD / math.hypot(level[0] * SPREAD, level[1])
    assert abs(seen[0].mean().item() - MEAN) < 4 * narrowed / 16 + 1e-3  # 256 pixels
    ends_at_zero = float(getattr(pipe.scheduler, "sigmas", torch.zeros(1))[-1]) == 0
    if ends_at_zero:
        # DDIM, and LMS with its average over steps, end a little above σ = 0.
        torch.testing.assert_close(found, chosen, rtol=0, atol=0.05)


@every_scheduler
def test_without_guidance_the_chain_is_that_of_diffusers(scheduler: Any) -> None:
    pipe = _pipe(scheduler, exact=False, guided=True)
    found = _latents(pipe, guidance_scale=0)
    stock = type(scheduler).from_config(scheduler.config)
    set_timesteps(stock, 8)
    sample = torch.randn(4, 1, 8, 8, generator=seeded(0)[0]) * getattr(stock, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for timestep in stock.timesteps:
            scaled = stock.scale_model_input(sample, timestep) if hasattr(stock, "scale_model_input") else sample
            sample = stock.step(pipe.unet(scaled, timestep).sample, timestep, sample).prev_sample
    assert torch.equal(found, sample)


@pytest.mark.parametrize("name", ["DDIM", "DPM++ Karras", "Heun", "EDM Euler", "flow Euler"])
def test_a_field_moves_each_image_alone(name: str) -> None:
    scheduler = SCHEDULERS[name]
    pipe = _pipe(scheduler, exact=False, guided=True)
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipe.record_guidance_field(32, seeded(9)[0], num_inference_steps=50)
    pipe.scheduler = scheduler
    if type(scheduler).__name__.startswith("EDM"):  # whose networks are given another time
        pipe.record_guidance_field(32, seeded(9)[0], num_inference_steps=50)
    noise = torch.randn(3, 1, 8, 8, generator=seeded(0)[0])
    call = functools.partial(_latents, pipe, num_inference_steps=4)
    together = call(batch_size=3, latents=noise)
    alone = torch.cat([call(batch_size=1, latents=row[None]) for row in noise])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-3)  # kernels depend on the batch size
    assert (together - call(batch_size=3, latents=noise, guidance_scale=0)).abs().max() > 0.01


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_the_steps_of_flow_matching_are_equal(kind: Any, steps: int) -> None:
    """diffusers' own chain of n steps has n − 1 equal ones, and a last one from .001 to 0."""
    scheduler = kind()
    times = list(dict.fromkeys(set_timesteps(scheduler, steps)))
    assert times == pytest.approx([1000 * (1 - step / steps) for step in range(steps)])
    assert scheduler.sigmas[-1] == 0


def test_noise_levels_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    alpha, sigma = alpha_sigma(scheduler, torch.tensor([0.0, 250.0, 1000.0]))
    assert alpha.tolist() == [1, 0.75, 0] and sigma.tolist() == [0, 0.25, 1]


def test_schedulers_of_unknown_noise_levels_are_refused() -> None:
    with pytest.raises(InputError, match="`scheduler` must have known noise levels"):
        _latents(_pipe(KDPM2DiscreteScheduler(), exact=False))
    with pytest.raises(InputError, match="`scheduler` must have known noise levels"):
        alpha_sigma(EDMEulerScheduler(), 3)


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"`latents` must have shape \(4, 1, 8, 8\), got \(4, 1, 4, 4\)"):
        _latents(_pipe(DDIMScheduler(), exact=False), latents=torch.zeros(4, 1, 4, 4))


def test_a_flow_pipeline_wants_a_flow_scheduler_and_no_noise_behind_a_coupling() -> None:
    unet = make_unet(seed=0, block_out_channels=(8, 16))
    with pytest.raises(InputError, match=r"`scheduler` must be a flow-matching one .* got 'DDIMScheduler'"):
        FlowMatchPipeline(unet, DDIMScheduler())
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    record_coupling(scheduler, "semidiscrete")
    with pytest.raises(InputError, match="`scheduler` must be deterministic"):
        FlowMatchPipeline(unet, scheduler)(num_inference_steps=2)


def test_a_flow_pipeline_is_saved_with_its_parts(tmp_path: Any) -> None:
    guided = _pipe(FlowMatchEulerDiscreteScheduler(), exact=False, guided=True)
    pipe = FlowMatchPipeline.from_pipe(guided)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    again = FlowMatchPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(_latents(again), _latents(pipe)) and torch.equal(_latents(pipe), _latents(guided))
