"""Training priors by the real script: what a run leaves, and what must not change the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from makers import ROOT, snapshot
from makers.models import make_unet, save_pipeline
from makers.runs import assert_same_end, results, train_forked
from makers.runs import train as train_script
from PIL import Image
from safetensors.torch import load_file, save_file

from ot_diffusers import FlowMatchPipeline, OTGuidedDDIMPipeline, TruncatedPriorPipeline
from ot_diffusers.cli import main
from ot_diffusers.config import PriorConfig, load_config, make_config
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.models.prior import FewStepPrior, GaussianPrior, PriorGenerator
from ot_diffusers.models.prior_networks import PriorEncoder
from ot_diffusers.schedules import record_calls, record_coupling, truncated_scheduler
from ot_diffusers.studies.truncation import TruncationConfig
from ot_diffusers.training import make_schedule
from ot_diffusers.training.priors import PriorBatch, VariationalPrior, prior_batches, with_fitted_latents

pytestmark = pytest.mark.slow

EVERY_TERM = {
    "prior": "ot",
    "ot_objective": "pixel+patch+feature+sinkhorn",
    "num_reference_samples": 12,
    "ot_warmup_steps": 1,
    "patch_stride": 2,
}
LEARNED: dict[str, dict[str, Any]] = {"vae": {"prior": "vae"}, "gan": {"prior": "gan"}, "ot": EVERY_TERM}


def save_denoiser(folder: Path, channels: int = 1) -> Path:
    shape = {"in_channels": channels, "out_channels": channels, "block_out_channels": (8, 16)}
    return save_pipeline(folder, make_unet(seed=0, add_attention=False, **shape))


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_denoiser(tmp_path_factory.mktemp("denoiser") / "run")


def train(folder: Path, denoiser: Path, **values: Any) -> Path:
    return train_script("prior", folder, denoiser=str(denoiser), **values)


def sample(run: Path, count: int = 3) -> torch.Tensor:
    pipe = TruncatedPriorPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(batch_size=count, generator=generator, num_inference_steps=2, output_type="pt").images


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, denoiser: Path) -> dict[str, Path]:
    """Four uninterrupted updates of every learned prior."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(folder / name, denoiser, **values) for name, values in LEARNED.items()}


