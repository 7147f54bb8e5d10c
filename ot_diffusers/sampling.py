"""From saved pipelines to images: load, sample with one generator per image, write images and read them back."""

from __future__ import annotations

import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, DiTPipeline, LDMPipeline
from torch import Tensor, nn
from torchvision.utils import make_grid

from .data.decode import Decoder
from .data.pictures import list_folder, picture_table
from .errors import InputError, require, require_integer
from .features import load_feature_extractor, load_reference_bank
from .files import GRID_NAME, METADATA_NAME, SAMPLE, SAMPLE_NAMES, local_or_hub, replace_own, user_path
from .guidance import check_takes
from .pipelines.classes import Classes, ClassLabels, listed
from .pipelines.guided import GuidedPipeline
from .pipelines.latents import check_has_no_text
from .pipelines.pipeline_flow_match import FlowMatchPipeline
from .pipelines.pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from .pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from .pipelines.portable import check_holds_no_code
from .schedules import Scheduler
from .seeds import keyed_generator

PIPELINES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (OTGuidedDDIMPipeline, FlowMatchPipeline, TruncatedPriorPipeline, DDIMPipeline, DDPMPipeline)
}
LATENT_PIPELINES: dict[str, type[Any]] = {kind.__name__: kind for kind in (DiTPipeline, LDMPipeline)}
INDEXED = "be a folder with a model_index.json, or a Hub id"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
MAX_BATCH_SIZE = 1000
GRID_IMAGES = 400
GRID_TILE = 64


class Pipeline(Protocol):
    """What sampling needs of a pipeline of this package or of diffusers: one of `PIPELINES`."""

    unet: Any
    scheduler: Scheduler

    @property
    def device(self) -> torch.device:
        """Device of its networks."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Generate images; the result has them as its attribute `images`."""


# --- Pipelines --------------------------------------------------------------------------------------------------------


def load_pipeline(path: str | Path, features: str | Path | None = None) -> DiffusionPipeline:
    """The saved pipeline at `path`, ready to sample.

    Args:
        path: folder or Hub id of an `OTGuidedDDIMPipeline`, a `FlowMatchPipeline`, a `TruncatedPriorPipeline` or
            diffusers' `DDIMPipeline` or `DDPMPipeline`. Its `LDMPipeline` and `DiTPipeline`, which work on latents,
            become an `OTGuidedDDIMPipeline`, whose images without guidance are theirs. Weights are read as safetensors
            only; nothing in the folder is executed.
        features: folder of a `train_features.py` run, whose network and reference bank guide the pipeline. A
            pipeline of diffusers becomes an `OTGuidedDDIMPipeline`; the others keep their class.

    Raises:
        InputError: no such pipeline, one that is conditioned on text, or a feature network that does not fit the UNet.
    """
    place = local_or_hub(path, "pipeline", INDEXED)
    name = pipeline_class_name(place)
    check_has_no_text(DiffusionPipeline.load_config(place), name)
    kinds = PIPELINES | LATENT_PIPELINES
    require(name in kinds, "pipeline", f"be one of {', '.join(kinds)}", name)
    check_holds_no_code(place)
    if features is not None:
        features = local_or_hub(features, "features")
    try:
        pipeline = kinds[name].from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"`pipeline` must be complete, got {str(path)!r} ({_one_line(error)})") from error
    if name in LATENT_PIPELINES:
        pipeline = OTGuidedDDIMPipeline.from_pipe(pipeline)
    return pipeline if features is None else with_guidance(pipeline, str(features))


def with_guidance(pipeline: DiffusionPipeline, features: str) -> GuidedPipeline:
    """A guided pipeline from the parts of `pipeline` and the network and reference bank of the run `features`.

    Raises:
        InputError: no such run, or a network for other images.
    """
    network, bank = load_feature_extractor(features), load_reference_bank(features)
    kind = type(pipeline) if isinstance(pipeline, GuidedPipeline) else OTGuidedDDIMPipeline
    guided = kind.from_pipe(pipeline, feature_extractor=network, reference_bank=bank, guidance_field=None)
    check_takes(network, guided.image_shape, "features")
    return guided


