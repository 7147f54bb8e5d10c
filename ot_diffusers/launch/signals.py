"""SIGTERM and SIGINT as a request: a training script finishes its update, saves, and exits with status 0."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LAUNCHER_VARIABLES = ("OT_DIFFUSERS_LAUNCHED", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables that `ot-diffusers train`, `accelerate launch` and `torchrun` set for their processes."""

INSISTING_SECONDS = 2.0
"""A signal repeated sooner is the same request: `timeout` and terminals signal a process and also its group."""


class StopRequest:
    """The signal that has arrived, if any, and whether a training loop checks for it.

    Attributes:
        signal: its name, or None.
        heeded: whether a training loop has begun. Before that, there is nothing to save.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.heeded = False
        self._since = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A single process that has not begun to train exits at once; a second SIGINT interrupts."""
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > INSISTING_SECONDS:
            raise KeyboardInterrupt
        if not self.heeded and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            sys.stderr.write(
                f"stopped by {self.signal} before the first training step; rerun the same command to start\n"
            )
            raise SystemExit(0)


request = StopRequest()
"""The one of this process."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """In the block, SIGTERM and SIGINT ask the training loop to stop. After it they are ignored, because the work is
    done and the command should not fail. An exception restores the earlier handlers."""
    request.__init__()  # type: ignore[misc]
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield
    except BaseException:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)  # Python removes its own handlers before the process ends


def end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher of this process is killed, which could then no longer stop it."""
    if sys.platform == "linux" and any(name in os.environ for name in LAUNCHER_VARIABLES):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
