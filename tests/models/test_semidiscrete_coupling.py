"""A coupling is saved, loaded and used without its images being stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ot_diffusers import SemidiscreteCoupling
from ot_diffusers.data import ResidentImages
from ot_diffusers.errors import InputError
from ot_diffusers.images import to_uint8

pytestmark = pytest.mark.fast


def images_of(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """Bright bars at random places on the left half, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, size, size, generator=generator) * 0.2 - 1
    for image, row in zip(images, torch.randint(size - 2, (count,), generator=generator).tolist(), strict=True):
        image[:, row : row + 2, : size // 2] += 1.5
    return images.clamp(-1, 1)


def noise_of(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(9))


def test_it_comes_back_from_disk_with_its_images(tmp_path: Path) -> None:
    images, noise = to_uint8(images_of(150)), noise_of(64)
    coupling = SemidiscreteCoupling.from_images(images, dataset="bars", seed=3)
    coupling.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = SemidiscreteCoupling.from_pretrained(tmp_path)
    assert (loaded.config.dataset, loaded.config.seed, loaded.config.num_components) == ("bars", 3, None)
    assert 0 < loaded.config.chi_squared <= 0.02
    assert loaded.config.data_fingerprint == ResidentImages("bars", "train", None, images).fingerprint
    with pytest.raises(InputError, match="`images` must be given by `with_images`"):
        loaded.assign(noise)
    assert torch.equal(loaded.with_images(images).assign(noise), coupling.assign(noise))
    assert torch.equal(loaded(noise).indices, loaded(noise, return_dict=False)[0])


def test_paired_noise_is_nearer_and_every_image_is_as_likely() -> None:
    images, noise = images_of(100), noise_of(20_000)
    coupling = SemidiscreteCoupling.from_images(images)
    indices = coupling.assign(noise)
    paired, independent = (
        (chosen - noise).square().mean() for chosen in (coupling.pick(images, indices), images.repeat(200, 1, 1, 1))
    )
    assert paired < independent - 0.05
    counts = indices.bincount(minlength=100)
    # The counts of 20,000 draws alone have a χ² of N/20,000 = .005.
    assert (100 * (counts / 20_000 - 0.01)).square().mean() < 0.02 * 1.4 + 0.01


def test_flips_are_images_of_their_own() -> None:
    images, noise = images_of(60), noise_of(4000)
    coupling = SemidiscreteCoupling.from_images(images, flips=True)
    indices = coupling.assign(noise)
    assert coupling.config.num_points == 120
    assert indices.max() >= 60
    assert (indices < 60).float().mean() == pytest.approx(0.5, abs=0.05)
    chosen = coupling.pick(images, indices)
    for index, image in zip(indices[:50].tolist(), chosen, strict=False):
        assert torch.equal(image, images[index] if index < 60 else images[index - 60].flip(2))


def test_large_images_are_compared_in_principal_components() -> None:
    images, noise = images_of(120, size=24), noise_of(500, size=24)
    coupling = SemidiscreteCoupling.from_images(images, kept_share=0.9, tolerance=0.05)
    whole = SemidiscreteCoupling.from_images(images, kept_share=1, tolerance=0.05)
    components = coupling.components
    assert components is not None and whole.components is None
    assert coupling.config.num_components == len(components) < 120
    assert coupling.config.kept_share >= 0.9
    assert torch.equal(coupling.assign(noise), torch.cat([coupling.assign(row) for row in noise.split(1)]))
    torch.testing.assert_close(components @ components.T, torch.eye(len(components)), atol=1e-4, rtol=0)
    costs = [(each.pick(images, each.assign(noise)) - noise).square().mean() for each in (coupling, whole)]
    independent = (images.repeat(5, 1, 1, 1)[:500] - noise).square().mean()
    assert independent - costs[0] > 0.8 * (independent - costs[1])


def test_pairs_of_gaussian_data_follow_the_closed_form_map() -> None:
    """For N(0, Σ) the transport map is Σ^½ ε, which one Euler step from noise then takes; independent pairs have a mean
    in its place, without any variance. 600 atoms in the plane leave a few percent."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[0.25, 0.1], [0.0, 0.15]])
    images = (torch.randn(600, 2, generator=generator) @ factor.T).view(600, 1, 1, 2).clamp(-1, 1)
    noise = torch.randn(4000, 1, 1, 2, generator=generator)
    coupling = SemidiscreteCoupling.from_images(images)
    pairs = coupling.pick(images, coupling.assign(noise)).flatten(1)
    values, vectors = torch.linalg.eigh(images.flatten(1).T.cov())
    expected = noise.flatten(1) @ (vectors * values.sqrt()) @ vectors.T
    error = (pairs - images.flatten(1).mean(0) - expected).square().sum(1).mean()
    assert error < 0.05 * values.sum()
    torch.testing.assert_close(pairs.T.cov(), images.flatten(1).T.cov(), rtol=0.1, atol=0.003)


@pytest.mark.parametrize("flips", [False, True])
def test_with_labels_noise_goes_to_images_of_its_class(flips: bool, tmp_path: Path) -> None:
    """Each class receives its noise evenly, whatever the noise: labels and noise stay independent."""
    images, noise = images_of(90), noise_of(6000)
    labels = torch.arange(90) % 3
    coupling = SemidiscreteCoupling.from_images(images, labels=labels, flips=flips, tolerance=0.02)
    asked = torch.arange(6000) % 3
    indices = coupling.assign(noise, asked)
    assert torch.equal(labels[indices % 90], asked)
    points = 30 * (1 + flips)
    for label in range(3):
        counts = indices[asked == label].bincount(minlength=90 * (1 + flips)).float()
        counts = counts[labels.repeat(1 + flips) == label]
        # The counts of 2,000 draws alone have a χ² of points/2,000, with a deviation of √(2/points) of that.
        assert (points * counts / 2000 - 1).square().mean() < 0.02 * 1.4 + 2 * points / 2000
    assert torch.equal(indices[:7], torch.cat([coupling.assign(noise[i : i + 1], asked[i : i + 1]) for i in range(7)]))
    coupling.save_pretrained(tmp_path)
    again = SemidiscreteCoupling.from_pretrained(tmp_path).with_images(images)
    assert again.config.num_classes == 3
    assert torch.equal(again.assign(noise, asked), indices)


def test_one_class_is_the_coupling_without_labels() -> None:
    images, noise = images_of(60), noise_of(500)
    plain = SemidiscreteCoupling.from_images(images)
    single = SemidiscreteCoupling.from_images(images, labels=torch.zeros(60, dtype=torch.long))
    assert torch.equal(plain.potentials, single.potentials)
    assert torch.equal(plain.assign(noise), single.assign(noise, torch.zeros(500, dtype=torch.long)))


def test_labels_that_do_not_fit_are_refused() -> None:
    images, noise = images_of(6), noise_of(2)
    for labels, message in (
        (torch.zeros(5, dtype=torch.long), r"`labels` must be 6 integers, got \(5,\)"),
        (torch.tensor([0, 0, 0, 2, 2, 2]), "`labels` must count from 0, with at least two images in each class"),
        (torch.tensor([0, 0, 0, 0, 0, 1]), "`labels` must count from 0, with at least two images in each class"),
        (torch.full((6,), -1), "`labels` must count from 0"),
    ):
        with pytest.raises(InputError, match=message):
            SemidiscreteCoupling.from_images(images, labels=labels)
    coupling = SemidiscreteCoupling.from_images(images, labels=torch.arange(6) % 2)
    with pytest.raises(InputError, match="`labels` must be given to a coupling with labels"):
        coupling.assign(noise)
    with pytest.raises(InputError, match=r"`labels` must be 2 integers from 0 to 1, got \[0, 2\]"):
        coupling.assign(noise, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="`labels` must be given to a coupling with labels"):
        SemidiscreteCoupling.from_images(images).assign(noise, torch.tensor([0, 1]))


def test_bad_input_is_named(tmp_path: Path) -> None:
    images = images_of(40)
    coupling = SemidiscreteCoupling.from_images(images, tolerance=0.1, dataset="bars")
    for bad, message in [
        (images[:39], r"`images` must have the shape \(40, 1, 8, 8\)"),
        (images.flip(0), "`images` must be those of bars"),
        (images[0], r"`images` must have shape \[N, C, H, W\]"),
        (images * 100, r"`images` must lie in \[-1, 1\]"),
    ]:
        with pytest.raises(InputError, match=message):
            coupling.with_images(bad)
    with pytest.raises(InputError, match=r"`noise` must have shape \[B, 1, 8, 8\]"):
        coupling.assign(noise_of(3, size=4))
    with pytest.raises(InputError, match="`images` must be at least 2"):
        SemidiscreteCoupling.from_images(images[:1])
    for share in (0, 1.5):
        with pytest.raises(InputError, match=r"`kept_share` must lie in \(0, 1\]"):
            SemidiscreteCoupling.from_images(images, kept_share=share)
