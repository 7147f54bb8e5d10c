"""The package as a whole: what importing it costs, and what it offers."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest
from accelerate import tracking
from makers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

import ot_diffusers
from ot_diffusers.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAVY = ("accelerate", "datasets", "diffusers", "matplotlib", "sklearn", "torch", "torch_fidelity", "transformers")

APART = ("dev", "docs", "space")
"""Extras of those who work on the package, with the tools of today."""


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


def test_the_citation_is_of_this_version():
    assert f"\nversion: {ot_diffusers.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_lower_bounds_are_the_versions_of_the_oldest_environment():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in APART}
    bounds = map(Requirement, [*project["dependencies"], *(line for lines in extras.values() for line in lines)])
    lowest = {bound.name: Version(*(one.version for one in bound.specifier)) for bound in bounds if bound.specifier}
    lines = [line.split("==") for line in (ROOT / "oldest.txt").read_text("utf-8").splitlines() if "==" in line]
    assert lowest == {name: Version(number) for name, number in lines}


def _draw() -> None:
    import_module("ot_diffusers.reporting.plots")


def _complete() -> None:
    import_module("ot_diffusers.cli.publishing").run_completion(None, [])


def _solve() -> None:
    points = import_module("torch").zeros(2, 2)
    ot_diffusers.sinkhorn_divergence(points, points, blur=1.0, backend="geomloss")


def _evaluate() -> None:
    import_module("ot_diffusers.evaluation.extractors").load_evaluator("inception-v3-compat")


def _wrap() -> None:
    ot_diffusers.BackboneFeatureExtractor(backbone={})


def _accelerator(**options):
    config = import_module("ot_diffusers.config").BaselineConfig(**options)
    return import_module("ot_diffusers.training").make_accelerator(config)


def _track() -> None:
    _accelerator(report_to="tensorboard")


def _uninstall(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither importable nor among the trackers that accelerate found when it was imported."""
    monkeypatch.delitem(sys.modules, "ot_diffusers.reporting.plots", raising=False)
    for name in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(tracking, "_available_trackers", [])


@pytest.mark.parametrize(
    ("library", "group", "use"),
    [
        ("matplotlib", "plots", _draw),
        ("shtab", "completion", _complete),
        ("geomloss", "solvers", _solve),
        ("torch_fidelity", "evaluation", _evaluate),
        ("transformers", "backbones", _wrap),
        ("tensorboard", "tracking", _track),
    ],
)
def test_a_missing_extra_is_one_line_that_says_what_to_install(library, group, use, monkeypatch):
    _uninstall(library, monkeypatch)
    with pytest.raises(InputError, match=rf"^[^\n]*pip install 'ot-diffusers\[{group}\]'[^\n]*$"):
        use()


def test_without_tensorboard_runs_are_not_tracked(monkeypatch):
    assert [str(kind) for kind in _accelerator().log_with] == ["tensorboard"]
    _uninstall("tensorboard", monkeypatch)
    assert _accelerator().log_with == []


def test_every_cited_reference_is_listed():
    key = re.compile(r"\[[A-Z][A-Za-z]+\d{4}\]")
    cited = {match for path in (ROOT / "ot_diffusers").rglob("*.py") for match in key.findall(path.read_text("utf-8"))}
    listed = key.findall((ROOT / "REFERENCES.md").read_text("utf-8"))
    assert len(listed) == len(set(listed))
    assert cited <= set(listed), f"not in REFERENCES.md: {sorted(cited - set(listed))}"
