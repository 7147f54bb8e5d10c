"""Noise levels and conversions, compared with diffusers' schedulers; truncation, compared with the full schedule."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from makers.draws import cloud as _images

from ot_diffusers.errors import InputError
from ot_diffusers.schedules import (
    PREDICTION_TYPES,
    alpha_sigma,
    from_original_sample,
    min_snr_weight,
    preserves_variance,
    reversible_steps,
    set_timesteps,
    to_original_sample,
    training_target,
    truncated_samples,
    truncated_scheduler,
)

SCHEDULERS = [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
SOLVERS = [DPMSolverMultistepScheduler, UniPCMultistepScheduler]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("angle", [0.01, 0.7, 1.5])
def test_conversions_are_inverse_and_agree_with_the_training_target(prediction_type, angle):
    clean, noise = _images(3, 1, 4, 4), _images(3, 1, 4, 4, seed=1)
    alpha, sigma = torch.tensor(angle, dtype=torch.float64).cos(), torch.tensor(angle, dtype=torch.float64).sin()
    if prediction_type == "flow_prediction":
        alpha = 1 - sigma
    noisy = alpha * clean + sigma * noise
    target = training_target(clean, noise, alpha, sigma, prediction_type)
    # Float64 rounding, amplified by at most 1/cos(1.5) or 1/sin(.01) = 100.
    tolerance = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(to_original_sample(target, noisy, alpha, sigma, prediction_type), clean, **tolerance)
    torch.testing.assert_close(from_original_sample(clean, noisy, alpha, sigma, prediction_type), target, **tolerance)


def test_levels_of_a_batch_apply_row_by_row():
    clean, noise = _images(3, 1, 4, 4), _images(3, 1, 4, 4, seed=1)
    alpha, sigma = alpha_sigma(DDIMScheduler(), torch.tensor([0, 400, 999]))
    together = training_target(clean, noise, alpha, sigma, "v_prediction")
    for row in range(3):
        alone = training_target(clean[row : row + 1], noise[row : row + 1], alpha[row], sigma[row], "v_prediction")
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[:3])
def test_clean_image_is_that_of_ddim_at_every_step(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    sample, output = _images(2, 1, 4, 4).float(), _images(2, 1, 4, 4, seed=1).float()
    for timestep in scheduler.timesteps:
        expected = scheduler.step(output, timestep, sample).pred_original_sample
        ours = to_original_sample(output, sample, *alpha_sigma(scheduler, timestep), prediction_type)
        # The same float32 formula: a few rounding errors, amplified by 1/α ≤ 160.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", SOLVERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("own_grid", [False, True])
def test_clean_image_is_that_of_the_solver_at_every_step(scheduler_class, prediction_type, own_grid):
    spacing = "use_flow_sigmas" if prediction_type == "flow_prediction" else "use_karras_sigmas"
    scheduler = scheduler_class(prediction_type=prediction_type, **{spacing: own_grid or spacing == "use_flow_sigmas"})
    scheduler.set_timesteps(15)
    sample, output = _images(2, 1, 4, 4).float(), _images(2, 1, 4, 4, seed=1).float()
    for index, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = index
        expected = scheduler.convert_model_output(output, sample=sample)
        ours = to_original_sample(output, sample, *alpha_sigma(scheduler, timestep, index), prediction_type)
        # The same float32 formula: a few rounding errors, amplified by 1/α ≤ 160.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_snr_weight_is_one_for_clean_and_small_for_noisy_steps():
    weight = min_snr_weight(*alpha_sigma(DDIMScheduler(), torch.tensor([0, 100, 500, 999])))
    assert weight[0] == 1
    assert (weight.diff() <= 0).all()
    # ᾱ_999 = 4.04e-5: SNR/γ.
    assert weight[3].item() == pytest.approx(4.04e-5 / 5, rel=1e-2)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("truncation_timestep", [1, 10, 999])
def test_prefix_survives_truncation_and_json(scheduler_class, beta_schedule, rescale, truncation_timestep, tmp_path):
    full = scheduler_class(beta_schedule=beta_schedule, rescale_betas_zero_snr=rescale)
    truncated = truncated_scheduler(full, truncation_timestep)
    truncated.save_pretrained(tmp_path)
    restored = scheduler_class.from_pretrained(tmp_path)
    for scheduler in (truncated, restored):
        assert type(scheduler) is scheduler_class
        assert scheduler.config.num_train_timesteps == truncation_timestep
        assert torch.equal(scheduler.alphas_cumprod, full.alphas_cumprod[:truncation_timestep])
    json.loads(truncated.to_json_string())


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_full_length_is_the_identity(scheduler_class):
    full = scheduler_class(num_train_timesteps=200, prediction_type="v_prediction", timestep_spacing="leading")
    same = truncated_scheduler(full, 200)
    assert same is not full
    assert dict(same.config) == dict(full.config)
    assert torch.equal(same.alphas_cumprod, full.alphas_cumprod)


def test_truncation_composes_and_leaves_its_input_alone():
    full = DDIMScheduler()
    config = dict(full.config)
    twice = truncated_scheduler(truncated_scheduler(full, 300), 40)
    assert dict(full.config) == config
    assert torch.equal(twice.alphas_cumprod, full.alphas_cumprod[:40])


def test_short_schedule_is_not_a_truncated_one():
    """`num_train_timesteps=400` alone squeezes all betas into 400 steps: ᾱ ends at .017, not at .195."""
    # Both values are rounded to the given digits.
    assert truncated_scheduler(DDIMScheduler(), 400).alphas_cumprod[-1].item() == pytest.approx(0.195, abs=5e-4)
    assert DDIMScheduler(num_train_timesteps=400).alphas_cumprod[-1].item() == pytest.approx(0.017, abs=5e-4)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_final_level_of_ddim_is_kept(set_alpha_to_one):
    full = DDIMScheduler(set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    assert torch.equal(truncated_scheduler(full, 10).final_alpha_cumprod, full.final_alpha_cumprod)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize(("truncation_timestep", "steps"), [(1, 1), (2, 1), (10, 10), (10, 5), (12, 4), (300, 10)])
def test_chain_starts_at_the_last_level_and_recovers_the_image(scheduler_class, truncation_timestep, steps):
    """If the prediction is the true noise, every solver is exact: from x_T' = α x0 + σ ε it recovers x0."""
    options = {} if scheduler_class in SOLVERS else {"clip_sample": False}
    scheduler = truncated_scheduler(scheduler_class(**options), truncation_timestep)
    clean, noise = _images(1, 1, 4, 4).float().clamp(-1, 1), _images(1, 1, 4, 4, seed=1).float()
    alpha, sigma = alpha_sigma(scheduler, truncation_timestep - 1)
    sample = alpha * clean + sigma * noise
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[0] == truncation_timestep - 1
    assert len(scheduler.timesteps) == steps
    for index, timestep in enumerate(scheduler.timesteps):
        level = alpha_sigma(scheduler, timestep, index)
        output = from_original_sample(clean, sample, *level, "epsilon")  # ε̂ of a perfect denoiser
        sample = scheduler.step(output, timestep, sample).prev_sample
    # Float32 rounding of ε̂, which divides by σ_0 = .01; the last step then divides by α near 1.
    torch.testing.assert_close(sample, clean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", SOLVERS)
@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("truncation_timestep", [1, 2, 50])
def test_other_spacings_start_at_the_last_level_too(scheduler_class, spacing, truncation_timestep):
    scheduler = truncated_scheduler(scheduler_class(**{spacing: True}), truncation_timestep)
    scheduler.set_timesteps(1 if truncation_timestep == 1 else 2)
    alpha, sigma = alpha_sigma(scheduler, truncation_timestep - 1)
    # The solver interpolates log σ: float32 rounding.
    assert scheduler.sigmas[0].item() == pytest.approx((sigma / alpha).item(), rel=1e-5)
    # Exponential and beta spacings round the timestep down with every schedule, by one at most.
    assert truncation_timestep - 2 <= scheduler.timesteps[0] <= truncation_timestep - 1


@pytest.mark.parametrize("truncation_timestep", [0, -3, 1001, 10.0, "10"])
def test_bad_truncation_is_refused(truncation_timestep):
    with pytest.raises(InputError, match="`truncation_timestep` must be an integer from 1 to 1000"):
        truncated_scheduler(DDIMScheduler(), truncation_timestep)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=["sigmas", "flow", "flow grid"],
)
def test_schedule_without_betas_is_refused(scheduler):
    with pytest.raises(InputError, match="betas that can be truncated"):
        truncated_scheduler(scheduler, 10)


