"""The engine of all studies: a planted difference is found, none is not; curves; pieces are kept; runs side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from makers.models import make_unet
from safetensors.torch import load_file

from ot_diffusers import ConvFeatureExtractor, OTGuidedDDIMPipeline, ReferenceBank, cli
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.reporting import plots
from ot_diffusers.reporting.differences import NOT_SIGNIFICANT, differences, verdict
from ot_diffusers.studies import runs
from ot_diffusers.studies.axes import AXES
from ot_diffusers.studies.config import STEPS, StudyConfig, Variant, choose_variants, read_config, with_step_curves
from ot_diffusers.studies.pictures import draw_curves
from ot_diffusers.studies.results import collect, evaluate_seed
from ot_diffusers.studies.run import open_study, run_study
from ot_diffusers.studies.runs import command, equal_time_updates, is_trained, run_side_by_side, train_group
from ot_diffusers.studies.sampling import Sampled, sampled, sampled_once
from ot_diffusers.studies.study import Clock, OutOfTime, Study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Fréchet distance from"),
]  # small N; all arms share it


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature network that tells the digits apart after a few seconds."""
    torch.manual_seed(0)
    images = load_images("digits", "train")
    network = ConvFeatureExtractor(
        sample_size=8, feature_dim=16, block_out_channels=(8, 16), data_fingerprint=images.fingerprint
    ).requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(150):
        rows = torch.randint(len(images), (64,))
        loss = torch.nn.functional.cross_entropy(network.logits(images.fetch(rows)), images.labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("evaluator")
    network.requires_grad_(False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    """A denoiser of the digits after a few seconds of training."""
    images, unet = load_images("digits", "train"), make_unet(seed=0, block_out_channels=(16, 16))
    optimizer, scheduler = torch.optim.Adam(unet.parameters(), 3e-3), DDPMScheduler()
    for _ in range(150):
        clean = images.fetch(torch.randint(len(images), (64,)))
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (64,))
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    return unet


def save_pipeline(unet: UNet2DModel, folder: Path) -> str:
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return str(folder)


def jittered(unet: UNet2DModel, amount: float, seed: int) -> UNet2DModel:
    """The network with noise of `amount` times each layer's spread on its weights: as if trained with another seed."""
    other = UNet2DModel.from_config(unet.config).eval()
    other.load_state_dict(unet.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in other.parameters():
            if weights.ndim > 1:
                weights += amount * weights.std() * torch.randn(weights.shape, generator=generator)
    return other


# How far the networks of an arm are off, and where their noise is drawn from: "same" has the law of "first".
ARMS = {"first": (0.1, 0), "same": (0.1, 100), "worse": (0.4, 200)}


@pytest.fixture(scope="module")
def config(unet: UNet2DModel, evaluator: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """Three arms with a network of their own for each of five seeds."""
    folder = tmp_path_factory.mktemp("arms")
    for name, (amount, start) in ARMS.items():
        for seed in range(5):
            save_pipeline(jittered(unet, amount, start + seed), folder / f"{name}-{seed}")
    return StudyConfig(
        output_dir=str(tmp_path_factory.mktemp("comparison") / "study"),
        evaluator=str(evaluator),
        arms={name: Variant(pipeline=f"{folder}/{name}-{{seed}}") for name in ARMS},
        num_samples=48,
        call={"num_inference_steps": 6},
    )


@pytest.fixture(scope="module")
def results(config: StudyConfig) -> dict[str, Any]:
    return run_study(config, log=lambda line: None)


def test_planted_difference_is_found_and_no_difference_is_not(results: dict[str, Any]) -> None:
    planted, none = results["differences"]["worse"], results["differences"]["same"]
    assert verdict("frechet_distance", planted["frechet_distance"]) == "worse"
    assert planted["frechet_distance"]["low"] > 0
    assert {verdict(metric, found) for metric, found in none.items()} == {NOT_SIGNIFICANT}
    assert all(found["mean"] != 0 for found in none.values())  # other images, not the same ones
    assert results["complete"] and results["seeds"] == [0, 1, 2, 3, 4]


def test_report_says_what_the_numbers_say(results: dict[str, Any], config: StudyConfig) -> None:
    folder = Path(config.output_dir)
    table, page = (folder / "results.md").read_text("utf-8"), (folder / "report.html").read_text("utf-8")
    for text in (table, page):
        assert re.search("same: (inconclusive|the difference is not significant)", text)
        assert "worse: worse" in text and "(primary)" in text
    assert page.count("data:image/png;base64,") == 5
    assert json.loads((folder / "results.json").read_text("utf-8"))["arms"] == results["arms"]
    assert all(str(folder.parents[1]) not in text for text in (table, page, json.dumps(results)))
    means = [np.mean(results["per_seed"]["worse"]["recall"]), results["arms"]["worse"]["metrics"]["recall"]]
    assert means[0] == pytest.approx(means[1])


@pytest.mark.filterwarnings("ignore")  # of the evaluator, and of few images
def test_an_untrained_evaluator_gives_no_verdict(config: StudyConfig, tmp_path: Path) -> None:
    ConvFeatureExtractor(sample_size=8, feature_dim=16, block_out_channels=(8, 16)).save_pretrained(tmp_path / "net")
    arms = {name: config.arms[name] for name in ("first", "worse")}
    options = {"evaluator": str(tmp_path / "net"), "arms": arms, "seeds": 3, "num_samples": 24}
    study = dataclasses.replace(config, output_dir=str(tmp_path / "study"), **options)
    found = run_study(study, log=lambda line: None)
    assert (
        "no verdict, because the evaluator cannot be trusted" in found["summary"] and "worse: " not in found["summary"]
    )
    assert not any(entry["shown"] for entry in found["differences"]["worse"].values())
    table, page = ((tmp_path / "study" / name).read_text("utf-8") for name in ("results.md", "report.html"))
    for text in (table, page):
        assert "withheld" in text and "No verdict should rest on it" in text and NOT_SIGNIFICANT not in text
    assert "class=best" not in page and table.count("Evaluated by a ConvFeatureExtractor: 16 features") == 3


def test_any_arm_can_be_compared_with(results: dict[str, Any], config: StudyConfig) -> None:
    other = dataclasses.replace(config, compare_with="worse")
    found = collect(Study(other, Path(config.output_dir), Clock(), print), results["seeds"])
    assert list(found["arms"]) == ["worse", "first", "same"] and "worse" not in found["differences"]
    forth, back = (
        run["differences"][arm]["frechet_distance"]["mean"] for run, arm in ((results, "worse"), (found, "first"))
    )
    assert back == pytest.approx(-forth)
    with pytest.raises(InputError, match="`compare_with` must be one of first, same, worse, got 'absent'"):
        dataclasses.replace(config, compare_with="absent")
    assert choose_variants(other, ["first", "same"]).compare_with is None


def test_real_images_are_the_floor_and_costs_are_told(results: dict[str, Any]) -> None:
    floor, arm = results["floor"]["metrics"], results["arms"]["first"]
    assert floor["frechet_distance"] < arm["metrics"]["frechet_distance"]
    assert arm["nfe"] == 6 and arm["parameters"] > 1000 and arm["seconds_per_1000"] > 0


def test_quality_by_steps(results: dict[str, Any], config: StudyConfig, tmp_path: Path) -> None:
    """The numbers of a point are those of a study with as many steps; the table's own steps are not sampled twice."""
    arms = {"first": config.arms["first"], "worse": dataclasses.replace(config.arms["worse"], steps=(1, 2))}
    short = dataclasses.replace(config, arms=arms, seeds=2, num_samples=24, metrics=("recall",))
    study = dataclasses.replace(short, steps=(2, 6), output_dir=str(tmp_path / "curves"))
    found = run_study(study, log=lambda line: None)
    curves = found["quality_by_steps"]
    assert {name: list(line) for name, line in curves.items()} == {"first": ["2", "6"], "worse": ["1", "2"]}
    assert [point["nfe"] for line in curves.values() for point in line.values()] == [2, 6, 1, 2]
    files = {file.stem for file in (tmp_path / "curves" / "seed-0" / "samples").iterdir()}
    assert files == {"first", "worse", "first, steps=2", "worse, steps=1", "worse, steps=2"}
    row = found["arms"]["first"]
    for metric in ("frechet_distance", "recall"):
        assert curves["first"]["6"][metric] == row["metrics"][metric]
        assert curves["first"]["6"]["intervals"][metric] == row["intervals"][metric]

    short = dataclasses.replace(short, call={"num_inference_steps": 2}, output_dir=str(tmp_path / "two steps"))
    two = run_study(short, log=lambda line: None)
    for name, line in curves.items():
        assert line["2"]["per_seed"]["frechet_distance"] == two["per_seed"][name]["frechet_distance"]
    assert curves["worse"]["2"]["differences"] == two["differences"]["worse"]
    assert "differences" not in curves["worse"]["1"]  # the first has no such point

    table = (tmp_path / "curves" / "results.md").read_text("utf-8")
    assert "## Fréchet distance by steps" in table and "| steps = | 1 | 2 | 6 |" in table
    assert (tmp_path / "curves" / "quality_by_steps.png").is_file()
    assert (tmp_path / "curves" / "samples_by_steps.png").is_file()
    assert "Quality by number of function evaluations" in (tmp_path / "curves" / "report.html").read_text("utf-8")


def test_points_of_the_curves_follow_the_variant() -> None:
    arms = {
        "trained": Variant(train="baseline"),
        "short": Variant(pipeline="{trained}", start="noise", truncation_timestep=10, call={"num_inference_steps": 10}),
    }
    study = with_step_curves(StudyConfig(arms=arms, steps=(1, 10, 50)))
    lines = study.curves["steps"]
    # A chain of ten timesteps has no fifty steps, and its ten are those of the table.
    assert list(lines["trained"]) == ["1", "10", "50"] and lines["short"] == {"1": "short, steps=1", "10": "short"}
    assert study.arms["trained, steps=1"].pipeline == "{trained}" and study.arms["trained, steps=1"].train is None
    assert list(study.reported) == ["trained", "short"] and list(study.trained) == ["trained"]


def test_runs_side_by_side_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    said = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    for names, threads in ((("a",), "4"), (("a", "b"), "2"), (tuple("abcde"), "1")):
        run_side_by_side(dict.fromkeys(names, said), tmp_path)
        assert {(tmp_path / f"{name}.log").read_text().strip() for name in names} == {threads}
    with pytest.raises(RuntimeError, match=r"training 'b' failed:\n +no such network"):
        run_side_by_side({"b": [sys.executable, "-c", "import sys; sys.exit('no such network')"]}, tmp_path)


def test_a_run_has_its_own_time(tmp_path: Path) -> None:
    """Stopped by its own limit it is complete, stopped by that of the call it is not."""
    arms = {"limited": Variant(train="baseline", max_train_seconds=20), "free": Variant(train="baseline")}
    study = Study(StudyConfig(arms=arms, seed=3), tmp_path, Clock(), lambda line: None)
    for name in arms:
        (tmp_path / name).mkdir()
        record = {"complete": False, "stopped_by": "max_train_seconds", "training_seconds": 20.1, "updates": 7}
        (tmp_path / name / "results.json").write_text(json.dumps(record))
    assert is_trained(study, "limited", 3) and not is_trained(study, "free", 3)
    (tmp_path / "limited" / "results.json").write_text(json.dumps(record | {"training_seconds": 15}))
    assert not is_trained(study, "limited", 3) and "max_train_seconds=5" in command(study, "limited", 3)
    assert "seed=3" in command(study, "limited", 3) and "seed=1003" in command(study, "evaluator", 3)


def test_a_variant_that_is_trained_once_serves_every_seed(tmp_path: Path) -> None:
    arms = {"shared": Variant(train="baseline", once=True), "own": Variant(train="baseline")}
    study = Study(StudyConfig(arms=arms, seeds=3), tmp_path, Clock(), lambda line: None)
    assert study.run("shared", 2) == study.run("shared", 0) == tmp_path / "shared"
    assert study.run("own", 2) == tmp_path / "seed-2" / "own"
    assert "seed=0" in command(study, "shared", 2) and "seed=2" in command(study, "own", 2)


def test_a_run_that_a_signal_stopped_is_no_end_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(StudyConfig(arms={"a": Variant(train="baseline")}, seed=0), tmp_path, Clock(), lambda line: None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "results.json").write_text(json.dumps({"complete": False, "training_seconds": 1.0}))
    monkeypatch.setattr(runs, "command", lambda *_: [sys.executable, "-c", "pass"])
    with pytest.raises(RuntimeError, match="training a was stopped by a signal; rerun the same command to resume"):
        train_group(study, ["a"], 0)
    study.clock.max_seconds = 60
    with pytest.raises(OutOfTime):
        train_group(study, ["a"], 0)


def test_stopped_and_resumed_is_the_uninterrupted_comparison(
    results: dict[str, Any], config: StudyConfig, tmp_path: Path
) -> None:
    short = dataclasses.replace(config, seeds=2, output_dir=str(tmp_path / "study"))
    assert run_study(short, max_seconds=1e-9, log=lambda line: None) == {"complete": False, "seeds": []}
    assert not (tmp_path / "study" / "results.json").exists()
    one = run_study(dataclasses.replace(short, seeds=1), log=lambda line: None)
    assert one["differences"] == {} and one["arms"]["first"]["intervals"] == {}
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "study").rglob("*") if file.is_file()}
    # A slice that scores no new seed keeps the report, and says that seeds are missing.
    assert run_study(short, max_seconds=1e-9, log=lambda line: None) == one | {"complete": False}
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    kept = {file: written for file, written in kept.items() if file.is_relative_to(tmp_path / "study" / "seed-0")}
    two = run_study(short, log=lambda line: None)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    for name, values in two["per_seed"].items():
        assert values == {metric: found[:2] for metric, found in results["per_seed"][name].items()}


@pytest.mark.parametrize("length", [0, 100, -1])
def test_kept_images_that_are_damaged_are_sampled_again(length: int, tmp_path: Path) -> None:
    file, drawn = tmp_path / "samples" / "variant.safetensors", []

    def sample() -> Sampled:
        drawn.append(len(drawn))
        return Sampled(torch.full((2, 1, 2, 2), len(drawn), dtype=torch.uint8), 1.5, 7, {"field_seconds": 0.25})

    first, kept = sampled_once(file, sample), sampled_once(file, sample)
    assert len(drawn) == 1 and torch.equal(first.images, kept.images) and first.cost == kept.cost
    file.write_bytes(file.read_bytes()[:length])
    assert sampled_once(file, sample).images.unique().tolist() == [2]


def test_arms_that_train(evaluator: Path, tmp_path: Path) -> None:
    """One seed of a baseline, and of its network with fewer steps."""
    file = tmp_path / "study.yaml"
    file.write_text(
        f"output_dir: {tmp_path / 'study'}\nevaluator: {evaluator}\nnum_samples: 24\n"
        "call: {num_inference_steps: 2}\n"
        "overrides: [max_train_steps=2, num_inference_steps=2, num_validation_samples=8]\narms:\n"
        "  all steps: {train: baseline, preset: digits/baseline.yaml}\n"
        '  one step: {pipeline: "{all steps}", call: {num_inference_steps: 1}}\n'
    )
    lines: list[str] = []
    found = run_study(read_config(str(file), ["seeds=1"]), log=lines.append)
    assert lines[0].startswith("seed 0: train all steps")
    assert [(entry["updates"], entry["nfe"]) for entry in found["arms"].values()] == [(2, 2), (2, 1)]
    assert "Training losses" in (tmp_path / "study" / "report.html").read_text("utf-8")


def test_arms_with_classes_are_scored_by_class(evaluator: Path, tmp_path: Path) -> None:
    """Labels are kept with the images, in the numbering of the data set; real images are scored by class as well."""
    unet = make_unet(seed=0, block_out_channels=(16, 16), num_class_embeds=11)
    named = {label: str(9 - label) for label in range(10)}
    pipeline = OTGuidedDDIMPipeline(unet, DDIMScheduler(), id2label=named, class_frequencies=dict.fromkeys(named, 1.0))
    pipeline.save_pretrained(tmp_path / "pipeline")
    source = str(tmp_path / "pipeline")
    arms = {"drawn": Variant(pipeline=source), "one": Variant(pipeline=source, call={"class_labels": ["7", 0]})}
    values: dict[str, Any] = {"evaluator": str(evaluator), "seeds": 1, "num_samples": 24, "steps": (1,)}
    values |= {"call": {"num_inference_steps": 2}, "metrics": ("frechet_distance", "class_accuracy")}
    study = open_study(StudyConfig(output_dir=str(tmp_path / "study"), arms=arms, **values), Clock(None), print)
    first, again = sampled(study, "one", 0), sampled(study, "one", 0)
    assert first.labels is not None and first.labels.tolist() == [7, 9] * 12
    assert again.labels is not None and torch.equal(again.labels, first.labels)
    scores = evaluate_seed(study, 0)
    for found in (*(arm["metrics"] for arm in scores["arms"].values()), scores["floor"]):
        assert 0 <= found["class_accuracy"] <= 1
    assert scores["floor"]["class_accuracy"] > 0.8  # that of the evaluator on real images


def test_an_arm_follows_a_field_of_its_own(unet: UNet2DModel, evaluator: Path, tmp_path: Path) -> None:
    """And the network that guides can be the second evaluator."""
    images = load_images("digits", "train")
    network = ConvFeatureExtractor(sample_size=8, feature_dim=8, block_out_channels=(4, 8))
    bank = ReferenceBank.from_features(network.extract(images.fetch(torch.arange(200))))
    for part, name in ((network, "feature_extractor"), (bank, "reference_bank")):
        part.save_pretrained(tmp_path / "features" / name)
    pipeline, features = save_pipeline(unet, tmp_path / "plain"), str(tmp_path / "features")
    arms = {
        "plain": Variant(pipeline=pipeline),
        "field": Variant(pipeline=pipeline, features="{features}", field_samples=16, batch_size=12),
        "the same": Variant(pipeline=pipeline, features="{features}", field_samples=16, batch_size=8),
    }
    networks = {"evaluator": str(evaluator), "features": features, "second_evaluator": "{features}"}
    values: dict[str, Any] = {"seeds": 1, "num_samples": 24, "call": {"num_inference_steps": 3}}
    study = StudyConfig(output_dir=str(tmp_path / "study"), arms=arms, **networks, **values)
    found = run_study(study, log=lambda line: None)
    assert found["second_extractor"]["feature_dim"] == 8 and found["second_extractor"]["test_accuracy"] is not None
    assert any("The second evaluator is the network of losses and guidance" in note for note in found["notes"])
    images = {
        name: load_file(tmp_path / "study" / "seed-0" / "samples" / f"{name}.safetensors")["images"].int()
        for name in arms
    }
    assert (images["field"] - images["the same"]).abs().max() <= 1  # any batch
    assert (images["field"] - images["plain"]).abs().max() > 5


def test_equal_compute_is_in_seconds(tmp_path: Path) -> None:
    """The baseline makes 100 updates in 10 s and the OT model trains for 25 s: 250 updates."""
    arms = {"baseline": Variant(train="baseline"), "ot": Variant(train="ot")}
    arms["control"] = Variant(train="baseline", seconds_of="ot")
    study = Study(StudyConfig(arms=arms), tmp_path, Clock(), lambda line: None)
    for name, seconds in (("baseline", 10.0), ("ot", 25.0)):
        study.run(name, 3).mkdir(parents=True)
        record = {"updates": 100, "training_seconds": seconds}
        (study.run(name, 3) / "results.json").write_text(json.dumps(record))
    assert equal_time_updates(study, "control", 3) == 250


def test_pipelines_on_the_command_line(
    unet: UNet2DModel, evaluator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipelines = [save_pipeline(unet, tmp_path / "a"), save_pipeline(jittered(unet, 0.1, 0), tmp_path / "b")]
    options = ["--dataset", "digits", "--evaluator", str(evaluator), "--num-inference-steps", "2"]
    command = ["compare", *pipelines, *options, "--seeds", "1", "num_samples=12", "--output", str(tmp_path / "study")]
    assert cli.main([*command, "--max-seconds", "1e-9"]) == 3
    assert "rerun the same command to resume" in capfd.readouterr().out
    assert cli.main(command) == 0
    said = capfd.readouterr().out
    assert "\nb " in said and "the seeds vary the starting noise only" in said

    save_pipeline(jittered(unet, 0.1, 1), tmp_path / "b")  # other weights in the same place
    assert cli.main(command) == 2
    assert "`output_dir` must be a new folder" in capfd.readouterr().err


BAD = {
    "one arm": ({"a": Variant(pipeline="x/y")}, {}, "`arms` must be at least two"),
    "later arm": ({"a": Variant(pipeline="{b}"), "b": Variant(train="baseline")}, {}, "trained variants before 'a'"),
    "no feature network": (
        {"a": Variant(pipeline="x/y", features="{features}")},
        {},
        "features or seed, got 'features'",
    ),
    "no feature network that judges": (
        {},
        {"second_evaluator": "{features}"},
        "`second_evaluator` must refer to the features of the study alone, got '{features}'",
    ),
    "nobody's seconds": (
        {"a": Variant(train="baseline", seconds_of="b")},
        {},
        "`seconds_of` must name a trained variant",
    ),
    "no pace": (
        {"a": Variant(train="ot"), "b": Variant(train="baseline", seconds_of="a")},
        {},
        "`seconds_of` must have an earlier variant that trains as 'b' does",
    ),
    "unknown metric": ({}, {"primary_metric": "fid"}, "got 'fid'"),
    "no seed": ({}, {"seeds": 0}, "`seeds` must be at least 1"),
    "a run beside what it builds on": (
        {"a": Variant(train="baseline"), "b": Variant(train="ot", overrides=("feature_extractor={a}",))},
        {"together": (("a", "b"),)},
        "`together` must not hold 'b' with a run that it builds on, got 'a'",
    ),
    "nobody together": ({}, {"together": (("a",),)}, "`together` must name some of features, evaluator"),
    "nobody pictured": ({}, {"pictured": ("a",)}, "`pictured` must name some of"),
    "no steps": ({}, {"steps": (0,)}, "`steps` must hold numbers from 1"),
    "a path as a name": ({"../a": Variant(pipeline="x/y")}, {}, "got '../a'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, tmp_path: Path) -> None:
    arms, values, message = BAD[case]
    with pytest.raises(InputError) as caught:
        run_study(StudyConfig(output_dir=str(tmp_path / "new"), arms=arms, **values))
    assert message in str(caught.value) and not (tmp_path / "new").exists()


def test_nothing_is_written_before_all_is_there(config: StudyConfig, unet: UNet2DModel, tmp_path: Path) -> None:
    arms = {name: Variant(pipeline=save_pipeline(unet, tmp_path / name)) for name in ("a", "b")}
    for values, message in (
        ({"evaluator": "./nowhere"}, "`evaluator` must be a folder"),
        ({"dataset": "./nowhere"}, "`dataset` must be"),
        ({"call": {"guidance_scale": 1}}, "`guidance_scale` must be left out for a DDIMPipeline"),
        ({"arms": arms | {"c": Variant(pipeline="./nowhere")}}, "`pipeline` must be a folder"),
    ):
        changed = dataclasses.replace(config, **{"arms": arms, "output_dir": str(tmp_path / "new")} | values)
        with pytest.raises(InputError, match=message):
            run_study(changed)
        assert not (tmp_path / "new").exists()


def test_arms_that_cannot_be() -> None:
    for values in ({}, {"pipeline": "x", "train": "ot"}, {"pipeline": "x", "seconds_of": "y"}, {"train": "paint"}):
        with pytest.raises(InputError):
            Variant(**values)
    for values, message in (
        ({"pipeline": "x", "truncation_timestep": 10}, "`truncation_timestep` must come with a start"),
        ({"train": "ot", "start": "noise"}, "`start` must come with the pipeline of the denoiser"),
        ({"pipeline": "x", "role": "row"}, "`role` must be table, curve or training"),
    ):
        with pytest.raises(InputError, match=message):
            Variant(**values)
    with pytest.raises(InputError, match="max_train_seconds"):
        Variant(train="ot", overrides=("max_train_seconds=5",))
    with pytest.raises(InputError, match="`field_samples` must come with the features that guide, got 100"):
        Variant(pipeline="x", field_samples=100)
    with pytest.raises(InputError, match="`field_samples` must be at least 16, got 2"):
        Variant(pipeline="x", features="y", field_samples=2)


def test_arms_are_chosen_by_name_or_folder(config: StudyConfig) -> None:
    chosen = choose_variants(config, ["worse", "runs/other"])
    assert list(chosen.arms) == ["worse", "other"] and chosen.arms["other"].pipeline == "runs/other"
    assert list(choose_variants(config, ["a/run", "b/run"]).arms) == ["a-run", "b-run"]


def test_preset_is_a_study_of_five_seeds_with_an_equal_compute_control() -> None:
    config = read_config("digits/compare.yaml", [])
    assert config.seeds == 5 and next(iter(config.arms)) == "baseline"
    assert config.arms["equal compute"].seconds_of == "OT-trained"
    assert config.arms["OT-guided"].pipeline == "{baseline}"


class TestVerdicts:
    METRICS = ("frechet_distance", "precision", "recall", "coverage", "density", "sinkhorn_distance")

    def values(self, draws: np.ndarray) -> dict[str, dict[str, list[float]]]:
        """[arms, metrics, seeds] as arm → metric → one value per seed."""
        return {f"arm {i}": dict(zip(self.METRICS, found.tolist(), strict=True)) for i, found in enumerate(10 + draws)}

    def test_errors_of_a_study_without_a_difference(self) -> None:
        """400 studies of two arms alike, 5 seeds, 6 metrics: the primary one errs in 5% of them (20 ± 3 × 4.4), and one
        or more of the five others in at most 5% by Holm's correction."""
        primary = others = 0
        for draws in np.random.default_rng(0).normal(size=(400, 2, 6, 5)):
            (found,) = differences(self.values(draws), primary="frechet_distance", family=self.METRICS).values()
            primary += found["frechet_distance"]["shown"]
            others += any(found[metric]["shown"] for metric in self.METRICS[1:])
        assert 7 <= primary <= 33 and others <= 33

    def test_direction_is_that_of_the_metric(self) -> None:
        draws = np.random.default_rng(0).normal(scale=0.01, size=(2, 6, 5))
        draws[1] += 1
        (found,) = differences(self.values(draws), primary="recall", family=self.METRICS).values()
        said = {metric: verdict(metric, found[metric]) for metric in self.METRICS}
        assert said == dict.fromkeys(self.METRICS, "better") | {
            "frechet_distance": "worse",
            "sinkhorn_distance": "worse",
        }
        assert verdict("effective_rank", found["recall"]) == "higher"

    def test_two_seeds_show_nothing(self) -> None:
        draws = np.zeros((2, 6, 2))
        draws[1] += 1
        (found,) = differences(self.values(draws), primary="recall", family=self.METRICS).values()
        assert {verdict(metric, entry) for metric, entry in found.items()} == {NOT_SIGNIFICANT}


def test_curves_have_panels_for_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """High shares are drawn without the empty space below them; a metric that no point has gets no panel."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.extend(figure.axes) or path)
    points = {str(nfe): {"nfe": nfe, "recall": 0.3, "class_accuracy": 0.95 + nfe / 1000} for nfe in (1, 2)}
    results = {
        "headline": ["recall", "class_accuracy", "second_frechet_distance"],
        "floor": {"metrics": {}},
        "quality_by_steps": {"plain": points},
    }
    draw_curves(results, AXES[STEPS], tmp_path / "curves.png")
    recall, accuracy = (axes.get_ylim()[0] for axes in drawn)
    assert recall == 0 and accuracy > 0.9
