"""The command line: `ot-diffusers demo | train | sample | evaluate | compare | report | push | info | …`.

Bad input is one line on stderr and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import InputError
from .parser import make_parser

__all__ = ["main", "make_parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        arguments, unknown = make_parser().parse_known_args(argv)
        if unknown and not arguments.takes_overrides:
            raise InputError(f"unknown argument {unknown[0]!r}; see `ot-diffusers {arguments.name} --help`")
        return arguments.command(arguments, unknown)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
