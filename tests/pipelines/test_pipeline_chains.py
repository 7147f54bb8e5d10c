"""What holds of a chain in both pipelines: its timesteps, its values, its networks, its parts."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    RePaintScheduler,
    SASolverScheduler,
    TCDScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from makers.draws import seeded as _seeded
from makers.models import make_unet
from transformers import ViTConfig

from ot_diffusers import ConvFeatureExtractor, OTGuidance, OTGuidedDDIMPipeline, ReferenceBank, TruncatedPriorPipeline
from ot_diffusers.cli import main
from ot_diffusers.errors import InputError
from ot_diffusers.models.backbone_extractor import BackboneFeatureExtractor
from ot_diffusers.models.feature_extractor import ResidualFeatureExtractor
from ot_diffusers.models.guidance_field import GuidanceField
from ot_diffusers.models.prior import GaussianPrior, PriorGenerator, PriorMixin
from ot_diffusers.pipelines.call import FiniteValues
from ot_diffusers.sampling import network_calls, with_guidance
from ot_diffusers.schedules import record_coupling
from ot_diffusers.transport import median_distance

GUIDED, TRUNCATED = OTGuidedDDIMPipeline, TruncatedPriorPipeline
both = pytest.mark.parametrize("kind", [GUIDED, TRUNCATED])
_unet = functools.partial(make_unet, seed=0, block_out_channels=(8, 16))


def _parts(network: Any = None, shape: tuple[int, ...] = (1, 8, 8)) -> dict[str, Any]:
    torch.manual_seed(1)
    network = network or ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=24)
    images = torch.rand(60, *shape) * 2 - 1
    features = network.extract(images)
    bank = ReferenceBank.from_features(features, feature_scale=median_distance(features), images=images)
    return {"feature_extractor": network, "reference_bank": bank}


def _pipe(kind: type, scheduler: Any = None, unet: Any = None, shape: Any = (8, 8), **parts: Any) -> Any:
    """A pipeline of either kind that starts from N(0, I)."""
    unet, scheduler = unet or _unet(), scheduler or DDIMScheduler()
    if kind is TRUNCATED:
        options = {"truncation_timestep": scheduler.config.num_train_timesteps, "sample_size": shape}
        parts["prior"] = GaussianPrior(**options, out_channels=unet.config.in_channels)
    pipe = kind(unet=unet, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe: Any, **options: Any) -> torch.Tensor:
    defaults = {"batch_size": 4, "generator": _seeded(0)[0], "num_inference_steps": 5, "output_type": "latent"}
    return pipe(**defaults | options).images


def _watch_steps(scheduler_class: type, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, Any]]:
    """A list that takes in the model output and the result of every step to come."""
    steps, step = [], scheduler_class.step

    @functools.wraps(step)  # the pipelines read its signature
    def watched(self, model_output, *arguments, **options):
        steps.append((model_output, step(self, model_output, *arguments, **options)))
        return steps[-1][1]

    monkeypatch.setattr(scheduler_class, "step", watched)
    return steps


# --- Timesteps --------------------------------------------------------------------------------------------------------


class _PointDenoiser(UNet2DModel):
    """The exact ε-predictor when all data are one image of value .5: ε = (x − α/2)/σ."""

    scheduler: Any = None

    def forward(self, sample, timestep, **_):
        alphas_cumprod = self.scheduler.alphas_cumprod[timestep]
        return UNet2DOutput((sample - 0.5 * alphas_cumprod.sqrt()) / (1 - alphas_cumprod).sqrt())


def _point_denoiser(scheduler: Any) -> _PointDenoiser:
    unet = _unet(_PointDenoiser)
    unet.scheduler = scheduler
    return unet


@both
@pytest.mark.parametrize(
    ("scheduler", "steps", "calls"),
    [
        (DDIMScheduler(timestep_spacing="trailing"), 61, 61),
        (DDIMScheduler(timestep_spacing="trailing"), 122, 122),
        (DDPMScheduler(timestep_spacing="trailing"), 61, 61),
        (DPMSolverMultistepScheduler(timestep_spacing="trailing"), 61, 61),
        (UniPCMultistepScheduler(timestep_spacing="trailing"), 61, 61),
        (DEISMultistepScheduler(timestep_spacing="trailing"), 61, 61),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), 100, 100),
        (DPMSolverSinglestepScheduler(), 11, 11),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 20, 20),
        (SASolverScheduler(), 20, 20),
        (PNDMScheduler(), 10, 19),
        (PNDMScheduler(timestep_spacing="trailing"), 61, 70),
        (PNDMScheduler(skip_prk_steps=True), 10, 11),
        (LCMScheduler(), 4, 4),
        (TCDScheduler(), 4, 4),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Scheduler") if hasattr(value, "config") else str(value),
)
def test_a_perfect_denoiser_ends_at_the_data(kind, scheduler, steps, calls):
    """Whatever the solver does between, its last step is taken from t = 0 or above, and every call is counted."""
    pipe = _pipe(kind, scheduler, _point_denoiser(scheduler))
    images = _latents(pipe, batch_size=2, num_inference_steps=steps)
    # ε carries float32's round-off of x_t divided by σ_0 = .01. The others end at t = 0 with its noise of .01 ε, or
    # integrate numerically.
    exact = (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
    atol = 2e-3 if isinstance(scheduler, exact) else 0.1
    torch.testing.assert_close(images, torch.full_like(images, 0.5), rtol=0, atol=atol)
    assert pipe.num_timesteps == pipe.nfe == network_calls(pipe) == calls


@both
@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_as_many_steps_as_there_are_noise_levels(kind, solver):
    """50 of 50 would pass one level twice, which is 0/0: diffusers' own ends in NaN, as with 1,000 of 1,000."""
    scheduler = solver(num_train_timesteps=50)
    pipe = _pipe(kind, scheduler, _point_denoiser(scheduler))
    images = _latents(pipe, batch_size=1, num_inference_steps=50)
    torch.testing.assert_close(images, torch.full_like(images, 0.5), rtol=0, atol=2e-3)  # as above
    assert pipe.nfe == 49


