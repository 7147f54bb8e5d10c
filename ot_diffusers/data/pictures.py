"""A folder of pictures as a table: which files are pictures, which folders are splits, which are classes.

Every file whose suffix names a format that Pillow reads is a picture, at any depth, in the order of the paths.

* Splits are the top-level folders `train`, `validation` and `test` (or `training`, `valid`, `val`, `dev`, `testing`,
  `eval`, `evaluation`), where all pictures lie in such folders. Other words in names, and such folders elsewhere, mean
  nothing.
* Classes are the folders of the first level, within the splits, at which the pictures part: `cat/1.png` and
  `dog/old/2.png` are of the classes cat and dog. They are numbered in sorted order ("10" before "2").
* `metadata.jsonl`, `metadata.csv` and `metadata.parquet` as `datasets` knows them: a row for each `file_name`, which is
  relative to the metadata file, with further columns such as `label`. Columns like `mask_file_name` hold more pictures.

Whatever else lies there is counted in a warning, but for hidden files, READMEs and licences.
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

UNREADABLE_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG")  # which Pillow recognises only
TABLE_SUFFIXES = (".parquet", ".arrow")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SILENT_NAMES = ("readme", "licen", "copying", "citation", "dataset_info", "desktop.ini", "thumbs.db")
SILENT_FOLDERS = ("__MACOSX", "__pycache__")
GRID, FIRST_SAMPLE = "grid.png", "00000.png"


@dataclass
class Listing:
    """The files of a folder by what they are, as paths with `/` relative to it, sorted.

    Attributes:
        folder: the folder.
        pictures: files of formats that Pillow reads.
        tables: parquet and arrow files.
        metadata: files that describe pictures.
        left_out: everything else, by its kind.
        notes: what the user should know besides.
    """

    folder: str
    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    def path(self, file: str) -> str:
        """The path of one of the files on this machine."""
        return os.path.join(self.folder, *file.split("/"))

    def warn(self) -> None:
        """One line with the numbers of what is left out, and with the notes, if there is anything to say."""
        kinds = [f"{len(files)} × {kind} ({min(files)})" for kind, files in sorted(self.left_out.items())]
        lines = [f"left out: {', '.join(kinds)}"] if kinds else []
        if lines or self.notes:
            warnings.warn(f"{self.folder}: {'; '.join([*lines, *self.notes])}", stacklevel=2)


def list_folder(folder: str | Path, argument: str = "dataset") -> Listing:
    """All files of a folder and of the folders in it, links followed. No file is opened.

    Raises:
        InputError: a folder that cannot be read.
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
    """Paths of the regular files below a folder; what is neither file nor folder goes to `left_out`."""
    # Folders to visit, each with the real paths from the top down to it.
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
    """The splits of a folder of pictures: columns `image`, `label` where there are classes, and those of the metadata.

    Raises:
        InputError: two folders for one split, or metadata that cannot be read.
    """
    import datasets

    rows, image_columns = _described_rows(listing)
    rows = rows or [{"image": picture} for picture in listing.pictures]
    split_of, class_of = _splits_and_classes(listing, [row["image"] for row in rows])
    if class_of and not any("label" in row for row in rows):
        rows = [row | {"label": class_of[row["image"]]} for row in rows]
        outside = [picture for picture, name in class_of.items() if name is None]
        if outside:
            listing.notes.append(f"without a label, outside the class folders: {len(outside)} ({min(outside)})")
    by_split = {split: [row for row in rows if split_of[row["image"]] == split] for split in SPLITS}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return datasets.DatasetDict(
        {split: _table(listing, chosen, columns, image_columns) for split, chosen in by_split.items() if chosen}
    )


def picture_table(listing: Listing) -> datasets.Dataset:
    """All pictures of a folder, still encoded, whatever their splits and classes."""
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
    except (TypeError, ValueError) as error:  # of pyarrow, for values of different types
        place = f"{listing.folder!r} ({first_line(error)})"
        raise InputError(f"`dataset` must have metadata of one type in each column, got {place}") from error
    for column in image_columns:
        table = table.cast_column(column, datasets.Image())
    return table


def _splits_and_classes(listing: Listing, pictures: list[str]) -> tuple[dict[str, str], dict[str, str | None]]:
    """The split of each picture, and its class; no classes where the pictures of all splits lie in one folder."""
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

    # The folders in which all pictures lie tell nothing apart.
    depth = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, zip(*different, strict=False))))
    classes = {picture: parts[depth] if len(parts) > depth else None for picture, parts in folders.items()}
    return split_of, classes if any(classes.values()) else {}


def _note_split_words(listing: Listing, names: Collection[str]) -> None:
    """A note on folders that are called like splits but are none."""
    if names:
        rule = "splits are top-level folders with nothing but splits beside them"
        listing.notes.append(f"folders called {', '.join(sorted(names))} are taken for classes, not for splits: {rule}")


def _described_rows(listing: Listing) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each picture that metadata describe, and the columns that hold pictures; no rows where none does."""
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
        InputError: it cannot be read.
    """
    from pyarrow import ArrowException, csv, json, parquet

    readers = {".jsonl": json.read_json, ".csv": csv.read_csv, ".parquet": parquet.read_table}
    try:
        return readers[posixpath.splitext(path)[1]](path)
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(f"`dataset` must have readable metadata, got {path!r} ({first_line(error)})") from error


def _beside(file: str, name: Any) -> str | None:
    """The path that a metadata file means by a name, relative to the listed folder."""
    if not isinstance(name, str):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), name.replace("\\", "/")))