def test_vae_draws_latents_like_the_codes_of_its_data() -> None:
    """The encoder of no training puts the digits far from N(0, I), and so are the latents that are drawn."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"sample_size": 8, "latent_dim": 6, "block_out_channels": (16, 8)}
    encoder = PriorEncoder(in_channels=1, **shape)
    model = VariationalPrior(PriorGenerator(truncation_timestep=10, out_channels=1, **shape), encoder)
    images, config = load_images("digits", "train"), make_config(PriorConfig, {"prior": "vae", "latent_components": 1})
    prior = with_fitted_latents(model, images, truncated_scheduler(DDIMScheduler(), 10), config)
    assert prior.config.num_latent_components == 1
    with torch.no_grad():
        codes = encoder(images.fetch(torch.arange(len(images))))
    # The law of total covariance; one code of each of 1,152 images, whose variances are about 1 here.
    expected = codes.mean.T.cov() + codes.log_variance.exp().mean(0).diag()
    torch.testing.assert_close(prior.latent_mean[0], codes.mean.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(prior.latent_factor[0].T @ prior.latent_factor[0], expected, rtol=0, atol=0.2)
    assert (expected - torch.eye(6)).abs().max() > 0.4


def test_latents_of_a_vae_are_fitted_class_by_class() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"sample_size": 8, "latent_dim": 6, "block_out_channels": (16, 8), "num_classes": 10}
    encoder = PriorEncoder(in_channels=1, **shape)
    model = VariationalPrior(PriorGenerator(truncation_timestep=10, out_channels=1, **shape), encoder)
    images, config = load_images("digits", "train"), make_config(PriorConfig, {"prior": "vae", "latent_components": 1})
    scheduler = truncated_scheduler(DDIMScheduler(), 10)
    prior = with_fitted_latents(model, images, scheduler, config, images.labels)
    assert prior.config.num_latent_components == 10  # at least one for each
    with torch.no_grad():
        means = encoder(images.fetch(torch.arange(len(images))), class_labels=images.labels).mean
    expected = torch.stack([means[images.labels == label].mean(0) for label in range(10)])
    # One code of each of about 115 images, whose variances are about 1: standard errors of .1, here of 60 numbers.
    assert (prior.latent_mean - expected).square().mean().sqrt() < 0.15 < expected.std(0).mean() / 1.5


def test_batches_of_classes_have_equal_shares_and_do_not_depend_on_the_processes() -> None:
    images, scheduler = load_images("digits", "train"), truncated_scheduler(DDIMScheduler(), 10)

    def batch(index: int, processes: int) -> PriorBatch:
        values = {"prior": "ot", "train_batch_size": 16 // processes, "num_reference_samples": 32, "latent_dim": 4}
        config = make_config(PriorConfig, values | {"class_conditional": True})
        accelerator: Any = SimpleNamespace(
            device=torch.device("cpu"), process_index=index, num_processes=processes, gradient_accumulation_steps=2
        )
        schedule = make_schedule(config, accelerator, images)
        passes = prior_batches(images, scheduler, config, schedule, accelerator, 0, images.labels)
        next(passes)  # the second pass of the first update
        return next(passes)

    whole, parts = batch(0, 1), [batch(index, 2) for index in (0, 1)]
    for name in ("real", "class_labels", "pair_labels", "reference", "latents", "pair_latents"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert whole.class_labels is not None and whole.pair_labels is not None
    assert torch.equal(whole.pair_labels.bincount(), 2 * whole.class_labels.bincount())
    # At T' = 10 the noise is .04 of a pixel: the nearest image is the image itself.
    clean = images.fetch(torch.arange(len(images))).flatten(1)
    for rows, labels in ((whole.real, whole.class_labels), (whole.reference, whole.pair_labels)):
        nearest = torch.cdist(rows.flatten(1), clean).argmin(dim=1)
        assert images.labels is not None and torch.equal(images.labels[nearest], labels)


def test_a_warm_start_learns_the_map_to_the_gaussian(denoiser: Path, tmp_path: Path) -> None:
    """What the generator makes of latents follows μ + Fᵀz, the closed-form transport map, as it did not before."""
    images = load_images("digits", "train")
    warm = {"prior": "ot", "learning_rate": 1e-2, "train_batch_size": 64, "ema_decay": 0.5}

    def explained(steps: int) -> float:
        run = train(tmp_path / str(steps), denoiser, **warm, max_train_steps=steps, ot_warmup_steps=steps)
        prior = TruncatedPriorPipeline.from_pretrained(run).prior
        gaussian = GaussianPrior.from_images(images.fetch(torch.arange(len(images))), 10, rank=6)
        latents = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
        target = (gaussian.mean[0] + latents @ gaussian.factor[0]).clamp(-1, 1)
        with torch.no_grad():
            left = (prior.eval()(latents).sample.flatten(1) - target).square().mean()
        return 1 - (left / target.var(dim=0).mean()).item()

    assert explained(1) < 0 and explained(150) > 0.5


def test_weights_of_the_objective_follow_the_names_of_its_terms(denoiser: Path, tmp_path: Path) -> None:
    def first_losses(name: str, **values: Any) -> dict[str, float]:
        run = train(tmp_path / name, denoiser, prior="ot", max_train_steps=1, **values)
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])

    plain = first_losses("plain", ot_objective="pixel+patch")
    weighted = first_losses("weighted", ot_objective="patch+pixel", ot_weights=[8.0, 0.5])
    for term, weight in (("patch", 8.0), ("pixel", 0.5)):
        # One update from the same weights and draws: powers of two are exact.
        assert weighted[term] == pytest.approx(weight * plain[term], rel=1e-6)
    assert weighted["loss"] == pytest.approx(weighted["patch"] + weighted["pixel"], rel=1e-6)


def test_learned_priors_share_one_generator_and_open_as_pipelines(runs: dict[str, Path]) -> None:
    parameters = {results(run)["parameters"] for run in runs.values()}
    assert len(parameters) == 1
    for run in runs.values():
        prior = TruncatedPriorPipeline.from_pretrained(run).prior
        assert parameters == {sum(parameter.numel() for parameter in prior.parameters())}
        assert prior.config.truncation_timestep == 10
        images = sample(run)
        assert images.isfinite().all() and images.std() > 0


def test_the_saved_prior_is_the_averaged_one(runs: dict[str, Path]) -> None:
    checkpoint = runs["ot"] / "checkpoints" / "update-00000004"
    average, trained = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    saved = TruncatedPriorPipeline.from_pretrained(runs["ot"]).prior
    differs = False
    for index, (name, value) in enumerate(saved.named_parameters()):
        assert torch.equal(value, average[str(index)])
        differs |= not torch.equal(value, trained[name])
    assert differs


def test_a_tuned_network_becomes_a_prior_without_training(denoiser: Path, tmp_path: Path) -> None:
    tuned = FlowMatchEulerDiscreteScheduler()
    record_coupling(tuned, "semidiscrete")
    untuned = FlowMatchPipeline(make_unet(seed=1, block_out_channels=(8, 16)), tuned)
    untuned.save_pretrained(tmp_path / "coupled")
    record_calls(tuned, 2)
    untuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "results.json").write_text('{"training_seconds": 12.5}')
    run = train(tmp_path / "run", denoiser, prior="few_step", pretrained=str(tmp_path / "tuned"))
    pipe = TruncatedPriorPipeline.from_pretrained(run)
    assert type(pipe.prior) is FewStepPrior and pipe.prior.nfe == 2
    saved, made = pipe.prior.unet.state_dict(), untuned.unet.state_dict()
    assert all(torch.equal(saved[name], made[name]) for name in made)
    record = results(run)
    assert record["updates"] == 0 and record["training_seconds"] == 12.5  # those of the tuning
    assert record["parameters"] == sum(parameter.numel() for parameter in untuned.unet.parameters())
    assert sample(run).std() > 0 and (run / "samples" / "few-step.png").is_file()

    coupled = {"prior": "few_step", "pretrained": str(tmp_path / "coupled")}
    with pytest.raises(InputError, match="`pretrained` must be tuned for a few calls"):
        train(tmp_path / "untuned", denoiser, **coupled)
    with pytest.raises(InputError, match="`scheduler` must "):
        train(tmp_path / "behind", tmp_path / "coupled", prior="few_step", pretrained=str(tmp_path / "tuned"))
    with pytest.raises(InputError, match="`pretrained` must be tuned with classes for class_conditional=true"):
        few_step = {"prior": "few_step", "pretrained": str(tmp_path / "tuned"), "class_conditional": True}
        train(tmp_path / "classes", denoiser, **few_step)
    for bad in ({"prior": "few_step"}, {"prior": "vae", "pretrained": "x"}):
        with pytest.raises(InputError, match="`pretrained` must be the tuned pipeline for prior=few_step, and none"):
            train(tmp_path / "bad", denoiser, **bad)


def test_a_tuned_network_of_classes_brings_them_along(denoiser: Path, tmp_path: Path) -> None:
    scheduler, named = FlowMatchEulerDiscreteScheduler(), {0: "a", 1: "b"}
    record_calls(scheduler, 1)
    shares = {0: 0.9, 1: 0.1}
    unet = make_unet(seed=1, block_out_channels=(8, 16), num_class_embeds=3)
    tuned = FlowMatchPipeline(unet, scheduler, id2label=named, class_frequencies=shares)
    tuned.save_pretrained(tmp_path / "tuned")
    run = train(tmp_path / "run", denoiser, prior="few_step", pretrained=str(tmp_path / "tuned"))
    pipe = TruncatedPriorPipeline.from_pretrained(run)
    assert pipe.prior.num_classes == 2 and pipe.classes is not None
    assert pipe.labels == {"a": 0, "b": 1} and pipe.classes.frequencies == (0.9, 0.1)
    assert sample(run).std() > 0


@pytest.mark.parametrize("name", LEARNED)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    name: str, runs: dict[str, Path], denoiser: Path, tmp_path: Path
) -> None:
    train(tmp_path / "run", denoiser, **LEARNED[name], max_train_steps=2)
    train(tmp_path / "run", denoiser, **LEARNED[name])
    assert_same_end(tmp_path / "run", runs[name])


@pytest.mark.parametrize("name", ["gan", "ot"])  # a VAE compares each image with itself alone
def test_two_processes_compute_what_one_computes(name: str, denoiser: Path, tmp_path: Path) -> None:
    """Gradients after the first update, by Adam's first moments, on the same global batch and references."""
    own = LEARNED[name] | ({"num_reference_samples": 11} if name == "ot" else {})  # no multiple of two
    train(tmp_path / "one", denoiser, **own, max_train_steps=1)
    values = own | {"max_train_steps": 1, "denoiser": str(denoiser), "train_batch_size": 4}
    train_forked("prior", tmp_path / "two", 2, **values)
    for part in (".", *(["opponent"] if name == "gan" else [])):
        file = f"checkpoints/update-00000001/{part}/optimizer.safetensors"
        first, second = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        for key in first:
            if key.endswith("exp_avg"):
                # Float32 sums in another order, on gradients clipped to norm 1.
                torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10"])
