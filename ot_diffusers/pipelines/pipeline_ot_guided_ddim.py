"""DDIM sampling in which x̂0 is corrected towards the distribution of real images during an interval of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
    VQModel,
)
from diffusers.utils import logging
from torch import Tensor

from ..models.feature_extractor import FeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.reference_bank import ReferenceBank
from .call import Generators, check_call, check_networks, initial_latents, postprocess, unet_image_shape
from .classes import ClassLabels, listed
from .guided import Callback, GuidedPipeline
from .latents import check_vae, decoded_shape
from .portable import register

logger = logging.get_logger(__name__)

DEFAULT_STEPS = 50
# The original study's guidance, as arguments of the call: the first 10 of 50 steps, 3 Adam steps of .01, raw features.
ORIGINAL_GUIDANCE: dict[str, Any] = {
    "num_inference_steps": 50,
    "guidance_scale": 0.5,
    "num_guidance_steps": 10,
    "num_correction_steps": 3,
    "blur": 0.2,
    "normalize_features": False,
    "pixel_weight": 0.0,
    "step_rule": "adam",
}


@register
class OTGuidedDDIMPipeline(GuidedPipeline):
    """Image generation with optimal-transport guidance, by class if the denoiser has classes.

    A guided step computes x̂0 from the model output, corrects it (`OTGuidance`) and turns it back into a model output,
    so that every scheduler takes its usual step: x_t stays, and its noise component changes (as with DDIM's
    `use_clipped_model_output`). Without guidance (scale 0, or no feature network) the images are those of
    diffusers' `DDIMPipeline`, bit for bit, except for 62 of the 1,000 step counts: for 61 steps, for example, trailing
    spacing in diffusers adds a timestep −1 and ends in noise; see `ot_diffusers.schedules.set_timesteps`. Networks are
    in evaluation mode during the call.

    Args:
        unet: `UNet2DModel`, unconditional or with `num_class_embeds`, or the `DiTTransformer2DModel` of a
            `DiTPipeline`.
        scheduler: DDIM, DPM-Solver++, UniPC, Euler, Heun, EDM or flow matching (see `FlowMatchPipeline`), of any
            prediction type. It is not converted to DDIM; as in diffusers' pipelines, `scheduler.timesteps` are those
            of the last call.
        feature_extractor: frozen feature network, optional.
        reference_bank: features of real images (the reference set) by that network, optional.
        guidance_field: the field that `record_guidance_field` returns, optional. With it each image is guided by itself
            and does not depend on its batch.
        id2label: name of each of C classes by its label, for a denoiser with classes; its `num_class_embeds` is C, or
            C + 1 with a null label behind those of the classes.
        class_frequencies: share of each class in the training data, by its label; equal by default.
        vae: `AutoencoderKL` or `VQModel` that decodes the latents of a denoiser of latents, optional. Without guidance
            the images are then those of diffusers' `LDMPipeline` or `DiTPipeline`. Guidance compares decoded images.

    Reference: DDIM [Song2021]; guidance by class [Ho2022]; the guidance is described in `ot_diffusers.guidance`.

    Example:
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from ot_diffusers import OTGuidedDDIMPipeline
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(32,), **blocks)
        >>> pipe = OTGuidedDDIMPipeline(unet, DDIMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape
        (2, 8, 8, 1)
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = [*GuidedPipeline._optional_components, "vae"]

    def __init__(
        self,
        unet: UNet2DModel | DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        feature_extractor: FeatureExtractor | None = None,
        reference_bank: ReferenceBank | None = None,
        guidance_field: GuidanceField | None = None,
        id2label: dict[Any, str] | None = None,
        class_frequencies: dict[Any, float] | None = None,
        vae: AutoencoderKL | VQModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        if vae is not None:
            check_vae(vae, unet_image_shape(unet))
        self._register_guidance(feature_extractor, reference_bank, guidance_field)
        self._register_classes(id2label, class_frequencies)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the images."""
        shape = unet_image_shape(self.unet)
        return shape if self.vae is None else decoded_shape(self.vae, shape)

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
            batch_size: number of images; by default as many as `class_labels`, or 1. Without a guidance field they are
                guided as one joint batch, and a larger batch is guided better.
            generator: one generator, or a sequence of one per image.
            eta: DDIM's η in [0, 1]; ignored by schedulers that have none.
            num_inference_steps: denoising steps, 1 … `num_train_timesteps`; by default the number that the denoiser was
                tuned for (`train_few_step.py`), else 50. A solver with several calls per step has more timesteps (PNDM
                and Heun: 19 for 10 steps); guidance counts timesteps.
            use_clipped_model_output: passed on to `DDIMScheduler.step`.
            output_type: `"pil"`, `"np"` ([B, H, W, C] in [0, 1]), `"pt"` ([B, C, H, W] in [0, 1]), or `"latent"` for
                the result of the last step, which is not decoded.
            return_dict: `False` returns a tuple.
            latents: starting noise of unit variance, [B, C, H, W] of the denoiser; by default it is drawn from
                `generator`.
            class_labels: class of all images, or of each: labels 0 … C − 1, their names, or an integer tensor [B]. By
                default a denoiser with classes gets labels that are drawn by the frequencies of the classes; the
                attribute `class_labels` of the pipeline tells them.
            class_guidance_scale: w of classifier-free guidance, v = v_∅ + w (v_y − v_∅), for a denoiser with a null
                label. 1 is without it; other values double the batch of the denoiser.
            guidance_scale: strength of the OT guidance, see `step_rule`. 0 is plain sampling; the default is
                `default_guidance_scale` if the pipeline has the parts that guidance needs, else 0.
            num_guidance_steps: number of guided steps. The default is all from `guidance_start_step`, without the last
                8% of the chain where guidance cannot see pixel artefacts: with `pixel_weight` 0, or where one thumbnail
                pixel covers more than 2×2 image pixels; a single step is guided in any case. A guidance field guides
                only steps near those that it was recorded at.
                The first step of an ε prediction with zero terminal SNR is never guided: its output does not
                determine x̂0.
            guidance_start_step: first guided step, counted from 0 at the start of the chain.
            num_correction_steps: correction steps per guided step; by default 3, or 6 towards weighted references.
            blur: blur of the Sinkhorn divergence, in units of the median distance; see `OTGuidance`.
            normalize_features: `False` takes raw features, as the original study does (`ORIGINAL_GUIDANCE`).
            pixel_weight: weight of thumbnails beside the features in the transport cost; 0 for features alone. The
                default is 1 where the reference bank holds thumbnails and features are normalised.
            step_rule: in each correction step, `"displacement"` moves an image by `guidance_scale` / 2 of the
                displacement in the transport plan, and `"adam"` moves every pixel by about `guidance_scale` · 0.02. The
                default is `"displacement"` where `pixel_weight` is above 0, else `"adam"`.
            metric: `"sinkhorn"`, the default, or `"mmd"`, a kernel discrepancy for comparison (MMD guidance).
            reach: length in the units of `blur` beyond which references have little effect, so that outliers among them
                are ignored; off by default.
            joint_batch: guide the batch by its own transport problem (`True`), or each image by the guidance field
                (`False`); the default is `False` where there is a field. Arguments of guidance that contradict those
                of the field are refused.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": …})` after each step; the tensor
                that it returns under `"latents"` replaces them. `pipe._interrupt = True` skips the remaining steps.
            callback_on_step_end_tensor_inputs: `["latents"]`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            InputError: an argument out of range, guidance without its parts, networks or a scheduler that do not fit,
                or a network output that is not finite; the message names the step.
        """
        # 1. Check the inputs, prepare the chain.
        batch_size = len(listed(class_labels) or (1,)) if batch_size is None else batch_size
        generator = check_call(batch_size, generator, eta, output_type, callback_on_step_end_tensor_inputs)
        shape = unet_image_shape(self.unet)
        check_networks(self.unet, self.scheduler, shape, may_have_classes=True)
        labels = self._chosen_labels(class_labels, batch_size, generator)
        chain = self._prepare_chain(
            self.scheduler,
            self.image_shape,
            batch_size,
            self._chosen_steps(num_inference_steps),
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

        # 2. Prepare latents, denoise.
        like = torch.empty(0, device=self._execution_device, dtype=self.unet.dtype)
        latents = initial_latents(latents, (batch_size, *shape), self.scheduler, generator, like)
        with self._sampling(chain) as finite:
            latents = self._denoise(latents, chain, finite, callback_on_step_end, callback_on_step_end_tensor_inputs)
            if output_type != "latent":
                latents = self._decoded(latents)
                finite.watch("the decoded image", latents)

        # 3. Return images.
        images = postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _chosen_steps(self, num_inference_steps: int | None) -> int:
        """The steps of a call; a warning where they are more than those that the denoiser was tuned for."""
        tuned = self.scheduler.config.get("_num_inference_steps")
        if num_inference_steps is None:
            return tuned or DEFAULT_STEPS
        if tuned is not None and isinstance(num_inference_steps, int) and num_inference_steps > tuned:
            logger.warning(
                f"this denoiser is tuned for `num_inference_steps={tuned}`; with {num_inference_steps}, images come "
                "nearer to those of the training set than real images do"
            )
        return num_inference_steps
