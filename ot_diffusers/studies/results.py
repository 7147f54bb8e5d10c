"""Scores of one random seed; means, intervals and paired differences over all of them; and tables of these."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..evaluation.evaluate import evaluate_images, floor_count, random_rows, real_floor
from ..evaluation.extractors import dataset_facts, evaluator_facts
from ..evaluation.health import evaluator_doubt
from ..evaluation.metric_table import COSTS, METRICS, SECOND
from ..launch.commands import SCRIPTS
from ..outgoing import without_local_paths
from ..reporting import report
from ..reporting.differences import (
    MIN_SEEDS,
    Values,
    curve_rows,
    difference_rows,
    differences,
    interval_rows,
    summarise,
    summary,
)
from ..reporting.page import Rows, provenance
from .axes import AXES
from .config import CURVE, NETWORKS, REAL, StudyConfig, Variant
from .sampling import sampled
from .study import Study, read_json, settings_of

Seeds = Sequence[Mapping[str, Any]]
"""The contents of `metrics.json` of every seed, see `evaluate_seed`."""


def evaluate_seed(study: Study, seed: int) -> dict[str, Any]:
    """Metrics and costs of every variant, and the real-vs-real score, with the same random subsets."""
    config, reference, real = study.config, study.test_images, study.train_images
    settings: dict[str, Any] = {"extractor": study.extractor, "seed": seed}
    measured = config.measured or None
    arms = {}
    for name, variant in config.sampled.items():
        samples = sampled(study, name, seed)
        names = [metric for metric in config.family if metric not in SECOND] if variant.role == CURVE else measured
        told: dict[str, Any] = {"metrics": names, "class_labels": samples.labels}
        metrics = evaluate_images(samples.images, reference=reference, train=real, **told, **settings)
        second = second_scores(study, samples.images, seed) if variant.role != CURVE else {}
        arms[name] = {"metrics": metrics | second, "cost": samples.cost}
    scored = {metric for arm in arms.values() for metric in arm["metrics"]} - SECOND.keys()
    floor = real_floor(reference, real, study.num_samples, metrics=scored, **settings)
    drawn = random_rows(real, study.num_samples, seed).images
    return {"arms": arms, "floor": floor | second_scores(study, drawn, seed)}


def second_scores(study: Study, images: Tensor, seed: int) -> dict[str, float]:
    """Metrics by the second evaluator; empty without one."""
    if study.second_extractor is None:
        return {}
    reference = study.second_test_images
    options: dict[str, Any] = {"extractor": study.second_extractor, "metrics": SECOND.values(), "seed": seed}
    values = evaluate_images(images, reference=reference, **options)
    return {second: values[name] for second, name in SECOND.items()}


# --- results.json -----------------------------------------------------------------------------------------------------


def default_title(names: Collection[str]) -> str:
    """The title of a study without one: the names of up to four methods, or their number.

    Example:
        >>> default_title(["plain", "guided"]), default_title("abcdef")
        ('plain · guided', '6 methods')
    """
    return " · ".join(names) if len(names) <= 4 else f"{len(names)} methods"


def collect(study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    """The contents of `results.json`: those of `reporting.report`, with differences, curves and the values of every
    seed."""
    config = study.config
    per_seed = [read_json(study.folder(seed) / "metrics.json") for seed in seeds]
    values: Values = {name: values_of(per_seed, name) for name in config.reported}
    floor = by_metric([run["floor"] for run in per_seed])
    data = dataset_facts(study.splits["test"])
    evaluator = evaluator_facts(study.extractor, study.test_images)
    second = config.second_evaluator is not None
    trusted = evaluator_doubt(evaluator) is None
    tested = [metric for metric in config.family if all(metric in by_name for by_name in values.values())]
    paired = {}
    if len(seeds) >= 2:
        paired = differences(values, primary=config.primary_metric, family=tested, trusted=trusted)
    results = {
        "title": f"{config.title or default_title(config.reported)}: {data['dataset']}",
        **data,
        "num_samples": study.num_samples,
        "num_test_images": len(study.test_images),
        "seeds": list(seeds),
        "complete": len(seeds) == len(study.seeds),
        "extractor": evaluator,
        **({"second_extractor": evaluator_facts(study.second_extractor, study.second_test_images)} if second else {}),
        "primary_metric": config.primary_metric,
        "headline": tested,
        "costs": list(config.costs),
        "arms": {name: entry_of(study, name, per_seed) for name in config.reported},
        "floor": summarise(floor),
        "differences": paired,
        **{AXES[axis].key: collect_curves(config, lines, per_seed, trusted) for axis, lines in config.curves.items()},
        "notes": notes(study, seeds),
        "next": next_commands(study, seeds),
        "per_seed": {name: dict(by_name) for name, by_name in values.items()} | {"real vs real": floor},
        "provenance": provenance() | {"study": settings_of(config)} | training_records(study, seeds[0]),
    }
    results = without_local_paths(results)
    return results | ({"summary": summary(results)} if results["differences"] else {})


def entry_of(study: Study, name: str, per_seed: Seeds) -> dict[str, Any]:
    """A row of the table: means with intervals, costs, and a description of the variant."""
    variant = study.config.arms[name]
    about = {"description": describe_variant(variant), "bound": variant.start == REAL}
    return summarise(values_of(per_seed, name)) | typical_costs(per_seed, name) | about


def collect_curves(
    config: StudyConfig, lines: Mapping[str, Mapping[str, str]], per_seed: Seeds, trusted: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    """Method → value on the axis → means of the metrics, costs, intervals, and values of every seed; with several seeds
    also the paired differences to the first method at the same value."""
    curves: dict[str, dict[str, dict[str, Any]]] = {}
    for method, line in lines.items():
        curves[method] = {}
        for value, name in line.items():
            values = {metric: of for metric, of in values_of(per_seed, name).items() if metric in config.family}
            summarised = summarise(values)
            point = summarised["metrics"] | typical_costs(per_seed, name)
            curves[method][value] = point | {"intervals": summarised["intervals"], "per_seed": values}
    first = config.compare_with if config.compare_with in curves else next(iter(curves), "")
    for method in [name for name in curves if name != first] if len(per_seed) >= 2 else ():
        for value, point in curves[method].items():
            if value in curves[first]:
                pair = {name: curves[name][value]["per_seed"] for name in (first, method)}
                family = [metric for metric in config.family if all(metric in values for values in pair.values())]
                compared = differences(pair, primary=config.primary_metric, family=family, trusted=trusted)
                point["differences"] = compared[method]
    return curves


def values_of(per_seed: Seeds, name: str) -> dict[str, list[float]]:
    """Metric → one value per seed of a variant."""
    return by_metric([run["arms"][name]["metrics"] for run in per_seed])


def by_metric(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name → one value per seed, for the names that every seed has."""
    return {name: [run[name] for run in runs] for name in runs[0] if all(name in run for run in runs)}


