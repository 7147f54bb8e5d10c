"""Finished samples of few calls and their transport loss, for any batch in the memory of a small one.

An update compares the images of a whole chain with real ones, in several levels of features at once. The loss L needs
all images together, and the network's graph only one part of them at a time:

1. all images x_i are made without a graph, and their features ψ(x_i) are gathered over processes;
2. one problem gives the gradients G_i = ∂L/∂ψ(x_i);
3. part by part, the images are made again with a graph, and Σ_i ⟨G_i, ψ(x_i)⟩ is differentiated. By the chain rule this
   is the gradient of L, exactly.

Where one pass of one process makes them all, they are made once, with a graph.

A denoiser with classes is tuned on the joint law of image and label: generated pairs (x_i, y_i) are compared with real
ones, in levels that end in a scaled one-hot of the label. Every class has the same share of both sides in each update,
and classes are far apart, so that transport and kernels compare images within their class.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config import FewStepConfig
from ..data import evenly_spaced
from ..errors import require
from ..features import check_trained_on, class_counts, labels_of, load_feature_extractor
from ..images import thumbnails
from ..losses.priors import (
    denoiser_features,
    frechet_transport,
    network_features,
    sinkhorn_transport,
    with_labels,
)
from ..pipelines.classes import class_options
from ..schedules import Chain, Scheduler, prediction_type_of, record_calls
from ..seeds import keyed_generator
from ..transport import median_distance
from ..transport.kernel import drifting_loss, squared_mmd
from .batches import Images, Schedule, augmented
from .pretrained import check_classes
from .processes import gather_rows

SCALED_BY = 1000
"""Real images, evenly spaced, whose median distance is the unit of each level."""
FEWEST_NOISE_CALLS = 4
"""Calls from which a network of noise prediction can be tuned."""

PEERS: dict[str, Callable[..., Tensor]] = {
    "mmd": squared_mmd,
    "frechet": frechet_transport,
    "drifting": drifting_loss,
}
"""The objectives that stand beside the Sinkhorn divergence for comparison."""

Levels = tuple[Tensor, ...]


# --- The levels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedLevels:
    """What images are compared in: levels of a frozen network and pixels, each at median distance 1 for real images.

    Attributes:
        extract: images [B, C, H, W] to levels of features, [B, D] each.
        scales: one for each level, the pixels last.
        shallow_weight: weight of each level of features but the deepest, which has weight 1.
        pixel_weight: weight of the pixels; 0 for features alone.
        device: where images are expected.
        network: that of the features; None for the denoiser.
    """

    extract: Callable[[Tensor], Levels]
    scales: tuple[float, ...]
    shallow_weight: float
    pixel_weight: float
    device: torch.device
    network: nn.Module | None = None

    def __call__(self, images: Tensor) -> Levels:
        """The levels of images [B, C, H, W] in [-1, 1]; the gradient flows to the images."""
        return tuple(level / scale for level, scale in zip(self.raw(images), self.scales, strict=False))

    def raw(self, images: Tensor) -> Levels:
        """The levels before scaling."""
        levels = self.extract(images)
        return (*levels, thumbnails(images).flatten(1)) if self.pixel_weight > 0 else levels

    @property
    def deepest(self) -> int:
        """Index of the deepest level of features."""
        return len(self.scales) - 1 - (self.pixel_weight > 0)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each level in the loss."""
        pixels = (self.pixel_weight,) if self.pixel_weight > 0 else ()
        return (*(self.shallow_weight,) * self.deepest, 1.0, *pixels)


@torch.no_grad()
def compared_levels(config: FewStepConfig, images: Images, denoiser: Any, device: torch.device) -> ComparedLevels:
    """The levels of the configured network, or of the frozen denoiser at its lowest noise.

    Raises:
        InputError: a feature network of other data.
    """
    network: Any = None
    extract: Callable[[Tensor], Levels]
    if config.feature_extractor is None:
        extract = functools.partial(denoiser_features, denoiser, timestep=0)
    else:
        network = load_feature_extractor(config.feature_extractor).to(device)
        check_trained_on(network, images)
        extract = functools.partial(network_features, network)
    unscaled = ComparedLevels(extract, (), config.shallow_weight, config.pixel_weight, device, network)
    real = images.fetch(evenly_spaced(images, SCALED_BY)).to(device)
    return dataclasses.replace(unscaled, scales=tuple(median_distance(level) for level in unscaled.raw(real)))


