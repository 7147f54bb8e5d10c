"""Guide a pipeline towards a data set without training, and compare plain with guided samples.

    ot-diffusers guide google/ddpm-cifar10-32 path/to/images --output runs/guided

Every choice that the user leaves open is stated with its reason, in the output and in the report.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..data import ResidentImages, StreamedImages, evenly_spaced, load_images, pixels_of
from ..errors import require
from ..evaluation.evaluate import FEWEST_REAL, ImageSet, evaluate_images, extract_image_set, real_floor
from ..evaluation.extractors import EfficientNetLiteExtractor, dataset_facts, evaluator_facts, load_evaluator
from ..evaluation.neighbors import nearest_rows
from ..features import weights_fingerprint
from ..files import not_own, replace_own
from ..guidance import check_takes
from ..models.denoiser_extractor import DenoiserFeatureExtractor
from ..models.feature_extractor import FeatureExtractor, ResidualFeatureExtractor
from ..outgoing import public_name, without_local_paths
from ..pipelines.guided import GuidedPipeline
from ..pipelines.pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from ..references import NUM_REFERENCES, centre, class_shares
from ..reporting import report
from ..reporting.page import Picture, Rows, provenance
from ..sampling import MAX_BATCH_SIZE, load_pipeline, network_calls, sample_images
from ..seeds import keyed_generator
from .pictures import draw_samples
from .study import Log

GUIDE = "guide"
"""Under this name the command lists the files that it has written."""
PIPELINE_FOLDER = "pipeline"
PLAIN, GUIDED, FIELD, REAL = "plain", "guided", "guidance field", "real"
FEWEST_IMAGES, MOST_IMAGES = 64, 1000
MOST_EVALUATED = 2000
"""At most so many images of each split are compared, so that a general network needs minutes, not hours."""


@dataclass(frozen=True)
class GuideOptions:
    """What a user may set; the rest is chosen.

    Attributes:
        network, evaluator: folder or Hub id; see `choose_evaluator` for the default evaluator.
        class_shares: name of a class to its share; the others keep their proportions in the rest.
        num_images: number of plain and of guided images.
        num_references: largest number of references.
        batch_size: images that are guided together.
        field_samples: record a guidance field of so many samples.
        call: arguments of the pipeline's call.
        seed: random seed of the starting noise.
        data_options: options of `load_images`.
    """

    network: str | None = None
    evaluator: str | None = None
    class_shares: Mapping[str, float] | None = None
    num_images: int | None = None
    num_references: int = NUM_REFERENCES
    batch_size: int | None = None
    field_samples: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=dict)


def guide(
    pipeline: str,
    dataset: str,
    output: Path,
    options: GuideOptions,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    log: Log = print,
) -> dict[str, Any]:
    """Write the guided pipeline, `results.json`, `report.html` and a picture into `output`; returns the results.

    Raises:
        InputError: parts that do not fit, or an `output` that holds other files.
    """
    check_output(output, overwrite)
    reasons: list[str] = []

    def choose(sentence: str) -> None:
        reasons.append(sentence)
        log(sentence)

    base = prepared(load_pipeline(pipeline).to(device), choose)
    channels, *size = base.image_shape
    stored: dict[str, Any] = {"image_size": max(size), "channels": channels, **options.data_options}
    data = {split: load_images(dataset, split, **stored) for split in ("train", "test")}
    references: dict[str, Any] = {"weights": options.class_shares, "num_references": options.num_references}
    guided = base.with_references(data["train"], network=options.network, **references)
    named = options.network and public_name(options.network)
    choose(f"Feature network: {named or 'the denoiser itself, because none was given (--network)'}.")
    evaluator = choose_evaluator(options.evaluator, guided, choose).to(device).requires_grad_(False).eval()
    real = read_real(data, size, options.class_shares, evaluator, choose)
    call, count = chosen_call(options, guided, choose), chosen_count(options.num_images, len(real.sets["test"]), choose)
    batch = chosen_batch(options.batch_size, count, choose)

    drawn = draw(base, guided, count, batch, call, options, log)
    results: dict[str, Any] = {
        "title": f"{public_name(pipeline)} guided towards {real.data['test'].name}",
        **dataset_facts(real.data["test"]),
        **scores(drawn, real, evaluator, choose),
        "class_shares": measured_shares(drawn, real, evaluator, choose),
        "costs": ["nfe", "seconds_per_1000"],
        "notes": reasons,
        "next": next_commands(options.call),
        "provenance": provenance()
        | {
            "pipeline": public_name(pipeline),
            "network": named,
            "num_references": len(guided.reference_bank.features),
            "sampling": {**call, "seed": options.seed, "batch_size": batch},
            "asked_shares": dict(options.class_shares or {}),
            "field_samples": options.field_samples,
        },
    }
    results = without_local_paths(results)
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), guided, results, real.targets["test"].images, drawn)
        publish(Path(scratch), output)
    log(f"\n{text(results)}\n\nThe report: {output / 'report.html'}\nThe pipeline: {output / PIPELINE_FOLDER}")
    return results


@dataclass(frozen=True)
class Drawn:
    """Samples of one kind, and what they cost.

    Attributes:
        images: uint8 [N, C, H, W].
        nfe: number of function evaluations for each image.
        seconds: of sampling all of them.
    """

    images: Tensor
    nfe: int
    seconds: float


@dataclass(frozen=True)
class Real:
    """Real images by split.

    Attributes:
        data: the data sets.
        sets: evenly spaced images in the size of the samples, with their features.
        targets: those of them that have the asked shares of classes; all without shares.
    """

    data: dict[str, ResidentImages | StreamedImages]
    sets: dict[str, ImageSet]
    targets: dict[str, ImageSet]


def read_real(
    data: dict[str, ResidentImages | StreamedImages],
    size: list[int],
    weights: Mapping[str, float] | None,
    evaluator: Any,
    choose: Log,
) -> Real:
    """The images of both splits, with their features."""
    for split, images in data.items():
        if len(images) > MOST_EVALUATED:
            choose(f"Evaluation: by {MOST_EVALUATED} of {len(images)} {split} images, evenly spaced, to save time.")
    sets = {split: image_set(images, size, evaluator) for split, images in data.items()}
    targets = {split: rebalanced(images, weights, data[split]) for split, images in sets.items()}
    return Real(data, sets, targets)


def draw(
    base: GuidedPipeline,
    guided: GuidedPipeline,
    count: int,
    batch: int,
    call: Mapping[str, Any],
    options: GuideOptions,
    log: Log,
) -> dict[str, Drawn]:
    """Plain and guided samples from the same noise, and those by a guidance field, if one is asked for."""

    def sample(name: str, source: GuidedPipeline, **more: Any) -> Drawn:
        started = time.monotonic()
        images = sample_images(source, count, batch_size=batch, seed=options.seed, **{**call, **more})
        seconds = time.monotonic() - started
        log(f"{name}: {count} images in {seconds:.0f} s")
        return Drawn(images, network_calls(source), seconds)

    drawn = {PLAIN: sample(PLAIN, base, guidance_scale=0), GUIDED: sample(GUIDED, guided)}
    if options.field_samples is not None:
        started = time.monotonic()
        guided.record_guidance_field(options.field_samples, keyed_generator("cpu", options.seed, FIELD), **call)
        log(f"guidance field of {options.field_samples} samples: {time.monotonic() - started:.0f} s")
        drawn[FIELD] = sample(FIELD, guided)
    return drawn


# --- Choices ----------------------------------------------------------------------------------------------------------


def prepared(loaded: Any, choose: Log) -> GuidedPipeline:
    """The loaded pipeline without parts of guidance, as one that can be guided; DDPM becomes DDIM."""
    base = loaded if isinstance(loaded, GuidedPipeline) else OTGuidedDDIMPipeline.from_pipe(loaded)
    parts: dict[str, Any] = dict.fromkeys(base._guidance_components)
    if type(base.scheduler).__name__ == "DDPMScheduler":
        choose("Scheduler: DDIM in place of DDPM, which needs hundreds of steps for the same images.")
        parts["scheduler"] = DDIMScheduler.from_config(base.scheduler.config)
    return type(base).from_pipe(base, **parts)


def choose_evaluator(name: str | None, guided: GuidedPipeline, choose: Log) -> Any:
    """The named evaluation network, or the best one here that is not the network that guides.

    These are EfficientNet-Lite0, if its package is installed; else the features of the denoiser, if another network
    guides; else an untrained network, which sees less, but was made by nobody's data.

    Raises:
        InputError: a network for images of another size.
    """
    shape = guided.image_shape
    if name is not None:
        given = load_evaluator(name)
        if isinstance(given, FeatureExtractor):
            check_takes(given, shape, "evaluator")
        same = weights_fingerprint(given) == weights_fingerprint(guided.feature_extractor)
        require(not same, "evaluator", "be another network than the one that guides", name)
        return given
    if find_spec("efficientnet_lite_pytorch") is not None and shape[0] in (1, 3):
        choose("Evaluator: efficientnet-lite0, trained on ImageNet, because none was given (--evaluator).")
        return load_evaluator(EfficientNetLiteExtractor.name)
    if guided.vae is None and not isinstance(guided.feature_extractor, DenoiserFeatureExtractor):
        choose("Evaluator: the features of the denoiser, because none was given (--evaluator).")
        return DenoiserFeatureExtractor.from_denoiser(guided.unet, guided.scheduler)
    choose("Evaluator: an untrained network, because none was given (--evaluator); it sees coarse differences only.")
    square = shape[1] == shape[2]
    require(square, "evaluator", "be given for images that are not square", name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResidualFeatureExtractor(sample_size=shape[1], in_channels=shape[0], num_classes=1)


def chosen_call(options: GuideOptions, guided: GuidedPipeline, choose: Log) -> dict[str, Any]:
    """The arguments of the pipeline's call, with the strength of the guidance."""
    default = guided.default_guidance_scale
    if "guidance_scale" not in options.call:
        why = "because shares of classes are asked for, and images move further where they change their class"
        usual = "half of the way to the references in each correction, as in all studies"
        choose(f"Guidance scale: {default:g}, {usual if default == 1 else why}.")
    return {"guidance_scale": default, **options.call}


