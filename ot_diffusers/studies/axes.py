"""What curves are drawn against."""

from __future__ import annotations

from dataclasses import dataclass

from .config import STEPS

TIMESTEPS = "truncation_timestep"


@dataclass(frozen=True)
class Axis:
    """A quantity that methods are studied along.

    Attributes:
        key: of the curves in `results.json`, and the name of their picture.
        title: of the quantity.
        calls: whether pictures show the network calls of each point, on a logarithmic axis, in place of its value.
        drawn: metrics and costs with a panel; none is the tested metrics.
        tabled: metrics with a table; none is the tested metrics.
    """

    key: str
    title: str
    calls: bool = False
    drawn: tuple[str, ...] = ()
    tabled: tuple[str, ...] = ()


AXES = {
    STEPS: Axis("quality_by_steps", "steps", calls=True),
    TIMESTEPS: Axis(
        "curves", "T'", drawn=("frechet_distance", "seconds_per_1000"), tabled=("frechet_distance", "recall_distance")
    ),
}