@both
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("steps", [5, 13])  # 13 of 15, as 61 of 1,000, is a chain of 14 in diffusers
def test_trailing_chains_are_diffusers_own_without_the_surplus_step(kind, scheduler_class, steps):
    options = {"num_train_timesteps": 15, "timestep_spacing": "trailing"}
    scheduler, unet = scheduler_class(**options), _unet()
    found = _latents(_pipe(kind, scheduler, unet), num_inference_steps=steps)
    generator = _seeded(0)[0]
    sample = torch.randn(4, 1, 8, 8, generator=generator)
    stock = scheduler_class(**options)
    stock.set_timesteps(steps)
    with torch.no_grad():
        for timestep in stock.timesteps[:steps]:
            arguments = {"generator": generator} if scheduler_class is DDPMScheduler else {}
            stock.timesteps = stock.timesteps[:steps]
            sample = stock.step(unet(sample, timestep).sample, timestep, sample, **arguments).prev_sample
    assert torch.equal(found, sample)


@both
@pytest.mark.parametrize(("skip_prk_steps", "calls"), [(False, 19), (True, 11)])
def test_every_call_of_a_solver_is_guided_at_its_own_noise_level(kind, skip_prk_steps, calls, monkeypatch):
    """x_t = α_t/2 + σ_t ε with one ε throughout: exact for every solver, so each call must find that ε."""
    scheduler = PNDMScheduler(skip_prk_steps=skip_prk_steps)
    pipe = _pipe(kind, scheduler, _point_denoiser(scheduler), **_parts())
    clean, noise = [], []
    monkeypatch.setattr(OTGuidance, "correct", lambda self, images, *_: clean.append(images) or images)
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *arguments: noise.append(forward(*arguments).sample) or forward(*arguments)
    _latents(pipe, num_inference_steps=10)
    assert len(clean) == len(noise) == calls
    for found, drift in zip(clean, noise, strict=True):
        torch.testing.assert_close(found, torch.full_like(found, 0.5), rtol=0, atol=1e-3)  # ε's round-off by 1/α
        torch.testing.assert_close(drift, noise[0], rtol=0, atol=1e-2)  # x_t's round-off by 1/σ_0 = 100


