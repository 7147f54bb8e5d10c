"""Checkpoints on disk: written under another name, synced, renamed when complete, and verified by checksums."""

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
"""Name of the list of checksums in a checkpoint; `sha256sum -c SHA256SUMS` can check it."""

WRITTEN = r"(update|damaged)-[0-9]+|model|(run|results|state)[.]json|metrics[.]jsonl"
"""Names in the folders of a run and of its checkpoints that are first written under another name."""


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """As `new_folder`, with a list of checksums, and synced to the disk before it is renamed."""
    with new_folder(folder) as partial:
        yield partial
        write_checksums(partial)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
    sync(folder.parent)


@contextmanager
def placed_in(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into. When the block ends, its files move to the same places in `folder`; where it fails, they
    are deleted. The file called `last` is absent while the others are moved."""
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
    """Rename the folder, then delete it, so that half a folder is never taken for a complete one."""
    doomed = name_aside(folder)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def delete_partial(folder: Path) -> None:
    """Delete the temporary files in `folder` that a killed process of a run has left behind, and no others."""
    for path in folder.glob(".*.partial"):
        if re.fullmatch(rf"\.({WRITTEN})(\.[0-9a-f]+)?\.partial", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_checksums(folder: Path) -> None:
    """List every file of the folder in `SHA256SUMS`."""
    lines = [f"{sha256(file)}  {file.relative_to(folder)}\n" for file in _files(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """The damage to a folder since `write_checksums`; None if there is none."""
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
