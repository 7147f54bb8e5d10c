"""Nothing of the user's is deleted or overwritten, outputs are tried before the work, `~` is the home everywhere."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from makers import ROOT, snapshot
from makers import command as run
from makers.models import save_features, save_pipeline

from ot_diffusers import ConvFeatureExtractor, cli, config, files
from ot_diffusers.data import load_images
from ot_diffusers.data.truncated_set import export_truncated_set
from ot_diffusers.errors import InputError, require
from ot_diffusers.evaluation.extractors import load_evaluator
from ot_diffusers.features import load_feature_extractor, load_reference_bank
from ot_diffusers.hub.push import export_run, push_folder, read_results, repository_files
from ot_diffusers.launch.commands import preset_path, training_command
from ot_diffusers.sampling import load_pipeline, pipeline_class_name, save_images
from ot_diffusers.schedules import truncated_scheduler
from ot_diffusers.studies import config as studies_config
from ot_diffusers.studies import truncation
from ot_diffusers.studies.config import Variant, pipeline_variants
from ot_diffusers.studies.demo import run_demo
from ot_diffusers.studies.stress import run_stress_study
from ot_diffusers.studies.study import claim_folder
from ot_diffusers.studies.tracking import track_runs
from ot_diffusers.training import check_output_dir
from ot_diffusers.training.files import delete_partial

LIST = ".ot-diffusers-sample.sha256"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with an untrained pipeline, a feature network with its bank, and results."""
    folder = tmp_path_factory.mktemp("home")
    save_pipeline(folder / "pipeline")
    save_features(folder / "features", feature_dim=4)
    metrics = {"frechet_distance": 1.0}
    results = {"title": "", "dataset": "digits", "num_samples": 4, "extractor": {"name": "x", "feature_dim": 4}}
    results |= {"arms": {"pipeline": {"metrics": metrics}}, "floor": {"metrics": metrics}, "provenance": {}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "own.yaml").write_text("seed: 3\n")
    return folder


def one_line(errors: str) -> str:
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


# --- Outputs are tried before the work --------------------------------------------------------------------------------

# Commands with inputs that do not exist: what is refused first has to be the output.
COMMANDS = {
    "sample": "sample ./nowhere --output {place}",
    "sample, overwriting": "sample ./nowhere --overwrite --output {place}",
    "evaluate": "evaluate ./nowhere --dataset ./nowhere --evaluator ./nowhere --output {place}/results.json",
    "guide": "guide ./nowhere ./nowhere --output {place}",
    "compare": "compare ./nowhere ./elsewhere --output {place}",
    "track": "track ./nowhere --dataset digits --evaluator ./nowhere --output {place}",
    "stress": "stress --dataset ./nowhere --evaluator ./nowhere --output {place}",
    "truncated-set": "truncated-set --dataset ./nowhere --output {place}",
    "report": "report ./nowhere --output {place}/report.html",
    "card": "card ./nowhere --output {place}",
    "demo": "demo --output {place}",
}
PLACES = ("file/sub", "file", "link", "link/sub", "x" * 300, "sub/" + "y" * 300, "/proc/new", "~no-such-user/x")


def make_places(folder: Path) -> None:
    """A file and a link to nothing, on which no folder can be made. The tests may run as root, whom no permission
    stops."""
    (folder / "file").write_text("mine")
    (folder / "link").symlink_to("nothing")


