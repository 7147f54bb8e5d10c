"""Means, intervals and paired differences over the seeds, and the tables that show them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import report
from ..evaluation.differences import MIN_SEEDS, Values, difference_rows, differences, interval_rows, summarise, summary
from ..evaluation.extractors import evaluator_facts
from ..evaluation.health import evaluator_doubt
from ..evaluation.page import Rows, provenance
from ..experiment import read_json
from ..launch import SCRIPTS
from .config import Arm, ComparisonConfig
from .study import Study, settings


def collect(study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    """The contents of `results.json`: those of `evaluation.report`, with differences, costs and every seed's values."""
    config = study.config
    found = [read_json(study.folder(seed) / "metrics.json") for seed in seeds]
    values: Values = {name: by_metric([run["arms"][name]["metrics"] for run in found]) for name in config.reported}
    floor = by_metric([run["floor"] for run in found])
    costs = {name: by_metric([run["arms"][name]["cost"] for run in found]) for name in config.reported}
    arms = {
        name: summarise(values[name])
        | {key: mean_cost(costs[name][key]) for key in costs[name]}
        | {"description": describe_arm(arm)}
        for name, arm in config.reported.items()
    }
    tested = [metric for metric in config.family if all(metric in found for found in values.values())]
    evaluator = evaluator_facts(study.extractor, study.test_images)
    testing: dict[str, Any] = {
        "primary": config.primary_metric,
        "family": tested,
        "trusted": evaluator_doubt(evaluator) is None,
    }
    results = {
        "title": f"{' · '.join(config.reported)}: {config.dataset}",
        "dataset": config.dataset,
        "num_samples": study.num_samples,
        "num_test_images": len(study.test_images),
        "seeds": list(seeds),
        "complete": len(seeds) == config.seeds,
        "extractor": evaluator,
        "primary_metric": config.primary_metric,
        "headline": tested,
        "costs": ["nfe", "seconds_per_1000"],
        "arms": arms,
        "floor": summarise(floor),
        "differences": differences(values, **testing) if len(seeds) >= 2 else {},
        "notes": notes(config, len(seeds)),
        "per_seed": {name: dict(found) for name, found in values.items()} | {"real vs real": floor},
        "provenance": provenance() | {"comparison": settings(config)},
    }
    return results | ({"summary": summary(results)} if results["differences"] else {})


def by_metric(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name → one value per seed, for what every seed has."""
    return {name: [run[name] for run in runs] for name in runs[0] if all(name in run for run in runs)}


def mean_cost(values: Sequence[float]) -> float:
    """The mean; counts that are alike stay counts."""
    return values[0] if len(set(values)) == 1 else round(statistics.fmean(values), 3)


def describe_arm(arm: Arm) -> str:
    """The arm's own sentence, or what it is."""
    if arm.description:
        return arm.description
    what = f"trained by {SCRIPTS[arm.train][0]} for every seed" if arm.train else f"the pipeline {arm.pipeline}"
    settings = "".join(f", {name}={value}" for name, value in arm.call.items())
    return f"{what[0].upper()}{what[1:]}{settings}{f', guided by {arm.features}' if arm.features else ''}."


def notes(config: ComparisonConfig, num_seeds: int) -> list[str]:
    """What a reader must know to read the tables."""
    fixed = [name for name, arm in config.arms.items() if arm.pipeline is not None and "{" not in arm.pipeline]
    primary = report.METRICS[config.primary_metric].label
    found = [
        f"{primary} is the primary metric, fixed beforehand: it decides by its own 95% interval. The others show a "
        "difference where the interval leaves out 0 and Holm's correction over them agrees.",
        "All arms of a seed share the starting noise, the data order, the initial weights and the evaluation's random "
        "subsets.",
    ]
    if fixed:
        found.append(
            f"{', '.join(fixed)}: trained before, so the seeds vary the starting noise only. The intervals speak of "
            "these networks, not of how they were trained."
        )
    if num_seeds < MIN_SEEDS:
        found.append(f"Fewer than {MIN_SEEDS} seeds show no difference, whatever it is.")
    return found


def tables(results: Mapping[str, Any]) -> dict[str, Rows]:
    """Caption to table, for the report and the Markdown file."""
    tested = next(iter(results["differences"].values()), dict.fromkeys(report.HEADLINE))
    first = next(iter(results["arms"]))
    found = {f"{arm} against {first}": difference_rows(results, arm) for arm in results["differences"]}
    found[f"Mean ± 95% interval over {len(results['seeds'])} seeds"] = interval_rows(results, list(tested))
    costs = [key for key in report.COSTS if any(key in entry for entry in results["arms"].values())]
    rows = [[name, *(report.format_number(entry.get(key)) for key in costs)] for name, entry in results["arms"].items()]
    return found | {"Cost": [["", *(report.COSTS[key] for key in costs)], *rows]}


def markdown(results: Mapping[str, Any]) -> str:
    """The tables in Markdown, with evaluator, N and seeds of the distances."""
    lead = (
        f"{results['num_samples']} generated against {results['num_test_images']} test images of {results['dataset']}; "
        f"seeds {results['seeds']}."
    )
    lead = f"{lead}\n\n**{results['summary']}**" if "summary" in results else lead
    parts = [
        f"## {caption}\n\n{report.captioned(report.markdown_rows(rows), results)}"
        for caption, rows in tables(results).items()
    ]
    remarks = "\n".join(f"* {note}" for note in results["notes"])
    return "\n\n".join([f"# {results['title']}", lead, *parts, remarks]) + "\n"
