"""Saved pipelines to images: load, sample with one generator per image, write pictures and read them back."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from torch import Tensor
from torchvision.utils import make_grid

from .data.decode import Decoder
from .data.pictures import list_folder, picture_table
from .errors import InputError, require, require_integer
from .features import load_feature_extractor, load_reference_bank
from .files import GRID_NAME, SAMPLE, SAMPLE_NAMES, local_or_hub, replace_own, user_path
from .guidance import check_takes
from .pipelines.call import unet_image_shape
from .pipelines.guided import GuidedPipeline
from .pipelines.pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from .pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from .pipelines.portable import check_holds_no_code
from .schedules import Scheduler
from .seeds import keyed_generator

PIPELINES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (OTGuidedDDIMPipeline, TruncatedPriorPipeline, DDIMPipeline, DDPMPipeline)
}
INDEXED = "be a folder with a model_index.json, or a Hub id"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
MAX_BATCH_SIZE = 1000
GRID_IMAGES = 400
GRID_TILE = 48


class Pipeline(Protocol):
    """What sampling asks of a pipeline, this package's or diffusers' own: one of `PIPELINES`."""

    unet: Any
    scheduler: Scheduler

    @property
    def device(self) -> torch.device:
        """Where its networks are."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Images, as the attribute of that name of what is returned."""


# --- Pipelines --------------------------------------------------------------------------------------------------------


def load_pipeline(path: str | Path, features: str | Path | None = None) -> DiffusionPipeline:
    """The saved pipeline at `path`, ready to sample.

    Args:
        path: folder or Hub id of an `OTGuidedDDIMPipeline`, a `TruncatedPriorPipeline` or diffusers' `DDIMPipeline` or
            `DDPMPipeline`. Weights are read as safetensors only; nothing in the folder is executed.
        features: folder of a `train_features.py` run. With its network and reference bank the pipeline at `path` is
            guided: a `TruncatedPriorPipeline` as one, any other as an `OTGuidedDDIMPipeline`.

    Raises:
        InputError: no such pipeline, or feature network and UNet do not fit.
    """
    place = local_or_hub(path, "pipeline", INDEXED)
    name = pipeline_class_name(place)
    require(name in PIPELINES, "pipeline", f"be one of {', '.join(PIPELINES)}", name)
    check_holds_no_code(place)
    if features is not None:
        features = local_or_hub(features, "features")
    try:
        pipeline = PIPELINES[name].from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"`pipeline` must be complete, got {str(path)!r} ({_one_line(error)})") from error
    return pipeline if features is None else with_guidance(pipeline, str(features))


def with_guidance(pipeline: DiffusionPipeline, features: str) -> GuidedPipeline:
    """The parts of a pipeline as a guided one, with network and references of the `train_features.py` run `features`.

    Raises:
        InputError: no such run, or a network of other images.
    """
    network, bank = load_feature_extractor(features), load_reference_bank(features)
    truncated = isinstance(pipeline, TruncatedPriorPipeline)
    check_takes(network, pipeline.prior.image_shape if truncated else unet_image_shape(pipeline.unet), "features")
    if truncated:
        return TruncatedPriorPipeline(pipeline.prior, pipeline.unet, pipeline.scheduler, network, bank)
    return OTGuidedDDIMPipeline(pipeline.unet, pipeline.scheduler, network, bank)


def accelerate_networks(pipeline: Pipeline, *, channels_last: bool = False, compile: bool = False) -> None:
    """Lay the denoiser's weights out for convolutions, or compile it, in place; its images change by rounding only.

    Args:
        pipeline: on its device.
        channels_last: PyTorch's memory format of that name.
        compile: by `torch.compile`, at the first step of each new batch size.

    Raises:
        InputError: nothing can be compiled on this machine.
    """
    if channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
    if compile:
        try:
            torch.compile(torch.sin)(torch.ones(2, device=pipeline.device))
        except Exception as error:  # whatever the compilers underneath raise
            raise InputError(f"`compile` needs a compiler for {pipeline.device}, got {_one_line(error)}") from error
        pipeline.unet.compile()