@pytest.mark.slow
def test_every_command_tries_its_output_before_it_loads_anything(tmp_path: Path) -> None:
    make_places(tmp_path)
    before = snapshot(tmp_path)
    lines = [line.format(place=place).split() for line in COMMANDS.values() for place in PLACES]
    code = (
        "import sys; from ot_diffusers.cli import main\n"
        f"for words in {lines}: print(main(words), file=sys.stderr)\n"
        "assert not {'torch', 'numpy', 'diffusers', 'datasets'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert finished.returncode == 0 and finished.stdout == "", finished.stderr
    said = finished.stderr.splitlines()
    assert len(said) == 2 * len(lines)
    for words, line, status in zip(lines, said[::2], said[1::2], strict=True):
        assert status == "2" and line.startswith("error: `output` must be a "), (words, line)
        assert words[-1][:100] in line
    assert snapshot(tmp_path) == before


def test_every_command_with_an_output_is_in_the_table() -> None:
    with_output = {name for name, parser in commands().items() if "--output" in parser.format_help()}
    assert with_output == {line.split()[0] for line in COMMANDS.values()}
    for name in with_output:
        assert commands()[name].get_default("check_output") in (files.check_folder, files.check_file), name


@pytest.mark.parametrize("place", PLACES)
def test_functions_try_their_output_too(
    place: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_places(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    images, scheduler = load_images("digits", "validation"), truncated_scheduler(DDIMScheduler(), 10)
    calls: list[Callable[[], Any]] = [
        lambda: check_output_dir(config.BaselineConfig(output_dir=place)),
        lambda: export_run(home / "pipeline", place),
        lambda: export_truncated_set(images, scheduler, place),
        lambda: run_demo(place),
        lambda: run_stress_study("./nowhere", "./nowhere", Path(place)),
        lambda: track_runs({"a": Path("nowhere")}, Path(place), dataset="./nowhere", evaluator="./nowhere"),
        lambda: claim_folder(Path(place) / "study.json", {}),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"`output(_dir)?` must be a ") as refusal:
            call()
        assert "\n" not in str(refusal.value)
    for study in (["compare", "./a", "./b"], ["truncation", "dataset=./nowhere"]):
        assert run(*study, f"output_dir={place}") == 2
        assert "`output_dir` must be a " in one_line(capsys.readouterr().err)
    assert snapshot(tmp_path) == before


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    evaluate = ("evaluate", "./nowhere", "--dataset", "digits", "--evaluator", "./nowhere", "--overwrite")
    for words in ((*evaluate, "--output", tmp_path / "folder"), ("sample", "./nowhere", "--output", tmp_path / "file")):
        assert run(*words) == 2
        assert "`output` must be a f" in one_line(capsys.readouterr().err)
    assert snapshot(tmp_path) == {"folder": None, "file": b"mine"}


def test_an_output_that_breaks_later_is_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """A parent that becomes a file while the images are made, as another program could do it."""
    output = tmp_path / "parent" / "samples"

    original = DDIMPipeline.__call__

    @functools.wraps(original)
    def interfere(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "parent").write_text("in the way")
        return original(*arguments, **options)

    monkeypatch.setattr(DDIMPipeline, "__call__", interfere)
    assert run("sample", home / "pipeline", "--num-images", 1, "--num-inference-steps", 1, "--output", output) == 2
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: cannot use")]


# --- Only what a command wrote is replaced ----------------------------------------------------------------------------

FOREIGN = (
    "20240101_120000.png", "00000.png", "00001.png", "00007.png", "007.png", "1st_prize.png", "3d-render.png",
    "grid.png", "notes.txt", ".hidden", "123456.png", ".00000.png.partial", "sub/00000.png",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("used", [False, True])
def test_sample_leaves_every_file_that_is_not_its_own(
    name: str, used: bool, home: Path, tmp_path: Path, capfd: Any
) -> None:
    output = tmp_path / "out"
    if used:
        save_images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), output)
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("mine")
    before = snapshot(output)
    for options in ([], ["--overwrite"]):
        assert run("sample", home / "pipeline", "--num-images", 2, "--output", output, *options) == 2
        line = one_line(capfd.readouterr().err)
    assert name.split("/")[0] in line
    assert snapshot(output) == before


def test_save_images_replaces_its_own_and_leaves_the_rest(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_images(images, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "20240101.png").write_text("mine")
    (tmp_path / ".00003.png.0123abcd.partial").write_text("left by a call that was killed")
    save_images(images[:2], tmp_path)
    assert snapshot(tmp_path).keys() == {"00000.png", "00001.png", "grid.png", LIST, "notes.txt", "20240101.png"}
    finished = subprocess.run(["sha256sum", "-c", LIST], cwd=tmp_path, capture_output=True)
    assert finished.returncode == 0
    (tmp_path / "00001.png").write_text("retouched by hand")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"hold no file of yours named 00001\.png"):
        save_images(images, tmp_path)
    assert snapshot(tmp_path) == before


def test_a_link_is_not_what_the_command_wrote(home: Path, tmp_path: Path, capfd: Any) -> None:
    output = tmp_path / "out"
    save_images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), output)
    shutil.move(output / "00000.png", tmp_path / "elsewhere.png")
    (output / "00000.png").symlink_to(tmp_path / "elsewhere.png")
    assert run("sample", home / "pipeline", "--output", output, "--overwrite") == 2
    assert "00000.png" in one_line(capfd.readouterr().err)
    assert (output / "00000.png").is_symlink() and (tmp_path / "elsewhere.png").is_file()


