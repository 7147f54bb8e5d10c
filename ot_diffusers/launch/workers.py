"""Several processes of a script on this machine: `python -m ot_diffusers.launch.workers COUNT SCRIPT [ARGUMENT ...]`.

This is torchrun but for two things. SIGTERM and SIGINT are passed on to the processes, which save and exit, where
torchrun would end them. The exit status is that of the process that failed first, where torchrun always returns 1.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil


def main(arguments: Sequence[str]) -> int:
    """Run the script in the number of processes that is the first argument; returns the exit status."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the script has printed the error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    count, *script = arguments
    options = ["--standalone", f"--nproc-per-node={count}"]
    if "--signals-to-handle" in torchrun.get_args_parser().format_help():
        options.append("--signals-to-handle=SIGQUIT")
    try:
        torchrun.run(torchrun.parse_args([*options, *script]))
    except SignalException as stop:  # torch 2.6 always handles signals, and has waited for the processes
        return 128 + stop.sigval
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """The handler: pass the signal on to every child process."""
    for child in psutil.Process().children():
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
