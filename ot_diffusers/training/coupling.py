"""Noise–image couplings: the noise that an image is paired with in training.

A denoiser learns a conditional mean given x_t for every pairing of noise and images. If pairs are close to each other,
there is less to average over. Sampling does not change: it starts from independent noise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm.auto import tqdm

from ..cache import remembered
from ..config import DiffusionConfig
from ..data import ResidentImages, StreamedImages, pixels_of
from ..errors import InputError, require
from ..features import class_counts, labels_of
from ..models.semidiscrete_coupling import WHOLE, SemidiscreteCoupling, mirrored
from ..transport import sinkhorn_potentials
from ..transport.geometry import block_rows, half_squared_distances

logger = logging.getLogger(__name__)

LARGEST_ASSIGNMENT = 2048
"""Images up to which the assignment problem is solved exactly; a second, and the time grows with the third power."""
TEMPERATURE, PLAN_ERROR = 0.05, 1e-2
"""Temperature of larger plans, relative to the spread of the scores, and the error of their marginals."""


def make_coupling(
    config: DiffusionConfig, images: ResidentImages | StreamedImages, accelerator: Accelerator
) -> SemidiscreteCoupling | None:
    """The coupling of the run: loaded, from the cache, or solved now by one process for all; None for other couplings.

    For a model with classes it is a coupling in each class, unless `couple_across_classes` is set: noise that goes to
    images of any class tells their class, and the model would learn to believe the noise rather than the label.

    Raises:
        InputError: a saved coupling of other images or labels, or a class of fewer than two images.
    """
    if config.noise_coupling != "semidiscrete":
        return None
    check_memory(len(images), images.image_shape, flips=config.random_flip)
    pixels, labels = pixels_of(images), _coupled_labels(config, images)
    if config.coupling is not None:
        coupling = _load(config.coupling).with_images(pixels)
        _check_flips(coupling, config)
        _check_labels(coupling, labels, config)
    else:
        with accelerator.main_process_first():
            coupling = _solved(config, images, pixels, labels, accelerator)
    reached, wanted = coupling.config.chi_squared, config.coupling_tolerance
    if reached > wanted and accelerator.is_main_process:
        logger.warning(f"the coupling's χ² is {reached:.3g}, above coupling_tolerance={wanted:g}")
    return coupling.to(accelerator.device)


def check_memory(count: int, image_shape: tuple[int, ...], *, flips: bool) -> None:
    """Refuse a data set whose pixels and points exceed the memory that is left.

    Raises:
        InputError: with both sizes.
    """
    values = math.prod(image_shape)
    pixels = 2 * count * values  # bytes, once more while they are put together
    points = 2 * 4 * count * (1 + flips) * min(values, WHOLE)  # float32, and a centred copy
    needed, left = pixels + points, psutil.virtual_memory().available
    require(
        needed <= left,
        "noise_coupling",
        f"be independent or assignment for {count:,} images, whose coupling takes {needed / 2**30:.3g} GiB of memory",
        f"semidiscrete with {left / 2**30:.3g} GiB left",
    )


def _load(path: str) -> SemidiscreteCoupling:
    """A coupling saved in a folder, or in the folder of a run.

    Raises:
        InputError: none there.
    """
    folder = Path(path)
    folder = folder / "coupling" if (folder / "coupling").is_dir() else folder
    try:
        return SemidiscreteCoupling.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"`coupling` must be the folder of a saved semidiscrete coupling, got {path!r}") from error


def _check_flips(coupling: SemidiscreteCoupling, config: DiffusionConfig) -> None:
    if coupling.config.flips != config.random_flip:
        kind = f"one {'with' if config.random_flip else 'without'} flips for random_flip={config.random_flip}"
        raise InputError(f"`coupling` must be {kind}, got {config.coupling!r}")


def _coupled_labels(config: DiffusionConfig, images: ResidentImages | StreamedImages) -> Tensor | None:
    """Labels of a coupling in each class, int64 [N]; None for one over all images.

    Raises:
        InputError: a class of fewer than two images.
    """
    if not config.class_conditional or config.couple_across_classes:
        return None
    for name, count in class_counts(images).items():
        require(count >= 2, "dataset", f"have two training images or more of class {name!r}", count)
    return labels_of(images)


def _check_labels(coupling: SemidiscreteCoupling, labels: Tensor | None, config: DiffusionConfig) -> None:
    known = coupling.config.num_classes is not None
    if labels is None and known:
        raise InputError(f"`coupling` must be one over all images, without classes, got {config.coupling!r}")
    if labels is not None and not (known and torch.equal(coupling.labels.cpu()[: len(labels)], labels)):
        other = "couple_across_classes=true takes one over all images"
        raise InputError(f"`coupling` must be one in each class of these images ({other}), got {config.coupling!r}")


def _solved(
    config: DiffusionConfig,
    images: ResidentImages | StreamedImages,
    pixels: Tensor,
    labels: Tensor | None,
    accelerator: Accelerator,
) -> SemidiscreteCoupling:
    """The coupling for these images and options, solved once and kept in the cache folder, whatever the run's seed."""
    flips, tolerance = config.random_flip, config.coupling_tolerance
    settings = f"{images.fingerprint} flips={flips} tolerance={tolerance} seconds={config.coupling_max_seconds}"
    settings += "" if labels is None else f" labels={labels.tolist()}"

    def solve() -> dict[str, Tensor]:
        scope = f"{len(pixels):,} images" + ("" if labels is None else f", in each of {len(labels.unique())} classes,")
        accelerator.print(f"solving for the coupling of {scope} until χ² ≤ {tolerance:g}", flush=True)
        with tqdm(unit=" draws", unit_scale=True, disable=None if accelerator.is_main_process else True) as bar:

            def progress(num_draws: int, chi_squared: float | None) -> None:
                bar.update(num_draws - bar.n)
                if chi_squared is not None:
                    bar.clear()
                    accelerator.print(f"coupling: χ² {chi_squared:.3g} after {num_draws:,} draws", flush=True)

            coupling = SemidiscreteCoupling.from_images(
                pixels.to(accelerator.device),
                labels=labels,
                flips=flips,
                tolerance=tolerance,
                max_seconds=config.coupling_max_seconds,
                dataset=images.name,
                progress=progress,
            )
        config_bytes = torch.tensor(list(coupling.to_json_string().encode()), dtype=torch.uint8)
        return {"config": config_bytes, **coupling.state_dict()}

    tensors = remembered("couplings", hashlib.sha256(settings.encode()).hexdigest(), solve)
    coupling = SemidiscreteCoupling.from_config(json.loads(bytes(tensors.pop("config").tolist())))
    coupling.load_state_dict(tensors)
    return coupling.with_images(pixels)


