"""Priors: the Gaussian compared with its closed form, the networks with their documented behaviour."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from makers.models import make_unet

from ot_diffusers import FlowMatchPipeline
from ot_diffusers.errors import InputError
from ot_diffusers.models.prior import FewStepPrior, GaussianPrior, PriorGenerator
from ot_diffusers.models.prior_networks import PriorDiscriminator, PriorEncoder
from ot_diffusers.schedules import alpha_sigma, record_calls, truncated_scheduler

LEVEL = alpha_sigma(truncated_scheduler(DDIMScheduler(), 300), 299)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _data(count: int = 40, seed: int = 0) -> torch.Tensor:
    """Correlated images [count, 1, 2, 3] in [-1, 1]."""
    mixing = torch.randn(6, 6, generator=_seeded(99))
    return (torch.randn(count, 6, generator=_seeded(seed)) @ mixing / 3).tanh().view(count, 1, 2, 3)


def _generator(**options) -> PriorGenerator:
    torch.manual_seed(0)
    return PriorGenerator(
        **{"truncation_timestep": 300, "sample_size": 8, "out_channels": 1, "latent_dim": 5, **options}
    ).eval()


def _small(**options) -> PriorGenerator:
    return _generator(block_out_channels=(16, 8), **options)


def _latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, means and covariances of two Gaussians in five dimensions."""
    mixing = torch.randn(2, 5, 5, generator=_seeded(3), dtype=torch.float64)
    return torch.tensor([1.0, 3.0]), torch.stack([torch.full((5,), -9.0), torch.ones(5)]), mixing @ mixing.mT


def _tuned(calls: int = 2, flow: bool = True):
    """What few-step tuning leaves, but for its weights."""
    ddim = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else ddim
    record_calls(scheduler, calls)
    pipe = (FlowMatchPipeline if flow else DDIMPipeline)(make_unet(seed=0, block_out_channels=(8, 16)), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PRIORS = {
    "standard": lambda: GaussianPrior(truncation_timestep=300, sample_size=(2, 3), out_channels=1),
    "gaussian": lambda: GaussianPrior.from_images(_data(), 300),
    "low rank": lambda: GaussianPrior.from_images(_data(), 300, rank=2),
    "mixture": lambda: GaussianPrior.from_images(_data(), 300, labels=torch.arange(40) % 3, rank=2),
    "generator": _small,
    "direct": lambda: _small(prediction_type="noisy_sample"),
    "group": lambda: _small(norm_type="group"),
    "few step": lambda: FewStepPrior.from_pipeline(_tuned(), 300),
    "fitted latents": lambda: _small().with_latents(*_latents()),
}


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]()


