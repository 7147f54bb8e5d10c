"""Runs that start from a pipeline: they go on where it stands, and refuse what contradicts it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    VQModel,
)
from huggingface_hub import ModelCard, constants
from makers import command
from makers.models import make_truncated, make_unet, make_vae
from makers.runs import assert_same_end, metrics, results, train, train_forked
from safetensors.torch import load_file

from ot_diffusers import FlowMatchPipeline
from ot_diffusers.config import BaselineConfig, OTConfig
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.hub.cards import CardFacts, render_card
from ot_diffusers.losses.denoising import denoising_loss
from ot_diffusers.pipelines.classes import Classes
from ot_diffusers.schedules import record_calls, record_coupling
from ot_diffusers.training import (
    Schedule,
    diffusion_batches,
    load_source,
    make_accelerator,
    make_classes,
    make_noise_scheduler,
    with_source,
)
from ot_diffusers.training import make_unet as make_trained_unet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline as diffusers saves it, whose noise schedule and size of images are no defaults."""
    unet = make_unet(seed=0, block_out_channels=(8, 16), sample_size=16)
    scheduler = DDPMScheduler(200, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    folder = tmp_path_factory.mktemp("stock")
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(stock: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One update that changes next to nothing, from the Hub id of the same pipeline."""
    cache = tmp_path_factory.mktemp("cache")
    downloaded, commit = cache / "models--someone--stock", 40 * "0"
    shutil.copytree(stock, downloaded / "snapshots" / commit)
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text(commit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        options = {"pretrained": "someone/stock", "learning_rate": 1e-12, "max_train_steps": 1}
        return train("baseline", tmp_path_factory.mktemp("runs") / "run", **options)


def test_two_processes_start_from_the_same_network(stock: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pretrained": stock, "max_train_steps": 1, "lr_scheduler": "constant"}
    two = train_forked("baseline", tmp_path / "two", 2, **options, train_batch_size=4)
    one = train("baseline", tmp_path / "one", **options, train_batch_size=8)
    assert metrics(two)[0]["loss"] == pytest.approx(metrics(one)[0]["loss"], rel=1e-5)


def save_flow(
    folder: Path, unet: Any, noise_coupling: str | None = None, calls: int | None = None, **options: Any
) -> Any:
    """A flow pipeline with the records of its training, loaded as a run that starts from it does."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    if noise_coupling is not None:
        record_coupling(scheduler, noise_coupling)
    if calls is not None:
        record_calls(scheduler, calls)
    FlowMatchPipeline(unet, scheduler, **options).save_pretrained(folder)
    return load_source(str(folder))


def test_a_run_goes_on_where_the_pipeline_stands(stock: str, run: Path) -> None:
    before, after = DDPMPipeline.from_pretrained(stock), DDIMPipeline.from_pretrained(run)
    weights = after.unet.state_dict()
    for name, value in before.unet.state_dict().items():
        # Adam's first step moves a weight by its learning rate at most, and float32 may round once.
        assert torch.allclose(weights[name], value, rtol=2e-7, atol=2e-12), name
    assert torch.equal(after.scheduler.alphas_cumprod, before.scheduler.alphas_cumprod)
    assert after.scheduler.config.prediction_type == "v_prediction"

    config = with_source(BaselineConfig(train_batch_size=8), load_source(stock))
    images, accelerator = load_images("digits", image_size=16), make_accelerator(config)
    batch = next(diffusion_batches(images, before.scheduler, config, Schedule(8, 8, 144, 1), accelerator))
    with torch.no_grad():
        expected = denoising_loss(before.unet(batch.noisy, batch.timesteps).sample, batch.target)
    (line,) = metrics(run)
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)  # the same numbers, in training mode

    record = json.loads((run / "run.json").read_text())
    assert record["config"]["image_size"] == 16 and record["config"]["num_train_timesteps"] == 200
    assert record["config"]["beta_schedule"] == "squaredcos_cap_v2" and record["pretrained"] == {
        "hub_id": "someone/stock"
    }


def test_an_interrupted_run_ends_like_the_uninterrupted_and_keeps_its_pipeline(stock: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    unet = make_unet(seed=1, block_out_channels=(8, 16))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(source)
    options = {"pretrained": str(source), "max_train_steps": 4}
    whole = train("baseline", tmp_path / "whole", **options)
    stopped = train("baseline", tmp_path / "stopped", **options | {"max_train_steps": 2})
    train("baseline", stopped, **options)
    assert_same_end(whole, stopped)

    with pytest.raises(InputError, match=r"`output_dir` must be empty .* which holds a run with .*=.* instead of"):
        train("baseline", stopped, **options | {"pretrained": stock})
    DDPMPipeline(make_unet(seed=2, block_out_channels=(8, 16)), DDPMScheduler()).save_pretrained(source)
    with pytest.raises(InputError, match="`pretrained` must hold the weights that the run began with"):
        train("baseline", stopped, **options)


def test_what_a_run_leaves_open_is_that_of_the_pipeline(stock: str) -> None:
    config = with_source(OTConfig(dropout=0.2, timestep_spacing="leading", norm_num_groups=4), load_source(stock))
    assert (config.prediction_type, config.num_train_timesteps) == ("v_prediction", 200)
    assert (config.block_out_channels, config.layers_per_block, config.attention_levels) == ((8, 16), 1, ())
    assert (config.image_size, config.channels) == (16, 1)
    assert (config.dropout, config.timestep_spacing, config.noise_coupling) == (0.2, "leading", "semidiscrete")
    assert with_source(config, None) is config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_out_channels": (32, 64)}, r"`block_out_channels` must be left out or 8,16, .*, got \(32, 64\)"),
        ({"prediction_type": "epsilon"}, "`prediction_type` must be left out or v_prediction, .*, got 'epsilon'"),
        ({"num_train_timesteps": 1000}, "`num_train_timesteps` must be left out or 200, .*, got 1000"),
        ({"image_size": 8}, "`image_size` must be left out or 16, as in the pipeline of pretrained, got 8"),
        ({"channels": 3}, "`channels` must be left out or 1, as in the pipeline of pretrained, got 3"),
    ],
)
def test_options_that_contradict_the_pipeline_are_refused(stock: str, options: Any, message: str) -> None:
    """Also those whose value is the default: it was asked for."""
    with pytest.raises(InputError, match=message):
        with_source(BaselineConfig(**options), load_source(stock))


