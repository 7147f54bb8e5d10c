"""One table of data sets, and their images in [-1, 1] for a training loop.

| `dataset`                 | what it is                                                                    |
|---------------------------|-------------------------------------------------------------------------------|
| `digits`                  | scikit-learn's 1,797 handwritten digits, grey 8×8, embedded: nothing to fetch |
| `mnist`                   | `ylecun/mnist`, grey 28×28                                                    |
| `cifar10`                 | `uoft-cs/cifar10`, RGB 32×32                                                  |
| a folder                  | parquet or arrow files in a Hub layout, `save_to_disk` output, or image files |
| anything else             | a data set's id on the Hub                                                    |

Where the environment variable `OT_DIFFUSERS_DATASETS` names a folder with `mnist/` or `cifar10/` in their Hub layouts,
these are read from there.

Every data set has the splits `train`, `validation` and `test`. What it lacks is cut out of its train split,
always in the same way: 1/6 for `test`, then 1/12 of the remaining images for `validation`. A test split that exists is
used as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from .errors import InputError, require
from .images import to_model_range, to_uint8, to_unit_range

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ResidentImages",
    "StreamedImages",
    "load_images",
    "pixels_of",
    "to_model_range",
    "to_uint8",
    "to_unit_range",
    "training_order",
]

DATASETS_VARIABLE = "OT_DIFFUSERS_DATASETS"
HUB_IDS = {"digits": "sklearn-docs/digits", "mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
SPLITS = ("train", "validation", "test")
VALIDATION_NAMES = ("validation", "valid", "val")
TEST_FRACTION = 1 / 6
VALIDATION_FRACTION = 1 / 12
DECODE_CHUNK = 1000
GREY_MODES = ("1", "L", "LA")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits: Pillow's conversion would clip them


def load_images(
    dataset: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    max_resident_bytes: int = 2 * 2**30,
) -> ResidentImages | StreamedImages:
    """One split of a data set: decoded into one tensor, or decoded as needed if that would exceed `max_resident_bytes`.

    Args:
        dataset: a name from the table above, a local folder, or a Hub id.
        split: `"train"`, `"validation"` or `"test"`.
        image_column: default: the first column that holds images.
        label_column: a column of integers. Default: `label`, where that is one; without it `labels` is None.
        image_size: scale the shorter side to this length (bilinear, antialiased), crop the centre. Default: as stored.
        channels: 1 (grey) or 3 (RGB). Default: as stored.
        max_resident_bytes: limit for uint8 images held in memory.

    Raises:
        InputError: for a data set, column, split or image that is missing, unreadable or of the wrong kind.

    Example:
        >>> digits = load_images("digits", "test")
        >>> len(digits), digits.image_shape, digits.fetch(torch.tensor([0, 1])).shape
        (540, (1, 8, 8), torch.Size([2, 1, 8, 8]))
    """
    require(split in SPLITS, "split", f"be one of {', '.join(SPLITS)}", split)
    require(image_size is None or image_size > 0, "image_size", "be positive", image_size)
    require(channels in (None, 1, 3), "channels", "be 1 (grey) or 3 (RGB)", channels)

    table, origin = _take_split(_open(dataset), dataset, split)
    require(len(table) > 0, "dataset", f"have images in its {split} split", dataset)
    labels = _read_labels(table, label_column)
    column = _find_image_column(table, image_column)
    decoder = _Decoder(_undecoded(table, column), column, f"{dataset} {split}", image_size, channels)

    folder = local_folder(dataset)
    name = dataset if folder is None else folder.resolve().name
    hub_id = HUB_IDS.get(dataset, dataset if folder is None else None)
    if len(decoder) * int(np.prod(decoder.image_shape)) > max_resident_bytes:
        return StreamedImages(name, origin, labels, decoder, hub_id=hub_id)
    return ResidentImages(name, origin, labels, decoder.decode_all(), hub_id)


def local_folder(dataset: str) -> Path | None:
    """The folder that `dataset` names on this machine; None for a name of the table above, or a Hub id."""
    folder = Path(dataset).expanduser()
    return folder if dataset not in HUB_IDS and folder.is_dir() else None


@dataclass
class ResidentImages:
    """All images of a split in one uint8 tensor, on any device.

    Attributes:
        name: the data set: a name of the table above, a Hub id, or the last part of a local folder's path.
        split: the split, and in brackets how it was cut if the data set does not come with it.
        labels: int64 [N] on the CPU, or None.
        pixels: uint8 [N, C, H, W], on the device of the last `to`.
        hub_id: the data set's id on the Hub; None for a local one.
    """

    name: str
    split: str
    labels: Tensor | None
    pixels: Tensor
    hub_id: str | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape and bytes of the images: the same images have the same value wherever they came from."""
        return _content_hash(len(self), self.image_shape, [self.pixels.cpu()])

    def to(self, device: torch.device | str) -> ResidentImages:
        """Move the uint8 images to `device`; returns self."""
        self.pixels = self.pixels.to(device)
        return self

    def fetch(self, indices: Tensor) -> Tensor:
        """Images `indices` (int64 [B]) as float32 [B, C, H, W] in [-1, 1], on the device of the images."""
        return to_model_range(self.pixels[indices.to(self.pixels.device, non_blocking=True)])

    def stream(self, batches: Iterable[Tensor], num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices [B], images [B, C, H, W]) for each index batch, in order. No decoding, so workers are not used."""
        for indices in batches:
            yield indices, self.fetch(indices)


@dataclass
class StreamedImages:
    """A split too large for memory, decoded as needed: the interface of `ResidentImages`, without `pixels`."""

    name: str
    split: str
    labels: Tensor | None
    decoder: _Decoder
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hub_id: str | None = None

    def __len__(self) -> int:
        return len(self.decoder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.decoder.image_shape

    @cached_property
    def fingerprint(self) -> str:
        """The value that `ResidentImages` would have. The first use decodes the whole split."""
        chunks = (self.decoder.decode(chunk) for chunk in _chunks(len(self)))
        return _content_hash(len(self), self.image_shape, chunks)

    def to(self, device: torch.device | str) -> StreamedImages:
        """Return images on `device` from now on; returns self."""
        self.device = torch.device(device)
        return self

    def fetch(self, indices: Tensor) -> Tensor:
        """Images `indices` (int64 [B]), decoded now, as float32 [B, C, H, W] in [-1, 1]."""
        return to_model_range(self.decoder.decode(indices.tolist()).to(self.device))

    def stream(self, batches: Iterable[Tensor], num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices [B], images [B, C, H, W]) for each index batch, in order, decoded by `num_workers` processes."""
        loader: Iterable[Any] = torch.utils.data.DataLoader(
            self.decoder,
            batch_sampler=(indices.tolist() for indices in batches),  # lazy: may be endless
            num_workers=num_workers,
            collate_fn=lambda batch: batch,
            pin_memory=self.device.type == "cuda",
        )
        for indices, images in loader:
            if isinstance(images, InputError):
                raise images
            yield indices, to_model_range(images.to(self.device, non_blocking=True))


