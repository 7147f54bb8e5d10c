"""The quantities that curves are drawn against."""

from __future__ import annotations

from dataclasses import dataclass

from .config import STEPS

TIMESTEPS = "truncation_timestep"


@dataclass(frozen=True)
class Axis:
    """A quantity along which methods are studied.

    Attributes:
        key: of the curves in `results.json`, and the file name of their picture.
        title: short name, for tables.
        label: name in words, for pictures.
        calls: whether pictures show the function evaluations of a point, on a logarithmic axis, instead of its value.
        drawn: metrics and costs with a panel; none for the tested metrics.
        tabled: metrics with a table; none for the tested metrics.
    """

    key: str
    title: str
    label: str
    calls: bool = False
    drawn: tuple[str, ...] = ()
    tabled: tuple[str, ...] = ()


AXES = {
    STEPS: Axis("quality_by_steps", "steps", "number of function evaluations (NFE)", calls=True),
    TIMESTEPS: Axis(
        "curves",
        "T'",
        "T', the timestep at which the chain starts",
        drawn=("frechet_distance", "seconds_per_1000"),
        tabled=("frechet_distance", "recall_distance"),
    ),
}
