"""The one way this package refuses bad input: a single line with the argument, the requirement and the value."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user. Commands print the line and exit with status 2; libraries can catch it as
    `ValueError`."""


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
        raise InputError(f"`{argument}` must {requirement}, got {value!r}")
