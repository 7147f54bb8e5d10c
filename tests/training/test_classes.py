"""Training with classes: batches carry their labels, and couplings leave the noise ignorant of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from makers.runs import assert_same_end, results, train
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from ot_diffusers import FlowMatchPipeline, SemidiscreteCoupling
from ot_diffusers.config import BaselineConfig
from ot_diffusers.data import ResidentImages
from ot_diffusers.errors import InputError
from ot_diffusers.training import (
    DiffusionBatch,
    Schedule,
    diffusion_batches,
    make_accelerator,
    make_classes,
    make_noise_scheduler,
)
from ot_diffusers.training.coupling import make_coupling

COUPLINGS = ("independent", "assignment", "semidiscrete")


def images_of(labels: Tensor, **options: Any) -> ResidentImages:
    """Images of 4×4 noise, each class around a brightness of its own."""
    generator = torch.Generator().manual_seed(0)
    levels = 60 + 120 * labels.view(-1, 1, 1, 1) / max(1, int(labels.max()))
    pixels = levels + 30 * torch.randn(len(labels), 1, 4, 4, generator=generator)
    return ResidentImages("noise", "train", labels, pixels.clamp(0, 255).to(torch.uint8), **options)


def config_of(noise_coupling: str, **options: Any) -> BaselineConfig:
    return BaselineConfig(
        class_conditional=True, noise_coupling=noise_coupling, coupling_tolerance=0.05, train_batch_size=32, **options
    )


def batches(
    images: ResidentImages,
    config: BaselineConfig,
    num_updates: int = 4,
    start: int = 0,
    forward: int = 32,
    rank: int = 0,
    ranks: int = 1,
) -> list[DiffusionBatch]:
    """Updates of 32 images; the target of ε prediction is the noise."""
    schedule = Schedule(32, forward, updates_per_epoch=2, num_updates=num_updates)
    own = dataclasses.replace(config, train_batch_size=forward // ranks)
    process: Any = SimpleNamespace(process_index=rank, num_processes=ranks, device=torch.device("cpu"))
    coupling = make_coupling(config, images, make_accelerator(config))
    return list(diffusion_batches(images, make_noise_scheduler(config), own, schedule, process, start, coupling))


@pytest.mark.parametrize("noise_coupling", COUPLINGS)
def test_batches_carry_labels_or_the_null_label(noise_coupling: str, cache: Path) -> None:
    """Whatever the split of an update over processes and forward passes, and wherever the run resumes."""
    images, config = images_of(torch.arange(64) % 3), config_of(noise_coupling, class_dropout=0.25)
    whole = batches(images, config)
    assert images.labels is not None
    labels = torch.cat([batch.class_labels for batch in whole])
    true = images.labels[torch.cat([batch.indices for batch in whole])]
    told = labels < 3
    assert torch.equal(labels[told], true[told]) and bool((labels[~told] == 3).all())
    assert abs(int((~told).sum()) - 32) <= 20  # four standard deviations of 128 draws of 1/4
    assert not torch.equal(told[:32], told[32:64])
    for others in (batches(images, config, forward=8), batches(images, config, start=2)):
        count = sum(len(batch.indices) for batch in others)
        for name in ("class_labels", "noisy", "indices"):
            assert torch.equal(
                torch.cat([getattr(b, name) for b in others]), torch.cat([getattr(b, name) for b in whole])[-count:]
            )
    halves = [batches(images, config, rank=rank, ranks=2) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert batch.class_labels is not None
        assert torch.equal(batch.class_labels, torch.cat([part.class_labels for part in parts]))
    plain = batches(images, dataclasses.replace(config, class_conditional=False))
    assert plain[0].class_labels is None


@pytest.mark.parametrize("noise_coupling", COUPLINGS)
def test_one_class_is_training_without_classes(noise_coupling: str, cache: Path) -> None:
    images, config = images_of(torch.zeros(64, dtype=torch.long)), config_of(noise_coupling)
    plain = batches(images, dataclasses.replace(config, class_conditional=False))
    for batch, other in zip(batches(images, config), plain, strict=True):
        assert torch.equal(batch.noisy, other.noisy) and torch.equal(batch.target, other.target)
        assert torch.equal(batch.indices, other.indices)


@pytest.mark.parametrize("noise_coupling", ["assignment", "semidiscrete"])
def test_noise_does_not_tell_the_class(noise_coupling: str, cache: Path) -> None:
    """A linear discriminant of the noise, fitted to half of the pairs and scored on the others, stays at chance: four
    standard deviations of 1,600 guesses are .05. Pairs across classes give their class away."""
    images, config = images_of(torch.arange(64) % 2), config_of(noise_coupling)
    for across in (False, True):
        pairs = batches(images, dataclasses.replace(config, couple_across_classes=across), num_updates=100)
        noise = torch.cat([batch.target for batch in pairs]).flatten(1).numpy()
        assert images.labels is not None
        labels = images.labels[torch.cat([batch.indices for batch in pairs])].numpy()
        accuracy = LinearDiscriminantAnalysis().fit(noise[:1600], labels[:1600]).score(noise[1600:], labels[1600:])
        assert accuracy > 0.8 if across else abs(accuracy - 0.5) < 0.05
        # Within classes, pairs are nearer than independent ones nevertheless.
        clean = images.fetch(torch.cat([batch.indices for batch in pairs])).flatten(1).numpy()
        assert ((noise - clean) ** 2).mean() < 0.97 * (1 + (clean**2).mean())


def test_labels_and_couplings_that_do_not_fit_are_named(cache: Path, tmp_path: Path) -> None:
    config, labels = config_of("semidiscrete"), torch.arange(64) % 2
    images, accelerator = images_of(labels), make_accelerator(config)
    for saved, own in (("blind", None), ("classes", labels), ("others", labels.flip(0))):
        SemidiscreteCoupling.from_images(images.pixels, labels=own, tolerance=0.5).save_pretrained(tmp_path / saved)
    loaded = dataclasses.replace(config, coupling=str(tmp_path / "classes"))
    assert make_coupling(loaded, images, accelerator) is not None
    for options, message in (
        ({"coupling": "blind"}, r"`coupling` must be one in each class of these images \(couple_across_classes=true"),
        ({"coupling": "others"}, "`coupling` must be one in each class of these images"),
        ({"coupling": "classes", "class_conditional": False}, "`coupling` must be one over all images"),
        ({"coupling": "classes", "couple_across_classes": True}, "`coupling` must be one over all images"),
    ):
        changed = dataclasses.replace(config, **options | {"coupling": str(tmp_path / options["coupling"])})
        with pytest.raises(InputError, match=message):
            make_coupling(changed, images, accelerator)
    without_null = make_classes(dataclasses.replace(config, class_dropout=0), images)
    assert without_null is not None and without_null.null_label is None and without_null.size == 2
    with pytest.raises(InputError, match="`dataset` must have two training images or more of class 'b', got 1"):
        rare = images_of(torch.tensor([0] * 63 + [1]), class_names=("a", "b"))
        make_coupling(config, rare, accelerator)
    with pytest.raises(InputError, match="`label_column` must name a column with class labels, got none"):
        make_coupling(config, dataclasses.replace(images, labels=None), accelerator)
    for options in ({"noise_coupling": "independent"}, {"class_conditional": False}):
        with pytest.raises(InputError, match="`couple_across_classes` must be false without class_conditional=true"):
            dataclasses.replace(config, couple_across_classes=True, **options)


@pytest.mark.slow
def test_a_run_keeps_its_classes_and_resumes(cache: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"noise_coupling": "semidiscrete", "coupling_tolerance": 0.5}
    options |= {"class_conditional": True, "prediction_type": "flow_prediction"}
    run = train("baseline", tmp_path / "run", max_train_steps=2, **options)
    train("baseline", tmp_path / "parts", max_train_steps=1, **options)
    assert_same_end(train("baseline", tmp_path / "parts", max_train_steps=2, **options), run)
    pipeline = FlowMatchPipeline.from_pretrained(run)
    assert pipeline.unet.config.num_class_embeds == 11
    assert pipeline.labels == {str(digit): digit for digit in range(10)}
    assert pipeline.classes.frequencies[0] == pytest.approx(114 / 1152)
    assert SemidiscreteCoupling.from_pretrained(run / "coupling").config.num_classes == 10
    assert results(run)["complete"]
