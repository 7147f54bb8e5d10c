"""The one way this package refuses bad input: a single line with the argument, the requirement and the value."""

from __future__ import annotations

from collections.abc import Mapping


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


def require_same(settings: Mapping[str, object], earlier: Mapping[str, object], argument: str) -> None:
    """Raise `InputError` where the results in a folder were made with other `settings`; the line shows what differs.

    Example:
        >>> require_same({"seed": 1, "steps": 50}, {"seed": 0, "steps": 50}, "output")
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `output` must be a new folder, or one made with {'seed': 1}, got {'seed': 0}
    """
    differing = [name for name, value in settings.items() if earlier.get(name) != value]
    wanted, found = ({name: values.get(name) for name in differing} for values in (settings, earlier))
    require(not differing, argument, f"be a new folder, or one made with {wanted}", found)
