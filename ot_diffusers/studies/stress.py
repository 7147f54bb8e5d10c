"""Check how metrics respond to known damage: noise, missing classes, repeated images, copied training images.

    ot-diffusers stress --dataset digits --evaluator runs/digits/evaluator

One half of the test split is damaged, the other half is the reference, so undamaged images have the real-vs-real score.
Two further figures repeat those of the original study: its transport distance and its Fréchet distance, both of
L2-normalised features, once between test images with noisy features and training images, and once between test images
and a training pool with missing classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data import pixels_of
from ..errors import require, require_same
from ..evaluation.evaluate import ImageSet, evaluate_images, extract_image_set
from ..evaluation.extractors import evaluator_facts, load_evaluator, load_real_images
from ..evaluation.health import evaluator_line, evaluator_properties
from ..evaluation.metric_table import METRICS
from ..evaluation.metrics import frechet_distance, sinkhorn_distance
from ..evaluation.stress import Damage, StressCurve, add_noise, collapse_modes, drop_classes, memorise, stress_test
from ..features import labels_of, weights_fingerprint
from ..files import user_path, write_json
from ..reporting import plots, report
from ..reporting.page import (
    Picture,
    Rows,
    figure,
    next_steps,
    paragraphs,
    provenance,
    provenance_list,
    rows_table,
    write_page,
)
from ..seeds import seeded_generator
from .study import Log, check_study_folder

AMOUNTS: dict[str, tuple[float, ...]] = {
    "noise": (0, 0.05, 0.1, 0.2, 0.3, 0.5),
    "missing classes": (0, 1, 3, 5, 7, 9),
    "mode collapse": (0, 0.3, 0.6, 0.8, 0.9, 0.97),
    "memorisation": (0, 0.25, 0.5, 0.75, 1),
}
AXES = {
    "noise": "σ, share of the grey range",
    "missing classes": "classes removed",
    "mode collapse": "share of repeated images",
    "memorisation": "share of training images",
}
ORIGINAL_AMOUNTS: dict[str, tuple[float, ...]] = {
    "noise": (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1),
    "missing classes": tuple(range(10)),
}
ORIGINAL_AXES = {"noise": "σ, in standard deviations of the features", "missing classes": "classes removed"}
ORIGINAL_TITLES = {"sinkhorn_distance": "Sinkhorn OT distance", "frechet_distance": "Fréchet distance"}
ORIGINAL_HEADING = "The original study's figures: L2-normalised features, test against training images"
READING = (
    'A metric "rises" or "falls" if its mean never turns back, and is "flat" if it does not differ from undamaged '
    "images at any amount of damage. The two numbers are its means for undamaged images and for the largest damage."
)
KINDS = {"source figures": "original study's figures", "curves": "every metric"}
"""The two parts of `stress.json`, in words."""
TRAIN_SHARE = 5  # training images for each damaged one

Curves = dict[str, StressCurve]


@dataclass
class Split:
    """Real images of the data set `name` with their features and labels."""

    images: ImageSet
    labels: Tensor
    name: str

    def rows(self, rows: slice) -> Split:
        """A part of the split."""
        return Split(self.images.rows(rows), self.labels[rows], self.name)


def run_stress_study(
    dataset: str,
    evaluator: str,
    output: Path,
    *,
    num_samples: int = 1000,
    repeats: int = 3,
    seed: int = 0,
    device: Any = "cpu",
    data_options: Mapping[str, Any] | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Write `stress.json`, `stress.md`, `report.html` and pictures of all tests; returns the contents of `stress.json`.

    Args:
        dataset: real images with labels.
        evaluator: see `load_evaluator`.
        output: folder; complete tests of an earlier call with the same settings are kept.
        num_samples: number of damaged images and of reference images; at most half of the test split.
        repeats: draws of each damage, at least 3: intervals of fewer draws are too wide to be useful.
        seed: random seed for the choice of images and for all draws.
        device: device of the evaluator.
        data_options: options of `load_images`, such as `label_column`.
        log: takes the progress messages.

    Raises:
        InputError: images without labels, or an `output` made with other settings.
    """
    require(num_samples >= 2, "num_samples", "be at least 2", num_samples)
    require(repeats >= 3, "repeats", "be at least 3", repeats)
    file = user_path(output) / "stress.json"
    check_study_folder(file)
    extractor = load_evaluator(evaluator).to(device)
    options = dict(data_options or {})
    test, train = (load_split(dataset, split, extractor, num_samples, seed, **options) for split in ("test", "train"))
    count = min(num_samples, len(test.labels) // 2)
    damaged, reference = test.rows(slice(count)), test.rows(slice(count, 2 * count))
    pool = train.rows(slice(count))
    for drawn in (damaged, pool):
        empty = sorted(set(train.labels.tolist()) - set(drawn.labels.tolist()))
        require(not empty, "num_samples", f"be enough to draw every class, also {empty}", count)
    settings = {
        "dataset": test.name,
        "evaluator": weights_fingerprint(extractor),
        "num_samples": count,
        "repeats": repeats,
        "seed": seed,
        "data_options": options or None,
    }
    output = file.parent
    results = open_results(file, settings, evaluator_facts(extractor, reference.images))

    tests = {
        "source figures": original_tests(damaged, pool, repeats, seed),
        "curves": metric_tests(damaged, reference, train, extractor, repeats, seed),
    }
    for kind, curves_of in tests.items():
        for name, curves in curves_of.items():
            if name not in results[kind]:
                merged = results[kind] | {name: {metric: as_json(curve) for metric, curve in curves().items()}}
                results[kind] = {name: merged[name] for name in curves_of if name in merged}  # in one order
                write_json(file, results)
                log(f"{KINDS[kind]}, {name}: done")
    (output / "stress.md").write_text(markdown(results), encoding="utf-8")
    write_report(results, draw(results, output), output / "report.html")
    log(f"\n{markdown(results)}\nThe report: {output / 'report.html'}")
    return results


# --- The tests --------------------------------------------------------------------------------------------------------


def load_split(dataset: str, split: str, extractor: Any, num_samples: int, seed: int, **options: Any) -> Split:
    """A random choice of images of a split, as many as the tests need."""
    images = load_real_images(dataset, split, extractor, **options)
    count = num_samples * (2 if split == "test" else TRAIN_SHARE)
    rows = torch.randperm(len(images), generator=seeded_generator(seed))[:count]
    labels = labels_of(images)[rows]
    return Split(extract_image_set(pixels_of(images, rows), extractor, labels=labels), labels, images.name)


def metric_tests(
    damaged: Split, reference: Split, train: Split, extractor: Any, repeats: int, seed: int
) -> dict[str, Callable[[], Curves]]:
    """The curves of every metric for each damage."""
    damages: dict[str, Damage] = {
        "noise": add_noise,
        "missing classes": drop_classes(class_numbers(damaged)),
        "mode collapse": collapse_modes,
        "memorisation": memorise(train.images.images),
    }

    def measure(images: Tensor) -> Mapping[str, float]:
        return evaluate_images(images, reference=reference.images, extractor=extractor, train=train.images, seed=seed)

    def curves(name: str) -> Curves:
        amounts = amounts_of(name, damaged)
        return stress_test(damaged.images.images, damages[name], amounts, measure, repeats=repeats, seed=seed)

    return {name: partial(curves, name) for name in damages}


def class_numbers(split: Split) -> Tensor:
    """The labels, numbered from 0 without gaps."""
    return split.labels.unique(return_inverse=True)[1]


def amounts_of(name: str, split: Split, amounts: Mapping[str, tuple[float, ...]] = AMOUNTS) -> tuple[float, ...]:
    """The amounts of a test that leave at least one class and two different images."""
    classes, count = len(split.labels.unique()), len(split.labels)
    if name == "missing classes":
        return tuple(amount for amount in amounts[name] if amount < classes)
    if name == "mode collapse":
        return tuple(share for share in amounts[name] if count - round(share * count) >= 2)
    return amounts[name]


def original_tests(test: Split, train: Split, repeats: int, seed: int) -> dict[str, Callable[[], Curves]]:
    """The original study's figures: noise on the test features, classes removed from the training pool."""
    first, second = test.images.features, train.images.features

    def noise() -> Curves:
        distances = partial(original_distances, second)
        return stress_test(first, feature_noise, ORIGINAL_AMOUNTS["noise"], distances, repeats=repeats, seed=seed)

    def missing_classes() -> Curves:
        damage, amounts = drop_classes(class_numbers(train)), amounts_of("missing classes", train, ORIGINAL_AMOUNTS)
        return stress_test(second, damage, amounts, partial(original_distances, first), repeats=repeats, seed=seed)

    return {"noise": noise, "missing classes": missing_classes}


def feature_noise(features: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise on features [N, D], `sigma` in units of their standard deviation over all entries."""
    return features + sigma * features.std() * torch.randn(features.shape, generator=generator)


def original_distances(reference_features: Tensor, features: Tensor) -> dict[str, float]:
    """Sinkhorn (blur .05, scaling .9) and Fréchet distance of L2-normalised features."""
    pair = normalize(features), normalize(reference_features)
    return {"sinkhorn_distance": sinkhorn_distance(*pair), "frechet_distance": frechet_distance(*pair)}


# --- Results ----------------------------------------------------------------------------------------------------------


def open_results(file: Path, settings: Mapping[str, Any], extractor: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an earlier call with the same settings, or an empty frame.

    Raises:
        InputError: an earlier call had other settings.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        frame = {"settings": dict(settings), "extractor": dict(extractor), "source figures": {}, "curves": {}}
        return frame | {"provenance": provenance()}
    results = json.loads(file.read_text(encoding="utf-8"))
    require_same(settings, results["settings"], "output")
    return results


def as_json(curve: StressCurve) -> dict[str, Any]:
    """A curve as it is stored in `stress.json`."""
    return {"amounts": list(curve.amounts), "values": [list(v) for v in curve.values], "verdict": curve.verdict}


def as_curve(values: Mapping[str, Any]) -> StressCurve:
    """The inverse of `as_json`."""
    return StressCurve(tuple(values["amounts"]), tuple(tuple(draws) for draws in values["values"]))


def verdict_rows(results: Mapping[str, Any]) -> Rows:
    """Metrics down, damages across."""
    curves = results["curves"]
    metrics = [name for name in METRICS if any(name in by_metric for by_metric in curves.values())]
    rows = [[METRICS[m].label, *(cell(by_metric.get(m)) for by_metric in curves.values())] for m in metrics]
    return [["", *curves], *rows]


def original_rows(results: Mapping[str, Any]) -> Rows:
    """The original study's two distances down, its damages across."""
    figures = results["source figures"]
    rows = [[title, *(cell(test[metric]) for test in figures.values())] for metric, title in ORIGINAL_TITLES.items()]
    return [["", *figures], *rows]


def markdown(results: Mapping[str, Any]) -> str:
    """The verdicts: metrics down, damages across, each with its first and last mean."""
    settings = results["settings"]
    lead = (
        f"{settings['num_samples']} damaged test images of {settings['dataset']} compared with as many other test "
        f"images; {settings['repeats']} draws of each damage. {evaluator_line(results['extractor'])} {READING}"
    )
    verdicts, original = (report.markdown_rows(rows) for rows in (verdict_rows(results), original_rows(results)))
    return "\n\n".join([f"# {title_of(results)}", lead, verdicts, f"## {ORIGINAL_HEADING}", original]) + "\n"


def write_report(results: Mapping[str, Any], pictures: Mapping[str, Picture], file: Path) -> Path:
    """One self-contained page: the verdicts, with those of monotone curves marked, then the curves."""
    settings, extractor = results["settings"], results["extractor"]
    tables = verdict_rows(results), original_rows(results)
    verdicts, original = (rows_table(unbroken(rows), best=steady(rows), kind="sentences") for rows in tables)
    marked = "Green verdicts belong to curves that rise or fall without turning back."
    notes = [evaluator_line(extractor), READING, marked, *blind_spots(results)]
    sections = {"Verdicts": verdicts + paragraphs(notes), ORIGINAL_HEADING: original}
    sections |= {heading: figure(picture, heading) for heading, picture in pictures.items()}
    sections["Next steps"] = next_steps(report.NEXT[:1])
    sections["Provenance"] = provenance_list(results["provenance"] | {"settings": settings})
    facts = [
        f"{settings['num_samples']:,} damaged test images compared with as many others",
        f"{settings['repeats']} draws of each damage",
        f"evaluated by {extractor['name']}",
        *evaluator_properties(extractor),
    ]
    return write_page(file, title_of(results), sections, facts=facts)


def title_of(results: Mapping[str, Any]) -> str:
    """The title of the page."""
    return f"Stress tests: {results['settings']['dataset']}"


def unbroken(rows: Rows) -> Rows:
    """The cells with non-breaking spaces, so that lines break after the verdict only."""

    def join(text: str) -> str:
        verdict, colon, numbers = (part.replace(" ", "\N{NO-BREAK SPACE}") for part in text.partition(": "))
        return f"{verdict}: {numbers}" if colon else verdict

    return [rows[0], *([name, *map(join, cells)] for name, *cells in rows[1:])]


def steady(rows: Rows) -> set[tuple[int, int]]:
    """(line, column) of the cells of monotone curves."""
    return {
        (r, c)
        for r, (_, *cells) in enumerate(rows[1:])
        for c, text in enumerate(cells)
        if text.startswith(("rises", "falls"))
    }


def blind_spots(results: Mapping[str, Any]) -> list[str]:
    """A sentence for each damage with the metrics that do not respond to it."""
    flat = {
        name: [METRICS[metric].label for metric in METRICS if is_flat(by_metric.get(metric))]
        for name, by_metric in results["curves"].items()
    }
    return [
        f"These metrics do not respond to {name}: {'; '.join(metrics)}." for name, metrics in flat.items() if metrics
    ]


def is_flat(values: Mapping[str, Any] | None) -> bool:
    """Whether a metric does not respond to a damage; False if it was not measured."""
    return values is not None and as_curve(values).verdict == "flat"


def cell(values: Mapping[str, Any] | None) -> str:
    """A verdict with the first and last mean of the curve."""
    if values is None:
        return "–"
    curve = as_curve(values)
    first, last = curve.means[0], curve.means[-1]
    return f"{curve.trend}: {report.format_number(first)} → {report.format_number(last)}"


def draw(results: Mapping[str, Any], output: Path) -> dict[str, Picture]:
    """Heading to picture, one for each test."""
    pictures = {}
    for kind, labels, axes, prefix in (
        ("source figures", ORIGINAL_TITLES, ORIGINAL_AXES, "source_"),
        ("curves", {}, AXES, ""),
    ):
        for name, by_metric in results[kind].items():
            curves = {metric: as_curve(values) for metric, values in by_metric.items()}
            file = output / f"{prefix}{name.replace(' ', '_')}.png"
            heading = f"Original study's figure: {name}" if prefix else f"Every metric and {name}"
            caption = (
                f"Mean of each metric over {results['settings']['repeats']} draws with its 95% interval, from "
                "undamaged images on the left to the largest damage on the right. Blue curves rise or fall without "
                "turning back, grey curves do not."
            )
            pictures[heading] = Picture(plots.stress_curves(curves, file, xlabel=axes[name], titles=labels), caption)
    return pictures
