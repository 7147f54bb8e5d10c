"""`sample` and `evaluate`: images of a saved pipeline, and their metrics."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import require
from ..files import GRID_NAME, SAMPLE, SAMPLE_NAMES, is_first_process, is_own, not_own, record_of, recorded, write_own
from .process import call_arguments, chosen_device, chosen_dtype, data_options, prepare_libraries

NUM_IMAGES = 64
EVALUATE = "evaluate"
"""Under this name `evaluate` lists what it has written."""


def run_sample(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Sample images of a pipeline into a folder."""
    arguments.dtype = chosen_dtype(arguments.dtype)
    output: Path = arguments.output
    if is_first_process():
        _check_sample_folder(output, arguments.overwrite)
    prepare_libraries()
    from ..sampling import network_calls, save_images

    started = time.monotonic()
    labels = arguments.class_labels or ()
    count = arguments.num_images or (len(labels) if len(labels) > 1 else NUM_IMAGES)
    pipeline, images, classes = _sample(arguments, arguments.pipeline, count)
    seconds = round(time.monotonic() - started, 2)
    if is_first_process():
        grid = save_images(images, output, classes)
        cost = {"num_images": len(images), "nfe": network_calls(pipeline), "seconds": seconds}
        print(json.dumps({"output": str(output), "grid": str(grid), **cost}, indent=2) if arguments.json else grid)
    return 0


def _check_sample_folder(output: Path, overwrite: bool) -> None:
    """Refuse a folder whose files would be lost, or would be taken for samples."""
    listed = record_of(output, SAMPLE)
    used = output.is_dir() and any(path != listed for path in output.iterdir())
    require(overwrite or not used, "output", "be a new or empty folder, unless --overwrite is given", str(output))
    others = not_own(output, SAMPLE, SAMPLE_NAMES)
    requirement = "hold only unchanged files of `sample` with --overwrite"
    require(not others, "output", requirement, ", ".join(map(str, others[:1])))


