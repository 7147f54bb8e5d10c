"""Generation by the last T' reverse steps only, from the noisy images that a one-call prior makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from torch import Tensor, nn

from ..errors import require
from ..guidance import OTGuidance
from ..models.feature_extractor import FeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.prior import GaussianPrior, PriorGenerator
from ..models.reference_bank import ReferenceBank
from ..schedules import alpha_sigma
from .call import OUTPUT_TYPES, extra_step_arguments, finish_images
from .guided import GuidedPipeline, guided_steps
from .portable import register

logger = logging.get_logger(__name__)

# Corrections of the prior's own images in a guided call that does not say otherwise.
PRIOR_GUIDANCE_STEPS = 5


@register
class TruncatedPriorPipeline(GuidedPipeline):
    """Truncated diffusion: the prior makes x_T', the denoiser walks the T' steps from there to x_0.

    With the prior N(0, I) and T' = T it is diffusers' own pipeline, bit for bit. Components are left as they were:
    mode, dtype, gradients and the state of the scheduler.

    With a feature network and its reference bank the chain is guided as `OTGuidedDDIMPipeline` guides it, and the
    prior's own clean images are corrected before they are diffused.

    Args:
        prior: `PriorGenerator`, `GaussianPrior`, or another `PriorMixin`.
        unet: an unconditional `UNet2DModel`, trained on all steps or on those below T' only.
        scheduler: `truncated_scheduler(full_scheduler, T')`.
        feature_extractor: frozen feature network, optional.
        reference_bank: features of real images by that network, optional.
        guidance_field: the field that `record_guidance_field` makes, optional.

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
    unet: Any
    scheduler: Any

    model_cpu_offload_seq = "prior->unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        prior: PriorGenerator | GaussianPrior,
        unet: UNet2DModel,
        scheduler: Any,
        feature_extractor: FeatureExtractor | None = None,
        reference_bank: ReferenceBank | None = None,
        guidance_field: GuidanceField | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(prior=prior, unet=unet, scheduler=scheduler)
        self._register_guidance(feature_extractor, reference_bank, guidance_field)
        self._nfe = 0
        self._num_timesteps = 0
        self._check_components()

    @property
    def truncation_timestep(self) -> int:
        """T', the length of the chain."""
        return self.scheduler.config.num_train_timesteps

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the last call."""
        return self._num_timesteps

    @property
    def nfe(self) -> int:
        """Evaluations per image in the last call: denoiser calls plus prior calls, not those of the feature network.

        0 before the first call.
        """
        return self._nfe

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        guidance_scale: float | None = None,
        num_guidance_steps: int | None = None,
        guidance_start_step: int = 0,
        num_prior_guidance_steps: int | None = None,
        num_correction_steps: int | None = None,
        blur: float | None = None,
        normalize_features: bool | None = None,
        pixel_weight: float | None = None,
        step_rule: str | None = None,
        joint_batch: bool | None = None,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: number of images.
            num_inference_steps: reverse steps, 1 … T'; T' by default. Prefer a divisor of T'.
            generator: one generator, or one for each image: then an image is the same in any batch.
            eta: η of DDIM in [0, 1]; other schedulers ignore it.
            latents: x_T' to start from in place of the prior's, [B, C, H, W]. Real x_T' make it the oracle.
            guidance_scale, num_guidance_steps, guidance_start_step: as in `OTGuidedDDIMPipeline`.
            num_correction_steps, blur, normalize_features, pixel_weight, step_rule, joint_batch: likewise.
            num_prior_guidance_steps: corrections of the prior's own images before they are diffused, each as in a
                guided step; 5 by default where there is guidance and a prior of clean images.
            use_clipped_model_output: passed on to `DDIMScheduler.step`.
            output_type: `"pil"`, `"np"` (floats in [0, 1], [B, H, W, C]), `"pt"` (tensor in [0, 1],
                [B, C, H, W]) or `"latent"` (x_0 as the chain leaves it).
            return_dict: return an `ImagePipelineOutput`, or a tuple of the images alone.
            callback_on_step_end: called as `(pipe, step, timestep, {"latents": x})` after each step; what it returns
                under `"latents"` replaces x.
            callback_on_step_end_tensor_inputs: names of the tensors the callback receives.

        Raises:
            InputError: an argument out of range, or components made for different truncations or images.
        """
        num_inference_steps = self.truncation_timestep if num_inference_steps is None else num_inference_steps
        generator = list(generator) if isinstance(generator, Sequence) else generator
        self._check_components()
        self._check_inputs(
            batch_size, num_inference_steps, generator, eta, latents, output_type, callback_on_step_end_tensor_inputs
        )
        guidance = self._prepare_guidance(
            batch_size,
            guidance_scale=guidance_scale,
            joint_batch=joint_batch,
            num_correction_steps=num_correction_steps,
            blur=blur,
            normalize_features=normalize_features,
            pixel_weight=pixel_weight,
            step_rule=step_rule,
        )
        size = self.prior.image_shape[1:]
        guided = guided_steps(guidance, size, num_inference_steps, num_guidance_steps, guidance_start_step)
        prior_timesteps = self._prior_timesteps(guidance, latents, num_prior_guidance_steps)
        # A copy: sampling leaves marks on a scheduler.
        scheduler = copy.deepcopy(self.scheduler)
        _set_timesteps(scheduler, num_inference_steps)
        self._num_timesteps = len(scheduler.timesteps)
        timesteps = scheduler.timesteps.tolist()
        if guidance and guidance.guidance_field is not None:
            guidance.guidance_field.check_timesteps([*prior_timesteps, *timesteps])
        step_kwargs = extra_step_arguments(
            scheduler, eta=eta, use_clipped_model_output=use_clipped_model_output, generator=generator
        )

        self._nfe = 0
        with _evaluation_mode(self.prior, self.unet):
            latents = self._prepare_latents(batch_size, scheduler, generator, latents, guidance, prior_timesteps)
            for index, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
                # x_t → x_{t−1}
                model_output = self.unet(scheduler.scale_model_input(latents, timestep), timestep).sample
                if guidance and self._guidance_scale > 0 and index in guided:
                    model_output = self._guided_output(
                        guidance, scheduler, model_output, latents, timesteps[index], index
                    )
                latents = scheduler.step(model_output, timesteps[index], latents, **step_kwargs).prev_sample
                self._nfe += 1
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, index, timestep, tensors) or {}).get("latents", latents)

        images = finish_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _prepare_latents(
        self,
        batch_size: int,
        scheduler: Any,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        guidance: OTGuidance | None,
        prior_timesteps: Sequence[int],
    ) -> Tensor:
        """x_T', given or drawn from the prior, on the device and in the dtype of the denoiser."""
        device = self._execution_device
        if latents is None:
            alpha, sigma = alpha_sigma(scheduler, self.truncation_timestep - 1)
            images = self.prior.draw(batch_size, generator=generator, device=device)
            if guidance and prior_timesteps:
                images = images.clamp(-1, 1)
                for timestep in prior_timesteps:
                    images = guidance.correct(images, timestep)
            latents = self.prior.diffuse(images, alpha, sigma, generator=generator)
            self._nfe += self.prior.nfe
        return latents.to(device=device, dtype=self.unet.dtype)

    def _prior_timesteps(
        self, guidance: OTGuidance | None, latents: Tensor | None, num_prior_guidance_steps: int | None
    ) -> list[int]:
        """The corrections of the prior's images as steps before the chain, T' + n − 1 … T': so a field knows them."""
        first, clean = self.truncation_timestep, latents is None and self.prior.prediction_type == "sample"
        if guidance is None or (num_prior_guidance_steps is None and not clean):
            count = 0
        elif num_prior_guidance_steps is not None:
            count = num_prior_guidance_steps
        elif guidance.guidance_field is not None:
            count = sum(timestep >= first for timestep in guidance.guidance_field.config.timesteps)
        else:
            count = PRIOR_GUIDANCE_STEPS
        require(count >= 0, "num_prior_guidance_steps", "be at least 0", count)
        wanted = "be 0 where the prior makes no clean images"
        require(clean or count == 0, "num_prior_guidance_steps", wanted, count)
        return list(reversed(range(first, first + count)))

    def _check_components(self) -> None:
        prior, unet, scheduler = self.prior, self.unet, self.scheduler
        # Solvers in the variance-exploding scaling (Euler, Heun) start from x/α.
        preserving = hasattr(scheduler, "alphas_cumprod") and float(scheduler.init_noise_sigma) == 1.0
        name = type(scheduler).__name__
        require(preserving, "scheduler", "be variance-preserving (DDIM, DDPM, DPM-Solver++, UniPC)", name)
        made_for = prior.config.truncation_timestep
        matched = made_for == self.truncation_timestep
        require(matched, "prior", f"be made for the scheduler's {self.truncation_timestep} steps", made_for)
        channels, *size = prior.image_shape
        require(channels == unet.config.in_channels, "prior", f"make {unet.config.in_channels} channels", channels)
        unet_size = unet.config.sample_size
        expected = [unet_size, unet_size] if isinstance(unet_size, int) else list(unet_size or size)
        require(size == expected, "prior", f"make images of size {expected} like the unet", size)

    def _check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float,
        latents: Tensor | None,
        output_type: str,
        callback_tensor_inputs: Sequence[str],
    ) -> None:
        require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
        last = self.truncation_timestep
        require(1 <= num_inference_steps <= last, "num_inference_steps", f"be from 1 to {last}", num_inference_steps)
        if isinstance(generator, list):
            matched = len(generator) == batch_size
            require(matched, "generator", f"be one, or one for each of {batch_size} images", len(generator))
        require(0 <= eta <= 1, "eta", "be in [0, 1]", eta)
        if latents is not None:
            shape = (batch_size, *self.prior.image_shape)
            require(tuple(latents.shape) == shape, "latents", f"have shape {shape}", tuple(latents.shape))
        require(output_type in OUTPUT_TYPES, "output_type", f"be one of {', '.join(OUTPUT_TYPES)}", output_type)
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        require(not unknown, "callback_on_step_end_tensor_inputs", f"be among {self._callback_tensor_inputs}", unknown)
        if isinstance(self.scheduler, DDIMScheduler) and last % num_inference_steps:
            logger.warning(
                f"{num_inference_steps} steps do not divide {last}: DDIMScheduler rounds its step, so noise remains."
            )


def _set_timesteps(scheduler: Any, num_inference_steps: int) -> None:
    """`set_timesteps` without the surplus timestep −1 that rounding adds in some trailing spacings (13 of 15 steps)."""
    scheduler.set_timesteps(num_inference_steps)
    surplus = len(scheduler.timesteps) > num_inference_steps and int(scheduler.timesteps[-1]) < 0
    if surplus:
        scheduler.timesteps = scheduler.timesteps[:num_inference_steps]
        scheduler.num_inference_steps = num_inference_steps
    if surplus and getattr(scheduler, "sigmas", None) is not None:
        scheduler.sigmas = torch.cat([scheduler.sigmas[:num_inference_steps], scheduler.sigmas[-1:]])


@contextmanager
def _evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, each in its own mode again after."""
    was_training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module in was_training:
            module.training = True
