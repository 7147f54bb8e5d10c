"""Losses over the rows of all processes, and a common decision of all processes to stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

CONTINUE, OUT_OF_TIME, SIGNALLED = range(3)


class Agreement:
    """The maximum of the processes' proposals, known to all of them at the same update.

    The proposals are exchanged on the CPU during the next update and read after it, so that no process waits for a
    device. A single process uses its own proposal at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._travelling: tuple[Any, Tensor] | None = None

    def on(self, proposal: int) -> int:
        """The agreement on the proposals of the last call; with a single process, of this call."""
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
    """The rows of all processes in order. The gradient of a process' own rows is multiplied by the number of processes,
    which the average over processes undoes."""

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