def test_presets_give_every_prior_the_same_generator(data: str) -> None:
    folder = ROOT / "configs" / data
    presets = {file.stem: load_config(PriorConfig, ["--config", str(file)]) for file in folder.glob("prior_*.yaml")}
    assert {"prior_gaussian", "prior_vae", "prior_gan", "prior_ot"} <= presets.keys()
    learned = [config for config in presets.values() if config.prior not in ("gaussian", "few_step")]
    assert len({(config.latent_dim, config.block_out_channels) for config in learned}) == 1
    study = load_config(TruncationConfig, ["--config", str(folder / "truncation.yaml")])
    assert study.dataset == study.presets == data
    for config in presets.values():
        assert config.truncation_timestep == study.truncation_timestep


def test_the_source_presets_are_its_recipe() -> None:
    config = load_config(PriorConfig, ["--config", str(ROOT / "configs" / "cifar10" / "prior_ot_original.yaml")])
    assert (config.truncation_timestep, config.latent_dim, config.train_batch_size) == (10, 1024, 128)
    assert (config.num_train_epochs, config.prediction_type, config.ot_objective) == (32, "noisy_sample", "pixel")


def test_the_command_refuses_bad_input_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["truncation", "timesteps=0"]) == 2
    assert capsys.readouterr().err == "error: `timesteps` must hold numbers from 1, got (0,)\n"
    assert main(["truncation", "learned_timesteps=20"]) == 2
    assert "`learned_timesteps` must be among timesteps" in capsys.readouterr().err


