"""Class conditions: labels reach the denoiser and the prior, guidance by class is the formula, and bad labels are
named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from makers.draws import seeded
from makers.models import make_features, make_truncated, make_unet
from torch import Tensor

from ot_diffusers import (
    FlowMatchPipeline,
    GaussianPrior,
    OTGuidedDDIMPipeline,
    PriorGenerator,
    TruncatedPriorPipeline,
)
from ot_diffusers.errors import InputError
from ot_diffusers.sampling import load_pipeline
from ot_diffusers.schedules import alpha_sigma, truncated_scheduler

NAMES = {0: "cat", 1: "dog", 2: "cow"}
CLASSES: dict[str, Any] = {"id2label": NAMES, "class_frequencies": {0: 0.75, 1: 0.25, 2: 0.0}}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flow(size: int | None = 4, **options: Any) -> FlowMatchPipeline:
    unet = make_unet(seed=0, num_class_embeds=size)
    options = options or (CLASSES if size == 4 else {})
    return quiet(FlowMatchPipeline(unet, FlowMatchEulerDiscreteScheduler(), **options))


def short(num_classes: int = 3, *, size: int | None = None, learned: bool = False) -> TruncatedPriorPipeline:
    """A truncated chain from a Gaussian for each class, which are nearly constant: dark, grey, bright."""
    labels = torch.arange(30) % num_classes
    levels = torch.tensor([-0.9, 0.0, 0.9])[labels].view(-1, 1, 1, 1)
    images = levels + 0.02 * torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    prior: Any = GaussianPrior.from_images(images, 10, labels=labels if num_classes > 1 else None)
    prior = make_truncated().prior if learned else prior
    unet = make_unet(seed=0, num_class_embeds=size)
    options = {"id2label": NAMES} if size or (num_classes == 3 and not learned) else {}
    return quiet(TruncatedPriorPipeline(prior, unet, truncated_scheduler(DDIMScheduler(), 10), **options))


def latents(pipeline: Any, *seeds: int, **call: Any) -> Tensor:
    call = {"num_inference_steps": 1, "output_type": "latent", "generator": seeded(*seeds)} | call
    return pipeline(batch_size=len(seeds), **call).images


def test_labels_may_be_numbers_names_or_a_tensor() -> None:
    pipe = flow()
    expected = latents(pipe, 1, 2, class_labels=[1, 2])
    for labels in (["dog", "cow"], (1, "cow"), torch.tensor([1, 2])):
        assert torch.equal(latents(pipe, 1, 2, class_labels=labels), expected)
    single = latents(pipe, 1, 2, class_labels=1)
    for label in ("dog", torch.tensor(1), [1, 1]):
        assert torch.equal(latents(pipe, 1, 2, class_labels=label), single)
    assert torch.equal(single[0], expected[0]) and not torch.allclose(single[1], expected[1], atol=1e-3)
    assert pipe.class_labels.tolist() == [1, 1] and pipe.labels == {"cat": 0, "dog": 1, "cow": 2}
    assert len(pipe(class_labels=[0, 0, 2], num_inference_steps=1).images) == 3  # as many as there are labels


def test_guidance_by_class_is_linear_in_its_scale_and_off_at_1() -> None:
    """One Euler step is x = ε − v, so that images are linear in v; the null label, C, gives v_∅."""
    pipe, sizes = flow(), []
    pipe.unet.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    plain = latents(pipe, 1, 2, class_labels=[0, 2])
    assert pipe.nfe == 1 and sizes == [2]
    guided = latents(pipe, 1, 2, class_labels=[0, 2], class_guidance_scale=3)
    assert pipe.nfe == 2 and sizes == [2, 4]
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in seeded(1, 2)])
    with torch.no_grad():
        untold = noise - pipe.unet(noise, torch.tensor(1000.0), class_labels=torch.tensor([3, 3])).sample
    # Rounding of float32 at another batch size.
    torch.testing.assert_close(guided, untold + 3 * (plain - untold), atol=1e-5, rtol=0)


def test_labels_are_drawn_by_the_frequencies_of_the_classes() -> None:
    pipe = flow()
    latents(pipe, *range(400))
    drawn = pipe.class_labels
    counts = drawn.bincount(minlength=3)
    # Four standard deviations of a binomial count are 35.
    assert counts[2] == 0 and abs(int(counts[0]) - 300) <= 35
    latents(pipe, 7, 3)
    assert torch.equal(pipe.class_labels, drawn[[7, 3]])


@pytest.mark.parametrize(
    ("size", "call", "message"),
    [
        (4, {"class_labels": "pig"}, "`class_labels` must be among cat, dog, cow, got 'pig'"),
        (4, {"class_labels": 3}, "`class_labels` must lie in 0 … 2, got 3"),
        (4, {"class_labels": torch.tensor([0, -1])}, "`class_labels` must lie in 0 … 2, got -1"),
        (4, {"class_labels": [0, 1, 2]}, "`class_labels` must be one, or one for each of 2 images, got 3"),
        (4, {"class_labels": 1.0}, "`class_labels` must be integers or names of classes, got 1.0"),
        (4, {"class_labels": [True, False]}, "`class_labels` must be integers or names of classes, got True"),
        (4, {"class_guidance_scale": -1}, "`class_guidance_scale` must be at least 0, got -1"),
        (3, {"class_guidance_scale": 2}, "`class_guidance_scale` must be 1 for a denoiser that was not trained with"),
        (None, {"class_labels": 3}, "`class_labels` must be none for an unconditional model, got 3"),
        (None, {"class_guidance_scale": 2}, "`class_guidance_scale` must be 1 for an unconditional model, got 2"),
    ],
)
def test_calls_that_do_not_fit_are_named(size: int | None, call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        latents(flow(size), 1, 2, **call)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (6, {"id2label": NAMES}, "`id2label` must number classes from 0, for a denoiser of 6 labels, got 3"),
        (4, {"id2label": {1: "a", 2: "b", 3: "c"}}, "`id2label` must number classes from 0"),
        (4, {"id2label": {"x": "a"}}, "`id2label` must have labels as keys and names as values"),
        (None, {"id2label": NAMES}, "`id2label` must be none for a model without classes"),
        (4, CLASSES | {"class_frequencies": {0: 1}}, "`class_frequencies` must hold a number for each of 3 classes"),
        (4, CLASSES | {"class_frequencies": {0: "?"}}, "`class_frequencies` must have labels as keys and numbers"),
    ],
)
def test_classes_that_do_not_fit_the_denoiser_are_named(
    size: int | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        flow(size, **options)


def test_classes_are_saved_and_kept_by_other_pipelines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    pipe = quiet(OTGuidedDDIMPipeline(make_unet(seed=0, num_class_embeds=4), DDIMScheduler(), **CLASSES))
    pipe.save_pretrained(tmp_path)
    loaded = quiet(load_pipeline(tmp_path))
    assert not caplog.records
    assert loaded.classes == pipe.classes
    # Loaded weights lie at other addresses, for which some kernels sum in another order.
    assert torch.allclose(latents(loaded, 1, class_labels="cow"), latents(pipe, 1, class_labels=2), atol=1e-5)
    network, bank = make_features()
    guided = OTGuidedDDIMPipeline.from_pipe(loaded, feature_extractor=network, reference_bank=bank)
    assert guided.classes == pipe.classes
    assert type(DDIMPipeline.from_pretrained(tmp_path)) is DDIMPipeline  # without this package


def test_a_prior_of_classes_makes_the_class() -> None:
    for pipe in (short(), short(size=4)):
        images = latents(pipe, *range(6), class_labels=["cow", "dog", "cat", 0, 1, 2], num_inference_steps=2)
        levels = images.mean(dim=(1, 2, 3))
        # x_T' is the image scaled by .99 with noise of .04; the untrained denoiser takes two steps.
        torch.testing.assert_close(levels, torch.tensor([0.9, 0, -0.9, -0.9, 0, 0.9]), atol=0.15, rtol=0)
    free = short()
    assert torch.equal(latents(free, 1, 2), latents(short(), 1, 2))
    assert free.class_labels is None  # the prior alone knows them
    drawn = short(size=4)
    levels = latents(drawn, *range(6), num_inference_steps=2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(levels, 0.9 * (drawn.class_labels.float() - 1), atol=0.15, rtol=0)
    again = drawn.at_truncation_timestep(5)
    assert again.classes == drawn.classes


@pytest.mark.parametrize("size", [None, 4])
def test_a_learned_prior_of_classes_leads(size: int | None, tmp_path: Path) -> None:
    """With a denoiser of the same classes and one without; labels are drawn where a call has none."""
    torch.manual_seed(1)
    prior = PriorGenerator(
        truncation_timestep=10, sample_size=8, out_channels=1, latent_dim=4, block_out_channels=(8, 4), num_classes=3
    )
    unet, scheduler = make_unet(seed=0, num_class_embeds=size), truncated_scheduler(DDIMScheduler(), 10)
    pipe = quiet(TruncatedPriorPipeline(prior, unet, scheduler, **CLASSES))
    images = latents(pipe, 1, 2, class_labels=["cow", 0])
    with torch.no_grad():
        level = alpha_sigma(scheduler, 9)
        noisy = prior.eval().sample(2, *level, generator=seeded(1, 2), class_labels=torch.tensor([2, 0]))
    told = latents(pipe, 1, 2, latents=noisy, class_labels=[2, 0])
    assert torch.equal(images, told) and pipe.class_labels.tolist() == [2, 0]
    assert not torch.allclose(latents(pipe, 1, 2, class_labels=[1, 0])[0], images[0], atol=1e-3)

    latents(pipe, *range(60))
    counts = pipe.class_labels.bincount(minlength=3)
    assert counts[2] == 0 and abs(int(counts[0]) - 45) <= 14  # four standard deviations of a binomial count
    pipe.save_pretrained(tmp_path)
    loaded = quiet(load_pipeline(tmp_path))
    assert loaded.classes == pipe.classes and loaded.at_truncation_timestep(5).classes == pipe.classes
    # Memory-mapped weights may be aligned differently, which changes the last bit of sums.
    torch.testing.assert_close(latents(loaded, 1, 2, class_labels=["cow", 0]), images, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="`class_labels` must be among cat, dog, cow, got 'pig'"):
        latents(pipe, 1, class_labels="pig")
    if size is not None:
        with pytest.raises(InputError, match="`prior` must have the 4 classes of the unet, got 3"):
            TruncatedPriorPipeline(prior, make_unet(num_class_embeds=4), scheduler)


def test_priors_without_classes_leave_the_class_open() -> None:
    pipe = short(size=4, learned=True)
    with pytest.raises(InputError, match="`class_labels` must be none for a PriorGenerator that makes images of any"):
        latents(pipe, 1, class_labels=0)
    untold = latents(pipe, 1, 2, num_inference_steps=10)
    assert pipe.class_labels is None
    pipe.unet.class_embedding.weight.data[:3] += 1  # those of the classes, not of the null label
    assert torch.equal(latents(pipe, 1, 2, num_inference_steps=10), untold)
    noisy = torch.zeros(1, 1, 8, 8)
    told, other = (latents(pipe, 1, latents=noisy, class_labels=label, num_inference_steps=10) for label in (0, 1))
    assert not torch.equal(told, other)
    with pytest.raises(InputError, match="`class_labels` must be none for an unconditional model"):
        latents(short(1), 1, class_labels=0)
    with pytest.raises(InputError, match="`prior` must have the 3 classes of the unet, got 2"):
        short(2, size=4)
    with pytest.raises(InputError, match="`class_labels` must be none for a PriorGenerator that makes images of any"):
        make_truncated().prior.draw(2, class_labels=torch.tensor([0, 1]))
