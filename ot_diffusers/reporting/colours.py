"""One colour for every method, the same in all pictures and tables."""

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
"""Methods with a fixed colour; the others take `SPARE_COLOURS` in the order of their names."""
SPARE_COLOURS = ("#8b5cf6", "#c2415d", "#0e8fa8", "#7c6f1f", "#9d4f9a", "#52606d")


def arm_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour for each method; a guided variant has the colour of its method.

    Names are compared with those of `COLOURS` without regard to case, `_` and spaces.
    """
    colours = {name: colour for name in names if (colour := _fixed_colour(name))}
    spare = [colour for colour in SPARE_COLOURS if colour not in colours.values()] or list(SPARE_COLOURS)
    others = [name for name in names if name not in colours]
    colours |= {name: spare[index % len(spare)] for index, name in enumerate(others)}
    return {name: colours[name] for name in names}


def _fixed_colour(name: str) -> str | None:
    fixed = {_plain(method): colour for method, colour in COLOURS.items()}
    return fixed.get(_plain(name)) or fixed.get(_plain(name.partition(", guided")[0]))


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")
