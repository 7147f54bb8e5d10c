"""The parts of `__call__` that both pipelines share: input checks, evaluation mode, finite values, output types."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..errors import InputError, require, require_integer
from ..schedules import Scheduler, is_known

if TYPE_CHECKING:
    from typing import Self

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents",)

Generators = torch.Generator | Sequence[torch.Generator] | None


def check_call(
    batch_size: int, generator: Generators, eta: float, output_type: str, callback_tensors: Sequence[str] | None
) -> torch.Generator | list[torch.Generator] | None:
    """Check the arguments of a call; returns the generator, or the list of one generator per image."""
    require_integer("batch_size", batch_size, at_least=1)
    several = isinstance(generator, Sequence)
    generators: list[Any] = list(generator) if several else [generator]  # type: ignore[arg-type]
    valid = all(isinstance(one, torch.Generator) for one in generators) or generators == [None]
    kinds = sorted({type(one).__name__ for one in generators})
    require(valid, "generator", "be a torch.Generator, or one for each image", ", ".join(kinds))
    fits = not several or len(generators) == batch_size
    require(fits, "generator", f"be one, or one for each of {batch_size} images", len(generators))
    require(isinstance(eta, (int, float)) and 0 <= eta <= 1, "eta", "lie in [0, 1]", eta)
    require(output_type in OUTPUT_TYPES, "output_type", f"be one of {', '.join(OUTPUT_TYPES)}", output_type)
    unknown = [name for name in callback_tensors or () if name not in CALLBACK_TENSORS]
    require(not unknown, "callback_on_step_end_tensor_inputs", f"be among {list(CALLBACK_TENSORS)}", unknown)
    return generators if several else generators[0]


def check_networks(
    unet: Any, scheduler: Scheduler, image_shape: Sequence[int], *, may_have_classes: bool = False
) -> None:
    """Refuse a denoiser or a scheduler that cannot turn noise alone, or noise and class labels, into images of
    `image_shape`, [C, H, W]."""
    name = type(scheduler).__name__
    known = "have known noise levels, as DDIM, DPM-Solver++, UniPC, Euler, Heun, EDM and flow-matching schedulers do"
    require(is_known(scheduler), "scheduler", known, name)
    require(len(_needed(scheduler.step)) <= 3, "scheduler", "step from a model output, a timestep and a sample", name)
    channels, predicted = image_shape[0], unet.config.get("out_channels") or image_shape[0]
    either = f"predict {channels} channels, or {2 * channels} with learned variances"
    require(predicted in (channels, 2 * channels), "unet", either, predicted)
    enough = predicted == 2 * channels or not learns_variance(scheduler)
    require(enough, "unet", f"predict {2 * channels} channels for a scheduler of learned variances", predicted)
    conditions = ("class_embed_type",) if may_have_classes else ("class_embed_type", "num_class_embeds")
    unconditional = all(unet.config.get(name) is None for name in conditions) and len(_needed(unet.forward)) <= 2
    or_classes = " or have num_class_embeds" if may_have_classes else ""
    require(unconditional, "unet", f"be unconditional{or_classes}", type(unet).__name__)
    halvings = sum(bool(getattr(block, "downsamplers", None)) for block in getattr(unet, "down_blocks", ()))
    divisible = all(side % 2**halvings == 0 for side in image_shape[1:])
    require(divisible, "unet", f"have a sample_size divisible by {2**halvings}", tuple(image_shape[1:]))


def unet_image_shape(unet: Any) -> tuple[int, int, int]:
    """[C, H, W] of the images that `unet` denoises."""
    size = unet.config.sample_size
    require(size is not None, "unet", "have a sample_size", size)
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def initial_latents(
    latents: Tensor | None, shape: Sequence[int], scheduler: Scheduler, generator: Generators, like: Tensor
) -> Tensor:
    """x_T of the prepared scheduler, on the device and in the dtype of `like`: noise of unit variance, given or drawn
    in `shape`, that is scaled to the first noise level.

    Raises:
        InputError: `latents` of another shape.
    """
    if latents is None:
        latents = randn_tensor(tuple(shape), generator=generator, device=like.device, dtype=like.dtype)
    require(tuple(latents.shape) == tuple(shape), "latents", f"have shape {tuple(shape)}", tuple(latents.shape))
    scale = getattr(scheduler, "init_noise_sigma", 1.0)
    latents = latents.to(like)
    return latents if float(scale) == 1.0 else latents * scale


def learns_variance(scheduler: Scheduler) -> bool:
    """Whether the scheduler reads a variance from the second half of the model output, as `DDPMScheduler` can."""
    return str(vars(scheduler).get("variance_type")).startswith("learned")


def extra_step_arguments(scheduler: Scheduler, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that `scheduler.step` accepts."""
    parameters = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def _needed(function: Any) -> list[str]:
    """Names of the required parameters of `function`."""
    parameters = inspect.signature(function).parameters.values()
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in fixed]


class FiniteValues:
    """A context in which watched tensors must be finite: NaN and Inf raise an error that says where they came from.

    A tensor on the CPU is checked at once. Tensors on a GPU are checked together at the end, with one synchronisation.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._largest: list[Tensor] = []

    def watch(self, name: str, tensor: Tensor, place: str = "") -> None:
        """Watch a tensor; the error gives its name and place."""
        self._lines.append(f"{name} is not finite{place}")
        self._largest.append(torch.linalg.vector_norm(tensor.detach(), math.inf).float())
        if tensor.device.type == "cpu":
            self._check()

    def _check(self) -> None:
        largest = torch.stack(self._largest).tolist() if self._largest else []
        broken = [line for line, value in zip(self._lines, largest, strict=True) if not math.isfinite(value)]
        self._lines, self._largest = [], []
        if broken:
            raise InputError(broken[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, InputError):  # which a value that is not finite may have caused
            self._check()


@contextmanager
def evaluation_mode(*models: nn.Module | None) -> Iterator[None]:
    """Put all modules into evaluation mode, and restore the mode of each afterwards."""
    present = [model for model in models if model is not None]
    was_training = [module for model in present for module in model.modules() if module.training]
    try:
        for model in present:
            model.eval()
        yield
    finally:
        for module in was_training:
            module.training = True


def postprocess(latents: Tensor, output_type: str) -> Any:
    """Latents in [-1, 1] as `"pt"` [B, C, H, W] or `"np"` [B, H, W, C] in [0, 1], or as a list of `"pil"` images.

    `"latent"` returns them unchanged.
    """
    if output_type == "latent":
        return latents
    images = (latents / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    pixels = images.cpu().permute(0, 2, 3, 1).float().numpy()
    return DiffusionPipeline.numpy_to_pil(pixels) if output_type == "pil" else pixels