def accelerate_networks(pipeline: Pipeline, *, channels_last: bool = False, compile: bool = False) -> None:
    """Speed up the denoiser in place; its images change by rounding only.

    Args:
        pipeline: the pipeline, on its device.
        channels_last: store the weights in PyTorch's memory format of that name.
        compile: use `torch.compile`, which compiles at the first step of each new batch size.

    Raises:
        InputError: this machine cannot compile.
    """
    if channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
    if compile:
        try:
            torch.compile(torch.sin)(torch.ones(2, device=pipeline.device))
        except Exception as error:  # compilers raise exceptions of many types
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
    class_labels: ClassLabels | None = None,
    **call_arguments: Any,
) -> Tensor:
    """Generate images, each from its own generator.

    The noise of image i depends on (`seed`, i) alone. Without guidance an image is therefore the same in any batch (up
    to rounding, because the network's kernels depend on the batch size) and on any number of processes that accelerate
    has launched: each process generates its share and receives all images. OT guidance couples the images of a batch:
    there the batch is part of the result, and a larger batch is better.

    Args:
        pipeline: a pipeline that `load_pipeline` returns; its own progress bar shows the steps.
        num_images: number of images, N.
        batch_size: largest number of images generated at once; the share of a process is divided evenly. By default all
            images up to 1,000; the number is halved whenever memory runs out, unless guidance couples the images.
        seed: random seed of the starting noise.
        dtype: dtype of the networks by autocast: `"float32"`, `"bfloat16"` or `"float16"`; float32 on a CPU that only
            emulates the others. Noise, scheduler steps and guidance stay in float32, so that images change by rounding
            only.
        class_labels: classes of the images, as `chosen_labels` takes them.
        call_arguments: arguments of the pipeline's call, such as `num_inference_steps` and `guidance_scale`.

    Returns:
        uint8 [N, C, H, W], on the CPU.

    Raises:
        InputError: an argument out of range or unknown to this pipeline, or too little memory for the batch.
    """
    require(num_images >= 1, "num_images", "be at least 1", num_images)
    require(batch_size is None or batch_size >= 1, "batch_size", "be at least 1", batch_size)
    require(seed >= 0, "seed", "be at least 0", seed)
    check_dtype(dtype)
    check_call_arguments(pipeline, call_arguments)
    labels = chosen_labels(pipeline, num_images, class_labels, seed)
    state = process_state()
    share = torch.arange(num_images).tensor_split(state.num_processes)[state.process_index]
    at_once = min(num_images, MAX_BATCH_SIZE) if batch_size is None else batch_size
    pending = list(share.tensor_split(math.ceil(len(share) / at_once))) if len(share) else []
    may_halve = batch_size is None and not couples_batch(pipeline, call_arguments)
    batches = []
    with networks_in(dtype, pipeline.device):
        while pending:
            told = {} if labels is None else {"class_labels": labels[pending[0]]}
            images = _sample_rows(pipeline, pending[0], seed, call_arguments | told)
            if images is not None:
                batches.append(images)
                pending.pop(0)
                continue
            size = len(pending[0])
            require(may_halve and size > 1, "batch_size", "be smaller, for lack of memory", size)
            pending = [half for rows in pending for half in rows.tensor_split(2) if len(half)]
            clear_device_cache(garbage_collection=True)
    return torch.cat(gather_object(batches))


def chosen_labels(
    pipeline: Pipeline, num_images: int, class_labels: ClassLabels | None = None, seed: int = 0
) -> Tensor | None:
    """The classes of images that `sample_images` generates, int64 [N]; None where the pipeline leaves them open.

    Args:
        pipeline: a pipeline that `load_pipeline` returns.
        num_images: number of images, N.
        class_labels: one class, or several that are taken in turn, by number or name. By default they are drawn by
            their frequencies, that of image i by (`seed`, i) alone.
        seed: random seed of the images.

    Raises:
        InputError: classes that the pipeline does not have.
    """
    classes: Classes | None = getattr(pipeline, "classes", None)
    if classes is None:
        require(class_labels is None, "class_labels", "be none for an unconditional model", class_labels)
        return None
    if class_labels is not None:
        asked: Sequence[Any] = listed(class_labels) or [class_labels]
        return classes.labels_of([asked[index % len(asked)] for index in range(num_images)], num_images)
    if not getattr(pipeline, "draws_labels", False):
        return None
    return classes.draw(num_images, [keyed_generator("cpu", seed, "class", row) for row in range(num_images)], "cpu")


