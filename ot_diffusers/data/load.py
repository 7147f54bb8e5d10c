"""Opens a data set by name: from the Hub, a folder of pictures or tables, or the embedded digits."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import yaml

from ..errors import InputError, require
from .decode import Decoder, first_line
from .images import ResidentImages, StreamedImages
from .labels import LabelReader
from .pictures import Listing, list_folder, picture_tables
from .splits import SPLIT_OF, SPLITS, stratified_cut, take_split, validation_size

if TYPE_CHECKING:
    import datasets

DATASETS_VARIABLE = "OT_DIFFUSERS_DATASETS"
HUB_IDS = {"digits": "sklearn-docs/digits", "mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
MAX_RESIDENT_BYTES = 2 * 2**30
PLACES = ("dataset_config_name", "dataset_revision", "data_dir")
DATA_OPTIONS = (*PLACES, "image_column", "label_column", "image_size", "channels")
"""Options of `load_images` that commands accept."""


def load_images(
    dataset: str,
    split: str = "train",
    *,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    data_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    max_resident_bytes: int = MAX_RESIDENT_BYTES,
) -> ResidentImages | StreamedImages:
    """One split of a data set: decoded into one tensor, or decoded on demand if that would exceed `max_resident_bytes`.

    Args:
        dataset: a name from the table in `ot_diffusers.data`, a local folder, or a Hub id.
        split: `"train"`, `"validation"` or `"test"`.
        dataset_config_name: a configuration of the data set, for one that has several.
        dataset_revision: a branch, tag or commit of a data set on the Hub.
        data_dir: a folder within the data set; by default all of it.
        image_column: a column of images; by default `image`, or the only column of images.
        label_column: a column of integers, strings or booleans; by default `label`, else `labels`. Without such a
            column, `labels` is None.
        image_size: scale the shorter side to this length (bilinear, antialiased) and crop the centre; by default images
            keep their size.
        channels: 1 (grey) or 3 (RGB); by default images keep their channels.
        max_resident_bytes: memory limit of the decoded uint8 images.

    Raises:
        InputError: a data set, column, split or image is missing, unreadable or of the wrong kind.

    Example:
        >>> import torch
        >>> digits = load_images("digits", "test")
        >>> len(digits), digits.image_shape, digits.fetch(torch.tensor([0, 1])).shape
        (540, (1, 8, 8), torch.Size([2, 1, 8, 8]))
    """
    require(split in SPLITS, "split", f"be one of {', '.join(SPLITS)}", split)
    opened = open_images(
        dataset,
        dataset_config_name=dataset_config_name,
        dataset_revision=dataset_revision,
        data_dir=data_dir,
        image_column=image_column,
        label_column=label_column,
        image_size=image_size,
        channels=channels,
    )
    return opened.load(split, max_resident_bytes)


def open_images(
    dataset: str,
    *,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    data_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> ImageSource:
    """A data set whose splits can be loaded one by one; the arguments are those of `load_images`.

    Raises:
        InputError: the data set is missing or unreadable, or an option is out of range.
    """
    require(image_size is None or image_size > 0, "image_size", "be positive", image_size)
    require(channels in (None, 1, 3), "channels", "be 1 (grey) or 3 (RGB)", channels)
    tables = _open(dataset, dataset_config_name, dataset_revision, data_dir)
    return ImageSource(dataset, tables, image_column, label_column, image_size, channels)


@dataclass
class ImageSource:
    """An opened data set: its tables by split, and the options for reading their images."""

    dataset: str
    tables: datasets.DatasetDict
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    channels: int | None = None

    @cached_property
    def labels(self) -> LabelReader:
        """The numbering of the classes of all splits."""
        return LabelReader(self.tables, self.label_column)

    def has(self, split: str) -> bool:
        """Whether a split contains images."""
        return len(take_split(self.tables, self.dataset, split)[0]) > 0

    def load(self, split: str, max_resident_bytes: int = MAX_RESIDENT_BYTES) -> ResidentImages | StreamedImages:
        """The images of one split, see `load_images`."""
        table, origin = take_split(self.tables, self.dataset, split)
        require(len(table) > 0, "dataset", f"have images in its {split} split", self.dataset)
        labels, problem = self.labels.read(table)
        column = _find_image_column(table, self.image_column)
        where = f"{self.dataset} {split}"
        decoder = Decoder(_undecoded(table, column), column, where, self.image_size, self.channels)

        folder = local_folder(self.dataset)
        attributes: dict[str, Any] = {
            "hub_id": HUB_IDS.get(self.dataset, self.dataset if folder is None else None),
            "class_names": self.labels.class_names,
            "label_problem": problem,
        }
        name = self.dataset if folder is None else folder.resolve().name
        if len(decoder) * int(np.prod(decoder.image_shape)) > max_resident_bytes:
            return StreamedImages(name, origin, labels, decoder, **attributes)
        return ResidentImages(name, origin, labels, decoder.decode_all(), **attributes)


def local_folder(dataset: str) -> Path | None:
    """The local folder with the name `dataset`; None for a name in `HUB_IDS` or a Hub id."""
    folder = Path(dataset).expanduser()
    return folder if dataset not in HUB_IDS and folder.is_dir() else None


# Opening a data set ---------------------------------------------------------------------------------------------------


def _open(
    dataset: str, name: str | None = None, revision: str | None = None, data_dir: str | None = None
) -> datasets.DatasetDict:
    """The splits of `dataset` under their original names."""
    import datasets

    names = ", ".join(HUB_IDS)
    require(dataset != "", "dataset", f"be {names}, a folder or a Hub id", dataset)
    if dataset == "digits":
        for option, value in zip(PLACES, (name, revision, data_dir), strict=True):
            require(value is None, option, "be none for the embedded digits", value)
        return _load_digits()
    mirror = Path(os.environ.get(DATASETS_VARIABLE, os.devnull)) / dataset
    folder = mirror if dataset in HUB_IDS and mirror.is_dir() else local_folder(dataset)
    if folder is not None:
        require(revision is None, "dataset_revision", "be none for a local data set", revision)
        inside = folder / (data_dir or "")
        require(inside.is_dir(), "data_dir", f"be a folder in {str(folder)!r}", data_dir)
        return _open_folder(inside, name)
    looks_like_path = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    require(not looks_like_path, "dataset", f"be {names}, an existing folder or a Hub id", dataset)
    hub_id = HUB_IDS.get(dataset, dataset)
    try:
        return datasets.load_dataset(hub_id, name, data_dir=data_dir, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        _check_config_name(error, name)
        requirement = f"be {names}, an existing folder or a Hub id that can be loaded"
        reason = f"no such folder here, and loading {hub_id!r} from the Hub failed: {first_line(error)}"
        raise InputError(f"`dataset` must {requirement}, got {dataset!r} ({reason})") from error


def _check_config_name(error: Exception, name: str | None) -> None:
    """Where `datasets` asks for another configuration, say so by the name of the option."""
    asked = re.match(r"(?:Config name is missing|BuilderConfig).*?\[(.*?)\]", str(error), re.DOTALL)
    require(asked is None, "dataset_config_name", f"be one of {asked[1] if asked else ''}", name)


def _open_folder(folder: Path, name: str | None = None) -> datasets.DatasetDict:
    """The splits from the folder's README, else its tables, else its pictures, else from `datasets.load_dataset`."""
    import datasets

    named = name is None or _has_configs(str(folder))
    require(named, "dataset_config_name", "be none for a folder whose README.md lists no configurations", name)
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))
        if (folder / "state.json").exists():
            return datasets.DatasetDict(train=datasets.load_from_disk(str(folder)))
        listing = list_folder(folder)
        if listing.pictures and not listing.tables and not _has_configs(listing.folder):
            tables = picture_tables(listing)
            listing.warn()
            return tables
        return _load_files(listing, name)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        _check_config_name(error, name)
        requirement = "be a folder with parquet, arrow or image files"
        reason = first_line(error.__cause__ or error)
        raise InputError(f"`dataset` must {requirement}, got {str(folder)!r} ({reason})") from error


