"""Reference sets: features and thumbnails of real images, saved with a pipeline so that they can guide sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..errors import require, require_sizes
from ..images import require_model_range, thumbnails
from ..transport import median_distance
from .portable import PortableModel


@dataclass
class ReferenceBankOutput(BaseOutput):
    """Output of `ReferenceBank`.

    Args:
        features: [N, D], as they are stored.
    """

    features: Tensor


class ReferenceBank(PortableModel, ConfigMixin):
    """A reference set: features of real images, optionally with their thumbnails, and the scales that normalise both.

    Both are parameters without gradient rather than buffers, so that device placement and offloading treat them like
    those of any other model.

    Args:
        num_samples: N, number of reference images.
        feature_dim: D, width of the features.
        feature_scale: features are divided by it in every transport problem: their median distance in the `scaled`
            form, 1 for the original study's raw features.
        dataset: name of the data set of the reference images.
        data_fingerprint: content hash of that data set, the same as in the configuration of the feature network.
        thumbnail_shape: (C, H, W) of the thumbnails; None for features alone.
        pixel_scale: median distance between thumbnails.
        num_classes: number of classes of references with labels, which guide images of each class by themselves.
        has_weights: whether references have a mass of their own, `weights`; otherwise all have the same.

    Example:
        >>> bank = ReferenceBank.from_features(torch.randn(100, 16), feature_scale=2.0)
        >>> bank.references().shape
        torch.Size([100, 16])
    """

    labels: Tensor | None

    @register_to_config
    def __init__(
        self,
        num_samples: int = 2000,
        feature_dim: int = 128,
        feature_scale: float = 1.0,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
        thumbnail_shape: tuple[int, int, int] | None = None,
        pixel_scale: float = 1.0,
        num_classes: int | None = None,
        has_weights: bool = False,
    ) -> None:
        super().__init__()
        require_sizes(num_samples=num_samples, feature_dim=feature_dim)
        require(num_samples >= 2, "num_samples", "be at least 2 (a distribution, not a point)", num_samples)
        require(0 < feature_scale < math.inf, "feature_scale", "be positive", feature_scale)
        require(0 < pixel_scale < math.inf, "pixel_scale", "be positive", pixel_scale)
        self.features = nn.Parameter(torch.zeros(num_samples, feature_dim), requires_grad=False)
        self.thumbnails: nn.Parameter | None = None
        if thumbnail_shape is not None:
            require_sizes(**{f"thumbnail_shape[{axis}]": size for axis, size in enumerate(thumbnail_shape)})
            self.thumbnails = nn.Parameter(torch.zeros(num_samples, *thumbnail_shape), requires_grad=False)
        if num_classes is not None:
            require_sizes(num_classes=num_classes)
        labels = None if num_classes is None else torch.zeros(num_samples, dtype=torch.long)
        self.register_buffer("labels", labels)
        # Relative to their mean, so that half precision keeps the weights of large sets.
        self.weights = nn.Parameter(torch.ones(num_samples), requires_grad=False) if has_weights else None

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        *,
        feature_scale: float = 1.0,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        num_classes: int | None = None,
        weights: Tensor | None = None,
    ) -> ReferenceBank:
        """A reference set of `features`, [N, D], N ≥ 2, with thumbnails of their `images`, [N, C, H, W] in [-1, 1], and
        their `labels`, integers [N] from 0 to `num_classes` − 1 (by default the largest label), and their `weights`,
        [N], positive: the relative mass of each reference, where they should not all count alike."""
        require(features.ndim == 2, "features", "have shape [N, D]", tuple(features.shape))
        require(bool(features.isfinite().all()), "features", "be finite", "NaN or Inf")
        small, pixels = None, {}
        if images is not None:
            fits = images.ndim == 4 and len(images) == len(features)
            require(fits, "images", f"have shape [{len(features)}, C, H, W]", tuple(images.shape))
            require_model_range(images)
            small = thumbnails(images.float())
            pixels = {"thumbnail_shape": tuple(small.shape[1:]), "pixel_scale": median_distance(small.flatten(1))}
        if labels is not None:
            fits = tuple(labels.shape) == (len(features),) and not labels.is_floating_point()
            require(fits, "labels", f"be {len(features)} integers", tuple(labels.shape))
            num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
            in_range = int(labels.min()) >= 0 and int(labels.max()) < num_classes
            require(in_range, "labels", f"lie in 0 … {num_classes - 1}", (int(labels.min()), int(labels.max())))
            pixels |= {"num_classes": num_classes}
        if weights is not None:
            require(tuple(weights.shape) == (len(features),), "weights", f"be {len(features)} numbers", weights)
            positive = bool((weights.isfinite() & (weights > 0)).all())
            require(positive, "weights", "be positive", float(weights.min()))
            pixels |= {"has_weights": True}
        bank = cls(len(features), features.shape[1], feature_scale, dataset, data_fingerprint, **pixels)
        bank.features.data.copy_(features)
        if bank.labels is not None and labels is not None:
            bank.labels.copy_(labels)
        if bank.thumbnails is not None and small is not None:
            bank.thumbnails.data.copy_(small)
        if bank.weights is not None and weights is not None:
            bank.weights.data.copy_(weights / weights.double().mean())
        return bank

    def forward(self, return_dict: bool = True) -> ReferenceBankOutput | tuple[Tensor]:
        """The stored features, [N, D]."""
        features = self.features.detach()
        return ReferenceBankOutput(features) if return_dict else (features,)

    def references(self) -> Tensor:
        """The features divided by `feature_scale`, float32 [N, D]."""
        return self.features.float() / self.config.feature_scale

    def masses(self) -> Tensor | None:
        """The mass of each reference in a transport problem, float32 [N] with the sum 1; None where all are equal."""
        return None if self.weights is None else self.weights.detach().float() / self.weights.detach().float().sum()