def process_state() -> PartialState:
    """accelerate's state of this process. Without a GPU, accelerate joins the processes of a launcher only if it is
    told to use the CPU."""
    in_group = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=in_group and not (torch.cuda.is_available() or torch.xpu.is_available()))


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that `sample_images` does not know."""
    require(dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", dtype)


def networks_in(dtype: str, device: torch.device) -> torch.autocast:
    """A context in which networks compute in that dtype, by autocast, unless the device emulates it."""
    enabled = dtype != "float32" and not is_emulated(dtype, device)
    return torch.autocast(device.type, DTYPES[dtype], enabled=enabled)


def is_emulated(dtype: str, device: torch.device) -> bool:
    """Whether the device is a CPU without units for bfloat16 or float16, on which convolutions take far longer than
    in float32; warns of it."""
    if device.type != "cpu" or dtype == "float32":
        return False
    supported = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    emulated = not torch.backends.mkldnn.is_available() or not getattr(torch.ops.mkldnn, supported)()
    if emulated:
        warnings.warn(f"this processor only emulates {dtype}: the networks compute in float32", stacklevel=2)
    return emulated


def couples_batch(pipeline: Pipeline, call_arguments: dict[str, Any]) -> bool:
    """Whether an image depends on the others of its batch, as it does with OT guidance without a field."""
    guided = getattr(pipeline, "reference_bank", None) is not None and call_arguments.get("guidance_scale") != 0
    return guided and (getattr(pipeline, "guidance_field", None) is None or bool(call_arguments.get("joint_batch")))


def _sample_rows(pipeline: Pipeline, rows: Tensor, seed: int, call_arguments: dict[str, Any]) -> Tensor | None:
    """The images with these indices; None if memory runs out."""
    generators = [keyed_generator("cpu", seed, "image", row) for row in rows.tolist()]
    try:
        pixels = pipeline(batch_size=len(rows), generator=generators, output_type="np", **call_arguments).images
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            return None
        raise
    require(
        bool(np.isfinite(pixels).all()), "pipeline", "make finite images", "NaN"
    )  # the pipelines of diffusers do not check
    return torch.from_numpy(pixels).mul(255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def check_call_arguments(pipeline: Pipeline, call_arguments: dict[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not have, numbers of steps out of range, and a denoiser with
    classes in a pipeline of diffusers, which has no labels for it.

    Raises:
        InputError: such an argument, by its name.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    guided = inspect.signature(OTGuidedDDIMPipeline.__call__).parameters
    for name, value in call_arguments.items():
        hint = ", or come with the features that guide (--features RUN)" if name in guided else ""
        hint = "" if name.startswith("class_") else hint
        require(name in parameters, name, f"be left out for a {type(pipeline).__name__}{hint}", value)
    has_labels = pipeline.unet.config.get("num_class_embeds") is None or hasattr(pipeline, "classes")
    kind = "be an OTGuidedDDIMPipeline, whose call takes labels, for a denoiser with classes"
    require(has_labels, "pipeline", kind, type(pipeline).__name__)
    steps, length = call_arguments.get("num_inference_steps"), pipeline.scheduler.config.num_train_timesteps
    if steps is not None:
        require_integer("num_inference_steps", steps, at_least=1)
        require(steps <= length, "num_inference_steps", f"lie in 1 … {length}", steps)


def best_device() -> str:
    """`"cuda"` where there is a GPU, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def network_calls(pipeline: Pipeline) -> int:
    """Number of network calls per image in the pipeline's last run: of the denoiser and of any prior."""
    return pipeline.nfe if hasattr(pipeline, "nfe") else len(pipeline.scheduler.timesteps)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def save_images(images: Tensor, folder: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Write uint8 images [N, C, H, W] as `00000.png`, `00001.png`, … and `grid.png`; returns the grid's path.

    With the name of the class of each image there is a `metadata.jsonl` too, so that the folder is a labelled data set
    of pictures, here and for `datasets`.

    Files that an earlier call wrote are replaced after all new ones are on the disk. A hidden file lists the names and
    checksums; no other file is touched.

    Raises:
        InputError: a file of one of these names that this function did not write, or that has changed since.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_own(folder, SAMPLE, _sample_files(images, class_names), SAMPLE_NAMES)
    return folder / GRID_NAME


def _sample_files(images: Tensor, class_names: Sequence[str] | None) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """File name of each image, of the grid and of the list of classes, with the function that writes it."""
    names = [f"{index:05d}.png" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        yield name, partial(_to_picture(image).save, format="PNG")
    yield GRID_NAME, partial(image_grid(images).save, format="PNG")
    if class_names is not None:
        rows = ({"file_name": name, "label": label} for name, label in zip(names, class_names, strict=True))
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        yield METADATA_NAME, partial(Path.write_text, data=text, encoding="utf-8")


def save_grid(images: Tensor, file: Path, columns: int | None = None) -> Path:
    """Write `image_grid` of uint8 images [N, C, H, W]; returns the file."""
    image_grid(images, columns).save(file)
    return file


def image_grid(images: Tensor, columns: int | None = None) -> PIL.Image.Image:
    """The first 400 of uint8 images [N, C, H, W] as one picture, near-square or with so many columns; small images are
    enlarged by bicubic interpolation.

    Example:
        >>> image_grid(torch.zeros(9, 1, 8, 8, dtype=torch.uint8)).size
        (200, 200)
    """
    shown = images[:GRID_IMAGES]
    enlargement = max(1, GRID_TILE // max(images.shape[2:]))
    large = nn.functional.interpolate(shown.float(), scale_factor=enlargement, mode="bicubic")
    large = large.round().clamp(0, 255).to(torch.uint8)
    columns = columns or math.ceil(math.sqrt(len(shown)))
    return _to_picture(make_grid(large, nrow=columns, padding=2, pad_value=255))


def read_images(folder: str | Path, channels: int) -> Tensor:
    """All images of a folder in the order of their paths, uint8 [N, C, H, W], read like those of a data set.

    Args:
        folder: folder that `save_images` wrote (its `grid.png` is left out), or any folder with images of one size.
        channels: 1 converts to grey, 3 to RGB.

    Raises:
        InputError: fewer than two images, an unreadable image, or one of another size.
    """
    listing = list_folder(folder, "images")
    enough = len(listing.pictures) >= 2
    require(enough, "images", "be a saved pipeline, or a folder with at least 2 pictures", str(folder))
    listing.warn()
    return Decoder(picture_table(listing), "image", str(folder), None, channels, "images").decode_all()


def read_class_names(folder: str | Path) -> list[str] | None:
    """Names of the classes of a folder that `save_images` wrote, in the order of `read_images`; None without them.

    Raises:
        InputError: a list of classes that is not readable, or not of these images.
    """
    file = user_path(folder) / METADATA_NAME
    if not file.is_file():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        label_of = {row["file_name"]: row["label"] for row in rows}
        return [str(label_of[picture]) for picture in list_folder(folder, "images").pictures]
    except (ValueError, KeyError, TypeError) as error:
        requirement = f"have a label for every picture in its {METADATA_NAME}"
        raise InputError(f"`images` must {requirement}, got {str(folder)!r}") from error


def _to_picture(image: Tensor) -> PIL.Image.Image:
    """uint8 [C, H, W] as a grey or RGB image."""
    return PIL.Image.fromarray(image.permute(1, 2, 0).squeeze(-1).cpu().numpy())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