def pixels_of(images: ResidentImages | StreamedImages, indices: Tensor | None = None) -> Tensor:
    """Images as they are stored, uint8 [N, C, H, W] on the CPU, decoded in chunks; all of them by default."""
    indices = torch.arange(len(images)) if indices is None else indices
    return torch.cat([to_uint8(batch).cpu() for _, batch in images.stream(indices.split(DECODE_CHUNK))])


def evenly_spaced(images: ResidentImages | StreamedImages, count: int) -> Tensor:
    """Numbers of `count` images over the whole set, of all where it has fewer: int64."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()


def training_order(num_samples: int, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless index batches, int64 [batch_size], where batch `k` depends on (`seed`, `k`) alone.

    Epoch e is a permutation drawn from (`seed`, e) and cut into ⌊num_samples / batch_size⌋ whole batches; the rest is
    left out. A resumed run passes the step it has reached as `start` and goes on as if it had never been interrupted.

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


# Opening a data set ---------------------------------------------------------------------------------------------------


def _open(dataset: str) -> datasets.DatasetDict:
    """The splits of `dataset` under the names they come with."""
    import datasets

    known = ", ".join(HUB_IDS)
    require(dataset != "", "dataset", f"be {known}, a folder or a Hub id", dataset)
    if dataset == "digits":
        return _load_digits()
    mirror = Path(os.environ.get(DATASETS_VARIABLE, os.devnull)) / dataset
    folder = mirror if dataset in HUB_IDS and mirror.is_dir() else local_folder(dataset)
    if folder is not None:
        return _open_folder(folder)
    looks_like_path = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    require(not looks_like_path, "dataset", f"be {known}, an existing folder or a Hub id", dataset)
    hub_id = HUB_IDS.get(dataset, dataset)
    try:
        return datasets.load_dataset(hub_id)
    except (OSError, ValueError, RuntimeError) as error:
        requirement = f"be {known}, an existing folder or a Hub id that can be loaded"
        reason = f"no such folder here, and loading {hub_id!r} from the Hub failed: {_first_line(error)}"
        raise InputError(f"`dataset` must {requirement}, got {dataset!r} ({reason})") from error


def _open_folder(folder: Path) -> datasets.DatasetDict:
    import datasets

    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))
        if (folder / "state.json").exists():
            return datasets.DatasetDict(train=datasets.load_from_disk(str(folder)))
        return datasets.load_dataset(str(folder))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        requirement = "be a folder with parquet, arrow or image files"
        raise InputError(f"`dataset` must {requirement}, got {str(folder)!r} ({_first_line(error)})") from error


def _load_digits() -> datasets.DatasetDict:
    """scikit-learn's digits, 0 … 16 rescaled to 0 … 255, in 1,152 train, 105 validation and 540 test images."""
    import datasets
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.round(raw.images * (255 / 16)).astype(np.uint8)
    rest, test = _stratified_cut(raw.target, 540)
    train, validation = _stratified_cut(raw.target[rest], _validation_size(len(rest)))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    indices = {"train": rest[train], "validation": rest[validation], "test": test}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [PIL.Image.fromarray(image) for image in pixels[chosen]], "label": raw.target[chosen]},
                features=features,
            )
            for split, chosen in indices.items()
        }
    )


