"""Paths that users give and files that commands write.

`~` is the home folder in every path. Outputs are checked before the work begins. Files are written under another name
and renamed when they are complete. A command that may replace files lists them, with their checksums, in a hidden file
beside them. It never deletes or overwrites files that it did not write, or that have changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError, require

WEIGHTS_AND_TABLES = (".bin", ".ckpt", ".json", ".pt", ".pth", ".safetensors", ".yaml", ".yml")
"""Endings of file names, which Hub ids do not have."""

DEFAULT_FOLDER = "runs"
"""Default folder of the commands' output. A path that begins with it is never a Hub id."""


# --- Paths ------------------------------------------------------------------------------------------------------------


def expand_home(text: str) -> str:
    """A path, a Hub id or `name=path`, with `~` and `~user` at the beginning of the path as that home folder.

    Example:
        >>> expand_home("~/runs/ot") == os.path.expanduser("~/runs/ot")
        True
        >>> expand_home("before=~/a") == "before=" + os.path.expanduser("~/a")
        True
        >>> expand_home("user/name~1"), expand_home("~ 3 hours")
        ('user/name~1', '~ 3 hours')
    """
    match = re.fullmatch(r"([^/~]*=)?(~[^/\s]*(?:/.*)?)", text, re.DOTALL)
    return text if match is None else (match[1] or "") + os.path.expanduser(match[2])


def user_path(path: str | Path) -> Path:
    """A path that a user has given; `~` is the home folder."""
    return Path(expand_home(str(path)))


def local_or_hub(path: str | Path, argument: str, requirement: str = "be a folder that exists, or a Hub id") -> str:
    """A folder that exists, with `~` as the home folder, or a Hub id as it stands.

    Raises:
        InputError: it can only be a path, and nothing exists there. The Hub is not asked.

    Example:
        >>> local_or_hub("google/ddpm-cifar10-32", "pipeline")
        'google/ddpm-cifar10-32'
        >>> local_or_hub("runs/nothing", "pipeline")
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `pipeline` must be a folder that exists, or a Hub id, got 'runs/nothing'
    """
    text = expand_home(str(path))
    there = os.path.exists(text) or not looks_local(text)
    require(there, argument, requirement, str(path))
    return text


def looks_local(text: str) -> bool:
    """Whether a text can only be a path: it is not `user/name`, has the ending of a file, or begins with a folder that
    exists.

    Example:
        >>> [looks_local(text) for text in ("user/name", "user/v1.5", "./name", "a/b/c", "name", "user/weights.pth")]
        [False, False, True, True, True, True]
    """
    first, _, rest = text.partition("/")
    a_path = text.startswith((".", "~")) or "\\" in text or text.endswith(WEIGHTS_AND_TABLES)
    return a_path or not first or not rest or "/" in rest or first == DEFAULT_FOLDER or os.path.isdir(first)


# --- Outputs, checked before the work ---------------------------------------------------------------------------------


def check_folder(path: str | Path, argument: str = "output") -> Path:
    """Check that files can be written into a folder, which may not exist yet. Nothing is left behind.

    Raises:
        InputError: naming the path and the reason.
    """
    return _check_output(path, argument, "be a folder", lambda path: path.is_dir(), lambda path: path / "trial")


def check_file(path: str | Path, argument: str = "output") -> Path:
    """As `check_folder`, for a file, which may exist."""
    return _check_output(path, argument, "be a file", lambda path: path.is_file(), lambda path: path)


def _check_output(
    path: str | Path, argument: str, kind: str, is_kind: Callable[[Path], bool], trial: Callable[[Path], Path]
) -> Path:
    folder = user_path(path)
    unknown = not str(path) or str(folder).startswith("~")
    require(not unknown, argument, f"{kind} that has a name, in a home folder that exists", str(path))
    if not is_first_process():
        return folder
    try:
        require(not os.path.lexists(folder) or is_kind(folder), argument, kind, str(path))
        _try_to_write(trial(folder))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileExistsError):
            reason = f"{error.filename} is not a folder"
        raise InputError(f"`{argument}` must {kind} that can be written, got {str(path)!r} ({reason})") from error
    return folder


def _try_to_write(file: Path) -> None:
    """Make a file under another name, and the folders above it; delete what was made."""
    made: list[Path] = []
    try:
        for folder in reversed(file.parents):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        trial = name_aside(file)
        trial.touch(exist_ok=False)
        trial.unlink()
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # another process uses it by now
                folder.rmdir()


def is_first_process() -> bool:
    """Whether this is the process that writes, among those of a launcher."""
    return int(os.environ.get("RANK", 0)) == 0


