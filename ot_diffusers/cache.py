"""A cache of computed tensors in files with checksums. A file that cannot be read, or whose contents have changed, is
computed again, with a warning."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import new_file

logger = logging.getLogger(__name__)

CHECKSUM = "sha256"
"""Name of the checksum in a file's metadata."""


def cache_folder() -> Path:
    """`$OT_DIFFUSERS_CACHE`, or `~/.cache/ot_diffusers`."""
    return Path(os.environ.get("OT_DIFFUSERS_CACHE") or "~/.cache/ot_diffusers").expanduser()


def remembered(kind: str, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `compute`, on the CPU: read from the cache folder if it is there, otherwise computed and cached.

    If the cache folder is not writable, the result is not cached, with one warning.

    Args:
        kind: subfolder of the cache.
        key: hash of everything that the result depends on.
        compute: returns tensors by name.
    """
    try:
        file = cache_folder() / kind / f"{key}.safetensors"
    except RuntimeError as error:  # no home directory
        _warn_once(f"results are not cached ({error}): set OT_DIFFUSERS_CACHE to a folder")
        return _on_cpu(compute())
    tensors = read_verified(file)
    if tensors is None:
        tensors = _on_cpu(compute())
        try:
            save_aside(tensors, file)
        except OSError as error:
            reason = error.strerror or str(error)
            _warn_once(
                f"results are not cached in {cache_folder()} ({reason}): set OT_DIFFUSERS_CACHE to another folder"
            )
    return tensors


def read_verified(file: Path) -> dict[str, Tensor] | None:
    """The tensors that `save_aside` wrote, on the CPU; None if the file or its checksum is missing; None with a warning
    if its contents have changed."""
    if not os.path.lexists(file):
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            checksum = (stored.metadata() or {}).get(CHECKSUM)
            if checksum is None:
                return None
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        problem = None if checksum == _checksum(tensors, file.name) else "its checksum does not match its contents"
    except Exception as error:  # a damaged header can raise any exception
        problem = " ".join(str(error).split())[:100]
    if problem is None:
        return tensors
    logger.warning("%s is damaged (%s) and is computed again", file, problem)
    return None


def save_aside(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file with its checksum to a temporary name and rename it, so that readers never see a partial
    file, even with several writers.

    Raises:
        OSError: no space, or no permission.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = _on_cpu(tensors)
    with new_file(file) as partial:
        save_tensors(tensors, partial, {CHECKSUM: _checksum(tensors, file.name)})


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; a full disk raises `OSError`, as with every other file."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(file)) from error


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor], name: str) -> str:
    """SHA-256 of the name of the file, and of the name, dtype, shape and contents of every tensor."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
