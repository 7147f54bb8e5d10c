"""Imports point only downwards, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import functools

import pytest
from makers import ROOT

PACKAGE = ROOT / "ot_diffusers"

# A file or folder may import those of its own line and of the lines above. CONTRIBUTING shows the same order.
LAYERS = (
    ("errors",),
    ("images", "seeds", "files"),
    ("transport", "schedules"),
    ("models",),
    ("guidance", "losses"),
    ("pipelines", "registration"),
    ("data", "config", "cache"),
    ("launch",),
    ("features", "outgoing"),
    ("sampling", "references"),
    ("training", "evaluation"),
    ("reporting",),
    ("hub",),
    ("studies",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# `__init__` of the package loads names when they are asked for.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


@functools.cache
def imports_of(module: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in it, but for names that only type checkers read."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in guarded:
            base = package[: len(package) - node.level + 1]
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            targets = {f"{source}.{alias.name}".strip(".") for alias in node.names}
            found |= {target if target in MODULES else source for target in targets}
    return found - {module, ""}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    level = LEVEL[module.split(".")[0]]
    upward = {name for name in imports_of(module) if LEVEL[name.split(".")[0]] > level}
    assert not upward


def test_no_circles() -> None:
    left = {module: imports_of(module) & MODULES.keys() for module in MODULES}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_every_file_and_folder_has_a_layer() -> None:
    assert {module.split(".")[0] for module in MODULES} == LEVEL.keys()