def _load_files(listing: Listing, name: str | None = None) -> datasets.DatasetDict:
    """`datasets.load_dataset` of a folder, with checks for files that its naming rules would skip or use twice."""
    import datasets

    if _has_configs(listing.folder):
        return datasets.load_dataset(listing.folder, name)
    files = listing.tables or [file for files in listing.left_out.values() for file in files]
    if listing.tables:
        _check_tables(listing)
    if len(files) == 1 and not _names_split(files[0]):
        return datasets.load_dataset(listing.folder, data_files={"train": [glob.escape(files[0])]})
    return datasets.load_dataset(listing.folder)


def _has_configs(folder: str) -> bool:
    """Whether the folder's README assigns files to splits."""
    from huggingface_hub import metadata_load

    try:
        return bool((metadata_load(os.path.join(folder, "README.md")) or {}).get("configs"))
    except (OSError, ValueError, yaml.YAMLError):  # no README, or one without valid metadata
        return False


def _names_split(file: str) -> bool:
    """Whether the name of a table or one of its folders denotes a split: train, test-00000-of-00001, …"""
    *folders, name = file.lower().split("/")
    words = "|".join(SPLIT_OF)
    return bool(SPLIT_OF.keys() & set(folders) or re.fullmatch(rf"({words})([-_. ]?\d+(-of-\d+.*)?)?", Path(name).stem))


