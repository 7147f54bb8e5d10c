"""Sampling of flow-matching denoisers, plain or with optimal-transport guidance."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DiTTransformer2DModel, SchedulerMixin, UNet2DModel, VQModel

from ..errors import require
from ..models.feature_extractor import FeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.reference_bank import ReferenceBank
from ..schedules import matches_flow
from .pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from .portable import register


@register
class FlowMatchPipeline(OTGuidedDDIMPipeline):
    """Image generation by a flow-matching denoiser, by class if it has classes: from noise to images along v = ε − x0.

    Its call is that of `OTGuidedDDIMPipeline`, except that DDIM's `eta` and `use_clipped_model_output` have no effect.
    The n steps are equal, σ = 1, (n − 1)/n, …, 1/n, so that the last of few steps is not wasted (see
    `ot_diffusers.schedules.set_timesteps`). diffusers itself has no unconditional pipeline for flow matching.

    Args:
        unet: `UNet2DModel` or `DiTTransformer2DModel` that predicts ε − x0 (`prediction_type=flow_prediction` in
            training).
        scheduler: `FlowMatchEulerDiscreteScheduler`, `FlowMatchHeunDiscreteScheduler`, or a solver with
            `use_flow_sigmas=True` and `prediction_type="flow_prediction"` (UniPC, DPM-Solver++).
        feature_extractor, reference_bank, guidance_field: the parts of guidance, optional, as in
            `OTGuidedDDIMPipeline`.
        id2label, class_frequencies: names and frequencies of the classes, likewise.
        vae: decoder of latents, likewise.

    Raises:
        InputError: another scheduler.

    Reference: flow matching [Lipman2023].

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from ot_diffusers import FlowMatchPipeline
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(32,), **blocks)
        >>> pipe = FlowMatchPipeline(unet, FlowMatchEulerDiscreteScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=2, num_inference_steps=4, output_type="np").images.shape
        (2, 8, 8, 1)
        >>> pipe.scheduler.timesteps.tolist()
        [1000.0, 750.0, 500.0, 250.0]
    """

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
        name = type(scheduler).__name__
        require(matches_flow(scheduler), "scheduler", "be a flow-matching one (FlowMatchEulerDiscreteScheduler)", name)
        parts = feature_extractor, reference_bank, guidance_field
        super().__init__(unet, scheduler, *parts, id2label, class_frequencies, vae)
