"""Cards, and pushing with the real client to a Hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from huggingface_hub import ModelCard, constants
from makers import ROOT, command
from makers.loopback_hub import READER, WRITER, LoopbackHub, Repository
from makers.models import make_features, make_guided, make_truncated, make_unet

import ot_diffusers
from ot_diffusers import OTGuidedDDIMPipeline, ReferenceBank, TruncatedPriorPipeline
from ot_diffusers.errors import InputError
from ot_diffusers.hub.cards import CardFacts, _metric_arguments, render_card
from ot_diffusers.hub.push import export_run, push_folder, repository_files
from ot_diffusers.reporting.differences import verdict
from ot_diffusers.reporting.quoting import quote
from ot_diffusers.studies.config import read_config

RESULTS: dict[str, Any] = {
    "title": "t",
    "dataset": "digits",
    "num_samples": 540,
    "extractor": {"name": "an evaluator", "feature_dim": 128},
    "arms": {
        "baseline": {"metrics": {"frechet_distance": 1.5, "recall": 0.75}, "nfe": 50, "seconds": 8.0},
        "OT-guided": {"metrics": {"frechet_distance": 0.5, "recall": 0.875}, "nfe": 50, "seconds": 13.0,
                      "intervals": {"frechet_distance": {"low": 0.4, "high": 0.6}}},
    },
    "floor": {"metrics": {"frechet_distance": 0.25, "recall": 0.8125}},
    "provenance": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train_ot.py` leaves, with the logs of a tracker and an evaluation beside it."""
    folder = tmp_path_factory.mktemp("runs") / "ot"
    make_guided().save_pretrained(folder)
    config = {"output_dir": "/home/me/runs/ot", "train_batch_size": 32, "learning_rate": 1e-3, "lr_scheduler": "cosine",
              "seed": 7, "feature_extractor": None}  # fmt: skip
    record = {"script": "train/train_ot.py", "config": config, "data": {"name": "digits", "num_samples": 1152}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps({"updates": 1400, "training_seconds": 84.1}))
    (folder / "metrics.jsonl").write_text("{}\n")
    for file in (
        "samples/update-00001400.png",
        "logs/train_ot/events.out.tfevents.1",
        "checkpoints/x/model.safetensors",
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(file.encode())
    (folder.parent / "results.json").write_text(json.dumps(RESULTS))
    return folder


def push(run: Path, *options: object) -> int:
    return command("push", run, "--repo", "writer/model", "--num-images", 4, "--num-inference-steps", 2, *options)


def evaluated(run: Path) -> tuple[object, ...]:
    return "--results", run.parent / "results.json", "--arm", "OT-guided"


EXPECTED = {
    "README.md", "model_index.json", "pipeline.py", "results.json", "samples.png", "samples_plain.png",
    "samples/update-00001400.png",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
    "feature_extractor/config.json", "feature_extractor/diffusion_pytorch_model.safetensors",
    "reference_bank/config.json", "reference_bank/diffusion_pytorch_model.safetensors",
    "training/pipeline/run.json", "training/pipeline/results.json", "training/pipeline/metrics.jsonl",
    "logs/train_ot/events.out.tfevents.1",
}  # fmt: skip


# --- Pushing ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_pushed_from_a_shell_in_one_commit(run: Path, tmp_path: Path) -> None:
    hub = LoopbackHub()
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    options = [*evaluated(run), "--num-images", 4, "--num-inference-steps", 2, "--message", "First", "--json"]
    words = [sys.executable, "-m", "ot_diffusers.cli", "push", run, "--repo", "writer/model", *options]
    finished = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment)
    hub.close()
    assert finished.returncode == 0, finished.stderr
    repository = hub.repositories["writer/model"]
    assert repository.messages == ["First"] and not repository.private
    tree = repository.tree()
    assert set(tree) == EXPECTED
    answer = json.loads(finished.stdout)
    assert answer["pushed"] and answer["files"].keys() == tree.keys()

    # What arrived is a pipeline, with a card that loads it from there.
    for path, content in tree.items():
        (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / path).write_bytes(content)
    pipeline = OTGuidedDDIMPipeline.from_pretrained(tmp_path / "clone")
    assert torch.equal(pipeline.unet.conv_in.weight, make_guided().unet.conv_in.weight)
    assert 'OTGuidedDDIMPipeline.from_pretrained("writer/model")' in tree["README.md"].decode()
    assert b"/home/me" not in b"".join(tree.values())