def _check_tables(listing: Listing) -> None:
    """Warn of tables and pictures that `datasets` would leave out.

    Raises:
        InputError: `datasets` would read pictures as tables, or use a table in two splits.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    folder = os.path.realpath(listing.folder)
    chosen = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
    files = [Path(os.path.relpath(file, folder)).as_posix() for files in chosen.values() for file in files]
    mixed = sorted(set(listing.pictures) & set(files))
    require(not mixed, "dataset", "hold pictures or tables, not both", f"{mixed[:1]} beside {listing.tables[0]!r}")
    twice = sorted(file for file in set(files) if files.count(file) > 1)
    require(not twice, "dataset", "have each file in one split", f"{twice[:1]}, whose name denotes two")
    for file in (*listing.pictures, *sorted(set(listing.tables) - set(files))):
        listing.left_out[Path(file).suffix.lower()].append(file)
    listing.warn()


def _load_digits() -> datasets.DatasetDict:
    """scikit-learn's digits, 0 … 16 rescaled to 0 … 255, in 1,152 train, 105 validation and 540 test images."""
    import datasets
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.round(raw.images * (255 / 16)).astype(np.uint8)
    rest, test = stratified_cut(raw.target, 540)
    train, validation = stratified_cut(raw.target[rest], validation_size(len(rest)))
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


# Columns --------------------------------------------------------------------------------------------------------------


def _find_image_column(table: datasets.Dataset, image_column: str | None) -> str:
    import datasets

    columns = ", ".join(table.column_names)
    if image_column is not None:
        require(image_column in table.column_names, "image_column", f"be one of the columns {columns}", image_column)
        return image_column
    candidates = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, datasets.Image) or name in ("image", "img")
    ]
    require(len(candidates) > 0, "image_column", f"be given: no column of images was recognised among {columns}", None)
    clear = len(candidates) == 1 or "image" in candidates
    require(clear, "image_column", f"be given: it may be any of {', '.join(candidates)}", None)
    return "image" if "image" in candidates else candidates[0]


def _undecoded(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """`table` with only the image column, whose values remain encoded files: `{"bytes": …, "path": …}`."""
    import datasets

    try:
        return table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"`image_column` must hold images, got {column!r} ({first_line(error)})") from error