def test_pipelines_that_cannot_go_on_are_refused(stock: str, tmp_path: Path) -> None:
    make_truncated().save_pretrained(tmp_path / "truncated")
    DDPMPipeline(make_unet(out_channels=2), DDPMScheduler()).save_pretrained(tmp_path / "variances")
    latent = make_unet(sample_size=4, in_channels=2, out_channels=2)
    LDMPipeline(make_vae(VQModel, num_vq_embeddings=4), latent, DDIMScheduler()).save_pretrained(tmp_path / "latent")
    for name, message in (
        ("latent", "`pretrained` must denoise pixels, not latents, got 'OTGuidedDDIMPipeline'"),
        ("nothing", "`pretrained` must be a folder with a model_index.json, or a Hub id, got"),
        ("truncated", "`pretrained` must begin with noise, not with a prior, got 'TruncatedPriorPipeline'"),
        ("variances", "`pretrained` must predict 1 channels, without learned variances, got 2"),
    ):
        with pytest.raises(InputError, match=message):
            load_source(str(tmp_path / name))
    with pytest.raises(
        InputError, match=r"`pretrained` must be trained on images of shape \(1, 8, 8\), got \(1, 16, 16\)"
    ):
        make_trained_unet(BaselineConfig(), (1, 8, 8), None, load_source(stock))


def test_records_of_the_earlier_training_end_with_it(tmp_path: Path) -> None:
    source = save_flow(tmp_path, make_unet(), "semidiscrete", calls=2)
    for given, coupling in (({}, "semidiscrete"), ({"noise_coupling": "independent"}, None)):
        config = with_source(BaselineConfig(**given), source)
        scheduler = make_noise_scheduler(config, source)
        assert scheduler.config.get("_noise_coupling") == coupling
        assert "_num_inference_steps" not in scheduler.config


def test_classes_are_those_of_the_pipeline(tmp_path: Path) -> None:
    images = load_images("digits")
    for size, prefix in ((11, ""), (10, ""), (11, "no. ")):
        names = {label: f"{prefix}{label}" for label in range(10)}
        source = save_flow(tmp_path / f"{size}{prefix}", make_unet(num_class_embeds=size), id2label=names)
        config = with_source(BaselineConfig(), source)
        assert config.class_conditional and (config.class_dropout > 0) == (size == 11)
        if prefix:
            with pytest.raises(InputError, match=r"`pretrained` must know the classes \('0', '1'"):
                make_classes(config, images, source)
            continue
        classes = make_classes(with_source(BaselineConfig(class_dropout=0), source), images, source)
        assert classes is not None and classes.size == size
        make_trained_unet(config, (1, 8, 8), classes, source)
    with pytest.raises(InputError, match=r"`class_conditional` must be left out or true, .*, got False"):
        with_source(BaselineConfig(class_conditional=False), source)


def test_an_unconditional_network_learns_classes_from_where_it_stands(stock: str, tmp_path: Path) -> None:
    source, classes = load_source(stock), Classes.from_counts(dict.fromkeys("0123456789", 1))
    unet = make_trained_unet(BaselineConfig(), (1, 16, 16), classes, source)
    noisy = torch.randn(11, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    time = torch.full((11,), 50)
    with torch.no_grad():
        told = unet(noisy, time, class_labels=torch.arange(11)).sample
        assert torch.equal(told, source.unet(noisy, time).sample)  # a sum with zeros
    options = {"class_conditional": True, "max_train_steps": 2, "noise_coupling": "independent"}
    run = train("baseline", tmp_path / "run", pretrained=stock, **options)
    saved = load_file(next((run / "unet").glob("*.safetensors")))["class_embedding.weight"]
    assert saved.shape[0] == 11 and float(saved.abs().max()) > 0


def test_the_card_says_what_training_started_from(run: Path, tmp_path: Path) -> None:
    assert command("card", run, "--output", tmp_path / "card", "--num-images", 0) == 0
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.data.base_model == "someone/stock"
    assert "It started from [someone/stock](https://huggingface.co/someone/stock)." in card.text
    record = json.loads((tmp_path / "card" / "training" / "pipeline" / "run.json").read_text())
    assert record["config"]["pretrained"] == "someone/stock"  # a Hub id is no local path

    for source, sentence in (({"hub_id": None}, "It started from a local pipeline."), (None, None)):
        runs = {"pipeline": (record | {"pretrained": source}, results(run))}
        card = render_card(CardFacts("user/model", "DDIMPipeline", {"unet": 1}, runs=runs))
        assert card.data.base_model is None and ("started from" in card.text) == (sentence is not None)
        assert sentence is None or sentence in card.text
