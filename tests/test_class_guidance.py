"""Guidance by class: one problem for each class in the batch, solved together, and fields of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from makers.draws import seeded
from makers.models import make_unet
from torch import Tensor

from ot_diffusers import ConvFeatureExtractor, OTGuidance, OTGuidedDDIMPipeline, ReferenceBank
from ot_diffusers.errors import InputError
from ot_diffusers.models.guidance_field import GuidanceField
from ot_diffusers.sampling import load_pipeline

LABELS = torch.tensor([0] * 17 + [1] * 30 + [2] * 13)


def parts(labels: Tensor | None = LABELS, **options: Any) -> tuple[ConvFeatureExtractor, ReferenceBank]:
    """A network, and references whose classes have brightnesses of their own."""
    torch.manual_seed(0)
    network = ConvFeatureExtractor(sample_size=8, block_out_channels=(4, 8), feature_dim=12)
    images = (0.6 * (LABELS.view(-1, 1, 1, 1) - 1) + 0.2 * torch.randn(60, 1, 8, 8)).clamp(-1, 1)
    features = network.extract(images)
    return network, ReferenceBank.from_features(features, feature_scale=0.1, images=images, labels=labels, **options)


def of_class(bank: ReferenceBank, label: int, num_classes: int | None = None) -> ReferenceBank:
    """The references of one class, with the scales of all; without labels, or as the only class."""
    rows = label == LABELS
    config = {name: value for name, value in bank.config.items() if not name.startswith("_")}
    part = ReferenceBank(**config | {"num_samples": int(rows.sum()), "num_classes": num_classes})
    assert part.thumbnails is not None and bank.thumbnails is not None
    part.features.data.copy_(bank.features[rows])
    part.thumbnails.data.copy_(bank.thumbnails[rows])
    return part


@pytest.mark.parametrize("metric", ["sinkhorn", "mmd"])
def test_a_batch_of_classes_is_guided_as_each_class_alone(metric: str) -> None:
    """Problems of different sizes are padded by repeated points: the same transport problems, up to the tolerance of
    the solver, which moves a pixel by far less than .001; mixed classes would move them by tenths."""
    network, bank = parts()
    labels = torch.tensor([0] * 5 + [2] * 9 + [0] * 2)[torch.randperm(16)]
    images = 0.3 * torch.randn(16, 1, 8, 8)
    together = OTGuidance(network, bank, metric=metric).correct(images, class_labels=labels)
    for label in (0, 2):
        alone = OTGuidance(network, of_class(bank, label), metric=metric).correct(images[labels == label])
        torch.testing.assert_close(together[labels == label], alone, atol=1e-3, rtol=0)
        assert (alone - images[labels == label].clamp(-1, 1)).abs().max() > 0.1
    blind = OTGuidance(network, bank, metric=metric).correct(images)
    assert (together - blind).abs().max() > 0.05


def test_a_chain_warm_starts_the_problems_of_its_classes() -> None:
    network, bank = parts()
    labels, images = torch.arange(24) % 3, 0.3 * torch.randn(24, 1, 8, 8)
    with OTGuidance(network, bank).chain() as guidance:
        once = guidance.correct(images, class_labels=labels)
        again = guidance.correct(images, class_labels=labels)
        other = guidance.correct(images, class_labels=labels.flip(0))
    torch.testing.assert_close(again, once, atol=1e-3, rtol=0)  # the tolerance of the solver
    assert (other - once).abs().max() > 0.05


def pipeline(labels: Tensor | None = LABELS, size: int | None = 4) -> OTGuidedDDIMPipeline:
    network, bank = parts(labels)
    unet, options = make_unet(seed=0, num_class_embeds=size), {}
    if size is not None:
        options = {"id2label": {label: str(label) for label in range(size - 1)}}
    pipe = OTGuidedDDIMPipeline(unet, DDIMScheduler(timestep_spacing="trailing"), network, bank, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: OTGuidedDDIMPipeline, labels: Any, *seeds: int, **options: Any) -> Tensor:
    call = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(*seeds), "class_labels": labels}
    return pipe(batch_size=len(seeds), **call | options).images


def test_pipelines_guide_by_class_and_fields_keep_the_classes(tmp_path: Path) -> None:
    """Joint guidance takes each class of an untrained denoiser to its brightness; the field, recorded on other noise,
    does so for single images as well."""
    pipe, labels = pipeline(), torch.arange(48) % 3
    joint = sampled(pipe, labels, *range(48))
    means = [joint[labels == label].mean() for label in range(3)]
    plain = sampled(pipe, labels, *range(48), guidance_scale=0)
    assert means[0] < means[1] - 0.2 and means[1] < means[2] - 0.2
    assert max(plain[labels == label].mean() for label in range(3)) < means[2] - 0.2

    generator = torch.Generator().manual_seed(9)
    pipe.record_guidance_field(96, generator, num_inference_steps=3, class_labels=[0, 1, 2] * 32, blur=0.3)
    pipe.save_pretrained(tmp_path)
    loaded: Any = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.guidance_field, GuidanceField) and loaded.guidance_field.config.num_classes == 3
    together = sampled(loaded, labels, *range(48))
    for index in (0, 1, 2):
        single = sampled(loaded, [int(labels[index])], index)
        torch.testing.assert_close(single, together[index : index + 1], atol=1e-4, rtol=0)  # rounding of float32
    followed = [together[labels == label].mean() for label in range(3)]
    assert followed[0] < followed[1] - 0.1 and followed[1] < followed[2] - 0.1
    with pytest.raises(InputError, match="`class_labels` must be given to follow a field of classes"):
        options: dict[str, Any] = {"guidance_field": loaded.guidance_field}
        OTGuidance(loaded.feature_extractor, loaded.reference_bank, **options).correct(torch.zeros(2, 1, 8, 8), 999)


def test_a_hundred_samples_of_one_of_many_classes_are_enough_for_its_field() -> None:
    """Completed by as many references as a field without classes, they would be moved by a twentieth."""
    network, bank = parts(num_classes=10)
    images, labels = 0.3 * torch.randn(100, 1, 8, 8), torch.zeros(100, dtype=torch.long)
    moved = []
    for options in ({}, {"history": []}):
        corrected = OTGuidance(network, bank, num_correction_steps=1, blur=0.6, **options).correct(images, 999, labels)
        moved.append((corrected - images.clamp(-1, 1)).flatten(1).norm(dim=1).mean())
    assert moved[1] > 0.9 * moved[0]


def test_a_field_of_one_class_is_that_of_its_samples_alone() -> None:
    """The cloud of a single class is completed as a cloud without classes is, here 12 samples by the 17 references."""
    network, bank = parts()
    images, new = 0.3 * torch.randn(12, 1, 8, 8), 0.3 * torch.randn(4, 1, 8, 8)
    zeros = torch.zeros(12, dtype=torch.long)
    fields = []
    for own, labels in ((of_class(bank, 0, num_classes=1), zeros), (of_class(bank, 0), None)):
        guidance = OTGuidance(network, own, history=[])
        with guidance.chain():
            guidance.correct(images, 999, labels)
        field = guidance.recorded_field()
        fields.append(
            OTGuidance(network, own, guidance_field=field).correct(new, 999, None if labels is None else zeros[:4])
        )
    torch.testing.assert_close(*fields, atol=1e-3, rtol=0)  # the tolerance of the solver


def test_a_batch_with_few_images_of_a_class_warns_once() -> None:
    pipe, record = pipeline(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ot_diffusers.pipelines.guided.logger.warning", record.append)
        sampled(pipe, [0] * 20 + [1] * 17, *range(37))
        sampled(pipe, [0] * 20 + [1] * 7, *range(27), guidance_scale=0)
        pipe.record_guidance_field(18, num_inference_steps=3, class_labels=[0, 1, 2] * 6)
        sampled(pipe, [1], 0)  # follows the field
        assert record == []
        sampled(pipe, [0] * 20 + [1] * 7 + [2] * 9, *range(36), joint_batch=True)
        sampled(pipeline(None), [0], 0)
    assert len(record) == 2
    assert "; 7 images of class '1' are too few for that" in record[0] and "`record_guidance_field`" in record[0]
    assert "; 1 image is too few for that" in record[1]


def test_labels_that_cannot_guide_are_named() -> None:
    network, bank = parts()
    images = torch.zeros(2, 1, 8, 8)
    for own, labels, message in (
        (bank, torch.tensor([0, 5]), "`class_labels` must be classes of the reference set, got 5"),
        (bank, torch.tensor([0]), r"`class_labels` must have shape \(2,\), got \(1,\)"),
        (parts(None)[1], torch.tensor([0, 1]), "`class_labels` must be none for a reference set without labels"),
    ):
        with pytest.raises(InputError, match=message):
            OTGuidance(network, own).correct(images, class_labels=labels)
    guidance = OTGuidance(network, bank, history=[])
    guidance.correct(images, 999, torch.tensor([0, 1]))
    field = guidance.recorded_field()
    with pytest.raises(InputError, match="`class_labels` must be classes of the recorded samples, got 2"):
        OTGuidance(network, bank, guidance_field=field).correct(images, 999, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="`guidance_field` must be recorded without classes, got 3"):
        OTGuidance(network, parts(None)[1], guidance_field=field)
    with pytest.raises(InputError, match="`reference_bank` must have the 5 classes of the pipeline, got 3"):
        sampled(pipeline(size=6), 0, 1, 2)
    for labels in (torch.zeros(60), torch.arange(61)):
        with pytest.raises(InputError, match="`labels` must be 60 integers"):
            parts(labels)
    with pytest.raises(InputError, match=r"`labels` must lie in 0 … 1, got \(0, 2\)"):
        parts(num_classes=2)
    # Without labels in either, guidance is as before.
    assert sampled(pipeline(None), [0, 1], 1, 2).isfinite().all()
    assert sampled(pipeline(size=None), None, 1, 2).isfinite().all()
