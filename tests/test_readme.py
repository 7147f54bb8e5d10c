"""The README: short, its Python runs in a clone as it stands, and what its commands, links and pictures name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from makers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 130


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs_in_a_clone(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the published weights; what it saves is not left in the repository."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_its_make_commands_have_targets() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"\bmake ([\w-]+)", README)
    assert {"demo", "test"} <= set(named) <= set(targets)
    assert SNIPPETS and {command.split()[0] for command in COMMANDS} == {"pip", "make"}


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", README)
    assert len(links) > 20
    for link in links:
        assert (ROOT / link).exists(), link


def test_its_presets_exist() -> None:
    for preset in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (ROOT / preset).is_file(), preset
