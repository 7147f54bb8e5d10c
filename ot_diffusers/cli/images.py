"""`sample` and `evaluate`: images of a saved pipeline, and their metrics."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import require
from .process import call_arguments, chosen_device, is_main_process, prepare_libraries


def run_sample(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Images of a pipeline into a folder."""
    require(arguments.num_images >= 1, "num_images", "be at least 1", arguments.num_images)
    output = Path(arguments.output)
    empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    allowed = empty or (arguments.overwrite and output.is_dir())
    require(allowed, "output", "be a new or empty folder without --overwrite", arguments.output)
    prepare_libraries()
    from ..sampling import network_calls, save_images

    started = time.monotonic()
    pipeline, images = _sample(arguments, arguments.pipeline, arguments.num_images)
    seconds = round(time.monotonic() - started, 2)
    if is_main_process():
        grid = save_images(images, output)
        cost = {"num_images": len(images), "nfe": network_calls(pipeline), "seconds": seconds}
        print(json.dumps({"output": str(output), "grid": str(grid), **cost}, indent=2) if arguments.json else grid)
    return 0


def run_evaluate(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Metrics of generated images against the test split, beside those of real images."""
    output = Path(arguments.output) if arguments.output else None
    free = output is None or not output.exists() or (arguments.overwrite and output.is_file())
    require(free, "output", "be a new file without --overwrite", arguments.output)
    requested = arguments.num_samples
    require(requested is None or requested >= 2, "num_samples", "be at least 2", requested)
    prepare_libraries()
    results = _evaluate(arguments)
    if results is None:
        return 0
    text = json.dumps(results, indent=2, ensure_ascii=False)
    if output is not None:
        from ..training.files import write_text

        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, f"{text}\n")
    from ..evaluation.report import text_table

    print(text if arguments.json else text_table(results))
    return 0


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The contents of `results.json` for one arm; None in a process that helped to sample only."""
    from ..evaluation.evaluate import evaluate_images, real_floor, sample_count
    from ..evaluation.extractors import evaluator_facts, load_evaluator, load_real_images
    from ..evaluation.page import provenance

    evaluator = load_evaluator(arguments.evaluator).to(chosen_device(arguments.device))
    train, test = (load_real_images(arguments.dataset, split, evaluator) for split in ("train", "test"))
    count = sample_count(arguments.num_samples, len(train), len(test))
    images, cost = _images_to_evaluate(arguments, count, train.image_shape[0])
    if not is_main_process():
        return None

    reference, training = _describe(test, evaluator), _describe(train, evaluator)
    metrics = evaluate_images(images, reference=reference, extractor=evaluator, train=training)
    floor = real_floor(reference, training, len(images), extractor=evaluator)
    sampling = call_arguments(arguments)
    return {
        "title": f"{arguments.images} against {arguments.dataset}",
        "dataset": arguments.dataset,
        "num_samples": len(images),
        "extractor": evaluator_facts(evaluator, reference.features.shape[1]),
        "arms": {Path(arguments.images).name: {"metrics": metrics, **cost}},
        "floor": {"metrics": floor},
        "provenance": provenance() | {"seed": arguments.seed, "dtype": arguments.dtype, "sampling": sampling},
    }


def _images_to_evaluate(arguments: argparse.Namespace, count: int, channels: int) -> tuple[Any, dict[str, Any]]:
    """uint8 images [N, C, H, W], read or sampled, and what sampling them cost."""
    from ..sampling import network_calls, read_images

    folder = Path(arguments.images).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        images = read_images(folder, channels)
        enough = arguments.num_samples is None or count <= len(images)
        require(enough, "num_samples", f"be at most {len(images)}, the images in the folder", count)
        return images[:count], {}
    started = time.monotonic()
    pipeline, images = _sample(arguments, arguments.images, count)
    return images, {"nfe": network_calls(pipeline), "seconds": round(time.monotonic() - started, 2)}


def _describe(images: Any, evaluator: Any) -> Any:
    """All images of a split and their features."""
    from ..data import pixels_of
    from ..evaluation.evaluate import describe_images

    return describe_images(pixels_of(images), evaluator, cache=True)


def _sample(arguments: argparse.Namespace, pipeline: str, num_images: int) -> tuple[Any, Any]:
    """The loaded pipeline and its images."""
    from ..sampling import accelerate_networks, load_pipeline, sample_images

    device = chosen_device(arguments.device)
    loaded = load_pipeline(pipeline, arguments.features).to(device)
    accelerate_networks(loaded, channels_last=arguments.channels_last, compile=arguments.compile)
    options = {name: getattr(arguments, name) for name in ("batch_size", "seed", "dtype")}
    return loaded, sample_images(loaded, num_images, **options, **call_arguments(arguments))