def chosen_count(asked: int | None, num_test: int, choose: Log) -> int:
    """The number of images."""
    if asked is not None:
        return asked
    count = max(FEWEST_IMAGES, min(MOST_IMAGES, num_test))
    choose(f"Images: {count}, as many as test images, but from {FEWEST_IMAGES} to {MOST_IMAGES}.")
    return count


def chosen_batch(asked: int | None, count: int, choose: Log) -> int:
    """The number of images that are guided together."""
    if asked is not None:
        return asked
    batch = min(count, MAX_BATCH_SIZE)
    choose(f"Batch size: {batch}, as many as possible, because guidance compares all images of a batch at once.")
    return batch


# --- Scores -----------------------------------------------------------------------------------------------------------


def image_set(images: ResidentImages | StreamedImages, size: list[int], evaluator: Any) -> ImageSet:
    """Evenly spaced images of a split in the size of the samples, with their features."""
    rows = evenly_spaced(images, MOST_EVALUATED)
    pixels = centre(pixels_of(images, rows), size).contiguous()
    labels = None if images.labels is None or images.label_problem is not None else images.labels[rows]
    return extract_image_set(pixels, evaluator, labels=labels, cache=True)


def rebalanced(
    images: ImageSet, weights: Mapping[str, float] | None, data: ResidentImages | StreamedImages
) -> ImageSet:
    """The largest part of real images whose classes have the shares that are asked for; all of them without shares."""
    if not weights:
        return images
    shares = class_shares(weights, images.labels, data.class_names or ())
    assert images.labels is not None
    counts = images.labels.bincount(minlength=len(shares))
    total = min(float(counts[label] / share) for label, share in enumerate(shares.tolist()) if share > 0)
    kept = [
        (images.labels == label).nonzero()[: round(total * share), 0] for label, share in enumerate(shares.tolist())
    ]
    return images.rows(torch.cat(kept))


