"""One loss over several processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


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
