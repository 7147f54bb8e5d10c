"""Errors of this package, each a single line. For bad input it names the argument, the requirement and the value."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real

MOST = 10**8
SHOWN = 300
"""Greatest number of characters of a value in a message."""


class InputError(ValueError):
    """Bad input from the user. Commands print the line and exit with status 2; callers can catch it as `ValueError`."""


class TrainingError(RuntimeError):
    """A run that cannot continue, for example because its loss is not finite. Scripts print the line and exit with
    status 1."""


def require(condition: bool, argument: str, requirement: str, value: object) -> None:
    """Raise `InputError` unless `condition` holds.

    Example:
        >>> require(0.2 > 0, "blur", "be positive", 0.2)
        >>> require(-1 > 0, "blur", "be positive", -1)
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `blur` must be positive, got -1
    """
    if not condition:
        raise InputError(f"`{argument}` must {requirement}, got {shown(value)}")


def require_sizes(least: int = 1, **sizes: object) -> None:
    """Raise `InputError` unless every size is a whole number from `least` to a hundred million. Sizes that files give
    are checked so before memory is allocated.

    Example:
        >>> require_sizes(num_samples=10**15)
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `num_samples` must be at most 100,000,000, got 1000000000000000
    """
    for name, size in sizes.items():
        require_integer(name, size, at_least=least)
        require(size <= MOST, name, f"be at most {MOST:,}", size)  # type: ignore[operator]


def shown(value: object) -> str:
    """A value for a message: on one line, and short. Arrays are shown by shape and type.

    Example:
        >>> shown("ot"), shown([0.5] * 1000)[-5:]
        ("'ot'", '0.5 …')
    """
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) > 0:
        return f"{type(value).__name__} of shape {tuple(shape)} and type {getattr(value, 'dtype', None)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip(' ,')} …"


def require_integer(argument: str, value: object, at_least: int) -> None:
    """Raise `InputError` unless `value` is an integer of at least `at_least`.

    Example:
        >>> require_integer("batch_size", "4", at_least=1)
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `batch_size` must be an integer, got '4'
    """
    require(isinstance(value, Integral) and not isinstance(value, bool), argument, "be an integer", value)
    require(value >= at_least, argument, f"be at least {at_least}", value)  # type: ignore[operator]


def require_number(argument: str, value: object, at_least: float) -> None:
    """Raise `InputError` unless `value` is a finite number of at least `at_least`.

    Example:
        >>> require_number("guidance_scale", float("inf"), at_least=0)
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `guidance_scale` must be a finite number, got inf
    """
    require(isinstance(value, Real) and math.isfinite(value), argument, "be a finite number", value)
    require(value >= at_least, argument, f"be at least {at_least}", value)  # type: ignore[operator]


def require_same(settings: Mapping[str, object], earlier: Mapping[str, object], argument: str) -> None:
    """Raise `InputError` where the results in a folder were made with other `settings`; the message shows what differs.

    Example:
        >>> require_same({"seed": 1, "call": {"steps": 50}}, {"seed": 1, "call": {"steps": 20}}, "output")
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `output` must be a new folder, or one made with {'call.steps': 50}, got \
{'call.steps': 20}
    """
    now, before = _flat(settings), _flat(earlier)
    differing = [name for name in now | before if name.split(".")[0] in settings and now.get(name) != before.get(name)]
    requested, recorded = ({name: values.get(name) for name in differing} for values in (now, before))
    require(not differing, argument, f"be a new folder, or one made with {requested}", recorded)


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested values by dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {}
        flat |= inner or {f"{prefix}{name}": value}
    return flat


def missing(library: str, group: str) -> InputError:
    """The error for a library of an optional group of requirements that is not installed.

    Example:
        >>> raise missing("matplotlib", "plots")
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: matplotlib is not installed: pip install 'ot-diffusers[plots]'
    """
    return InputError(f"{library} is not installed: pip install 'ot-diffusers[{group}]'")


@contextmanager
def extra(group: str) -> Iterator[None]:
    """A block of imports from an optional group of requirements.

    Raises:
        InputError: see `missing`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing((error.name or "a library").partition(".")[0], group) from error


# Failures of disk, memory or other processes. Libraries raise many types for them, so their messages are compared.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
PLACE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of a path rather than of the disk."""
_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "unable to allocate")
_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "ncclremoteerror",
)


def environment_error(error: BaseException) -> str | None:
    """One line for a failure of disk, memory or another process; None for all other errors.

    Example:
        >>> environment_error(OSError(errno.ENOSPC, "No space left on device", "runs/a/checkpoints"))
        "cannot write 'runs/a/checkpoints': No space left on device"
        >>> environment_error(KeyError("a")) is None
        True
    """
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else _number_in(text)
    place = f" {error.filename!r}" if isinstance(error, OSError) and error.filename else ""
    if number in _DISK:
        return f"cannot write{place}: {os.strerror(number)}"
    if place and number in PLACE:
        return f"cannot use{place}: {os.strerror(number)}"
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _MEMORY):
        return (
            "out of memory: lower train_batch_size and raise gradient_accumulation_steps by the same factor, "
            "or lower num_reference_samples or block_out_channels"
        )
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in _PEER):
        return "another process of this run has stopped"
    return None


def _number_in(text: str) -> int:
    """The number of an error of the operating system in a message of safetensors; 0 if there is none."""
    match = re.search(r"os error (\d+)", text)
    return int(match[1]) if match else 0