def scores(drawn: Mapping[str, Drawn], real: Real, evaluator: Any, choose: Log) -> dict[str, Any]:
    """The rows of `results.json`, and the real-vs-real score, against the held-out images in the asked proportions."""
    reference, count = real.targets["test"], len(drawn[PLAIN].images)
    arms: dict[str, Any] = {}
    for name, samples in drawn.items():
        metrics = evaluate_images(samples.images, reference=reference, extractor=evaluator, train=real.sets["train"])
        per_1000 = round(1000 * samples.seconds / count, 1)
        costs = {"nfe": samples.nfe, "seconds": round(samples.seconds, 2), "seconds_per_1000": per_1000}
        arms[name] = {"metrics": metrics, **costs}
    results = {"num_samples": count, "extractor": evaluator_facts(evaluator, real.sets["test"]), "arms": arms}
    if len(real.targets["train"]) < FEWEST_REAL:
        choose(f"Real vs real: not measured, which takes {FEWEST_REAL} training images in the asked proportions.")
        return results
    measured = list(arms[PLAIN]["metrics"])
    floor = real_floor(reference, real.targets["train"], count, extractor=evaluator, metrics=measured)
    return results | {"floor": {"metrics": floor}}


def measured_shares(drawn: Mapping[str, Drawn], real: Real, evaluator: Any, choose: Log) -> dict[str, dict[str, float]]:
    """Share of each class in the samples and in the real images; empty where these have no classes.

    The evaluator tells the classes if it knows them, else the nearest training image.
    """
    train, test, known = real.sets["train"], real.sets["test"], real.targets["test"].labels
    if train.labels is None or test.labels is None or known is None:
        return {}
    by_evaluator, of_train = "test_accuracy" in test.health, train.labels

    def classify(images: ImageSet) -> Tensor:
        if by_evaluator and images.logits is not None:
            return images.logits.argmax(1)
        return of_train[nearest_rows(images.features, train.features)]

    accuracy = float((classify(test) == test.labels).double().mean())
    by = "by the evaluator" if by_evaluator else "by the nearest training image"
    choose(f"Classes of samples: {by}, which is right for {accuracy:.1%} of the test images.")
    labels = {name: classify(extract_image_set(samples.images, evaluator)) for name, samples in drawn.items()}
    names = real.data["test"].class_names or tuple(map(str, range(int(of_train.max()) + 1)))
    shares = {}
    for name, own in (labels | {REAL: known}).items():
        counts = own.bincount(minlength=len(names))
        shares[name] = dict(zip(names, (counts / len(own)).tolist(), strict=False))
    return shares


