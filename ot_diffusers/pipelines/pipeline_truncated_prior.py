"""Generation by the last T' reverse steps only, from noisy images that a prior generates in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from torch import Tensor

from ..errors import require, require_integer
from ..guidance import OTGuidance
from ..models.feature_extractor import FeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.prior import PriorMixin
from ..models.reference_bank import ReferenceBank
from ..schedules import Scheduler, alpha_sigma, preserves_variance, truncated_scheduler
from .call import FiniteValues, Generators, check_call, check_networks, postprocess
from .classes import CLASS_OPTIONS, Classes, ClassLabels, class_options, listed
from .guided import Callback, Chain, GuidedPipeline
from .portable import register

if TYPE_CHECKING:
    from typing import Self

logger = logging.get_logger(__name__)

# Default number of corrections of the prior's images in a guided call.
PRIOR_GUIDANCE_STEPS = 5


@register
class TruncatedPriorPipeline(GuidedPipeline):
    """Truncated diffusion: the prior generates x_T', and the denoiser takes the T' steps from there to x_0.

    With the prior N(0, I) and T' = T it is diffusers' own pipeline, bit for bit wherever that has a proper chain (see
    `ot_diffusers.schedules.set_timesteps`). A call does not change the components: it restores the mode of the networks
    and works on a copy of the scheduler.

    With a feature network and its reference bank the chain is guided as by `OTGuidedDDIMPipeline`, and the clean images
    of the prior are corrected before they are diffused.

    The class of an image is that of the prior's image, which T' steps hardly change. Images of a class need a prior
    with classes, as `train_prior.py class_conditional=true` leaves it; the denoiser may have the same classes or none.
    Where the prior makes images of any class, a denoiser with classes is given the null label.

    Args:
        prior: `PriorGenerator`, `FewStepPrior`, `GaussianPrior`, or another `PriorMixin`.
        unet: `UNet2DModel`, trained on all steps or on those below T' only.
        scheduler: `truncated_scheduler(full_scheduler, T')`.
        feature_extractor: frozen feature network, optional.
        reference_bank: features of real images (the reference set) by that network, optional.
        guidance_field: the field that `record_guidance_field` returns, optional.
        id2label, class_frequencies: names and frequencies of the classes, as in `OTGuidedDDIMPipeline`.

    Example:
        >>> from ot_diffusers.models.prior import GaussianPrior
        >>> from ot_diffusers.schedules import truncated_scheduler
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
        ... )
        >>> prior = GaussianPrior.from_images(torch.rand(20, 1, 8, 8) * 2 - 1, truncation_timestep=10)
        >>> pipe = TruncatedPriorPipeline(prior, unet, truncated_scheduler(DDIMScheduler(), 10))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=2, output_type="np").images.shape, pipe.nfe
        ((2, 8, 8, 1), 11)

    Reference: [Zheng2022], [Lyu2022].
    """

    prior: Any
    scheduler: Scheduler

    model_cpu_offload_seq = "prior->unet"

    def __init__(
        self,
        prior: PriorMixin,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        feature_extractor: FeatureExtractor | None = None,
        reference_bank: ReferenceBank | None = None,
        guidance_field: GuidanceField | None = None,
        id2label: dict[Any, str] | None = None,
        class_frequencies: dict[Any, float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(prior=prior, unet=unet, scheduler=scheduler)
        self._register_guidance(feature_extractor, reference_bank, guidance_field)
        self._register_classes(id2label, class_frequencies)
        self._check_components()

    @property
    def truncation_timestep(self) -> int:
        """T', the length of the chain."""
        return self.scheduler.config.num_train_timesteps

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the images."""
        return self.prior.image_shape

    def at_truncation_timestep(self, truncation_timestep: int, full_scheduler: SchedulerMixin | None = None) -> Self:
        """A pipeline of the same parts whose chain starts at another T', without the guidance field of this chain.

        Args:
            truncation_timestep: T' of the new pipeline.
            full_scheduler: scheduler of the whole chain; needed for a T' above that of this pipeline.

        Raises:
            InputError: T' out of range, or a prior that generates x_T' itself, for its own T' only.
        """
        scheduler = truncated_scheduler(full_scheduler or self.scheduler, truncation_timestep)
        prior = self.prior.at_truncation_timestep(truncation_timestep)
        parts = self.feature_extractor, self.reference_bank
        return type(self)(prior, self.unet, scheduler, *parts, **class_options(self))

    @property
    def classes(self) -> Classes | None:
        """The classes of the denoiser or, where it has none, of the prior; None without classes."""
        if self.prior.num_classes is None or self.unet.config.get("num_class_embeds") is not None:
            return super().classes
        return Classes.of(self.prior.num_classes, *map(self.config.get, CLASS_OPTIONS))

    @property
    def takes_labels(self) -> bool:
        """Whether images can be asked for by their class, which a prior of any class does not know."""
        return self.prior.num_classes is not None or self.draws_labels

    @property
    def draws_labels(self) -> bool:
        """Whether a call without labels draws them: if the prior needs them, or if the denoiser has classes and the
        prior has them too or is N(0, I), from which the denoiser alone makes the class."""
        has_classes = self.unet.config.get("num_class_embeds") is not None
        return self.prior.needs_labels or (has_classes and (self.prior.num_classes is not None or self.prior.nfe == 0))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int | None = None,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        class_labels: ClassLabels | None = None,
        class_guidance_scale: float = 1.0,
        guidance_scale: float | None = None,
        num_guidance_steps: int | None = None,
        guidance_start_step: int = 0,
        num_prior_guidance_steps: int | None = None,
        num_correction_steps: int | None = None,
        blur: float | None = None,
        normalize_features: bool | None = None,
        pixel_weight: float | None = None,
        step_rule: str | None = None,
        metric: str | None = None,
        reach: float | None = None,
        joint_batch: bool | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: number of images; by default as many as `class_labels`, or 1.
            generator: one generator, or one for each image, which makes an image independent of its batch.
            eta: η of DDIM in [0, 1]; other schedulers ignore it.
            num_inference_steps: reverse steps, 1 … T'; T' by default. Prefer a divisor of T'.
            use_clipped_model_output: passed on to `DDIMScheduler.step`.
            output_type: `"pil"`, `"np"` (floats in [0, 1], [B, H, W, C]), `"pt"` (tensor in [0, 1],
                [B, C, H, W]) or `"latent"` (the result of the last step).
            return_dict: return an `ImagePipelineOutput`; `False` returns a tuple.
            latents: x_T' that replaces the prior's, [B, C, H, W]; with noisy real images the chain is the oracle.
            class_labels, class_guidance_scale: as in `OTGuidedDDIMPipeline`.
            guidance_scale, num_guidance_steps, guidance_start_step: as in `OTGuidedDDIMPipeline`.
            num_correction_steps, blur, normalize_features, pixel_weight, step_rule: likewise.
            metric, reach, joint_batch: likewise.
            num_prior_guidance_steps: number of corrections of the prior's clean images before they are diffused, each
                as in a guided step; 5 by default where there is guidance and the prior generates clean images.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `OTGuidedDDIMPipeline`.

        Raises:
            InputError: as in `OTGuidedDDIMPipeline`, components made for different truncations, images or classes, or
                labels for a prior that makes images of any class.
        """
        # 1. Check the inputs, prepare the chain.
        batch_size = len(listed(class_labels) or (1,)) if batch_size is None else batch_size
        generator = check_call(batch_size, generator, eta, output_type, callback_on_step_end_tensor_inputs)
        self._check_components()
        shape = self.prior.image_shape
        expected, given = (batch_size, *shape), None if latents is None else tuple(latents.shape)
        require(given in (None, expected), "latents", f"have shape {expected}", given)
        labels = self._chosen_labels(class_labels, batch_size, generator, latents)
        chain = self._prepare_chain(
            copy.deepcopy(self.scheduler),  # sampling changes the state of a scheduler
            shape,
            batch_size,
            self.truncation_timestep if num_inference_steps is None else num_inference_steps,
            num_guidance_steps,
            guidance_start_step,
            {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "generator": generator},
            {
                "guidance_scale": guidance_scale,
                "num_correction_steps": num_correction_steps,
                "blur": blur,
                "normalize_features": normalize_features,
                "pixel_weight": pixel_weight,
                "step_rule": step_rule,
                "metric": metric,
                "reach": reach,
                "joint_batch": joint_batch,
            },
            self._conditions(labels, batch_size, class_guidance_scale),
        )
        prior_timesteps = self._prior_timesteps(chain.guidance, latents, num_prior_guidance_steps)
        self._warn_of_remainder(chain)

        # 2. Prepare latents, denoise.
        with self._sampling(chain, self.prior) as finite:
            latents = self._prepare_latents(batch_size, chain, finite, generator, latents, prior_timesteps)
            latents = self._denoise(latents, chain, finite, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 3. Return images.
        images = postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _chosen_labels(
        self,
        class_labels: ClassLabels | None,
        batch_size: int,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor | None:
        """As for any chain, but None where the class is not known: for images of a prior that makes images of any class
        or that draws classes itself, for a denoiser without them, and for images of given latents."""
        if class_labels is not None:
            takes = self.takes_labels or latents is not None
            requirement = f"be none for a {type(self.prior).__name__} that makes images of any class"
            require(takes or self.classes is None, "class_labels", requirement, class_labels)
        elif not self.draws_labels or (latents is not None and self.prior.nfe > 0):
            return None
        return super()._chosen_labels(class_labels, batch_size, generator)

    def _prepare_latents(
        self,
        batch_size: int,
        chain: Chain,
        finite: FiniteValues,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        prior_timesteps: Sequence[int],
    ) -> Tensor:
        """x_T', given or drawn from the prior, on the device and in the dtype of the denoiser."""
        device, dtype, name = self._execution_device, self.unet.dtype, "the `latents` tensor"
        if latents is None:
            name = "the prior's noisy image"
            alpha, sigma = alpha_sigma(chain.scheduler, self.truncation_timestep - 1)
            labels = self.class_labels if self.prior.num_classes is not None else None
            images = self.prior.draw(batch_size, generator=generator, device=device, class_labels=labels)
            self._nfe += self.prior.nfe
            finite.watch("the prior's output", images)
            if chain.guidance and prior_timesteps:
                images = images.clamp(-1, 1)
                for timestep in prior_timesteps:
                    images = chain.guidance.correct(images, timestep, self._guiding_labels(chain.guidance))
            latents = self.prior.diffuse(images, alpha, sigma, generator=generator)
        latents = latents.to(device=device, dtype=dtype)
        finite.watch(name, latents)
        return latents

    def _prior_timesteps(
        self, guidance: OTGuidance | None, latents: Tensor | None, num_prior_guidance_steps: int | None
    ) -> list[int]:
        """Timesteps T' + n − 1 … T' for the corrections of the prior's images, at which a field can record them."""
        first, clean = self.truncation_timestep, latents is None and self.prior.prediction_type == "sample"
        if guidance is None or (num_prior_guidance_steps is None and not clean):
            count = 0
        elif num_prior_guidance_steps is not None:
            count = num_prior_guidance_steps
        elif guidance.guidance_field is not None:
            count = sum(timestep >= first for timestep in guidance.guidance_field.config.timesteps)
        else:
            count = PRIOR_GUIDANCE_STEPS
        require_integer("num_prior_guidance_steps", count, at_least=0)
        requirement = "be 0 where the prior does not generate clean images"
        require(clean or count == 0, "num_prior_guidance_steps", requirement, count)
        return list(reversed(range(first, first + count)))

    def _check_components(self) -> None:
        prior, unet = self.prior, self.unet
        made_for = prior.config.truncation_timestep
        matched = made_for == self.truncation_timestep
        require(matched, "prior", f"be made for the scheduler's {self.truncation_timestep} steps", made_for)
        channels, *size = prior.image_shape
        require(channels == unet.config.in_channels, "prior", f"make {unet.config.in_channels} channels", channels)
        unet_size = unet.config.sample_size
        expected = [unet_size, unet_size] if isinstance(unet_size, int) else list(unet_size or size)
        require(size == expected, "prior", f"make images of size {expected} like the unet", size)
        name, requirement = type(self.scheduler).__name__, "be variance-preserving (DDIM, DDPM, DPM-Solver++, UniPC)"
        require(preserves_variance(self.scheduler), "scheduler", requirement, name)
        check_networks(unet, self.scheduler, prior.image_shape, may_have_classes=True)
        count, classes = prior.num_classes, self.classes
        agree = count is None or classes is None or count == len(classes)
        require(agree, "prior", f"have the {len(classes or ())} classes of the unet", count)

    def _warn_of_remainder(self, chain: Chain) -> None:
        steps, last = len(chain.timesteps), self.truncation_timestep
        if isinstance(chain.scheduler, DDIMScheduler) and last % steps:
            logger.warning(f"{steps} steps do not divide {last}: DDIMScheduler rounds its step, so noise remains.")
