"""Small frozen feature networks: one for losses and guidance, and one of a different architecture for evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..errors import require, require_sizes
from ..images import to_unit_range
from .portable import PortableModel

MOST_LAYERS = 1000
NORM_TYPES = ("group_norm", "batch_norm")


@dataclass
class FeatureExtractorOutput(BaseOutput):
    """Output of a feature network.

    Args:
        features: [B, feature_dim], activations of the penultimate layer.
        logits: [B, num_classes].
    """

    features: Tensor
    logits: Tensor


class FeatureExtractor(PortableModel, ConfigMixin):
    """Base class: a network with frozen parameters that maps images in [0, 1] to features and class logits.

    Parameters are frozen in `__init__`, therefore also after `from_pretrained`; a training script unfreezes them with
    `requires_grad_(True)`. Gradients always flow to the images.
    """

    backbone: nn.Module
    classifier: nn.Linear

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W] of the images that it takes; None for images of any size."""
        size = self.config.get("sample_size")
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return self.config.in_channels, height, width

    def _check_shape(self, images: Tensor) -> None:
        """Raise `InputError` for images of another shape than `image_shape`."""
        shape = self.image_shape
        fits = shape is None or tuple(images.shape[1:]) == shape
        require(fits, "images", f"have shape [B, {', '.join(map(str, shape or ()))}]", tuple(images.shape))

    def forward(self, images: Tensor, return_dict: bool = True) -> FeatureExtractorOutput | tuple[Tensor, Tensor]:
        """Features and logits of `images`, [B, C, H, W] in [0, 1]."""
        self._check_shape(images)
        features = self.backbone(images)
        logits = self.classifier(features)
        return FeatureExtractorOutput(features, logits) if return_dict else (features, logits)

    def extract(self, images: Tensor) -> Tensor:
        """Raw features [B, feature_dim] of images in [-1, 1], the range of diffusion models; values are clamped."""
        return self(to_unit_range(images), return_dict=False)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Class logits [B, num_classes] of images in [-1, 1]."""
        return self(to_unit_range(images), return_dict=False)[1]

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()


class ConvFeatureExtractor(FeatureExtractor):
    """The original study's network, for losses and guidance: (Conv → ReLU → Pool) × 2 and a 128-d penultimate layer.

    Args:
        sample_size: height and width in pixels, a multiple of 4.
        in_channels: 1 or 3.
        num_classes: number of classes in its training data.
        block_out_channels: channels of the two convolutions.
        feature_dim: width of the penultimate layer.
        dataset: name of its training data.
        data_fingerprint: content hash of its training data; losses reject a network that was trained on other data.

    Example:
        >>> import torch
        >>> network = ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=32)
        >>> network.extract(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 32])
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        block_out_channels: tuple[int, int] = (32, 64),
        feature_dim: int = 128,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        require_sizes(sample_size=sample_size, in_channels=in_channels, num_classes=num_classes)
        require_sizes(feature_dim=feature_dim)
        require(sample_size % 4 == 0, "sample_size", "be a multiple of 4", sample_size)
        first, second = block_out_channels
        self.backbone = nn.Sequential(
            nn.Conv2d(in_channels, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * (sample_size // 4) ** 2, feature_dim),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(feature_dim, num_classes)
        self._freeze()


class ResidualFeatureExtractor(FeatureExtractor):
    """A residual network: the independent evaluator, not used in training or guidance.

    Each stage after the first halves the resolution. The features are the spatial mean of the last activations,
    projected to `feature_dim`.

    Args: as for `ConvFeatureExtractor`, with
        block_out_channels: channels of each stage, multiples of 8.
        layers_per_block: residual blocks in each stage.
        norm_type: `group_norm` (8 groups), or `batch_norm`, which learns faster in large batches.

    Example:
        >>> import torch
        >>> network = ResidualFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=32)
        >>> network(torch.rand(2, 1, 8, 8)).logits.shape
        torch.Size([2, 10])
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 1,
        feature_dim: int = 128,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
        norm_type: str = "group_norm",
    ) -> None:
        super().__init__()
        require_sizes(sample_size=sample_size, in_channels=in_channels, num_classes=num_classes)
        require_sizes(feature_dim=feature_dim, layers_per_block=layers_per_block)
        require(layers_per_block <= MOST_LAYERS, "layers_per_block", f"be at most {MOST_LAYERS}", layers_per_block)
        require(norm_type in NORM_TYPES, "norm_type", f"be one of {', '.join(NORM_TYPES)}", norm_type)
        stages: list[nn.Module] = [nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)]
        width = block_out_channels[0]
        for stage, channels in enumerate(block_out_channels):
            for layer in range(layers_per_block):
                stride = 2 if stage > 0 and layer == 0 else 1
                stages.append(ResidualBlock(width, channels, stride=stride, norm_type=norm_type))
                width = channels
        self.backbone = nn.Sequential(
            *stages,
            _make_norm(norm_type, width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, feature_dim),
            nn.SiLU(),
        )
        self.classifier = nn.Linear(feature_dim, num_classes)
        self._freeze()


class ResidualBlock(nn.Module):
    """Pre-activation residual block, [B, in_channels, H, W] → [B, out_channels, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm_type: str = "group_norm") -> None:
        super().__init__()
        self.norm1 = _make_norm(norm_type, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = _make_norm(norm_type, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, hidden: Tensor) -> Tensor:
        """Output of the block for hidden states [B, C, H, W]."""
        residual = self.conv1(F.silu(self.norm1(hidden)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.shortcut(hidden) + residual


def _make_norm(norm_type: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm_type == "batch_norm" else nn.GroupNorm(8, channels)