def test_a_dry_run_lists_what_would_go_and_asks_nobody(
    run: Path, hub: LoopbackHub, capfd: pytest.CaptureFixture[str]
) -> None:
    assert push(run, *evaluated(run), "--dry-run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["files"].keys() == EXPECTED
    assert push(run, "--dry-run") == 0
    assert "nothing was uploaded" in capfd.readouterr().out
    assert hub.requests == [] and hub.repositories == {}


def test_private_is_private_and_never_silently_public(
    run: Path, hub: LoopbackHub, capfd: pytest.CaptureFixture[str]
) -> None:
    assert push(run, "--private") == 0
    assert hub.repositories["writer/model"].private
    hub.repositories["writer/model"] = Repository(private=False)
    assert push(run, "--private") == 2
    assert "public" in capfd.readouterr().err
    assert hub.repositories["writer/model"].commits == {}


@pytest.mark.parametrize("refused", ["/commit/", "/test/blobs/"])
def test_an_interrupted_push_leaves_nothing_and_goes_on(
    refused: str, run: Path, hub: LoopbackHub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fail = {refused}
    assert push(run) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: `repo` 'writer/model'") and line.count("\n") == 1
    assert hub.repositories["writer/model"].commits == {}
    hub.fail, sent = set(), list(hub.uploads)
    assert push(run) == 0
    assert len(hub.repositories["writer/model"].commits) == 1
    assert len(hub.uploads) == len(set(hub.uploads)) >= len(sent)  # no file twice


def test_who_may_not_push_is_told_in_one_line(
    run: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refusal() -> str:
        assert push(run, "--num-images", 0) == 2
        captured = capfd.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured.err
        return captured.err

    monkeypatch.setenv("HF_TOKEN", READER)
    assert "no permission" in refusal()
    hub.repositories["writer/model"] = Repository()
    assert "no permission" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal()
    assert hub.repositories["writer/model"].commits == {}

    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal()


@pytest.mark.parametrize("make", [make_guided, make_truncated], ids=["guided", "truncated"])
def test_push_to_hub(make: Any, hub: LoopbackHub, tmp_path: Path) -> None:
    pipeline = make()
    url = pipeline.push_to_hub("writer/model", private=True, commit_message="Mine")
    repository = hub.repositories["writer/model"]
    assert repository.messages == ["Mine"] and repository.private
    assert url == f"{hub.endpoint}/writer/model/commit/{repository.branches['main']}"
    assert b"library_name: diffusers" in repository.tree()["README.md"]
    pipeline.save_pretrained(tmp_path / "saved")
    saved = {path: (tmp_path / "saved" / path).read_bytes() for path in repository_files(tmp_path / "saved")}
    assert saved.items() <= repository.tree().items()

    pipeline.push_to_hub("writer/model", revision="half", variant="fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in repository.tree("half")
    pipeline.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="writer/other")
    assert "unet/config.json" in hub.repositories["writer/other"].tree()


def test_a_card_that_somebody_wrote_stays(hub: LoopbackHub) -> None:
    hub.repositories["writer/model"] = Repository()
    hub.repositories["writer/model"].commit({"README.md": b"My own words."})
    make_guided().push_to_hub("writer/model")
    tree = hub.repositories["writer/model"].tree()
    assert tree["README.md"] == b"My own words." and "model_index.json" in tree


def test_a_card_that_cannot_be_checked_stops_the_push(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the Hub answers but "no such file" may hide somebody's card, also where an older one is cached."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries five times
    make_guided().push_to_hub("writer/model")
    repository = hub.repositories["writer/model"]
    repository.commit({"README.md": b"My own words."})
    hub.broken, before = {"/resolve/"}, len(repository.commits)
    with pytest.raises(InputError, match="`repo` 'writer/model'"):
        make_guided().push_to_hub("writer/model")
    assert len(repository.commits) == before and repository.tree()["README.md"] == b"My own words."


def test_a_name_without_a_user_goes_where_the_hub_puts_it(
    run: Path, hub: LoopbackHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_guided().save_pretrained(tmp_path / "saved", push_to_hub=True)
    make_truncated().push_to_hub("pushed")
    make_guided().reference_bank.save_pretrained(tmp_path / "bank", push_to_hub=True)
    options = ("--repo", "shell", "--num-images", 0, "--json")
    assert command("push", run, *options) == 0
    assert json.loads(capfd.readouterr().out)["repo"] == "writer/shell"
    assert set(hub.repositories) == {"writer/saved", "writer/pushed", "writer/bank", "writer/shell"}
    for name, repository in hub.repositories.items():
        assert f'.from_pretrained("{name}")' in repository.tree()["README.md"].decode()


def test_one_part_is_pushed_as_it_is_saved(hub: LoopbackHub, tmp_path: Path) -> None:
    make_guided().save_pretrained(tmp_path / "home" / "me" / "model")
    bank = ReferenceBank.from_pretrained(tmp_path / "home" / "me" / "model", subfolder="reference_bank")
    bank.push_to_hub("writer/bank", commit_message="Mine")
    bank.push_to_hub("writer/bank", subfolder="reference_bank", variant="fp16")
    tree = hub.repositories["writer/bank"].tree()
    weights = "diffusion_pytorch_model"
    assert tree.keys() == {"README.md", "config.json", f"{weights}.safetensors", "reference_bank/config.json",
                           f"reference_bank/{weights}.fp16.safetensors"}  # fmt: skip
    assert hub.repositories["writer/bank"].messages[0] == "Mine"
    assert str(tmp_path).encode() not in b"".join(tree.values())


def test_a_card_of_ones_own_goes_word_for_word(hub: LoopbackHub, tmp_path: Path) -> None:
    make_guided().save_pretrained(tmp_path / "saved")
    words = b'---\nlicense: mit\n---\r\nMade from `DDPMPipeline.from_pretrained("google/ddpm")`.\r\n'
    (tmp_path / "saved" / "README.md").write_bytes(words)
    push_folder(tmp_path / "saved", "writer/model")
    assert hub.repositories["writer/model"].tree()["README.md"] == words
    (tmp_path / "saved" / "README.md").write_text("No licence.")
    with pytest.raises(InputError, match=r'`repo` .* refused the push: .*"license" is required'):
        push_folder(tmp_path / "saved", "writer/other")


@pytest.mark.parametrize("token", ["hf_mü", "hf_\N{KELVIN SIGN}"])
def test_a_token_that_no_request_can_carry_is_one_line(
    token: str, run: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(run) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: `token` must") and error.count("\n") == 1 and token not in error
    assert hub.requests == []


# --- Cards ------------------------------------------------------------------------------------------------------------


def test_a_metric_of_the_second_evaluator_names_it() -> None:
    results = RESULTS | {"second_extractor": {"name": "another"}}
    arguments = _metric_arguments(results, results["arms"]["baseline"], "second_frechet_distance")
    assert arguments["extractor"] == "another"


def test_a_card_holds_the_numbers_of_its_files(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "card"
    assert command("card", run, "--output", output, *evaluated(run), "--num-images", 0, "--dtype", "float16") == 0
    card = ModelCard.load(output / "README.md")
    found = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {"frechet_distance": 0.5, "recall": 0.875}
    assert found["frechet_distance"].metric_args["interval_95"] == [0.4, 0.6]
    assert found["recall"].metric_args["real_images"] == 0.8125
    assert found["recall"].metric_args["extractor"] == "an evaluator"
    assert found["recall"].dataset_type == "sklearn-docs/digits" and card.data.datasets == ["sklearn-docs/digits"]
    assert card.data.metrics == list(found) and card.data.license == "apache-2.0"
    assert quote(RESULTS) in card.text
    assert "1,400 training steps of 32 images" in card.text and "float16" in card.text

    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert snippet is not None and len([line for line in snippet[1].splitlines() if line]) <= 5
    weights = OTGuidedDDIMPipeline.from_pretrained(output, dtype=torch.float16).unet.conv_in.weight
    assert torch.equal(weights, make_guided().unet.conv_in.weight.half())


def test_a_card_shows_the_model_beside_others_with_verdicts(run: Path, tmp_path: Path) -> None:
    differences = {
        "frechet_distance": {"mean": -1.0, "low": -1.2, "high": -0.8, "p_value": 0.001, "p_holm": 0.001, "shown": True},
        "recall": {"mean": 0.125, "low": -0.2, "high": 0.45, "p_value": 0.3, "p_holm": 0.3, "shown": False},
    }
    results = RESULTS | {"seeds": [0, 1, 2], "differences": {"OT-guided": differences}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    options = ("--results", tmp_path / "results.json", "--arm", "OT-guided", "--hardware", "an abacus")
    assert command("card", run, "--output", tmp_path / "card", *options, "--num-images", 4) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| Fréchet (lower is better) | 0.500 ± 0.1 | 1.50 | 0.250 |" in card
    assert "better in Fréchet; " in card and f"{verdict('recall', differences['recall'])} in Recall." in card
    assert card.count("Times were measured on an abacus.") == 2
    assert "3 random seeds" in card and "![Samples without guidance](samples_plain.png)" in card
    plain, guided = (PIL.Image.open(tmp_path / "card" / f"{name}.png") for name in ("samples_plain", "samples"))
    assert plain.size == guided.size and plain.tobytes() != guided.tobytes()


def test_a_card_is_written_again_from_its_folder(run: Path, tmp_path: Path) -> None:
    cards = tmp_path / "first", tmp_path / "second"
    for source, output in zip((run, cards[0]), cards, strict=True):
        options = ("--num-images", 4, "--num-inference-steps", 2, "--repo", "a/b", "--dtype", "float16")
        assert command("card", source, "--output", output, *evaluated(run), *options) == 0
    first, second = ({path: (card / path).read_bytes() for path in repository_files(card)} for card in cards)
    assert "training/pipeline/run.json" in first and "logs/train_ot/events.out.tfevents.1" in first
    assert second == first


def test_a_truncated_card_may_start_at_another_timestep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_truncated().save_pretrained(tmp_path / "run")
    config = {"train_batch_size": 32, "learning_rate": 1e-3, "lr_scheduler": "cosine", "seed": 0}
    for part, script in (("run", "train_prior"), ("denoiser", "train_baseline")):
        if part == "denoiser":
            DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / part)
        record = {"script": f"train/{script}.py", "config": config, "data": {}}
        (tmp_path / part / "run.json").write_text(json.dumps(record))
        (tmp_path / part / "results.json").write_text(json.dumps({"updates": 7, "training_seconds": 2.0}))
    options = ("--truncation-timestep", 50, "--num-inference-steps", 2, "--num-images", 4)
    assert command("card", tmp_path / "run", "--output", tmp_path / "card", *options) == 2
    assert "`truncation_timestep`" in capfd.readouterr().err
    moved = (*options, "--denoiser", tmp_path / "denoiser")
    assert command("card", tmp_path / "run", "--output", tmp_path / "card", *moved) == 0
    assert TruncatedPriorPipeline.from_pretrained(tmp_path / "card").truncation_timestep == 50
    card = (tmp_path / "card" / "README.md").read_text()
    assert "step T' = 50" in card and "3 network calls" in card
    assert "The prior was trained by `train_prior.py`" in card
    assert "The denoiser was trained by `train_baseline.py`" in card


def test_a_card_names_the_classes(tmp_path: Path) -> None:
    unet, named = make_unet(num_class_embeds=3), {0: "cats", 1: "dogs"}
    OTGuidedDDIMPipeline(unet, DDIMScheduler(), id2label=named).save_pretrained(tmp_path / "run")
    options = ("--num-images", 4, "--num-inference-steps", 2)
    assert command("card", tmp_path / "run", "--output", tmp_path / "card", *options) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "A class-conditional DDIM pipeline. Its classes, by name for `class_labels`: cats, dogs." in card
    assert "loads as a plain" not in card  # where it could not sample
    assert 'images = pipe(batch_size=64, class_labels="cats", num_inference_steps=2).images' in card
    assert "There is a row for each class: cats, dogs." in card
    with PIL.Image.open(tmp_path / "card" / "samples.png") as grid:
        assert grid.size == (2 * 66 + 2, 2 * 66 + 2)
    OTGuidedDDIMPipeline(unet, DDIMScheduler(), *make_features(), id2label=named).save_pretrained(tmp_path / "guided")
    export_run(tmp_path / "guided", tmp_path / "picture", num_inference_steps=1)
    for file in ("samples.png", "samples_plain.png"):
        with PIL.Image.open(tmp_path / "picture" / file) as grid:
            assert grid.size == (16 * 66 + 2, 2 * 66 + 2)  # as many as guidance by class compares
    assert OTGuidedDDIMPipeline.from_pretrained(tmp_path / "card").labels == {"cats": 0, "dogs": 1}


def test_a_card_names_a_pipeline_of_diffusers_only_where_it_makes_the_images() -> None:
    for parts, named in (({"unet": 10}, True), ({"unet": 10, "vae": 10}, False)):
        card = render_card(CardFacts("user/model", "OTGuidedDDIMPipeline", parts))
        assert ("loads as a plain `diffusers.DDIMPipeline`" in card.text) == named


def test_a_card_without_an_evaluation_says_so() -> None:
    card = render_card(CardFacts("user/model", "OTGuidedDDIMPipeline", {"unet": 10}))
    assert "has not been evaluated" in card.text and card.data.eval_results is None


BAD_INPUT = {
    "push nothing": ("push {new} --repo a/b", "new"),
    "push to no repository": ("push {run} --repo a/b/c", "a/b/c"),
    "push with no such results": ("push {run} --repo a/b --results {new}", "results"),
    "push with a run's own results": ("push {run} --repo a/b --results {run}/results.json", "arms"),
    "several arms": ("push {run} --repo a/b --results {run}/../results.json", "OT-guided"),
    "no such arm": ("card {run} --output {new} --results {run}/../results.json --arm best", "'best'"),
    "card into a used folder": ("card {run} --output {run}", "output"),
    "card into a file": ("card {run} --output {run}/run.json/card", "output"),
    "card for no repository": ("card {run} --output {new} --repo a/b/c", "a/b/c"),
    "unknown precision": ("card {run} --output {new} --dtype int3", "int3"),
    "compared with no such arm": (
        "card {run} --output {new} --results {run}/../results.json --arm baseline --num-images 0 --beside best",
        "'best'",
    ),
    "another timestep of a whole chain": ("card {run} --output {new} --truncation-timestep 5", "truncation_timestep"),
    "negative pictures": ("card {run} --output {new} --num-images -1", "-1"),
    "info of nothing": ("info {new}", "new"),
    "report of nothing": ("report {new}", "new"),
    "report of a training run": ("report {run}", "arms"),
    "completion of no shell": ("completion fish3", "fish3"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(
    case: str, run: Path, hub: LoopbackHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line, expected = BAD_INPUT[case]
    before = repository_files(run)
    assert command(*line.format(run=run, new=tmp_path / "new").split()) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    assert expected in captured.err
    assert not (tmp_path / "new").exists() and repository_files(run) == before
    assert not any(method == "POST" for method, _ in hub.requests)


# --- The other commands -----------------------------------------------------------------------------------------------


def test_info_tells_what_a_pipeline_is_made_of(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("info", run, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["pipeline"] == "OTGuidedDDIMPipeline" and facts["image_shape"] == [1, 8, 8]
    assert facts["parameters"]["reference_bank"] == 50 * 16 and facts["num_references"] == 50
    assert command("info", run) == 0
    assert "ConvFeatureExtractor" in capfd.readouterr().out


def test_sample_answers_a_script(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--num-images", 3, "--num-inference-steps", 2, "--guidance-scale", 0, "--output", tmp_path / "new")
    assert command("sample", run, *options, "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["num_images"] == 3 and answer["nfe"] == 2
    assert Path(answer["grid"]).is_file() and Path(answer["output"]) == tmp_path / "new"


def test_report_writes_the_page_again(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert command("report", run.parent, "--output", page) == 0
    assert "real vs real" in capfd.readouterr().out
    assert "OT-guided" in page.read_text()
    assert command("report", run.parent / "results.json", "--json") == 0
    assert json.loads(capfd.readouterr().out) == RESULTS


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("completion", shell) == 0
    script = capfd.readouterr().out
    assert "truncated-set" in script and "--guidance-scale" in script


# --- The published models ---------------------------------------------------------------------------------------------

PUBLISHED = sorted(path.parent for path in (ROOT / "model_cards").glob("*/model_index.json"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_model_loads_from_a_clone_and_its_card_is_valid(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    pipeline = getattr(ot_diffusers, index["_class_name"]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=16, num_inference_steps=2, output_type="pt").images
    assert images.isfinite().all() and images.std() > 0

    assert max(size for path, size in repository_files(folder).items() if path.endswith("safetensors")) <= 10e6
    card, results = ModelCard.load(folder / "README.md"), json.loads((folder / "results.json").read_text())
    assert card.data.pipeline_tag == "unconditional-image-generation" and card.data.datasets and card.data.metrics
    arms = [entry["metrics"] for entry in results["arms"].values()]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert any(values.items() <= metrics.items() for metrics in arms)
    assert quote({key: value for key, value in results.items() if key != "summary"}) in card.text
    if "reference_bank" in card.text:
        assert (folder / "samples_plain.png").is_file() and "(samples_plain.png)" in card.text
    assert folder.name in re.findall(r'from_pretrained\(".+/(.+)"\)', card.text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", [folder for folder in PUBLISHED if "digits" in folder.name], ids=lambda one: one.name
)
def test_the_snippet_of_a_card_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    exec(snippet[1].replace(f"ot-diffusers/{folder.name}", str(folder)), {})
    assert PIL.Image.open("sample.png").size == (8, 8)


def test_published_models_are_small() -> None:
    assert len(PUBLISHED) >= 2
    assert sum(size for folder in PUBLISHED for size in repository_files(folder).values()) <= 40e6


def test_the_comparison_that_evaluates_them_is_a_valid_configuration() -> None:
    config = read_config("digits/published.yaml", [])
    assert {"OT-guided", "OT prior"} <= config.arms.keys()


def test_a_folder_without_a_pipeline_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`folder` must hold a saved pipeline"):
        push_folder(tmp_path, "writer/model")


def test_what_is_hidden_does_not_go(tmp_path: Path) -> None:
    for file in ("a/b.txt", ".git/config", "a/.cache/token", ".DS_Store"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    assert repository_files(tmp_path) == {"a/b.txt": 1}


def test_a_stock_pipeline_has_a_card_of_its_kind(tmp_path: Path) -> None:
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    assert command("card", tmp_path / "ddim", "--output", tmp_path / "card", "--num-images", 0) == 0
    assert "from diffusers import DDIMPipeline" in (tmp_path / "card" / "README.md").read_text()
