"""Interleaved timing: every repeat runs each candidate once, so that other load on the machine affects all equally."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: the quantity.
        value: median over the repeats.
        spread: smallest and largest value over the repeats.
        target: bound that the median should reach.
        at_least: whether the target is a lower bound.
        unit: behind the figure.
        seconds: median of each candidate.
        details: what else a reader needs.
    """

    name: str
    value: float
    spread: tuple[float, float]
    target: float | None = None
    at_least: bool = False
    unit: str = "×"
    seconds: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def interleave(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every repeat, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            synchronise()
            started = time.perf_counter()
            run()
            synchronise()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_row(
    name: str, seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str, **options: object
) -> Row:
    """The ratio numerator / denominator of each repeat."""
    ratios = [a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)]
    medians = {key: round(statistics.median(values), 5) for key, values in seconds.items()}
    spread = (min(ratios), max(ratios))
    return Row(name, statistics.median(ratios), spread, seconds=medians, **options)  # type: ignore[arg-type]


def wait_rows(candidates: Mapping[str, Callable[[], object]]) -> Iterator[Row]:
    """How often the host waits for the GPU in a run of each candidate, and in which lines; nothing on a CPU."""
    for name, run in candidates.items() if torch.cuda.is_available() else ():
        run()  # what is made once is made here
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        count = float(lines.total())
        yield Row(f"times the host waits: {name}", count, (count, count), unit="", details={"in": dict(lines)})


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh_process_seconds(command: Sequence[str], repeats: int) -> list[float]:
    """Wall time of a command in fresh processes."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return seconds


def peak_memory_mib(code: str) -> float:
    """Growth of the peak resident memory of a fresh process after `code` calls `start()`, and the whole peak if it does
    not; Linux only."""
    program = f"""
import re
before = 0
def kilobytes(name):
    return int(re.search(rf"{{name}}:\\s+(\\d+)", open("/proc/self/status").read())[1])
def start():
    global before
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = kilobytes("VmRSS")
{code}
print(kilobytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024
