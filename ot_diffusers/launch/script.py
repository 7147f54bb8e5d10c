"""A training script as a program: its help, its exit status, and one line for every error."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

from ..config import describe, load_config
from ..errors import InputError, TrainingError, environment_error
from .commands import SCRIPTS, presets_of
from .signals import end_with_launcher, stop_on_signals

C = TypeVar("C")

SILENCE_SECONDS = 10.0


def run_script(main: Callable[[C], None], config_class: type[C], description: str) -> None:
    """Run `main` with the configuration from the command line; errors become one line on stderr.

    The exit status is 0 also after SIGTERM or SIGINT, which end the run with a checkpoint; 2 for bad input; 1 where the
    run, the disk, the memory or another process failed.
    """
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(help_text(config_class, description))
        return
    end_with_launcher()
    plain_warnings()
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
        line, status = f"{reason}; rerun the same command to resume from the last checkpoint", 1
    # The exception is released, and with it the loop's progress bar, so that the line stands alone.
    if int(os.environ.get("RANK", 0)) > 0:
        # The launcher ends the other processes when one has left. Only where it does not, this process reports too.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SILENCE_SECONDS)
    sys.stderr.write(f"error: {line}\n")
    sys.exit(status)


def plain_warnings() -> None:
    """Show warnings as lines of text, without the source that raised them."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def help_text(config_class: type, description: str) -> str:
    """The description of a script, in lines of 80 characters but for its command, then its options and presets."""
    name = next(name for name, (_, of_script) in SCRIPTS.items() if of_script is config_class)
    paragraphs = [
        text if text.startswith(" ") else textwrap.fill(text, 80) for text in description.rstrip().split("\n\n")
    ]
    presets = "\n".join(f"  configs/{preset}" for preset in presets_of(name))
    options = f"options, given as key=value with their defaults:\n\n{describe(config_class)}"
    return "\n\n".join([*paragraphs, options, f"presets for --config:\n{presets}\n"])