def test_truncated_samples_do_not_depend_on_the_batch():
    scheduler = truncated_scheduler(DDIMScheduler(), 100)
    images, indices = _images(5, 1, 4, 4).float().clamp(-1, 1), torch.arange(5)
    together = truncated_samples(images, indices, scheduler, epoch=3, seed=7)
    order = torch.tensor([4, 2])
    assert torch.equal(truncated_samples(images[order], order, scheduler, epoch=3, seed=7), together[order])
    for other in ({"epoch": 4, "seed": 7}, {"epoch": 3, "seed": 8}, {"epoch": 7, "seed": 3}):
        assert not torch.isclose(truncated_samples(images, indices, scheduler, **other), together).any(dim=0).all()


def test_truncated_samples_have_the_moments_of_the_forward_process():
    scheduler = truncated_scheduler(DDIMScheduler(), 300)
    alpha, sigma = alpha_sigma(scheduler, 299)
    samples = truncated_samples(torch.full((2000, 1, 4, 4), -0.5), torch.arange(2000), scheduler)
    # 32,000 normal numbers: standard errors σ/179 and σ/253; tolerance: four times that.
    assert samples.mean().item() == pytest.approx(-0.5 * alpha.item(), abs=4 * sigma.item() / 179)
    assert samples.std().item() == pytest.approx(sigma.item(), rel=4 / 253)


