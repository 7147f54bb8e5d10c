"""Priors of the truncated chain: models that generate x_T', the noisy image from which the last T' reverse steps start.

Every prior maps latents z, [B, latent_dim], to images in one call, or in the few calls of a tuned denoiser; z is drawn
from N(0, I), or from a mixture of Gaussians that was fitted to the codes of an autoencoder. A prior with classes takes
a label beside each latent, and makes an image of this class. The `prediction_type` states which images it generates:

    "noisy_sample"   x_T' = G(z)                                  the generator makes the noisy image
    "sample"         x_T' = α G(z) + σ ε,  ε ~ N(0, I) fresh      the generator makes the clean part; (α, σ) of step T'

Options are keyword-only, because diffusers drops positional ones in `from_config`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..errors import require, require_sizes
from ..images import require_model_range
from ..schedules import Chain, Step
from .portable import PortableModel

LATENT_ENTRIES = 10**9
"""Largest number of entries in the covariances of a mixture of latents: 4 GB in float32."""
PRIOR_PREDICTION_TYPES = ("sample", "noisy_sample")


@dataclass
class PriorOutput(BaseOutput):
    """Output of a prior: clean images or x_T', depending on its `prediction_type`; [B, C, H, W]."""

    sample: Tensor


class PriorMixin:
    """Interface of priors for the pipeline: shapes of latents and images, their meaning, their cost, and sampling."""

    config: Any
    dtype: torch.dtype
    device: torch.device

    #: Number of function evaluations (NFE) in one call of `sample`.
    nfe: int = 1

    @property
    def num_classes(self) -> int | None:
        """Number of classes that `draw` can be asked for; None for a prior that makes images of any class."""
        return self.config.get("num_classes")

    @property
    def needs_labels(self) -> bool:
        """Whether `draw` must be asked for a class, which a mixture of classes can draw by itself."""
        return self.num_classes is not None

    @property
    def latent_dim(self) -> int:
        """Width of the latents."""
        return self.config.latent_dim

    @property
    def prediction_type(self) -> str:
        """`"sample"` (clean part) or `"noisy_sample"` (x_T')."""
        return self.config.prediction_type

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the generated images."""
        return (self.config.out_channels, *_height_width(self.config.sample_size))

    def sample(
        self,
        batch_size: int,
        alpha: Tensor,
        sigma: Tensor,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        device: torch.device | str | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Draw x_T', [B, C, H, W], in the dtype of the prior.

        Args:
            batch_size: number of images B.
            alpha, sigma: noise level of x_T', scalars: `alpha_sigma(scheduler, truncation_timestep − 1)`.
            generator: one generator, or one for each image, so that an image does not depend on the rest of its batch.
            device: where the noise is drawn; by default the device of the prior.
            class_labels: int64 [B], see `draw`.
        """
        generator = list(generator) if isinstance(generator, Sequence) else generator
        images = self.draw(batch_size, generator=generator, device=device, class_labels=class_labels)
        return self.diffuse(images, alpha, sigma, generator=generator)

    def draw(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: torch.device | str | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Images from new latents, clean or x_T' depending on `prediction_type`: the first half of `sample`.

        With class labels, int64 [B], they are of these classes, from the same latents.

        Raises:
            InputError: labels for a prior without classes, none for one that needs them, or another number of labels.
        """
        self._check_labels(class_labels, batch_size)
        device = torch.device(device or self.device)
        labels = {} if class_labels is None else {"class_labels": class_labels.to(device)}
        return self(self._draw_latents(batch_size, generator, device, **labels), **labels).sample  # type: ignore[operator]

    def _draw_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """z ~ N(0, I), [B, latent_dim]."""
        return randn_tensor((batch_size, self.latent_dim), generator=generator, device=device, dtype=self.dtype)

    def diffuse(
        self,
        images: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """x_T' from the output of the prior: α G + σ ε for clean images, otherwise unchanged; differentiable."""
        if self.prediction_type == "noisy_sample":
            return images
        noise = randn_tensor(tuple(images.shape), generator=generator, device=images.device, dtype=images.dtype)
        return alpha.to(images) * images + sigma.to(images) * noise

    def at_truncation_timestep(self, truncation_timestep: int) -> Any:
        """A copy for another T'. The prior must generate clean images, which the pipeline diffuses to the new noise
        level.

        Raises:
            InputError: a prior that generates x_T' itself, which has a fixed T'.
        """
        is_clean = self.prediction_type == "sample"
        require(is_clean, "prior", 'generate clean images (prediction_type "sample")', self.prediction_type)
        require(truncation_timestep >= 1, "truncation_timestep", "be at least 1", truncation_timestep)
        moved = copy.deepcopy(self)
        moved.register_to_config(truncation_timestep=truncation_timestep)  # type: ignore[attr-defined]
        return moved

    def _check_latents(self, latents: Tensor) -> None:
        valid = latents.ndim == 2 and latents.shape[1] == self.latent_dim
        require(valid, "latents", f"have shape [B, {self.latent_dim}]", tuple(latents.shape))

    def _check_labels(self, class_labels: Tensor | None, batch_size: int) -> None:
        kind = type(self).__name__
        if class_labels is None:
            require(not self.needs_labels, "class_labels", f"be given to a {kind} of {self.num_classes} classes", None)
            return
        takes = self.num_classes is not None
        require(takes, "class_labels", f"be none for a {kind} that makes images of any class", "labels")
        shape = tuple(class_labels.shape)
        require(shape == (batch_size,), "class_labels", f"have shape ({batch_size},)", shape)


class PriorGenerator(PriorMixin, PortableModel, ConfigMixin):
    """DCGAN-style generator: a linear layer to a small map, upsampling by transposed convolutions, a last convolution.

    All learned priors (VAE decoder, GAN, OT) share it. The output layer is tanh for clean images and linear for x_T',
    which is unbounded.

    Args:
        truncation_timestep: T' at which its chain starts, at least 1.
        sample_size: height and width in pixels, divisible by 2^(number of blocks − 1).
        out_channels: image channels.
        latent_dim: width of z.
        block_out_channels: width of each resolution, from the smallest map to the full image.
        norm_type: `"batch"` as in DCGAN, or `"group"`, with which images are independent of each other during training.
        prediction_type: `"sample"` (clean images) or `"noisy_sample"` (x_T').
        num_latent_components: number of Gaussians in the mixture of latents; 0 for N(0, I). `with_latents` sets it.
        num_classes: number of classes C: an embedding of the label stands beside z. None for no classes.

    Example:
        >>> prior = PriorGenerator(truncation_timestep=100, sample_size=8, latent_dim=16, block_out_channels=(32, 16))
        >>> prior(torch.randn(2, 16)).sample.shape
        torch.Size([2, 3, 8, 8])

    Reference: [Radford2015]; the layers are those of [Miyato2018]; classes as in [Mirza2014].
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        truncation_timestep: int,
        sample_size: int | tuple[int, int] = 32,
        out_channels: int = 3,
        latent_dim: int = 1024,
        block_out_channels: tuple[int, ...] = (512, 256, 128, 64),
        norm_type: str = "batch",
        prediction_type: str = "sample",
        num_latent_components: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        require_sizes(truncation_timestep=truncation_timestep, out_channels=out_channels, latent_dim=latent_dim)
        require_sizes(0, num_latent_components=num_latent_components)
        entries = num_latent_components * latent_dim**2
        fits = f"be at most {LATENT_ENTRIES // latent_dim**2} with latent_dim={latent_dim}"
        require(entries <= LATENT_ENTRIES, "num_latent_components", fits, num_latent_components)
        allowed = prediction_type in PRIOR_PREDICTION_TYPES
        require(allowed, "prediction_type", f"be one of {', '.join(PRIOR_PREDICTION_TYPES)}", prediction_type)
        height, width = smallest_map(sample_size, len(block_out_channels))
        first, last = block_out_channels[0], block_out_channels[-1]
        if num_classes is not None:
            require_sizes(num_classes=num_classes)
            multiple = num_latent_components % num_classes == 0
            equal = f"be a multiple of the {num_classes} classes"
            require(multiple, "num_latent_components", equal, num_latent_components)
            self.class_embedding = nn.Embedding(num_classes, latent_dim)
        self.project = nn.Linear((1 if num_classes is None else 2) * latent_dim, first * height * width)
        blocks: list[nn.Module] = [nn.Unflatten(1, (first, height, width)), _norm(norm_type, first), nn.ReLU()]
        for narrow, wide in zip(block_out_channels[1:], block_out_channels, strict=False):
            upsample = nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1, bias=False)
            blocks += [upsample, _norm(norm_type, narrow), nn.ReLU()]
        blocks += [nn.Conv2d(last, out_channels, kernel_size=3, padding=1)]
        self.blocks = nn.Sequential(*blocks)
        if num_latent_components:
            count = num_latent_components
            self.register_buffer("latent_weight", torch.full((count,), 1 / count))
            self.register_buffer("latent_mean", torch.zeros(count, latent_dim))
            self.register_buffer("latent_factor", torch.eye(latent_dim).repeat(count, 1, 1))

    def with_latents(self, weight: Tensor, mean: Tensor, covariance: Tensor) -> PriorGenerator:
        """A copy that draws z from a mixture of K Gaussians.

        With classes there are as many Gaussians for each, in the order of the classes, and z is drawn from those of the
        class that is asked for.

        Args:
            weight: [K], positive.
            mean: [K, latent_dim].
            covariance: [K, latent_dim, latent_dim], positive definite.
        """
        mixture = {
            "latent_weight": weight / weight.sum(),
            "latent_mean": mean,
            "latent_factor": torch.linalg.cholesky(covariance.double()).mT,
        }
        copied = type(self).from_config(self.config, num_latent_components=len(weight))
        copied.load_state_dict(self.state_dict() | mixture)
        return copied.to(device=self.device, dtype=self.dtype).train(self.training)

    def _draw_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        # Of each class; one Gaussian leaves nothing to choose.
        count = self.config.num_latent_components // (self.num_classes or 1)
        shape = (batch_size, int(count > 1) + self.latent_dim)
        normal = randn_tensor(shape, generator=generator, device=device, dtype=self.dtype)
        if not count:
            return normal
        choice, normal = normal.split([int(count > 1), self.latent_dim], dim=1)
        if class_labels is None:
            component = pick_component(self.latent_weight, choice)
        else:
            component = class_labels * count + pick_component(self.latent_weight.view(-1, count)[class_labels], choice)
        return self.latent_mean[component] + times_factor(normal, component, self.latent_factor)

    def forward(
        self, latents: Tensor, return_dict: bool = True, class_labels: Tensor | None = None
    ) -> PriorOutput | tuple[Tensor]:
        """Images of latents z, [B, latent_dim]: clean in (−1, 1), or x_T'; [B, C, H, W].

        A generator with classes is given those of the images, int64 [B].
        """
        self._check_latents(latents)
        self._check_labels(class_labels, len(latents))
        if class_labels is not None:
            latents = torch.cat([latents, self.class_embedding(class_labels)], dim=1)
        images = self.blocks(self.project(latents))
        if self.config.prediction_type == "sample":
            images = images.tanh()
        return PriorOutput(sample=images) if return_dict else (images,)


class GaussianPrior(PriorMixin, PortableModel, ConfigMixin):
    """Closed-form prior: a Gaussian with the mean and covariance of the data, or a mixture with one for each class.

        x0 = μ_k + Fᵀ_k z + s_k ε',   x_T' = α x0 + σ ε

    F contains the leading `rank` principal directions. s is the standard deviation of the remaining directions, the
    same in all of them, so that the total variance is that of the data. `from_images` fits it to data. Built from a
    configuration alone (`num_components=0`) it is N(0, I), the start of an ordinary chain, drawn exactly as in
    `DDIMPipeline`.

    Args:
        truncation_timestep: T' at which its chain starts, at least 1.
        sample_size: height and width in pixels.
        out_channels: image channels.
        num_components: number of Gaussians in the mixture; 0 for N(0, I).
        rank: number of principal directions of each Gaussian.

    Example:
        >>> prior = GaussianPrior(truncation_timestep=1000, sample_size=2, out_channels=1)
        >>> prior(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sample
        tensor([[[[1., 2.],
                  [3., 4.]]]])
    """

    @register_to_config
    def __init__(
        self,
        *,
        truncation_timestep: int,
        sample_size: int | tuple[int, int] = 32,
        out_channels: int = 3,
        num_components: int = 0,
        rank: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(truncation_timestep=truncation_timestep, out_channels=out_channels)
        require_sizes(0, num_components=num_components, rank=rank)
        height, width = _height_width(sample_size)
        dim, count = out_channels * height * width, max(1, num_components)
        require(0 <= rank <= dim, "rank", f"be from 0 to {dim}", rank)
        self.mean = nn.Parameter(torch.zeros(count, dim), requires_grad=False)
        self.residual_std = nn.Parameter(torch.ones(count), requires_grad=False)
        self.weight = nn.Parameter(torch.full((count,), 1 / count), requires_grad=False)
        if rank:
            self.factor = nn.Parameter(torch.zeros(count, rank, dim), requires_grad=False)

    @classmethod
    def from_images(
        cls,
        images: Tensor,
        truncation_timestep: int,
        *,
        labels: Tensor | None = None,
        rank: int | None = None,
    ) -> GaussianPrior:
        """A prior with the mean and covariance of real images; covariances are accumulated in float64.

        Args:
            images: x0 in [-1, 1], [N, C, H, W], N ≥ 2.
            truncation_timestep: T' at which its chain starts.
            labels: class labels, [N] integers: one Gaussian for each class, weighted by its frequency. Every class
                needs at least two images.
            rank: number of principal directions; by default all that the data have, at most C·H·W.
        """
        require(images.ndim == 4 and len(images) >= 2, "images", "be [N, C, H, W] with N ≥ 2", tuple(images.shape))
        require_model_range(images)
        labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels.cpu()
        require(len(labels) == len(images), "labels", f"hold {len(images)} labels", len(labels))
        classes, counts = labels.unique(return_counts=True)
        require(bool((counts >= 2).all()), "labels", "give every class at least two images", int(counts.min()))
        dim = images[0].numel()
        rank = min(dim, int(counts.max()) - 1) if rank is None else rank
        height, width = images.shape[2:]
        size = height if height == width else (height, width)
        prior = cls(
            truncation_timestep=truncation_timestep,
            sample_size=size,
            out_channels=images.shape[1],
            num_components=len(classes),
            rank=rank,
        )
        for index, label in enumerate(classes):
            mean, factor, residual_std = _principal_moments(
                images[(labels == label).to(images.device)].flatten(1), rank
            )
            prior.mean[index], prior.residual_std[index] = mean, residual_std
            prior.weight[index] = counts[index] / len(images)
            if rank:
                prior.factor[index] = factor
        return prior

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Number of function evaluations: 0 for N(0, I), 1 for the linear map of a fitted Gaussian."""
        return int(self.config.num_components > 0)

    @property
    def num_classes(self) -> int | None:
        """Number of Gaussians of a mixture, one for each class."""
        return self.config.num_components if self.config.num_components > 1 else None

    @property
    def needs_labels(self) -> bool:
        """False: classes are drawn by the weights of their Gaussians."""
        return False

    @property
    def prediction_type(self) -> str:
        """`"sample"` with fitted moments, which are those of clean images; `"noisy_sample"` for N(0, I)."""
        return "sample" if self.config.num_components else "noisy_sample"

    @property
    def latent_dim(self) -> int:
        """One number per pixel, one per principal direction, and one that selects the component of a mixture."""
        channels, height, width = self.image_shape
        return channels * height * width + self.config.rank + (self.config.num_components > 1)

    def forward(
        self, latents: Tensor, return_dict: bool = True, class_labels: Tensor | None = None
    ) -> PriorOutput | tuple[Tensor]:
        """Images of standard normal latents, [B, latent_dim]; [B, C, H, W].

        Each is of the class that its latents choose, or that `class_labels`, int64 [B], name: the number of a Gaussian.
        """
        self._check_latents(latents)
        images = self._transform(latents, class_labels) if self.config.num_components else latents
        images = images.view(-1, *self.image_shape)
        return PriorOutput(sample=images) if return_dict else (images,)

    def _transform(self, latents: Tensor, class_labels: Tensor | None) -> Tensor:
        """μ_k + F_kᵀ z + s_k ε' with (k, z, ε') taken from the latents; [B, C·H·W]."""
        rank, num_components = self.config.rank, self.config.num_components
        choice, codes, noise = latents.split([int(num_components > 1), rank, self.mean.shape[1]], dim=1)
        component = pick_component(self.weight, choice) if class_labels is None else class_labels
        images = self.mean[component] + self.residual_std[component, None] * noise
        return images + times_factor(codes, component, self.factor) if rank else images


class FewStepPrior(PriorMixin, PortableModel, ConfigMixin):
    """A denoiser that was tuned for a few calls: the images that its chain finishes are the clean images of the prior.

    `from_pipeline` takes what `train_few_step.py` leaves. The tuned denoiser may have learned from coupled pairs; the
    one that walks the last T' steps behind this prior may not.

    Args:
        truncation_timestep: T' at which the chain behind it starts, at least 1.
        unet_config: configuration of the tuned `UNet2DModel`.
        steps: the calls of its chain, the numbers of a `Step` each.
        clip_range: bound of |x̂0| in every step; None for no bound.
        num_classes: number of classes that the tuned denoiser knows; None for an unconditional one.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
        >>> from ot_diffusers import FlowMatchPipeline
        >>> from ot_diffusers.schedules import record_calls
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
        ... )
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> record_calls(scheduler, 2)
        >>> prior = FewStepPrior.from_pipeline(FlowMatchPipeline(unet, scheduler), truncation_timestep=100)
        >>> prior(torch.randn(3, 64)).sample.shape, prior.nfe
        (torch.Size([3, 1, 8, 8]), 2)
    """

    @register_to_config
    def __init__(
        self,
        *,
        truncation_timestep: int,
        unet_config: dict[str, Any],
        steps: Sequence[Sequence[float]],
        clip_range: float | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        require_sizes(truncation_timestep=truncation_timestep)
        self.unet = UNet2DModel.from_config(unet_config)
        self.chain = Chain(tuple(Step(*step) for step in steps), clip_range)

    @classmethod
    def from_pipeline(cls, pipeline: Any, truncation_timestep: int) -> FewStepPrior:
        """The denoiser of a tuned pipeline, with the number of calls that it was tuned for, as a copy.

        Args:
            pipeline: what `train_few_step.py` leaves, with its own scheduler.
            truncation_timestep: T' at which the chain behind the prior starts.

        Raises:
            InputError: a pipeline that was not tuned for a number of calls, one with another scheduler, or one that
                does not know the classes of its denoiser.
        """
        unet, scheduler = pipeline.unet, pipeline.scheduler
        calls, name = scheduler.config.get("_num_inference_steps"), type(scheduler).__name__
        require(calls is not None, "pipeline", "be tuned for a few calls by train_few_step.py", name)
        classes = getattr(pipeline, "classes", None)
        knows = classes is not None or unet.config.get("num_class_embeds") is None
        kind = "know the classes of its denoiser, as an OTGuidedDDIMPipeline does"
        require(knows, "pipeline", kind, type(pipeline).__name__)
        own = isinstance(scheduler, (DDIMScheduler, FlowMatchEulerDiscreteScheduler))
        require(own, "pipeline", "have the scheduler that it was tuned with (DDIM or flow matching)", name)
        chain = Chain.of(copy.deepcopy(scheduler), calls)
        prior = cls(
            truncation_timestep=truncation_timestep,
            unet_config={name: value for name, value in unet.config.items() if not name.startswith("_")},
            steps=[list(dataclasses.astuple(step)) for step in chain.steps],
            clip_range=chain.clip_range,
            num_classes=None if classes is None else len(classes),
        )
        prior.unet = copy.deepcopy(unet)
        return prior.eval()

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Number of function evaluations: the calls of the tuned denoiser."""
        return len(self.chain.steps)

    @property
    def prediction_type(self) -> str:
        """`"sample"`: its images are finished."""
        return "sample"

    @property
    def latent_dim(self) -> int:
        """One number per pixel and channel: the noise from which the tuned chain starts."""
        return math.prod(self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the generated images."""
        return (self.unet.config.in_channels, *_height_width(self.unet.config.sample_size))

    def forward(
        self, latents: Tensor, return_dict: bool = True, class_labels: Tensor | None = None
    ) -> PriorOutput | tuple[Tensor]:
        """Images of standard normal latents, [B, latent_dim]: clean in [−1, 1], [B, C, H, W].

        A denoiser with classes is given those of the images, int64 [B].
        """
        self._check_latents(latents)
        self._check_labels(class_labels, len(latents))
        images = self.chain(self.unet, latents.view(-1, *self.image_shape), class_labels)
        return PriorOutput(sample=images) if return_dict else (images,)


def pick_component(weight: Tensor, choice: Tensor) -> Tensor:
    """The component whose share of [0, 1] contains Φ(choice), [B]; `choice` is [B, 1], or [B, 0] without a mixture. The
    weights of K components are [K], or [B, K] where each choice has its own."""
    if not choice.shape[1]:
        return torch.zeros(len(choice), dtype=torch.long, device=choice.device)
    cumulative = weight.float().cumsum(-1).expand(len(choice), -1).contiguous()
    uniform = torch.special.ndtr(choice.float()) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform)[:, 0].clamp(max=cumulative.shape[1] - 1)


def times_factor(codes: Tensor, component: Tensor, factor: Tensor) -> Tensor:
    """Fᵀ_k z for the component k of each row of `codes`, [B, rank] to [B, D]; `factor` is [K, rank, D].

    Autocast is off: it is meant for networks, and would round these moments.
    """
    product = codes.new_empty(len(codes), factor.shape[2])
    with torch.autocast(codes.device.type, enabled=False):
        for index in range(len(factor)):  # one factor at a time: B of them would not fit in memory
            rows = component == index
            product[rows] = codes[rows] @ factor[index]
    return product


def smallest_map(sample_size: int | Sequence[int], num_blocks: int) -> tuple[int, int]:
    """Height and width of the first of `num_blocks` maps, whose size doubles each time up to `sample_size`."""
    require(num_blocks >= 1, "block_out_channels", "name at least one block", num_blocks)
    height, width = _height_width(sample_size)
    factor = 2 ** (num_blocks - 1)
    require(height % factor == 0 and width % factor == 0, "sample_size", f"be divisible by {factor}", sample_size)
    return height // factor, width // factor


def _height_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) from a size that may be a single number."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    require_sizes(sample_size=height)
    require_sizes(sample_size=width)
    return height, width


def _norm(norm_type: str, channels: int) -> nn.Module:
    """Batch normalisation, or group normalisation with groups of at most 8 channels."""
    require(norm_type in ("batch", "group"), "norm_type", "be batch or group", norm_type)
    return nn.BatchNorm2d(channels) if norm_type == "batch" else nn.GroupNorm(max(1, channels // 8), channels)


def _principal_moments(pixels: Tensor, rank: int, chunk_size: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], scaled principal directions [rank, D] and residual standard deviation of pixels [N, D].

    Reference: [Tipping1999].
    """
    count, dim = pixels.shape
    mean = pixels.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=pixels.device)
    for chunk in pixels.split(chunk_size):
        centred = chunk.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / (count - 1))
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    variances = variances.clamp(min=0)
    residual = variances[: dim - rank].sum() / max(1, dim - rank)
    # The noise of variance `residual` is added in the kept directions too.
    factor = (directions * (variances - residual).clamp(min=0).sqrt()).T[dim - rank :]
    return mean, factor, residual.sqrt()