@both
@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (KDPM2DiscreteScheduler(), "`scheduler` must .* got 'KDPM2DiscreteScheduler'"),
        (
            DDIMInverseScheduler(),
            "`scheduler` must have decreasing timesteps, got 'DDIMInverseScheduler'",
        ),
        (RePaintScheduler(), "`scheduler` must step from a model output, a timestep and a sample"),
        (CogVideoXDPMScheduler(), "`scheduler` must step from a model output, a timestep and a sample"),
        (LCMScheduler(original_inference_steps=4), "must be a number of steps that LCMScheduler allows, got 5"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedulers_that_do_not_fit_are_named(kind, scheduler, message):
    with pytest.raises(InputError, match=message):
        _latents(_pipe(kind, scheduler))


@both
def test_a_field_is_recorded_where_a_timestep_is_passed_once(kind):
    pipe = _pipe(kind, DDIMScheduler(num_train_timesteps=15, timestep_spacing="trailing"), **_parts())
    field = pipe.record_guidance_field(16, _seeded(1)[0], num_inference_steps=13, num_correction_steps=1)
    assert len(field.config.timesteps) == 13 and min(field.config.timesteps) == 0
    for scheduler in (PNDMScheduler(), DPMSolverMultistepScheduler(use_beta_sigmas=True)):
        pipe = _pipe(kind, scheduler, **_parts())
        message = (
            f"`scheduler` must visit each timestep once where a field is recorded, got '{type(scheduler).__name__}'"
        )
        with pytest.raises(InputError, match=message):
            pipe.record_guidance_field(16, num_inference_steps=60)
        assert pipe.guidance_field is None and not pipe._records


# --- Zero terminal SNR ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize(("prediction_type", "expected"), [("epsilon", 4), ("v_prediction", 5), ("sample", 5)])
def test_a_step_that_says_nothing_of_the_image_is_left_out(
    kind, scheduler_class, prediction_type, expected, monkeypatch
):
    options = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    pipe = _pipe(kind, scheduler_class(**options), **_parts())
    corrected, original = [], OTGuidance.correct
    monkeypatch.setattr(OTGuidance, "correct", lambda *given: corrected.append(original(*given)) or corrected[-1])
    used = _watch_steps(scheduler_class, monkeypatch)
    assert _latents(pipe).isfinite().all()
    assert len(corrected) == expected and len(used) == 5
    for wanted, (_, found) in zip(reversed(corrected), reversed(used), strict=False):
        # ε is divided by α ≥ .03 from the second step on: float32's 1e-7 of x_t becomes 1e-5.
        torch.testing.assert_close(found.pred_original_sample, wanted, rtol=0, atol=1e-4)


# --- Learned variances, unusual networks ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances_are_diffusers_own_without_guidance(kind, variance_type):
    unet, scheduler = _unet(out_channels=2), DDPMScheduler(variance_type=variance_type)
    unet.conv_out.weight.data[1], unet.conv_out.bias.data[1] = 0, 0.01  # a variance is positive
    stock = DDPMPipeline(unet, scheduler)
    stock.set_progress_bar_config(disable=True)
    expected = stock(4, generator=_seeded(0)[0], num_inference_steps=5, output_type="np").images
    found = _latents(_pipe(kind, scheduler, unet, **_parts()), guidance_scale=0, output_type="np")
    assert np.array_equal(found, expected)


@both
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, UniPCMultistepScheduler])
def test_guidance_keeps_or_drops_the_variance(kind, scheduler_class, monkeypatch):
    options = {"variance_type": "learned_range"} if scheduler_class is DDPMScheduler else {}
    pipe = _pipe(kind, scheduler_class(**options), _unet(out_channels=2), **_parts())
    outputs, forward, used = [], pipe.unet.forward, _watch_steps(scheduler_class, monkeypatch)
    pipe.unet.forward = lambda *given: outputs.append(forward(*given)) or outputs[-1]
    assert _latents(pipe).isfinite().all()
    for (model_output, _), output in zip(used, outputs, strict=True):
        assert model_output.shape[1] == (2 if options else 1)
        assert torch.equal(model_output[:, 1:], output.sample[:, 1 : model_output.shape[1]])
        assert not torch.equal(model_output[:, :1], output.sample[:, :1])