def typical_costs(per_seed: Seeds, name: str) -> dict[str, float]:
    """Medians over the seeds, which one slow moment of the machine does not change; equal counts stay counts."""
    costs = by_metric([run["arms"][name]["cost"] for run in per_seed])
    return {
        key: values[0] if len(set(values)) == 1 else round(statistics.median(values), 3)
        for key, values in costs.items()
    }


def describe_variant(variant: Variant) -> str:
    """The variant's own description, or a sentence made from its configuration."""
    if variant.description:
        return variant.description
    script = SCRIPTS[variant.train][0] if variant.train else None
    parts = [f"Trained by {script} for every seed" if script else f"The pipeline {variant.pipeline}"]
    parts += [f"from {variant.start}"] if variant.start else []
    parts += [f"{name}={value}" for name, value in variant.call.items()]
    parts += [f"guided by {variant.features}"] if variant.features else []
    return f"{', '.join(parts)}."


def training_records(study: Study, seed: int) -> dict[str, Any]:
    """The configurations of all training runs of one seed."""
    names = [name for name in NETWORKS if study.trains(name)] + list(study.config.trained)
    folders = [study.run(name, seed) for name in names]
    return {f"{folder.name} run": read_json(folder / "run.json")["config"] for folder in folders}


def notes(study: Study, seeds: Sequence[int]) -> list[str]:
    """Sentences that a reader needs in order to read the tables."""
    config = study.config
    given = {name: variant.pipeline for name, variant in config.reported.items() if variant.pipeline is not None}
    fixed = [name for name, pipeline in given.items() if "{" not in pipeline]
    primary = METRICS[config.primary_metric].title
    shared = (
        "All methods of one random seed share the starting noise, the data order, the initial weights and the random "
        "subsets of the evaluation."
    )
    drawn, available = floor_count(study.num_samples, len(study.train_images)), len(study.train_images)
    if drawn < study.num_samples:
        shared += f" The real-vs-real score is that of {drawn:,} training images, since there are only {available:,}."
    second = config.second_evaluator
    if second is not None and config.features is not None and study.resolve(second, 0) == study.network("features"):
        shared += " The second evaluator is the network of losses and guidance: its distances are not independent."
    if config.seed is not None:
        return [shared, *unfinished(study, config.seed)]
    sentences = [
        f"{primary} is the primary metric, which was fixed beforehand: it decides by its own 95% interval. In the "
        "other metrics, a difference is significant if its interval excludes 0 and Holm's correction over them agrees.",
        shared,
    ]
    once = [name for name, variant in config.trained.items() if variant.once]
    if once:
        sentences.append(
            "These runs were trained once for all seeds, so the intervals do not cover their training: "
            f"{', '.join(once)}."
        )
    if fixed:
        sentences.append(
            f"These methods use networks that existed before, so the seeds vary the starting noise only and the "
            f"intervals do not cover training: {', '.join(fixed)}."
        )
    if len(seeds) < MIN_SEEDS:
        sentences.append(f"With fewer than {MIN_SEEDS} seeds, every difference is inconclusive.")
    return [*sentences, *(note for seed in seeds for note in unfinished(study, seed))]