def _affine_map(prior: GaussianPrior) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset [D] and matrix [latents, D] of a single Gaussian, from the images of zero and basis latents."""
    offset = prior(torch.zeros(1, prior.latent_dim)).sample.flatten()
    return offset, prior(torch.eye(prior.latent_dim)).sample.flatten(1) - offset


def test_gaussian_has_the_moments_of_the_data():
    """x = μ + Fᵀz with FᵀF the sample covariance."""
    data = _data().flatten(1)
    offset, matrix = _affine_map(PRIORS["gaussian"]())
    # Values near 1, stored in float32.
    torch.testing.assert_close(offset, data.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.T @ matrix, data.T.cov(), rtol=0, atol=2e-6)


def test_low_rank_keeps_the_leading_directions_and_the_total_variance():
    covariance = _data().flatten(1).T.cov()
    variances, directions = torch.linalg.eigh(covariance)
    _, matrix = _affine_map(PRIORS["low rank"]())
    ours = matrix.T @ matrix
    # Float32 rounding of the products.
    torch.testing.assert_close(ours.trace(), covariance.trace(), rtol=1e-5, atol=0)
    for index in (-1, -2):
        explained = directions[:, index] @ ours @ directions[:, index]
        torch.testing.assert_close(explained, variances[index], rtol=1e-4, atol=0)


def test_fewer_images_than_pixels_still_give_their_covariance():
    data = _data(4)
    _offset, matrix = _affine_map(GaussianPrior.from_images(data, 300))
    torch.testing.assert_close(matrix.T @ matrix, data.flatten(1).T.cov(), rtol=0, atol=2e-6)


def test_mixture_has_the_mean_and_the_share_of_each_class():
    """Three point masses at −1, 0 and 1 with shares 1/2, 1/3 and 1/6."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(2)
    images = (labels - 1.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    samples = GaussianPrior.from_images(images, 10, labels=labels)
    prior = samples(randn_tensor((6000, samples.latent_dim), generator=_seeded())).sample
    # Every draw is one of the three points, to float32 precision.
    torch.testing.assert_close(prior, prior.round(), rtol=0, atol=1e-6)
    shares = torch.bincount(prior[:, 0, 0, 0].round().long() + 1) / 6000
    # Binomial standard deviation √(.25/6000) = .0065; tolerance: four times that.
    torch.testing.assert_close(shares, torch.tensor([1 / 2, 1 / 3, 1 / 6]), rtol=0, atol=0.026)


def test_autocast_leaves_closed_forms_as_they_are():
    """Autocast is meant for networks: samples of a mixture of Gaussians and fitted latents are bitwise equal under
    it."""
    labels = torch.arange(len(_data())) % 2
    mixture = GaussianPrior.from_images(_data(), 10, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        images = mixture.draw(8, generator=_seeded())
        latents = _small().with_latents(*_latents())._draw_latents(8, _seeded(), torch.device("cpu"))
    assert torch.equal(images, mixture.draw(8, generator=_seeded()))
    assert torch.equal(latents, _small().with_latents(*_latents())._draw_latents(8, _seeded(), torch.device("cpu")))


def test_diffused_gaussian_has_the_moments_of_the_truncated_set():
    """x_T' = α x0 + σ ε: mean α μ, covariance α² Σ + σ² I."""
    alpha, sigma = LEVEL
    data = _data().flatten(1)
    samples = PRIORS["gaussian"]().sample(20_000, *LEVEL, generator=_seeded()).flatten(1)
    # Variances are near 1: standard errors 1/√20000 = .007 and, for the covariance, .01; tolerance: four times that.
    torch.testing.assert_close(samples.mean(0), alpha * data.mean(0), rtol=0, atol=0.03)
    expected = alpha**2 * data.T.cov() + sigma**2 * torch.eye(6)
    torch.testing.assert_close(samples.T.cov(), expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_standard_gaussian_draws_what_a_pipeline_draws(batch_size):
    prior = GaussianPrior(truncation_timestep=1000, sample_size=8, out_channels=3)
    assert torch.equal(
        prior.sample(batch_size, *LEVEL, generator=_seeded(5)),
        randn_tensor((batch_size, 3, 8, 8), generator=_seeded(5)),
    )
    assert prior.nfe == 0


def test_one_generator_per_image_makes_images_independent_of_the_batch(prior):
    together = prior.sample(5, *LEVEL, generator=[_seeded(seed) for seed in range(5)])
    for seed in (0, 3):
        alone = prior.sample(1, *LEVEL, generator=[_seeded(seed)])
        # Matrix products may sum in a different order for different batch sizes: float32 rounding of values near 1.
        torch.testing.assert_close(alone[0], together[seed], rtol=0, atol=1e-5)


def test_saved_prior_loads_the_same(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    restored = type(prior).from_pretrained(tmp_path)
    saved, loaded = (json.loads(model.to_json_string()) for model in (prior, restored))
    assert loaded == saved
    assert [p.requires_grad for p in restored.parameters()] == [p.requires_grad for p in prior.parameters()]
    for name, tensor in prior.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name
    assert type(prior).from_config(prior.config).image_shape == prior.image_shape
    latents = torch.randn(2, prior.latent_dim, generator=_seeded())
    # Memory-mapped weights may be aligned differently, which changes the last bit of sums.
    torch.testing.assert_close(restored(latents).sample, prior(latents).sample, rtol=0, atol=1e-5)


def test_dtype_moves_and_return_types(prior):
    prior = prior.to(torch.bfloat16)
    latents = torch.randn(2, prior.latent_dim, dtype=torch.bfloat16)
    images = prior(latents).sample
    assert images.dtype == torch.bfloat16
    assert torch.equal(prior(latents, return_dict=False)[0], images)
    assert prior.sample(2, *LEVEL).dtype == torch.bfloat16


def test_latents_of_another_width_are_refused(prior):
    with pytest.raises(InputError, match=f"`latents` must have shape .B, {prior.latent_dim}"):
        prior(torch.zeros(2, prior.latent_dim + 1))


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_tuned_pipeline_makes_the_same_images_as_a_prior(flow, calls):
    pipe = _tuned(calls, flow)
    prior = FewStepPrior.from_pipeline(pipe, 300)
    assert prior.nfe == calls and prior.image_shape == (1, 8, 8) and prior.prediction_type == "sample"
    with torch.no_grad():
        images = prior.draw(3, generator=_seeded(7))
    expected = pipe(3, _seeded(7), num_inference_steps=calls, output_type="np").images
    # The chain computes x̂0 and the rest of z apart: float32 rounding of values near 1.
    np.testing.assert_allclose(images.numpy()[:, 0] / 2 + 0.5, expected[..., 0], rtol=0, atol=1e-5)
    next(pipe.unet.parameters()).data.fill_(9)
    assert torch.equal(prior.draw(3, generator=_seeded(7)), images)  # a copy


def test_what_is_no_tuned_pipeline_is_refused():
    with pytest.raises(InputError, match="`pipeline` must be tuned for a few calls by train_few_step"):
        FewStepPrior.from_pipeline(DDIMPipeline(make_unet(), DDIMScheduler()), 300)
    pipe = _tuned(flow=False)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="`pipeline` must have the scheduler that it was tuned with"):
        FewStepPrior.from_pipeline(pipe, 300)
    pipe.unet.register_to_config(num_class_embeds=3)
    with pytest.raises(InputError, match="`pipeline` must know the classes of its denoiser"):
        FewStepPrior.from_pipeline(pipe, 300)


def test_a_tuned_pipeline_of_classes_makes_the_same_images_as_a_prior():
    scheduler, names = FlowMatchEulerDiscreteScheduler(), {0: "a", 1: "b"}
    record_calls(scheduler, 2)
    pipe = FlowMatchPipeline(make_unet(seed=0, num_class_embeds=3), scheduler, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    prior = FewStepPrior.from_pipeline(pipe, 300)
    assert prior.num_classes == 2  # without the null label
    with torch.no_grad():
        images = prior.draw(3, generator=_seeded(7), class_labels=torch.tensor([1, 0, 1]))
    call = {"class_labels": ["b", "a", "b"], "num_inference_steps": 2, "output_type": "np"}
    expected = pipe(3, _seeded(7), **call).images
    np.testing.assert_allclose(images.numpy()[:, 0] / 2 + 0.5, expected[..., 0], rtol=0, atol=1e-5)  # as above
    with pytest.raises(InputError, match="`class_labels` must be given to a FewStepPrior of 2 classes, got None"):
        prior.draw(3)


def test_a_generator_of_classes_makes_them_from_the_same_latents(tmp_path):
    prior, latents = _small(num_classes=3), torch.randn(4, 5, generator=_seeded())
    labels = torch.tensor([0, 2, 2, 1])
    with torch.no_grad():
        images = prior(latents, class_labels=labels).sample
        other = prior(latents, class_labels=labels.clone().index_fill_(0, torch.tensor([1]), 0)).sample
        # Of the same batch size, so that equal rows are equal bit for bit.
        assert [torch.equal(*rows) for rows in zip(images, other, strict=True)] == [True, False, True, True]
        assert torch.equal(
            prior.sample(4, *LEVEL, generator=_seeded(1), class_labels=labels)[2:],
            prior.sample(4, *LEVEL, generator=_seeded(1), class_labels=torch.tensor([1, 1, 2, 1]))[2:],
        )
    prior.save_pretrained(tmp_path)
    restored = PriorGenerator.from_pretrained(tmp_path)
    torch.testing.assert_close(restored(latents, class_labels=labels).sample, images, rtol=0, atol=1e-5)  # as above
    for given, message in (
        (None, "`class_labels` must be given to a PriorGenerator of 3 classes, got None"),
        (labels[:2], r"`class_labels` must have shape \(4,\), got \(2,\)"),
    ):
        for call in (prior.draw, lambda _, class_labels: prior(latents, class_labels=class_labels)):
            with pytest.raises(InputError, match=message):
                call(4, class_labels=given)
    with pytest.raises(InputError, match="`class_labels` must be none for a PriorGenerator that makes images of any"):
        _small()(latents, class_labels=labels)
    with pytest.raises(InputError, match="`num_latent_components` must be a multiple of the 3 classes, got 4"):
        prior.with_latents(torch.ones(4), torch.zeros(4, 5), torch.eye(5).repeat(4, 1, 1))


def test_fitted_latents_of_a_class_come_from_its_own_mixture():
    """Two Gaussians of each of three classes, whose means are ten apart and whose weights are 1 : 3."""
    means = 10.0 * torch.arange(6)[:, None].expand(6, 5)
    prior = _small(num_classes=3).with_latents(torch.tensor([1.0, 3.0] * 3), means, torch.eye(5).repeat(6, 1, 1))
    labels = torch.arange(9000) % 3
    found = (prior._draw_latents(9000, _seeded(), torch.device("cpu"), labels).mean(dim=1) / 10).round().long()
    assert torch.equal(found // 2, labels)
    # 3,000 draws of each: four standard deviations are .03.
    shares = torch.stack([(found[labels == label] % 2).float().mean() for label in range(3)])
    torch.testing.assert_close(shares, torch.full((3,), 0.75), rtol=0, atol=0.03)


def test_encoder_and_discriminator_know_the_class():
    options = {"sample_size": 8, "in_channels": 1, "block_out_channels": (16, 8), "num_classes": 3}
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 2])
    encoder = PriorEncoder(latent_dim=4, **options)
    first, second = (encoder(images, class_labels=asked).mean for asked in (labels, labels.flip(0)))
    assert not torch.isclose(first, second).any(dim=1).all()
    discriminator = PriorDiscriminator(use_spectral_norm=False, **options)
    hidden, weight, bias = discriminator.blocks(images), discriminator.head.weight, discriminator.head.bias
    projected = (hidden * (weight[0] + weight[1 + labels])).sum(1) + bias[0] + bias[1 + labels]
    torch.testing.assert_close(discriminator(images, labels), projected, rtol=0, atol=1e-5)  # float32 sums


def test_gaussian_parameters_are_frozen():
    assert not any(parameter.requires_grad for parameter in PRIORS["mixture"]().parameters())


@pytest.mark.parametrize(
    ("size", "widths"), [(8, (16, 8)), (28, (16, 8, 4)), (32, (16, 8, 8, 4)), ((12, 20), (8, 8, 4)), (4, (8,))]
)
def test_generator_encoder_and_discriminator_fit_any_size(size, widths):
    generator = _generator(sample_size=size, block_out_channels=widths, out_channels=3)
    images = generator(torch.randn(2, 5)).sample
    assert images.shape[1:] == generator.image_shape
    posterior = PriorEncoder(sample_size=size, latent_dim=5, block_out_channels=widths)(images)
    assert generator(posterior.sample()).sample.shape == images.shape
    assert PriorDiscriminator(sample_size=size, block_out_channels=widths)(images).shape == (2,)


def test_only_clean_images_are_bounded():
    latents = 30 * torch.randn(8, 5, generator=_seeded())
    assert _small()(latents).sample.abs().max() <= 1
    direct = _small(prediction_type="noisy_sample")
    torch.testing.assert_close(direct(latents).sample.tanh(), _small()(latents).sample, rtol=0, atol=0)


def test_both_forms_have_the_same_parameters():
    counts = {sum(p.numel() for p in _small(prediction_type=kind).parameters()) for kind in ("sample", "noisy_sample")}
    assert len(counts) == 1


def test_gradients_reach_the_generator_through_the_diffused_sample():
    prior = _small()
    prior.sample(4, *LEVEL, generator=_seeded()).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in prior.parameters())


def test_group_norm_makes_training_independent_of_the_batch():
    prior = _small(norm_type="group").train()
    latents = torch.randn(6, 5, generator=_seeded())
    # Matrix products of different batch sizes: float32 rounding of values below 1.
    torch.testing.assert_close(prior(latents[:1]).sample, prior(latents).sample[:1], rtol=0, atol=1e-5)


def test_spectral_norm_bounds_each_layer_and_survives_saving(tmp_path):
    torch.manual_seed(0)
    discriminator = PriorDiscriminator(sample_size=8, in_channels=1, block_out_channels=(16, 8))
    for _ in range(30):  # one power iteration per call
        discriminator(torch.randn(2, 1, 8, 8))
    discriminator.eval()
    # The power iteration has converged to a few digits only.
    assert torch.linalg.matrix_norm(discriminator.head.weight, 2).item() == pytest.approx(1, rel=1e-3)
    for layer in discriminator.blocks:
        if hasattr(layer, "weight"):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-2)
    discriminator.save_pretrained(tmp_path)
    images = torch.randn(3, 1, 8, 8, generator=_seeded())
    restored = PriorDiscriminator.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(restored(images), discriminator(images), rtol=0, atol=1e-5)  # as for the priors


def test_encoder_survives_saving_and_samples_its_posterior(tmp_path):
    torch.manual_seed(0)
    encoder = PriorEncoder(sample_size=8, in_channels=1, latent_dim=4, block_out_channels=(16, 8)).eval()
    encoder.save_pretrained(tmp_path)
    images = torch.randn(1, 1, 8, 8, generator=_seeded())
    posterior = PriorEncoder.from_pretrained(tmp_path)(images)
    torch.testing.assert_close(posterior.mean, encoder(images).mean, rtol=0, atol=1e-5)
    draws = torch.cat([posterior.sample(_seeded(seed)) for seed in range(2000)])
    # Standard errors of 2,000 draws with a standard deviation near 1: .022 and 1.6%; tolerance: four times that.
    torch.testing.assert_close(draws.mean(0), posterior.mean[0], rtol=0, atol=0.09)
    torch.testing.assert_close(draws.std(0), (posterior.log_variance[0] / 2).exp(), rtol=0.064, atol=0)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"sample_size": 30, "block_out_channels": (8, 8, 8)}, "sample_size"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"norm_type": "layer"}, "norm_type"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"truncation_timestep": 0}, "truncation_timestep"),
    ],
)
def test_bad_generator_options_are_refused(options, argument):
    with pytest.raises(InputError, match=f"`{argument}`"):
        PriorGenerator(**{"truncation_timestep": 10, **options})