@both
@pytest.mark.parametrize(
    ("options", "scheduler", "message"),
    [
        ({"class_embed_type": "timestep"}, None, "`unet` must be unconditional or have num_class_embeds, got"),
        ({"in_channels": 3}, None, "`unet` must predict 3 channels, or 6 with learned variances, got 1"),
        ({"out_channels": 3}, None, "`unet` must predict 1 channels, or 2 with learned variances, got 3"),
        ({"sample_size": 9}, None, r"`unet` must have a sample_size divisible by 2, got \(9, 9\)"),
        ({"sample_size": (8, 9)}, None, r"`unet` must have a sample_size divisible by 2, got \(8, 9\)"),
        (
            {},
            DDPMScheduler(variance_type="learned_range"),
            "`unet` must predict 2 channels for a scheduler of learned variances, got 1",
        ),
    ],
)
def test_denoisers_that_do_not_fit_are_named(kind, options, scheduler, message):
    unet = _unet(**options)
    with pytest.raises(InputError, match=message):
        _latents(_pipe(kind, scheduler, unet, unet.config.sample_size))


def test_a_denoiser_without_a_size_takes_the_priors():
    unet = _unet(sample_size=None)
    with pytest.raises(InputError, match="`unet` must have a sample_size, got None"):
        _latents(_pipe(GUIDED, unet=unet))
    assert torch.equal(_latents(_pipe(TRUNCATED, unet=unet)), _latents(_pipe(GUIDED)))


def test_a_text_conditioned_denoiser_is_refused():
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = make_unet(UNet2DConditionModel, **blocks, cross_attention_dim=8)
    with pytest.raises(InputError, match="`unet` must be unconditional or have num_class_embeds, got 'UNet2DCo"):
        _latents(_pipe(GUIDED, unet=unet))


@both
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 16)), (5, 8), (1, [16, 8]), (2, 6), (1, (8, 8))])
def test_unusual_images_are_sampled(kind, channels, size):
    unet = _unet(sample_size=size, in_channels=channels, out_channels=channels)
    images = _latents(_pipe(kind, unet=unet, shape=size))
    assert images.shape == (4, channels, *((size, size) if isinstance(size, int) else size)) and images.isfinite().all()


@both
def test_a_feature_network_of_other_images_is_named(kind):
    pipe = _pipe(kind, unet=_unet(sample_size=(8, 16)), shape=(8, 16), **_parts())
    message = (
        r"`feature_extractor` must take images of shape \(1, 8, 16\), as the pipeline generates them, got \(1, 8, 8\)"
    )
    with pytest.raises(InputError, match=message):
        _latents(pipe)
    assert _latents(pipe, guidance_scale=0).shape == (4, 1, 8, 16)


@pytest.mark.parametrize("size", [8, (8, 8), [8, 8]])
def test_a_square_size_may_be_two_numbers(size, tmp_path):
    parts = _parts()
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    unet = _unet(sample_size=size)
    guided = with_guidance(_pipe(GUIDED, unet=unet), str(tmp_path))
    assert guided.feature_extractor is not None
    with pytest.raises(InputError, match=r"`features` must take images of shape \(1, 16, 16\)"):
        with_guidance(_pipe(GUIDED, unet=_unet(sample_size=16)), str(tmp_path))


# --- Values that are not finite ---------------------------------------------------------------------------------------


class _Failing(UNet2DModel):
    """Its output is broken below a timestep."""

    below, value = 1000, torch.nan

    def forward(self, sample, timestep, **_):
        output = super().forward(sample, timestep)
        output.sample[-1, 0, 0, 0] += self.value if int(timestep) < self.below else 0
        return output


@both
@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize(("value", "below", "step"), [(torch.nan, 1000, 1), (torch.inf, 500, 3), (-torch.inf, 1, 5)])
def test_the_step_of_a_broken_output_is_named(kind, scale, value, below, step):
    pipe = _pipe(kind, unet=_unet(_Failing), **_parts())
    pipe.unet.below, pipe.unet.value = below, value
    with pytest.raises(InputError, match=f"the denoiser's output is not finite at step {step} of 5"):
        _latents(pipe, guidance_scale=scale)
    pipe.unet.value = 0
    assert _latents(pipe, guidance_scale=scale).isfinite().all()


