"""A batch of entropic transport problems and their solutions. A single problem is a batch of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import geometry
from .geometry import Cost, centred
from .semidual import SemiDual

# Smallest ratio of successive blurs while annealing: each solution must be a good start for the next temperature.
SMALLEST_SCALING = 0.5


@dataclass(frozen=True)
class Potentials:
    """Dual solution of one entropic transport problem, or of a batch of P.

    Attributes:
        f: [N] or [P, N], potential of the first cloud, in units of cost like `g`.
        g: [M] or [P, M], potential of the second cloud.
        marginal_error: ‖r − a‖₁ in [0, 2], 0-d or [P]: how far the row sums r of the plan were from the weights a when
            the solver stopped, on the CPU if the host has read it. For unbalanced problems a is replaced by a
            exp(−f/reach²), and the error is divided by its mass.
        iterations: number of iterations, each with one evaluation of the plan; in a batch, of the slowest problem.
    """

    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: int

    @property
    def T(self) -> Potentials:
        """The same solution with both clouds exchanged."""
        return Potentials(self.g, self.f, self.marginal_error, self.iterations)

    def put(self, problems: list[int], others: Potentials) -> Potentials:
        """This batch, with `others` as the solutions of the selected problems; their iterations are added."""
        iterations = self.iterations + others.iterations
        if len(problems) == len(self.f):
            return replace(others, iterations=iterations)

        def merged(mine: Tensor, theirs: Tensor) -> Tensor:
            return mine.index_copy(0, torch.tensor(problems, dtype=torch.long, device=mine.device), theirs)

        error = merged(self.marginal_error, others.marginal_error)
        return Potentials(merged(self.f, others.f), merged(self.g, others.g), error, iterations)

    def to(self, dtype: torch.dtype) -> Potentials:
        """The same solution in another dtype."""
        return Potentials(self.f.to(dtype), self.g.to(dtype), self.marginal_error.to(dtype), self.iterations)

    @classmethod
    def join(cls, parts: Sequence[Potentials]) -> Potentials:
        """Several batches, concatenated into one."""
        if len(parts) == 1:
            return parts[0]
        f, g = torch.cat([part.f for part in parts]), torch.cat([part.g for part in parts])
        error = torch.cat([part.marginal_error for part in parts])
        return cls(f, g, error, max(part.iterations for part in parts))

    def __getitem__(self, index: int | slice | list[int] | None) -> Potentials:
        """One problem of the batch, or several; None adds a batch dimension."""
        return Potentials(self.f[index], self.g[index], self.marginal_error[index], self.iterations)


@dataclass(frozen=True)
class Problem:
    """P transport problems of the same size and blur.

    Attributes:
        cost: [P, N, M], the costs.
        a, b: [P, N] and [P, M], the weights; positive, sum 1.
        blur: length; eps = blur² is the temperature.
        reach: length scale of unbalanced transport, None for balanced transport.
    """

    cost: Cost
    a: Tensor
    b: Tensor
    blur: float
    reach: float | None = None

    @property
    def T(self) -> Problem:
        """The same problems with both clouds exchanged."""
        return Problem(self.cost.T, self.b, self.a, self.blur, self.reach)

    def take(self, problems: list[int]) -> Problem:
        """Selected problems of the batch."""
        if len(problems) == len(self.a):
            return self
        return replace(self, cost=self.cost.take(problems), a=self.a[problems], b=self.b[problems])

    @property
    def eps(self) -> float:
        """Temperature: the strength of the entropic regularisation, blur²."""
        return self.blur**2

    def relaxation(self, eps: Tensor | float) -> Tensor | float:
        """κ = eps / reach²; 0 for balanced transport."""
        return 0.0 if self.reach is None else eps / self.reach**2

    def semidual(self, eps: Tensor | float) -> SemiDual:
        """The semi-dual of dense problems at a temperature, given as a number or [P, 1]."""
        return SemiDual(self.cost.matrix, eps, self.a, self.b, self.a.log(), self.relaxation(eps))

    def row_mass(self, f: Tensor) -> Tensor:
        """Row sums of the plan at the solution, [P, N]: a, or a exp(−f/reach²) for unbalanced transport."""
        return self.a if self.reach is None else self.a * torch.exp(-f / self.reach**2)

    def misplaced(self, potentials: Potentials) -> Tensor:
        """The marginal error as a share of the total mass, [P]; unbalanced transport moves only a part of it."""
        error = potentials.marginal_error
        if self.reach is None:
            return error
        mass = self.row_mass(potentials.f).sum(-1).to(error)
        return torch.where(mass <= torch.finfo(mass.dtype).tiny, 0.0, error * mass)

    def displacement(self, potentials: Potentials) -> Tensor:
        """∂OT/∂x, [P, N, D]: row mass × (x − T(x)).

        Reference: [Feydy2019].
        """
        sent = self.cost.barycentric_projection(potentials.g, self.b.log(), self.eps)
        return self.row_mass(potentials.f)[..., None] * (self.cost.x - sent)

    def value(self, potentials: Potentials) -> Tensor:
        """The dual objective at the optimum, [P]; for unbalanced transport it includes the mass terms.

        Reference: [Sejourne2019].
        """
        if self.reach is None:
            return (self.a * potentials.f).sum(-1) + (self.b * potentials.g).sum(-1)
        rho = self.reach**2
        # With the optimal f for g, the plan has the mass of its rows, and an error of g has a second-order effect only.
        f = self.cost.softmin(potentials.g, self.b.log(), self.eps) / (1 + self.relaxation(self.eps))
        f_loss, g_loss = (self.a * torch.expm1(-f / rho)).sum(-1), (self.b * torch.expm1(-potentials.g / rho)).sum(-1)
        return -(rho + self.eps) * f_loss - rho * g_loss


def as_batch(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clouds [N, D] or [P, N, D] and [M, D] or [P, M, D], and weights, expanded to P problems without a copy."""
    count = max(len(cloud) if cloud.ndim == 3 else 1 for cloud in (x, y))
    x, y = (cloud.expand(count, *cloud.shape[-2:]) for cloud in (x, y))
    a, b = (weights.expand(count, weights.shape[-1]) for weights in (a, b))
    return x, y, a, b


def problems(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, blur: float, reach: float | None
) -> Iterator[tuple[slice, Problem]]:
    """The problems between the clouds of `as_batch`, in sub-batches that fit in memory."""
    x, y, a, b = as_batch(x, y, a, b)
    size = max(1, geometry.MAX_DENSE_ENTRIES // (x.shape[-2] * y.shape[-2]))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield part, Problem(Cost(*centred(x[part], y[part])), a[part], b[part], blur, reach)


def annealing_schedule(diameter: float, blur: float, scaling: float, max_levels: int) -> list[float]:
    """Decreasing temperatures from diameter² to blur², with a constant ratio near `scaling`².

    The ratio of successive blurs is at least `SMALLEST_SCALING`, and it is raised or lowered further so that there are
    at most `max_levels` temperatures above the last.
    """
    scaling, ratio = max(scaling, SMALLEST_SCALING), blur / max(diameter, blur)
    levels = math.ceil(math.log(ratio) / math.log(scaling))
    if levels > max_levels:
        levels, scaling = max_levels, ratio ** (1 / max(1, max_levels))
    return [(blur / scaling**level) ** 2 for level in range(levels, -1, -1)]
