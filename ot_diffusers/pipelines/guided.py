"""What both pipelines share: the denoising loop, and the components, arguments and field of OT guidance."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..errors import InputError, require, require_integer, require_number
from ..guidance import CORRECTIONS, RECORDED, SCALE_OF_SHARES, OTGuidance, check_same_data, check_takes
from ..models.feature_extractor import FeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.reference_bank import ReferenceBank
from ..schedules import (
    Scheduler,
    check_deterministic,
    prediction_coefficients,
    reversible_steps,
    set_timesteps,
)
from .call import CALLBACK_TENSORS, FiniteValues, Generators, evaluation_mode, extra_step_arguments, learns_variance
from .classes import CLASS_OPTIONS, Classes, ClassLabels, Conditions, by_label, is_dit, label_count
from .latents import decode, decode_batch_size, decoded_shape, latent_bound
from .portable import PortablePipeline

if TYPE_CHECKING:
    from typing import Self

logger = logging.get_logger(__name__)

Callback = Callable[..., dict[str, Any] | None]

# Fraction of final steps left unguided when there are no thumbnails, or when one thumbnail pixel covers more than 2×2
# image pixels: the model itself removes the artefacts that guidance cannot see.
CLEAN_SHARE, FINE_BLOCK = 0.08, 2
# A joint batch smaller than this says little about the distribution.
SMALL_BATCH = 16


@dataclass(frozen=True)
class Chain:
    """The chain of one call: the scheduler with its timesteps, and the steps at which x̂0 is corrected.

    Attributes:
        scheduler: the scheduler after `set_timesteps`.
        timesteps: time that each call of the denoiser is given.
        step_arguments: optional arguments of `scheduler.step`.
        guidance: the correction; None for plain sampling.
        guided: indices of the guided steps.
        conditions: classes of the images; None for a denoiser without classes.
    """

    scheduler: Scheduler
    timesteps: Sequence[float]
    step_arguments: dict[str, Any]
    guidance: OTGuidance | None
    guided: set[int]
    conditions: Conditions | None


class GuidedPipeline(PortablePipeline):
    """A pipeline that can correct x̂0 by OT guidance; see `OTGuidance`."""

    unet: Any
    vae: Any = None

    _guidance_components = ["feature_extractor", "reference_bank", "guidance_field"]
    _optional_components = _guidance_components
    _exclude_from_cpu_offload = _guidance_components
    _callback_tensor_inputs = list(CALLBACK_TENSORS)

    def _register_guidance(
        self,
        feature_extractor: FeatureExtractor | None,
        reference_bank: ReferenceBank | None,
        guidance_field: GuidanceField | None,
    ) -> None:
        """Register the three parts of guidance, each of them optional."""
        self.register_modules(
            feature_extractor=feature_extractor, reference_bank=reference_bank, guidance_field=guidance_field
        )
        if self._is_guided():
            check_same_data(self.feature_extractor, self.reference_bank)
        self._records = False
        self._guidance: OTGuidance | None = None
        self._guidance_scale = 0.0
        self._interrupt = False
        self._num_timesteps = 0
        self._nfe = 0
        self._class_labels: Tensor | None = None

    def _register_classes(self, id2label: dict[Any, str] | None, class_frequencies: dict[Any, float] | None) -> None:
        """Keep names and frequencies of the classes in the configuration, if the denoiser has classes.

        Raises:
            InputError: they do not belong to the classes of the parts.
        """
        given: dict[str, Any] = {}
        for name, entries, kind in zip(CLASS_OPTIONS, (id2label, class_frequencies), (str, float), strict=True):
            if entries is not None:
                given[name] = by_label(name, entries, kind)
        self.register_to_config(**given)
        require(self.classes is not None or not given, "id2label", "be none for a model without classes", given)

    @property
    def classes(self) -> Classes | None:
        """The classes that images can be asked for; None without classes."""
        size = label_count(self.unet)
        entries = map(self.config.get, CLASS_OPTIONS)
        return None if size is None else Classes.of(size, *entries, has_null_label=is_dit(self.unet))

    @property
    def takes_labels(self) -> bool:
        """Whether images can be asked for by their class."""
        return self.classes is not None

    @property
    def draws_labels(self) -> bool:
        """Whether a call without labels draws them by the frequencies of the classes."""
        return self.classes is not None

    @property
    def labels(self) -> dict[str, int]:
        """Name of each class to its label, as in diffusers' `DiTPipeline`; empty without classes."""
        return {} if self.classes is None else {name: label for label, name in enumerate(self.classes.names)}

    @property
    def class_labels(self) -> Tensor | None:
        """Labels of the images of the last call, int64 [B]; None without classes, or where they are not known."""
        return self._class_labels

    @property
    def guidance_scale(self) -> float:
        """Strength of the guidance in the last call; a callback may change `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def default_guidance_scale(self) -> float:
        """Strength of the guidance by the reference set: 1, or 2 where it changes the shares of classes."""
        return SCALE_OF_SHARES if self._changes_shares else 1.0

    @property
    def _changes_shares(self) -> bool:
        """Whether the references have weights, which ask for other shares of classes, and the labels of the images do
        not have these shares already."""
        by_label = self.classes is not None and self.reference_bank.labels is not None
        return self.reference_bank.config.has_weights and not by_label

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which skips the remaining steps."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps in the last call's chain, one for each call of the denoiser."""
        return self._num_timesteps

    @property
    def nfe(self) -> int:
        """Number of function evaluations (NFE) per image in the last call: those of the denoiser and of the prior, but
        not those of the feature network. 0 before the first call."""
        return self._nfe

    def with_references(
        self,
        images: Any,
        *,
        network: FeatureExtractor | str | os.PathLike[str] | None = None,
        weights: Any = None,
        labels: Any = None,
        num_references: int = 2000,
        split: str = "train",
        **data_options: Any,
    ) -> Self:
        """A pipeline of the same networks that is guided towards these images, without training.

        Args:
            images: what samples should resemble: a folder, a name or Hub id of a data set, what `load_images` returns,
                a list of PIL images, or a tensor [N, C, H, W] in [-1, 1]. They are scaled and cropped to the size of
                the denoiser's images, in its colours.
            network: feature network, or a folder or Hub id of one or of a vision backbone; by default the features of
                the denoiser itself (`DenoiserFeatureExtractor`), which need neither labels nor a download.
            weights: what decides the proportions: a mass for each image, [N], at least 0; or shares of classes by name,
                such as `{"cat": 0.9}`, where the others keep their proportions in the rest. Equal by default. A
                denoiser with the classes of the images draws its labels in the same proportions.
            labels: classes of images that are not a data set, integers [N].
            num_references: at most this many of the images are used, evenly spaced over all of them.
            split: split of a data set that is named.
            data_options: further arguments of `load_images` for a data set that is named, such as `label_column`.

        Returns:
            A pipeline that shares the networks of this one, which stays as it is. A guidance field is not kept.

        Raises:
            InputError: images that cannot be read, are all alike or have no such class, or a network for other images.

        Example:
            >>> from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
            >>> from ot_diffusers import OTGuidedDDIMPipeline
            >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
            >>> stock = DDIMPipeline(UNet2DModel(8, 1, 1, block_out_channels=(32,), **blocks), DDIMScheduler())
            >>> pipe = OTGuidedDDIMPipeline.from_pipe(stock).with_references("digits", weights={"7": 0.5})
            >>> pipe.set_progress_bar_config(disable=True)
            >>> len(pipe(batch_size=16, num_inference_steps=2).images)
            16
        """
        references = import_module("ot_diffusers.references")  # its layer is above
        options = {"network": network, "weights": weights, "labels": labels, "num_references": num_references}
        return references.with_references(self, images, **options, split=split, **data_options)

    def record_guidance_field(
        self, num_samples: int = 1000, generator: torch.Generator | None = None, **call_arguments: Any
    ) -> GuidanceField:
        """Guide one joint batch, and keep its displacements as this pipeline's `guidance_field`.

        Args:
            num_samples: number of images in the batch; a larger batch gives a better field.
            generator: generator of the batch's noise; later samples should use another one.
            call_arguments: arguments of the call. Later calls may have other numbers of steps and another scheduler:
                each of their steps follows the nearest recorded time (`GuidanceField.index_of`). Record a long chain.

        Returns:
            The field; it is saved with the pipeline.

        Raises:
            InputError: as the call, or a batch that is too small.

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
            >>> len(pipe(batch_size=1, num_inference_steps=4).images)  # guided by itself
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

    def _is_guided(self) -> bool:
        """Whether the pipeline has the parts that guidance needs.

        Raises:
            InputError: it has only some of them.
        """
        names = self._guidance_components
        present = [name for name in names if getattr(self, name) is not None]
        missing = [name for name in ("feature_extractor", "reference_bank") if name not in present]
        whole = not present or not missing
        require(
            whole, missing[0] if missing else "", f"accompany {' and '.join(f'`{name}`' for name in present)}", None
        )
        return bool(present)

    def _prepare_guidance(
        self,
        image_shape: tuple[int, ...],
        batch_size: int,
        *,
        guidance_scale: float | None,
        joint_batch: bool | None,
        **asked: Any,
    ) -> OTGuidance | None:
        """The correction that the arguments of a call ask for; None for plain sampling.

        Raises:
            InputError: guidance without its parts, or other guidance than that of the field.
        """
        follows_field = self.guidance_field is not None and not joint_batch
        require(follows_field or joint_batch is not False, "joint_batch", "be true without a guidance field", False)
        if guidance_scale is not None:
            require_number("guidance_scale", guidance_scale, at_least=0)
        complete = guidance_scale != 0 and self._is_guided()
        if guidance_scale is None and complete:
            own = self.default_guidance_scale
            guidance_scale = self.guidance_field.config.guidance_scale if follows_field else own
        scale = self._guidance_scale = guidance_scale or 0.0
        if scale == 0:
            return None
        require(
            complete, "guidance_scale", "be 0 for a pipeline without `feature_extractor` and `reference_bank`", scale
        )
        check_takes(self.feature_extractor, image_shape, "feature_extractor")
        known = self.reference_bank.config.num_classes
        agree = known is None or self.classes is None or known == len(self.classes)
        require(agree, "reference_bank", f"have the {len(self.classes or ())} classes of the pipeline", known)
        defaults = {} if self._changes_shares else {"num_correction_steps": CORRECTIONS}
        if follows_field:
            defaults = {name: self.guidance_field.config[name] for name in ("num_correction_steps", *RECORDED)}
        guidance = OTGuidance(
            self.feature_extractor,
            self.reference_bank,
            guidance_scale=scale,
            guidance_field=self.guidance_field if follows_field else None,
            history=[] if self._records else None,
            decode=None if self.vae is None else partial(decode, self.vae, quantize=False),
            decode_batch_size=None if self.vae is None else decode_batch_size(self.vae, image_shape),
            **defaults | _given(asked),
        )
        self._guidance = guidance if self._records else None
        if not follows_field and not self._records:  # a small field is completed by references
            self._warn_of_few_images(guidance, batch_size)
        return guidance

    def _warn_of_few_images(self, guidance: OTGuidance, batch_size: int) -> None:
        """Warn of a joint batch, or of a class in it, that is too small to be compared with real images."""
        labels, size, compared, of_class = self._guiding_labels(guidance), batch_size, "the batch", ""
        if labels is not None and self.classes is not None:
            present, counts = labels.unique(return_counts=True)
            fewest = counts.argmin()
            name, size = self.classes.names[present[fewest]], int(counts[fewest])
            compared, of_class = "each class in the batch", f" of class {name!r}"
        if size < SMALL_BATCH:
            images = f"1 image{of_class} is" if size == 1 else f"{size} images{of_class} are"
            logger.warning(
                f"OT guidance compares {compared} with real images; {images} too few for that. Generate {SMALL_BATCH} "
                "or more at once, or record a field (`record_guidance_field`), which guides single images."
            )

    def _chosen_labels(self, class_labels: ClassLabels | None, batch_size: int, generator: Generators) -> Tensor | None:
        """The labels that a call asks for, or labels drawn by the frequencies of the classes; None without classes.

        Raises:
            InputError: labels for a denoiser without classes, or those of `Classes.labels_of`.
        """
        classes = self.classes
        if classes is None:
            require(class_labels is None, "class_labels", "be none for an unconditional model", class_labels)
            return None
        if class_labels is None:
            return classes.draw(batch_size, generator, self._execution_device)
        return classes.labels_of(class_labels, batch_size)

    def _guiding_labels(self, guidance: OTGuidance) -> Tensor | None:
        """The labels of the images; None where they are not known, or where the guidance field or else the reference
        set has none."""
        followed = guidance.guidance_field or self.reference_bank
        return None if followed.labels is None else self._class_labels

    def _conditions(self, labels: Tensor | None, batch_size: int, class_guidance_scale: float) -> Conditions | None:
        """The conditions of the denoiser in a call with these labels, or with the null label where they are not known;
        None where it has no classes.

        Raises:
            InputError: guidance by class for a denoiser without classes, or a null label that it does not have.
        """
        name, size = "class_guidance_scale", label_count(self.unet)
        require_number(name, class_guidance_scale, at_least=0)
        self._class_labels, plain = labels, class_guidance_scale == 1
        require(plain or size is not None, name, "be 1 for an unconditional model", class_guidance_scale)
        if size is None or self.classes is None:
            return None
        null_label = self.classes.null_label
        requirement = "be 1 for a denoiser that was not trained with a null label"
        require(plain or null_label is not None, name, requirement, class_guidance_scale)
        if labels is None:
            if null_label is None:
                raise InputError("`class_labels` must be given to a denoiser without a null label, got None")
            labels = torch.full((batch_size,), null_label)
        return Conditions(labels, null_label, class_guidance_scale)

    def _prepare_chain(
        self,
        scheduler: Scheduler,
        image_shape: tuple[int, ...],
        batch_size: int,
        num_inference_steps: int,
        num_guidance_steps: int | None,
        guidance_start_step: int,
        step_arguments: dict[str, Any],
        guidance_arguments: dict[str, Any],
        conditions: Conditions | None,
    ) -> Chain:
        """The chain that the arguments of a call ask for."""
        guidance = self._prepare_guidance(image_shape, batch_size, **guidance_arguments)
        check_deterministic(scheduler, step_arguments.get("eta") or 0.0)
        timesteps = set_timesteps(scheduler, num_inference_steps, self._execution_device)
        guided = guided_steps(guidance, image_shape[1:], scheduler, timesteps, num_guidance_steps, guidance_start_step)
        passed = [timesteps[step] for step in guided]
        once = not self._records or len(set(passed)) == len(passed)
        require(once, "scheduler", "visit each timestep once where a field is recorded", type(scheduler).__name__)
        step_arguments = extra_step_arguments(scheduler, **step_arguments)
        return Chain(scheduler, timesteps, step_arguments, guidance, guided, conditions)

    @contextmanager
    def _sampling(self, chain: Chain, *networks: Any) -> Iterator[FiniteValues]:
        """The context of one chain: evaluation mode, potentials of this chain only, and checks of finite values."""
        self._interrupt, self._nfe, self._num_timesteps = False, 0, len(chain.timesteps)
        potentials = chain.guidance.chain() if chain.guidance else nullcontext()
        networks = (*networks, self.unet, self.vae, self.feature_extractor)
        with evaluation_mode(*networks), potentials, FiniteValues() as finite:
            yield finite

    def _denoise(
        self,
        latents: Tensor,
        chain: Chain,
        finite: FiniteValues,
        callback: Callback | None,
        callback_tensors: Sequence[str] | None,
    ) -> Tensor:
        """x_0 of the chain that begins with `latents`; each step, x_t → x_{t−1}, is one call of the denoiser."""
        scheduler, timesteps, conditions = chain.scheduler, chain.timesteps, chain.conditions
        scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            if self.interrupt:
                continue
            place = f" at step {step + 1} of {len(timesteps)}"
            model_input = scale_model_input(latents, timestep)
            if conditions is None:
                model_output = self.unet(model_input, timestep).sample
            else:
                model_output = conditions.output(self.unet, model_input, timestep)
            self._nfe += 1 if conditions is None else conditions.calls
            finite.watch("the denoiser's output", model_output, place)
            if not learns_variance(scheduler):
                model_output = model_output[:, : latents.shape[1]]
            if chain.guidance and self._guidance_scale > 0 and step in chain.guided:
                model_output = self._guided_output(chain, model_output, model_input, step)
                finite.watch("the output of the guidance", model_output, place)
            latents = scheduler.step(model_output, timesteps[step], latents, **chain.step_arguments).prev_sample
            finite.watch("the result of the scheduler", latents, place)
            if callback is not None:
                tensors = dict.fromkeys(callback_tensors or CALLBACK_TENSORS, latents)
                latents = _replaced(latents, callback(self, step, timestep, tensors))
                finite.watch("the callback's `latents` tensor", latents, place)
        return latents

    def _guided_output(self, chain: Chain, model_output: Tensor, model_input: Tensor, step: int) -> Tensor:
        """The model output that corresponds to the corrected x̂0, in the scheduler's prediction type; a learned variance
        in its second half is kept."""
        guidance, timestep = chain.guidance, chain.timesteps[step]
        assert guidance is not None
        channels, a, b = model_input.shape[1], *prediction_coefficients(chain.scheduler, timestep, step)
        sample, predicted = model_input.float(), model_output[:, :channels].float()
        guidance.guidance_scale = self._guidance_scale
        labels = self._guiding_labels(guidance)
        bound = 1.0 if self.vae is None else latent_bound(chain.scheduler)
        corrected = guidance.correct((a * sample + b * predicted).clamp(-bound, bound), timestep, labels)
        guided = ((corrected - a * sample) / b).to(model_output.dtype)
        return torch.cat([guided, model_output[:, channels:]], dim=1)

    def _decoded(self, latents: Tensor) -> Tensor:
        """The images of the latents, or the images that they are already without a VAE."""
        if self.vae is None:
            return latents
        rows = decode_batch_size(self.vae, decoded_shape(self.vae, latents.shape[1:]))
        return torch.cat([decode(self.vae, part) for part in latents.split(rows)])


def guided_steps(
    guidance: OTGuidance | None,
    image_size: tuple[int, ...],
    scheduler: Scheduler,
    timesteps: Sequence[float],
    num_guidance_steps: int | None,
    guidance_start_step: int,
) -> set[int]:
    """Indices of the guided steps of a chain.

    By default these are all steps, or all but the last ones where guidance sees the pixels of images of this height and
    width coarsely or not at all; a single step is guided in any case. A step whose model output does not determine x̂0
    is never guided.

    Raises:
        InputError: a negative number.
    """
    require_integer("guidance_start_step", guidance_start_step, at_least=0)
    if num_guidance_steps is None:
        clean = 0 if _sees_all(guidance, image_size) else max(1, round(CLEAN_SHARE * len(timesteps)))
        num_guidance_steps = max(0, len(timesteps) - clean - guidance_start_step) if len(timesteps) > 1 else 1
    require_integer("num_guidance_steps", num_guidance_steps, at_least=0)
    if guidance is None:
        return set()
    asked = range(guidance_start_step, guidance_start_step + num_guidance_steps)
    return {step for step in reversible_steps(scheduler, timesteps) if step in asked}


def _sees_all(guidance: OTGuidance | None, image_size: tuple[int, ...]) -> bool:
    """Whether guidance may run to the last step; a field runs to the last step that it was recorded at."""
    if guidance is None or guidance.guidance_field is not None:
        return True
    fine = all(size <= FINE_BLOCK * small for size, small in zip(image_size, guidance.thumbnail_size, strict=True))
    return fine and guidance.pixel_weight > 0


def _replaced(latents: Tensor, changed: dict[str, Any] | None) -> Tensor:
    """The latents that a callback returned, or those that it received.

    Raises:
        InputError: it returned something else.
    """
    name = "callback_on_step_end"
    require(changed is None or isinstance(changed, dict), name, "return a dict or None", type(changed).__name__)
    returned = (changed or {}).get("latents", latents)
    shape = tuple(getattr(returned, "shape", ()))
    require(shape == tuple(latents.shape), name, f"return `latents` of shape {tuple(latents.shape)}", shape)
    return returned


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a call has set."""
    return {name: value for name, value in arguments.items() if value is not None}
