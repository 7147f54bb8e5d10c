"""The study of priors on a tiny denoiser: every row, the curves, and a second call that repeats nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from makers.models import make_features, save_pipeline
from makers.runs import fork_runs_of_studies
from safetensors.torch import load_file

from ot_diffusers.cli import main
from ot_diffusers.config import load_config
from ot_diffusers.errors import InputError
from ot_diffusers.launch.commands import preset_path
from ot_diffusers.models.feature_extractor import ResidualFeatureExtractor
from ot_diffusers.studies.truncation import TruncationConfig, conclusions, expand

pytestmark = pytest.mark.slow

SAMPLES = 16


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fork_runs_of_studies(monkeypatch)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a finished study, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("truncation")
    save_pipeline(folder / "denoiser")
    network, bank = make_features(feature_dim=8)
    network.save_pretrained(folder / "features" / "feature_extractor")
    bank.save_pretrained(folder / "features" / "reference_bank")
    ResidualFeatureExtractor(sample_size=8, block_out_channels=(8,), feature_dim=8).save_pretrained(folder / "judge")
    arguments = ["truncation", "--config", "digits/truncation.yaml", f"output_dir={folder / 'study'}"]
    arguments += [f"denoiser={folder / 'denoiser'}", f"feature_extractor={folder / 'features'}"]
    arguments += [
        f"evaluator={folder / 'judge'}",
        f"num_samples={SAMPLES}",
        "max_train_steps=2",
        "priors=gaussian,gaussian_classes,ot",
    ]
    arguments += ["truncation_timestep=4", "timesteps=4,20", "full_steps=3", "guided=ot", "goal_timestep=6"]
    assert main(arguments) == 0
    return folder / "study", arguments


def test_every_row_has_its_costs_and_metrics(study: tuple[Path, list[str]]) -> None:
    results = json.loads((study[0] / "results.json").read_text("utf-8"))
    calls = {name: arm["nfe"] for name, arm in results["arms"].items()}
    # One call of the prior where there is one, four of the denoiser; the full chain has the steps it was asked for.
    priors = {"Gaussian": 5, "Gaussian, class-wise": 5, "OT": 5}
    # Guidance asks the feature network, and the denoiser no more than before.
    guided = {"OT, guided": 5, "OT, guided, T' = 6": 7, "vanilla, full in 3, guided": 3}
    assert calls == {"vanilla, truncated": 4, "vanilla, full in 3": 3} | priors | guided | {"oracle": 4}
    assert list(calls) == ["vanilla, truncated", "vanilla, full in 3", *priors, *guided, "oracle"]
    assert set(results["floor"]["metrics"]) == set(results["arms"]["OT"]["metrics"])
    assert results["arms"]["OT"]["updates"] == 2
    assert results["arms"]["OT"]["parameters"] == 99_809  # the generator's, printed by every learned prior


def test_priors_of_the_table_start_the_chain_at_any_step(study: tuple[Path, list[str]]) -> None:
    curves = json.loads((study[0] / "results.json").read_text("utf-8"))["curves"]
    assert set(curves) == {"vanilla, truncated", "Gaussian", "Gaussian, class-wise", "OT", "OT, guided", "oracle"}
    assert all(list(points) == ["4", "20"] for points in curves.values())
    # Ten steps of the curves, or as many as there are.
    assert [point["nfe"] for point in curves["OT"].values()] == [5, 11]


def test_table_and_report_show_the_same_numbers(study: tuple[Path, list[str]]) -> None:
    results = json.loads((study[0] / "results.json").read_text("utf-8"))
    value = f"{results['arms']['OT']['metrics']['recall_distance']:#.3g}"
    table, page = ((study[0] / name).read_text("utf-8") for name in ("results.md", "report.html"))
    assert value in next(line for line in table.splitlines() if line.startswith("| OT |"))
    assert value in page and page.count("data:image/png") == 7
    assert f"{SAMPLES} generated images compared with 540 test images of digits" in table
    for text in (table, page):  # the evaluator is untrained
        assert (
            "Evaluated by a ResidualFeatureExtractor: 8 features, effective rank " in text
            and "No verdict should" in text
        )
    assert "**" not in table.split("| --- |")[1] and "class=best" not in page


def test_the_goal_is_stated_with_its_numbers(study: tuple[Path, list[str]]) -> None:
    results = json.loads((study[0] / "results.json").read_text("utf-8"))
    short, full = (results["arms"][name]["metrics"] for name in ("OT, guided, T' = 6", "vanilla, full in 3"))
    compared = ("frechet_distance", "recall_distance", "patch_sliced_wasserstein")
    met = all(short[name] <= full[name] for name in compared)
    verdict = "is at least as good as" if met else "is not in every metric as good as"
    config = load_config(TruncationConfig, ["--config", str(preset_path("digits/truncation.yaml")), *study[1][3:]])
    trusted = {"extractor": results["extractor"] | {"effective_rank": 6.2, "test_accuracy": 0.97}}
    stated = conclusions(config, results | trusted)
    distance = {name: arm["metrics"]["frechet_distance"] for name, arm in results["arms"].items()}
    than = "a lower Fréchet distance than the Gaussian at T' = 4"
    nearer = distance["OT"] < distance["Gaussian"]
    assert stated.startswith(f"Learned priors with {than}: OT." if nearer else f"No learned prior has {than}.")
    assert f'"OT, guided, T\' = 6" with 7 function evaluations {verdict} the plain full chain with 3 (Fré' in stated
    assert f"instead of {full['frechet_distance']:#.3g}" in stated
    # The study's own evaluator is untrained.
    assert results["summary"].startswith("There is no verdict, because the evaluator cannot be trusted: ")
    assert results["summary"] in (study[0] / "results.md").read_text("utf-8")


def test_guided_rows_are_other_images_from_the_same_noise(study: tuple[Path, list[str]]) -> None:
    plain, guided = (
        load_file(study[0] / "samples" / f"{name}.safetensors")["images"].float() for name in ("OT", "OT, guided")
    )
    # Five corrections of the prior and three guided steps, each of three Adam steps of .02 at most.
    assert 1 < (plain - guided).abs().mean() < 8 * 3 * 0.02 * 127.5


def test_a_second_call_keeps_what_is_there(study: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    files = [*sorted((study[0] / "samples").iterdir()), study[0] / "prior_ot_4" / "results.json"]
    written = [file.stat().st_mtime_ns for file in files]
    assert main(study[1]) == 0
    assert [file.stat().st_mtime_ns for file in files] == written
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith(("train", "sample"))]
    assert main([*study[1], "seed=1"]) == 2
    assert "`output_dir`" in capsys.readouterr().err


def test_several_seeds_are_paired_with_the_gan_in_slices(study: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = study[0].parent
    arguments = [*study[1], f"output_dir={tmp_path / 'seeds'}", "priors=gan,ot", "guided=gan,ot"]
    arguments += ["guided_curves=ot", "seeds=2", f"full_denoiser={folder / 'denoiser'}"]
    arguments += [f"second_evaluator={folder / 'features'}"]
    assert main([*arguments, "--max-seconds", "0.1"]) == 3
    assert main(arguments) == 0
    results = json.loads((tmp_path / "seeds" / "results.json").read_text("utf-8"))
    assert results["seeds"] == [0, 1] and next(iter(results["arms"])) == "GAN"
    assert "frechet_distance" in results["differences"]["OT"]
    # The second evaluator scores the rows of the table, and real images.
    assert {"frechet_distance", "second_frechet_distance"} <= set(results["arms"]["OT"]["intervals"])
    assert "second_recall_distance" in results["floor"]["metrics"]
    assert results["second_extractor"]["feature_dim"] == 8
    # Curves are paired with the GAN's as well; guided is what is asked for.
    curves = results["curves"]
    assert {"GAN, guided"} & set(curves) == set() and set(curves["OT, guided"]) == {"4", "20"}
    assert "differences" in curves["OT"]["20"]
    # Both evaluators in the words about OT and GAN.
    trusted = {"extractor": results["extractor"] | {"effective_rank": 6.2, "test_accuracy": 0.97}}
    config = load_config(TruncationConfig, ["--config", str(preset_path("digits/truncation.yaml")), *arguments[3:]])
    stated = conclusions(config, results | trusted)
    assert "OT compared with GAN, Fréchet distance: T' = 4 inconclusive (only 2 seeds); T' = 20 " in stated
    assert "OT compared with GAN, Fréchet distance by the second evaluator: T' = 4 " in stated
    assert {"OT, guided, T' = 6", "GAN, guided, T' = 6"} <= set(results["arms"])


def test_a_prior_of_noisy_images_starts_at_its_own_step_only() -> None:
    options = ["--config", str(preset_path("digits/truncation.yaml")), "priors=gan,ot_original", "guided=gan"]
    study = expand(load_config(TruncationConfig, options))
    curves = study.curves["truncation_timestep"]
    assert list(curves["OT, original"]) == ["10"] and list(curves["GAN"]) == ["10", "50", "100", "200", "300"]
    assert study.arms["prior_ot_original_10"].preset == "digits/prior_ot_original.yaml"


def test_a_tuned_network_is_a_row_with_its_runs() -> None:
    options = ["--config", str(preset_path("digits/truncation.yaml")), "priors=gaussian,few_step", "guided=few_step"]
    study = expand(load_config(TruncationConfig, [*options, "goal_timestep=100"]))
    runs = {name: (arm.train, arm.preset) for name, arm in study.arms.items() if arm.train is not None}
    assert runs == {
        "baseline": ("baseline", "digits/baseline.yaml"),
        "coupled": ("ot", "digits/ot.yaml"),
        "tuned": ("few_step", "digits/few_step.yaml"),
        "prior_gaussian_10": ("prior", "digits/prior_gaussian.yaml"),
        "prior_few_step_10": ("prior", "digits/prior_few_step.yaml"),
    }
    assert "pretrained={coupled}" in study.arms["tuned"].overrides
    assert {"pretrained={tuned}", "denoiser={baseline}"} <= set(study.arms["prior_few_step_10"].overrides)
    assert {"Few-step", "Few-step, guided", "Few-step, guided, T' = 100"} <= set(study.reported)
    assert list(study.curves["truncation_timestep"]["Few-step"]) == ["10", "50", "100", "200", "300"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("denoiser=./nowhere", "`pipeline` must be a folder"),
        ("evaluator=./nowhere", "`evaluator` must be a folder"),
        ("presets=nowhere", "`--config` must be an existing YAML file"),
    ],
)
def test_nothing_is_written_before_all_is_there(
    option: str, message: str, study: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*study[1], f"output_dir={tmp_path / 'new'}", option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_evaluator_is_not_the_network_that_losses_see(
    study: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = next(word for word in study[1] if word.startswith("feature_extractor=")).partition("=")[2]
    assert main([*study[1], f"output_dir={tmp_path / 'new'}", f"evaluator={features}"]) == 2
    assert "`evaluator` must be another network than the one that losses see" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priors": ("gaussian", "flow")}, "`priors` must be among gaussian"),
        ({"timesteps": (10, 0)}, "`timesteps` must hold numbers from 1"),
        ({"learned_timesteps": (7,)}, "`learned_timesteps` must be among timesteps"),
        ({"num_samples": 1}, "`num_samples` must be at least 2"),
        ({"max_train_seconds": 0.0}, "`max_train_seconds` must be positive"),
        ({"guided": ("vae",), "priors": ("ot",)}, "`guided` must be among priors ot, got 'vae'"),
        ({"guided": ("ot",), "guided_curves": ("gan",)}, "`guided_curves` must be among guided ot, got 'gan'"),
        ({"guided": ("ot",), "goal_priors": ("gan",)}, "`goal_priors` must be among guided ot, got 'gan'"),
        ({"goal_timestep": 100}, "`goal_timestep` must be none without guided priors, got 100"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TruncationConfig(**options)