# --- The loss ---------------------------------------------------------------------------------------------------------


def finished_loss(
    levels: Sequence[Tensor], reference: Sequence[Tensor], pair: Sequence[Tensor], weights: Sequence[float], *,
    objective: str, blur: float, scaling: float,
) -> Tensor:  # fmt: skip
    """The distance of finished images to real ones, averaged over levels by their weights; 0-d.

    Args:
        levels: of generated images, [N, D] each; the gradient flows.
        reference: of real images, [M, D] each.
        pair: of other generated images, independent of the first, for the self-term.
        weights: one for each level.
        objective: `"sinkhorn"`, or one of the `PEERS`.
        blur, scaling: of the Sinkhorn divergence.
    """
    total = levels[0].new_zeros(())
    for x, y, other, weight in zip(levels, reference, pair, weights, strict=True):
        if objective in PEERS:
            total = total + weight * PEERS[objective](x, y, x_pair=other)
        else:
            total = total + weight * sinkhorn_transport([x], [y], [other], blur=blur, scaling=scaling)
    return total / sum(weights)


@dataclass(frozen=True)
class FewStepBatch:
    """One forward pass of an update.

    Attributes:
        noise: rows of this process and pass, [B, C, H, W].
        gradients: ∂L/∂ψ of these rows for each level, [B, D] each.
        loss: L of the whole update, 0-d.
        finished: the images of all rows with their graph, where there is one pass; None where each pass makes its own.
        class_labels: of these rows, int64 [B]; None for an unconditional denoiser.
    """

    noise: Tensor
    gradients: Levels
    loss: Tensor
    finished: Tensor | None = None
    class_labels: Tensor | None = None