# Splits ---------------------------------------------------------------------------------------------------------------


def _take_split(tables: datasets.DatasetDict, dataset: str, split: str) -> tuple[datasets.Dataset, str]:
    """The images of `split`, and its name with a note on how it was cut, if it was."""
    names = list(tables)
    train_name = names[0] if len(names) == 1 and names[0] not in ("test", *VALIDATION_NAMES) else "train"
    if split == "test" and "test" in tables:
        return tables["test"], "test"
    own_validation = next((name for name in VALIDATION_NAMES if name in tables), None)
    if split == "validation" and own_validation:
        return tables[own_validation], own_validation
    require(train_name in tables, "dataset", f"have a train split beside {', '.join(names)}", dataset)

    train, note = tables[train_name], ""
    if "test" not in tables:
        rest, test = _cut(len(train), round(len(train) * TEST_FRACTION))
        if split == "test":
            return train.select(test), f"test ({len(test)} of {len(train)} {train_name} images)"
        train, note = train.select(rest), " without test"
    if own_validation:
        return train, f"train{f' ({train_name}{note})' if note else ''}"
    rest, validation = _cut(len(train), _validation_size(len(train)))
    chosen = {"train": rest, "validation": validation}[split]
    return train.select(chosen), f"{split} ({len(chosen)} of {len(train)} {train_name} images{note})"


def _validation_size(num_samples: int) -> int:
    """5,000 of 60,000, and in proportion."""
    return round(num_samples * VALIDATION_FRACTION)


def _cut(num_samples: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, cut), each in the original order; depends on the two numbers alone."""
    permutation = np.random.default_rng(0).permutation(num_samples)
    return np.sort(permutation[size:]), np.sort(permutation[:size])


def _stratified_cut(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_cut`, every class within one image of its share of `size`."""
    permutation = np.random.default_rng(0).permutation(len(labels))
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        members = permutation[labels[permutation] == label]
        quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = permutation[np.argsort(quantile[permutation], kind="stable")]
    return np.sort(order[size:]), np.sort(order[:size])


# Columns --------------------------------------------------------------------------------------------------------------


def _find_image_column(table: datasets.Dataset, image_column: str | None) -> str:
    import datasets

    columns = ", ".join(table.column_names)
    if image_column is not None:
        require(image_column in table.column_names, "image_column", f"be one of the columns {columns}", image_column)
        return image_column
    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    found += [name for name in ("image", "img") if name in table.column_names]
    require(len(found) > 0, "image_column", f"be named: none is known to hold images among {columns}", None)
    return found[0]