def test_truncated_samples_need_one_index_for_each_image():
    with pytest.raises(InputError, match="indices"):
        truncated_samples(torch.zeros(3, 1, 2, 2), torch.arange(2), DDIMScheduler())


# --- The actual chain of a scheduler ----------------------------------------------------------------------------------


SPACINGS = ["leading", "linspace", "trailing"]


def _check_chain(scheduler, steps: int, timesteps: list[int]) -> None:
    """Check a chain: equal to that of the scheduler, decreasing to 0 or above, with a noise level for each timestep."""
    assert timesteps == scheduler.timesteps.tolist()
    assert scheduler.config.num_train_timesteps > timesteps[0] and timesteps[-1] >= 0
    assert all(later <= earlier for earlier, later in pairwise(timesteps))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        assert len(sigmas) == len(timesteps) + 1 and (sigmas[1:-1] < sigmas[:-2]).all()
        assert scheduler.num_inference_steps == len(timesteps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, DDPMScheduler, DDIMParallelScheduler, DDPMParallelScheduler]
)
def test_every_number_of_steps_makes_a_chain_of_so_many(scheduler_class, spacing):
    scheduler, stock = (scheduler_class(timestep_spacing=spacing) for _ in range(2))
    surplus = 0
    for steps in range(1, 1001):
        timesteps = set_timesteps(scheduler, steps)
        _check_chain(scheduler, steps, timesteps)
        assert len(set(timesteps)) == len(timesteps) == steps == scheduler.num_inference_steps
        stock.set_timesteps(steps)
        surplus += len(stock.timesteps) != steps
        assert timesteps == stock.timesteps.tolist()[:steps]
    assert surplus == (62 if spacing == "trailing" else 0)  # diffusers' defect; when fixed, remove the workaround


