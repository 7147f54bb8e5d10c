"""Pixel metrics for artefacts that feature metrics cannot see: wrong local texture, grey speckle, a wrong spectrum.

Images are float tensors [N, C, H, W] in [-1, 1]. The statistics of one set (`speckle_share`, `laplacian_response`) are
meaningful only in comparison with those of real images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from ..images import require_model_range
from ..seeds import seeded_generator
from ..transport.sliced import random_directions, transport_on_lines
from .metrics import tensor_summary


def patch_sliced_wasserstein(
    images: Tensor,
    reference_images: Tensor,
    *,
    patch_size: int = 7,
    num_projections: int = 128,
    num_patches: int = 16384,
    seed: int = 0,
) -> float:
    """Squared sliced Wasserstein distance between the patches of two image sets, in squared pixel units.

    Mean over unit directions θ of ∫ (F⁻¹_θ(u) − G⁻¹_θ(u))² du: W₂² on each line, where the losses of `transport` have
    ½ W₂². The directions are orthogonal in groups of D = C · patch_size², so shifting every patch by v costs exactly
    ‖v‖²/D, the mean squared pixel change, when D divides `num_projections`.

    Args:
        images, reference_images: [N, C, H, W] and [M, C, H, W] in [-1, 1]; N and M may differ.
        patch_size: side in pixels; lowered to the image's side.
        num_projections: directions.
        num_patches: patches drawn from either set (without replacement).
        seed: decides directions and patches; the same seed draws the same patches from sets of equal size.

    Reference: [Bonneel2015]; [Karras2018] uses it on patches.
    """
    _check_pair(images, reference_images)
    patch_size = min(patch_size, *images.shape[2:])
    directions = random_directions(
        num_projections, images.shape[1] * patch_size**2, orthogonal=True, generator=seeded_generator(seed)
    ).to(images)
    patches = (_random_patches(x.detach(), patch_size, num_patches, seed) for x in (images, reference_images))
    return 2 * transport_on_lines(*((rows @ directions.T).T for rows in patches)).item()


def speckle_share(images: Tensor, *, faint: float = -0.9, stroke: float = 0.0) -> float:
    """Share of pixels that are brighter than `faint` although no pixel in their 3×3 neighbourhood reaches `stroke`.

    Meant for bright strokes on a black (-1) background: 0 if every grey pixel belongs to the edge of a stroke. Guidance
    up to the last step of a chain raises it. For photographs, compare it with the value of real images.
    """
    _check_images(images, "images")
    alone = torch.nn.functional.max_pool2d(images, kernel_size=3, stride=1, padding=1) < stroke
    return ((images > faint) & alone).float().mean().item()


def laplacian_response(images: Tensor) -> float:
    """Mean absolute response to the five-point Laplacian, |4x − Σ neighbours|, away from the border: in [0, 8].

    0 on any linear ramp, 8 on a ±1 checkerboard. Values above that of real images indicate noise, lower ones blur.
    """
    _check_images(images, "images")
    require(min(images.shape[2:]) >= 3, "images", "be at least 3×3", tuple(images.shape))
    centre = images[..., 1:-1, 1:-1]
    neighbors = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return (4 * centre - neighbors).abs().mean().item()


def spectrum_distance(images: Tensor, reference_images: Tensor) -> float:
    """Mean over spatial frequencies of |log₁₀ P(k) − log₁₀ Q(k)|, P and Q the sets' radially averaged power spectra.

    Scaling all images by c gives 2·|log₁₀ c|.

    Reference: [Durall2020] for the radial average.
    """
    _check_pair(images, reference_images)
    spectra = [_radial_spectrum(x.detach()).clamp_min(1e-12).log10() for x in (images, reference_images)]
    return (spectra[0] - spectra[1]).abs().mean().item()


def _radial_spectrum(images: Tensor) -> Tensor:
    """Mean power at each whole radial frequency 0, 1, … up to half the smaller side: [K], float64."""
    power = torch.fft.fft2(images.double()).abs().square().mean(dim=(0, 1))
    rows, columns = (torch.fft.fftfreq(side) * side for side in images.shape[2:])
    radius = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt().round().long().to(images.device)
    keep = radius <= min(images.shape[2:]) // 2
    totals = torch.bincount(radius[keep], weights=power[keep])
    return totals / torch.bincount(radius[keep])


def _random_patches(images: Tensor, patch_size: int, num_patches: int, seed: int) -> Tensor:
    """At most `num_patches` different patches of `images`: [P, C · patch_size²]."""
    windows = images.unfold(2, patch_size, 1).unfold(3, patch_size, 1).permute(0, 2, 3, 1, 4, 5)
    count, rows, columns = windows.shape[:3]
    total = count * rows * columns
    chosen = torch.randperm(total, generator=seeded_generator(seed))[:num_patches].to(images.device)
    image, row, column = chosen // (rows * columns), chosen // columns % rows, chosen % columns
    return windows[image, row, column].flatten(1)


def _check_pair(images: Tensor, reference_images: Tensor) -> None:
    _check_images(images, "images")
    _check_images(reference_images, "reference_images")
    shape = tuple(reference_images.shape[1:])
    require(images.shape[1:] == shape, "images", f"have the shape {shape} of the reference", tuple(images.shape[1:]))


def _check_images(images: Tensor, name: str) -> None:
    good = isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point() and len(images) > 0
    require(good, name, "be a float tensor [N, C, H, W]", tensor_summary(images))
    require_model_range(images, name)