def test_a_write_that_fails_leaves_the_earlier_pictures(tmp_path: Path) -> None:
    save_images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), tmp_path)
    before = snapshot(tmp_path)

    def pictures() -> Iterator[tuple[str, Callable[[Path], None]]]:
        yield "00000.png", lambda path: path.write_text("new") and None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_own(tmp_path, files.SAMPLE, pictures(), files.SAMPLE_NAMES)
    assert snapshot(tmp_path) == before


def test_pictures_that_were_not_all_written_are_not_scored(home: Path, tmp_path: Path, capfd: Any) -> None:
    save_images(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), tmp_path)
    (tmp_path / "00004.png").unlink()  # as if the command had been interrupted before the last rename
    assert run("evaluate", tmp_path, "--dataset", "digits", "--evaluator", home / "features") == 2
    assert "00004.png, which" in one_line(capfd.readouterr().err)
    options = ("--num-images", 2, "--num-inference-steps", 1, "--output", tmp_path, "--overwrite")
    assert run("sample", home / "pipeline", *options) == 0
    assert snapshot(tmp_path).keys() == {"00000.png", "00001.png", "grid.png", LIST}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # few images say little, which is not the point here
def test_evaluate_replaces_its_own_results_only(home: Path, tmp_path: Path, capfd: Any) -> None:
    images = tmp_path / "images"
    save_images(load_images("digits", "test").pixels[:12], images)
    file = tmp_path / "r.json"
    command = ("evaluate", images, "--dataset", "digits", "--evaluator", home / "features", "--output", file)
    for content in ("{}", "not JSON", (home / "results.json").read_text()):
        file.write_text(content)
        assert run(*command, "--overwrite") == 2
        assert "r.json" in one_line(capfd.readouterr().err) and file.read_text() == content
    file.unlink()
    assert run(*command) == 0 and run(*command) == 2 and run(*command, "--overwrite") == 0
    file.write_text(file.read_text().replace("12", "13"))
    capfd.readouterr()
    assert run(*command, "--overwrite") == 2
    assert "nobody has changed" in one_line(capfd.readouterr().err)


