"""Networks that are only needed to train a prior: the encoder of the VAE and the discriminator of the GAN."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .prior import smallest_map


@dataclass
class PriorEncoderOutput(BaseOutput):
    """The posterior q(z | x) = N(mean, exp(log_variance)), both [B, latent_dim]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """z = mean + std · ε, [B, latent_dim]; the gradient flows to mean and variance."""
        noise = randn_tensor(
            tuple(self.mean.shape), generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + (self.log_variance / 2).exp() * noise


class PriorEncoder(ModelMixin, ConfigMixin):
    """The reversed generator: it maps images to the posterior of their latents.

    Args:
        sample_size: height and width in pixels, divisible by 2^(number of blocks − 1).
        in_channels: image channels.
        latent_dim: width of z.
        block_out_channels: width of each resolution, from the smallest map to the full image: the same tuple as in the
            generator.
        num_classes: number of classes; the label of an image becomes one more channel. None for no classes.
    """

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        latent_dim: int = 1024,
        block_out_channels: tuple[int, ...] = (512, 256, 128, 64),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        height, width = smallest_map(sample_size, len(block_out_channels))
        widths = block_out_channels[::-1]
        channels = in_channels
        if num_classes is not None:
            channels, pixels = in_channels + 1, height * width * 4 ** (len(widths) - 1)
            self.class_embedding = nn.Embedding(num_classes, pixels)
        blocks: list[nn.Module] = [nn.Conv2d(channels, widths[0], kernel_size=3, padding=1), nn.LeakyReLU(0.2)]
        for narrow, wide in itertools.pairwise(widths):
            downsample = nn.Conv2d(narrow, wide, kernel_size=4, stride=2, padding=1, bias=False)
            blocks += [downsample, nn.GroupNorm(max(1, wide // 8), wide), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.project = nn.Linear(widths[-1] * height * width, 2 * latent_dim)

    def forward(
        self, sample: Tensor, return_dict: bool = True, class_labels: Tensor | None = None
    ) -> PriorEncoderOutput | tuple[Tensor, Tensor]:
        """Posterior of images [B, C, H, W], and of their classes, int64 [B], for an encoder with classes.

        The log-variance is kept in [-20, 10], where its exponential is finite.
        """
        if class_labels is not None:
            label = self.class_embedding(class_labels).view(-1, 1, *sample.shape[2:])
            sample = torch.cat([sample, label], dim=1)
        mean, log_variance = self.project(self.blocks(sample)).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        return PriorEncoderOutput(mean=mean, log_variance=log_variance) if return_dict else (mean, log_variance)


class PriorDiscriminator(ModelMixin, ConfigMixin):
    """DCGAN-style discriminator: one logit per image, positive for real images.

    Args:
        sample_size: height and width in pixels, divisible by 2^(number of blocks − 1).
        in_channels: image channels.
        block_out_channels: width of each resolution, from the smallest map to the full image.
        use_spectral_norm: limit the Lipschitz constant of each layer to 1 by normalising its weights.
        num_classes: number of classes: the logit has a further term ⟨e_y, h(x)⟩ + b_y, where e_y is an embedding of the
            label and h the last layer of features. None for no classes.

    Reference: [Miyato2018]; [MiyatoKoyama2018] for classes.
    """

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (512, 256, 128, 64),
        use_spectral_norm: bool = True,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        height, width = smallest_map(sample_size, len(block_out_channels))
        widths = block_out_channels[::-1]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1)]
        for narrow, wide in itertools.pairwise(widths):
            layers.append(nn.Conv2d(narrow, wide, kernel_size=4, stride=2, padding=1))
            layers.append(nn.Conv2d(wide, wide, kernel_size=3, padding=1))
        head: nn.Module = nn.Linear(widths[-1] * height * width, 1 + (num_classes or 0))
        if use_spectral_norm:
            layers, head = [spectral_norm(layer) for layer in layers], spectral_norm(head)
        activated = [module for layer in layers for module in (layer, nn.LeakyReLU(0.1))]
        self.blocks = nn.Sequential(*activated, nn.Flatten())
        self.head = head

    def forward(self, sample: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Logits [B] of images [B, C, H, W], and of their classes, int64 [B], for a discriminator with classes."""
        logits, of_classes = self.head(self.blocks(sample)).split([1, self.config.num_classes or 0], dim=1)
        if class_labels is not None:
            logits = logits + of_classes.gather(1, class_labels[:, None])
        return logits.squeeze(1)