class _Remote(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    device = torch.device("cuda")


def test_values_on_a_gpu_are_looked_at_on_the_way_out():
    good, bad = (torch.full((2, 2), value).as_subclass(_Remote) for value in (1.0, torch.nan))
    reached = []
    for error in (None, InputError("`points` must be finite"), KeyError("other")):
        kind, message = (
            (KeyError, "other") if isinstance(error, KeyError) else (InputError, "second is not finite here")
        )
        with pytest.raises(kind, match=message), FiniteValues() as finite:
            for name, values in (("first", good), ("second", bad), ("third", bad)):
                finite.watch(name, values, " here")
            reached.append(error)
            if error:
                raise error
    assert len(reached) == 3


@both
@pytest.mark.parametrize("scale", [0, 1])
def test_what_a_callback_breaks_is_its_own(kind, scale):
    pipe = _pipe(kind, **_parts())

    def replace(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * torch.nan} if step == 2 else None

    def spoil(pipe, step, timestep, tensors):
        if step == 2:
            tensors["latents"][0] = torch.inf

    for callback in (replace, spoil):
        with pytest.raises(InputError, match="the callback's `latents` tensor is not finite at step 3 of 5"):
            _latents(pipe, guidance_scale=scale, callback_on_step_end=callback)


@both
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(4, 1, 8, 8), "return a dict or None, got 'Tensor'"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, r"return `latents` of shape \(4, 1, 8, 8\), got \(2, 1, 8, 8\)"),
        ({"latents": None}, r"return `latents` of shape \(4, 1, 8, 8\), got \(\)"),
    ],
)
def test_what_a_callback_may_return(kind, returned, message):
    with pytest.raises(InputError, match="`callback_on_step_end` must " + message):
        _latents(_pipe(kind), callback_on_step_end=lambda *_: returned)
    assert torch.equal(_latents(_pipe(kind), callback_on_step_end=lambda *_: {"other": 1}), _latents(_pipe(kind)))


def test_broken_scheduler_results_priors_and_latents_are_named():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    with pytest.raises(InputError, match="the result of the scheduler is not finite at step 1 of 5"):
        _latents(_pipe(GUIDED, DDIMScheduler(**options)))  # x̂0 = (x − ε)/0
    pipe = _pipe(TRUNCATED)
    with pytest.raises(InputError, match="the `latents` tensor is not finite"):
        _latents(pipe, latents=torch.full((4, 1, 8, 8), torch.nan))
    shape = {"sample_size": 8, "out_channels": 1, "latent_dim": 6, "block_out_channels": (16, 8)}
    pipe.prior = PriorGenerator(truncation_timestep=1000, **shape)
    pipe.prior.project.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="the prior's output is not finite"):
        _latents(pipe)