def next_commands(study: Study, seeds: Sequence[int]) -> list[tuple[str, str]]:
    """What a reader may do next, with commands that are run in the folder of the study."""
    config, seed = study.config, seeds[-1]
    trained = [name for name, variant in config.trained.items() if variant.train in ("baseline", "ot", "prior")]
    folders = [shlex.quote(study.run(name, seed).relative_to(study.output).as_posix()) for name in trained]
    steps = []
    if folders:
        steps.append(
            ("In the folder of this page, sample from a network of the study:", f"ot-diffusers sample {folders[0]}")
        )
    if folders and study.trains("features") and config.arms[trained[0]].train != "prior":
        guided = f"ot-diffusers sample {folders[0]} --features features"
        steps.append(("Sample from it with OT guidance:", f"{guided} --output runs/guided"))
    if config.seed is None:
        steps.append(
            (
                "Add random seeds, which are joined to these results: run the study again with",
                f"seeds={2 * config.seeds}",
            )
        )
    return [*steps, ("Draw this page again from its results:", "ot-diffusers report .")]


def unfinished(study: Study, seed: int) -> list[str]:
    """A sentence for each run that was stopped by its own time limit."""
    sentences = []
    for name in study.config.trained:
        run = read_json(study.run(name, seed) / "results.json")
        if not run["complete"]:
            spent = f"{run['training_seconds']:.0f} s and {run['updates']} training steps"
            sentences.append(f"{name} was stopped after {spent}, before the end of its preset.")
    return sentences


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables(results: Mapping[str, Any]) -> dict[str, Rows]:
    """Heading to table, for the report and the Markdown file; results of one seed have tables of their curves only."""
    tested, compared = results.get("headline", report.HEADLINE), results.get("differences", {})
    first, seeds = next(iter(results["arms"])), len(results.get("seeds", ()))
    by_caption = {f"{arm} compared with {first}": difference_rows(results, arm) for arm in compared}
    if seeds > 1:
        by_caption[f"Mean ± half of the 95% interval over {seeds} random seeds"] = interval_rows(results, tested)
        by_caption["Cost"] = cost_rows(results)
    for axis in AXES.values():
        for metric in axis.tabled or tested if results.get(axis.key) else ():
            by_caption[f"{METRICS[metric].title} by {axis.title}"] = curve_rows(
                results, axis.key, metric, title=axis.title
            )
    return by_caption


def cost_rows(results: Mapping[str, Any]) -> Rows:
    """The costs of every method of the table."""
    costs = [key for key in COSTS if any(key in entry for entry in results["arms"].values())]
    rows = [[name, *(report.format_number(entry.get(key)) for key in costs)] for name, entry in results["arms"].items()]
    return [["", *(COSTS[key] for key in costs)], *rows]


def text(results: Mapping[str, Any]) -> str:
    """The table of means for a terminal, above the summary and the notes."""
    return "\n\n".join([report.text_table(results), *filter(None, [results.get("summary")]), *results["notes"]])


def markdown(results: Mapping[str, Any]) -> str:
    """The tables in Markdown, with the evaluator, the numbers of images and the random seeds."""
    lead = (
        f"{results['num_samples']} generated images compared with {results['num_test_images']} test images of "
        f"{results['dataset']}; random seeds {results['seeds']}."
    )
    lead = f"{lead}\n\n**{results['summary']}**" if "summary" in results else lead
    single = [] if len(results["seeds"]) > 1 else [report.markdown_table(results)]
    parts = [
        f"## {caption}\n\n{report.captioned(report.markdown_rows(rows), results)}"
        for caption, rows in tables(results).items()
    ]
    remarks = "\n".join(f"* {note}" for note in results["notes"])
    return "\n\n".join([f"# {results['title']}", lead, *single, *parts, remarks]) + "\n"
