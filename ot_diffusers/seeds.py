"""Random numbers as pure functions of a key, so that no result depends on what was drawn before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import require


def key(*parts: int | str) -> int:
    """A 63-bit hash of `parts`.

    Example:
        >>> key(0, "image", 1) == key(0, "image", 1), key(0, "image", 1) == key(0, "image", 2)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def keyed_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A random generator on `device` whose seed is a hash of `parts`."""
    return torch.Generator(device).manual_seed(key(*parts))


def seeded_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """PyTorch's random generator for any seed ≥ 0; seeds of 2⁶⁴ or more, which PyTorch does not accept, are hashed.

    Example:
        >>> seeded_generator(3).initial_seed(), seeded_generator(10**30).initial_seed() < 2**64
        (3, True)
    """
    return torch.Generator(device).manual_seed(folded(seed, 64))


def folded(seed: int, bits: int) -> int:
    """`seed` if it has at most `bits` bits, otherwise a hash of it, for generators that accept no larger seeds.

    Raises:
        InputError: a negative seed.

    Example:
        >>> folded(2**32 - 1, 32) == 2**32 - 1, folded(2**32, 32) < 2**32
        (True, True)
    """
    require(seed >= 0, "seed", "be at least 0", seed)
    return seed if seed < 2**bits else key(seed) % 2**bits


def keyed_normal(parts: Sequence[int | str], indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, [B, *shape] float32, where row i depends only on `parts` and `indices[i]`.

    A counter replaces the state of a generator (splitmix64, followed by the normal quantile function), so that all rows
    are computed at once on the device of `indices`; devices differ by rounding only.

    Args:
        parts: key of the numbers, such as a seed and a purpose.
        indices: [B] integers.
        shape: shape of one row.

    Reference: [Steele2014].

    Example:
        >>> rows = keyed_normal((0, "image"), torch.arange(1000), (2, 8, 8))
        >>> torch.equal(rows[7:8], keyed_normal((0, "image"), torch.tensor([7]), (2, 8, 8)))
        True
    """
    counters = torch.arange(1, math.prod(shape) + 1, device=indices.device) * _WEYL
    streams = _mix(indices.long() * _WEYL + key(*parts))
    bits = _mix(streams[:, None] + counters)
    uniform = ((bits >> 11 & (1 << 53) - 1).double() + 0.5) / 2**53
    return torch.special.ndtri(uniform).float().view(-1, *shape)


_WEYL = 0x9E3779B97F4A7C15 - 2**64
"""2^64 divided by the golden ratio, as a signed integer."""


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finalizer on int64 tensors, whose products wrap around."""
    bits = (bits ^ _shift(bits, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ _shift(bits, 27)) * (0x94D049BB133111EB - 2**64)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Logical right shift, which fills with zeros."""
    return bits >> places & (1 << 64 - places) - 1