def run_evaluate(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Metrics of generated images against the test split, beside those of real images."""
    arguments.dtype = chosen_dtype(arguments.dtype)
    output: Path | None = arguments.output
    picture = None if output is None else output.with_name(f"{output.stem}_samples.png")
    for file in filter(None, (output, picture)):
        if os.path.lexists(file) and is_first_process():
            require(arguments.overwrite, "output", "be a new file without --overwrite", str(file))
            own = is_own(file, EVALUATE)
            require(own, "output", "be a file that `evaluate` wrote and nobody has changed since", str(file))
    prepare_libraries()
    results = _evaluate(arguments, picture)
    if results is None:
        return 0
    from ..reporting.report import text_table

    text = json.dumps(results, indent=2, ensure_ascii=False)
    print(text if arguments.json else text_table(results), flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_own(output, f"{text}\n", EVALUATE)
    return 0


def _evaluate(arguments: argparse.Namespace, picture: Path | None) -> dict[str, Any] | None:
    """The contents of `results.json` for one pipeline or folder, and a picture of its images; None in a process that
    only helped to sample."""
    from ..evaluation.evaluate import evaluate_images, real_floor, sample_count
    from ..evaluation.extractors import dataset_facts, evaluator_facts, labels_by_name, load_evaluator, load_real_images
    from ..evaluation.metric_table import HEADLINE, OF_CLASSES
    from ..outgoing import last_name, public_name
    from ..reporting.page import provenance

    evaluator = load_evaluator(arguments.evaluator).to(chosen_device(arguments.device))
    options = data_options(arguments)
    train, test = (load_real_images(arguments.dataset, split, evaluator, **options) for split in ("train", "test"))
    count = sample_count(arguments.num_samples, len(train), len(test))
    images, classes, cost = _images_to_evaluate(arguments, count, train.image_shape[0])
    if not is_first_process():
        return None

    reference, training = _describe(test, evaluator), _describe(train, evaluator)
    labels = labels_by_name(classes, test)
    metrics = evaluate_images(images, reference=reference, extractor=evaluator, train=training, class_labels=labels)
    floor = real_floor(reference, training, len(images), extractor=evaluator, metrics=list(metrics))
    if picture is not None:
        _draw_samples(reference.images, {last_name(arguments.images): images}, picture)
    sampling = call_arguments(arguments) | ({"class_labels": arguments.class_labels} if arguments.class_labels else {})
    return {
        "title": f"{public_name(arguments.images)} against {test.name}",
        **dataset_facts(test),
        "num_samples": len(images),
        "extractor": evaluator_facts(evaluator, reference),
        **({} if labels is None else {"headline": [*HEADLINE, *(name for name in OF_CLASSES if name in metrics)]}),
        "arms": {last_name(arguments.images): {"metrics": metrics, **cost}},
        "floor": {"metrics": floor},
        "provenance": provenance() | {"seed": arguments.seed, "dtype": arguments.dtype, "sampling": sampling},
    }


def _draw_samples(real: Any, images: dict[str, Any], picture: Path) -> None:
    """Real and evaluated images beside each other, for `report`; nothing without the extra `plots`."""
    if find_spec("matplotlib") is None:
        return
    from ..studies.pictures import draw_samples

    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_own(picture, draw_samples(real, images, Path(scratch) / picture.name).read_bytes(), EVALUATE)


def _images_to_evaluate(
    arguments: argparse.Namespace, count: int, channels: int
) -> tuple[Any, list[str] | None, dict[str, Any]]:
    """uint8 images [N, C, H, W], read or sampled, the names of their classes where they are known, and the cost of
    sampling."""
    from ..sampling import network_calls, read_class_names, read_images

    folder = Path(arguments.images)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        _check_complete(folder)
        images = read_images(folder, channels)
        enough = arguments.num_samples is None or count <= len(images)
        require(enough, "num_samples", f"be at most {len(images)}, the images in the folder", count)
        classes = read_class_names(folder)
        return images[:count], None if classes is None else classes[:count], {}
    started = time.monotonic()
    pipeline, images, classes = _sample(arguments, arguments.images, count)
    return images, classes, {"nfe": network_calls(pipeline), "seconds": round(time.monotonic() - started, 2)}


def _check_complete(folder: Path) -> None:
    """Refuse a folder of `sample` that lacks some of its images."""
    missing = [name for name in recorded(folder, SAMPLE) if name != GRID_NAME and not (folder / name).exists()]
    listed = record_of(folder, SAMPLE).name
    requirement = f"be complete, but {''.join(missing[:1])}, which {listed} lists, is missing"
    require(not missing, "images", requirement, str(folder))


def _describe(images: Any, evaluator: Any) -> Any:
    """All images of a split and their features."""
    from ..data import pixels_of
    from ..evaluation.evaluate import extract_image_set

    return extract_image_set(pixels_of(images), evaluator, labels=images.labels, cache=True)


def _sample(arguments: argparse.Namespace, pipeline: str, num_images: int) -> tuple[Any, Any, list[str] | None]:
    """The loaded pipeline, its images, and the names of their classes where it has classes."""
    from ..sampling import accelerate_networks, chosen_labels, load_pipeline, sample_images

    device = chosen_device(arguments.device)
    loaded = load_pipeline(pipeline, arguments.features).to(device)
    accelerate_networks(loaded, channels_last=arguments.channels_last, compile=arguments.compile)
    options = {name: getattr(arguments, name) for name in ("batch_size", "seed", "dtype")}
    asked = named_or_numbered(arguments.class_labels, getattr(loaded, "labels", {}))
    labels = chosen_labels(loaded, num_images, asked, arguments.seed)
    images = sample_images(loaded, num_images, class_labels=labels, **options, **call_arguments(arguments))
    return loaded, images, None if labels is None else [loaded.classes.names[label] for label in labels.tolist()]


def named_or_numbered(words: Sequence[str] | None, labels: Mapping[str, int]) -> list[str | int] | None:
    """Classes as they stand on the command line: the name of a class, or else its number.

    Example:
        >>> named_or_numbered(["10", "1", "cat"], {"10": 0, "cat": 1})
        ['10', 1, 'cat']
    """
    if words is None:
        return None
    return [int(word) if word not in labels and word.isdecimal() else word for word in words]