def test_bad_data_for_the_gaussian_is_refused():
    for options, argument in (
        ({"images": torch.zeros(1, 1, 2, 2)}, "images"),
        ({"images": torch.zeros(4, 1, 2, 2), "labels": torch.tensor([0, 0, 0, 1])}, "labels"),
        ({"images": torch.zeros(4, 1, 2, 2), "labels": torch.zeros(3)}, "labels"),
        ({"images": torch.zeros(4, 1, 2, 2), "rank": 5}, "rank"),
    ):
        with pytest.raises(InputError, match=f"`{argument}`"):
            GaussianPrior.from_images(truncation_timestep=10, **options)


def test_a_clean_prior_moves_to_another_step_as_a_copy():
    prior = _generator(prediction_type="sample")
    moved = prior.at_truncation_timestep(7)
    latents = torch.randn(2, prior.latent_dim)
    assert (moved.config.truncation_timestep, prior.config.truncation_timestep) == (7, 300)
    assert torch.equal(moved(latents).sample, prior(latents).sample)
    with pytest.raises(InputError, match=r"`truncation_timestep` must be at least 1, got 0"):
        prior.at_truncation_timestep(0)
    with pytest.raises(InputError, match="`prior` must generate clean images"):
        _generator(prediction_type="noisy_sample").at_truncation_timestep(7)


def test_fitted_latents_have_the_moments_of_the_mixture():
    prior = _small().with_latents(*_latents())
    weight, means, covariances = _latents()
    actual = prior._draw_latents(20_000, _seeded(), torch.device("cpu"))
    first = actual.mean(dim=1) < -4  # the components are ten apart, and each has a spread of about one
    assert first.float().mean().item() == pytest.approx(weight[0].item() / 4, abs=0.01)  # three standard errors
    for rows, mean, covariance in zip((first, ~first), means, covariances, strict=True):
        # 5,000 draws or more: standard errors of 1/70 standard deviation for means, and of 1/50 for variances.
        scale = covariance.diagonal().max().item()
        torch.testing.assert_close(actual[rows].mean(0), mean, rtol=0, atol=scale**0.5 / 15)
        torch.testing.assert_close(actual[rows].T.cov(), covariance.float(), rtol=0, atol=scale / 10)


def test_one_component_of_unit_variance_is_the_standard_normal():
    plain = _small()
    fitted = plain.with_latents(torch.ones(1), torch.zeros(1, 5), torch.eye(5)[None])
    images = [prior.draw(4, generator=_seeded()) for prior in (plain, fitted)]
    # A product with the identity sums in a different order.
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)
