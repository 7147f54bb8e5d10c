"""The networks and the priors of the study, each the run of a script."""

from __future__ import annotations

import torch

from ..evaluation.extractors import load_evaluator
from ..experiment import EVALUATOR_SEED, check_independent, train
from ..features import check_trained_on, load_feature_extractor, load_reference_bank
from ..launch import training_command
from ..models.feature_extractor import FeatureExtractor
from ..sampling import load_pipeline
from .config import LEARNED
from .study import Study


def check_parts(study: Study) -> None:
    """Refuse networks that do not exist and presets that cannot be trained, before anything is written."""
    config = study.config
    if config.denoiser is not None:
        load_pipeline(config.denoiser)
    if config.feature_extractor is not None:
        load_feature_extractor(config.feature_extractor)
    if config.evaluator is not None:
        evaluator = load_evaluator(config.evaluator)
        if isinstance(evaluator, FeatureExtractor):
            check_trained_on(evaluator, study.train_images, "evaluator")
    if config.guided and config.feature_extractor is not None:
        load_reference_bank(config.feature_extractor)
    network_runs(study)
    prior_runs(study, config.truncation_timestep, study.priors)


def train_networks(study: Study) -> None:
    """The denoiser, the feature network and the evaluator, where the configuration names none.

    Raises:
        InputError: one network for losses and evaluation.
    """
    runs = network_runs(study)
    if runs:
        train(runs, study.output, "train the denoiser, the feature network and the evaluator", study.announce)
    check_independent(load_evaluator(study.evaluator), load_feature_extractor(study.feature_extractor))


def network_runs(study: Study) -> dict[str, list[str]]:
    """Folder of each network's run to the command that trains it."""
    config = study.config
    runs = {}
    for name, script, given, seed in (
        ("baseline", "baseline", config.denoiser, config.seed),
        ("features", "features", config.feature_extractor, config.seed),
        ("evaluator", "features", config.evaluator, EVALUATOR_SEED + config.seed),
    ):
        if given is None:
            own = [f"dataset={config.dataset}", "report_to=none", *study.overrides]
            own += [f"seed={seed}", f"output_dir={study.output / name}"]
            runs[name] = training_command(script, own, config=f"{config.presets}/{name}.yaml")
    return runs


def train_priors(study: Study) -> None:
    """The priors of the table, then those of the curves."""
    config = study.config
    main = config.truncation_timestep
    closed_form = tuple(name for name in study.priors if name not in LEARNED)
    learned = tuple(name for name in LEARNED if name in study.priors)
    train(prior_runs(study, main, closed_form), study.output, "fit the closed-form priors", study.announce)
    runs: dict[str, list[str]] = {}
    for step in dict.fromkeys((main, *config.learned_timesteps)):
        runs |= prior_runs(study, step, learned)
    names, side_by_side = list(runs), 1 if torch.cuda.is_available() else 2
    for first in range(0, len(names), side_by_side):
        group = {name: runs[name] for name in names[first : first + side_by_side]}
        train(group, study.output, f"train {' and '.join(group)}", study.announce)


def prior_runs(study: Study, truncation_timestep: int, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Folder of each prior's run, under the study's, to the command that trains it."""
    config = study.config
    commands = {}
    for name in names:
        run = run_name(name, truncation_timestep)
        options = [
            f"dataset={config.dataset}",
            f"denoiser={study.denoiser}",
            f"truncation_timestep={truncation_timestep}",
            f"output_dir={study.output / run}",
            f"seed={config.seed}",
            "report_to=none",
        ]
        if name == "ot":
            options.append(f"feature_extractor={study.feature_extractor}")
        if name == "gaussian_classes":
            options.append("class_wise=true")
        limits = {"max_train_steps": config.max_train_steps, "max_train_seconds": config.max_train_seconds}
        if name in LEARNED:
            options += [f"{key}={value}" for key, value in limits.items() if value is not None]
        options += study.overrides
        preset = f"{config.presets}/prior_{name.removesuffix('_classes')}.yaml"
        commands[run] = training_command("prior", options, config=preset)
    return commands


def run_name(name: str, truncation_timestep: int) -> str:
    """Folder of a prior's run."""
    return f"prior_{name}_{truncation_timestep}"