def _undecoded(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """`table` with only the image column, whose values stay encoded files: `{"bytes": …, "path": …}`."""
    import datasets

    try:
        return table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"`image_column` must hold images, got {column!r} ({_first_line(error)})") from error


def _read_labels(table: datasets.Dataset, label_column: str | None) -> Tensor | None:
    """int64 [N] on the CPU."""
    column = label_column or "label"
    if column not in table.column_names:
        columns = ", ".join(table.column_names)
        require(label_column is None, "label_column", f"be one of the columns {columns}", label_column)
        return None
    values = np.asarray(table.select_columns(column).with_format("numpy")[:][column])
    if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
        return torch.from_numpy(values.astype(np.int64))
    require(label_column is None, "label_column", "hold one integer per image", label_column)
    return None


# Decoding -------------------------------------------------------------------------------------------------------------


class _Decoder(torch.utils.data.Dataset):
    """uint8 pixels of a table of encoded images, all of the shape of the first."""

    def __init__(
        self, table: datasets.Dataset, column: str, where: str, image_size: int | None, channels: int | None
    ) -> None:
        self.table, self.column, self.where = table, column, where
        self.image_size, self.channels = image_size, channels
        first = self._decode_one(table[0][column], 0)
        self.image_shape: tuple[int, int, int] = (first.shape[0], first.shape[1], first.shape[2])

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor | InputError]:
        """One batch for a DataLoader. A worker hands an error over as a value, which keeps its message one line."""
        try:
            return torch.tensor(indices), self.decode(indices)
        except InputError as error:
            return torch.tensor(indices), error

    def decode_all(self) -> Tensor:
        """uint8 [N, C, H, W]."""
        pixels = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        for chunk in _chunks(len(self)):
            pixels[chunk.start : chunk.stop] = self.decode(chunk)
        return pixels

    def decode(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]."""
        pixels = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        for row, (index, value) in enumerate(zip(indices, self.table[indices][self.column], strict=True)):
            image = self._decode_one(value, index)
            self._require_same_shape(image.shape, index)
            pixels[row] = torch.from_numpy(image)
        return pixels

    def _decode_one(self, value: dict[str, Any] | None, index: int) -> np.ndarray:
        """uint8 [C, H, W]."""
        import datasets

        if value is None:
            raise InputError(f"`dataset` must have an image in every row, got none in row {index} of {self.where}")
        try:
            image = datasets.Image().decode_example(value)
        except Exception as error:  # Pillow's readers raise what they like on damaged files
            place = f"image {index} of {self.where}, file {value.get('path')}"
            raise InputError(f"`dataset` must hold readable images, got {place} ({_first_line(error)})") from error
        require(image.mode not in DEEP_MODES, "dataset", "hold 8-bit images", f"{image.mode} in image {index}")
        return _to_pixels(image, self.image_size, self.channels)

    def _require_same_shape(self, shape: tuple[int, ...], index: int) -> None:
        if shape == self.image_shape:
            return
        argument = "channels" if shape[1:] == self.image_shape[1:] else "image_size"
        first, this = ("×".join(map(str, size)) for size in (self.image_shape, shape))
        requirement = f"be given for images of different shape ({self.where}: image 0 is {first}, image {index} {this})"
        raise InputError(f"`{argument}` must {requirement}, got None")


def _to_pixels(image: PIL.Image.Image, image_size: int | None, channels: int | None) -> np.ndarray:
    """uint8 [C, H, W], scaled and cropped to `image_size`² if it is given."""
    channels = channels or (1 if image.mode in GREY_MODES else 3)
    image = image.convert("L" if channels == 1 else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = PIL.ImageOps.fit(image, (image_size, image_size), method=PIL.Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _chunks(num_samples: int) -> Iterator[range]:
    for start in range(0, num_samples, DECODE_CHUNK):
        yield range(start, min(start + DECODE_CHUNK, num_samples))


def _content_hash(num_samples: int, image_shape: tuple[int, int, int], chunks: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(repr((num_samples, *image_shape)).encode())
    for chunk in chunks:
        digest.update(chunk.contiguous().numpy().data)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
