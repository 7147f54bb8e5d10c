"""The package as a whole: what importing it costs, and what it offers."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ot_diffusers

ROOT = Path(__file__).parent.parent
HEAVY = ("accelerate", "datasets", "diffusers", "matplotlib", "sklearn", "torch", "torch_fidelity", "transformers")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, ot_diffusers; dir(ot_diffusers); print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.slow
def test_public_names_load_without_the_tools_of_the_scripts():
    names = [name for name in ot_diffusers.__all__ if name != "__version__"]
    scripts_only = ("datasets", "matplotlib", "torch_fidelity")
    code = (
        f"import sys, ot_diffusers; print([getattr(ot_diffusers, name).__name__ for name in {names}], "
        f"[name for name in {scripts_only} if name in sys.modules])"
    )
    assert run_python(code) == f"{names} []"


def test_lazy_names_are_the_public_names():
    assert set(ot_diffusers.__all__) == {*ot_diffusers._MODULES, "__version__"}
    assert set(ot_diffusers.__all__) <= set(dir(ot_diffusers))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'OTGuidedPipeline'"):
        ot_diffusers.OTGuidedPipeline  # noqa: B018


def test_version_is_the_one_that_was_installed():
    assert ot_diffusers.__version__ == version("ot-diffusers")


def test_every_cited_reference_is_listed():
    key = re.compile(r"\[[A-Z][A-Za-z]+\d{4}\]")
    cited = {match for path in (ROOT / "ot_diffusers").rglob("*.py") for match in key.findall(path.read_text("utf-8"))}
    listed = key.findall((ROOT / "REFERENCES.md").read_text("utf-8"))
    assert len(listed) == len(set(listed))
    assert cited <= set(listed), f"not in REFERENCES.md: {sorted(cited - set(listed))}"
