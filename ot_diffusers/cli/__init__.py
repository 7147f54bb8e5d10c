"""The command line: `ot-diffusers demo | train | sample | evaluate | compare | report | push | info | …`.

Bad input gives one line on stderr and exit status 2.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from ..errors import PLACE, SHOWN, InputError, TrainingError, environment_error, require
from ..files import is_first_process, local_or_hub
from ..launch.script import SILENCE_SECONDS
from .parser import make_parser

__all__ = ["main", "make_parser"]

BAD_INPUT, BROKEN, INTERRUPTED, NOBODY_READS = 2, 1, 130, 141
"""Exit statuses; the last is that of a program ended by SIGPIPE."""

INPUTS = ("pipeline", "images", "run", "features", "denoiser")
"""Arguments that name a folder or a Hub id."""

SHARED_OUT = ("sample", "evaluate")
"""Commands whose work several processes of a launcher share."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return _leave_quietly()
    except SystemExit:  # of --help and --version
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            return _leave_quietly()
        raise
    except InputError as error:
        return _fail(str(error), BAD_INPUT)
    except OSError as error:
        line = environment_error(error) or " ".join(str(error).split())[:SHOWN]
        return _fail(line, BAD_INPUT if error.errno in PLACE else BROKEN)
    except RuntimeError as error:
        if type(error) not in (RuntimeError, TrainingError):
            raise
        return _fail(str(error), BROKEN)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.name is None:
        require(not unknown, "command", "be one of `ot-diffusers --help`", "".join(unknown[:1]))
        parser.print_help()
        return 0
    if unknown and not arguments.takes_overrides:
        raise InputError(f"unknown argument {unknown[0]!r}; see `ot-diffusers {arguments.name} --help`")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    alone = processes == 1 or arguments.name in SHARED_OUT
    require(alone, "num_processes", f"be 1 for `{arguments.name}`, which runs in one process", processes)
    if arguments.check_output is not None and arguments.output is not None:
        arguments.output = arguments.check_output(arguments.output)
    for name in INPUTS:
        if getattr(arguments, name, None) is not None:
            local_or_hub(getattr(arguments, name), name)
    return arguments.command(arguments, unknown)


def _fail(line: str, status: int) -> int:
    """Write the error line. Other processes than the first wait, and the launcher ends them."""
    if not is_first_process():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SILENCE_SECONDS)
    sys.stderr.write(f"error: {line}\n")
    return status


def _leave_quietly() -> int:
    """The reader of the output has closed it, as `head` does: discard the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return NOBODY_READS
