"""Means of losses, and the check that they are finite. A training step never waits for a value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import TrainingError
from ..transport.geometry import log_effective_rank

MAX_RANK_ROWS = 256


@dataclass
class Averages:
    """Means over the updates since the last record, and over the epoch so far, across all processes.

    Values stay on the device until a mean is needed: at records, epochs and checkpoints. There, every value is checked
    to be finite, so that a step never waits for the device, and a run that breaks loses at most `logging_steps`
    updates. Every checkpoint is checked before it is written, so the last one is good.

    Attributes:
        recent: (update, value) of each name since the last record, 0-d tensors.
        epoch: (sum, count) of each name up to the last record, over the epoch.
    """

    recent: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    epoch: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, update: int, values: Mapping[str, Tensor]) -> None:
        """Values of one forward pass for the update with this number, from 1."""
        for name, value in values.items():
            self.recent.setdefault(name, []).append((update, value.detach()))

    def forget(self, update: int) -> None:
        """Drop the values of an update that was skipped."""
        kept = {name: [entry for entry in entries if entry[0] != update] for name, entries in self.recent.items()}
        self.recent = {name: entries for name, entries in kept.items() if entries}

    def record(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last record, which are then added to those of the epoch.

        Raises:
            TrainingError: a value that is not finite, with its name and the update.
        """
        totals = self._totals(accelerator)
        means = {name: total / len(self.recent[name]) for name, total in totals.items()}
        self.epoch, self.recent = self._with_epoch(totals), {}
        return means

    def epoch_so_far(self, accelerator: Accelerator) -> dict[str, tuple[float, int]]:
        """(sum, count) of each name over the epoch, for a checkpoint in the middle of it.

        Raises:
            TrainingError: as `record`.
        """
        return self._with_epoch(self._totals(accelerator))

    def end_epoch(self) -> dict[str, float]:
        """Means over the epoch up to the last record; the next epoch begins."""
        means = {name: total / count for name, (total, count) in self.epoch.items()}
        self.epoch = {}
        return means

    def _totals(self, accelerator: Accelerator) -> dict[str, float]:
        """Sums over the updates since the last record, of means over the processes. In float64, sums of float32 numbers
        of similar size are exact, so that they do not depend on when records and checkpoints are taken."""
        if not self.recent:
            return {}
        values = {name: torch.stack([value for _, value in entries]) for name, entries in self.recent.items()}
        # Apple's GPUs lack float64.
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        local = torch.stack([entries.to(exact).sum() for entries in values.values()])
        totals = dict(zip(values, accelerator.reduce(local, "mean").tolist(), strict=True))
        broken = [name for name, total in totals.items() if not math.isfinite(total)]
        if broken:
            raise TrainingError(self._verdict({name: values[name] for name in broken}, accelerator))
        return totals

    def _with_epoch(self, totals: Mapping[str, float]) -> dict[str, tuple[float, int]]:
        sums = dict(self.epoch)
        for name, recent in totals.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + recent, count + len(self.recent[name]))
        return sums

    def _verdict(self, broken: Mapping[str, Tensor], accelerator: Accelerator) -> str:
        """The value that was first not finite, on any process. The loss is named only where none of its terms is."""
        firsts = {}
        for name, values in broken.items():
            updates = torch.tensor([update for update, _ in self.recent[name]], device=values.device)
            local = torch.where(values.isfinite(), updates.max() + 1, updates).min()
            firsts[name] = int(accelerator.gather(local.view(1)).min())
        name = min(firsts, key=lambda name: (firsts[name], name == "loss"))
        return (
            f"`{name}` is not finite in training step {firsts[name]}; the last checkpoint is from before, and would "
            "lead to the same error: lower learning_rate or max_grad_norm, or raise max_skipped_updates"
        )


@torch.no_grad()
def effective_rank(rows: Tensor) -> Tensor:
    """Effective number of directions in which rows [N, …] vary, 0-d float32: the metric of that name, on any device,
    without synchronisation. Only the first 256 rows count. Equal rows have rank 1.

    Example:
        >>> line = torch.arange(5.0)[:, None] * torch.ones(1, 3)
        >>> round(effective_rank(line).item(), 3), round(effective_rank(torch.eye(4)).item(), 3)
        (1.0, 3.0)
    """
    return log_effective_rank(rows[:MAX_RANK_ROWS].flatten(1).float().nan_to_num()).exp()
