"""The losses: closed forms, the meaning of weights, the choice of references, and the flow of gradients."""

from __future__ import annotations

import pytest
import torch
from makers.draws import cloud as _cloud

from ot_diffusers.errors import InputError
from ot_diffusers.losses.denoising import (
    denoising_loss,
    disjoint_reference_indices,
    image_features,
    ot_loss,
    squash_to_image,
)
from ot_diffusers.models.feature_extractor import ConvFeatureExtractor
from ot_diffusers.transport import self_transport_cost, sinkhorn_divergence


def _network() -> ConvFeatureExtractor:
    torch.manual_seed(0)
    return ConvFeatureExtractor(sample_size=8, block_out_channels=(4, 8), feature_dim=16)


def test_denoising_loss_is_the_mean_square_in_float32():
    output = torch.full((2, 1, 4, 4), 3.0, dtype=torch.bfloat16, requires_grad=True)
    loss = denoising_loss(output, torch.zeros(2, 1, 4, 4))
    assert loss.dtype == torch.float32 and loss.item() == 9.0
    loss.backward()
    assert torch.allclose(output.grad.float(), torch.full((2, 1, 4, 4), 2 * 3 / 32), rtol=4e-3)  # bfloat16: 8 bits


def test_squashing():
    values = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    assert torch.equal(squash_to_image(values, "clamp"), torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    assert torch.equal(squash_to_image(values, "tanh"), values.tanh())
    with pytest.raises(InputError, match="`squash` must be clamp or tanh, got 'sigmoid'"):
        squash_to_image(values, "sigmoid")


# --- features of predictions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("squash", ["clamp", "tanh"])
def test_feature_gradients_reach_the_images_and_not_the_network(squash):
    network = _network()
    images = (torch.rand(3, 1, 8, 8) - 0.5).requires_grad_()
    image_features(network, images, squash).sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_features_leave_the_callers_autocast():
    network, images = _network(), torch.rand(3, 1, 8, 8) * 2 - 1
    expected = image_features(network, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = image_features(network, images)
        from_half = image_features(network, images.bfloat16())
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    assert from_half.dtype == torch.float32


def test_features_are_those_the_guidance_and_the_evaluation_see():
    network, images = _network(), torch.randn(3, 1, 8, 8)
    assert torch.equal(image_features(network, images), network.extract(images))


# --- the transport term ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "geomloss"])
def test_ot_loss_is_the_divergence_up_to_the_references_own_cost(backend):
    features, references = _cloud(16, 4).float(), _cloud(40, 4, seed=1).float()
    loss = ot_loss(features, references, blur=0.5, backend=backend)
    divergence = sinkhorn_divergence(features, references, blur=0.5, backend=backend)
    constant = 0.5 * self_transport_cost(references, blur=0.5) if backend == "native" else 0.0
    torch.testing.assert_close(loss, divergence + constant, rtol=1e-5, atol=1e-6)  # rounding of float32 sums


def test_equal_weights_scale_the_loss_by_the_weight():
    features, references = _cloud(16, 4), _cloud(40, 4, seed=1)
    plain = ot_loss(features, references, blur=0.5)
    weighted = ot_loss(features, references, blur=0.5, sample_weights=torch.full((16,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(weighted, plain / 4)


def test_a_weight_counts_as_repetition():
    # Weights (1, ½, ½, …): the divergence of the cloud with the first image twice, times the mean weight.
    features, references = _cloud(6, 3).requires_grad_(), _cloud(30, 3, seed=1)
    weights = torch.tensor([1.0, 0.5, 0.5, 1.0, 0.5, 0.5], dtype=torch.float64)
    loss = ot_loss(features, references, blur=0.5, sample_weights=weights)
    owner = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5])
    expected = weights.mean() * ot_loss(features[owner], references, blur=0.5)
    # Both solves stop at a marginal error of 1e-4.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    gradient, expected_gradient = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_an_image_of_no_weight_neither_pulls_nor_is_pulled():
    features, references = _cloud(6, 3), _cloud(30, 3, seed=1)
    outlier = torch.cat([features, features.new_full((1, 3), 50.0)]).requires_grad_()
    weights = torch.cat([torch.ones(6), torch.tensor([1e-8])]).double()
    gradient = torch.autograd.grad(ot_loss(outlier, references, blur=0.5, sample_weights=weights), outlier)[0]
    features.requires_grad_()
    expected = torch.autograd.grad(ot_loss(features, references, blur=0.5), features)[0]
    assert gradient[-1].norm() < 1e-6  # weight · distance = 1e-8 · 90
    # The gradient of each image is multiplied by the mean weight, 6/7.
    torch.testing.assert_close(gradient[:-1], 6 / 7 * expected, rtol=1e-2, atol=1e-4)


def test_descending_the_loss_finds_the_references():
    features = _cloud(30, 2, shift=3.0).requires_grad_()
    references = _cloud(60, 2, seed=1)
    before = sinkhorn_divergence(features, references, blur=0.3).item()
    for _ in range(20):  # one gradient step with N·lr = 0.5 halves the displacement
        (gradient,) = torch.autograd.grad(ot_loss(features, references, blur=0.3), features)
        features.data -= 15 * gradient
    after = sinkhorn_divergence(features, references, blur=0.3).item()
    assert after < 0.01 * before


def test_one_reference_is_refused():
    with pytest.raises(InputError, match="`reference_features` must hold at least 2 rows"):
        ot_loss(torch.zeros(4, 2), torch.zeros(1, 2), blur=0.5)


# --- references outside the batch -----------------------------------------------------------------------------------


def test_references_are_distinct_and_disjoint_from_the_batch():
    generator = torch.Generator().manual_seed(0)
    batch = torch.randperm(100, generator=generator)[:20]
    for _ in range(20):
        chosen = disjoint_reference_indices(100, batch, 50, generator)
        assert len(chosen.unique()) == 50
        assert not set(chosen.tolist()) & set(batch.tolist())


def test_references_are_uniform():
    generator, batch = torch.Generator().manual_seed(0), torch.arange(10)
    counts = torch.zeros(40)
    for _ in range(2000):
        counts[disjoint_reference_indices(40, batch, 10, generator)] += 1
    assert (counts[:10] == 0).all()
    # Each of 30 is drawn with probability 1/3: 667 ± 21; tolerance: five standard deviations.
    assert (counts[10:] - 2000 / 3).abs().max() < 5 * (2000 / 3 * 2 / 3) ** 0.5


def test_references_repeat_only_where_too_few_are_left():
    generator, batch = torch.Generator().manual_seed(0), torch.arange(6)
    assert sorted(disjoint_reference_indices(10, batch, 4, generator).tolist()) == [6, 7, 8, 9]
    repeated = disjoint_reference_indices(10, batch, 200, generator)
    assert len(repeated) == 200
    # 200 draws from four images miss one of them with probability 4·(3/4)^200 = 4e-25.
    assert set(repeated.tolist()) == {6, 7, 8, 9}


def test_references_follow_their_generator_alone():
    batch = torch.arange(5)
    torch.manual_seed(1)
    first = disjoint_reference_indices(50, batch, 10, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    assert torch.equal(first, disjoint_reference_indices(50, batch, 10, torch.Generator().manual_seed(3)))


def test_a_batch_that_is_the_whole_data_set_is_refused():
    with pytest.raises(InputError, match="`train_batch_size` must leave references in a data set of 8, got 8"):
        disjoint_reference_indices(8, torch.arange(8), 4, torch.Generator())
