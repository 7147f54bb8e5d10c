"""A folder of pictures as a table: which files are pictures, which folders are splits, which are classes.

Every file with the suffix of a format that Pillow reads is a picture, at any depth, sorted by path.

* Splits are the top-level folders `train`, `validation` and `test` (or `training`, `valid`, `val`, `dev`, `testing`,
  `eval`, `evaluation`), provided that all pictures are in such folders. Other names, and such folders at other levels,
  do not define splits.
* Classes are the folders at the first level below the splits that has more than one folder: `cat/1.png` and
  `dog/old/2.png` belong to the classes cat and dog. They are numbered in sorted order ("10" before "2").
* `metadata.jsonl`, `metadata.csv` and `metadata.parquet` have the format of `datasets`: one row for each `file_name`, a
  path relative to the metadata file, with further columns such as `label`. Columns like `mask_file_name` contain more
  pictures.

A warning counts all other files, except hidden files, READMEs and licences.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..errors import InputError, require
from .decode import first_line
from .splits import SPLIT_OF, SPLITS

if TYPE_CHECKING:
    import datasets

UNREADABLE_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG")  # Pillow recognises these but cannot decode them
TABLE_SUFFIXES = (".parquet", ".arrow")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SILENT_NAMES = ("readme", "licen", "copying", "citation", "dataset_info", "desktop.ini", "thumbs.db")
SILENT_FOLDERS = ("__MACOSX", "__pycache__")
GRID, FIRST_SAMPLE = "grid.png", "00000.png"


@dataclass
class Listing:
    """The files of a folder by kind, as sorted paths relative to it, with `/` as separator.

    Attributes:
        folder: the folder.
        pictures: files of formats that Pillow reads.
        tables: parquet and arrow files.
        metadata: files that describe pictures.
        left_out: all other files, by kind.
        notes: further remarks for the user.
    """

    folder: str
    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    def path(self, file: str) -> str:
        """The full path of one of the files."""
        return os.path.join(self.folder, *file.split("/"))

    def warn(self) -> None:
        """Warn, in one line, how many files of each kind were left out, and add the notes."""
        kinds = [f"{len(files)} × {kind} ({min(files)})" for kind, files in sorted(self.left_out.items())]
        lines = [f"left out: {', '.join(kinds)}"] if kinds else []
        if lines or self.notes:
            warnings.warn(f"{self.folder}: {'; '.join([*lines, *self.notes])}", stacklevel=2)


def list_folder(folder: str | Path, argument: str = "dataset") -> Listing:
    """All files of a folder and its subfolders, including linked ones. No file is opened.

    Raises:
        InputError: the folder cannot be read.
    """
    listing = Listing(str(folder))
    suffixes = _picture_suffixes()
    try:
        files = sorted(_files(listing))
    except OSError as error:
        place = f"{str(folder)!r} ({first_line(error)})"
        raise InputError(f"`{argument}` must be a readable folder, got {place}") from error
    for file in files:
        name = posixpath.basename(file)
        suffix = posixpath.splitext(name)[1].lower()
        if file.encode(errors="ignore").decode() != file:
            listing.left_out["name that is not UTF-8"].append(file)
        elif name in METADATA_NAMES:
            listing.metadata.append(file)
        elif suffix in suffixes:
            listing.pictures.append(file)
        elif suffix in TABLE_SUFFIXES:
            listing.tables.append(file)
        elif not name.lower().startswith(SILENT_NAMES):
            listing.left_out[suffix or "file without a suffix"].append(file)
    if FIRST_SAMPLE in listing.pictures and GRID in listing.pictures:
        listing.pictures.remove(GRID)  # the overview that `ot-diffusers sample` writes
    return listing


def _picture_suffixes() -> frozenset[str]:
    suffixes = PIL.Image.registered_extensions()
    formats = set(PIL.Image.OPEN) - set(UNREADABLE_FORMATS)
    return frozenset(suffix for suffix, name in suffixes.items() if name in formats)


def _files(listing: Listing) -> Iterator[str]:
    """Paths of the regular files below the folder; entries that are neither file nor folder go to `left_out`."""
    # Folders to visit, each with the real paths of the folders above it and its own.
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(listing.folder),))]
    while pending:
        prefix, places = pending.pop()
        with os.scandir(places[-1]) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
        if not entries and prefix:
            listing.left_out["empty folder"].append(prefix[:-1])
        for entry in entries:
            path = prefix + entry.name
            if entry.is_file():
                yield path
            elif not entry.is_dir():
                listing.left_out["broken link" if entry.is_symlink() else "special file"].append(path)
            elif entry.name not in SILENT_FOLDERS:
                place = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if entry.is_symlink() and any(Path(above).is_relative_to(place) for above in places):
                    listing.left_out["link to a folder above it"].append(path)
                else:
                    pending.append((f"{path}/", (*places, place)))


# --- Splits, classes, metadata ----------------------------------------------------------------------------------------


def picture_tables(listing: Listing) -> datasets.DatasetDict:
    """The splits of a folder of pictures: columns `image`, `label` if there are classes, and those of the metadata.

    Raises:
        InputError: there are two folders for one split, or the metadata cannot be read.
    """
    import datasets

    rows, image_columns = _described_rows(listing)
    rows = rows or [{"image": picture} for picture in listing.pictures]
    split_of, class_of = _splits_and_classes(listing, [row["image"] for row in rows])
    if class_of and not any("label" in row for row in rows):
        rows = [row | {"label": class_of[row["image"]]} for row in rows]
        outside = [picture for picture, name in class_of.items() if name is None]
        if outside:
            listing.notes.append(f"{len(outside)} pictures outside the class folders have no label ({min(outside)})")
    by_split = {split: [row for row in rows if split_of[row["image"]] == split] for split in SPLITS}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return datasets.DatasetDict(
        {split: _table(listing, chosen, columns, image_columns) for split, chosen in by_split.items() if chosen}
    )


def picture_table(listing: Listing) -> datasets.Dataset:
    """All pictures of a folder, still encoded, without splits and classes."""
    import datasets

    table = _table(listing, [{"image": picture} for picture in listing.pictures], ["image"], ["image"])
    return table.cast_column("image", datasets.Image(decode=False))


def _table(
    listing: Listing, rows: list[dict[str, Any]], columns: list[str], image_columns: Collection[str]
) -> datasets.Dataset:
    import datasets

    values = {column: [row.get(column) for row in rows] for column in columns}
    for column in image_columns:
        values[column] = [None if picture is None else listing.path(picture) for picture in values[column]]
    try:
        table = datasets.Dataset.from_dict(values)
    except (TypeError, ValueError) as error:  # pyarrow raises these for values of different types
        place = f"{listing.folder!r} ({first_line(error)})"
        raise InputError(f"`dataset` must have metadata of one type in each column, got {place}") from error
    for column in image_columns:
        table = table.cast_column(column, datasets.Image())
    return table


def _splits_and_classes(listing: Listing, pictures: list[str]) -> tuple[dict[str, str], dict[str, str | None]]:
    """The split and the class of each picture; there are no classes if all pictures of the splits are in one folder."""
    folders = {picture: picture.split("/")[:-1] for picture in pictures}
    tops = {"".join(parts[:1]) for parts in folders.values()}
    splits = {top: SPLIT_OF[top.lower()] for top in tops if top.lower() in SPLIT_OF}
    are_splits = len(splits) == len(tops)
    if are_splits:
        unique = len(set(splits.values())) == len(splits)
        require(unique, "dataset", "have one folder for each split", f"{', '.join(sorted(tops))} in {listing.folder!r}")
        split_of = {picture: splits[parts[0]] for picture, parts in folders.items()}
        folders = {picture: parts[1:] for picture, parts in folders.items()}
    else:
        split_of = dict.fromkeys(pictures, "train")
    different = {tuple(parts) for parts in folders.values()}
    _note_split_words(listing, {part for parts in different for part in parts if part.lower() in SPLIT_OF})

    # Skip the levels at which all pictures are in the same folder.
    depth = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, zip(*different, strict=False))))
    classes = {picture: parts[depth] if len(parts) > depth else None for picture, parts in folders.items()}
    return split_of, classes if any(classes.values()) else {}


def _note_split_words(listing: Listing, names: Collection[str]) -> None:
    """Add a note on folders that have the names of splits but are not splits."""
    if names:
        rule = "splits are top-level folders, and all pictures must be in them"
        listing.notes.append(f"folders called {', '.join(sorted(names))} are read as classes, not as splits: {rule}")


def _described_rows(listing: Listing) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each picture in the metadata, and the columns that contain pictures; no rows without metadata."""
    pictures, described = set(listing.pictures), set[str | None]()
    rows, image_columns = [], {"image": True}
    for file in listing.metadata:
        table = _read_metadata(listing.path(file))
        keys = [key for key in table.column_names if key == "file_name" or key.endswith("_file_name")]
        columns = {key: "image" if key == "file_name" else key.removesuffix("_file_name") for key in keys}
        if "image" not in columns.values():
            listing.left_out["metadata file without file_name"].append(file)
            continue
        image_columns |= dict.fromkeys(columns.values(), True)
        for row in table.to_pylist():
            named = {columns[key]: _beside(file, row.pop(key)) for key in keys}
            missing = [str(picture) for picture in named.values() if picture not in pictures]
            if missing:
                listing.left_out["metadata row without a picture"].append(missing[0])
            else:
                rows.append(row | named)
                described.update(named.values())
    if rows and described < pictures:
        listing.left_out["picture without a metadata row"] += sorted(pictures - described)
    return rows, list(image_columns)


def _read_metadata(path: str) -> Any:
    """The arrow table of a metadata file.

    Raises:
        InputError: the file cannot be read.
    """
    from pyarrow import ArrowException, csv, json, parquet

    readers = {".jsonl": json.read_json, ".csv": csv.read_csv, ".parquet": parquet.read_table}
    try:
        return readers[posixpath.splitext(path)[1]](path)
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(f"`dataset` must have readable metadata, got {path!r} ({first_line(error)})") from error


def _beside(file: str, name: Any) -> str | None:
    """The path of a `file_name` in a metadata file, relative to the listed folder."""
    if not isinstance(name, str):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), name.replace("\\", "/")))
