"""The dual objective of dense problems as a function of one potential, and the transport plan at a given potential.

In units of the temperature, u = f/eps and v = g/eps, with κ = eps/reach² (0 for balanced transport):

    P_ij = a_i b_j exp(u_i + v_j − C_ij/eps)
    D(u, v) = ⟨a, φ(u)⟩ + ⟨b, φ(v)⟩ − Σ_ij P_ij,     φ(u) = (1 − exp(−κu))/κ, or u for κ = 0

The optimal v given u has a closed form, which leaves a concave function of u alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import weighted_columns, weighted_rows

# One step multiplies a row or column by at most exp of this. Momentum can triple the exponent, which stays within the
# range of float32.
MAX_MOVE = 29.0


@dataclass(frozen=True)
class SemiDual:
    """P dual problems, each at one temperature.

    Attributes:
        cost: C, [P, N, M].
        eps: the temperature, a number or [P, 1].
        a, b: [P, N] and [P, M], the weights.
        log_a: [P, N], the logarithms of a.
        relaxation: κ, a number or [P, 1].
    """

    cost: Tensor
    eps: Tensor | float
    a: Tensor
    b: Tensor
    log_a: Tensor
    relaxation: Tensor | float

    @property
    def is_balanced(self) -> bool:
        """Whether both marginals are exact constraints."""
        return not isinstance(self.relaxation, Tensor) and self.relaxation == 0

    def at(self, u: Tensor) -> Plan:
        """The plan at u, [P, N], and the optimal v given u. It costs one exponential per entry."""
        rows = (u + self.log_a)[..., None]
        if isinstance(self.eps, Tensor):
            scores = torch.addcmul(rows, self.cost, self.eps[..., None].reciprocal(), value=-1)
        else:
            scores = torch.sub(rows, self.cost, alpha=1 / self.eps)
        peak = scores.amax(-2)
        matrix = scores.sub_(peak[..., None, :]).exp_()
        mass = matrix.sum(-2)
        v = -(peak + mass.log()) / (1 + self.relaxation)
        columns = self.b if self.is_balanced else self.b * torch.exp(-self.relaxation * v)
        matrix.mul_((columns / mass)[..., None, :])
        return Plan(self, u, v, matrix, matrix.sum(-1), columns)

    def take(self, problems: list[int]) -> SemiDual:
        """Selected problems of the batch."""
        if len(problems) == len(self.a):
            return self
        weights = (self.a[problems], self.b[problems], self.log_a[problems])
        return SemiDual(self.cost[problems], self.eps, *weights, self.relaxation)


@dataclass(frozen=True)
class Plan:
    """The plan at a point (u, v). Products with it give the sums of plans at nearby points:

        Σ_i P'_ij = exp(Δv_j) Σ_i P_ij exp(Δu_i)

    A nearby point is given by the factors exp(Δu) and exp(Δv) of its rows and columns.

    Attributes:
        dual: the problems.
        u, v: [P, N] and [P, M].
        matrix: [P, N, M].
        rows, columns: [P, N] and [P, M], the row and column sums.

    Reference: [Schmitzer2019].
    """

    dual: SemiDual
    u: Tensor
    v: Tensor
    matrix: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def targets(self) -> Tensor:
        """The target row sums, [P, N]: a exp(−κu)."""
        return self.dual.a if self.dual.is_balanced else self.dual.a * torch.exp(-self.dual.relaxation * self.u)

    @property
    def error(self) -> Tensor:
        """The marginal error ‖rows − targets‖₁ / Σ targets, [P]."""
        return (self.rows - self.targets).abs().sum(-1) / self.targets.sum(-1)

    @property
    def value(self) -> Tensor:
        """The dual objective D(u, v), [P]."""
        dual, relaxation = self.dual, self.dual.relaxation

        def phi(u: Tensor) -> Tensor:
            return u if dual.is_balanced else -torch.expm1(-relaxation * u) / relaxation

        return (dual.a * phi(self.u)).sum(-1) + (dual.b * phi(self.v)).sum(-1) - self.columns.sum(-1)

    def annealing_step(self) -> Tensor:
        """Row factors of one Sinkhorn iteration from the point itself, [P, N]."""
        return self._factors(self.dual.a, self.u, self.rows)

    def sinkhorn_step(self, factors: Tensor) -> Tensor:
        """Row factors after one Sinkhorn iteration from the row factors `factors`, [P, N]."""
        sums = weighted_columns(self.matrix, self.best_columns(factors))
        return self._factors(self.dual.a, self.u, sums)

    def best_columns(self, factors: Tensor) -> Tensor:
        """Factors of the optimal columns given row factors, [P, M]."""
        return self._factors(self.dual.b, self.v, weighted_rows(factors, self.matrix))

    def _factors(self, weights: Tensor, start: Tensor, sums: Tensor) -> Tensor:
        """Scaling factors that bring these row (or column) sums to their target marginals."""
        ratio = weights / sums
        if self.dual.is_balanced:
            return ratio.clamp(math.exp(-MAX_MOVE), math.exp(MAX_MOVE))
        relaxation = self.dual.relaxation
        return ((ratio.log() - relaxation * start) / (1 + relaxation)).clamp(-MAX_MOVE, MAX_MOVE).exp()

    def errors_after(self, factors: Tensor, column_factors: Tensor) -> tuple[Tensor, Tensor]:
        """The marginal error after scaling rows and columns, and the largest relative error of a row; [P] each."""
        rows = factors * weighted_columns(self.matrix, column_factors)
        targets = self.targets if self.dual.is_balanced else self.targets * factors**-self.dual.relaxation
        excess = (rows - targets).abs()
        return excess.sum(-1) / targets.sum(-1), (excess / targets).amax(-1)

    def take(self, problems: list[int]) -> Plan:
        """Selected problems of the batch."""
        if len(problems) == len(self.u):
            return self
        return Plan(self.dual.take(problems), *(tensor[problems] for tensor in self._tensors))

    def put(self, problems: list[int], plan: Plan) -> Plan:
        """The batch with the selected problems replaced by those of `plan`."""
        if len(problems) == len(self.u):
            return plan
        index = torch.tensor(problems, dtype=torch.long, device=self.u.device)
        pairs = zip(self._tensors, plan._tensors, strict=True)
        return Plan(self.dual, *(mine.index_copy(0, index, theirs) for mine, theirs in pairs))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.u, self.v, self.matrix, self.rows, self.columns
