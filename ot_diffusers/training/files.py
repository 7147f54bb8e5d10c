"""Files that survive: written aside, synced to the disk, renamed when complete, and known by their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"
"""Name of the list of checksums in a checkpoint; `sha256sum -c SHA256SUMS` checks it too."""


def write_json(file: Path, content: Any) -> None:
    """Write aside, sync, then rename, so that a reader never meets half a file."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, content: str) -> None:
    """As `write_json`, for any text."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        sync(partial)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` in one step when the block ends, and vanishes where it fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        write_checksums(partial)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder.parent)


@contextmanager
def placed_in(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into, whose files go to the same places in `folder` when the block ends, and vanish where it
    fails. The file called `last` is absent while the others are put in place."""
    partial = folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
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
    doomed = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def delete_partial(folder: Path) -> None:
    """Delete what a killed process had written aside in `folder`."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_checksums(folder: Path) -> None:
    """List every file of the folder in `SHA256SUMS`."""
    lines = [f"{_sha256(file)}  {file.relative_to(folder)}\n" for file in _files(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_checksums` has listed; None if it is as it was written."""
    try:
        *lines, rest = (folder / CHECKSUMS).read_text(encoding="utf-8").split("\n")
        listed = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
        found = {str(file.relative_to(folder)): file for file in _files(folder)}
        for name in sorted(listed.keys() ^ found.keys()):
            return f"{name} is {'missing' if name in listed else 'not listed'}"
        for name, file in found.items():
            if _sha256(file) != listed[name]:
                return f"{name} has changed since it was written"
    except (OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__} on reading it"
    return None if lines and not rest else f"{CHECKSUMS} is cut short"


def sync(path: Path) -> None:
    """Wait until the file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
