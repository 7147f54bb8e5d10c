"""The documentation: its Python runs as it stands, page by page, and its commands are ones that the parser knows."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LDMPipeline, VQModel
from makers import ROOT
from makers.loopback_hub import LoopbackHub
from makers.models import digits, make_guided, make_truncated, make_unet, make_vae, save_pipeline

from ot_diffusers import FlowMatchPipeline
from ot_diffusers.cli import make_parser
from ot_diffusers.config import load_config
from ot_diffusers.launch.commands import SCRIPTS, preset_path, training_command
from ot_diffusers.reporting.quoting import main as quote
from ot_diffusers.sampling import save_images

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
PAGES["../model_cards/README.md"] = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip


def snippets(page: str) -> str:
    """All Python of a page, which reads as one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small untrained models and pictures where the pages find trained ones, and those of the Hub."""
    folder = tmp_path_factory.mktemp("docs")
    guided = make_guided(**digits())
    flow = FlowMatchPipeline.from_pipe(guided, scheduler=FlowMatchEulerDiscreteScheduler())
    for place in ("runs/demo/ot", "runs/digits/few-step"):
        flow.save_pretrained(folder / place)
    unet, named = make_unet(num_class_embeds=3), {0: "cats", 1: "dogs"}
    FlowMatchPipeline(unet, flow.scheduler, id2label=named).save_pretrained(folder / "runs/classes/ot")
    guided.save_pretrained(folder / "ot-diffusers/digits-ot-guided")
    for name in ("digits-ot-guided", "mnist-ot-guided"):
        guided.save_pretrained(folder / "model_cards" / name)
    save_pipeline(folder / "runs/demo/baseline", guided.unet)
    guided.feature_extractor.save_pretrained(folder / "runs/demo/evaluator")
    make_truncated().save_pretrained(folder / "model_cards/digits-truncated-prior")
    vae = make_vae(VQModel, in_channels=3, out_channels=3, latent_channels=3)
    unet = make_unet(sample_size=4, in_channels=3, out_channels=3)
    LDMPipeline(vae, unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "CompVis/ldm-celebahq-256")

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**small)).save_pretrained(folder / "facebook/dinov2-small")
    sides = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessor(**sides).save_pretrained(folder / "facebook/dinov2-small")

    for name in ("cats", "dogs"):
        save_images(torch.randint(0, 256, (12, 3, 40, 48), dtype=torch.uint8), folder / "path/to/images" / name)
        (folder / "path/to/images" / name / "grid.png").unlink()
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In that folder, with the modules that a page defines forgotten afterwards."""
    monkeypatch.chdir(folder)
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if "diffusers_modules" in name:
            del sys.modules[name]


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if snippets(text)])
def test_the_snippets_of_a_page_run(page: str, hub: LoopbackHub) -> None:
    exec(compile(snippets(PAGES[page]), page, "exec"), {"__name__": "__main__"})
    if "publish" in page:
        assert hub.repositories["user/name"].messages == ["First version"]


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.match(r"accelerate launch .*train/", line)])
def test_a_launch_of_a_script_is_a_valid_configuration(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    script = next(index for index, word in enumerate(words) if word.startswith("train/"))
    configs = {f"train/{file}": config for file, config in SCRIPTS.values()}
    load_config(configs[words[script]], words[script + 1 :])


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("ot-diffusers")])
def test_a_command_is_one_that_the_parser_knows(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments, unknown = make_parser().parse_known_args(shlex.split(command, comments=True)[1:])
    assert all("=" in word for word in unknown)
    config = getattr(arguments, "config", None)
    if arguments.name == "train":
        training_command(arguments.script, unknown, config=config)
    assert config is None or preset_path(config).is_file()


def test_pages_link_to_what_exists() -> None:
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (DOCS / name).parent.joinpath(link).is_file(), f"{name} links to {link}"


def test_pages_quote_their_results_as_they_are() -> None:
    quoting = [str(DOCS / name) for name, text in PAGES.items() if "<!-- results: " in text]
    assert {str(DOCS / name) for name in ("results.md", "choose.md", "howto/truncated.md")} <= set(quoting)
    assert quote(["--check", *quoting]) == 0
