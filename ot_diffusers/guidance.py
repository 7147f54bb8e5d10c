"""OT guidance: move a batch of predicted clean images towards the distribution of real ones, in feature space.

One correction takes a few Adam steps on the images themselves, down the Sinkhorn divergence between the features of the
batch and a bank of reference features:

    x̂0 ← clamp(x̂0 − Adam(∇ S(φ(x̂0)/s, R/s)), −1, 1),     φ the frozen feature network, s the feature scale

Adam divides the gradient by its own size, so a factor on the loss has no effect. `guidance_scale` therefore scales the
step instead: each step moves a pixel by at most about `guidance_scale` · 0.02. At 0.5 that is the source study's
learning rate of 0.01.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import require
from .models.feature_extractor import FeatureExtractor
from .models.reference_bank import ReferenceBank
from .transport import Potentials, divergence_gradient

# Adam's learning rate at guidance_scale=1, in pixel units of [-1, 1].
PIXELS_PER_STEP = 0.02


class OTGuidance:
    """Corrects x̂0 of a joint batch; one object serves a pipeline or a sampling loop of your own.

    The transport problem couples the batch: an image depends on its companions, and the larger the batch, the better
    the guidance (a batch of one is pulled towards the mean of the data).

    Args:
        feature_extractor: frozen network; neither its parameters nor their gradients are touched.
        reference_bank: features of real images by the same network.
        guidance_scale: strength, ≥ 0; 0 returns the images as they are.
        num_correction_steps: Adam steps in one correction.
        blur: length in normalised feature units (in raw ones with `normalize_features=False`).
        normalize_features: divide features by the bank's `feature_scale` (median distance 1); `False` is the source's
            form.

    Raises:
        InputError: parts that do not fit together, or values out of range.

    Example:
        >>> from ot_diffusers import ConvFeatureExtractor, OTGuidance, ReferenceBank
        >>> network = ConvFeatureExtractor(sample_size=8, feature_dim=32)
        >>> bank = ReferenceBank.from_features(network.extract(torch.rand(64, 1, 8, 8) * 2 - 1), feature_scale=0.1)
        >>> guidance = OTGuidance(network, bank)
        >>> images = torch.zeros(16, 1, 8, 8)
        >>> 0 < (guidance.correct(images) - images).abs().max().item() <= 0.0601
        True
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractor,
        reference_bank: ReferenceBank,
        *,
        guidance_scale: float = 1.0,
        num_correction_steps: int = 3,
        blur: float = 0.3,
        normalize_features: bool = True,
    ) -> None:
        require(guidance_scale >= 0, "guidance_scale", "be at least 0", guidance_scale)
        require(num_correction_steps >= 1, "num_correction_steps", "be at least 1", num_correction_steps)
        require(blur > 0, "blur", "be a positive length", blur)
        check_same_data(feature_extractor, reference_bank)
        self.feature_extractor = feature_extractor
        self.guidance_scale = guidance_scale
        self.num_correction_steps = num_correction_steps
        self.blur = blur
        self.feature_scale = reference_bank.config.feature_scale if normalize_features else 1.0
        self._potentials: Potentials | None = None
        self._references = reference_bank.features.detach().float() / self.feature_scale

    def correct(self, pred_original_sample: Tensor) -> Tensor:
        """The corrected batch.

        Args:
            pred_original_sample: x̂0, [B, C, H, W], nominally in [-1, 1].

        Returns:
            [B, C, H, W] in [-1, 1], same dtype, without graph. Works inside `no_grad` and `inference_mode`, leaves the
            gradient mode alone.
        """
        if self.guidance_scale == 0:
            return pred_original_sample
        device = pred_original_sample.device
        references = self._references.to(device)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type=device.type, enabled=False),
        ):
            images = pred_original_sample.detach().clone().float().requires_grad_()
            optimizer = torch.optim.Adam([images], lr=self.guidance_scale * PIXELS_PER_STEP)
            for _ in range(self.num_correction_steps):
                features = self.features(images)
                field, self._potentials = divergence_gradient(
                    features, references, blur=self.blur, initial=self._warm_start(len(features), device)
                )
                (images.grad,) = torch.autograd.grad(features, images, grad_outputs=field)
                optimizer.step()
                images.data.clamp_(-1, 1)
        return images.detach().to(pred_original_sample.dtype)

    def _warm_start(self, batch_size: int, device: torch.device) -> Potentials | None:
        """The last potentials, if they are of such a batch: a starting point, which leaves the solution as it is."""
        known = self._potentials
        return known if known is not None and known.f.shape == (batch_size,) and known.f.device == device else None

    def features(self, images: Tensor) -> Tensor:
        """Features of images in [-1, 1] in the units of the transport problem, float32 [B, D]."""
        return self.feature_extractor.extract(images.to(self.feature_extractor.dtype)).float() / self.feature_scale


def check_same_data(feature_extractor: FeatureExtractor, reference_bank: ReferenceBank) -> None:
    """Refuse a bank whose features another network made."""
    network, bank = feature_extractor.config, reference_bank.config
    require(
        bank.feature_dim == network.feature_dim,
        "reference_bank",
        f"hold features of width {network.feature_dim}",
        bank.feature_dim,
    )
    known = bank.data_fingerprint is not None and network.data_fingerprint is not None
    require(
        not known or bank.data_fingerprint == network.data_fingerprint,
        "reference_bank",
        f"come from the data of the feature network ({network.dataset})",
        bank.dataset,
    )
