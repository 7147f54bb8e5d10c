"""The command line end to end on tiny pipelines, and its answer to bad input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from makers import ROOT
from makers import command as run
from makers.models import make_unet, save_features, save_pipeline
from makers.runs import fork_runs_of_studies

from ot_diffusers import (
    ConvFeatureExtractor,
    FlowMatchPipeline,
    GaussianPrior,
    ReferenceBank,
    TruncatedPriorPipeline,
    cli,
    truncated_scheduler,
)
from ot_diffusers.config import OTConfig
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.launch.commands import SCRIPTS, training_command
from ot_diffusers.sampling import (
    accelerate_networks,
    load_pipeline,
    read_class_names,
    read_images,
    sample_images,
    save_images,
)
from ot_diffusers.studies.demo import run_demo


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained UNet of one block for the digits, saved as diffusers does."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_features(tmp_path_factory.mktemp("evaluator"), seed=1)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["train", "ot", "--help"], *([name, "--help"] for name in ("sample", "push"))],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from ot_diffusers.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'accelerate', 'datasets', 'matplotlib', 'sklearn'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "usage: ot-diffusers" in finished.stdout


def test_help_of_a_script_shows_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train", "ot", "--help")
    shown = capsys.readouterr().out
    assert all(f"\n  {field.name}=" in shown for field in dataclasses.fields(OTConfig))
    assert "dataset=digits" in shown


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    yield parser
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        for command in action.choices.values():
            yield from all_parsers(command)


@pytest.mark.parametrize("parser", list(all_parsers(cli.make_parser())), ids=lambda parser: parser.prog)
def test_every_help_has_a_description_and_an_example_that_is_valid(parser: argparse.ArgumentParser) -> None:
    shown = parser.format_help()
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith("  metrics="))
    description, example = shown.split("\n\n")[1], shown.split("\nexample:\n")[1]
    assert description.endswith(".") and 20 < len(description) < 300
    program, *words = shlex.split(example.replace("\\\n", ""))
    assert program == "ot-diffusers"
    arguments, overrides = cli.make_parser().parse_known_args(words)
    assert arguments.name in parser.prog.split() or parser.prog == "ot-diffusers"
    if arguments.name == "train":
        training_command(arguments.script, overrides, config=arguments.config)
    else:
        assert not overrides


# Arguments, and what the one line must hold: the argument and the offending value.
BAD_INPUT = {
    "unknown command": ("paint", "paint"),
    "unknown script": ("train prios", "prios"),
    "unknown key, nearest match": ("train ot ot_wieght=1", "'ot_weight'"),
    "key without value": ("train ot ot_weight", "ot_weight"),
    "negative weight": ("train ot ot_weight=-1", "-1.0"),
    "negative blur": ("train ot blur=-0.2", "blur"),
    "one reference": ("train ot num_reference_samples=1", "num_reference_samples"),
    "not a number": ("train baseline learning_rate=fast", "'fast'"),
    "unknown prediction type": ("train baseline prediction_type=eps", "'eps'"),
    "missing configuration": ("train ot --config nowhere.yaml", "nowhere.yaml"),
    "missing accelerate configuration": ("train ot --accelerate-config nowhere.yaml", "nowhere.yaml"),
    "no process": ("train ot --num-processes 0", "num_processes"),
    "missing pipeline": ("sample ./nowhere --output {new}", "./nowhere"),
    "not a pipeline": ("sample {features} --output {new}", "model_index.json"),
    "no images": ("sample {pipeline} --num-images 0 --output {new}", "num_images"),
    "not a count": ("sample {pipeline} --num-images many --output {new}", "many"),
    "empty batch": ("sample {pipeline} --batch-size 0 --output {new}", "batch_size"),
    "unknown dtype": ("sample {pipeline} --dtype int8 --output {new}", "bfloat16"),
    "negative seed": ("sample {pipeline} --seed -1 --output {new}", "seed"),
    "more steps than the chain": ("sample {pipeline} --num-inference-steps 1001 --output {new}", "1001"),
    "guidance without parts": ("sample {pipeline} --guidance-scale 1 --output {new}", "guidance_scale"),
    "negative guidance": ("sample {pipeline} --features {features} --guidance-scale -1 --output {new}", "-1"),
    "missing features": ("sample {pipeline} --features ./nowhere --output {new}", "./nowhere"),
    "features of another size": ("sample {pipeline} --features {wide} --output {new}", "(1, 16, 16)"),
    "unknown device": ("sample {pipeline} --device tpu9 --output {new}", "tpu9"),
    "used output folder": ("sample {pipeline} --output {used}", "output"),
    "output is a file": ("sample {pipeline} --output {used}/file.txt --overwrite", "file.txt"),
    "unknown option": ("sample {pipeline} --colour red", "--colour"),
    "missing data set": ("evaluate {pipeline} --dataset ./nowhere --evaluator {features}", "./nowhere"),
    "no evaluator": ("evaluate {pipeline} --dataset digits", "--evaluator"),
    "missing evaluator": ("evaluate {pipeline} --dataset digits --evaluator ./nowhere", "./nowhere"),
    "evaluator of another data set": ("evaluate {pipeline} --dataset digits --evaluator {other}", "digits"),
    "folder without images": ("evaluate {used} --dataset digits --evaluator {features}", "used"),
    "used results": ("evaluate {pipeline} --dataset digits --evaluator {features} --output {used}/file.txt", "output"),
    "compare one": ("compare {pipeline} --dataset digits --evaluator {features} --output {new}", "at least two"),
    "compare with none": ("compare {pipeline} ./nowhere --evaluator {features} --output {new}", "./nowhere"),
    "compare with itself": ("compare {pipeline} {pipeline} --evaluator {features} --output {new}", "different"),
    "compare, not a count": ("compare {pipeline} {features} --seeds many --output {new}", "many"),
    "compare, unknown option": ("compare {pipeline} --colour red --output {new}", "--colour"),
    "track no run": ("track {features} --dataset digits --evaluator {features} --output {new}", "train_baseline"),
    "track one run twice": ("track {used} {used} --dataset digits --evaluator {features}", "different"),
    "stress, one draw": ("stress --dataset digits --evaluator {features} --repeats 1 --output {new}", "repeats"),
    "demo into a used folder": ("demo --output {used}", "used"),
    "class of an unconditional model": ("sample {pipeline} --class-labels 3 --output {new}", "class_labels"),
    "guidance by class": ("sample {pipeline} --class-guidance-scale 2 --output {new}", "class_guidance_scale"),
    "demo with a negative seed": ("demo --seed -1 --output {new}", "seed"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(
    case: str, pipeline: Path, features: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line, expected = BAD_INPUT[case]
    used, new = tmp_path / "used", tmp_path / "new"
    used.mkdir()
    (used / "file.txt").write_text("mine")
    folders = {"pipeline": pipeline, "features": features, "used": used, "new": new}
    if "{other}" in line:
        folders["other"] = save_features(tmp_path / "other", data_fingerprint="another fingerprint")
    if "{wide}" in line:
        ConvFeatureExtractor(sample_size=16, feature_dim=16).save_pretrained(tmp_path / "wide")
        bank = ReferenceBank.from_features(torch.rand(4, 16))
        bank.save_pretrained(tmp_path / "wide" / "reference_bank")
        folders["wide"] = tmp_path / "wide"

    status = run(*line.format(**folders).split())

    captured = capfd.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert expected in captured.err
    assert not new.exists()
    assert [file.name for file in used.iterdir()] == ["file.txt"] and (used / "file.txt").read_text() == "mine"


def test_sample_writes_pictures_and_a_grid(pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "samples"
    options = ("--num-images", 5, "--num-inference-steps", 2, "--output", output)
    assert run("sample", pipeline, *options) == 0
    assert capfd.readouterr().out.strip() == str(output / "grid.png")
    assert sorted(file.name for file in output.glob("*.*")) == [
        ".ot-diffusers-sample.sha256",
        *(f"{i:05d}.png" for i in range(5)),
        "grid.png",
    ]
    assert PIL.Image.open(output / "00000.png").size == (8, 8)
    # Three columns and two rows of 64 pixels, and 2 pixels around each.
    assert PIL.Image.open(output / "grid.png").size == (3 * 66 + 2, 2 * 66 + 2)

    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert run("sample", pipeline, *options) == 2
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert run("sample", pipeline, *options[2:], "--num-images", 2, "--overwrite") == 0
    assert {file.name for file in output.glob("[0-9g]*")} == {"00000.png", "00001.png", "grid.png"}


def test_classes_are_sampled_kept_with_the_images_and_evaluated(
    evaluator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By name or number, in turn; the folder is a labelled data set, with the same scores as the pipeline itself."""
    unet = make_unet(seed=0, num_class_embeds=11)
    names = {label: str(label) for label in range(10)}
    FlowMatchPipeline(unet, FlowMatchEulerDiscreteScheduler(), id2label=names).save_pretrained(tmp_path / "pipeline")
    sample = ("sample", tmp_path / "pipeline", "--num-inference-steps", 1, "--overwrite")
    for options, expected in (
        (("--class-labels", "3,3,7"), ["3", "3", "7"]),
        (("--class-labels", "8"), ["8"] * 64),
        (("--class-labels", "1,2", "--num-images", 5), ["1", "2", "1", "2", "1"]),
    ):
        assert run(*sample, *options, "--output", tmp_path / "images") == 0
        assert read_class_names(tmp_path / "images") == expected
    assert run(*sample, "--num-images", 40, "--output", tmp_path / "drawn") == 0
    names_drawn = read_class_names(tmp_path / "drawn") or []
    assert load_images(str(tmp_path / "drawn")).class_names == tuple(sorted(set(names_drawn)))
    scores = []
    for images in (tmp_path / "drawn", tmp_path / "pipeline"):
        capfd.readouterr()
        options = ("--evaluator", evaluator, "--num-samples", 40, "--num-inference-steps", 1, "--json")
        assert run("evaluate", images, "--dataset", "digits", *options) == 0
        results = json.loads(capfd.readouterr().out)
        assert results["headline"][-2:] == ["class_accuracy", "class_frechet_distance"]
        scores += [arm["metrics"] for arm in results["arms"].values()]
        assert results["floor"]["metrics"].keys() == scores[-1].keys() > {"class_accuracy", "class_frechet_distance"}
    assert scores[0] == scores[1]
    lines = (tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "drawn" / "metadata.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"`images` must have a label for every picture in its metadata\.jsonl"):
        read_class_names(tmp_path / "drawn")
    save_pipeline(tmp_path / "stock", unet)
    assert run("sample", tmp_path / "stock", "--output", tmp_path / "new") == 2
    assert "`pipeline` must be an OTGuidedDDIMPipeline" in capfd.readouterr().err
    assert run(*sample, "--class-labels", "10", "--output", tmp_path / "images") == 2
    assert "`class_labels` must lie in 0 … 9, got 10" in capfd.readouterr().err


def test_image_i_is_the_same_in_any_batch(pipeline: Path) -> None:
    pipe = load_pipeline(pipeline)
    pipe.set_progress_bar_config(disable=True)
    together, one_by_one, first = (
        sample_images(pipe, count, batch_size=size, seed=3, num_inference_steps=5).int()
        for count, size in ((7, None), (7, 1), (4, 3))
    )
    # One grey level: kernels for other batch sizes round differently, which may tip a value over a half.
    assert (together - one_by_one).abs().max() <= 1
    assert (together[:4] - first).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 10
    assert (sample_images(pipe, 7, seed=4, num_inference_steps=5).int() - together).abs().max() > 10


@pytest.mark.slow
def test_lack_of_memory_halves_the_batch_and_keeps_the_images(pipeline: Path, features: Path) -> None:
    plain, guided = load_pipeline(pipeline), load_pipeline(pipeline, features)
    expected = sample_images(plain, 7, seed=3, num_inference_steps=2)
    sizes = []

    def need_memory(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            torch.empty(2**60, dtype=torch.uint8)  # an exabyte

    for pipe in (plain, guided):
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.register_forward_pre_hook(need_memory)
    halved = sample_images(plain, 7, seed=3, num_inference_steps=2)
    assert sizes == [7, 4, *([2] * 2 * 3), 1, 1]  # 7 = 4 + 3 = (2 + 2) + (2 + 1), two steps each
    assert (halved.int() - expected.int()).abs().max() <= 1  # kernels for other batch sizes round differently
    with pytest.raises(InputError, match="`batch_size` must be smaller, for lack of memory, got 7"):
        sample_images(plain, 7, batch_size=7, num_inference_steps=2)
    with pytest.raises(InputError, match="`batch_size` must be smaller, for lack of memory, got 20"):
        sample_images(guided, 20, num_inference_steps=2)  # the batch is part of the result
    assert len(sample_images(guided, 5, num_inference_steps=2, guidance_scale=0)) == 5


@pytest.mark.usefixtures("bf16_units")
def test_half_precision_and_layout_keep_the_images(pipeline: Path, features: Path) -> None:
    pipe = load_pipeline(pipeline, features)
    pipe.set_progress_bar_config(disable=True)
    exact = sample_images(pipe, 20, num_inference_steps=3)
    half = sample_images(pipe, 20, num_inference_steps=3, dtype="bfloat16")
    assert not torch.equal(half, exact)
    # 8 bits of mantissa: a grey level is off by a few on average; another noise would be off by tens.
    assert (half.int() - exact.int()).abs().float().mean() < 4
    assert pipe.unet.dtype == torch.float32
    accelerate_networks(pipe, channels_last=True)
    # Another order of summation in float32.
    assert (sample_images(pipe, 20, num_inference_steps=3).int() - exact.int()).abs().float().mean() < 0.1


def test_features_turn_a_plain_pipeline_into_a_guided_one(pipeline: Path, features: Path) -> None:
    plain, guided = load_pipeline(pipeline), load_pipeline(pipeline, features)
    for pipe in (plain, guided):
        pipe.set_progress_bar_config(disable=True)
    expected = sample_images(plain, 20, num_inference_steps=3)
    assert torch.equal(sample_images(guided, 20, num_inference_steps=3, guidance_scale=0), expected)
    assert not torch.equal(sample_images(guided, 20, num_inference_steps=3), expected)


def test_features_guide_a_truncated_pipeline(pipeline: Path, features: Path, tmp_path: Path) -> None:
    denoiser = load_pipeline(pipeline)
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scheduler = truncated_scheduler(denoiser.scheduler, 10)
    prior = GaussianPrior.from_images(images, truncation_timestep=10)
    TruncatedPriorPipeline(prior, denoiser.unet, scheduler).save_pretrained(tmp_path)
    options = ("--num-images", 20, "--num-inference-steps", 2, "--guidance-scale")
    for scale in (0, 1):
        command = ("sample", tmp_path, "--features", features, "--output", tmp_path / f"at {scale}")
        assert run(*command, *options, scale) == 0
    plain, guided = (read_images(tmp_path / f"at {scale}", 1).float() for scale in (0, 1))
    # Five corrections of the prior's images and one guided step, each of three Adam steps of .02 at most.
    assert 1 < (plain - guided).abs().mean() < 6 * 3 * 0.02 * 127.5


def test_pictures_come_back_as_they_were_written(tmp_path: Path) -> None:
    for channels in (1, 3):
        images = torch.randint(0, 256, (4, channels, 8, 8), dtype=torch.uint8)
        save_images(images, tmp_path / str(channels))
        assert torch.equal(read_images(tmp_path / str(channels), channels), images)
    PIL.Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "1" / "00004.png")
    with pytest.raises(InputError, match=r"00004\.png with shape"):
        read_images(tmp_path / "1", 1)


def test_evaluate_prints_the_table_and_writes_the_same_numbers(
    pipeline: Path, evaluator: Path, features: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    command = ("evaluate", pipeline, "--dataset", "digits", "--evaluator", evaluator, "--num-samples", 40)
    options = ("--num-inference-steps", 2, "--features", features, "--guidance-scale", 0.5)
    assert run(*command, *options, "--output", file) == 0
    assert "real vs real" in capfd.readouterr().out
    results = json.loads(file.read_text())
    (arm,) = results["arms"].values()
    assert results["num_samples"] == 40 and arm["nfe"] == 2
    # Noise from an untrained network is further from the digits than digits are.
    assert arm["metrics"]["frechet_distance"] > results["floor"]["metrics"]["frechet_distance"]
    assert results["provenance"]["sampling"] == {"num_inference_steps": 2, "guidance_scale": 0.5}
    # The picture of the images lies beside the results, and the report shows it with the scores.
    assert (tmp_path / "results_samples.png").is_file()
    assert run("report", file) == 0
    assert (tmp_path / "report.html").read_text("utf-8").count("data:image/png") == 2
    assert run(*command, *options, "--output", file) == 2
    file.unlink()
    assert run(*command, *options, "--output", file) == 2  # a picture of that name is not overwritten
    assert "results_samples.png" in capfd.readouterr().err


@pytest.mark.slow
def test_evaluate_takes_a_folder_of_images(evaluator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    test = load_images("digits", "test")
    save_images(test.pixels, tmp_path / "copies")
    assert run("evaluate", tmp_path / "copies", "--dataset", "digits", "--evaluator", evaluator, "--json") == 0
    results = json.loads(capfd.readouterr().out)
    assert results["num_samples"] == len(test)
    metrics = results["arms"]["copies"]["metrics"]
    # The test images themselves: 0, up to the matrix square root of float64 covariances.
    assert metrics["recall_distance"] == 0 and abs(metrics["frechet_distance"]) < 1e-6


def test_training_commands_are_those_of_the_readme() -> None:
    _, script, *arguments = training_command("ot", ["max_train_steps=5"], config="digits/ot.yaml")
    assert Path(script).name == SCRIPTS["ot"][0] and Path(script).is_file()
    assert arguments[0] == "--config" and Path(arguments[1]).is_file() and arguments[2:] == ["max_train_steps=5"]
    several = training_command("ot", num_processes=2)
    assert several[1:4] == ["-m", "ot_diffusers.launch.workers", "2"] and Path(several[4]).is_file()
    machine = str(ROOT / "configs" / "accelerate" / "multi_gpu.yaml")
    launched = training_command("ot", num_processes=2, accelerate_config=machine)
    assert launched[1:7] == ["-m", "accelerate.commands.launch", "--config_file", machine, "--num_processes", "2"]


@pytest.mark.slow
def test_train_passes_on_the_exit_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file.txt").write_text("mine")
    assert run("train", "features", f"output_dir={used}") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: `output_dir`") and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance from")  # 32 images say little, which is not the point here
def test_two_processes_make_the_images_of_one(pipeline: Path, tmp_path: Path) -> None:
    sample = [str(pipeline), "--num-images", "5", "--num-inference-steps", "2", "--output"]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "configs" / "accelerate" / "two_cpu_processes.yaml")]
    command = [*launch, "-m", "ot_diffusers.cli", "sample", *sample, str(tmp_path / "two"), "--batch-size", "2"]
    finished = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    # Processes that know nothing of each other would both write, and both say so.
    assert json.loads(finished.stdout)["num_images"] == 5
    assert cli.main(["sample", *sample, str(tmp_path / "one")]) == 0
    images = [read_images(tmp_path / name, channels=1).int() for name in ("one", "two")]
    assert images[0].shape == (5, 1, 8, 8)
    # Another batch size rounds differently in the network, which may move a value across a boundary of uint8.
    assert (images[0] - images[1]).abs().max() <= 1


@pytest.mark.slow
def test_demo_runs_the_whole_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_runs_of_studies(monkeypatch)
    short = {"overrides": ("max_train_steps=2",), "num_samples": 32, "log": lambda line: None}
    results = run_demo(tmp_path / "demo", **short)
    coupled = ["coupled, 4 calls", "coupled and guided, 4 calls"]
    assert list(results["arms"]) == ["baseline", coupled[0], "OT-guided", coupled[1], "original guidance"]
    assert [results["arms"][arm]["nfe"] for arm in coupled] == [4, 4]
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["arms"].keys() == results["arms"].keys()
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http" not in page.split("Provenance")[0]

    priors = json.loads((tmp_path / "demo" / "truncation" / "results.json").read_text())
    assert list(priors["arms"]) == [
        "vanilla, truncated",
        "vanilla, full in 50",
        "Gaussian",
        "Gaussian, class-wise",
        "GAN",
        "OT",
        "oracle",
    ]

    with pytest.raises(InputError, match="output"):
        run_demo(tmp_path / "demo", seed=1, **short)
