"""The order of the data and the noise: functions of (seed, update) alone, divided between processes and passes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import FLOW, DiffusionConfig, PriorConfig, TrainingConfig
from ..data import ResidentImages, StreamedImages, training_order
from ..errors import require
from ..features import class_counts, labels_of
from ..images import random_crop_and_flip
from ..models.semidiscrete_coupling import SemidiscreteCoupling, mirrored
from ..schedules import Scheduler, alpha_sigma, diffused, prediction_type_of, training_target
from ..seeds import key, keyed_generator
from .coupling import assigned_noise

Images = ResidentImages | StreamedImages


@dataclass(frozen=True)
class Schedule:
    """The length of a run: updates per epoch and in total, and the images that all processes together see in one update
    and in one forward pass."""

    global_batch_size: int
    forward_batch_size: int
    updates_per_epoch: int
    num_updates: int

    def epoch(self, update: int) -> int:
        """Completed epochs after `update` updates."""
        return update // self.updates_per_epoch

    def ends_epoch(self, update: int) -> bool:
        """Whether `update` updates complete an epoch, or the run."""
        return update % self.updates_per_epoch == 0 or update == self.num_updates

    def wants_checkpoint(self, update: int, config: TrainingConfig) -> bool:
        """Whether to save before the end of the run, which saves in any case."""
        return update < self.num_updates and update % (config.checkpointing_steps or self.updates_per_epoch) == 0

    def wants_samples(self, update: int, config: DiffusionConfig | PriorConfig) -> bool:
        """Whether to draw a sample grid before the end of the run, which draws one when the model is saved."""
        epoch_ends = update < self.num_updates and update % self.updates_per_epoch == 0
        return epoch_ends and self.epoch(update) % config.sample_epochs == 0


def make_schedule(config: TrainingConfig, accelerator: Accelerator, images: Images) -> Schedule:
    """The length of the run.

    Raises:
        InputError: a global batch larger than the data set.
    """
    forward = config.train_batch_size * accelerator.num_processes
    size = forward * accelerator.gradient_accumulation_steps
    require(size <= len(images), "train_batch_size", f"give a global batch of at most {len(images)} images", size)
    updates_per_epoch = len(images) // size
    return Schedule(
        size, forward, updates_per_epoch, config.max_train_steps or config.num_train_epochs * updates_per_epoch
    )


@dataclass(frozen=True)
class DiffusionBatch:
    """A process' rows of a global batch, noised.

    Attributes:
        indices: [B] rows of the data set.
        global_indices: [G] rows that any process sees in this update.
        noisy: x_t, [B, C, H, W].
        timesteps: [B].
        target: what the model should predict, [B, C, H, W].
        alpha, sigma: [B], noise level.
        update: number of the update, from 0.
        class_labels: what the model is told of the images, int64 [B]; None for an unconditional one.
    """

    indices: Tensor
    global_indices: Tensor
    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    alpha: Tensor
    sigma: Tensor
    update: int
    class_labels: Tensor | None = None


def index_batches(
    images: Images, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, start: int
) -> Iterator[tuple[int, Tensor, slice]]:
    """(update, global indices [G], this process' rows of them) for each forward pass from update `start` on."""
    size = config.train_batch_size
    order = training_order(len(images), schedule.global_batch_size, seed=config.seed, start=start)
    for update, global_indices in zip(range(start, schedule.num_updates), order, strict=False):
        for micro in range(schedule.global_batch_size // schedule.forward_batch_size):
            first = (micro * accelerator.num_processes + accelerator.process_index) * size
            yield update, global_indices, slice(first, first + size)


def image_batches(
    images: Images,
    config: TrainingConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    start: int,
    coupling: SemidiscreteCoupling | None = None,
) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
    """As `index_batches`, with the images, [B, C, H, W] in [-1, 1] on the training device.

    They are moved and flipped at random where the configuration says so; with a coupling, which has flips of its own,
    they are those that the noise of the update is assigned to.
    """
    passes = index_batches(images, config, schedule, accelerator, start)
    if coupling is not None:
        assert isinstance(config, DiffusionConfig)
        passes = coupled_indices(passes, images, config, accelerator, coupling)
    passes, ahead = itertools.tee(passes)
    rows = (points[part] % len(images) for _, points, part in ahead)
    for (update, points, part), (_, clean) in zip(passes, images.stream(rows, config.num_workers), strict=True):
        clean = clean.to(accelerator.device, non_blocking=True)
        if coupling is None:
            clean = augmented(clean, config, update, len(points), part)
        elif coupling.config.flips:
            clean = mirrored(clean, points[part] >= len(images))
        yield update, points % len(images), part, clean


def coupled_indices(
    passes: Iterator[tuple[int, Tensor, slice]],
    images: Images,
    config: DiffusionConfig,
    accelerator: Accelerator,
    coupling: SemidiscreteCoupling,
) -> Iterator[tuple[int, Tensor, slice]]:
    """`passes` with the points of the coupling that the noise of each update is assigned to.

    In a coupling of classes the noise goes to images of the same classes as those of the pass: the order of the data
    decides the labels, and the noise, which knows nothing of them, the images.
    """
    shape = torch.Size(images.image_shape)
    for update, same_update in itertools.groupby(passes, key=operator.itemgetter(0)):
        forward_passes = list(same_update)
        indices = forward_passes[0][1]
        noise, _ = update_noise(len(indices), shape, config, accelerator, update)
        labels = None if coupling.config.num_classes is None else labels_of(images)[indices]
        points = coupling.assign(noise, labels).cpu()
        yield from ((update, points, part) for _, _, part in forward_passes)


def augmented(images: Tensor, config: TrainingConfig, update: int, count: int, part: slice) -> Tensor:
    """Images [B, C, H, W] moved and flipped at random: rows `part` of the draws for all `count` images of an update."""
    if not config.random_flip and not config.crop_padding:
        return images
    generator = keyed_generator(images.device, config.seed, "augment", update)
    draws = torch.rand((count, 3), generator=generator, device=images.device)[part]
    return random_crop_and_flip(images, padding=config.crop_padding, flip=config.random_flip, draws=draws)


def diffusion_batches(
    images: Images,
    scheduler: Scheduler,
    config: DiffusionConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    start: int = 0,
    coupling: SemidiscreteCoupling | None = None,
) -> Iterator[DiffusionBatch]:
    """Noised batches from update `start` on, which do not depend on the split over processes and accumulation.

    With a semi-discrete coupling the noise is drawn first and decides the images; without one, images come in the order
    of `training_order`.
    """
    assigned = AssignedNoise(images, config, schedule, accelerator) if config.noise_coupling == "assignment" else None
    null_label = len(class_counts(images)) if config.class_conditional else None
    for update, indices, part, clean in image_batches(images, config, schedule, accelerator, start, coupling):
        noise, timesteps = update_noise(len(indices), clean.shape[1:], config, accelerator, update)
        if assigned is not None:
            noise = assigned.of_update(update)
        torch.manual_seed(key(config.seed, "dropout", update, part.start))
        labels: Tensor | None = None
        if null_label is not None:
            labels = told_labels(labels_of(images)[indices], null_label, config, accelerator, update)[part]
        yield noised_batch(clean, noise[part], timesteps[part], scheduler, indices, indices[part], update, labels)


class AssignedNoise:
    """The noise of every update, assigned to the images of a whole pool of updates by optimal transport.

    A pool has `coupling_batch_size` images, or those of one update if it has more. Every process solves the same
    problem, so that the pairs do not depend on the number of processes. For a model with classes, the noise of a class
    stays within the class.
    """

    def __init__(self, images: Images, config: DiffusionConfig, schedule: Schedule, accelerator: Accelerator) -> None:
        self._arguments = images, config, schedule.global_batch_size, accelerator
        self._num_updates = max(1, config.coupling_batch_size // schedule.global_batch_size)
        self._first, self._noise = -1, tuple[Tensor, ...]()

    def of_update(self, update: int) -> Tensor:
        """The noise of all images of the update, [G, C, H, W], in their order."""
        first = update - update % self._num_updates
        if first != self._first:
            self._first, self._noise = first, self._assigned_from(first)
        return self._noise[update - first]

    def _assigned_from(self, first: int) -> tuple[Tensor, ...]:
        images, config, size, accelerator = self._arguments
        clean, noise, labels = [], [], []
        within_classes = config.class_conditional and not config.couple_across_classes
        order = training_order(len(images), size, seed=config.seed, start=first)
        for update, indices in zip(range(first, first + self._num_updates), order, strict=False):
            batch = images.fetch(indices).to(accelerator.device)
            clean.append(augmented(batch, config, update, size, slice(None)))
            noise.append(update_noise(size, batch.shape[1:], config, accelerator, update)[0])
            labels.append(labels_of(images)[indices] if within_classes else torch.zeros_like(indices))
        generator = keyed_generator(accelerator.device, config.seed, "plan", first)
        points, assigned, classes = torch.cat(clean), torch.cat(noise), torch.cat(labels).to(accelerator.device)
        for label in classes.unique():
            rows = classes == label
            assigned[rows] = assigned_noise(points[rows], assigned[rows], generator)
        return assigned.split(size)


def update_noise(
    num_samples: int, image_shape: torch.Size, config: DiffusionConfig, accelerator: Accelerator, update: int
) -> tuple[Tensor, Tensor]:
    """Noise and timesteps of all images of an update, see `draw_noise`."""
    generator = keyed_generator(accelerator.device, config.seed, "noise", update)
    return draw_noise(num_samples, image_shape, config, generator)


def told_labels(
    labels: Tensor, null_label: int, config: DiffusionConfig, accelerator: Accelerator, update: int
) -> Tensor:
    """What the model is told of all images of an update, int64 [G]: their `labels`, or for a random `class_dropout` of
    them the null label."""
    generator = keyed_generator(accelerator.device, config.seed, "class dropout", update)
    untold = torch.rand(len(labels), generator=generator, device=accelerator.device) < config.class_dropout
    return labels.to(accelerator.device).masked_fill(untold, null_label)


def noised_batch(
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: Scheduler,
    global_indices: Tensor,
    indices: Tensor,
    update: int,
    class_labels: Tensor | None = None,
) -> DiffusionBatch:
    """x_t = α_t x0 + σ_t ε and the target of the scheduler's prediction type."""
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    target = training_target(clean, noise, alpha, sigma, prediction_type_of(scheduler))
    noisy = diffused(clean, noise, alpha, sigma)
    return DiffusionBatch(indices, global_indices, noisy, timesteps, target, alpha, sigma, update, class_labels)


def draw_noise(
    num_samples: int, image_shape: torch.Size, config: DiffusionConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ε [N, C, H, W] and timesteps [N] by the configuration's distribution, on the generator's device. Timesteps are
    integers below T, or real numbers up to T for flow matching."""
    device = generator.device
    noise = torch.randn((num_samples, *image_shape), generator=generator, device=device)
    uniform = torch.rand(num_samples, generator=generator, device=device)
    length = config.max_timestep or config.num_train_timesteps
    match config.timestep_sampler:
        case "quadratic":
            position = length * uniform**2
        case "log_uniform":
            position = (length**uniform).ceil() - 1
        case "logit_normal":
            position = length * torch.special.ndtri(uniform).sigmoid()
        case _:
            position = length * uniform
    if config.prediction_type == FLOW:
        return noise, position
    return noise, position.long().clamp(max=length - 1)