SOLVER_OPTIONS = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"final_sigmas_type": "sigma_min"},
]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("length", [15, 100])
@pytest.mark.parametrize(
    "scheduler_class",
    [
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        SASolverScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_solvers_pass_no_noise_level_twice(scheduler_class, length, spacing):
    config = scheduler_class().config
    for options in (one for one in SOLVER_OPTIONS if one.keys() <= config.keys()):
        places = {"timestep_spacing": spacing} if "timestep_spacing" in config else {}
        scheduler = scheduler_class(num_train_timesteps=length, **options, **places)
        for steps in range(1, length + 1) if length == 15 else (1, 61, 99, 100):
            timesteps = set_timesteps(scheduler, steps)
            _check_chain(scheduler, steps, timesteps)
            # Only the largest numbers of steps can need more noise levels than exist.
            assert len(timesteps) == steps or (len(timesteps) == steps - 1 and steps == length)


@pytest.mark.parametrize("skip_prk_steps", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pndm_calls_the_denoiser_more_often_than_it_steps(skip_prk_steps, spacing):
    scheduler = PNDMScheduler(skip_prk_steps=skip_prk_steps, timestep_spacing=spacing)
    for steps in (4, 10, 61, 103, 1000):
        timesteps = set_timesteps(scheduler, steps)
        _check_chain(scheduler, steps, timesteps)
        assert len(timesteps) == steps + (1 if skip_prk_steps else 9)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (DDIMScheduler(), 0, "`num_inference_steps` must be at least 1, got 0"),
        (DDIMScheduler(), 1001, "`num_inference_steps` must be from 1 to 1000, got 1001"),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), 1001, "must be from 1 to 1000, got 1001"),
        (DDIMScheduler(), 10.0, "`num_inference_steps` must be an integer, got 10.0"),
        (DDIMScheduler(), True, "`num_inference_steps` must be an integer, got True"),
        (PNDMScheduler(), 3, "must be a number of steps that PNDMScheduler allows, got 3"),
        (LCMScheduler(), 51, "must be a number of steps that LCMScheduler allows, got 51"),
        (TCDScheduler(), 900, "must be a number of steps that TCDScheduler allows, got 900"),
        (DDIMScheduler(steps_offset=1), 1000, "must be a number of steps that DDIMScheduler allows, got 1000"),
        (
            DDIMInverseScheduler(),
            10,
            "`scheduler` must have decreasing timesteps, got 'DDIMInverseScheduler'",
        ),
    ],
)
def test_chains_that_do_not_exist_are_refused(scheduler, steps, message):
    with pytest.raises(InputError, match=message):
        set_timesteps(scheduler, steps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("rescale", [False, True])
def test_noise_alone_says_nothing_of_the_image(prediction_type, rescale):
    options = {"prediction_type": prediction_type, "timestep_spacing": "trailing", "rescale_betas_zero_snr": rescale}
    for scheduler in (DDIMScheduler(**options), DDPMScheduler(**options)):
        timesteps = set_timesteps(scheduler, 10)
        silent = rescale and prediction_type == "epsilon"
        assert reversible_steps(scheduler, timesteps) == set(range(1 if silent else 0, 10))
    clean = DDIMScheduler(num_train_timesteps=4, trained_betas=[0.0, 0.1, 0.2, 0.3], prediction_type=prediction_type)
    assert reversible_steps(clean, [3, 2, 1, 0]) == set(range(4 if prediction_type == "sample" else 3))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDIMScheduler(), True),
        (PNDMScheduler(), True),
        (EulerDiscreteScheduler(), False),
        (FlowMatchEulerDiscreteScheduler(), False),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), False),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_schedulers_preserve_the_variance(scheduler, expected):
    assert preserves_variance(scheduler) is expected
