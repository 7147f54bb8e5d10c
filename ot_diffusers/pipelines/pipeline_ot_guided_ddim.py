"""DDIM sampling in which x̂0 is corrected towards the reference distribution during an interval of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from ..models.feature_extractor import FeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.reference_bank import ReferenceBank
from .call import Generators, check_call, check_networks, postprocess, unet_image_shape
from .guided import Callback, GuidedPipeline
from .portable import register

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
    """Unconditional image generation with optimal-transport guidance.

    At a guided step the scheduler's own x̂0 is formed from the model output, corrected (`OTGuidance`), and turned back
    into a model output, so that any scheduler and any prediction type takes its usual step from there: x_t
    stays, and the noise it is taken to hold changes (as with DDIM's `use_clipped_model_output`). Without guidance
    (scale 0, or no feature network) the images are those of diffusers' `DDIMPipeline`, bit for bit, wherever that makes
    a proper chain: for 62 of the 1,000 step counts, such as 61, its trailing spacing ends in a surplus timestep −1 and
    in noise; see `ot_diffusers.schedules.set_timesteps`. The networks are sampled in evaluation mode.

    Args:
        unet: `UNet2DModel`.
        scheduler: DDIM, DDPM, DPM-Solver++, UniPC or another variance-preserving scheduler. It is not converted to
            DDIM; as with diffusers' pipelines, `scheduler.timesteps` are those of the last call.
        feature_extractor: frozen feature network, optional.
        reference_bank: features of real images by that network, optional.
        guidance_field: the field that `record_guidance_field` makes, optional. With it images are guided one by one:
            the same image in any batch, down to a batch of one.

    Reference: DDIM [Song2021]; the guidance is described in `ot_diffusers.guidance`.

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

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        feature_extractor: FeatureExtractor | None = None,
        reference_bank: ReferenceBank | None = None,
        guidance_field: GuidanceField | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._register_guidance(feature_extractor, reference_bank, guidance_field)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance_scale: float | None = None,
        num_guidance_steps: int | None = None,
        guidance_start_step: int = 0,
        num_correction_steps: int | None = None,
        blur: float | None = None,
        normalize_features: bool | None = None,
        pixel_weight: float | None = None,
        step_rule: str | None = None,
        joint_batch: bool | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: number of images. Without a guidance field they are guided as one joint batch, so that more is
                better.
            generator: one generator, or a sequence with one per image.
            eta: DDIM's η in [0, 1]; ignored by schedulers that have none.
            num_inference_steps: denoising steps, 1 … `num_train_timesteps`. A solver of several calls per step has
                more timesteps than that (PNDM: 19 for 10 steps); guidance counts those.
            use_clipped_model_output: passed on to `DDIMScheduler.step`.
            output_type: `"pil"`, `"np"` ([B, H, W, C] in [0, 1]), `"pt"` ([B, C, H, W] in [0, 1]), or `"latent"` for
                what the last step left.
            return_dict: `False` returns a tuple.
            guidance_scale: strength of the guidance, see `step_rule`. 0 is plain sampling; the default is 1 where the
                pipeline has the parts for it, else 0.
            num_guidance_steps: how many steps are guided; the default is all from `guidance_start_step`, but for the
                last 8% where guidance does not see what it leaves in the pixels: with `pixel_weight` 0, or where a
                pixel of the thumbnails is more than 2 of the image's on a side. A guidance field guides those of them
                that it was recorded at. The first step of an ε prediction with zero terminal SNR is never guided:
                it says nothing of x̂0.
            guidance_start_step: first guided step, counted from the start of the chain.
            num_correction_steps: correction steps per guided step; 3 by default.
            blur: blur of the Sinkhorn divergence, in units of the median distance; .3 by default.
            normalize_features: `False` takes raw features, as the original study does (`ORIGINAL_GUIDANCE`).
            pixel_weight: of thumbnails beside the features in the distance that is transported by; 0 for features
                alone. The default is 1 where the reference bank holds thumbnails and features are normalised.
            step_rule: `"displacement"` moves an image by `guidance_scale` / 2 of what the transport plan asks for in
                each correction step, `"adam"` every pixel by about `guidance_scale` · 0.02. The default is the first
                where pixels take part, else the second.
            joint_batch: guide the batch by its own transport problem (`True`) or each image by the guidance field
                (`False`), which is the default where there is one. The field brings its own guidance: arguments that
                ask for another are refused.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": …})` after each step; what it
                returns under `"latents"` replaces them. `pipe._interrupt = True` leaves out the steps to come.
            callback_on_step_end_tensor_inputs: `["latents"]`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            InputError: an argument out of range, guidance asked for without the parts, networks or a scheduler that
                do not fit, or a network's output that is not finite, with the step.
        """
        # 1. Check the inputs, prepare the chain.
        generator = check_call(batch_size, generator, eta, output_type, callback_on_step_end_tensor_inputs)
        shape = unet_image_shape(self.unet)
        check_networks(self.unet, self.scheduler, shape)
        chain = self._prepare_chain(
            self.scheduler,
            shape,
            batch_size,
            num_inference_steps,
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
                "joint_batch": joint_batch,
            },
        )
        chain.check_field()

        # 2. Prepare latents, denoise.
        device, dtype = self._execution_device, self.unet.dtype
        latents = randn_tensor((batch_size, *shape), generator=generator, device=device, dtype=dtype)
        with self._sampling(chain) as finite:
            latents = self._denoise(latents, chain, finite, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 3. Return images.
        images = postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
