"""Tensors that are computed once and kept in files. Each file holds a checksum of what it should say: what cannot be
read, or has changed since it was written, is computed again with a warning.
"""

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
    """What `compute` gives, on the CPU: from the cache folder where it is kept there, or else kept there from now on.

    A cache folder that cannot be written to is warned of once and done without.

    Args:
        kind: subfolder of the cache.
        key: hash of everything that decides the result.
        compute: name to tensor.
    """
    try:
        file = cache_folder() / kind / f"{key}.safetensors"
    except RuntimeError as error:  # no home
        _warn_once(f"nothing is kept in a cache ({error}); OT_DIFFUSERS_CACHE names a folder")
        return _on_cpu(compute())
    tensors = read_verified(file)
    if tensors is None:
        tensors = _on_cpu(compute())
        try:
            save_aside(tensors, file)
        except OSError as error:
            reason = error.strerror or str(error)
            _warn_once(
                f"nothing is kept in the cache {cache_folder()} ({reason}); OT_DIFFUSERS_CACHE names another folder"
            )
    return tensors


def read_verified(file: Path) -> dict[str, Tensor] | None:
    """The tensors that `save_aside` wrote, on the CPU; None where there is no file, or one without a checksum; with a
    warning, None where it is not as it was written."""
    if not os.path.lexists(file):
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            checksum = (stored.metadata() or {}).get(CHECKSUM)
            if checksum is None:
                return None
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        problem = None if checksum == _checksum(tensors, file.name) else "its checksum does not fit its contents"
    except Exception as error:  # whatever a damaged header leads to
        problem = " ".join(str(error).split())[:100]
    if problem is None:
        return tensors
    logger.warning("%s is damaged (%s): it is computed again", file, problem)
    return None


def save_aside(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file with its checksum under a name of its own, then rename it, so that no reader meets half
    a file, however many write it at once.

    Raises:
        OSError: no space, or no permission.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = _on_cpu(tensors)
    with new_file(file) as partial:
        save_tensors(tensors, partial, {CHECKSUM: _checksum(tensors, file.name)})


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; a full disk is an `OSError`, as it is for every other file."""
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
    """sha256 of the file's name, and of name, type, shape and contents of every tensor."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
