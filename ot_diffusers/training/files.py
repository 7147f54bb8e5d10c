"""Checkpoints that survive: written aside, synced to the disk, renamed when complete, and known by their checksums."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import name_aside, new_folder, sha256, sync, write_json, write_text

__all__ = [
    "CHECKSUMS",
    "damage",
    "delete",
    "delete_partial",
    "placed_in",
    "sync",
    "write_checksums",
    "write_json",
    "write_text",
    "written_aside",
]

CHECKSUMS = "SHA256SUMS"
"""Name of the list of checksums in a checkpoint; `sha256sum -c SHA256SUMS` checks it too."""

WRITTEN = r"(update|damaged)-[0-9]+|model|(run|results|state)[.]json|metrics[.]jsonl"
"""Names in the folder of a run, and in that of its checkpoints, that are first written under another name."""


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """As `new_folder`, with a list of checksums, and on the disk when it has its name."""
    with new_folder(folder) as partial:
        yield partial
        write_checksums(partial)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
    sync(folder.parent)


@contextmanager
def placed_in(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into, whose files go to the same places in `folder` when the block ends, and vanish where it
    fails. The file called `last` is absent while the others are put in place."""
    partial = name_aside(folder / "model")
    partial.mkdir()
    try:
        yield partial
        files = sorted(_files(partial), key=lambda file: (file == partial / last, file))
        for file in files:
            sync(file)
        (folder / last).unlink(missing_ok=True)
        for file in files:
            place = folder / file.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
            sync(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def delete(folder: Path) -> None:
    """Rename the folder, then delete it: what is half deleted never passes for the whole."""
    doomed = name_aside(folder)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def delete_partial(folder: Path) -> None:
    """Delete what a killed process of a run had written aside in `folder`; files of other names are left alone."""
    for path in folder.glob(".*.partial"):
        if re.fullmatch(rf"\.({WRITTEN})(\.[0-9a-f]+)?\.partial", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_checksums(folder: Path) -> None:
    """List every file of the folder in `SHA256SUMS`."""
    lines = [f"{sha256(file)}  {file.relative_to(folder)}\n" for file in _files(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_checksums` has listed; None if it is as it was written."""
    try:
        *lines, rest = (folder / CHECKSUMS).read_text(encoding="utf-8").split("\n")
        listed = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
        present = {str(file.relative_to(folder)): file for file in _files(folder)}
        for name in sorted(listed.keys() ^ present.keys()):
            return f"{name} is {'missing' if name in listed else 'not listed'}"
        for name, file in present.items():
            if sha256(file) != listed[name]:
                return f"{name} has changed since it was written"
    except (OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__} on reading it"
    return None if lines and not rest else f"{CHECKSUMS} is cut short"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
