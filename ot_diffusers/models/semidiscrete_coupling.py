"""The optimal-transport coupling of Gaussian noise with a whole data set, solved once and used for every batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..errors import require, require_number, require_sizes
from ..images import content_hash, require_model_range, to_model_range, to_uint8
from ..seeds import key
from ..transport.semidiscrete import assign, in_float64, semidiscrete_potentials
from .portable import PortableModel

if TYPE_CHECKING:
    from typing import Self

WHOLE, MOST_COMPONENTS = 256, 256
"""Images of at most so many values are compared as they are, larger ones in at most so many principal components."""
PCA_IMAGES, PCA_CHUNK = 10_000, 4096
"""Images that the principal components are taken from, and images that are projected at a time."""

Progress = Callable[[int, float | None], None]


@dataclass
class SemidiscreteCouplingOutput(BaseOutput):
    """Output of a coupling.

    Args:
        indices: int64 [B], which image each noise is paired with.
    """

    indices: Tensor


class SemidiscreteCoupling(PortableModel, ConfigMixin):
    """Pairs noise with the images of a data set by semi-discrete optimal transport for ‖x0 − ε‖².

    Noise ε goes to the image argmax_j ⟨ε, x_j⟩ + h_j. The noise is drawn freely and stays exactly Gaussian, and every
    image is chosen equally often, up to `chi_squared`. A pair depends on its noise alone: not on the batch, its order
    or the number of processes.

    With labels there is a coupling for each class, in which noise goes to the images of that class alone. A network
    with class conditions needs it: pairs that ignore the labels tell the class by the noise.

    Saved are the potentials h and the principal components, not the images: `with_images` brings them back.

    Args:
        num_points: N images; twice as many where each has a mirrored copy.
        image_shape: (C, H, W).
        num_components: principal components in which noise and images are compared; None compares all values.
        kept_share: share of the images' variance in these components, in (0, 1].
        flips: whether the second half of the points are the images mirrored left to right.
        num_classes: number of classes of a coupling with labels.
        chi_squared: mean over the points of (N · P(point) − 1)², measured on fresh noise; the largest of all classes.
        num_draws: noise vectors that the solver used.
        seconds: time that the solver took.
        seed: random seed of the solver.
        dataset: name of the data.
        data_fingerprint: SHA-256 of the images.

    Example:
        >>> images = torch.rand(100, 1, 8, 8) * 2 - 1
        >>> coupling = SemidiscreteCoupling.from_images(images)
        >>> noise = torch.randn(16, 1, 8, 8)
        >>> clean = coupling.pick(images, coupling.assign(noise))
        >>> clean.shape
        torch.Size([16, 1, 8, 8])

    Reference: [Tong2024] for couplings in flow matching; [MousaviHosseini2025] for semi-discrete ones.
    """

    @register_to_config
    def __init__(
        self,
        num_points: int = 1000,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_components: int | None = None,
        kept_share: float = 1.0,
        flips: bool = False,
        chi_squared: float = 0.0,
        num_draws: int = 0,
        seconds: float = 0.0,
        seed: int = 0,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        require_sizes(num_points=num_points, **{f"image_shape[{axis}]": size for axis, size in enumerate(image_shape)})
        self.potentials = nn.Parameter(torch.zeros(num_points), requires_grad=False)
        self.components: nn.Parameter | None = None
        if num_components is not None:
            require_sizes(num_components=num_components)
            shape = (num_components, math.prod(image_shape))
            self.components = nn.Parameter(torch.zeros(shape), requires_grad=False)
        labels = None if num_classes is None else torch.zeros(num_points, dtype=torch.long)
        self.register_buffer("labels", labels)
        for name in ("points", "longest", "order"):
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def from_images(
        cls,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        flips: bool = False,
        kept_share: float = 0.95,
        tolerance: float = 0.02,
        max_seconds: float | None = None,
        seed: int = 0,
        dataset: str | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Solve for the potentials of these images; see `semidiscrete_potentials`.

        Args:
            images: uint8 or floats in [-1, 1], [N, C, H, W], N ≥ 2; the solver runs on their device.
            labels: class of each image, integers from 0, [N], for a coupling in each class; at least two images each.
            flips: pair noise with mirrored images, too.
            kept_share: the principal components have this share of the variance at least, unless more than 256 would
                be needed. Images of at most 256 values are not projected.
            tolerance: χ² at which the solver stops.
            max_seconds: stop about then in any case; `config.chi_squared` tells what was reached.
            seed: random seed of the solver.
            dataset: name of the data, for the record.
            progress: called with the number of draws so far, and χ² when it has been measured.

        Raises:
            InputError: images of another range or shape, or labels that do not fit.
        """
        _check_images(images)
        require(len(images) >= 2, "images", "be at least 2", len(images))
        require_number("kept_share", kept_share, at_least=0)
        require(0 < kept_share <= 1, "kept_share", "lie in (0, 1]", kept_share)
        components, share = _principal_components(images, flips, kept_share)
        points = _points(images, components, flips)
        groups = _groups(labels, len(images), flips, points.device)
        solver: dict[str, Any] = {"tolerance": tolerance, "seed": seed, "progress": progress}
        solver["max_seconds"] = None if max_seconds is None else max_seconds / len(groups)
        solved = [semidiscrete_potentials(points[rows], **solver) for rows in groups]
        coupling = cls(
            len(points),
            tuple(images.shape[1:]),
            None if components is None else len(components),
            share,
            flips,
            max(each.chi_squared for each in solved),
            sum(each.num_draws for each in solved),
            round(sum(each.seconds for each in solved), 2),
            seed,
            dataset,
            _fingerprint(images),
            None if labels is None else len(groups),
        )
        for label, (rows, each) in enumerate(zip(groups, solved, strict=True)):
            coupling.potentials.data = coupling.potentials.data.to(points.device).index_copy(0, rows, each.values)
            if labels is not None:
                coupling.labels = coupling.labels.to(points.device).index_fill(0, rows, label)
        if coupling.components is not None and components is not None:
            coupling.components.data = components
        coupling._keep(points)
        return coupling

    def with_images(self, images: Tensor) -> Self:
        """Bring back the images of a loaded coupling, [N, C, H, W] in their order; returns self.

        Raises:
            InputError: other images than those it was made for.
        """
        _check_images(images)
        shape = (len(images), *images.shape[1:])
        expected = (self.config.num_points // (1 + self.config.flips), *self.config.image_shape)
        require(shape == expected, "images", f"have the shape {expected} of those it was made for", shape)
        known = self.config.data_fingerprint
        same = known is None or known == _fingerprint(images)
        require(same, "images", f"be those of {self.config.dataset or 'the data set'} it was made for", "other images")
        self._keep(_points(images, self.components, self.config.flips).to(self.potentials.device))
        return self

    def _keep(self, points: Tensor) -> None:
        """Keep the points; those of a class side by side, in the order of their `labels`."""
        self.points, self.longest = points, points.norm(dim=1).max()
        if self.labels is not None:
            self.order = self.labels.argsort(stable=True)
            self.points = points[self.order]

    def assign(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The image that each noise is paired with, int64 [B]; from N on, mirrored images of a coupling with flips.

        Args:
            noise: standard normal, [B, C, H, W], on the coupling's device.
            labels: class of each pair, integers, [B], for a coupling with labels.

        Raises:
            InputError: noise of another shape, labels that the coupling does not have or lacks, or a loaded coupling
                without its images.
        """
        count = self.config.num_classes
        given = (labels is not None) == (count is not None)
        require(
            given, "labels", "be given to a coupling with labels, and to no other", None if labels is None else "labels"
        )
        shape = tuple(self.config.image_shape)
        sizes = ", ".join(map(str, shape))
        require(tuple(noise.shape[1:]) == shape, "noise", f"have shape [B, {sizes}]", tuple(noise.shape))
        require(self.points is not None, "images", "be given by `with_images` to a coupling that was loaded", None)
        rows = noise.flatten(1).float()
        if self.components is not None:  # in float64, so that the batch's shape does not show in the rounding
            rows = (in_float64(rows) @ in_float64(self.components).T).to(noise.device, torch.float32)
        if labels is None:
            return assign(rows, self.points, self.potentials.float(), longest=self.longest)
        known = len(labels) == len(noise) and bool(((labels >= 0) & (labels < count)).all())
        require(known, "labels", f"be {len(noise)} integers from 0 to {count - 1}", labels.tolist())
        indices, counts = torch.zeros_like(labels, device=noise.device), self.labels.bincount().tolist()
        potentials = self.potentials.float()
        classes = zip(self.order.split(counts), self.points.split(counts), strict=True)
        for label, (members, points) in enumerate(classes):
            asked = (labels == label).to(noise.device)
            found = assign(rows[asked], points, potentials[members], longest=self.longest)
            indices[asked] = members[found]
        return indices

    def pick(self, images: Tensor, indices: Tensor) -> Tensor:
        """The images of `assign`'s indices, mirrored where they say so.

        Args:
            images: all images of the coupling, [N, C, H, W], any range.
            indices: int64 [B].
        """
        chosen = images[indices % len(images)]
        return mirrored(chosen, indices >= len(images)) if self.config.flips else chosen

    def forward(
        self, noise: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> SemidiscreteCouplingOutput | tuple[Tensor]:
        """As `assign`."""
        indices = self.assign(noise, labels)
        return SemidiscreteCouplingOutput(indices) if return_dict else (indices,)


def mirrored(images: Tensor, which: Tensor) -> Tensor:
    """Images [B, C, H, W], those of the mask `which` [B] mirrored left to right."""
    return torch.where(which.to(images.device)[:, None, None, None], images.flip(3), images)


def _groups(labels: Tensor | None, num_images: int, flips: bool, device: torch.device) -> list[Tensor]:
    """Rows of the points of each class; all of them as one group without labels.

    Raises:
        InputError: labels of another number, with gaps, or with fewer than two images in a class.
    """
    if labels is None:
        return [torch.arange(num_images * (1 + flips), device=device)]
    fits = tuple(labels.shape) == (num_images,) and not labels.is_floating_point()
    require(fits, "labels", f"be {num_images} integers", tuple(labels.shape))
    counts = labels.long().cpu().bincount(minlength=1) if int(labels.min()) >= 0 else torch.zeros(1)
    enough = bool((counts >= 2).all())
    require(enough, "labels", "count from 0, with at least two images in each class", counts.tolist())
    doubled = labels.to(device).repeat(1 + flips)
    return [(doubled == label).nonzero()[:, 0] for label in range(len(counts))]


def _fingerprint(images: Tensor) -> str:
    """The `fingerprint` that a data set of these images has."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    return content_hash(pixels.shape, [pixels.cpu()])


def _check_images(images: Tensor) -> None:
    require(images.ndim == 4, "images", "have shape [N, C, H, W]", tuple(images.shape))
    if images.dtype != torch.uint8:
        require_model_range(images)


def _floats(images: Tensor) -> Tensor:
    return to_model_range(images) if images.dtype == torch.uint8 else images.float()


def _projected(images: Tensor, components: Tensor | None) -> Tensor:
    """Images [B, C, H, W] as points [B, K]; the components are orthonormal, so noise stays standard normal."""
    rows = images.flatten(1)
    return rows if components is None else rows @ components.float().T


def _points(images: Tensor, components: Tensor | None, flips: bool) -> Tensor:
    """The points of images, then those of mirrored images: float32 [N or 2N, K]."""
    chunks = images.split(PCA_CHUNK)
    parts = [_projected(_floats(chunk), components) for chunk in chunks]
    parts += [_projected(_floats(chunk).flip(3), components) for chunk in chunks] if flips else []
    return torch.cat(parts)


def _principal_components(images: Tensor, flips: bool, kept_share: float) -> tuple[Tensor | None, float]:
    """The leading principal directions [K, D] that hold this share of the variance, and the share they hold."""
    dimension = math.prod(images.shape[1:])
    if dimension <= WHOLE or kept_share == 1:
        return None, 1.0
    rows = torch.linspace(0, len(images) - 1, min(len(images), PCA_IMAGES)).round().long().to(images.device)
    sample = _points(images[rows], None, flips)
    sample = sample - sample.mean(dim=0)
    with torch.random.fork_rng(devices=[sample.device] if sample.is_cuda else []):
        torch.manual_seed(key("principal components"))
        _, lengths, directions = torch.svd_lowrank(sample, q=min(MOST_COMPONENTS, *sample.shape), niter=4)
    shares = lengths.square().cumsum(0) / sample.square().sum()
    count = min(int((shares < kept_share).sum()) + 1, len(shares))
    return directions[:, :count].T.contiguous(), shares[count - 1].item()
