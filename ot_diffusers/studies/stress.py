"""Which metric sees what? Real images with noise, without classes, collapsed or copied, under every metric.

    ot-diffusers stress --dataset digits --evaluator runs/digits/evaluator

The damaged images are one half of the test split, the reference is the other, so that undamaged ones score what real
images score. Two further figures are those of the original study: its transport distance and its Fréchet distance, both
in L2-normalised features, between test images whose features get noise and training images, and between test images and
a training pool without some classes.
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
from ..reporting.page import Rows, paragraphs, picture, provenance, provenance_list, rows_table, write_page
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
ORIGINAL_HEADING = "The source study's figures: L2-normalised features, test against training images"
READING = (
    "A metric rises or falls where its mean never turns back, and is flat where no amount differs from undamaged "
    "images; the numbers are the means for undamaged images and for the largest amount."
)
TRAIN_SHARE = 5  # training images for each damaged one

Curves = dict[str, StressCurve]


@dataclass
class Split:
    """Real images of the data set of that name and their labels, described by the evaluator."""

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
    """Run all tests; write `stress.json`, `stress.md`, `report.html` and pictures; returns what `stress.json` holds.

    Args:
        dataset: real images with labels.
        evaluator: of `load_evaluator`.
        output: folder; tests that an earlier call with the same settings finished are kept.
        num_samples: images damaged, and as many of the reference; at most half of the test split.
        repeats: draws of each damage, at least 3: intervals from fewer say nothing.
        seed: decides which images and all draws.
        device: of the evaluator.
        data_options: of `load_images`, such as `label_column`.
        log: takes the lines that tell how far it is.

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
                log(f"{kind}, {name}: done")
    (output / "stress.md").write_text(markdown(results), encoding="utf-8")
    write_report(results, draw(results, output), output / "report.html")
    log(f"\n{markdown(results)}\nPictures and numbers: {output / 'report.html'}")
    return results


# --- The tests --------------------------------------------------------------------------------------------------------


def load_split(dataset: str, split: str, extractor: Any, num_samples: int, seed: int, **options: Any) -> Split:
    """As many images of a split as the tests need, drawn by `seed`."""
    images = load_real_images(dataset, split, extractor, **options)
    count = num_samples * (2 if split == "test" else TRAIN_SHARE)
    rows = torch.randperm(len(images), generator=seeded_generator(seed))[:count]
    labels = labels_of(images)[rows]
    return Split(extract_image_set(pixels_of(images, rows), extractor, labels=labels), labels, images.name)


def metric_tests(
    damaged: Split, reference: Split, train: Split, extractor: Any, repeats: int, seed: int
) -> dict[str, Callable[[], Curves]]:
    """Every damage under every metric."""
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
    """Its labels without the numbers of classes that have no image."""
    return split.labels.unique(return_inverse=True)[1]


