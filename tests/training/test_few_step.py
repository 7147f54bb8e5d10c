"""Few-step tuning: the chain, the gradients of any number of images, the checks, and what the script leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from makers.models import make_unet
from makers.runs import assert_same_end, metrics, reset_accelerate, train, train_forked
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ot_diffusers import FlowMatchPipeline
from ot_diffusers.config import FewStepConfig
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.schedules import Chain, record_coupling
from ot_diffusers.training import make_accelerator
from ot_diffusers.training.few_step import (
    PEERS,
    ComparedLevels,
    compared_levels,
    few_step_batches,
    few_step_schedule,
    finished_loss,
    reference_levels,
    surrogate,
    with_labels,
)
from ot_diffusers.training.pretrained import deterministic_scheduler
from ot_diffusers.training.sample_checks import SampleChecks
from ot_diffusers.transport.kernel import squared_mmd

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coupled flow pipeline whose network is new."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    record_coupling(scheduler, "semidiscrete")
    folder = tmp_path_factory.mktemp("source") / "flow"
    FlowMatchPipeline(make_unet(seed=0, block_out_channels=(8, 16)), scheduler).save_pretrained(folder)
    return folder


# --- The chain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon", "flow_prediction"])
def test_the_chain_is_that_of_the_pipeline(prediction_type: str, steps: int) -> None:
    unet = make_unet(seed=0, block_out_channels=(8, 16))
    if prediction_type == "flow_prediction":
        pipe: Any = FlowMatchPipeline(unet, deterministic_scheduler(FlowMatchEulerDiscreteScheduler(), "trailing"))
    else:
        pipe = DDIMPipeline(unet, deterministic_scheduler(DDPMScheduler(prediction_type=prediction_type), "trailing"))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe(3, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images
    found = Chain.of(pipe.scheduler, steps)(unet, noise)
    # ε is divided by α_T = .006, which amplifies rounding.
    torch.testing.assert_close(found[:, 0] / 2 + 0.5, torch.from_numpy(expected[..., 0]), rtol=0, atol=1e-3)
    assert found.requires_grad


# --- Gradients --------------------------------------------------------------------------------------------------------


def tuning(folder: Path, **options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network, and what follows it in the arguments of `few_step_batches`: 64 images through two of its calls."""
    reset_accelerate()
    images = load_images("digits", "train")
    options = {"num_reference_samples": 50} | options
    config = FewStepConfig(output_dir=str(folder), max_train_steps=1, **options)
    accelerator = make_accelerator(config)
    levels = compared_levels(config, images, make_unet(seed=1, block_out_channels=(8, 16)), accelerator.device)
    schedule, chain = few_step_schedule(config, accelerator, images), Chain.of(FlowMatchEulerDiscreteScheduler(), 2)
    unet = make_unet(seed=0, block_out_channels=(8, 16))
    return unet, (chain, levels, config, schedule, accelerator, 0)


def gradient_of(loss: Tensor, unet: nn.Module) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(unet.parameters()))])