# --- Writing under another name ---------------------------------------------------------------------------------------


def name_aside(path: Path) -> Path:
    """A new hidden name beside `path`, to write under until all is complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def is_name_aside(name: str, of: str) -> bool:
    """Whether a name was made by `name_aside` for a name that the regular expression `of` matches.

    Example:
        >>> is_name_aside(".00007.png.0123abcd.partial", r"[0-9]{5}[.]png"), is_name_aside(".backup.partial", ".*")
        (True, False)
    """
    return re.fullmatch(rf"\.({of})\.[0-9a-f]+\.partial", name) is not None


def write_json(file: Path, content: Any) -> None:
    """Write under another name, sync, then rename, so that a reader never sees half a file."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, content: str | bytes) -> None:
    """As `write_json`, for any text or bytes."""
    with new_file(file) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
    sync(file.parent)


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A temporary name, whose file becomes `file` in one step when the block ends, and is deleted where it fails."""
    partial = name_aside(file)
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """As `new_file`, for a folder."""
    partial = name_aside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the directory entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The checksum of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- Files that a command may replace ---------------------------------------------------------------------------------

SAMPLE = "sample"
"""`sample` and `save_images` record their files under this name."""
GRID_NAME, METADATA_NAME = "grid.png", "metadata.jsonl"
SAMPLE_NAMES = r"[0-9]{5,}[.]png|grid[.]png|metadata[.]jsonl"


def record_of(folder: Path, command: str) -> Path:
    """The list of files that a command has written into a folder; `sha256sum -c` can check it."""
    return folder / f".ot-diffusers-{command}.sha256"


def recorded(folder: Path, command: str) -> dict[str, str]:
    """File name to checksum, for the files that a command has written into a folder; empty without such a list."""
    try:
        lines = record_of(folder, command).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def is_own(file: Path, command: str) -> bool:
    """Whether a command has recorded this file, and the file has not changed since."""
    return _is_own(file, command, recorded(file.parent, command), names="(?!)")


def not_own(folder: Path, command: str, names: str = "(?!)") -> list[Path]:
    """The files in a folder that a command has not written, or that have changed since.

    Args:
        folder: folder, which may not exist.
        command: name of the command.
        names: regular expression of the file names that the command writes. Temporary files of such names
            (`name_aside`), which a killed command leaves behind, belong to the command too.
    """
    if not folder.is_dir():
        return []
    listed = recorded(folder, command)
    return [path for path in sorted(folder.iterdir()) if not _is_own(path, command, listed, names)]


def _is_own(path: Path, command: str, listed: Mapping[str, str], names: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if path == record_of(path.parent, command) or is_name_aside(path.name, names):
        return True
    return path.name in listed and listed[path.name] == sha256(path)


def write_own(file: Path, content: str | bytes, command: str) -> None:
    """As `write_text`; the file is recorded as one of the command."""
    write_text(file, content)
    checksums = {name: value for name, value in recorded(file.parent, command).items() if name != file.name}
    _write_record(file.parent, command, checksums | {file.name: sha256(file)})


def replace_own(folder: Path, command: str, files: Iterator[tuple[str, Callable[[Path], object]]], names: str) -> None:
    """Write files into a folder in place of those that the command has recorded there.

    First all new files are written under other names; where that fails, nothing has changed. Then the earlier files are
    deleted, the new list is written, and the new files are renamed. If a listed file is missing, this was interrupted.

    Args:
        folder: existing folder.
        command: name of the command.
        files: name of each file, and a function that writes it.
        names: see `not_own`.

    Raises:
        InputError: one of the names belongs to a file that is not the command's own.
    """
    others = {path.name for path in not_own(folder, command, names)}
    earlier = [path for path in folder.iterdir() if path.name not in {*others, record_of(folder, command).name}]
    written: dict[str, Path] = {}
    try:
        for name, write in files:
            require(name not in others, "output", f"hold no file of yours named {name}", str(folder))
            written[name] = name_aside(folder / name)
            write(written[name])
        checksums = {name: sha256(partial) for name, partial in written.items()}
        for path in earlier:
            path.unlink(missing_ok=True)
        _write_record(folder, command, checksums)
        for name, partial in written.items():
            os.replace(partial, folder / name)
    except BaseException:
        for partial in written.values():
            partial.unlink(missing_ok=True)
        raise


def _write_record(folder: Path, command: str, checksums: Mapping[str, str]) -> None:
    write_text(record_of(folder, command), "".join(f"{value}  {name}\n" for name, value in checksums.items()))
