"""Optimal transport between point clouds, in torch alone. One convention: C(x, y) = ½‖x − y‖², eps = blur²."""

from .divergence import divergence_gradient, self_transport_cost, sinkhorn_divergence
from .sinkhorn import Potentials, median_distance, self_potential, sinkhorn_potentials

__all__ = [
    "Potentials",
    "divergence_gradient",
    "median_distance",
    "self_potential",
    "self_transport_cost",
    "sinkhorn_divergence",
    "sinkhorn_potentials",
]
