"""A batch of entropic transport problems, and what solving them gives. Single problems are batches of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import geometry
from .geometry import Cost, centred
from .semidual import SemiDual

# The ladder of temperatures: a solution must be a start for the next one.
SMALLEST_SCALING = 0.5


@dataclass(frozen=True)
class Potentials:
    """Dual solution of one entropic transport problem, or of a batch of P.

    Attributes:
        f: [N] or [P, N], potential of the first cloud; `f` and `g` are in units of cost.
        g: [M] or [P, M], potential of the second cloud.
        marginal_error: ‖r − a‖₁ in [0, 2], 0-d or [P], how far the row sums of the plan were from their weights when
            the loop stopped (on the CPU where the host has seen it; for unbalanced problems how far from
            a exp(−f/reach²), over its mass).
        iterations: passes over the plan; over the slowest, for a batch.
    """

    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: int

    @property
    def T(self) -> Potentials:
        """The same solution seen from the other cloud."""
        return Potentials(self.g, self.f, self.marginal_error, self.iterations)

    def put(self, problems: list[int], others: Potentials) -> Potentials:
        """The batch with other solutions of some of its problems, whose passes came after these."""
        iterations = self.iterations + others.iterations
        if len(problems) == len(self.f):
            return replace(others, iterations=iterations)

        def merged(mine: Tensor, theirs: Tensor) -> Tensor:
            return mine.index_copy(0, torch.tensor(problems, dtype=torch.long, device=mine.device), theirs)

        error = merged(self.marginal_error, others.marginal_error)
        return Potentials(merged(self.f, others.f), merged(self.g, others.g), error, iterations)

    def to(self, dtype: torch.dtype) -> Potentials:
        """The same solution, rounded."""
        return Potentials(self.f.to(dtype), self.g.to(dtype), self.marginal_error.to(dtype), self.iterations)

    @classmethod
    def join(cls, parts: Sequence[Potentials]) -> Potentials:
        """Batches one after the other as one."""
        if len(parts) == 1:
            return parts[0]
        f, g = torch.cat([part.f for part in parts]), torch.cat([part.g for part in parts])
        error = torch.cat([part.marginal_error for part in parts])
        return cls(f, g, error, max(part.iterations for part in parts))

    def __getitem__(self, index: int | slice | list[int] | None) -> Potentials:
        """One problem of a batch, or some; None makes a batch of one."""
        return Potentials(self.f[index], self.g[index], self.marginal_error[index], self.iterations)


@dataclass(frozen=True)
class Problem:
    """P problems of one size and one blur.

    Attributes:
        cost: [P, N, M].
        a, b: [P, N] and [P, M], the weights; positive, with sum one.
        blur: length; eps = blur² is the temperature.
        reach: length of relaxed marginals, None where mass is conserved.
    """

    cost: Cost
    a: Tensor
    b: Tensor
    blur: float
    reach: float | None = None

    @property
    def T(self) -> Problem:
        """The same problems seen from the other clouds."""
        return Problem(self.cost.T, self.b, self.a, self.blur, self.reach)

    def take(self, problems: list[int]) -> Problem:
        """Some of the problems."""
        if len(problems) == len(self.a):
            return self
        return replace(self, cost=self.cost.take(problems), a=self.a[problems], b=self.b[problems])

    @property
    def eps(self) -> float:
        """The strength of the entropy, blur²."""
        return self.blur**2

    def relaxation(self, eps: Tensor | float) -> Tensor | float:
        """κ = eps/reach²; 0 where mass is conserved."""
        return 0.0 if self.reach is None else eps / self.reach**2

    def semidual(self, eps: Tensor | float) -> SemiDual:
        """The dual of dense problems at a temperature, a number or [P, 1]."""
        divisor = eps[..., None] if isinstance(eps, Tensor) else eps
        return SemiDual(self.cost.matrix / divisor, self.a, self.b, self.a.log(), self.relaxation(eps))

    def row_mass(self, f: Tensor) -> Tensor:
        """Mass of the rows at the solution, [P, N]: a, or what is left of it within reach."""
        return self.a if self.reach is None else self.a * torch.exp(-f / self.reach**2)

    def misplaced(self, potentials: Potentials) -> Tensor:
        """The marginal error in units of all mass, [P], where part of it may be out of reach."""
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
        """The dual objective at the optimum, [P]; with `reach` the transported mass, at most 1, enters too.

        Reference: [Sejourne2019].
        """
        if self.reach is None:
            return (self.a * potentials.f).sum(-1) + (self.b * potentials.g).sum(-1)
        rho = self.reach**2
        # With the best f for g the mass of the plan is that of its rows, and the error of g enters by its square.
        f = self.cost.softmin(potentials.g, self.b.log(), self.eps) / (1 + self.relaxation(self.eps))
        lost, other = (self.a * torch.expm1(-f / rho)).sum(-1), (self.b * torch.expm1(-potentials.g / rho)).sum(-1)
        return -(rho + self.eps) * lost - rho * other


def as_batch(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clouds [N, D] or [P, N, D] and [M, D] or [P, M, D], and weights, as those of P problems, without a copy."""
    count = max(len(cloud) if cloud.ndim == 3 else 1 for cloud in (x, y))
    x, y = (cloud.expand(count, *cloud.shape[-2:]) for cloud in (x, y))
    a, b = (weights.expand(count, weights.shape[-1]) for weights in (a, b))
    return x, y, a, b


def problems(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, blur: float, reach: float | None
) -> Iterator[tuple[slice, Problem]]:
    """The problems between such clouds, in batches that fit in memory."""
    x, y, a, b = as_batch(x, y, a, b)
    size = max(1, geometry.MAX_DENSE_ENTRIES // (x.shape[-2] * y.shape[-2]))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield part, Problem(Cost(*centred(x[part], y[part])), a[part], b[part], blur, reach)


def annealing_ladder(diameter: float, blur: float, scaling: float, max_levels: int) -> list[float]:
    """Temperatures from diameter² to blur², each `scaling`² times the one before, within what suits the solver: not
    below `SMALLEST_SCALING`, and not on more than so many levels above the last, which are spread evenly instead."""
    scaling, ratio = max(scaling, SMALLEST_SCALING), blur / max(diameter, blur)
    levels = math.ceil(math.log(ratio) / math.log(scaling))
    if levels > max_levels:
        levels, scaling = max_levels, ratio ** (1 / max(1, max_levels))
    return [(blur / scaling**level) ** 2 for level in range(levels, -1, -1)]
