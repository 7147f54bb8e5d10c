"""A training script as a program: its help, its exit status, and one line for whatever ends it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from ..config import describe, load_config
from ..errors import InputError, TrainingError, environment_error
from .signals import end_with_launcher, stop_on_signals

C = TypeVar("C")

SILENCE_SECONDS = 10.0


def run_script(main: Callable[[C], None], config_class: type[C], launch_line: str) -> None:
    """Run `main` with the configuration from the command line, so that it ends well, or with one line on stderr.

    The exit status is 0 also after SIGTERM or SIGINT, which end the run with a checkpoint; 2 for bad input; 1 where the
    run broke, or its environment did: disk, memory, another process.
    """
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(f"{launch_line}\n\noptions, as key=value:\n{describe(config_class)}\n")
        return
    end_with_launcher()
    try:
        with stop_on_signals():
            main(load_config(config_class, arguments))
        return
    except InputError as error:
        line, status = str(error), 2
    except TrainingError as error:
        line, status = str(error), 1
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except Exception as error:
        reason = environment_error(error)
        if reason is None:
            raise
        line, status = f"{reason}; the same command goes on from the last checkpoint", 1
    # The exception is gone, and with it the loop's progress bar: the line stands alone.
    if int(os.environ.get("RANK", 0)) > 0:
        # The launcher ends the other processes when one has left. One that is still there has more to say than the
        # first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SILENCE_SECONDS)
    sys.stderr.write(f"error: {line}\n")
    sys.exit(status)