def share_rows(results: Mapping[str, Any]) -> Rows:
    """The shares of the classes, and the total variation to those of the real images."""
    shares = results["class_shares"]
    real = shares[REAL]
    rows = [["", *real, "total variation"]]
    for name, own in shares.items():
        distance = sum(abs(own[label] - real[label]) for label in real) / 2
        rows.append([name, *(f"{own[label]:.1%}" for label in real), "–" if own is real else f"{distance:.3f}"])
    return rows


# --- Files ------------------------------------------------------------------------------------------------------------


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse, before the work, a folder whose files would be lost.

    Raises:
        InputError: files there without `overwrite`, or files that this command did not write.
    """
    used = output.is_dir() and any(output.iterdir())
    require(overwrite or not used, "output", "be a new or empty folder, unless --overwrite is given", str(output))
    folders = [output, *(path for path in output.rglob("*") if path.is_dir())] if used else []
    others = [path for folder in folders for path in not_own(folder, GUIDE) if path.is_symlink() or not path.is_dir()]
    requirement = "hold only unchanged files of `guide` with --overwrite"
    require(not others, "output", requirement, ", ".join(map(str, others[:1])))


def write(
    folder: Path, guided: GuidedPipeline, results: Mapping[str, Any], real: Tensor, drawn: Mapping[str, Drawn]
) -> None:
    """The pipeline, the results, the report and its picture."""
    guided.save_pretrained(folder / PIPELINE_FOLDER)
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = {}
    if find_spec("matplotlib") is not None:
        caption = "Plain and guided samples in the same place begin with the same noise."
        images = {name: samples.images for name, samples in drawn.items()}
        pictures["Samples"] = Picture(draw_samples(real, images, folder / "samples.png"), caption)
    tables = {"Shares of classes": share_rows(results)} if results["class_shares"] else {}
    report.write_report(results, pictures, folder / "report.html", tables=tables)


def publish(folder: Path, output: Path) -> None:
    """Copy a folder into the output, in place of what this command wrote there before."""
    for source in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        target = output / source.relative_to(folder)
        target.mkdir(parents=True, exist_ok=True)
        files = [path for path in sorted(source.iterdir()) if path.is_file()]
        replace_own(target, GUIDE, ((path.name, partial(shutil.copyfile, path)) for path in files), names="(?!)")


def next_commands(call: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader may do next, in the folder of the report."""
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in call.items())
    sample = f"ot-diffusers sample {PIPELINE_FOLDER} --num-images 256 {options}"
    push = f"ot-diffusers push {PIPELINE_FOLDER} --repo user/name --dry-run"
    return [
        ("In the folder of this page, sample from the guided pipeline:", sample.rstrip()),
        ("List what would be uploaded:", push),
    ]


def text(results: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    lines = [report.text_table(results)]
    if results["class_shares"]:
        lines += ["", *("  ".join(cell.rjust(7) for cell in row) for row in share_rows(results))]
    return "\n".join(lines)