@pytest.mark.parametrize("kind", [GUIDED, TRUNCATED, DDIMPipeline])
def test_the_command_line_makes_no_black_pictures_of_broken_weights(kind, tmp_path, capsys):
    pipe = _pipe(kind)
    pipe.unet.conv_out.bias.data[:] = torch.nan
    pipe.save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--num-images", "2", "--num-inference-steps", "2"]
    assert main([*command, "--output", str(tmp_path / "pictures")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    stock = "error: `pipeline` must make finite images, got 'NaN'"
    assert error == (stock if kind is DDIMPipeline else "error: the denoiser's output is not finite at step 1 of 2")
    assert not list(tmp_path.glob("pictures/*.png"))


# --- The call ---------------------------------------------------------------------------------------------------------


@both
def test_positional_arguments_are_those_of_diffusers(kind):
    names = list(inspect.signature(DDIMPipeline.__call__).parameters)
    assert list(inspect.signature(kind.__call__).parameters)[: len(names)] == names
    stock = DDIMPipeline(_unet(), DDIMScheduler())
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, _seeded(3)[0], 1.0, 4, None, "np", False)[0]
    assert np.array_equal(_pipe(kind)(2, _seeded(3)[0], 1.0, 4, None, "np", False)[0], expected)


@both
def test_a_tuple_of_generators_is_a_list(kind):
    expected = _latents(_pipe(kind), generator=_seeded(1, 2, 3, 4), eta=1.0)
    assert torch.equal(_latents(_pipe(kind), generator=tuple(_seeded(1, 2, 3, 4)), eta=1.0), expected)


@both
@pytest.mark.parametrize("scale", [0, 1])
def test_a_callback_can_interrupt_the_chain(kind, scale):
    pipe, seen = _pipe(kind, **_parts()), []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1

    images = _latents(pipe, guidance_scale=scale, callback_on_step_end=stop)
    assert len(seen) == pipe.nfe == 2 and pipe.num_timesteps == 5 and pipe.interrupt
    assert torch.equal(images, seen[-1])
    assert not torch.equal(_latents(pipe, guidance_scale=scale), images) and pipe.nfe == 5 and not pipe.interrupt


@both
@pytest.mark.parametrize("scale", [0, 1])
def test_networks_are_sampled_in_evaluation_mode(kind, scale):
    network = ResidualFeatureExtractor(
        sample_size=8, block_out_channels=(8, 16), feature_dim=16, norm_type="batch_norm", num_classes=2
    )
    pipe = _pipe(kind, unet=_unet(dropout=0.5), **_parts(network.eval()))
    expected = _latents(pipe, guidance_scale=scale)
    statistics = copy.deepcopy(network.state_dict())
    pipe.unet.train()
    pipe.unet.down_blocks[0].eval()
    network.train()
    modes = [module.training for model in (pipe.unet, network) for module in model.modules()]
    assert torch.equal(_latents(pipe, guidance_scale=scale), expected)

    def fail(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        _latents(pipe, guidance_scale=scale, callback_on_step_end=fail)
    assert [module.training for model in (pipe.unet, network) for module in model.modules()] == modes
    assert all(torch.equal(value, statistics[name]) for name, value in network.state_dict().items())


@both
def test_equal_calls_give_equal_images_with_iterations_that_are_fixed(kind, monkeypatch):
    original = OTGuidance._num_iterations
    gpu = torch.device("cuda")
    monkeypatch.setattr(OTGuidance, "_num_iterations", lambda self, blur, _, warm: original(self, blur, gpu, warm))
    pipe = _pipe(kind, **_parts())
    options = {"batch_size": 16, "num_inference_steps": 3}
    images = _latents(pipe, **options)
    _latents(pipe, generator=_seeded(8)[0], **options)
    assert torch.equal(_latents(pipe, **options), images)


# --- Parts ------------------------------------------------------------------------------------------------------------


def _backbone() -> BackboneFeatureExtractor:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    return BackboneFeatureExtractor(backbone=config.to_dict(), image_size=(16, 16), feature_dim=16)


class _OwnNetwork(ConvFeatureExtractor):
    """Somebody's own class of feature network."""


class _OwnPrior(GaussianPrior):
    """Somebody's own class of prior."""


NETWORKS = {
    "conv": lambda: ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=24),
    "residual": lambda: ResidualFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=16),
    "backbone": _backbone,
    "own": lambda: _OwnNetwork(sample_size=8, feature_dim=8),
}


@both
@pytest.mark.parametrize("name", NETWORKS)
def test_from_pipe_keeps_every_part(kind, name):
    pipe = _pipe(kind, DDPMScheduler(), **_parts(NETWORKS[name]()))
    pipe.record_guidance_field(16, _seeded(5)[0], num_inference_steps=2, num_correction_steps=1)
    again = kind.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert type(again) is kind and all(again.components[name] is part for name, part in pipe.components.items())
    assert torch.equal(_latents(again, num_inference_steps=2), _latents(pipe, num_inference_steps=2))


@pytest.mark.parametrize("prior_class", [GaussianPrior, PriorGenerator, _OwnPrior])
def test_from_pipe_keeps_the_prior(prior_class):
    shape = {"truncation_timestep": 10, "sample_size": 8, "out_channels": 1}
    prior = prior_class(**shape, **({"block_out_channels": (8,)} if prior_class is PriorGenerator else {}))
    pipe = TRUNCATED(prior, _unet(), DDIMScheduler(num_train_timesteps=10), **_parts())
    assert isinstance(prior, PriorMixin) and TRUNCATED.from_pipe(pipe).prior is prior
    assert GUIDED.from_pipe(pipe).reference_bank is pipe.reference_bank
    with pytest.raises(InputError, match="`prior` must be given, as no part of a OTGuidedDDIMPipeline fits, got None"):
        TRUNCATED.from_pipe(GUIDED.from_pipe(pipe))
    assert TRUNCATED.from_pipe(GUIDED.from_pipe(pipe), prior=prior).unet is pipe.unet


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stock_class", [DDIMPipeline, DDPMPipeline])
def test_from_pipe_keeps_the_dtype_of_both(dtype, stock_class):
    stock = stock_class(_unet(), DDIMScheduler() if stock_class is DDIMPipeline else DDPMScheduler()).to(dtype=dtype)
    parts = _parts()
    guided = GUIDED.from_pipe(stock, **parts)
    assert guided.unet is stock.unet and stock.unet.dtype == guided.unet.dtype == dtype
    assert guided.scheduler is stock.scheduler and guided.feature_extractor.dtype == torch.float32
    images = _latents(guided, batch_size=16)
    assert images.dtype == dtype and not torch.equal(images, _latents(guided, batch_size=16, guidance_scale=0))
    assert GUIDED.from_pipe(guided, dtype=torch.float32).unet.dtype == torch.float32  # asked for