def assigned_noise(clean: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The rows of `noise` in the order of the optimal transport from images to noise, for ‖x0 − ε‖².

    Up to `LARGEST_ASSIGNMENT` images the assignment is exact, and the noise of a batch only changes places. Beyond it,
    each image draws its noise from its row of an entropic plan, so that some noise vectors serve twice, and some never.

    Args:
        clean: [B, C, H, W] in [-1, 1].
        noise: [B, C, H, W].
        generator: for the draws from the plan, on the device of the images.

    Returns:
        [B, C, H, W]. The exact assignment is solved on the CPU.

    Reference: [Li2024]; [Tong2024], [Zhang2025] for flow matching.

    Example:
        >>> assigned_noise(torch.tensor([[1.0], [-1.0]]), torch.tensor([[-2.0], [0.5]])).flatten()
        tensor([ 0.5000, -2.0000])
    """
    images, vectors = clean.flatten(1).float(), noise.flatten(1).float()
    if len(images) <= LARGEST_ASSIGNMENT:
        _, columns = linear_sum_assignment(half_squared_distances(images, vectors).cpu().numpy())
        return noise[torch.as_tensor(columns, device=noise.device)]
    spread = (images - images.mean(dim=0)).norm(dim=1).mean()  # the standard deviation of ⟨ε, x0⟩
    eps = (TEMPERATURE * spread).item()
    plan = sinkhorn_potentials(images, vectors, blur=math.sqrt(eps), tolerance=PLAN_ERROR, max_iterations=100)
    parts = []
    for rows in images.split(block_rows(vectors)):
        scores = (plan.g - half_squared_distances(rows, vectors)) / eps
        parts.append(torch.multinomial(scores.softmax(dim=1), 1, generator=generator)[:, 0])
    return noise[torch.cat(parts)]


def coupled_images(
    images: ResidentImages | StreamedImages, noise: Tensor, coupling: SemidiscreteCoupling, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The images, [B, C, H, W] in [-1, 1], that noise of this shape is assigned to, and their rows of the data set.

    `labels`, int64 [B], are those of a coupling in each class.
    """
    points = coupling.assign(noise, labels)
    rows = (points % len(images)).cpu()
    clean = images.fetch(rows)
    return mirrored(clean, points >= len(images)) if coupling.config.flips else clean, rows
