"""Optimal transport between point clouds, in torch alone. One convention: C(x, y) = ½‖x − y‖², eps = blur²."""

from .divergence import (
    DivergencePotentials,
    check_backend,
    divergence_gradient,
    divergence_gradient_at,
    self_transport_cost,
    sinkhorn_divergence,
)
from .geometry import median_distance
from .kernel import mmd_displacement
from .multiscale import divergence_value, has_stored_solver
from .problem import Potentials
from .sinkhorn import self_potential, sinkhorn_potentials

__all__ = [
    "DivergencePotentials",
    "Potentials",
    "check_backend",
    "divergence_gradient",
    "divergence_gradient_at",
    "divergence_value",
    "has_stored_solver",
    "median_distance",
    "mmd_displacement",
    "self_potential",
    "self_transport_cost",
    "sinkhorn_divergence",
    "sinkhorn_potentials",
]