def test_from_pipe_takes_parts_by_name_and_refuses_others():
    pipe = _pipe(GUIDED, **_parts())
    network, scheduler = _parts()["feature_extractor"], DDPMScheduler()
    again = GUIDED.from_pipe(pipe, feature_extractor=network, scheduler=scheduler)
    assert (again.feature_extractor, again.scheduler) == (network, scheduler) and again.unet is pipe.unet
    plain = GUIDED.from_pipe(pipe, feature_extractor=None, reference_bank=None)
    assert torch.equal(_latents(plain), _latents(pipe, guidance_scale=0))
    with pytest.raises(InputError, match="`prior` must be one of unet, scheduler, feature_extractor"):
        GUIDED.from_pipe(pipe, prior=network)
    with pytest.raises(InputError, match="`reference_bank` must accompany `feature_extractor`, got None"):
        GUIDED.from_pipe(pipe, reference_bank=None)
    compiled = GUIDED.from_pipe(pipe, unet=torch.compile(pipe.unet, backend="eager"))
    assert GUIDED.from_pipe(compiled).unet is compiled.unet


@both
@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["feature_extractor"], "`reference_bank` must accompany `feature_extractor`"),
        (["reference_bank"], "`feature_extractor` must accompany `reference_bank`"),
        (["guidance_field"], "`feature_extractor` must accompany `guidance_field`"),
        (["feature_extractor", "guidance_field"], "`reference_bank` must accompany `feature_extractor` and"),
        (["reference_bank", "guidance_field"], "`feature_extractor` must accompany `reference_bank` and"),
    ],
)
def test_a_part_of_the_guidance_is_an_error(kind, names, missing, tmp_path):
    parts = _parts() | {"guidance_field": GuidanceField(num_samples=16, num_references=60)}
    with pytest.raises(InputError, match=missing):
        _pipe(kind, **{name: parts[name] for name in names})
    pipe = _pipe(kind, **parts)
    for name in parts.keys() - set(names):
        setattr(pipe, name, None)
    with pytest.raises(InputError, match=missing):
        _latents(pipe)
    assert torch.equal(_latents(pipe, guidance_scale=0), _latents(_pipe(kind)))  # plain sampling needs none of them
    pipe.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=missing):
        kind.from_pretrained(tmp_path)


def test_the_chain_stays_in_the_guided_pipelines_scheduler_alone():
    """As diffusers' pipelines leave theirs; the truncated pipeline promises a scheduler as it was."""
    guided, truncated = _pipe(GUIDED), _pipe(TRUNCATED)
    before = copy.deepcopy(vars(truncated.scheduler))
    for pipe in (guided, truncated):
        _latents(pipe)
    assert guided.scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
    assert str(vars(truncated.scheduler)) == str(before)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, LCMScheduler, TCDScheduler])
def test_a_denoiser_of_coupled_pairs_refuses_fresh_noise(scheduler_class: Any) -> None:
    """With coupled pairs the model's output is not the score: only deterministic chains end at images."""
    scheduler = DDIMScheduler()
    record_coupling(scheduler, "semidiscrete")
    pipe = OTGuidedDDIMPipeline(make_unet(), scheduler)
    pipe(batch_size=1, num_inference_steps=2, output_type="latent")
    with pytest.raises(InputError, match=r"`eta` must be 0: .* noise_coupling=semidiscrete, got 0.5"):
        pipe(batch_size=1, num_inference_steps=2, eta=0.5)
    pipe.scheduler = scheduler_class.from_config(scheduler.config)
    with pytest.raises(
        InputError, match=r"`scheduler` must be deterministic, such as DDIMScheduler: .* noise_coupling="
    ):
        pipe(batch_size=1, num_inference_steps=2)