def pipeline_class_name(path: str) -> str:
    """The `_class_name` in `model_index.json` of a folder or Hub id.

    Raises:
        InputError: no `model_index.json` there.
    """
    place = local_or_hub(path, "pipeline", INDEXED)
    loadable = not os.path.exists(place) or os.path.isfile(f"{place}/model_index.json")
    require(loadable, "pipeline", INDEXED, path)
    try:
        return str(DiffusionPipeline.load_config(place)["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"`pipeline` must be a saved diffusers pipeline, got {path!r} ({_one_line(error)})") from error


# --- Images -----------------------------------------------------------------------------------------------------------


def sample_images(
    pipeline: Pipeline,
    num_images: int,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    **call_arguments: Any,
) -> Tensor:
    """Generate images, each from its own generator.

    Image i starts from noise drawn from (`seed`, i) alone. Without guidance it is therefore the same image in any batch
    (up to rounding in the network, whose kernels depend on the batch size), and on any number of processes that
    accelerate has launched: each makes its share, and all get all images. OT guidance couples the images of a batch:
    there the batch is part of the result, and the larger it is, the better.

    Args:
        pipeline: one that `load_pipeline` returns; its own progress bar shows the steps.
        num_images: N.
        batch_size: images generated at once, at most; a process' share is cut into equal parts. Default: all, up to
            1,000, and half as many each time the memory does not suffice, unless guidance couples them.
        seed: of the starting noise.
        dtype: of the networks' products, by autocast: `"float32"`, `"bfloat16"` or `"float16"`. Noise, steps and
            guidance stay in float32, so an image stays the same but for rounding.
        call_arguments: passed on to the pipeline, such as `num_inference_steps` and `guidance_scale`.

    Returns:
        uint8 [N, C, H, W], on the CPU.

    Raises:
        InputError: an argument out of range, one that this pipeline does not take, or a batch beyond the memory.
    """
    require(num_images >= 1, "num_images", "be at least 1", num_images)
    require(batch_size is None or batch_size >= 1, "batch_size", "be at least 1", batch_size)
    require(seed >= 0, "seed", "be at least 0", seed)
    check_dtype(dtype)
    check_call_arguments(pipeline, call_arguments)
    state = process_state()
    share = torch.arange(num_images).tensor_split(state.num_processes)[state.process_index]
    at_once = min(num_images, MAX_BATCH_SIZE) if batch_size is None else batch_size
    pending = list(share.tensor_split(math.ceil(len(share) / at_once))) if len(share) else []
    may_halve = batch_size is None and not couples_batch(pipeline, call_arguments)
    batches = []
    with networks_in(dtype, pipeline.device):
        while pending:
            images = _sample_rows(pipeline, pending[0], seed, call_arguments)
            if images is not None:
                batches.append(images)
                pending.pop(0)
                continue
            size = len(pending[0])
            require(may_halve and size > 1, "batch_size", "be smaller, for lack of memory", size)
            pending = [half for rows in pending for half in rows.tensor_split(2) if len(half)]
            clear_device_cache(garbage_collection=True)
    return torch.cat(gather_object(batches))


def process_state() -> PartialState:
    """accelerate's state of this process. On a machine without a GPU, accelerate joins the processes that a launcher
    has started only where it is told to use the CPU."""
    in_group = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=in_group and not (torch.cuda.is_available() or torch.xpu.is_available()))


def check_dtype(dtype: str) -> None:
    """Refuse what is no `dtype` of `sample_images`."""
    require(dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", dtype)


def networks_in(dtype: str, device: torch.device) -> torch.autocast:
    """A context in which networks multiply in that dtype."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def couples_batch(pipeline: Pipeline, call_arguments: dict[str, Any]) -> bool:
    """Whether an image depends on the others of its batch: with OT guidance that follows no field."""
    guided = getattr(pipeline, "reference_bank", None) is not None and call_arguments.get("guidance_scale") != 0
    return guided and (getattr(pipeline, "guidance_field", None) is None or bool(call_arguments.get("joint_batch")))


def _sample_rows(pipeline: Pipeline, rows: Tensor, seed: int, call_arguments: dict[str, Any]) -> Tensor | None:
    """The images of these numbers; None where the memory does not suffice."""
    generators = [keyed_generator("cpu", seed, "image", row) for row in rows.tolist()]
    try:
        pixels = pipeline(batch_size=len(rows), generator=generators, output_type="np", **call_arguments).images
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            return None
        raise
    require(bool(np.isfinite(pixels).all()), "pipeline", "make finite images", "NaN")  # stock pipelines do not look
    return torch.from_numpy(pixels).mul(255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def check_call_arguments(pipeline: Pipeline, call_arguments: dict[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not know, and numbers of steps that no chain has.

    Raises:
        InputError: naming the argument.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    guided = inspect.signature(OTGuidedDDIMPipeline.__call__).parameters
    for name, value in call_arguments.items():
        hint = ", or come with the features that guide (--features RUN)" if name in guided else ""
        require(name in parameters, name, f"be left out for a {type(pipeline).__name__}{hint}", value)
    steps, length = call_arguments.get("num_inference_steps"), pipeline.scheduler.config.num_train_timesteps
    if steps is not None:
        require_integer("num_inference_steps", steps, at_least=1)
        require(steps <= length, "num_inference_steps", f"lie in 1 … {length}", steps)


def best_device() -> str:
    """`"cuda"` where there is a GPU, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def network_calls(pipeline: Pipeline) -> int:
    """Calls of the denoiser, and of the prior where there is one, per image in the pipeline's last run."""
    return pipeline.nfe if hasattr(pipeline, "nfe") else len(pipeline.scheduler.timesteps)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def save_images(images: Tensor, folder: str | Path) -> Path:
    """Write uint8 images [N, C, H, W] as `00000.png`, `00001.png`, … and `grid.png`; returns the grid's path.

    What an earlier call wrote into the folder is replaced, once all new pictures are on the disk. A hidden file lists
    the pictures and their checksums: others are left alone.

    Raises:
        InputError: a picture of one of these names that this function did not write, or that has changed since.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_own(folder, SAMPLE, _pictures(images), SAMPLE_NAMES)
    return folder / GRID_NAME


def _pictures(images: Tensor) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """File name of each picture and of the grid, with what writes it."""
    for index, image in enumerate(images):
        yield f"{index:05d}.png", partial(_to_picture(image).save, format="PNG")
    yield GRID_NAME, partial(image_grid(images).save, format="PNG")


def save_grid(images: Tensor, file: Path) -> Path:
    """Write `image_grid` of uint8 images [N, C, H, W]; returns the file."""
    image_grid(images).save(file)
    return file


def image_grid(images: Tensor) -> PIL.Image.Image:
    """The first 400 of uint8 images [N, C, H, W] as one near-square picture, small ones enlarged without smoothing.

    Example:
        >>> image_grid(torch.zeros(9, 1, 8, 8, dtype=torch.uint8)).size
        (152, 152)
    """
    shown = images[:GRID_IMAGES]
    enlargement = max(1, GRID_TILE // max(images.shape[2:]))
    large = shown.repeat_interleave(enlargement, dim=2).repeat_interleave(enlargement, dim=3)
    return _to_picture(make_grid(large, nrow=math.ceil(math.sqrt(len(shown))), padding=2, pad_value=255))


def read_images(folder: str | Path, channels: int) -> Tensor:
    """All pictures of a folder in the order of their paths, uint8 [N, C, H, W], read as those of a data set.

    Args:
        folder: what `save_images` wrote, without its `grid.png`, or any folder with pictures of one size.
        channels: 1 converts to grey, 3 to RGB.

    Raises:
        InputError: fewer than two pictures, an unreadable one, or one of another size.
    """
    listing = list_folder(folder, "images")
    enough = len(listing.pictures) >= 2
    require(enough, "images", "be a saved pipeline, or a folder with at least 2 pictures", str(folder))
    listing.warn()
    return Decoder(picture_table(listing), "image", str(folder), None, channels, "images").decode_all()


def _to_picture(image: Tensor) -> PIL.Image.Image:
    """uint8 [C, H, W] as a grey or RGB picture."""
    return PIL.Image.fromarray(image.permute(1, 2, 0).squeeze(-1).cpu().numpy())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