def few_step_batches(
    images: Images,
    unet: nn.Module,
    chain: Chain,
    levels: ComparedLevels,
    config: FewStepConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    start: int,
    labels: Tensor | None = None,
) -> Iterator[FewStepBatch]:
    """The passes of every update from `start` on. Noise and references are functions of (seed, update); each process
    takes its rows, and all solve the same problem.

    With `labels`, those of the data set [N], the generated images and the pair have the labels of the references.
    """
    passes = schedule.global_batch_size // schedule.forward_batch_size
    share = passes * config.train_batch_size
    in_one_pass = schedule.global_batch_size == config.train_batch_size
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    for update in range(start, schedule.num_updates):
        noise, other = (
            torch.randn(
                (schedule.global_batch_size, *images.image_shape),
                generator=keyed_generator(accelerator.device, config.seed, use, update),
                device=accelerator.device,
            )[rows].split(config.train_batch_size)
            for use in ("generated", "pair")
        )
        order = reference_rows(images, config, schedule, update, repeat=labels is not None)
        real_labels = None if labels is None else labels[order].to(accelerator.device)
        asked = None if real_labels is None else real_labels.repeat(schedule.global_batch_size // len(order))
        told = [None] * passes if asked is None else asked[rows].split(config.train_batch_size)
        finished = chain(unet, noise[0], told[0]) if in_one_pass else None
        with torch.no_grad():
            made = gathered(
                [
                    levels(chain(unet, *part) if finished is None else finished)
                    for part in zip(noise, told, strict=True)
                ],
                accelerator,
            )
            pair = gathered([levels(chain(unet, *part)) for part in zip(other, told, strict=True)], accelerator)
            reference = reference_levels(images, levels, config, accelerator, update, order)
        leaves = tuple(level.requires_grad_() for level in made)
        options: dict[str, Any] = {"objective": config.objective, "blur": config.blur, "scaling": config.scaling}
        with torch.enable_grad():
            loss = finished_loss(
                with_labels(leaves, asked),
                with_labels(reference, real_labels),
                with_labels(pair, asked),
                levels.weights,
                **options,
            )
            gradients = torch.autograd.grad(loss, leaves)
        own = [gradient[rows].split(config.train_batch_size) for gradient in gradients]
        for index, (part, classes) in enumerate(zip(noise, told, strict=True)):
            yield FewStepBatch(part, tuple(level[index] for level in own), loss.detach(), finished, classes)


def surrogate(levels: Levels, batch: FewStepBatch, schedule: Schedule) -> Tensor:
    """Σ ⟨G_i, ψ(x_i)⟩ over the rows of a pass, times the number of passes of all processes: the average over processes
    and accumulated passes is then the gradient of the loss."""
    passes = schedule.global_batch_size // len(batch.noise)
    return passes * sum(
        ((gradient * level).sum() for gradient, level in zip(batch.gradients, levels, strict=True)),
        start=batch.noise.new_zeros(()),
    )


def reference_rows(images: Images, config: FewStepConfig, schedule: Schedule, update: int, repeat: bool) -> Tensor:
    """The real images of an update, new ones every time: as many as asked for, or as there are. With `repeat` they are
    as many as asked for, and come again only after all others have."""
    count = config.num_reference_samples or schedule.global_batch_size
    order = torch.randperm(len(images), generator=keyed_generator("cpu", config.seed, "references", update))
    return order[torch.arange(count) % len(order)] if repeat else order[:count]


def reference_levels(
    images: Images,
    levels: ComparedLevels,
    config: FewStepConfig,
    accelerator: Accelerator,
    update: int,
    order: Tensor,
) -> Levels:
    """Levels of the real images `order`; each process extracts its share."""
    count = len(order)
    each = -(-count // accelerator.num_processes)  # shares are of one size: some references repeat, and are cut off
    own = (torch.arange(each) + each * accelerator.process_index) % count
    parts = []
    for part in own.split(config.train_batch_size):
        real = images.fetch(order[part]).to(accelerator.device)
        parts.append(levels(augmented(real, config, update, count, part)))
    return tuple(level[:count] for level in gathered(parts, accelerator))


def gathered(parts: Sequence[Levels], accelerator: Accelerator) -> Levels:
    """Levels of consecutive parts as one, over all processes in their order."""
    return tuple(gather_rows(torch.cat(level), accelerator) for level in zip(*parts, strict=True))


# --- The run ----------------------------------------------------------------------------------------------------------


def few_step_schedule(config: FewStepConfig, accelerator: Accelerator, images: Images) -> Schedule:
    """The length of the run, in which an epoch is the time between two checks. More images than the data set has may be
    generated in an update."""
    forward = config.train_batch_size * accelerator.num_processes
    size = forward * accelerator.gradient_accumulation_steps
    updates = config.max_train_steps or config.num_train_epochs * max(1, len(images) // size)
    return Schedule(size, forward, min(config.validation_steps, updates), updates)


def tuned_labels(source: Any, images: Images, config: FewStepConfig, schedule: Schedule) -> Tensor | None:
    """The labels of these images, int64 [N], for a pipeline whose denoiser has classes; None for an unconditional one.

    Raises:
        InputError: classes of other data, references that give classes other shares than the generated images have, or
            no network for the features, where the denoiser has no null label to stand for all classes.
    """
    if source.unet.config.get("num_class_embeds") is None:
        return None
    check_classes(source, tuple(class_counts(images)))
    needs_network = "be given for a denoiser without a null label"
    has_features = config.feature_extractor is not None or source.classes.null_label is not None
    require(has_features, "feature_extractor", needs_network, config.feature_extractor)
    size, count = schedule.global_batch_size, config.num_reference_samples
    equal = f"divide the {size} images of a training step, for equal shares of each class"
    require(count is None or size % count == 0, "num_reference_samples", equal, count)
    return labels_of(images)


def few_step_pipeline(source: Any, unet: nn.Module, scheduler: Scheduler, num_inference_steps: int) -> Any:
    """`source` with the tuned denoiser and the classes it knows, and its number of calls in the configuration of the
    scheduler."""
    record_calls(scheduler, num_inference_steps)
    parts = source.components | {"unet": unet, "scheduler": scheduler, "guidance_field": None}
    names = inspect.signature(type(source).__init__).parameters
    return type(source)(**{name: part for name, part in parts.items() if name in names}, **class_options(source))


def check_prediction(scheduler: Scheduler, num_inference_steps: int) -> None:
    """Refuse noise prediction with fewer than `FEWEST_NOISE_CALLS` calls.

    Raises:
        InputError: with the reason.
    """
    enough = prediction_type_of(scheduler) != "epsilon" or num_inference_steps >= FEWEST_NOISE_CALLS
    reason = (
        f"be at least {FEWEST_NOISE_CALLS} for noise prediction, whose first call says next to nothing of the image; "
        "train with flow_prediction, v_prediction or sample"
    )
    require(enough, "num_inference_steps", reason, num_inference_steps)
