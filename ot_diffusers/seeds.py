"""Random seeds as pure functions of what they are for, so that no result depends on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def key(*parts: int | str) -> int:
    """63 bits from `parts`.

    Example:
        >>> key(0, "image", 1) == key(0, "image", 1), key(0, "image", 1) == key(0, "image", 2)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def keyed_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device` that is a pure function of `parts`."""
    return torch.Generator(device).manual_seed(key(*parts))
