"""The field that guided one large batch, kept so that later samples can follow it one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from ..errors import require
from ..transport import DivergencePotentials, divergence_gradient_at
from .portable import PortableModel

ENOUGH_SAMPLES = 1000
"""A field of so many samples speaks for itself; in place of each that is missing, references stand with mass 2."""


def completed(features: Tensor, references: Tensor) -> tuple[Tensor, Tensor | None]:
    """The cloud that a field of N samples is made of, and its weights, None for equal ones.

    The potentials of a few samples say little of the space between them. References in their cloud stand for "already
    right", and the less a point lies among samples, the less it is moved: N samples weigh N, all references together
    2 (1000 − N).

    Args:
        features: [N, D] of the samples.
        references: [M, D].
    """
    missing = 2 * (ENOUGH_SAMPLES - len(features))
    if missing <= 0:
        return features, None
    total = len(features) + missing
    weights = features.new_full((len(features) + len(references),), 1 / total)
    weights[len(features) :] = missing / len(references) / total
    return torch.cat([features, references]), weights


@dataclass(frozen=True)
class Correction:
    """One step of a guided batch.

    Attributes:
        timestep: of the denoising step.
        features: [N, D] of the batch before the step, in the units of the transport problem.
        potentials: that determined its direction, of the `completed` cloud.
    """

    timestep: int
    features: Tensor
    potentials: DivergencePotentials


class GuidanceField(PortableModel, ConfigMixin):
    """Features and dual potentials of a bank of samples at every step of their guided chain.

    A joint batch guides itself: its images repel each other and are drawn to the references. The potentials of a large
    batch describe that field everywhere, so a new sample can follow it alone, as one more member of the bank. Images
    then depend neither on their companions nor on the size of the batch, and no transport problem is solved.
    `OTGuidedDDIMPipeline.record_guidance_field` makes one. Below 1,000 samples the bank is completed by the references,
    so that a field corrects less where it knows little.

    Args:
        timesteps: S of the guided denoising steps, as the scheduler had them.
        num_correction_steps: C in each of them.
        num_samples: N of the bank.
        num_references: M of the reference bank.
        feature_dim: D, the pixels beside the features included.
        guidance_scale, blur, normalize_features, pixel_weight, step_rule: of the recorded guidance.
        is_completed: whether the references are members of the bank's cloud, see `completed`.

    Example:
        >>> from ot_diffusers.transport import divergence_gradient
        >>> bank, references = torch.randn(50, 4), torch.randn(80, 4) + 1
        >>> _, potentials = divergence_gradient(bank, references, blur=0.3)
        >>> field = GuidanceField.from_corrections([Correction(980, bank, potentials)], guidance_scale=1.0, blur=0.3)
        >>> field.gradient(torch.randn(2, 4), references, timestep=980, correction=0).shape
        torch.Size([2, 4])
    """

    @register_to_config
    def __init__(
        self,
        timesteps: tuple[int, ...] = (0,),
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
    ) -> None:
        super().__init__()
        steps = (len(timesteps), num_correction_steps)
        num_members = num_samples + (num_references if is_completed else 0)
        self.features = nn.Parameter(torch.zeros(*steps, num_samples, feature_dim), requires_grad=False)
        self.own_potentials = nn.Parameter(torch.zeros(*steps, num_members), requires_grad=False)
        self.reference_potentials = nn.Parameter(torch.zeros(*steps, num_references), requires_grad=False)

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
    ) -> GuidanceField:
        """The field of a batch's chain, all its corrections in order, as many at every denoising step."""
        timesteps = tuple(dict.fromkeys(correction.timestep for correction in corrections))
        require(len(timesteps) > 0, "corrections", "hold at least one step", len(corrections))
        whole = len(corrections) % len(timesteps) == 0
        require(whole, "corrections", f"be as many at each of the {len(timesteps)} timesteps", len(corrections))
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
        )
        for stored, values in (
            (field.features, [correction.features for correction in corrections]),
            (field.own_potentials, [correction.potentials.self_potential for correction in corrections]),
            (field.reference_potentials, [correction.potentials.cross.g for correction in corrections]),
        ):
            stored.data.copy_(torch.stack(values).view_as(stored))
        return field

    def check_timesteps(self, timesteps: Sequence[int]) -> None:
        """Refuse a chain that does not pass the recorded timesteps."""
        missing = sorted(set(self.config.timesteps) - set(timesteps), reverse=True)
        require(
            not missing,
            "num_inference_steps",
            f"make the chain that the guidance field was recorded on (with timesteps {missing[:3]} …)",
            len(timesteps),
        )

    def gradient(self, features: Tensor, references: Tensor, *, timestep: int, correction: int) -> Tensor:
        """The direction in which each row of `features`, [B, D], would be moved as one more member of the bank.

        Args:
            features: [B, D], in the units of the transport problem.
            references: [M, D], those of the recorded guidance.
            timestep: one of the recorded ones.
            correction: which of its correction steps, from 0.

        Returns:
            [B, D], float32; a row depends on its own features alone.
        """
        step = self.config.timesteps.index(timestep)
        bank = self.features[step, correction].float()
        bank, weights = completed(bank, references) if self.config.is_completed else (bank, None)
        return divergence_gradient_at(
            features.float(),
            bank,
            references,
            self.reference_potentials[step, correction].float(),
            self.own_potentials[step, correction].float(),
            blur=self.config.blur,
            x_weights=weights,
        )
