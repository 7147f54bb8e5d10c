"""The images of a split, decoded in memory or on demand, and the order in which training visits them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, require
from ..images import content_hash, to_model_range, to_uint8
from .decode import DECODE_CHUNK, Decoder, chunks


@dataclass
class ResidentImages:
    """All images of a split in one uint8 tensor, on any device.

    Attributes:
        name: the data set: `digits`, `mnist` or `cifar10`, a Hub id, or the last part of a local folder's path.
        split: the split, with a note in brackets if it was taken from the train split.
        labels: int64 [N] on the CPU, from 0 to the number of classes − 1, or None.
        pixels: uint8 [N, C, H, W], on the device of the last `to`.
        hub_id: the data set's id on the Hub; None for a local one.
        class_names: names of the classes of all splits, in the order of their labels.
        label_problem: why a classifier cannot be trained on these labels, as the message of an `InputError`; else None.
    """

    name: str
    split: str
    labels: Tensor | None
    pixels: Tensor
    hub_id: str | None = None
    class_names: tuple[str, ...] | None = None
    label_problem: str | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of shape and pixels: equal images have equal fingerprints, whatever their source."""
        return content_hash(self.pixels.shape, [self.pixels.cpu()])

    def to(self, device: torch.device | str) -> ResidentImages:
        """Move the uint8 images to `device`; returns self."""
        self.pixels = self.pixels.to(device)
        return self

    def fetch(self, indices: Tensor) -> Tensor:
        """Images `indices` (int64 [B]) as float32 [B, C, H, W] in [-1, 1], on the device of the images."""
        return to_model_range(self.pixels[indices.to(self.pixels.device, non_blocking=True)])

    def stream(self, batches: Iterable[Tensor], num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices [B], images [B, C, H, W]) for each index batch, in order; no workers are needed to decode."""
        for indices in batches:
            yield indices, self.fetch(indices)


@dataclass
class StreamedImages:
    """A split that is too large for memory and is decoded on demand; as `ResidentImages`, but without `pixels`."""

    name: str
    split: str
    labels: Tensor | None
    decoder: Decoder
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hub_id: str | None = None
    class_names: tuple[str, ...] | None = None
    label_problem: str | None = None

    def __len__(self) -> int:
        return len(self.decoder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return self.decoder.image_shape

    @cached_property
    def fingerprint(self) -> str:
        """The same value as with `ResidentImages`. The first use decodes the whole split."""
        decoded = (self.decoder.decode(chunk) for chunk in chunks(len(self)))
        return content_hash((len(self), *self.image_shape), decoded)

    def to(self, device: torch.device | str) -> StreamedImages:
        """Return images on `device` from now on; returns self."""
        self.device = torch.device(device)
        return self

    def fetch(self, indices: Tensor) -> Tensor:
        """Images `indices` (int64 [B]), decoded in this process, as float32 [B, C, H, W] in [-1, 1]."""
        return to_model_range(self.decoder.decode(indices.tolist()).to(self.device))

    def stream(self, batches: Iterable[Tensor], num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices [B], images [B, C, H, W]) for each index batch, in order, decoded by `num_workers` processes."""
        loader: Iterable[Any] = torch.utils.data.DataLoader(
            self.decoder,
            batch_sampler=(indices.tolist() for indices in batches),  # lazy: may be endless
            num_workers=num_workers,
            collate_fn=_as_decoded,
            pin_memory=self.device.type == "cuda",
        )
        for indices, images in loader:
            if isinstance(images, InputError):
                raise images
            yield indices, to_model_range(images.to(self.device, non_blocking=True))


def _as_decoded(batch: Any) -> Any:
    """The decoder's output, which is already a batch. A named function, because spawned processes have to import it."""
    return batch


def pixels_of(images: ResidentImages | StreamedImages, indices: Tensor | None = None) -> Tensor:
    """Stored images, uint8 [N, C, H, W] on the CPU, decoded in chunks; all of them by default."""
    indices = torch.arange(len(images)) if indices is None else indices
    return torch.cat([to_uint8(batch).cpu() for _, batch in images.stream(indices.split(DECODE_CHUNK))])


def evenly_spaced(images: Sized, count: int) -> Tensor:
    """Indices of `count` images, evenly spaced over the whole set (all images, if there are fewer): int64."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()


def training_order(num_samples: int, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless index batches, int64 [batch_size], where batch `k` depends on (`seed`, `k`) alone.

    Epoch e is a permutation drawn from (`seed`, e), split into ⌊num_samples / batch_size⌋ full batches; the remaining
    images are left out. A resumed run passes the number of finished batches as `start` and gets the batches of an
    uninterrupted run.

    Example:
        >>> order = training_order(10, 4, seed=0)
        >>> uninterrupted = [next(order) for _ in range(5)]
        >>> torch.equal(uninterrupted[4], next(training_order(10, 4, seed=0, start=4)))
        True
    """
    require(batch_size > 0, "batch_size", "be positive", batch_size)
    require(batch_size <= num_samples, "batch_size", f"be at most the {num_samples} images there are", batch_size)
    require(seed >= 0, "seed", "not be negative", seed)
    require(start >= 0, "start", "not be negative", start)
    return _training_order(num_samples, batch_size, seed, start)


def _training_order(num_samples: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    batches_per_epoch = num_samples // batch_size
    epoch, first = divmod(start, batches_per_epoch)
    while True:
        permutation = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_samples))
        for batch in range(first, batches_per_epoch):
            yield permutation[batch * batch_size : (batch + 1) * batch_size]
        epoch, first = epoch + 1, 0