def test_the_closed_form_needs_no_training_and_has_the_mean_of_the_data(denoiser: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "one", denoiser, prior="gaussian")
    classes = train(tmp_path / "classes", denoiser, prior="gaussian", class_conditional=True)
    assert results(run)["complete"] and results(run)["updates"] == 0
    images = load_images("digits", "train")
    mean = images.fetch(torch.arange(len(images))).flatten(1).mean(0)
    prior = TruncatedPriorPipeline.from_pretrained(run).prior
    # Stored in float32.
    torch.testing.assert_close(prior.mean[0], mean, rtol=0, atol=1e-5)
    pipeline = TruncatedPriorPipeline.from_pretrained(classes)
    assert pipeline.prior.config.num_components == 10
    assert pipeline.labels == {str(digit): digit for digit in range(10)}
    assert sample(classes).isfinite().all()


def test_a_denoiser_with_classes_serves_any_prior(tmp_path: Path) -> None:
    """A learned prior without labels makes images of any class, which are compared and denoised with the null label."""
    unet = make_unet(seed=0, add_attention=False, block_out_channels=(8, 16), num_class_embeds=11)
    named = {label: str(label) for label in range(10)}
    OTGuidedDDIMPipeline(unet, DDIMScheduler(), id2label=named).save_pretrained(tmp_path / "denoiser")
    learned = train(tmp_path / "ot", tmp_path / "denoiser", max_train_steps=1, **EVERY_TERM)
    closed = train(tmp_path / "gaussian", tmp_path / "denoiser", prior="gaussian", class_conditional=True)
    for run in (learned, closed):
        assert len(TruncatedPriorPipeline.from_pretrained(run).labels) == 10
        assert sample(run).isfinite().all()
    OTGuidedDDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "no null label")
    with pytest.raises(InputError, match="`denoiser` must be unconditional, or know a null label"):
        train(tmp_path / "refused", tmp_path / "no null label", prior="gaussian")
    named[3] = "three"
    OTGuidedDDIMPipeline(unet, DDIMScheduler(), id2label=named).save_pretrained(tmp_path / "others")
    with pytest.raises(InputError, match="`denoiser` must know the classes"):
        train(tmp_path / "refused", tmp_path / "others", prior="gan", class_conditional=True)


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_prior_of_classes_opens_as_a_pipeline_of_them(name: str, denoiser: Path, tmp_path: Path) -> None:
    own = LEARNED[name] | {"class_conditional": True, "max_train_steps": 2}
    own |= {"num_reference_samples": 16, "feature_extractor": None} if name == "ot" else {}
    run = train(tmp_path / "run", denoiser, **own)
    pipe = TruncatedPriorPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.prior.num_classes == 10 and pipe.labels == {str(digit): digit for digit in range(10)}
    assert pipe.classes is not None and pipe.classes.frequencies[0] == pytest.approx(114 / 1152)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    seven, eight = (
        pipe(2, torch.Generator().manual_seed(0), class_labels=digit, **call).images for digit in ("7", "8")
    )
    assert (seven - eight).abs().max() > 1e-3 and sample(run).isfinite().all()
    with Image.open(run / "samples" / "update-00000002.png") as grid:
        assert grid.size == (6 * 8, 10 * 8)  # a row for each class
    if name == "ot":
        with pytest.raises(InputError, match="`num_reference_samples` must be a multiple of the 8 images of a forward"):
            train(tmp_path / "other", denoiser, **own | {"num_reference_samples": 12})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prior": "flow"}, "`prior` must be one of gaussian, few_step, vae, gan, ot"),
        (
            {"ot_objective": "patch+pixel", "ot_weights": [1]},
            "`ot_weights` must be none or a positive number for each of",
        ),
        (
            {"ot_objective": "patch", "ot_weights": [0]},
            "`ot_weights` must be none or a positive number for each of patch",
        ),
        ({"ot_objective": "patch+pixels"}, "`ot_objective` must join some of pixel, patch, feature, sinkhorn"),
        ({"prior": "gaussian", "prediction_type": "noisy_sample"}, "`prediction_type` must be sample"),
        ({"truncation_timestep": 0}, "`truncation_timestep` must be at least 1"),
        ({"truncation_timestep": 1001}, "`truncation_timestep` must be an integer from 1 to 1000"),
        ({"block_out_channels": [8, 8, 8, 8, 8]}, "`sample_size` must be divisible by 16"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    values: dict[str, Any], message: str, denoiser: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        train(tmp_path / "run", denoiser, **values)
    assert not (tmp_path / "run").exists()


def test_a_denoiser_that_does_not_fit_is_refused(denoiser: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`denoiser` must be trained on images of shape \(1, 8, 8\), got \(3, 8, 8\)"):
        train(tmp_path / "run", save_denoiser(tmp_path / "colour", channels=3))
    with pytest.raises(InputError, match=r"`denoiser` must be a folder with a model_index\.json"):
        train(tmp_path / "run", tmp_path / "absent")
    short = shutil.copytree(denoiser, tmp_path / "short")
    (short / "run.json").write_text(json.dumps({"config": {"max_timestep": 5}}))
    with pytest.raises(InputError, match="`truncation_timestep` must be at most 5"):
        train(tmp_path / "run", short)


def test_a_denoiser_that_was_replaced_is_refused(tmp_path: Path) -> None:
    """Also by the closed form, whose pipeline it is a part of."""
    for prior in ("gaussian", "ot"):
        denoiser = save_denoiser(tmp_path / f"{prior}-denoiser")
        run = train(tmp_path / prior, denoiser, prior=prior, max_train_steps=1)
        before = snapshot(run)
        file = denoiser / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["conv_in.weight"][0, 0, 0, 0] += 1e-3
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"`denoiser` must hold the weights that the run began with, got '.*"):
            train(run, denoiser, prior=prior, max_train_steps=2)
        assert snapshot(run) == before


def test_a_prior_that_is_asked_to_stop_draws_nothing(denoiser: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", denoiser, max_train_seconds=1e-9, sample_epochs=1)
    assert results(run)["updates"] == 1 and not (run / "samples").exists()
    sample(run)
