"""What both pipelines share of OT guidance: its parts, its arguments, the corrected step, and recording its field."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..errors import require
from ..guidance import RECORDED, OTGuidance, check_same_data
from ..models.feature_extractor import FeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.reference_bank import ReferenceBank
from ..schedules import alpha_sigma, from_original_sample, to_original_sample
from .portable import PortablePipeline

logger = logging.get_logger(__name__)

# Share of the chain that stays unguided at its end by default, so that the model itself cleans up what is left there:
# where guidance does not see the pixels, or in thumbnails whose pixels are more than so many of the image's on a side.
CLEAN_SHARE, FINE_BLOCK = 0.08, 2
# Below this joint batch the transport problem says little about the distribution.
SMALL_BATCH = 16


class GuidedPipeline(PortablePipeline):
    """A pipeline whose x̂0 can be corrected; see `OTGuidance`."""

    _optional_components = ["feature_extractor", "reference_bank", "guidance_field"]
    _exclude_from_cpu_offload = ["feature_extractor", "reference_bank", "guidance_field"]

    def _register_guidance(
        self,
        feature_extractor: FeatureExtractor | None,
        reference_bank: ReferenceBank | None,
        guidance_field: GuidanceField | None,
    ) -> None:
        """Take in the three parts, each of them optional."""
        if feature_extractor is not None and reference_bank is not None:
            check_same_data(feature_extractor, reference_bank)
        self.register_modules(
            feature_extractor=feature_extractor, reference_bank=reference_bank, guidance_field=guidance_field
        )
        self._records = False
        self._guidance: OTGuidance | None = None
        self._guidance_scale = 0.0

    @property
    def guidance_scale(self) -> float:
        """Strength of the guidance in the last call; a callback may change `_guidance_scale` between steps."""
        return self._guidance_scale

    def record_guidance_field(
        self, num_samples: int = 1000, generator: torch.Generator | None = None, **call_arguments: Any
    ) -> GuidanceField:
        """Guide a joint batch and keep the field that moved it, as this pipeline's `guidance_field`.

        Args:
            num_samples: images of the batch; the field is as good as the batch is large.
            generator: of its noise, another one than that of the samples to come.
            call_arguments: those of the call; later calls have to make the same chain.

        Returns:
            The field; it is saved with the pipeline.

        Raises:
            InputError: see the call; a batch too small to show the distribution.

        Example:
            >>> from diffusers import DDIMScheduler, UNet2DModel
            >>> from ot_diffusers import ConvFeatureExtractor, OTGuidedDDIMPipeline, ReferenceBank
            >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
            >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(32,), **blocks)
            >>> network = ConvFeatureExtractor(sample_size=8, feature_dim=32)
            >>> bank = ReferenceBank.from_features(network.extract(torch.rand(64, 1, 8, 8) * 2 - 1))
            >>> pipe = OTGuidedDDIMPipeline(unet, DDIMScheduler(), network, bank)
            >>> pipe.set_progress_bar_config(disable=True)
            >>> field = pipe.record_guidance_field(32, num_inference_steps=4)
            >>> field.config.timesteps
            (750, 500, 250)
            >>> len(pipe(batch_size=1, num_inference_steps=4).images)  # guided alone
            1
        """
        require(num_samples >= SMALL_BATCH, "num_samples", f"be at least {SMALL_BATCH}", num_samples)
        arguments = call_arguments | {"output_type": "latent", "joint_batch": True}
        self._records = True
        try:
            self(batch_size=num_samples, generator=generator, **arguments)
            guided = self._guidance is not None and len(self._guidance.history or ()) > 0
            require(guided, "guidance_scale", "guide at least one step", self._guidance_scale)
            assert self._guidance is not None
            field = self._guidance.recorded_field()
        finally:
            self._records, self._guidance = False, None
        self.register_modules(guidance_field=field.to(self._execution_device))
        return field

    def _prepare_guidance(
        self, batch_size: int, *, guidance_scale: float | None, joint_batch: bool | None, **asked: Any
    ) -> OTGuidance | None:
        """The correction that the arguments of a call ask for, None for plain sampling.

        Raises:
            InputError: guidance without the parts, or another one than that of the field.
        """
        follows_field = self.guidance_field is not None and not joint_batch
        require(follows_field or joint_batch is not False, "joint_batch", "be true without a guidance field", False)
        complete = self.feature_extractor is not None and self.reference_bank is not None
        default = self.guidance_field.config.guidance_scale if follows_field else 1.0
        scale = guidance_scale if guidance_scale is not None else default if complete else 0.0
        require(scale >= 0, "guidance_scale", "be at least 0", scale)
        self._guidance_scale = scale
        if scale == 0:
            return None
        require(
            complete, "guidance_scale", "be 0 for a pipeline without `feature_extractor` and `reference_bank`", scale
        )
        names = ("num_correction_steps", *RECORDED)
        recorded = {name: self.guidance_field.config[name] for name in names} if follows_field else {}
        guidance = OTGuidance(
            self.feature_extractor,
            self.reference_bank,
            guidance_scale=scale,
            guidance_field=self.guidance_field if follows_field else None,
            history=[] if self._records else None,
            **recorded | _given(asked),
        )
        self._guidance = guidance if self._records else None
        if not follows_field and batch_size < SMALL_BATCH:
            logger.warning(
                f"OT guidance couples the batch; `batch_size` {batch_size} is too small to show it the distribution."
            )
        return guidance

    def _guided_output(
        self,
        guidance: OTGuidance,
        scheduler: Any,
        model_output: Tensor,
        latents: Tensor,
        timestep: int,
        step: int,
    ) -> Tensor:
        """The model output that stands for the corrected x̂0, in the scheduler's prediction type."""
        prediction_type = scheduler.config.prediction_type
        alpha, sigma = alpha_sigma(scheduler, timestep, step_index=step)
        sample = latents.float()
        pred_original_sample = to_original_sample(model_output.float(), sample, alpha, sigma, prediction_type).clamp(
            -1, 1
        )
        guidance.guidance_scale = self._guidance_scale
        corrected = guidance.correct(pred_original_sample, timestep)
        return from_original_sample(corrected, sample, alpha, sigma, prediction_type).to(model_output.dtype)


def guided_steps(
    guidance: OTGuidance | None,
    image_size: tuple[int, int],
    num_inference_steps: int,
    num_guidance_steps: int | None,
    guidance_start_step: int,
) -> range:
    """The steps of a chain that are guided: by default all, but for its end where guidance does not see the pixels, or
    coarsely in images of this height and width.

    Raises:
        InputError: a negative number.
    """
    require(guidance_start_step >= 0, "guidance_start_step", "be at least 0", guidance_start_step)
    if num_guidance_steps is None:
        clean = 0 if _sees_all(guidance, image_size) else max(1, round(CLEAN_SHARE * num_inference_steps))
        num_guidance_steps = max(0, num_inference_steps - clean - guidance_start_step)
    require(num_guidance_steps >= 0, "num_guidance_steps", "be at least 0", num_guidance_steps)
    return range(guidance_start_step, guidance_start_step + num_guidance_steps) if guidance else range(0)


def _sees_all(guidance: OTGuidance | None, image_size: tuple[int, int]) -> bool:
    """Whether guidance may go on to the last step; a field does to the last that it was recorded at."""
    if guidance is None or guidance.guidance_field is not None:
        return True
    fine = all(size <= FINE_BLOCK * small for size, small in zip(image_size, guidance.thumbnail_size, strict=True))
    return fine and guidance.pixel_weight > 0


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a call has set."""
    return {name: value for name, value in arguments.items() if value is not None}
