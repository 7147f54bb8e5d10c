"""The README: its Python runs as it stands, and the files and options its commands name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from makers import ROOT
from makers.models import make_guided, save_pipeline

from ot_diffusers.cli import make_parser
from ot_diffusers.config import load_config
from ot_diffusers.launch.commands import SCRIPTS, preset_path

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for block in BLOCKS for line in block.splitlines()]


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small untrained models where the README finds those of `make demo`."""
    folder = tmp_path_factory.mktemp("readme")
    guided = make_guided()
    guided.save_pretrained(folder / "runs/demo/ot")
    save_pipeline(folder / "runs/demo/baseline", guided.unet)
    return folder


def test_there_are_snippets_and_commands() -> None:
    assert len(SNIPPETS) >= 3
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet: str, demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_folder)
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if re.match(r"accelerate launch train/|ot-diffusers train ", line)]
)
def test_a_training_command_is_a_valid_configuration(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command.split("#")[0].split()
    scripts = {f"train/{file}": config for file, config in SCRIPTS.values()}
    if words[:2] == ["accelerate", "launch"]:
        config, arguments = scripts[words[2]], words[3:]
        assert (ROOT / words[2]).is_file()
    else:
        assert words[:2] == ["ot-diffusers", "train"]
        config, arguments = SCRIPTS[words[2]][1], words[3:]
    load_config(config, arguments)


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("ot-diffusers")])
def test_a_command_is_one_that_the_parser_knows(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command.split("#")[0].split()[1:]
    if words == ["--help"]:
        return
    arguments, unknown = make_parser().parse_known_args(words)
    assert all("=" in word for word in unknown)  # key=value, checked above or by the study itself
    preset = getattr(arguments, "config", None)
    assert preset is None or preset_path(preset).is_file()
