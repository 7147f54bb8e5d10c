"""The contracting half of a denoiser as a feature network, which needs no labels, no training and no download."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..errors import require, require_sizes
from ..schedules import alpha_sigma, set_timesteps
from .feature_extractor import FeatureExtractor, FeatureExtractorOutput

POOLED_SIZE = 4
"""Feature maps are averaged to this many rows and columns: few numbers that still depend on positions."""
EXPANDING = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")
"""Parts of a `UNet2DModel` that its features do not need."""
CHAIN_STEPS = 50
"""The denoiser is asked at the noise level of the last of so many steps."""


class DenoiserFeatureExtractor(FeatureExtractor):
    """The innermost features of a denoiser, of clean images at its lowest noise level.

    A copy of the down and mid blocks of a `UNet2DModel`, about half of its weights, is saved with the pipeline. The
    features are the output of the mid block, averaged to at most 4 × 4 positions. `from_denoiser` makes one.

    Args:
        denoiser: configuration of the `UNet2DModel`.
        timestep: time that the denoiser is given.
        image_scale: factor between images in [-1, 1] and what the denoiser is given.
        sample_size: side of the images in pixels, or height and width.
        in_channels: number of channels of the images.
        feature_dim: width of the features.
        dataset, data_fingerprint: None, because what the denoiser was trained on is not known.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(32,), **blocks)
        >>> network = DenoiserFeatureExtractor.from_denoiser(unet, DDIMScheduler())
        >>> network.extract(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 512])

    Reference: [Baranchuk2022] for features of denoisers.
    """

    @register_to_config
    def __init__(
        self,
        *,
        denoiser: dict[str, Any],
        timestep: float = 0.0,
        image_scale: float = 1.0,
        sample_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        feature_dim: int = 1024,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        require_sizes(in_channels=in_channels, feature_dim=feature_dim)
        self.network = UNet2DModel.from_config(denoiser)
        for name in EXPANDING:
            delattr(self.network, name)
        self._freeze()

    @classmethod
    def from_denoiser(cls, unet: UNet2DModel, scheduler: Any) -> DenoiserFeatureExtractor:
        """The features of `unet`, which is left as it is, at the lowest noise level of a chain of 50 steps.

        Args:
            unet: a `UNet2DModel`, without classes or with a null label, which is its last.
            scheduler: the scheduler of its pipeline; any whose noise levels are known.

        Raises:
            InputError: another denoiser.
        """
        require(isinstance(unet, UNet2DModel), "unet", "be a UNet2DModel", type(unet).__name__)
        scheduler = copy.deepcopy(scheduler)
        times = set_timesteps(scheduler, min(CHAIN_STEPS, scheduler.config.num_train_timesteps))
        alpha, _ = alpha_sigma(scheduler, times[-1], len(times) - 1)
        scale = float(alpha) / scheduler.config.get("sigma_data", 1.0)
        size, channels = unet.config.sample_size, unet.config.in_channels
        require(size is not None, "unet", "have a sample_size", size)
        options: dict[str, Any] = {"timestep": float(times[-1]), "image_scale": scale}
        options |= {"sample_size": size, "in_channels": channels}
        height, width = (size, size) if isinstance(size, int) else size
        with torch.no_grad():
            image = torch.zeros(1, channels, height, width, device=unet.device, dtype=unet.dtype)
            *_, innermost = contracting_maps(unet, image, times[-1])
        denoiser = {name: value for name, value in unet.config.items() if not name.startswith("_")}
        made = cls(denoiser=denoiser, feature_dim=pooled(innermost).shape[1], **options)
        weights = {name: value for name, value in unet.state_dict().items() if not name.startswith(EXPANDING)}
        made.network.load_state_dict(weights)
        return made.to(unet.device)

    def forward(self, images: Tensor, return_dict: bool = True) -> FeatureExtractorOutput | tuple[Tensor, Tensor]:
        """Features [B, feature_dim] of `images`, [B, C, H, W] in [0, 1]; there are no class logits."""
        self._check_shape(images)
        seen = (2 * images - 1) * self.config.image_scale
        *_, innermost = contracting_maps(self.network, seen, self.config.timestep)
        features = pooled(innermost)
        logits = features.new_empty(len(features), 0)
        return FeatureExtractorOutput(features, logits) if return_dict else (features, logits)


def contracting_maps(unet: Any, images: Tensor, timestep: float) -> Iterator[Tensor]:
    """The feature maps of the down blocks and of the mid block of a `UNet2DModel`, as it computes them itself.

    Args:
        unet: a `UNet2DModel`, without classes or with a null label, which is its last.
        images: what the denoiser is given, [B, C, H, W].
        timestep: time that it is given.
    """
    hidden = skipped = 2 * images - 1 if unet.config.center_input_sample else images
    steps = torch.full((len(images),), timestep, device=images.device)
    hidden = unet.conv_in(hidden)
    embedding = unet.time_embedding(unet.time_proj(steps).to(hidden.dtype))
    if unet.config.get("num_class_embeds") is not None:
        labels = torch.full_like(steps, unet.config.num_class_embeds - 1, dtype=torch.long)
        embedding = embedding + unet.class_embedding(labels)
    for block in unet.down_blocks:
        if hasattr(block, "skip_conv"):
            hidden, _, skipped = block(hidden_states=hidden, temb=embedding, skip_sample=skipped)
        else:
            hidden, _ = block(hidden_states=hidden, temb=embedding)
        yield hidden
    if unet.mid_block is not None:
        yield unet.mid_block(hidden, embedding)


def pooled(feature_map: Tensor) -> Tensor:
    """A feature map [B, C, H, W], averaged to at most 4 × 4 positions, [B, D]."""
    height, width = feature_map.shape[2:]
    return F.adaptive_avg_pool2d(feature_map, (min(POOLED_SIZE, height), min(POOLED_SIZE, width))).flatten(1)
