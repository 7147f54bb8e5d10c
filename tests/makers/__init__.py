"""What tests of several folders share: tiny runs and models, a Hub, and looks at what lies on disk."""

from __future__ import annotations

import random
from pathlib import Path

from ot_diffusers import cli

ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> int:
    """Exit status of the command line."""
    return cli.main([str(argument) for argument in arguments])


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def flip(file: Path, seed: int) -> None:
    """One bit of the file."""
    content = bytearray(file.read_bytes())
    position = random.Random(seed).randrange(len(content))
    content[position] ^= 1 << seed % 8
    file.write_bytes(bytes(content))
