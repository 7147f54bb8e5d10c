"""Several processes as one: a loss over all of their rows, and a decision to stop that all of them share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

CONTINUE, OUT_OF_TIME, SIGNALLED = range(3)


class Agreement:
    """The greatest of what the processes propose, known to all of them at the same update.

    The proposals travel on the CPU beside the next update and are read after it, so that no device is waited for.
    A single process agrees with itself at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._travelling: tuple[Any, Tensor] | None = None

    def on(self, proposal: int) -> int:
        """The agreement on the last call's proposals; on this one's where there is one process only."""
        if self._group is None:
            return proposal
        agreed = CONTINUE
        if self._travelling is not None:
            work, value = self._travelling
            work.wait()
            agreed = int(value)
        value = torch.tensor(proposal)
        greatest = torch.distributed.ReduceOp.MAX
        self._travelling = (
            torch.distributed.all_reduce(value, greatest, group=self._group, async_op=True),
            value,
        )
        return agreed


class _GatherRows(torch.autograd.Function):
    """All processes' rows in order; the gradient of a process' own rows times the number of processes, which averaging
    undoes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, accelerator: Accelerator) -> Tensor:
        ctx.accelerator, ctx.count = accelerator, len(rows)
        return accelerator.gather(rows.contiguous())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        first = ctx.accelerator.process_index * ctx.count
        return grad_output[first : first + ctx.count] * ctx.accelerator.num_processes, None


def gather_rows(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """[B, D] of every process as one [processes · B, D], for a loss that is one problem over all of them.

    Each process computes the same global loss. Distributed training averages gradients over processes, so that the
    result is the gradient of one process on the whole batch.
    """
    return rows if accelerator.num_processes == 1 else _GatherRows.apply(rows, accelerator)
