"""Vision backbones of transformers as feature networks for losses and guidance, or as evaluators."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models import modeling_utils
from safetensors import SafetensorError
from torch import Tensor

from ..errors import InputError, extra, require
from .feature_extractor import FeatureExtractor, FeatureExtractorOutput

if TYPE_CHECKING:
    from typing import Self

PREPROCESSING = ("image_size", "image_mean", "image_std")
"""Entries of the configuration that describe the preprocessing of images."""


class BackboneFeatureExtractor(FeatureExtractor):
    """DINOv2, CLIP, ViT, ConvNeXt, …: the backbone's pooled features if it pools, else the mean over its last tokens.

    Images of any size, grey or RGB, are resized (bilinear, antialiased) and normalised as the backbone's image
    processor prescribes. `from_transformers` wraps a backbone. Saved with a pipeline, it consists of safetensors and
    JSON files like the other components, and loads without the original repository.

    Args:
        backbone: configuration of the backbone in the format of transformers, including `model_type`.
        image_size: height and width of the backbone's input, in pixels.
        image_mean, image_std: mean and standard deviation of each channel, for images in [0, 1].
        feature_dim: width of the features.
        source: name of the backbone in reports: its Hub id, or the name of its folder.
        dataset, data_fingerprint: None, because a general backbone suits any data.

    Example:
        >>> from transformers import ViTConfig
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
        >>> network = BackboneFeatureExtractor(backbone=config.to_dict(), image_size=(16, 16), feature_dim=16)
        >>> network.extract(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 16])
    """

    @register_to_config
    def __init__(
        self,
        *,
        backbone: dict[str, Any],
        image_size: tuple[int, int] = (224, 224),
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        feature_dim: int = 384,
        source: str | None = None,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        with extra("backbones"):
            from transformers import AutoConfig, AutoModel

        self.network = _vision_part(AutoModel.from_config(AutoConfig.for_model(**backbone)))
        self._freeze()

    @property
    def name(self) -> str:
        """Its name in reports: its source, or else the type of its architecture."""
        return self.config.source or self.config.backbone["model_type"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Self:
        """As `PortableModel.from_pretrained`."""
        # diffusers replaces torch's initialisers while it loads weights; transformers 4 needs their return values.
        initialisers = dict(modeling_utils.TORCH_INIT_FUNCTIONS)
        modeling_utils.TORCH_INIT_FUNCTIONS.clear()
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            modeling_utils.TORCH_INIT_FUNCTIONS.update(initialisers)

    @classmethod
    def from_transformers(cls, name_or_path: str, **options: Any) -> BackboneFeatureExtractor:
        """A backbone with its weights, from a folder or a Hub id.

        Args:
            name_or_path: such as `facebook/dinov2-small` or `openai/clip-vit-base-patch32`.
            options: for both of transformers' `from_pretrained`, such as `revision` and `local_files_only`.

        Raises:
            InputError: the folder or repository has no vision backbone with safetensors and an image processor.
        """
        with extra("backbones"):
            from transformers import AutoImageProcessor, AutoModel

        try:
            processor = AutoImageProcessor.from_pretrained(name_or_path, **options)
            network = AutoModel.from_pretrained(name_or_path, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            requirement = "be a folder or Hub id with a vision backbone (safetensors) and its image processor"
            raise InputError(f"`backbone` must {requirement}, got {name_or_path!r}") from error
        network = _vision_part(network)
        size = _side_lengths(processor)
        backbone = network.config.to_dict()
        backbone.pop("_name_or_path", None)  # it may be a local path
        wrapped = cls(
            backbone=backbone,
            image_size=size,
            image_mean=tuple(processor.image_mean),
            image_std=tuple(processor.image_std),
            feature_dim=int(_pooled(network.eval(), torch.zeros(1, 3, *size)).shape[1]),
            source=Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path,
        )
        wrapped.network.load_state_dict(network.state_dict())
        return wrapped

    def forward(self, images: Tensor, return_dict: bool = True) -> FeatureExtractorOutput | tuple[Tensor, Tensor]:
        """Features [B, feature_dim] of `images`, [B, 1 or 3, H, W] in [0, 1]; there are no class logits."""
        channels = images.shape[1]
        require(channels in (1, 3), "images", "have 1 or 3 channels", channels)
        pixels = images.expand(-1, 3, -1, -1)
        pixels = F.interpolate(pixels, size=tuple(self.config.image_size), mode="bilinear", antialias=True)
        mean, std = (pixels.new_tensor(self.config[name]).view(1, -1, 1, 1) for name in ("image_mean", "image_std"))
        features = _pooled(self.network, (pixels - mean) / std)
        logits = features.new_empty(len(features), 0)
        return FeatureExtractorOutput(features, logits) if return_dict else (features, logits)


def _vision_part(network: Any) -> Any:
    """The vision model of CLIP-like networks; before transformers 5, their vision-only classes wrap it as well."""
    return getattr(network, "vision_model", network)


def _pooled(network: Any, pixels: Tensor) -> Tensor:
    """Features [B, D] of normalised images [B, 3, H, W]."""
    output = network(pixel_values=pixels)
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        last = output.last_hidden_state
        pooled = last.mean(dim=(2, 3)) if last.ndim == 4 else last.mean(dim=1)
    return pooled.flatten(1)


def _side_lengths(processor: Any) -> tuple[int, int]:
    """Height and width of the backbone's input: those of the crop if its image processor crops."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = dict(crop or processor.size)
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])