@pytest.mark.parametrize(
    ("objective", "feature_extractor"),
    [("sinkhorn", "features"), *((objective, None) for objective in ("sinkhorn", *PEERS))],
)
def test_parts_give_the_gradient_of_the_whole(
    objective: str, feature_extractor: str | None, trained_features: Path, tmp_path: Path
) -> None:
    """Four passes of 16 images against one graph of 64."""
    options: dict[str, Any] = {"train_batch_size": 16, "gradient_accumulation_steps": 4, "objective": objective}
    if feature_extractor is not None:
        options["feature_extractor"] = str(trained_features)
    unet, arguments = tuning(tmp_path, **options)
    chain, levels, config, schedule, *_ = arguments

    seen, original = [], finished_loss

    def kept(level: Any, reference: Any, pair: Any, *weights: Any, **options: Any) -> Tensor:
        seen.append((reference, pair))
        return original(level, reference, pair, *weights, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ot_diffusers.training.few_step.finished_loss", kept)
        batches = list(few_step_batches(load_images("digits", "train"), unet, *arguments))
    assert len(batches) == 4
    losses = [surrogate(levels(chain(unet, batch.noise)), batch, schedule) for batch in batches]
    in_parts = sum(gradient_of(loss, unet) for loss in losses) / 4  # as accumulation divides

    ((reference, pair),) = seen
    solver: dict[str, Any] = {"objective": objective, "blur": config.blur, "scaling": config.scaling}
    whole = levels(chain(unet, torch.cat([batch.noise for batch in batches])))
    direct = original(whole, reference, pair, levels.weights, **solver)
    expected = gradient_of(direct, unet)
    assert (in_parts - expected).norm() < 2e-6 * expected.norm()  # float32 sums in another order: 6e-7
    assert batches[0].loss.item() == pytest.approx(direct.item(), rel=1e-5)


def test_parts_of_classes_give_the_gradient_of_the_joint_law(tmp_path: Path) -> None:
    """Four passes of 16 images against one graph of 64 pairs of image and label. Noise and real images are those of a
    run without labels; 32 references give each class the same share of both sides."""
    images, seen, original = load_images("digits", "train"), [], finished_loss

    def kept(*arguments: Any, **options: Any) -> Tensor:
        seen.append(arguments)
        return original(*arguments, **options)

    unet, arguments = tuning(tmp_path, train_batch_size=16, gradient_accumulation_steps=4, num_reference_samples=32)
    chain, levels, config, schedule, *_ = arguments
    of_classes = make_unet(seed=0, block_out_channels=(8, 16), num_class_embeds=11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ot_diffusers.training.few_step.finished_loss", kept)
        plain = list(few_step_batches(images, unet, *arguments))
        batches = list(few_step_batches(images, of_classes, *arguments, images.labels))
    noise = torch.cat([batch.noise for batch in batches])
    labels = torch.cat([batch.class_labels for batch in batches])
    assert torch.equal(noise, torch.cat([batch.noise for batch in plain]))

    (_, real, *_), (leaves, reference, pair, *_) = seen
    for level, joint in zip(real, reference, strict=True):
        assert torch.equal(level, joint[:, : level.shape[1]]) and joint.shape[1] > level.shape[1]
    of_made, of_pair, of_real = (level[0][:, real[0].shape[1] :].argmax(1) for level in (leaves, pair, reference))
    assert torch.equal(of_made, labels) and torch.equal(of_pair, labels) and torch.equal(of_real.repeat(2), labels)

    losses = [surrogate(levels(chain(of_classes, b.noise, b.class_labels)), b, schedule) for b in batches]
    in_parts = sum(gradient_of(loss, of_classes) for loss in losses) / 4
    solver: dict[str, Any] = {"objective": config.objective, "blur": config.blur, "scaling": config.scaling}
    whole = with_labels(levels(chain(of_classes, noise, labels)), labels)
    expected = gradient_of(original(whole, reference, pair, levels.weights, **solver), of_classes)
    assert (in_parts - expected).norm() < 2e-6 * expected.norm()  # float32 sums in another order: 6e-7


def test_references_are_flipped_and_shifted_as_training_images_are() -> None:
    reset_accelerate()
    accelerator = make_accelerator(FewStepConfig(report_to="none"))
    images, order = load_images("digits", "train"), torch.arange(64)
    plain = images.fetch(order)
    as_they_are = ComparedLevels(lambda batch: (batch.flatten(1),), (1.0,), 0.0, 0.0, torch.device("cpu"))

    def references(**options: Any) -> Tensor:
        config = FewStepConfig(train_batch_size=24, **options)
        return reference_levels(images, as_they_are, config, accelerator, 3, order)[0].view_as(plain)

    assert torch.equal(references(), plain)
    batch = references(random_flip=True)
    same, mirrored = ((batch == other).flatten(1).all(1) for other in (plain, plain.flip(3)))
    assert bool((same | mirrored).all()) and 16 < int(mirrored.sum()) < 48  # four standard errors of a fair coin
    shifted = references(crop_padding=2)
    around = torch.nn.functional.pad(plain, (2, 2, 2, 2), mode="reflect").unfold(2, 8, 1).unfold(3, 8, 1)
    moves = (around == shifted[:, :, None, None]).flatten(4).all(4)
    assert bool(moves.flatten(1).any(1).all()) and int(moves[:, :, 2, 2].sum()) < 16  # 1 in 25 stays in its place


def test_one_pass_makes_its_images_once(tmp_path: Path) -> None:
    unet, arguments = tuning(tmp_path, train_batch_size=64)
    chain, levels, _, schedule, *_ = arguments
    calls: list[int] = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    (batch,) = few_step_batches(load_images("digits", "train"), unet, *arguments)
    assert len(calls) == 4 and batch.finished is not None  # two calls for the images, and two for the pair
    again = gradient_of(surrogate(levels(chain(unet, batch.noise)), batch, schedule), unet)
    once = gradient_of(surrogate(levels(batch.finished), batch, schedule), unet)
    assert (once - again).norm() < 1e-6 * again.norm()  # the same float32 operations


@pytest.mark.parametrize("objective", ["sinkhorn", "frechet", "drifting"])
def test_a_linear_generator_learns_a_gaussian(objective: str) -> None:
    """G(z) = a z + b against N(.5, .3²): |a| and b within 2%. Quantiles stand for random numbers and have no noise."""
    options: dict[str, Any] = {"objective": objective, "blur": 0.1, "scaling": 0.5}
    z = torch.special.ndtri((torch.arange(64) + 0.5) / 64)[:, None]
    a, b = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.1, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for _ in range(60):
        made = a * z + b
        loss = finished_loss([made], [0.3 * z + 0.5], [made.detach()], [1.0], **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert abs(a.item()) == pytest.approx(0.3, rel=0.02) and b.item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("objective", ["sinkhorn", *PEERS])
def test_a_linear_generator_of_classes_learns_their_means(objective: str) -> None:
    """G(z, y) = a_y z + b_y whose two classes are exchanged: the images are right and the labels wrong, which only the
    joint law shows. The means within 2% of the distance between the classes."""
    options: dict[str, Any] = {"objective": objective, "blur": 0.1, "scaling": 0.5}
    z = torch.special.ndtri((torch.arange(32) + 0.5) / 32).repeat(2)
    labels = torch.arange(2).repeat_interleave(32)
    real = (0.2 * z + torch.tensor([-0.5, 0.5])[labels])[:, None]
    a, b = torch.tensor([0.2, 0.2], requires_grad=True), torch.tensor([0.5, -0.5], requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.1, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for update in range(60):
        made = (a[labels] * z + b[labels])[:, None]
        both, reference = (with_labels((points,), labels) for points in (made, real))
        loss = finished_loss(both, reference, [both[0].detach()], [1.0], **options)
        (slope,) = torch.autograd.grad(loss, b, retain_graph=True)
        if update == 0 and objective != "drifting":  # which normalises its field, here rounding errors
            marginal = finished_loss([made], [real], [made.detach()], [1.0], **options)
            (blind,) = torch.autograd.grad(marginal, b, retain_graph=True)
            assert blind.abs().max() < 0.01 * slope.abs().min()  # N − 1 and 2N − 1 degrees of freedom of `frechet`
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(b.detach(), torch.tensor([-0.5, 0.5]), rtol=0, atol=0.02)


@pytest.mark.parametrize("objective", ["sinkhorn", "mmd", "drifting"])
def test_equal_distributions_have_no_gradient_with_an_independent_pair(objective: str) -> None:
    """The mean of the gradient for the spread of a generator that is right already: within three standard errors of 0
    with two batches. The divergence of one batch in both places of the self-term is biased."""
    torch.manual_seed(0)

    def slopes(paired: bool) -> Tensor:
        found = []
        for _ in range(60):
            spread = torch.ones((), requires_grad=True)
            z, other, real = torch.randn(3, 64, 2).unbind()
            pair = other if paired else z
            options: dict[str, Any] = {"objective": objective, "blur": 0.1, "scaling": 0.5}
            loss = finished_loss([spread * z], [real], [pair], [1.0], **options)
            found.append(torch.autograd.grad(loss, spread)[0])
        return torch.stack(found)

    for paired in (True, False) if objective == "sinkhorn" else (True,):
        values = slopes(paired)
        within = abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
        assert bool(within) is paired


def test_the_kernel_discrepancy_has_the_gradient_of_a_free_pair() -> None:
    """With x itself as the held pair, the gradient is that of x in both places."""
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    both, held = x.clone().requires_grad_(), x.clone().requires_grad_()
    squared_mmd(both, y).backward()
    squared_mmd(held, y, x_pair=x).backward()
    torch.testing.assert_close(both.grad, held.grad)


# --- The script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("features", tmp_path_factory.mktemp("features") / "run", max_train_steps=5)


def test_a_run_leaves_a_pipeline_that_knows_its_calls(
    source: Path, trained_features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"pretrained": str(source), "feature_extractor": str(trained_features), "anchor_weight": 0.1}
    run = train("few_step", tmp_path / "run", **options)
    (line,) = metrics(run)
    assert line["loss"] == pytest.approx(line["sinkhorn"] + line["anchor"], rel=1e-5)
    assert {"validation_recall", "validation_nearest_distance_ratio", "validation_divergence"} <= line.keys()
    pipe = FlowMatchPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config["_num_inference_steps"] == 1
    assert pipe.scheduler.config["_noise_coupling"] == "semidiscrete"
    images = pipe(2, torch.Generator().manual_seed(0), output_type="np").images
    assert pipe.nfe == 1
    again = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=1, output_type="np").images
    assert (images == again).all()
    record = []
    pipe_logger = "ot_diffusers.pipelines.pipeline_ot_guided_ddim"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{pipe_logger}.logger.warning", record.append)
        pipe(2, num_inference_steps=3)
    assert "tuned for `num_inference_steps=1`; with 3" in record[0]
    pipe.scheduler.register_to_config(stochastic_sampling=True)
    with pytest.raises(InputError, match=r"`scheduler` must be deterministic.*: this denoiser was tuned for 1 calls"):
        pipe(2)
    before, after = (load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (source, run))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((run / "results.json").read_text())["num_inference_steps"] == 1
    assert (run / "samples" / "update-00000002.png").is_file()


def test_an_interrupted_run_and_other_splits_end_alike(source: Path, tmp_path: Path) -> None:
    options = {"pretrained": str(source), "max_train_steps": 4, "lr_scheduler": "constant"}
    whole = train("few_step", tmp_path / "whole", **options, checkpointing_steps=1)
    stopped = train("few_step", tmp_path / "stopped", **options | {"max_train_steps": 3})
    train("few_step", stopped, **options)
    assert_same_end(whole, stopped)

    def first_moments(run: Path) -> Tensor:
        moments = load_file(run / "checkpoints" / "update-00000001" / "optimizer.safetensors")
        return torch.cat([moments[name].flatten() for name in sorted(moments) if name.endswith("exp_avg")])

    parts = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    two = train_forked("few_step", tmp_path / "two", 2, **options | parts | {"max_train_steps": 1})
    one = train("few_step", tmp_path / "one", **options | {"max_train_steps": 1, "checkpointing_steps": 1})
    assert (first_moments(two) - first_moments(one)).norm() < 1e-4 * first_moments(one).norm()


def save_classes(folder: Path, size: int = 11, prefix: str = "") -> str:
    """A new flow pipeline of the ten digits that takes `size` labels, and for which a 3 is the most frequent digit."""
    unet = make_unet(seed=0, block_out_channels=(8, 16), num_class_embeds=size)
    names = {label: f"{prefix}{label}" for label in range(10)}
    frequencies = {label: 0.7 if label == 3 else 0.1 for label in range(10)}
    pipe = FlowMatchPipeline(unet, FlowMatchEulerDiscreteScheduler(), id2label=names, class_frequencies=frequencies)
    pipe.save_pretrained(folder)
    return str(folder)


def test_a_run_of_classes_samples_by_class(tmp_path: Path) -> None:
    options = {"pretrained": save_classes(tmp_path / "source"), "anchor_weight": 0.1}
    run = train("few_step", tmp_path / "run", **options, train_batch_size=4, gradient_accumulation_steps=2)
    pipe = FlowMatchPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {str(digit): digit for digit in range(10)}
    assert pipe.classes is not None and pipe.classes.frequencies[3] == 0.7
    pipe(3, class_labels=["7", "0", "7"], num_inference_steps=1)
    assert pipe.class_labels is not None and pipe.class_labels.tolist() == [7, 0, 7] and pipe.nfe == 1
    with Image.open(run / "samples" / "update-00000002.png") as grid:
        assert grid.size == (6 * 8, 10 * 8)  # a row for each class


def test_the_kept_state_is_chosen_by_the_joint_law(tmp_path: Path) -> None:
    """Real images of the asked classes, and the same images for other classes: the divergence sees the difference,
    which recall and the rest do not."""
    images, validation = load_images("digits", "train"), load_images("digits", "validation")
    levels = ComparedLevels(lambda batch: (batch.flatten(1),), (5.0,), 0.2, 0.0, torch.device("cpu"))
    config = FewStepConfig(output_dir=str(tmp_path), num_validation_samples=60)
    checks = {
        has_classes: SampleChecks.of(config, Chain(()), levels, images, validation, has_classes=has_classes)
        for has_classes in (True, False)
    }
    labels = checks[True].labels
    assert labels is not None and images.labels is not None and 50 <= len(labels) <= 60
    first, second = labels.chunk(2)
    assert torch.equal(first.bincount(), second.bincount())
    order = torch.stack([(images.labels == label).nonzero()[index, 0] for index, label in enumerate(labels)])
    right = images.fetch(order)
    wrong = torch.cat([half.roll(len(first) // 2, 0) for half in right.chunk(2)])  # each half has the same images
    found = {has_classes: [one.divergence(made) for made in (right, wrong)] for has_classes, one in checks.items()}
    assert found[True][1] > 2 * found[True][0]
    assert found[False][1] == pytest.approx(found[False][0], rel=1e-3)  # the order of float32 sums
    assert checks[True].measured(right) == pytest.approx(checks[True].measured(wrong), rel=1e-3)


def test_classes_that_cannot_be_tuned_are_refused(tmp_path: Path) -> None:
    source = save_classes(tmp_path / "source")
    stock = tmp_path / "stock"
    DDIMPipeline(FlowMatchPipeline.from_pretrained(source).unet, DDIMScheduler()).save_pretrained(stock)
    for pretrained, count, message in (
        (source, 5, "`num_reference_samples` must divide the 8 images of a training step"),
        (save_classes(tmp_path / "names", prefix="no. "), None, r"`pretrained` must know the classes \('0', '1'"),
        (save_classes(tmp_path / "told", size=10), None, "`feature_extractor` must be given for a denoiser without"),
        (str(stock), None, "`pretrained` must be an OTGuidedDDIMPipeline, whose call takes labels"),
    ):
        with pytest.raises(InputError, match=message):
            train("few_step", tmp_path / "run", pretrained=pretrained, num_reference_samples=count)


def test_the_kept_state_is_the_best_within_the_bounds(source: Path, tmp_path: Path) -> None:
    """A learning rate that destroys the network: what is saved is the state of an earlier check."""
    options = {"pretrained": str(source), "max_train_steps": 6, "validation_steps": 1, "learning_rate": 0.3}
    run = train("few_step", tmp_path / "run", **options, lr_scheduler="constant")
    lines = metrics(run)
    lowest = min(line["validation_divergence"] for line in lines)
    kept = load_file(run / "best.safetensors")
    record = json.loads(bytes(kept.pop("record").tolist()))
    inside = [line for line in lines if line["step"] == record["update"]]
    assert inside and (record["within_bounds"] or record["divergence"] <= 1.05 * lowest)
    saved = load_file(next((run / "unet").glob("*.safetensors")))
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (DDIMScheduler(), 1, "`num_inference_steps` must be at least 4 for noise prediction"),
        (EulerDiscreteScheduler(), 4, "`pretrained` must have a variance-preserving or flow-matching scheduler"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_tuned_is_refused(scheduler: Any, steps: int, message: str, tmp_path: Path) -> None:
    DDIMPipeline(make_unet(seed=0), DDIMScheduler()).save_pretrained(tmp_path / "source")
    scheduler.save_pretrained(tmp_path / "source" / "scheduler")
    index = tmp_path / "source" / "model_index.json"
    record = json.loads(index.read_text())
    index.write_text(json.dumps(record | {"scheduler": ["diffusers", type(scheduler).__name__]}))
    if isinstance(scheduler, EulerDiscreteScheduler):
        with pytest.raises(InputError, match=message):
            deterministic_scheduler(scheduler, "trailing")
        return
    with pytest.raises(InputError, match=message):
        train("few_step", tmp_path / "run", pretrained=str(tmp_path / "source"), num_inference_steps=steps)


def test_a_pipeline_of_other_images_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="`image_size` must be left out or 8, as in the pipeline of pretrained, got 16"
    ):
        train("few_step", tmp_path / "run", pretrained=str(source), image_size=16)
    with pytest.raises(InputError, match="`pretrained` must be a folder"):
        train("few_step", tmp_path / "run", pretrained=str(tmp_path / "nothing"))


def test_levels_weigh_the_deepest_most() -> None:
    levels = ComparedLevels(lambda images: (), (1.0, 1.0, 1.0), 0.2, 0.3, torch.device("cpu"))
    assert levels.weights == (0.2, 1.0, 0.3) and levels.deepest == 1
    assert dataclasses.replace(levels, pixel_weight=0).weights == (0.2, 0.2, 1.0)
