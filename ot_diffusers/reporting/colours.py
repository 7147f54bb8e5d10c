"""Every arm keeps its colour in all pictures and tables."""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = {
    "real": "#6b7280",
    "baseline": "#3b6fb6",
    "OT-trained": "#d97706",
    "OT-guided": "#0f9d76",
    "vanilla, truncated": "#a16207",
    "Gaussian": "#0e8fa8",
    "Gaussian, class-wise": "#3b6fb6",
    "VAE": "#8b5cf6",
    "GAN": "#c2415d",
    "OT, original": "#9d4f9a",
    "OT": "#0f9d76",
    "oracle": "#1f2937",
}
"""Colours of the arms with a fixed one; the others take `SPARE_COLOURS` in the order in which they are named."""
SPARE_COLOURS = ("#8b5cf6", "#c2415d", "#0e8fa8", "#7c6f1f", "#9d4f9a", "#52606d")


def arm_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour for each arm. Fixed names are matched without regard to case, `_` and spaces."""
    fixed = {_plain(name): colour for name, colour in COLOURS.items()}
    others = [name for name in names if _plain(name) not in fixed]
    spare = {name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(others)}
    return {name: fixed.get(_plain(name)) or spare[name] for name in names}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")
