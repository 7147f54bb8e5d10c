"""Guidance fields: the recorded guidance of one large batch, which later guides images one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from ..errors import require
from ..transport import DivergencePotentials, divergence_gradient_at
from .portable import PortableModel

ENOUGH_SAMPLES, ENOUGH_IN_CLASS = 1000, 100
"""A guidance field of so many samples needs no completion; for each missing sample, references get a mass of 2. Of many
classes, each needs so many."""


def completed(features: Tensor, references: Tensor, masses: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The cloud of a guidance field of N samples, completed by references if N is small, and its weights (None: equal).

    The potentials of a few samples describe the space between them badly. References in the cloud mean "already right":
    the fewer samples are near a point, the less the point is moved. N samples have a mass of N, all references together
    2 (1000 − N).

    Args:
        features: [N, D], of the samples.
        references: [M, D], the reference set.
        masses: [M], sum 1, the mass of each reference; equal by default.
    """
    missing = 2 * (ENOUGH_SAMPLES - len(features))
    if missing <= 0:
        return features, None
    total = len(features) + missing
    weights = features.new_full((len(features) + len(references),), 1 / total)
    weights[len(features) :] = (1 / len(references) if masses is None else masses) * (missing / total)
    return torch.cat([features, references]), weights


def completed_mass(num_samples: int, num_classes: int) -> tuple[float, float]:
    """Mass of the samples and of the references in the completed cloud of one of the classes, relative to all of it.

    The images of a class are more alike than those of all classes: 1,000 samples are shared by the classes, down to 100
    for each. References keep a mass of 1 beside enough samples, so that the clouds of all classes are made alike.

    Example:
        >>> completed_mass(50, num_classes=10), completed_mass(399, num_classes=2)
        ((0.3333333333333333, 0.6666666666666666), (0.6638935108153078, 0.33610648918469216))
    """
    enough = max(ENOUGH_IN_CLASS, ENOUGH_SAMPLES // num_classes)
    missing = max(1, 2 * (enough - num_samples))
    return num_samples / (num_samples + missing), missing / (num_samples + missing)


@dataclass(frozen=True)
class Correction:
    """One correction step of a guided batch.

    Attributes:
        timestep: time of the denoising step, as the denoiser is given it.
        features: [N, D], of the batch before the correction, in the units of the transport problem.
        potentials: potentials of the `completed` cloud, which determine the direction of the correction; where there is
            a problem for each class, of the problem of each point, and 0 for references of other classes.
        labels: class of each sample, integers [N]; None for a problem of all together.
    """

    timestep: float
    features: Tensor
    potentials: DivergencePotentials
    labels: Tensor | None = None


class GuidanceField(PortableModel, ConfigMixin):
    """Features and dual potentials of recorded samples at every step of their guided chain.

    In a joint batch, images repel each other and are attracted by the references. The potentials of a large batch
    describe this field at every point, so that a new image can follow it alone, as one more member of the recorded
    samples. The result then depends neither on other images nor on the batch size, and no transport problem is solved.
    `OTGuidedDDIMPipeline.record_guidance_field` makes a guidance field. With fewer than 1,000 samples the references
    complete the recorded samples, so that the correction is smaller where samples are few.

    A field serves chains of other lengths and other schedulers as well. The time that a denoiser is given tells its
    noise level, whatever the scheduler, and each step follows the nearest recorded time, see `index_of`.

    A field of classes holds one for each class, in which an image follows the samples of its class. Each of N classes
    is completed below 1,000 / N samples, or below 100 for more than ten classes.

    Args:
        timesteps: the S times of the guided denoising steps, as the denoiser is given them, from high to low.
        num_correction_steps: C, correction steps in each denoising step.
        num_samples: N, number of recorded samples.
        num_references: M, size of the reference set.
        feature_dim: D, width of the features, including thumbnail pixels.
        guidance_scale, blur, normalize_features, pixel_weight, step_rule: settings of the recorded guidance.
        is_completed: whether references complete the recorded samples, see `completed`.
        num_classes: number of classes of a field with labels.

    Example:
        >>> from ot_diffusers.transport import divergence_gradient
        >>> samples, references = torch.randn(50, 4), torch.randn(80, 4) + 1
        >>> _, potentials = divergence_gradient(samples, references, blur=0.3)
        >>> corrections = [Correction(980, samples, potentials)]
        >>> field = GuidanceField.from_corrections(corrections, guidance_scale=1.0, blur=0.3)
        >>> field.gradient(torch.randn(2, 4), references, timestep=980, correction=0).shape
        torch.Size([2, 4])
    """

    labels: Tensor | None

    @register_to_config
    def __init__(
        self,
        timesteps: tuple[float, ...] = (0,),
        num_correction_steps: int = 3,
        num_samples: int = 1000,
        num_references: int = 2000,
        feature_dim: int = 128,
        guidance_scale: float = 1.0,
        blur: float = 0.3,
        normalize_features: bool = True,
        pixel_weight: float = 0.0,
        step_rule: str = "adam",
        is_completed: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        steps = (len(timesteps), num_correction_steps)
        num_members = num_samples + (num_references if is_completed else 0)
        self.features = nn.Parameter(torch.zeros(*steps, num_samples, feature_dim), requires_grad=False)
        self.own_potentials = nn.Parameter(torch.zeros(*steps, num_members), requires_grad=False)
        self.reference_potentials = nn.Parameter(torch.zeros(*steps, num_references), requires_grad=False)
        self.register_buffer("labels", None if num_classes is None else torch.zeros(num_samples, dtype=torch.long))

    @classmethod
    def from_corrections(
        cls,
        corrections: Sequence[Correction],
        *,
        guidance_scale: float,
        blur: float,
        normalize_features: bool = True,
        pixel_weight: float = 0.0,
        step_rule: str = "adam",
        num_classes: int | None = None,
    ) -> GuidanceField:
        """The guidance field of one chain: its corrections in order, with the same number at every denoising step."""
        timesteps = tuple(dict.fromkeys(correction.timestep for correction in corrections))
        require(len(timesteps) > 0, "corrections", "hold at least one step", len(corrections))
        whole = len(corrections) % len(timesteps) == 0
        require(
            whole, "corrections", f"have the same number at each of the {len(timesteps)} timesteps", len(corrections)
        )
        first = corrections[0]
        num_samples, feature_dim = first.features.shape
        field = cls(
            timesteps,
            len(corrections) // len(timesteps),
            num_samples,
            len(first.potentials.cross.g),
            feature_dim,
            guidance_scale,
            blur,
            normalize_features,
            pixel_weight,
            step_rule,
            len(first.potentials.self_potential) > num_samples,
            None if first.labels is None else num_classes,
        )
        if field.labels is not None and first.labels is not None:
            field.labels.copy_(first.labels)
        for stored, values in (
            (field.features, [correction.features for correction in corrections]),
            (field.own_potentials, [correction.potentials.self_potential for correction in corrections]),
            (field.reference_potentials, [correction.potentials.cross.g for correction in corrections]),
        ):
            stored.data.copy_(torch.stack(values).view_as(stored))
        return field

    def index_of(self, timestep: float) -> int | None:
        """Index of the recorded time that is nearest to `timestep`, if it is nearer than the widest gap between two
        recorded times; None elsewhere, where the recorded chain was not guided.

        Example:
            >>> field = GuidanceField(timesteps=(999, 749, 499))
            >>> [field.index_of(timestep) for timestep in (999, 800, 400, 100)]
            [0, 1, 2, None]
        """
        times = self.config.timesteps
        widest = max((earlier - later for earlier, later in pairwise(times)), default=1)
        nearest = min(range(len(times)), key=lambda index: abs(times[index] - timestep))
        return nearest if abs(times[nearest] - timestep) < widest else None

    def gradient(
        self,
        features: Tensor,
        references: Tensor,
        *,
        timestep: float,
        correction: int,
        members: Sequence[tuple[int, Tensor, Tensor]] | None = None,
        masses: Tensor | None = None,
    ) -> Tensor:
        """The displacement of each row of `features`, [B, D], as one more member of the recorded samples.

        Args:
            features: [B, D], in the units of the transport problem.
            references: [M, D], the references of the recorded guidance.
            timestep: a time for which `index_of` finds a recorded one.
            correction: index of the correction step, from 0.
            members: for a field of classes, each class with the rows of its features and of its references.
            masses: [M], the mass of each reference in the recording; equal by default.

        Returns:
            [B, D], float32; a row depends on its own features and class alone.

        Raises:
            InputError: a time far from the recorded ones, or a class that the recorded samples lack.
        """
        step = self.index_of(timestep)
        require(step is not None, "timestep", f"be near the recorded {self.config.timesteps}", timestep)
        if members is not None:
            assert step is not None
            return self._gradient_in_classes(features, references, step, correction, members, masses)
        samples = self.features[step, correction].float()
        samples, weights = completed(samples, references, masses) if self.config.is_completed else (samples, None)
        return divergence_gradient_at(
            features.float(),
            samples,
            references,
            self.reference_potentials[step, correction].float(),
            self.own_potentials[step, correction].float(),
            blur=self.config.blur,
            x_weights=weights,
            y_weights=masses,
        )

    def _gradient_in_classes(
        self,
        features: Tensor,
        references: Tensor,
        step: int,
        correction: int,
        members: Sequence[tuple[int, Tensor, Tensor]],
        masses: Tensor | None,
    ) -> Tensor:
        """As `gradient`, in the problem of the class of each row."""
        assert self.labels is not None
        gradient, count = torch.empty_like(features, dtype=torch.float32), self.config.num_samples
        potentials = self.own_potentials[step, correction].float()
        for label, rows, others in members:
            own = (self.labels == label).nonzero()[:, 0]
            require(len(own) > 0, "class_labels", "be classes of the recorded samples", label)
            mass, rest = completed_mass(len(own), self.config.num_classes)
            weights = features.new_full((len(own) + len(others),), mass / len(own))
            shares = features.new_full((len(others),), 1 / len(others)) if masses is None else masses[others]
            shares = shares / shares.sum()
            weights[len(own) :] = rest * shares
            gradient[rows] = divergence_gradient_at(
                features[rows].float(),
                torch.cat([self.features[step, correction, own].float(), references[others]]),
                references[others],
                self.reference_potentials[step, correction, others].float(),
                torch.cat([potentials[own], potentials[count + others]]),
                blur=self.config.blur,
                x_weights=weights,
                y_weights=shares,
            )
        return gradient
