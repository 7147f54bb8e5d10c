"""Scores, the goal, and the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evaluation import report
from ..evaluation.evaluate import ImageSet, describe_images
from ..evaluation.extractors import dataset_facts, evaluator_facts
from ..evaluation.health import evaluator_doubt
from ..evaluation.metrics import frechet_distance
from ..evaluation.page import provenance
from ..experiment import Sampled, as_json, read_json
from ..outgoing import without_local_paths
from .config import COSTS, DESCRIPTIONS, GOAL_METRICS, HEADLINE, LABELS, ORACLE
from .sampling import goal_label, guided_label
from .study import Study
from .training import run_name


def score(row: Sampled, test: ImageSet, extractor: Any) -> dict[str, float]:
    """One point of the curves: Fréchet distance and cost."""
    found = describe_images(row.images, extractor).features
    return {
        "frechet_distance": frechet_distance(found, test.features),
        "seconds_per_1000": row.cost["seconds_per_1000"],
        "nfe": row.nfe,
    }


def collect(
    study: Study,
    rows: Mapping[str, Sampled],
    metrics: Mapping[str, Mapping[str, float]],
    floor: Mapping[str, float],
    scored: Mapping[str, Mapping[int, Mapping[str, float]]],
    test: ImageSet,
    extractor: Any,
) -> dict[str, Any]:
    """The contents of `results.json`: those of `evaluation.report`, with costs of training and the curves over T'."""
    main = study.config.truncation_timestep
    arms = {
        name: {
            "metrics": metrics[name],
            **row.cost,
            "description": describe(name),
            "bound": name == ORACLE,
        }
        for name, row in rows.items()
    }
    for name in study.priors:
        run = study.output / run_name(name, main)
        results = read_json(run / "results.json")
        costs = {key: results[key] for key in ("parameters", "training_seconds", "updates")}
        for label in (LABELS[name], guided_label(name), goal_label(study, name)):
            if label in arms:
                arms[label] |= costs
        arms[LABELS[name]]["config"] = read_json(run / "run.json")["config"]
    evaluator = evaluator_facts(extractor, test)
    results = {
        "title": f"Priors of the truncated chain, T' = {main}: {study.train_images.name}",
        **dataset_facts(study.train_images),
        "num_samples": study.num_samples,
        "num_test_images": len(study.test_images),
        "truncation_timestep": main,
        "extractor": evaluator,
        "headline": list(HEADLINE),
        "costs": list(COSTS),
        "arms": arms,
        "floor": {"metrics": dict(floor)},
        "curves": {
            name: {str(step): dict(values) for step, values in points.items()} for name, points in scored.items()
        },
        "notes": unfinished(study),
        "provenance": provenance() | {"study": as_json(study.config, "output_dir")},
    }
    summary = {"summary": goal(study, arms, evaluator)} if study.config.goal_timestep else {}
    return without_local_paths(results | summary)


def describe(name: str) -> str:
    """A sentence for a row."""
    plain, guided, _ = name.partition(", guided")
    sentence = DESCRIPTIONS.get(plain, "N(0, I) and the whole chain, by DDIM.")
    return f"{sentence} With OT guidance." if guided else sentence


def goal(study: Study, arms: Mapping[str, Mapping[str, Any]], evaluator: Mapping[str, Any]) -> str:
    """Whether the guided chains from the goal's T' are at least as good as the plain full one, a sentence for each; or
    why there is no verdict."""
    doubt = evaluator_doubt(evaluator)
    if doubt is not None:
        return f"No verdict, the evaluator cannot be trusted: {doubt}."
    steps = min(study.config.full_steps)
    full = arms[f"vanilla, full in {steps}"]
    sentences = []
    for name in study.guided:
        label = goal_label(study, name)
        met = all(arms[label]["metrics"][metric] <= full["metrics"][metric] for metric in GOAL_METRICS)
        values = [
            f"{title} {report.format_number(arms[label]['metrics'][metric])} "
            f"against {report.format_number(full['metrics'][metric])}"
            for metric, title in GOAL_METRICS.items()
        ]
        short, long = (arm["seconds_per_1000"] for arm in (arms[label], full))
        values.append(f"{short:.1f} s against {long:.1f} s per 1,000 images")
        verdict = "at least as good as" if met else "not as good in all as"
        sentences.append(
            f"{label}, {arms[label]['nfe']} network calls: {verdict} {steps} calls from noise ({', '.join(values)})."
        )
    return " ".join(sentences)


def unfinished(study: Study) -> list[str]:
    """A sentence for each prior that its time limit stopped."""
    found = []
    for name in study.priors:
        run = read_json(study.output / run_name(name, study.config.truncation_timestep) / "results.json")
        if not run["complete"]:
            spent = f"{run['training_seconds']:.0f} s and {run['updates']} updates"
            found.append(f"{LABELS[name]} was stopped after {spent}; its preset has more.")
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The table and the curves in Markdown, with evaluator and N of the Fréchet distance."""
    lead = (
        f"{results['num_samples']} generated against {results['num_test_images']} test images of "
        f"{results['dataset']}; T' = {results['truncation_timestep']}."
    )
    steps = list(dict.fromkeys(step for points in results["curves"].values() for step in points))
    curves = [f"| Fréchet at T' = | {' | '.join(steps)} |", f"| --- |{' ---: |' * len(steps)}"]
    for name, points in results["curves"].items():
        values = (report.format_number(points.get(step, {}).get("frechet_distance")) for step in steps)
        curves.append(f"| {name} | {' | '.join(values)} |")
    notes = [f"* {note}" for note in results["notes"]]
    summary = [f"**{results['summary']}**"] if "summary" in results else []
    blocks = [[lead], summary, [report.markdown_table(results)], curves if steps else [], notes]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"