def test_report_replaces_its_own_pages_only(home: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copy(home / "results.json", tmp_path)
    page, results = tmp_path / "report.html", tmp_path / "results.json"
    page.write_text("my own page")
    assert run("report", tmp_path) == 2
    assert "report.html" in one_line(capsys.readouterr().err) and page.read_text() == "my own page"
    before = results.read_text()
    assert run("report", tmp_path, "--output", results) == 2 and results.read_text() == before
    page.unlink()
    assert run("report", tmp_path) == 0 and run("report", tmp_path) == 0
    page.write_text(page.read_text() + "<!-- my remark -->")
    assert run("report", tmp_path) == 2 and page.read_text().endswith("my remark -->")


@pytest.mark.parametrize("name", ["report.html", "noise.png", "stress.md", "results.json", ".hidden"])
def test_studies_begin_in_a_folder_of_their_own(name: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / name).write_text("mine")
    features = home / "features"
    for line in (
        f"stress --dataset digits --evaluator {features} --output {tmp_path}",
        f"track {home} --dataset digits --evaluator {features} --output {tmp_path}",
        f"compare {home}/pipeline ./other --output {tmp_path}",
        f"demo --output {tmp_path}",
        f"truncation output_dir={tmp_path}",
        f"card {home}/pipeline --output {tmp_path}",
        f"truncated-set --dataset digits --output {tmp_path}",
    ):
        assert run(*line.split()) == 2
        assert "`output" in one_line(capsys.readouterr().err)
    assert snapshot(tmp_path) == {name: b"mine"}


def test_a_record_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for content in ("{", "[]", "\xff"):
        (tmp_path / "demo.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=r"`output` must "):
            claim_folder(tmp_path / "demo.json", {"seed": 0})


def test_a_run_deletes_only_names_that_it_makes(tmp_path: Path) -> None:
    own = (
        ".run.json.1a2b.partial",
        ".metrics.jsonl.7.partial",
        ".update-00000003.partial",
        ".update-00000003.ab.partial",
    )
    others = (".thesis.partial", ".movie.mkv.12ab.partial", "download.partial", ".update-notes.partial", ".partial")
    for name in (*own, *others):
        (tmp_path / name).write_text("content")
    delete_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_names_beside_the_output_are_nobodys(tmp_path: Path) -> None:
    """Folders that look like what the program writes aside."""
    images, scheduler = load_images("digits", "validation"), truncated_scheduler(DDIMScheduler(), 10)
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / "thesis").write_text("mine")
    export_truncated_set(images, scheduler, tmp_path / "set")
    with files.new_folder(tmp_path / "set2") as partial:
        (partial / "a").write_text("a")
    assert (tmp_path / ".set.partial" / "thesis").read_text() == "mine" and (tmp_path / "set2" / "a").is_file()


def test_a_card_is_not_written_into_what_it_copies(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "pipeline", tmp_path / "run")
    for name in ("logs/card", "card"):
        with pytest.raises(InputError, match="`output` must lie outside the run"):
            export_run(tmp_path / "run", tmp_path / "run" / name, num_images=0)
    assert not (tmp_path / "run" / "card").exists()


# --- ~ is the home ----------------------------------------------------------------------------------------------------


def commands(parser: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    """Name to parser of every command, `train` with the parsers of its scripts."""
    found = {}
    for action in (parser or cli.make_parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found |= {name: below} | {f"{name} {inner}": leaf for inner, leaf in commands(below).items()}
    return found


def test_home_is_expanded_in_every_text_option_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = 0
    for name, parser in commands().items():
        for action in parser._actions:
            if action.nargs == 0 or action.choices is not None or action.type is not None:
                continue
            assert parser._get_value(action, "~/x") == "/home/me/x", (name, action.dest)
            assert parser._get_value(action, "name=~/x") == "name=/home/me/x", (name, action.dest)
            paths += re.search("folder|FILE|run|file|network", f"{action.help} {action.metavar}") is not None
    assert paths > 30


CONFIGS = {
    kind
    for module in (config, studies_config, truncation)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
}
PLACE = re.compile(r"folder|Hub id|\bFILE\b|YAML file|\brun of|preset to train")


def test_every_configuration_is_known_here() -> None:
    sources = [file for file in (ROOT / "ot_diffusers").rglob("*.py") if re.search(r"= \w*option\(", file.read_text())]
    assert {file.parent.name + "/" + file.stem for file in sources} == {
        "ot_diffusers/config", "studies/config", "studies/truncation",
    }  # fmt: skip
    assert all(issubclass(kind, config.Options) for kind in CONFIGS)


@pytest.mark.parametrize("kind", sorted(CONFIGS - {config.Options}, key=lambda kind: kind.__name__))
def test_home_is_expanded_in_every_option_that_names_a_place(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    needed = {Variant: {"pipeline": "p"}, config.PriorConfig: {"prior": "few_step", "pretrained": "p"}}.get(kind, {})
    if hasattr(kind, "noise_coupling"):
        needed = {"noise_coupling": "semidiscrete"}  # the only one with a place for `coupling`
    places = [entry.name for entry in dataclasses.fields(kind) if PLACE.search(entry.metadata["help"])]
    assert places
    for name in places:
        if name in ("field_samples", "arms", "overrides", "preset", "train"):
            continue  # numbers, parts, and what an arm has only where it is trained
        for made in (config.make_config(kind, needed | {name: "~/x"}), kind(**needed | {name: "~/x"})):
            assert getattr(made, name) == "/home/me/x", name


def test_home_is_expanded_in_yaml_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(
        "output_dir: ~/out\nfeatures: ~/features\nevaluator: inception=~/weights.pth\narms:\n"
        "  a: {pipeline: ~/a, features: ~/f}\n  b: {train: ot, preset: ~/ot.yaml, overrides: [feature_extractor=~/n]}\n"
    )
    read = studies_config.read_config("~/own.yaml", ["dataset=~/data"])
    assert read.output_dir == f"{tmp_path}/out" and read.dataset == f"{tmp_path}/data"
    assert read.features == f"{tmp_path}/features" and read.evaluator == f"inception={tmp_path}/weights.pth"
    assert read.arms["a"].pipeline == f"{tmp_path}/a" and read.arms["a"].features == f"{tmp_path}/f"
    assert read.arms["b"].preset == f"{tmp_path}/ot.yaml"
    assert read.arms["b"].overrides == (f"feature_extractor={tmp_path}/n",)
    assert pipeline_variants([files.expand_home("~/a")])["a"].pipeline == f"{tmp_path}/a"


def test_home_is_expanded_in_functions(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    before = snapshot(home)
    assert pipeline_class_name("~/pipeline") == "DDIMPipeline"
    pipeline = load_pipeline("~/pipeline", "~/features")
    assert type(pipeline).__name__ == "OTGuidedDDIMPipeline"
    assert load_feature_extractor("~/features").config.feature_dim == 4
    assert load_reference_bank("~/features").config.feature_dim == 4
    assert isinstance(load_evaluator("~/features"), ConvFeatureExtractor)
    with pytest.raises(InputError, match=f"got '{home}/weights.pth'"):
        load_evaluator("inception-v3-compat=~/weights.pth")
    assert read_results("~/results.json")["num_samples"] == 4
    assert preset_path("~/own.yaml") == home / "own.yaml"
    assert str(home / "own.yaml") in training_command("ot", config="~/own.yaml", accelerate_config="~/own.yaml")
    assert export_run("~/pipeline", "~/card", features="~/features", results="~/results.json", num_images=0).is_dir()
    assert "model_index.json" in repository_files("~/card")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("ot_diffusers.hub.push.get_token", lambda: None)
    with pytest.raises(InputError, match="`token` must be given"):  # the folder was found
        push_folder("~/card", "user/name")
    scheduler = truncated_scheduler(DDIMScheduler(), 10)
    assert export_truncated_set(load_images("digits", "validation"), scheduler, "~/set") == home / "set"
    assert save_images(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "~/pictures") == home / "pictures" / "grid.png"
    for name in ("card", "set", "pictures"):
        shutil.rmtree(home / name)
    assert snapshot(home) == before and not list(tmp_path.iterdir())


# --- What looks like a path is one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["runs/nothing", "here/nothing", "./a", "/a/b", "~/a", "a/b/c", "a", "a/", "a/b.pth"])
def test_a_path_that_is_not_there_is_an_error_at_once(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(socket, "getaddrinfo", None)  # the Hub is not asked, or this is a TypeError
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for load in (load_pipeline, load_feature_extractor, load_reference_bank):
        with pytest.raises(InputError, match=f"`(pipeline|feature_extractor|features)` must .*'{text}'"):
            load(text)
    with pytest.raises(InputError, match="`evaluator` must be a folder or Hub id"):
        load_evaluator(text)


# --- The command line -------------------------------------------------------------------------------------------------


def test_version_and_help(capsys: Any) -> None:
    assert run() == 0
    assert "evaluate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        run("--version")
    assert leaving.value.code == 0 and capsys.readouterr().out == "ot-diffusers 0.1.0\n"
    for words, preset in ((["train", "ot"], "digits/ot.yaml"), (["compare"], "digits/compare.yaml")):
        with pytest.raises(SystemExit):
            run(*words, "--help")
        assert f"  {preset}\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status"), [(["--help"], 0), (["train", "ot", "--help"], 0), (["completion", "bash"], 141)]
)
def test_a_reader_that_has_left_is_no_error(words: list[str], status: int) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ot_diffusers.cli", *words]
    finished = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    # From Python 3.11, argparse passes over help that nobody reads.
    if sys.version_info < (3, 11):
        status = 141
    assert finished.returncode == status and finished.stderr == ""


# What is given, and what the line has to say.
REFUSED = {
    "a key as an option": ("train ot --max_train_steps 5", "write max_train_steps=5"),
    "with hyphens": ("train ot --max-train-steps 5", "write max_train_steps=5"),
    "a device without numbers": ("sample {home}/pipeline --device meta --output {new}", "meta"),
    "guidance without a network": ("sample {home}/pipeline --guidance-scale 1 --output {new}", "--features RUN"),
    "two draws": ("stress --dataset digits --evaluator ./no --repeats 2 --output {new}", "at least 3, got 2"),
    "a huge number of images": ("sample {home}/pipeline --output {new} --num-images " + "9" * 30, "num_images"),
    "a number that is none": ("sample {home}/pipeline --output {new} --guidance-scale nan", "guidance_scale"),
    "an infinite number": ("compare a b --max-seconds inf --output {new}", "max_seconds"),
    "no time": ("compare a b --max-seconds 0 --output {new}", "max_seconds"),
    "no steps": ("card {home}/pipeline --num-inference-steps 0 --output {new}", "num_inference_steps"),
    "one image": ("evaluate {home}/pipeline --dataset digits --evaluator a --num-samples 1", "num_samples"),
    "a huge T'": ("truncated-set --dataset digits --output {new} --truncation-timestep " + "9" * 30, "truncation_"),
    "epochs without end": ("truncated-set --dataset digits --num-epochs 1e9 --output {new}", "num_epochs"),
    "no name": ("sample {home}/pipeline --output=", "output"),
    "an unknown command": ("--colour", "colour"),
    "a huge batch": ("train baseline train_batch_size=" + "9" * 30, "up to 1,000,000,000"),
    "a list for text": ("train baseline --config {list}", "`output_dir` must be text"),
    "a mapping for text": ("train baseline --config {mapping}", "`dataset` must be text"),
    "a key twice": ("train baseline --config {twice}", "the key 'seed' is there twice"),
    "a key twice, below": ("compare --config {below} --output {new}", "the key 'pipeline' is there twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line(case: str, home: Path, tmp_path: Path, capfd: Any) -> None:
    line, expected = REFUSED[case]
    contents = {
        "list": "output_dir: [a]",
        "mapping": "dataset: {a: 1}",
        "twice": "seed: 1\nblur: 1\nseed: 2",
        "below": "arms:\n  a:\n    pipeline: x\n    pipeline: y\n",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    before = snapshot(tmp_path)
    places = {name: tmp_path / f"{name}.yaml" for name in contents}
    assert run(*line.format(home=home, new=tmp_path / "new", **places).split()) == 2
    assert expected in one_line(capfd.readouterr().err)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("launched", ["compare a b", "demo", "info a", "card a --output b", "train ot"])
def test_what_is_not_shared_out_is_refused_on_several_processes(
    launched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*launched.split()) == 2
    assert "`num_processes` must be 1" in one_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value", [np.arange(6000).reshape(60, 100), torch.zeros(60, 100), list(range(5000)), "x" * 9000, {"a": np.eye(90)}]
)
def test_messages_are_short(value: Any) -> None:
    with pytest.raises(InputError) as refusal:
        require(False, "x", "be small", value)
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [10**30, "lots", -1, 2.5, None, True])
@pytest.mark.parametrize("name", ["num_samples", "feature_dim"])
def test_sizes_in_a_stored_configuration_are_looked_at(value: Any, name: str, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    shutil.copytree(home / "features", folder)
    file = folder / "reference_bank" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(InputError):
        load_reference_bank(folder)