def amounts_of(name: str, split: Split, amounts: Mapping[str, tuple[float, ...]] = AMOUNTS) -> tuple[float, ...]:
    """The amounts of a test that leave a class, and two different images."""
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
    """What an earlier call with the same settings left, or the frame of new results.

    Raises:
        InputError: other settings.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        frame = {"settings": dict(settings), "extractor": dict(extractor), "source figures": {}, "curves": {}}
        return frame | {"provenance": provenance()}
    results = json.loads(file.read_text(encoding="utf-8"))
    require_same(settings, results["settings"], "output")
    return results


def as_json(curve: StressCurve) -> dict[str, Any]:
    """A curve as `results.json` holds it."""
    return {"amounts": list(curve.amounts), "values": [list(v) for v in curve.values], "verdict": curve.verdict}


def as_curve(values: Mapping[str, Any]) -> StressCurve:
    """A curve from what `as_json` gave."""
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
        f"{settings['num_samples']} damaged test images of {settings['dataset']} against as many others; "
        f"{settings['repeats']} draws. {evaluator_line(results['extractor'])} {READING}"
    )
    verdicts, original = (report.markdown_rows(rows) for rows in (verdict_rows(results), original_rows(results)))
    return "\n\n".join([f"# {title_of(results)}", lead, verdicts, f"## {ORIGINAL_HEADING}", original]) + "\n"


def write_report(results: Mapping[str, Any], pictures: Mapping[str, Path], file: Path) -> Path:
    """One self-contained page: the verdicts, steady ones marked, then the curves behind them."""
    settings, extractor = results["settings"], results["extractor"]
    tables = verdict_rows(results), original_rows(results)
    verdicts, original = (rows_table(unbroken(rows), best=steady(rows), kind="sentences") for rows in tables)
    notes = [evaluator_line(extractor), READING, *blind_spots(results)]
    sections = {"Verdicts": verdicts + paragraphs(notes), ORIGINAL_HEADING: original}
    sections |= {caption: picture(caption, path) for caption, path in pictures.items()}
    sections["Provenance"] = provenance_list(results["provenance"] | {"settings": settings})
    facts = [
        f"{settings['num_samples']:,} damaged test images against as many others",
        f"{settings['repeats']} draws",
        f"evaluated by {extractor['name']}",
        *evaluator_properties(extractor),
    ]
    return write_page(file, title_of(results), sections, facts=facts)


def title_of(results: Mapping[str, Any]) -> str:
    """The title of the page."""
    return f"Stress tests: {results['settings']['dataset']}"


def unbroken(rows: Rows) -> Rows:
    """The cells with no line break but after the verdict."""

    def join(text: str) -> str:
        verdict, colon, numbers = (part.replace(" ", "\N{NO-BREAK SPACE}") for part in text.partition(": "))
        return f"{verdict}: {numbers}" if colon else verdict

    return [rows[0], *([name, *map(join, cells)] for name, *cells in rows[1:])]


def steady(rows: Rows) -> set[tuple[int, int]]:
    """(line, column) of the cells that rise or fall without turning back."""
    return {
        (r, c)
        for r, (_, *cells) in enumerate(rows[1:])
        for c, text in enumerate(cells)
        if text.startswith(("rises", "falls"))
    }


def blind_spots(results: Mapping[str, Any]) -> list[str]:
    """For each damage, the metrics that do not move at all."""
    flat = {
        name: [METRICS[metric].label for metric in METRICS if is_flat(by_metric.get(metric))]
        for name, by_metric in results["curves"].items()
    }
    return [f"Blind to {name}: {'; '.join(metrics)}." for name, metrics in flat.items() if metrics]


def is_flat(values: Mapping[str, Any] | None) -> bool:
    """Whether a metric does not answer to a damage; False where it was not measured."""
    return values is not None and as_curve(values).verdict == "flat"


def cell(values: Mapping[str, Any] | None) -> str:
    """A verdict with the ends of its curve."""
    if values is None:
        return "–"
    curve = as_curve(values)
    first, last = curve.means[0], curve.means[-1]
    return f"{curve.trend}: {report.format_number(first)} → {report.format_number(last)}"


def draw(results: Mapping[str, Any], output: Path) -> dict[str, Path]:
    """One picture for each test, caption to file."""
    titles = {name: metric.label for name, metric in METRICS.items()}
    pictures = {}
    for kind, labels, axes, prefix in (
        ("source figures", ORIGINAL_TITLES, ORIGINAL_AXES, "source_"),
        ("curves", titles, AXES, ""),
    ):
        for name, by_metric in results[kind].items():
            curves = {metric: as_curve(values) for metric, values in by_metric.items()}
            file = output / f"{prefix}{name.replace(' ', '_')}.png"
            caption = f"The source study's figure: {name}" if prefix else f"Every metric under {name}"
            pictures[caption] = plots.stress_curves(curves, file, xlabel=axes[name], titles=labels)
    return pictures
