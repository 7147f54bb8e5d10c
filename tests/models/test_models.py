"""Feature networks and reference sets: saving, loading, freezing and dtypes."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import init_empty_weights

from ot_diffusers import ConvFeatureExtractor, ReferenceBank, ResidualFeatureExtractor
from ot_diffusers.errors import InputError
from ot_diffusers.images import thumbnails
from ot_diffusers.transport import median_distance

NETWORKS = [ConvFeatureExtractor, ResidualFeatureExtractor]
SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "feature_dim": 12, "num_classes": 5}


def _images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network_class", NETWORKS)
def test_a_saved_network_comes_back_the_same_and_frozen(network_class, tmp_path):
    network = network_class(**SMALL, dataset="digits", data_fingerprint="abc")
    network.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == network_class.__name__
    assert config["dataset"] == "digits" and config["block_out_channels"] == [8, 16]
    # Memory-mapped weights may be aligned differently, which changes the last bit of sums.
    loaded = network_class.from_pretrained(tmp_path, disable_mmap=True)
    expected, actual = network(_images()), loaded(_images())
    assert torch.equal(actual.features, expected.features) and torch.equal(actual.logits, expected.logits)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config.data_fingerprint == "abc"


def test_batch_statistics_are_frozen_and_saved(tmp_path):
    """After training, the features of an image do not depend on the rest of the batch."""
    network = ResidualFeatureExtractor(**SMALL, norm_type="batch_norm")
    network.train()(_images(32))
    network.eval().save_pretrained(tmp_path)
    loaded = ResidualFeatureExtractor.from_pretrained(tmp_path)
    alone, together = loaded(_images()[:1]).features, loaded(_images()).features[:1]
    # Float32 rounding: kernels differ between batch sizes.
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, network(_images()[:1]).features, rtol=1e-5, atol=1e-6)
    untrained = ResidualFeatureExtractor(**SMALL, norm_type="batch_norm")
    assert not torch.equal(loaded.backbone[1].norm1.running_mean, untrained.backbone[1].norm1.running_mean)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_a_new_network_is_frozen_and_can_be_thawed(network_class):
    network = network_class(**SMALL)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    network.requires_grad_(True).train()
    network(_images()).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("network_class", NETWORKS)
def test_gradients_reach_the_images(network_class):
    images = _images().requires_grad_()
    network_class(**SMALL).extract(images * 1.5 - 0.75).sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("network_class", NETWORKS)
def test_extract_and_logits_take_the_models_range(network_class):
    network, images = network_class(**SMALL), _images()
    expected = network(images)
    # 2x − 1 and its inverse round in the last bits of float32.
    torch.testing.assert_close(network.extract(2 * images - 1), expected.features, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.logits(2 * images - 1), expected.logits, rtol=1e-4, atol=1e-6)
    assert torch.equal(network.extract(torch.full((1, 1, 8, 8), 7.0)), network(torch.ones(1, 1, 8, 8)).features)
    features, logits = network(images, return_dict=False)
    assert torch.equal(features, expected.features) and torch.equal(logits, expected.logits)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_an_image_has_the_same_features_in_any_batch(network_class):
    network, images = network_class(**SMALL), _images(6)
    # Convolutions may sum in a different order for different batch sizes.
    torch.testing.assert_close(network(images[2:3]).features, network(images).features[2:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(network_class, dtype, tmp_path):
    network = network_class(**SMALL)
    network.save_pretrained(tmp_path)
    expected = network(_images()).features
    half = network_class.from_pretrained(tmp_path, dtype=dtype)
    actual = half(_images().to(dtype)).features
    assert actual.dtype == dtype
    # The rounding errors of float16 and bfloat16, 2^-11 and 2^-8, over a few layers.
    assert (actual.float() - expected).norm() / expected.norm() < (0.01 if dtype == torch.float16 else 0.05)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_the_constructor_works_without_memory(network_class):
    with init_empty_weights():
        network = network_class(**SMALL)
        bank = ReferenceBank(100, 12)
    assert all(parameter.device.type == "meta" for model in (network, bank) for parameter in model.parameters())


def test_the_networks_differ_in_what_they_compute():
    torch.manual_seed(0)
    first, second = (network_class(**SMALL) for network_class in NETWORKS)
    assert first.state_dict().keys() != second.state_dict().keys()
    # The evaluator sees the whole image and has negative features; those of the other network are rectified.
    assert (first(_images()).features >= 0).all() and (second(_images()).features < 0).any()


def test_bad_sizes_are_named():
    with pytest.raises(InputError, match="`sample_size` must be a multiple of 4, got 10"):
        ConvFeatureExtractor(sample_size=10)
    for network_class in NETWORKS:
        with pytest.raises(InputError, match=r"`images` must have shape \[B, 1, 8, 8\], got \(2, 1, 16, 16\)"):
            network_class(**SMALL)(torch.zeros(2, 1, 16, 16))


# --- reference sets -------------------------------------------------------------------------------------------------


def test_a_saved_bank_comes_back(tmp_path):
    features = torch.randn(20, 6)
    bank = ReferenceBank.from_features(features, feature_scale=2.5, dataset="digits", data_fingerprint="abc")
    bank.save_pretrained(tmp_path)
    loaded = ReferenceBank.from_pretrained(tmp_path)
    assert torch.equal(loaded.features, features) and not loaded.features.requires_grad
    assert loaded.config.feature_scale == 2.5 and loaded.config.data_fingerprint == "abc"
    assert torch.equal(loaded.references(), features / 2.5)
    assert torch.equal(loaded().features, features)
    # float16 would round this integer: the references are always float32.
    assert ReferenceBank.from_pretrained(tmp_path, dtype=torch.float16).references().dtype == torch.float32


def test_a_bank_with_images_comes_back(tmp_path):
    images = torch.rand(20, 3, 16, 24) * 2 - 1
    bank = ReferenceBank.from_features(torch.randn(20, 6), images=images)
    bank.save_pretrained(tmp_path)
    loaded = ReferenceBank.from_pretrained(tmp_path)
    assert torch.equal(loaded.thumbnails, thumbnails(images)) and loaded.thumbnails.shape == (20, 3, 8, 8)
    assert median_distance(loaded.thumbnails.flatten(1)) == pytest.approx(loaded.config.pixel_scale)
    assert ReferenceBank.from_features(torch.randn(20, 6)).thumbnails is None


def test_a_bank_keeps_its_own_copy():
    features = torch.randn(20, 6)
    bank = ReferenceBank.from_features(features)
    features.zero_()
    assert bank.features.abs().sum() > 0


@pytest.mark.parametrize(
    "features, options, message",
    [
        (torch.zeros(1, 6), {}, "`num_samples` must be at least 2"),
        (torch.zeros(6), {}, r"`features` must have shape \[N, D\]"),
        (torch.full((4, 6), torch.nan), {}, "`features` must be finite"),
        (torch.zeros(4, 6), {"feature_scale": 0.0}, "`feature_scale` must be positive, got 0.0"),
        (torch.zeros(4, 6), {"images": torch.zeros(4, 1, 2, 2).byte()}, "`images` must be floats in .* .from uint8"),
        (torch.zeros(4, 6), {"images": torch.zeros(3, 1, 2, 2)}, r"`images` must have shape \[4, C, H, W\], got"),
    ],
)
def test_bad_banks_are_refused(features, options, message):
    with pytest.raises(InputError, match=message):
        ReferenceBank.from_features(features, **options)


def test_median_distance():
    # The points 0, 1 and 3 have the distances 1, 2 and 3.
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    # Standard normal points in D dimensions have a median distance of √(2D), to a percent with 500 rows.
    assert median_distance(torch.randn(500, 50, generator=torch.Generator().manual_seed(0))) == pytest.approx(
        10, rel=0.02
    )
    with pytest.raises(InputError, match="`features` must differ from one another"):
        median_distance(torch.zeros(5, 3))
